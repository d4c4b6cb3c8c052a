"""Scores from data and from kernels, against the derivative, the loss or the numbers that they are."""

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km
from keras_morph import pipeline


def network():
    image = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, activation="tanh", name="conv1")(image)
    x = layers.Conv2D(5, 3, activation="tanh", name="conv2")(x)
    return models.randomize(keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x))), seed=1)


def data(n=32):
    random = np.random.default_rng(0)
    return random.normal(size=(n, 6, 6, 2)).astype("float32"), random.normal(size=(n, 3)).astype("float32")


def loss_where_a_channel_is_scaled(model, layer, channel, factor, x, y):
    kernel = model.get_layer(layer).kernel
    before = ops.convert_to_numpy(kernel).copy()
    after = before.copy()
    after[..., channel] *= factor
    kernel.assign(after)
    value = float(np.mean((np.float64(ops.convert_to_numpy(model(x))) - y) ** 2))
    kernel.assign(before)
    return value


def test_the_taylor_score_is_the_squared_derivative_along_the_channel():
    model, (x, y) = network(), data()
    before = model.get_weights()
    scores = km.taylor_scores(model, (x, y), loss="mse", batch_size=len(x))
    graph = km.trace(model)
    made = {layer.name: layer.made for layer in graph.layers}
    step = 1e-2
    for layer, channels in (("conv1", 4), ("conv2", 5)):
        for channel in range(channels):
            above, below = (loss_where_a_channel_is_scaled(model, layer, channel, 1 + e, x, y) for e in (step, -step))
            expected = ((above - below) / (2 * step)) ** 2
            np.testing.assert_allclose(scores[graph.group_of[made[layer][channel]]], expected, rtol=2e-2, atol=1e-6)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_is_the_mean_over_batches_and_takes_what_fit_takes():
    model, (x, y) = network(), data()
    halves = [
        km.taylor_scores(model, (x[part], y[part]), loss="mse", batch_size=16) for part in (slice(16), slice(16, 32))
    ]
    expected = np.mean(halves, axis=0)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            part = slice(16 * index, 16 * index + 16)
            return x[part], y[part]

    np.testing.assert_allclose(km.taylor_scores(model, Batches(), loss="mse", batches=2), expected, rtol=1e-3)


@pytest.mark.once
def test_what_the_loss_depends_on_most_is_kept():
    model, (x, y) = network(), data()
    kernel = model.get_layer("dense").kernel
    values = ops.convert_to_numpy(kernel).copy().reshape(2, 2, 5, 3)
    values[:, :, [0, 3]] *= 1e-3  # what reads channels 0 and 3 of conv2
    kernel.assign(values.reshape(kernel.shape))
    structure = km.fit_budget(model, "60%", scores=km.taylor_scores(model, (x, y), loss="mse"))
    assert not {0, 3} & set(structure.alive["conv2"].tolist())


@pytest.mark.once
def test_what_has_no_loss_is_one_line():
    with pytest.raises(km.KerasMorphError, match="not compiled"):
        km.taylor_scores(network(), data())


# Scores from activations: image(3) -- first(4) -- the readers of its channels.


def branches():
    """features(3) -- first(4) --+-- left(2) -- add -- out(1), and right(2) beside left, so that two layers read first."""
    x = keras.Input((3,))
    first = layers.Dense(4, activation="tanh", name="first")(x)
    both = layers.Add(name="add")([layers.Dense(2, name="left")(first), layers.Dense(2, name="right")(first)])
    return models.randomize(keras.Model(x, layers.Dense(1, name="out")(both)), seed=1)


def of_first(model, scores):
    """Scores of the channels of `first`."""
    graph = km.trace(model)
    (made,) = [layer.made for layer in graph.layers if layer.name == "first"]
    return scores[graph.group_of[made]]


def read_by(model, layer):
    """What a layer reads, float64, and its kernel."""
    x = np.random.default_rng(0).normal(size=(80, 3)).astype("float32")
    first = ops.convert_to_numpy(model.get_layer("first")(x)).astype("float64")
    return x, first, ops.convert_to_numpy(model.get_layer(layer).kernel).astype("float64")


def test_the_contribution_is_the_share_of_the_variance_summed_over_readers():
    model = branches()
    expected = 0.0
    for layer in ("left", "right"):
        x, first, kernel = read_by(model, layer)
        each = first.var(0) * np.square(kernel).sum(1)
        expected = expected + each / each.sum()
    np.testing.assert_allclose(of_first(model, km.contribution_scores(model, x)), expected, rtol=1e-4)


