"""What a cut lost, regressed back: the formula, what stays as it is, and that the error falls on images that were not seen."""

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs
from keras import layers, ops

import keras_morph as km
from keras_morph import pipeline
from keras_morph.graph import examples
from keras_morph.graph.examples import elements, image_batches
from keras_morph.graph.streaming import Stream
from keras_morph.surgery import recovery
from keras_morph.surgery.recovery import _matrices, _Places, _results, _values, loses

TINY_RIDGE = 1e-9


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def recovered(model, structure, x, **options):
    small = km.rebuild(model, structure)
    km.recover(small, model, structure, x, **options)
    return small


def predicted(model, x):
    return ops.convert_to_numpy(model(x, training=False)).astype(np.float64)


# A stream computes what the model does.


@pytest.mark.one_of(8)
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_a_stream_makes_the_tensors_of_the_model_and_lets_them_go(name):
    model = models.build(name)
    graph, x = km.trace(model), models.examples(model)
    stream = Stream(graph, image_batches(graph, x), graph.outputs)
    for _ in stream:
        pass
    assert set(stream.values) <= {*graph.outputs, *graph.inputs}
    received = [np.concatenate([ops.convert_to_numpy(batch) for batch in stream[t]]) for t in graph.outputs]
    assert_equal_outputs(received, models.outputs(model, x))


@pytest.mark.one_of(8)
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_batches_that_come_in_later_are_computed_like_the_first(name):
    """There is room for a single batch where tensors are largest."""
    model = models.build(name)
    graph, x = km.trace(model), models.examples(model)
    batches = [[array[i : i + 2] for array in batch] for batch in image_batches(graph, x) for i in (0, 2)]
    stream, present = Stream(graph, batches, graph.outputs, most=2 * max(map(elements, graph.tensors))), []
    for _ in stream:
        present.append(stream.present)
        assert {len(values) for values in stream.values.values()} == {stream.present}
    assert present == sorted(present)
    received = [np.concatenate([ops.convert_to_numpy(batch) for batch in stream[t]]) for t in graph.outputs]
    expected = models.outputs(model, x)
    assert_equal_outputs(received, [output[: len(one)] for output, one in zip(expected, received, strict=True)])


@pytest.mark.once
def test_a_late_layer_has_more_images_than_an_early_one():
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv")(image)
    outputs = layers.Dense(3, name="out")(layers.GlobalAveragePooling2D(name="pool")(x))
    model = models.randomize(keras.Model(image, outputs), seed=0)
    x = images(10, 8, 8, 1)
    stream = Stream(km.trace(model), [[x[i : i + 2]] for i in range(0, 10, 2)], most=4 * 8 * 8 * 4)
    assert [stream.present for _ in stream] == [2, 2, 5]


# The formula.


def dense(activation=None):
    """features(6) -- hidden(5) -- out(3)."""
    x = keras.Input((6,), name="features")
    hidden = layers.Dense(5, activation="tanh", name="hidden")(x)
    return models.randomize(keras.Model(x, layers.Dense(3, activation=activation, name="out")(hidden)), seed=1)


def cut(model, layer, dead):
    """The structure without these channels of a layer."""
    graph = km.trace(model)
    alive = np.ones(graph.num_groups, bool)
    made = {each.name: each.made for each in graph.layers}[layer]
    alive[graph.group_of[made[list(dead)]]] = False
    return km.Structure.closed(graph, alive)


def test_it_is_ridge_regression_of_the_dead_channels_on_the_others():
    """B = S_DA (S_AA + l I)^-1; the kernel gains B' K_D, and the bias K_D' (mean_D - B mean_A)."""
    model, x = dense("softmax"), images(100, 6)
    alive, dead = [0, 2, 4], [1, 3]
    small = recovered(model, cut(model, "hidden", dead), x, ridge=0.1)
    hidden = _values(model.get_layer("hidden")(x))
    mean, covariance = hidden.mean(0), np.cov(hidden.T, bias=True)
    inside = covariance[np.ix_(alive, alive)]
    held = inside + 0.1 * np.mean(np.diag(inside)) * np.eye(3)
    b = covariance[np.ix_(dead, alive)] @ np.linalg.inv(held)
    kernel, bias = (_values(weight) for weight in model.get_layer("out").weights)
    received = [_values(weight) for weight in small.get_layer("out").weights]
    np.testing.assert_allclose(received[0], kernel[alive] + b.T @ kernel[dead], rtol=1e-4, atol=1e-5)
    constant = kernel[dead].T @ (mean[dead] - b @ mean[alive])
    np.testing.assert_allclose(received[1], bias + constant, rtol=1e-4, atol=1e-5)
    for one, other in zip(small.get_layer("hidden").weights, model.get_layer("hidden").weights, strict=True):
        np.testing.assert_array_equal(_values(one), np.take(_values(other), alive, -1))


