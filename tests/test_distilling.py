"""Distillation: the teacher's share of the loss."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_morph as km

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


@pytest.mark.usefixtures("uncompiled")
def test_the_student_learns_to_answer_as_the_teacher_who_stays_as_he_is():
    student, teacher = classifier(16), classifier(8)
    before = teacher.get_weights()
    distiller = km.Distiller(student, teacher, weight=1.0)
    assert len(distiller.trainable_variables) == len(student.trainable_variables)
    distiller.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy")
    history = distiller.fit(X, Y, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.1 * history[0]
    for one, other in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.only_on("torch")
def test_nothing_is_kept_for_a_gradient_of_the_teacher():
    import torch

    distiller = km.Distiller(classifier(4), classifier(8))
    answers, kept = distiller._answers, []

    def seen(x):
        kept.append(torch.is_grad_enabled())
        return answers(x)

    distiller._answers = seen
    distiller.compile("sgd", "sparse_categorical_crossentropy")
    distiller.fit(X, Y, batch_size=16, verbose=0)
    assert kept == [False]


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


@pytest.mark.parametrize("options", [{"weight": 1.5}, {"temperature": 0}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(km.KerasMorphError, match="Received: weight="):
        km.Distiller(classifier(4), classifier(8), **options)


def test_other_classes_are_refused():
    with pytest.raises(km.KerasMorphError, match="same single output"):
        km.Distiller(classifier(4), classifier(8, classes=4))


def test_what_layers_add_to_the_loss_counts_in_full():
    x = keras.Input((5,))
    hidden = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.5))(x)
    student = keras.Model(x, keras.layers.Dense(3, activation="softmax")(hidden))
    added = 0.5 * np.square(student.layers[1].get_weights()[0]).sum()
    plain = loss_of(km.Distiller(student, student, weight=0.0))
    # Its own teacher: nothing to learn from.
    np.testing.assert_allclose(
        loss_of(km.Distiller(student, student, weight=0.25)), 0.75 * (plain - added) + added, rtol=1e-5
    )