def test_the_obs_score_is_what_the_best_kernels_of_those_left_lose_when_a_channel_goes():
    model = branches()

    def lost(gone):
        total = 0.0
        for layer in ("left", "right"):
            _, first, kernel = read_by(model, layer)
            centered = first - first.mean(0)
            others = np.delete(centered, gone, axis=1)
            fitted = others @ np.linalg.lstsq(others, centered @ kernel, rcond=None)[0] if others.size else 0.0
            residue = np.square(centered @ kernel - fitted).sum(1).mean()
            total += residue / (first.var(0) @ np.square(kernel).sum(1))
        return total

    expected, gone = np.zeros(4), []
    while len(gone) < 4:
        next_one = min(set(range(4)) - set(gone), key=lambda channel: lost([*gone, channel]))
        expected[next_one] = max(lost([*gone, next_one]) - lost(gone), expected.max())
        gone.append(next_one)
    x, *_ = read_by(model, "left")
    np.testing.assert_allclose(of_first(model, km.obs_scores(model, x, ridge=1e-9)), expected, rtol=1e-3)


def test_of_two_channels_that_say_the_same_one_is_free():
    model = branches()
    kernel, bias = model.get_layer("first").weights
    for weight in (kernel, bias):
        values = ops.convert_to_numpy(weight).copy()
        values[..., 3] = values[..., 1]
        weight.assign(values)
    found = of_first(model, km.obs_scores(model, read_by(model, "left")[0], ridge=1e-6))
    assert found[[1, 3]].min() < 1e-5
    assert found[[1, 3]].max() > 1e-2


@pytest.mark.once
def test_positions_of_a_flattened_map_go_together_and_make_up_for_none_of_each_other():
    image = keras.Input((3, 3, 2), name="image")
    maps = layers.Conv2D(4, 1, activation="tanh", name="first")(image)
    model = models.randomize(keras.Model(image, layers.Dense(2, name="out")(layers.Flatten()(maps))), seed=1)
    random = np.random.default_rng(0)
    x = (random.normal(size=(200, 1, 1, 2)) + 0.1 * random.normal(size=(200, 3, 3, 2))).astype("float32")
    read = ops.convert_to_numpy(model.get_layer("first")(x)).astype("float64").reshape(200, 9, 4)
    read, kernel = read - read.mean(0), ops.convert_to_numpy(model.get_layer("out").kernel).astype("float64")
    made = read.reshape(200, -1) @ kernel

    def lost(gone):
        rest = np.delete(read, gone, axis=2).reshape(200, -1)
        fitted = rest @ np.linalg.lstsq(rest, made, rcond=None)[0] if rest.size else 0.0
        return np.square(made - fitted).sum(1).mean()

    expected, gone = np.zeros(4), []
    while len(gone) < 4:
        one = min(set(range(4)) - set(gone), key=lambda channel: lost([*gone, channel]))
        expected[one] = max(lost([*gone, one]) - lost(gone), expected.max())
        gone.append(one)
    expected /= read.reshape(200, -1).var(0) @ np.square(kernel).sum(1)
    np.testing.assert_allclose(of_first(model, km.obs_scores(model, x, ridge=1e-9)), expected, rtol=1e-3)


@pytest.mark.once
def test_what_reads_very_many_channels_is_not_asked_what_they_say_of_each_other(monkeypatch):
    monkeypatch.setattr("keras_morph.search.scores.LARGEST", 3)
    model = branches()
    x, *_ = read_by(model, "left")
    found, alone = (of_first(model, scores(model, x)) for scores in (km.obs_scores, km.contribution_scores))
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_flap_standardizes_within_each_reader():
    model = branches()
    expected = []
    for layer in ("left", "right"):
        x, first, kernel = read_by(model, layer)
        each = first.var(0) * np.square(kernel).sum(1)
        expected.append((each - each.mean()) / each.std())
    np.testing.assert_allclose(
        of_first(model, km.flap_scores(model, x)), np.max(expected, axis=0), rtol=1e-3, atol=1e-4
    )