def test_of_images_that_are_all_alike_only_the_constant_is_learned():
    model, x = dense(), np.repeat(images(1, 6), 8, axis=0)
    structure = cut(model, "hidden", [1, 3])
    small, plain = recovered(model, structure, x), km.rebuild(model, structure)
    np.testing.assert_allclose(_values(small.layers[-1].kernel), _values(plain.layers[-1].kernel), rtol=1e-5)
    np.testing.assert_allclose(predicted(small, x), predicted(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.one_of(12)
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_where_nothing_is_lost_nothing_changes(name):
    """Law 1: of the masked seed, whose dead channels are cut off, the rebuilt model loses nothing."""
    model = models.build(name)
    structure = structures.draw(km.trace(model), "half", seed=1)
    masked, x = km.masked(model, structure), models.examples(model, count=8)
    small = recovered(masked, structure, x)
    assert_equal_outputs(models.outputs(small, x), models.outputs(masked, x), tolerance=1e-4)


def names_alike(apart):
    """`enc/dense` beside `enc_dense`: inside a nested model, which is taken apart where one of its outputs is dead."""
    tokens, x = keras.Input((6,)), keras.Input((6,))
    inside = layers.Dense(6, activation="tanh", name="dense")(tokens)
    enc = keras.Model(tokens, [inside, layers.Dense(4, name="other")(inside)] if apart else [inside], name="enc")
    first = keras.tree.flatten(enc(x))[0]
    return models.randomize(keras.Model(x, layers.Dense(6, name="enc_dense")(first)), seed=1)


@pytest.mark.parametrize("apart", [False, True])
def test_layers_are_fitted_to_those_that_they_stand_for_though_names_are_alike(apart):
    model, x = names_alike(apart), images(200, 6)
    whole = km.Structure.closed(km.trace(model), np.ones(km.trace(model).num_groups, bool))
    assert_equal_outputs([predicted(recovered(model, whole, x), x)], [predicted(model, x)], tolerance=1e-4)
    half = km.fit_budget(model, km.Budget("50%", round_to=1))
    small, plain = recovered(model, half, x), km.rebuild(model, half)
    wanted = predicted(model, x)
    assert np.square(predicted(small, x) - wanted).mean() < 0.8 * np.square(predicted(plain, x) - wanted).mean()


def test_numbers_as_large_as_time_stamps_are_no_trouble():
    x = images(300, 40)
    x[:, :20] = (1.7e9 * (1 + np.random.default_rng(1).random(20))).astype("float32")
    features = keras.Input((40,))
    y = layers.Dense(16, activation="relu")(layers.BatchNormalization(name="norm")(features))
    model = keras.Model(features, layers.Dense(2)(y))
    model.get_layer("norm").moving_mean.assign(x.mean(0, dtype="float64").astype("float32"))
    small = km.prune(model, "50%", calibration=x)
    assert np.isfinite(predicted(small, x)).all()
    assert ops.convert_to_numpy(small.get_layer("norm").moving_variance).min() >= 0


@pytest.mark.parametrize(
    "constraint", [keras.constraints.NonNeg(), keras.constraints.MaxNorm(1.0)], ids=["sign", "norm"]
)
def test_kernels_keep_to_their_constraints(constraint):
    features = keras.Input((8,))
    y = layers.Dense(16, activation="relu", kernel_constraint=constraint, name="hidden")(features)
    model = keras.Model(features, layers.Dense(3, kernel_constraint=constraint, name="head")(y))
    models.randomize(model, seed=3)
    for layer in model.layers[1:]:
        layer.kernel.assign(constraint(layer.kernel))
    x, structure = images(300, 8), cut(model, "hidden", range(9))
    small, plain = recovered(model, structure, x), km.rebuild(model, structure)
    for layer in small.layers[1:]:
        np.testing.assert_allclose(_values(constraint(layer.kernel)), _values(layer.kernel), atol=1e-6)
    wanted = predicted(model, x)
    assert np.square(predicted(small, x) - wanted).mean() < np.square(predicted(plain, x) - wanted).mean()


# Every layer that is fitted.

READERS = {
    "Dense": (2, layers.Dense, {"units": 3}),
    "Conv1D causal": (1, layers.Conv1D, {"filters": 3, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}),
    "Conv2D": (2, layers.Conv2D, {"filters": 3, "kernel_size": (2, 3), "activation": "relu"}),
    "Conv2D same": (2, layers.Conv2D, {"filters": 3, "kernel_size": 3, "padding": "same", "strides": 2}),
    "Conv2D dilated": (2, layers.Conv2D, {"filters": 3, "kernel_size": 2, "padding": "same", "dilation_rate": (2, 3)}),
    "Conv2D grouped": (2, layers.Conv2D, {"filters": 6, "kernel_size": 3, "groups": 3}),
    "Conv3D": (3, layers.Conv3D, {"filters": 3, "kernel_size": 2, "strides": (1, 2, 1), "padding": "same"}),
    "SeparableConv1D": (1, layers.SeparableConv1D, {"filters": 3, "kernel_size": 3, "padding": "same", "strides": 2}),
    "SeparableConv2D": (2, layers.SeparableConv2D, {"filters": 3, "kernel_size": (3, 2), "depth_multiplier": 2}),
    "DepthwiseConv1D": (1, layers.DepthwiseConv1D, {"kernel_size": 3, "padding": "same", "depth_multiplier": 2}),
    "DepthwiseConv2D": (2, layers.DepthwiseConv2D, {"kernel_size": 3, "strides": 2, "depth_multiplier": 2}),
}


@pytest.mark.parametrize("name", READERS)
def test_patches_times_kernel_is_what_the_layer_computes(name):
    rank, kind, config = READERS[name]
    layer, x = kind(**{**config, "activation": None}), images(2, *(7, 6, 5)[:rank], 6)
    made = _values(layer(x))
    places = _Places(layer, x, 1, np.random.default_rng(0))
    received = _results(places.patches(layer, x), _matrices(layer)) + _values(layer.bias)
    np.testing.assert_allclose(received.reshape(made.shape), made, rtol=1e-4, atol=1e-5)


@pytest.mark.one_of(6)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [name for name in READERS if "Depthwise" not in name and "Separable" not in name])
def test_what_others_say_too_is_not_lost(name, bias):
    """Every other channel of `double` is a multiple of the one in front of it, so that nothing is missing without them.

    image(2) -- double(6) -- the reader [-- bn] -- relu
    """
    rank, kind, config = READERS[name]
    image = keras.Input((*(7, 6, 5)[:rank], 2))
    x = layers.Dense(6, name="double")(image)
    x = kind(**config, use_bias=bias, name="reader")(x)
    x = x if bias else layers.BatchNormalization(name="bn")(x)
    model = models.randomize(keras.Model(image, layers.ReLU(name="relu")(x)), seed=1)
    double = model.get_layer("double")
    for weight in double.weights:
        values = _values(weight)
        values[..., 1::2] = np.array([2.0, -3.0, 0.5]) * values[..., ::2]
        weight.assign(values)
    graph = km.trace(model, grouped="equal")
    alive = np.ones(graph.num_groups, bool)
    owned = np.flatnonzero(graph.owner == [each.name for each in graph.layers].index("double"))
    alive[graph.group_of[owned[1::2]]] = False
    structure, x = km.Structure.closed(graph, alive), images(60, *image.shape[1:])
    small = recovered(graph, structure, x, ridge=TINY_RIDGE)
    received, unseen = models.outputs(small, x), images(4, *image.shape[1:], seed=1)
    assert small.count_params() < model.count_params()
    assert_equal_outputs(received, models.outputs(model, x), tolerance=2e-3)
    assert_equal_outputs(models.outputs(small, unseen), models.outputs(model, unseen), tolerance=2e-3)


# Whole networks, on images that were not seen.


def error(model, seed, x):
    """Mean square of the difference to the seed's outputs, as a share of their variance; the largest of all outputs."""
    pairs = zip(models.outputs(model, x), models.outputs(seed, x), strict=True)
    return max(float(np.mean(np.square(one - other)) / np.var(other)) for one, other in pairs)


NETWORKS = ["residual_identity", "residual_projection", "inverted_residual", "separable", "two_outputs", "grouped"]


@pytest.mark.once
@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_falls_on_images_that_were_not_seen(name):
    model = models.build(name)
    graph = km.trace(model)
    structure = km.Structure.closed(graph, np.random.default_rng(0).random(graph.num_groups) < 0.7)
    x, unseen = models.examples(model, count=256), models.examples(model, count=64, seed=1)
    small, plain = recovered(model, structure, x), km.rebuild(model, structure)
    assert error(small, model, unseen) < 0.5 * error(plain, model, unseen)


def test_batchnormalization_moves_by_as_much_as_its_operand_does():
    model = models.build("plain")
    structure = cut(model, "conv1", [0, 3])
    x = models.examples(model, count=50)
    model_norm, kept = model.get_layer("bn1"), [1, 2, 4]
    norm = recovered(model, structure, x).get_layer("bn1")
    # Nothing in front of it was lost, so that it computes what it did; by the statistics of what it is given now.
    for one, other in zip(_scale_and_offset(norm), _scale_and_offset(model_norm), strict=True):
        np.testing.assert_allclose(one, other[kept], rtol=1e-4, atol=1e-5)
    operand = keras.Model(model.inputs, model_norm.input)(x, training=False)
    mean, variance = np.mean(_values(operand), (0, 1, 2)), np.var(_values(operand), (0, 1, 2))
    np.testing.assert_allclose(_values(norm.moving_mean), mean[kept], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_values(norm.moving_variance), variance[kept], rtol=1e-4, atol=1e-5)


def _scale_and_offset(norm):
    scale = _values(norm.gamma) / np.sqrt(_values(norm.moving_variance) + norm.epsilon)
    return scale, _values(norm.beta) - scale * _values(norm.moving_mean)


@pytest.mark.once
def test_in_training_a_recovered_network_computes_what_it_does_in_inference():
    """By the statistics of a batch, if it is that of the images: a training goes on from what was regained."""
    model = models.build("residual_projection")
    structure = cut(model, "a1", [0, 3])
    x = models.examples(model, count=200)
    small = recovered(model, structure, x)
    trained, inferred = (_values(small(x, training=mode)) for mode in (True, False))
    assert np.abs(trained - inferred).max() < 0.01 * np.abs(inferred).max()


@pytest.mark.once
def test_what_gates_do_is_in_the_target():
    """Behind gates, the network that was trained is not the seed: with all channels alive nothing is lost of it."""
    model = models.build("plain")
    learner = km.StructureLearner(model, regularizer=km.LogisticSigmoid(), cost=km.FLOPs(), strength=0.0)
    graph, x = learner.graph, models.examples(model, count=20)
    whole = km.Structure.closed(graph, np.ones(graph.num_groups, bool))
    small, plain = recovered(learner, whole, x), km.rebuild(learner, whole)
    assert_equal_outputs(models.outputs(small, x), models.outputs(plain, x), tolerance=1e-4)


# Images.


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return images(10, 4, seed=index), np.zeros(10)


@pytest.mark.once
@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (images(100, 4), [64, 36]),
        ((images(100, 4), np.zeros(100)), [64, 36]),
        ([images(3, 4), images(3, 5)], [3]),
        ({"b": images(3, 5), "a": images(3, 4)}, [3]),
        (images(5000, 4), [64] * 64),
        (Batches(), [10, 10, 10]),
        (iter([images(10, 4), images(5000, 4), images(10, 4)]), [10, *[64] * 63, 54]),
    ],
    ids=["array", "labels", "list", "dictionary", "many", "dataset", "iterator"],
)
def test_images_come_as_fit_takes_them(data, sizes):
    shapes = [(4,), (5,)] if isinstance(data, (list, dict)) else [(4,)]
    inputs = [keras.Input(shape, name=name) for shape, name in zip(shapes, "ab", strict=False)]
    graph = km.trace(keras.Model(inputs, [layers.Dense(2)(x) for x in inputs]))
    assert [len(batch[0]) for batch in image_batches(graph, data)] == sizes


