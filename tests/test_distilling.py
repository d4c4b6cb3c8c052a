"""Distillation: the teacher's share of the loss."""

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_morph as km
from keras_morph.graph.structure import Structure

X = np.random.default_rng(0).normal(0, 1, (16, 5)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 16)


def classifier(width, activation="softmax", classes=3):
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(width, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(classes, activation=activation)(hidden))


def loss_of(distiller, from_logits=False):
    distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits))
    y_pred = distiller(X, training=True)
    return float(distiller.compute_loss(x=X, y=Y, y_pred=y_pred, training=True))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("from_logits", [True, False], ids=["logits", "probabilities"])
def test_the_loss_is_the_weighted_sum_of_both(from_logits):
    activation = None if from_logits else "softmax"
    student, teacher = classifier(4, activation), classifier(8, activation)
    received = loss_of(
        km.Distiller(student, teacher, weight=0.3, temperature=2.0, from_logits=from_logits), from_logits
    )
    answers = [ops.convert_to_numpy(model(X)).astype(float) for model in (student, teacher)]
    logs = answers if from_logits else [np.log(answer) for answer in answers]
    hard = -log_softmax(logs[0])[np.arange(16), Y].mean()
    soft = [log_softmax(log / 2) for log in logs]
    kl = (np.exp(soft[1]) * (soft[1] - soft[0])).sum(-1).mean()
    assert received == pytest.approx(0.7 * hard + 0.3 * 4 * kl, rel=1e-4)


def test_the_student_learns_to_answer_as_the_teacher_who_stays_as_he_is():
    student, teacher = classifier(16), classifier(8)
    before = teacher.get_weights()
    distiller = km.Distiller(student, teacher, weight=1.0)
    assert len(distiller.trainable_variables) == len(student.trainable_variables)
    distiller.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    history = distiller.fit(X, Y, epochs=60, verbose=0).history["loss"]
    assert history[-1] < 0.1 * history[0]
    for one, other in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_example_without_weight_counts_nowhere():
    """Nor does a step that is masked."""
    distiller = km.Distiller(classifier(4), classifier(8))
    weights = np.repeat([0.0, 1.0], 8).astype("float32")
    changed = np.where(weights[:, None] == 0, X + 1, X)
    distiller.compile("sgd", "sparse_categorical_crossentropy")
    losses = [
        float(
            distiller.compute_loss(x=x, y=Y, y_pred=distiller(x, training=True), sample_weight=weights, training=True)
        )
        for x in (X, changed)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    words, more = np.array([[1, 2, 0], [3, 0, 0]]), np.array([[1, 2, 0, 0, 0], [3, 0, 0, 0, 0]])
    student, teacher = (tagger(width) for width in (4, 8))
    distiller = km.Distiller(student, teacher, weight=1.0)
    distiller.compile("sgd", "sparse_categorical_crossentropy")
    losses = [
        float(distiller.compute_loss(x=x, y=0 * x, y_pred=distiller(x, training=True), training=True))
        for x in (words, more)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # two answers that hardly differ, in float32


def tagger(width):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, width, mask_zero=True)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))