def test_minitron_takes_the_mean_over_positions_inside_and_over_images_outside():
    image = keras.Input((2, 2, 3))
    first = layers.Dense(4, activation="tanh", name="first")(image)
    model = models.randomize(keras.Model(image, layers.Conv2D(2, 1, name="out")(first)), seed=1)
    x = np.random.default_rng(0).normal(size=(80, 2, 2, 3)).astype("float32")
    first = ops.convert_to_numpy(model.get_layer("first")(x)).astype("float64")
    sizes = np.sqrt(np.square(np.abs(first).mean((1, 2))).mean(0))
    np.testing.assert_allclose(of_first(model, km.minitron_scores(model, x)), sizes / sizes.mean(), rtol=1e-4)


@pytest.mark.parametrize("scores", [km.contribution_scores, km.obs_scores, km.flap_scores, km.minitron_scores])
def test_a_channel_that_never_varies_nor_is_anything_comes_last(scores):
    model = branches()
    kernel, bias = model.get_layer("first").weights
    kernel.assign(ops.convert_to_numpy(kernel) * np.array([1, 1, 0, 1], "float32"))
    bias.assign(np.zeros(4, "float32"))
    assert np.argmin(of_first(model, scores(model, read_by(model, "left")[0]))) == 2


def test_heads_share_in_what_attention_makes_of_them():
    x = keras.Input((6, 16))
    attention = layers.MultiHeadAttention(4, 8, name="attention")
    model = models.randomize(keras.Model(x, layers.Dense(2)(layers.Add()([layers.Dense(16)(x), attention(x, x)]))), 0)
    out = attention._output_dense.kernel
    out.assign(ops.convert_to_numpy(out) * np.array([1, 0.1, 10, 1], "float32")[:, None, None])
    graph = km.trace(model)
    (heads,) = {layer.weights[2].vectors[1] for layer in graph.layers if layer.name == "attention"}
    found = km.contribution_scores(model, np.random.default_rng(0).random((64, 6, 16), np.float32))
    values, made = (np.square(ops.convert_to_numpy(k)) for k in (attention._value_dense.kernel, out))
    expected = values.sum((0, 2)) * made.sum((1, 2))
    np.testing.assert_allclose(found[graph.groups_of(heads)], expected / expected.sum(), rtol=1e-4)


def test_queries_and_keys_that_are_multiplied_score_by_their_kernels():
    x = keras.Input((6, 5))
    queries, keys = (layers.Dense(4, use_bias=False, name=name)(x) for name in ("queries", "keys"))
    alike = ops.softmax(ops.matmul(queries, ops.transpose(keys, (0, 2, 1))), axis=-1)
    result = layers.Dense(2)(ops.matmul(alike, layers.Dense(3)(x)))
    model = models.randomize(keras.Model(x, result), 0)
    graph, expected = km.trace(model), 0.0
    for name in ("queries", "keys"):
        each = np.square(ops.convert_to_numpy(model.get_layer(name).kernel)).sum(0)
        expected = expected + each / each.sum()
    (made,) = [layer.made for layer in graph.layers if layer.name == "queries"]
    found = km.contribution_scores(model, np.random.default_rng(0).random((64, 6, 5), np.float32))
    np.testing.assert_allclose(found[graph.group_of[made]], expected, rtol=1e-4)


def test_grouped_and_separable_kernels_read_with_all_that_they_do():
    """Of two groups of three, `grouped="equal"` ties the k-th channels; a separable kernel reads through its points."""
    image = keras.Input((5, 5, 2))
    first = layers.Conv2D(6, 1, name="first")(image)
    second = layers.Conv2D(4, 3, groups=2, name="second")(first)
    model = models.randomize(
        keras.Model(image, layers.SeparableConv2D(3, 2, depth_multiplier=2, name="third")(second)), 0
    )
    graph = km.trace(model, grouped="equal")
    x = np.random.default_rng(0).random((40, 5, 5, 2), np.float32)
    found = km.contribution_scores(graph, x)
    read = {
        name: ops.convert_to_numpy(keras.Model(image, model.get_layer(name).output)(x)) for name in ("first", "second")
    }
    kernel = np.square(ops.convert_to_numpy(model.get_layer("second").kernel)).sum((0, 1))
    each = read["first"].var((0, 1, 2)).reshape(2, 3) * np.stack([kernel[:, :2].sum(1), kernel[:, 2:].sum(1)])
    made = {layer.name: graph.group_of[layer.made] for layer in graph.layers if layer.made is not None}
    np.testing.assert_allclose(found[made["first"][:3]], each.sum(0) / each.sum(), rtol=1e-3)
    depth, points = (ops.convert_to_numpy(k) for k in model.get_layer("third").weights[:2])
    kernel = np.einsum("hwcm,cmo->hwco", depth, points.reshape(4, 2, 3))  # of the convolution that it is
    each = read["second"].var((0, 1, 2)) * np.square(kernel).sum((0, 1, 3))
    each = each.reshape(2, 2).sum(0)
    np.testing.assert_allclose(found[made["second"][:2]], each / each.sum(), rtol=1e-3)