@pytest.mark.parametrize("scale", [True, False])
def test_a_restated_normalization_computes_what_it_did(scale):
    x = np.random.default_rng(0).normal(3.0, 2.0, (64, 5)).astype("float32")
    norm = layers.BatchNormalization(scale=scale)
    keras.Sequential([keras.Input((5,)), norm])
    norm.moving_mean.assign(np.arange(5.0))
    norm.moving_variance.assign(np.arange(1.0, 6.0))
    before = ops.convert_to_numpy(norm(x, training=False))
    recovery._restate(norm, [x[:32], x[32:]])
    np.testing.assert_allclose(ops.convert_to_numpy(norm(x, training=False)), before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_mean), x.mean(0), rtol=1e-4)


@pytest.mark.once
def test_batch_renormalization_trains_by_what_was_recovered():
    x = keras.Input((6,))
    hidden = layers.BatchNormalization(renorm=True, name="bn")(layers.Dense(5, name="hidden")(x))
    model = models.randomize(keras.Model(x, layers.Dense(2)(layers.Activation("relu")(hidden))), seed=0)
    bn = km.prune(model, "60%", calibration=images(64, 6)).get_layer("bn")
    deviation = np.sqrt(_values(bn.moving_variance) + bn.epsilon)
    for one, other in ((bn.renorm_stddev, deviation), (bn.moving_stddev, deviation), (bn.renorm_mean, bn.moving_mean)):
        np.testing.assert_allclose(_values(one), _values(other), rtol=1e-5)