def test_an_output_with_a_name():
    networks = []
    for width in (4, 8):
        plain = classifier(width)
        networks.append(keras.Model(plain.inputs, {"classes": plain.outputs[0]}))
    distiller = km.Distiller(*networks)
    distiller.compile("sgd", {"classes": "sparse_categorical_crossentropy"})
    history = distiller.fit(X, {"classes": Y}, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_evaluation_is_that_of_the_compiled_loss():
    student = classifier(4)
    distiller = km.Distiller(student, classifier(8))
    for model in (student, distiller):
        model.compile("sgd", "sparse_categorical_crossentropy")
    received, expected = distiller.evaluate(X, Y, verbose=0), student.evaluate(X, Y, verbose=0)
    assert received == pytest.approx(expected, rel=1e-5)


def features_in(model, tensors, x):
    """Values of tensors in between, in inference."""
    between = keras.Model(model.inputs, tensors)
    return [ops.convert_to_numpy(value) for value in keras.tree.flatten(between(x, training=False))]


@pytest.mark.once
@pytest.mark.parametrize("name", models.NAMES)
def test_features_of_a_rebuilt_network_are_those_of_the_masked_one(name):
    """Channel by channel, wherever the two are compared."""
    model = models.build(name)
    random = np.random.default_rng(3)
    graph = km.trace(model)
    structure = Structure.closed(graph, random.random(graph.num_groups) < 0.6)
    small, masked = km.rebuild(model, structure), km.masked(model, structure)
    x = models.examples(model)
    features = km.shared_features(masked, structure, small)
    assert features
    ours = features_in(small, [each.student for each in features], x)
    theirs = features_in(masked, [each.teacher for each in features], x)
    for each, one, other in zip(features, ours, theirs, strict=True):
        np.testing.assert_allclose(one, np.take(other, each.kept, each.axis), rtol=1e-4, atol=1e-5)


def test_they_are_compared_where_channels_are_mixed():
    model = models.build("residual_projection")
    structure = Structure.closed(km.trace(model), np.ones(km.trace(model).num_groups, bool))
    features = km.shared_features(model, structure, km.rebuild(model, structure))
    names = [each.teacher._keras_history.operation.name for each in features]
    assert names == ["stem", "a1", "relu_a", "b1", "flat"]


def test_what_is_inside_a_nested_model_is_left_out():
    """What comes out of it, and what a head on it reads, is not."""
    backbone = models.build("residual_identity")
    image = keras.Input(backbone.input_shape[1:])
    x = keras.layers.Dense(6, activation="relu", name="wide")(backbone(image))
    model = keras.Model(image, keras.layers.Dense(3, activation="softmax", name="head")(x))
    structure = km.fit_budget(model, "70%")
    small = km.rebuild(model, structure)
    features = km.shared_features(model, structure, small)
    for side, whole in (("teacher", model), ("student", small)):
        expected = [whole.get_layer(name).input for name in ("wide", "head")]
        assert [id(getattr(each, side)) for each in features] == [id(tensor) for tensor in expected]


def halved(model, cost=None):
    structure = km.fit_budget(model, km.Budget("50%", cost or km.FLOPs(), round_to=1))
    small = km.rebuild(model, structure)
    return small, km.shared_features(model, structure, small)


def test_the_features_differ_by_their_mean_square_in_units_of_the_variance():
    teacher = classifier(8)
    small, (feature,) = halved(teacher)
    random = np.random.default_rng(5)
    small.set_weights([value + random.normal(0, 0.3, value.shape) for value in small.get_weights()])
    plain = loss_of(km.Distiller(small, teacher, weight=0.3))
    received = loss_of(km.Distiller(small, teacher, weight=0.3, features=[feature], feature_weight=0.7))
    (ours,), (theirs,) = features_in(small, [feature.student], X), features_in(teacher, [feature.teacher], X)
    theirs = theirs[:, feature.kept]
    expected = np.mean((ours - theirs) ** 2) / np.mean(theirs.var(axis=0))
    assert expected > 0.01
    assert received - plain == pytest.approx(0.7 * expected, rel=1e-3)


def test_the_student_learns_to_see_what_the_teacher_sees():
    teacher = classifier(8)
    small, (feature,) = halved(teacher)
    random = np.random.default_rng(5)
    small.set_weights([value + random.normal(0, 0.3, value.shape) for value in small.get_weights()])
    distiller = km.Distiller(small, teacher, weight=0.0, features=[feature])
    assert len(distiller.trainable_variables) == len(small.trainable_variables)

    def distance():
        (ours,), (theirs,) = features_in(small, [feature.student], X), features_in(teacher, [feature.teacher], X)
        return np.mean((ours - theirs[:, feature.kept]) ** 2)

    before = distance()
    with models.weights_stay(teacher):
        distiller.compile(keras.optimizers.Adam(0.02), lambda y, y_pred: 0 * y_pred[:, 0])
        distiller.fit(X, np.zeros((16, 3), "float32"), epochs=60, batch_size=16, verbose=0)
    assert distance() < 0.1 * before


def test_features_of_an_example_without_weight_count_nowhere():
    """Nor do those of a step that is masked."""
    teacher = classifier(8)
    small, features = halved(teacher)
    distiller = km.Distiller(small, teacher, weight=0.0, features=features)
    distiller.compile("sgd", "sparse_categorical_crossentropy")
    distances = [
        _distance(distiller, X, weights) for weights in (None, np.zeros(16, "float32"), np.ones(16, "float32"))
    ]
    assert distances[1] == pytest.approx(0, abs=1e-6)
    assert distances[0] == pytest.approx(distances[2], rel=1e-5)
    words = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    teacher = tagger(8)
    small, features = halved(teacher, km.ModelSize())
    assert features
    distiller = km.Distiller(small, teacher, weight=0.0, features=features)
    distiller.compile("sgd", "sparse_categorical_crossentropy")
    before = _distance(distiller, words)
    embedding = next(layer for layer in small.layers if isinstance(layer, keras.layers.Embedding))
    table = ops.convert_to_numpy(embedding.embeddings).copy()
    table[0] += 10  # of the step that is masked
    embedding.embeddings.assign(table)
    assert _distance(distiller, words) == pytest.approx(before, rel=1e-5)


def _distance(distiller, x, weights=None):
    """What the features add to the loss."""
    y, y_pred = np.zeros(x.shape[: 1 if x.dtype.kind == "f" else 2], "int32"), distiller(x, training=True)
    whole = distiller.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=weights, training=True)
    return float(whole) - float(distiller.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=weights, training=False))


@pytest.mark.parametrize("options", [{"weight": 1.5}, {"temperature": 0}, {"feature_weight": -1.0}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(km.KerasMorphError, match="Received: weight="):
        km.Distiller(classifier(4), classifier(8), **options)


def test_other_classes_are_refused():
    with pytest.raises(km.KerasMorphError, match="same single output"):
        km.Distiller(classifier(4), classifier(8, classes=4))