def test_taylor_scores_are_those_of_the_wiring():
    x = keras.Input((4,))
    both = layers.Concatenate()([layers.Dense(3, name=name)(x) for name in "ab"])
    model = models.randomize(keras.Model(x, layers.Dense(2, name="out")(both)), 0)
    data = np.random.default_rng(0).random((16, 4), np.float32), np.zeros((16, 2), np.float32)
    tied, free = km.trace(model, tie=[["a", "b"]]), km.trace(model)
    alone = km.taylor_scores(free, data, loss="mse")
    made = {layer.name: layer.made for layer in free.layers}
    expected = alone[free.group_of[made["a"]]] + alone[free.group_of[made["b"]]]
    found = km.taylor_scores(tied, data, loss="mse")
    assert found.shape == (tied.num_groups,)
    made = {layer.name: layer.made for layer in tied.layers}
    np.testing.assert_allclose(found[tied.group_of[made["a"]]], expected, rtol=1e-4)


@pytest.mark.once
@pytest.mark.one_of(8)
@pytest.mark.parametrize("name", models.PARAMETERS)
@pytest.mark.parametrize("scores", [km.contribution_scores, km.obs_scores, km.flap_scores, km.minitron_scores])
def test_every_group_of_every_network_has_a_score(scores, name):
    model = models.build(name)
    graph = km.trace(model)
    with models.weights_stay(model):
        values = scores(model, models.examples(model, count=20))
    assert values.shape == (graph.num_groups,)
    assert np.isfinite(values).all()
    assert values.max() > 0


# Scores from kernels: w = (3, 0), (0, 4), (0, 4), whose norms are 3, 4, 4 and distances 5, 5 and 0.


@pytest.mark.once
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (km.fpgm_scores, [10, 5, 5]),  # 5 + 5, 5 + 0, 5 + 0
        (km.whc_scores, [24, 12, 12]),  # 3 * (4 + 4), 4 * 3 + 4 * 4 * 0
    ],
)
def test_what_is_said_twice_scores_low(scores, expected):
    x = keras.Input((2,))
    model = keras.Model(x, layers.Dense(1)(layers.Dense(3, name="first")(x)))
    model.get_layer("first").kernel.assign(np.array([[3, 0, 0], [0, 4, 4]], "float32"))
    np.testing.assert_allclose(of_first(model, scores(model)), np.array(expected) / np.mean(expected), rtol=1e-6)


@pytest.mark.once
def test_a_staircase_is_a_cost():
    """In blocks of 4: conv1 of 4 and conv2 of 5 -> 8 channels, images of 2 -> 4, outputs of 3 -> 4."""
    model = network()
    cost = km.Staircase(km.FLOPs(), block=4)
    expected = 2 * (16 * 9 * 4 * 4 + 4 * 9 * 4 * 8 + 20 * 4)  # Flatten reads 20 = 5 x 4
    np.testing.assert_equal(cost(model), expected)
    structure = km.fit_budget(model, km.Budget("90%", cost))
    assert cost(model, structure) <= 0.9 * cost(model)
    np.testing.assert_equal(cost(model, structure), cost(km.rebuild(model, structure)))
    assert structure.widths["conv2"] == 4  # the fifth channel costs a block


def test_a_learner_is_priced_by_the_staircase_as_it_stands():
    """Prices are the slope to the next step; conv2 of 5 channels stands on the step of 8, and of 4 on that of 4."""
    model, (x, _) = network(), data()
    cost = km.Staircase(km.FLOPs(), block=4)
    learner = km.StructureLearner(model, regularizer=km.GroupLasso(threshold=0.0), cost=cost, strength=1.0)
    learner.compile(keras.optimizers.SGD(0.0), "mse")
    scores, graph = learner.scores(), learner.graph
    prices = cost.table(graph).prices(graph.counts(np.ones(graph.num_groups, bool)))
    vector, group, count = graph.pairs
    by_group = np.bincount(group, weights=prices[vector] * count, minlength=graph.num_groups) * ~graph.pinned_mask
    np.testing.assert_allclose(float(learner.penalty()), by_group @ scores, rtol=1e-5)
    kernel = model.get_layer("conv2").kernel
    values = ops.convert_to_numpy(kernel).copy()
    values[..., 2] = 0.0
    kernel.assign(values)
    before = float(learner.penalty())
    logs = learner.fit(x, np.zeros((len(x), 3), "float32"), epochs=1, verbose=0).history
    np.testing.assert_allclose(logs["cost"][-1], 2 * (16 * 9 * 4 * 4 + 4 * 9 * 4 * 4 + 16 * 4), rtol=1e-6)
    assert logs["penalty"][-1] < before  # conv1 is cheaper now that conv2 lost a block