@pytest.mark.once
def test_arrays_that_are_sorted_by_label_are_taken_evenly():
    images = np.repeat(np.arange(5000)[:, None], 6, axis=1)
    chosen = np.concatenate([batch[0] for batch in image_batches(km.trace(dense()), images)])[:, 0]
    np.testing.assert_array_equal(chosen[[0, -1]], [0, 4999])
    assert set(np.diff(chosen)) <= {1, 2}


@pytest.mark.once
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images(0, 6), "Received: none"),
        ([images(2, 6)] * 2, "each input of"),
        (images(2, 5), r"of shape \(n, 6\)\. Received: \(2, 5\)"),
    ],
)
def test_images_that_do_not_suit_are_one_line(data, message):
    model = dense()
    with pytest.raises(km.DataError, match=message):
        recovered(model, cut(model, "hidden", [1]), data)


@pytest.mark.once
def test_large_images_are_fewer(monkeypatch):
    """No input of more than 3,200 elements, where each image has 4 x 4 x 2."""
    monkeypatch.setattr(examples, "MOST_ELEMENTS", 3200)
    image = keras.Input((4, 4, 2))
    graph = km.trace(keras.Model(image, layers.GlobalAveragePooling2D()(layers.Conv2D(2, 1)(image))))
    assert [len(batch[0]) for batch in image_batches(graph, images(500, 4, 4, 2))] == [64, 36]


