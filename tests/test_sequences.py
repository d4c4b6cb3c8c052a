"""Networks over sequences are shrunk by learning too: recurrent layers and embeddings have costs and scores."""

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs, assert_exact
from keras import layers, ops

import keras_morph as km
from keras_morph.training.regularizers import group_scores

pytestmark = pytest.mark.usefixtures("quick_initializers")

STEPS, WORDS = 6, 11
RECURRENT = {
    "LSTM": lambda: layers.LSTM(5, name="recurrent"),
    "GRU": lambda: layers.GRU(5, name="recurrent"),
    "GRU of one bias": lambda: layers.GRU(5, reset_after=False, name="recurrent"),
    "SimpleRNN": lambda: layers.SimpleRNN(5, return_sequences=True, name="recurrent"),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(5), name="recurrent"),
}
GATES = {"LSTM": 4, "GRU": 3, "GRU of one bias": 3, "SimpleRNN": 1, "Bidirectional": 8}


def reader(recurrent):
    """words -- embedding(7) -- RECURRENT(5) -- hidden(4) -- dense(2)."""
    words = keras.Input((STEPS,), dtype="int32", name="words")
    x = RECURRENT[recurrent]()(layers.Embedding(WORDS, 7, name="embedding")(words))
    x = layers.GlobalAveragePooling1D(name="mean")(x) if len(x.shape) == 3 else x
    x = layers.Dense(4, activation="relu", name="hidden")(x)
    return models.randomize(keras.Model(words, layers.Dense(2, name="dense")(x), name="reader"), seed=1)


@pytest.fixture(params=RECURRENT)
def model(request):
    return reader(request.param)


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_every_step_multiplies_both_kernels(recurrent):
    outputs = 10 if recurrent == "Bidirectional" else 5
    expected = 2 * (STEPS * GATES[recurrent] * 5 * (7 + 5) + outputs * 4 + 4 * 2)
    assert km.FLOPs()(reader(recurrent)) == expected


def test_a_unit_is_scored_by_the_strongest_of_its_gates_and_an_embedding_by_its_column():
    model = reader("LSTM")
    cell, table = model.get_layer("recurrent").cell, model.get_layer("embedding").embeddings
    kernels = [ops.convert_to_numpy(kernel) for kernel in (cell.kernel, cell.recurrent_kernel)]
    strength = np.max([np.sqrt(np.mean(k**2, axis=0)).reshape(4, 5).max(axis=0) for k in kernels], axis=0)
    graph = km.trace(model)
    scores = group_scores(graph, km.GroupLasso())
    made = {layer.name: layer.made for layer in graph.layers}
    np.testing.assert_allclose(scores[graph.group_of[made["recurrent"]]], strength, rtol=1e-6)
    columns = np.sqrt(np.mean(ops.convert_to_numpy(table) ** 2, axis=0))
    np.testing.assert_allclose(scores[graph.group_of[made["embedding"]]], columns, rtol=1e-6)


def test_nothing_is_pinned_for_want_of_a_score(model):
    learner = km.StructureLearner(model, regularizer=km.GroupLasso())
    assert set(learner.graph.pinned.values()) <= {"model output", "model input", "embedding looks them up as tokens"}


@pytest.mark.usefixtures("uncompiled")
def test_shrinking_loses_nothing_in_the_cut(model):
    words = np.random.default_rng(0).integers(0, WORDS, (16, STEPS))
    labels = (words[:, 0] % 2).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    result = km.shrink(
        model, "50%", (words, labels), regularizer=km.GroupLasso(), recipe=km.Recipe(epochs=3, batch_size=8, loss=loss)
    )
    assert km.FLOPs()(result.small) <= 0.5 * km.FLOPs()(model)
    assert 0 < result.structure.widths["recurrent"] < 5
    result.small.set_weights(result.rebuilt_weights)
    masked = km.masked(result.seed, result.structure)
    assert_equal_outputs(models.outputs(result.small, words), models.outputs(masked, words))


def test_constants_are_followed_into_a_model_that_is_called_at_every_step():
    """steps -- dense(6) -- normalized -- at every step: softmax, dense(3) -- last(2): dead channels are no zeros there."""
    step = keras.Input((6,))
    inside = keras.Model(step, layers.Dense(3)(layers.Softmax()(step)))
    x = keras.Input((4, 5))
    h = layers.TimeDistributed(inside)(layers.BatchNormalization()(layers.Dense(6, name="wide")(x)))
    model = models.randomize(keras.Model(x, layers.Dense(2)(layers.Flatten()(h))), seed=1)
    small = assert_exact(model, structures.draw(km.trace(model), "half", seed=1))
    assert small.get_layer("wide").units < 6