def test_labels_of_several_outputs_are_not_counted_as_examples():
    features = keras.Input((6,), name="features")
    x = layers.Dense(5, activation="tanh", name="hidden")(features)
    model = models.randomize(
        keras.Model(features, [layers.Dense(3, name="a")(x), layers.Dense(2, name="b")(x)]), seed=1
    )
    model.compile("sgd", {"a": "mse", "b": "mse"})
    random = np.random.default_rng(0)
    x, y = (
        random.normal(size=(40, 6)).astype("float32"),
        {"a": random.normal(size=(40, 3)), "b": random.normal(size=(40, 2))},
    )
    scores = km.taylor_scores(model, (x, y), batch_size=40)
    np.testing.assert_allclose(
        scores, km.taylor_scores(model, (x[::-1], {k: v[::-1] for k, v in y.items()}), batch_size=40), rtol=1e-4
    )
    assert not np.allclose(
        scores, km.taylor_scores(model, (x[:2], {k: v[:2] for k, v in y.items()}), batch_size=40), rtol=1e-2
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_examples_that_are_no_numbers_are_refused(bad):
    model, (x, _) = network(), data()
    x[3, 0, 0, 0] = bad
    with pytest.raises(km.DataError, match="conv1 reads finite numbers"):
        km.prune(model, "60%", calibration=x)


@pytest.mark.usefixtures("uncompiled")
def test_of_a_learner_with_gates_they_are_scores_of_what_it_computes():
    model, (x, y) = network(), data()
    learner = km.StructureLearner(model, regularizer=km.LogisticSigmoid())
    (logits,) = [weight for weight in learner.trainable_variables if "logit" in weight.path]
    logits.assign(np.where(np.arange(logits.shape[0]) % 2, -30.0, 30.0))
    dead = (learner.gate_values() < 0.5) & ~learner.graph.pinned_mask
    assert dead.any()
    found = [
        km.contribution_scores(learner, x),
        km.obs_scores(learner, x),
        km.taylor_scores(learner, (x, y), loss="mse"),
    ]
    for scores in found:
        assert scores.shape == (learner.graph.num_groups,)
        assert np.abs(scores[dead]).max() < 1e-6 < np.abs(scores).max()


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_within_shrink_the_taylor_score_is_of_the_weighted_loss():
    """The loss of one output counts for nothing, so that what only this one reads has no score."""
    features = keras.Input((6,))
    heads = {
        name: layers.Dense(1, name=name)(layers.Dense(5, activation="tanh", name=f"before_{name}")(features))
        for name in ("one", "other")
    }
    model = models.randomize(keras.Model(features, heads), seed=1)
    model.compile("adam", dict.fromkeys(heads, "mse"), loss_weights={"one": 1.0, "other": 0.0})
    random = np.random.default_rng(0)
    x, y = random.normal(size=(32, 6)), {name: random.normal(size=(32, 1)) for name in heads}
    recipe = km.Recipe(epochs=3, scores="taylor", learning=0.0)
    budget = km.Budget("60%", round_to=1, floor=0.0)
    progress = pipeline.choose(pipeline.begin(model, budget, (x, y), recipe=recipe, verbose=0))
    widths = progress.structure.widths
    assert widths["before_one"] == 5 > widths["before_other"]


@pytest.mark.once
def test_a_frozen_layer_has_no_taylor_score_which_is_said_before_any_training():
    model, (x, y) = network(), data()
    model.get_layer("conv2").trainable = False
    model.compile("adam", "mse")
    with pytest.raises(km.KerasMorphError, match="conv2 is not trainable"):
        km.shrink(model, "50%", (x, y), recipe=km.Recipe(epochs=3, scores="taylor"), callbacks=[Never()], verbose=0)


class Never(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        pytest.fail("a training has begun")