# prune and shrink.


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", ["plain", "residual_projection", "grouped"])
def test_prune_recovers_from_images_within_the_budget(name):
    model = models.build(name)
    x, unseen = models.examples(model, count=64), models.examples(model, count=64, seed=1)
    with models.weights_stay(model):
        small = km.prune(model, "70%", calibration=x)
    assert km.FLOPs()(small) <= 0.7 * km.FLOPs()(model)
    structure = km.fit_budget(model, km.Budget("70%", per_cost=1), scores=km.contribution_scores(model, x))
    assert error(small, model, unseen) < error(km.rebuild(model, structure), model, unseen)


@pytest.mark.once
def test_what_has_faded_loses_nothing():
    model = models.build("residual_projection")
    structure = structures.draw(km.trace(model), "half", seed=1)
    assert loses(model, structure)
    assert not loses(km.masked(model, structure), structure)


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_a_cut_before_fading_recovers_from_the_training_data():
    """An own order of phases, without `fade`."""
    model = models.build("plain")
    x = models.examples(model, count=64)
    y = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    found = []

    def look(progress):
        found.append((progress.learner.seed, progress.small, progress.rebuilt_weights))
        return progress

    recipe = km.Recipe(epochs=3, loss="mse", phases=(pipeline.learn, pipeline.choose, pipeline.cut, look))
    km.shrink(model, "60%", (x, y), recipe=recipe, verbose=0)
    ((seed, small, plain),) = found
    recovered_error = error(small, seed, x)
    small.set_weights(plain)
    assert recovered_error < 0.5 * error(small, seed, x)


@pytest.mark.once
def test_what_runs_at_every_step_is_seen_and_recovered():
    """Inside a TimeDistributed, whose steps are examples there."""
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, activation="relu", name="inner1")(image)
    x = layers.Conv2D(6, 3, activation="relu", name="inner2")(x)
    inner = keras.Model(image, layers.GlobalAveragePooling2D()(x))
    frames = keras.Input((3, 6, 6, 2))
    x = layers.Flatten()(layers.TimeDistributed(inner)(frames))
    model = keras.Model(frames, layers.Dense(2, name="head")(x))
    x, unseen = (np.random.default_rng(seed).normal(size=(96, 3, 6, 6, 2)).astype("float32") for seed in (0, 1))
    small = km.prune(model, "60%", calibration=x)
    assert small.count_params() < model.count_params()
    structure = km.fit_budget(model, km.Budget("60%", per_cost=1.0), scores=km.contribution_scores(model, x))
    assert error(small, model, unseen) < 0.7 * error(km.rebuild(model, structure), model, unseen)
