"""A learner is saved, loaded, interrupted and resumed as any Keras model is."""

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

MODE = {"run_eagerly": keras.backend.backend() == "tensorflow"}
X = np.random.default_rng(0).normal(0, 1, (8, models.SIZE, models.SIZE, 3)).astype("float32")
Y = np.random.default_rng(1).normal(0, 1, (8, 3)).astype("float32")

# Every regularizer and every cost once, options included, and each part of the wiring.
LEARNERS = {
    "GroupLasso": ("residual_identity", {}),
    "GroupLasso, options": (
        "residual_identity",
        {"regularizer": km.GroupLasso(0.02, l1_fraction=0.25), "cost": km.ModelSize()},
    ),
    "Gamma": ("residual_identity", {"regularizer": km.Gamma(0.5), "cost": km.Latency("P100", batch_size=4)}),
    "LogisticSigmoid": (
        "residual_identity",
        {
            "regularizer": km.LogisticSigmoid(0.3, initial=0.9, temperature=0.5, straight_through=True, speed=5.0),
            "cost": km.Activations(),
        },
    ),
    "own hardware": ("residual_projection", {"cost": km.Latency(km.Hardware("mine", 1e9, 1e6))}),
    "grouped": ("grouped", {}),
}
WIRING = {
    "GroupLasso, options": {"protect": ["stem"]},
    "own hardware": {"tie": [["a1", "b1"]]},
    "grouped": {"grouped": "equal"},
}


def compiled(name, seed=1, strength=1e-4):
    """A learner of a network with random weights, about to be trained."""
    network, options = LEARNERS[name]
    graph = km.trace(models.randomize(models.BUILDERS[network](), seed=seed), **WIRING.get(name, {}))
    learner = km.StructureLearner(graph, strength=strength, **options)
    learner.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"], **MODE)
    return learner


def train(learner, epochs=1, callbacks=(), **options):
    return learner.fit(
        X, Y, batch_size=8, shuffle=False, verbose=0, epochs=epochs, callbacks=list(callbacks), **options
    )


def killed_channel(learner):
    """Some channel falls below the threshold, so that the structure is not that of the seed."""
    if learner.gates is not None:
        logits = ops.convert_to_numpy(learner.gates.logits).copy()
        logits[0] = -1.0
        learner.gates.logits.assign(logits)
    for layer in learner.seed.layers:
        for weight in layer.weights:
            if weight.path.endswith(("kernel", "gamma")):
                weight.assign(ops.convert_to_numpy(weight) * (np.arange(weight.shape[-1]) != 1))


def assert_same(one, other):
    """Structure, scores, predictions, settings, and everything that training goes on from."""
    assert one.structure() == other.structure()
    np.testing.assert_array_equal(one.scores(), other.scores())
    np.testing.assert_array_equal(one.graph.pinned_mask, other.graph.pinned_mask)
    assert one.graph.wiring == other.graph.wiring
    np.testing.assert_array_equal(one.predict(X, verbose=0), other.predict(X, verbose=0))
    assert one.strength == other.strength
    assert one.target_cost(one.graph) == other.target_cost(other.graph)
    for first, second in zip(one.variables, other.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(first), ops.convert_to_numpy(second))


def assert_same_training(one, other):
    """Optimizers have the same state, and lead to the same weights."""
    for first, second in zip(one.optimizer.variables, other.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(first), ops.convert_to_numpy(second))
    before = one.get_weights()
    histories = [train(learner).history for learner in (one, other)]
    assert any(np.any(old != new) for old, new in zip(before, one.get_weights(), strict=True))
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-7)
    assert histories[0].keys() == histories[1].keys()
    for key, values in histories[0].items():
        np.testing.assert_allclose(values, histories[1][key], rtol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_is_saved_and_loaded_whole(name, tmp_path):
    learner = compiled(name)
    train(learner)
    killed_channel(learner)
    learner.strength = 3e-4
    assert sum(learner.structure().widths.values()) < sum(learner.graph.widths.values())
    learner.save(tmp_path / "learner.keras")
    loaded = keras.models.load_model(tmp_path / "learner.keras")
    assert type(loaded) is km.StructureLearner
    assert_same(learner, loaded)
    assert repr(loaded.regularizer) == repr(learner.regularizer)
    assert loaded.regularizer.get_config() == learner.regularizer.get_config()
    assert loaded.target_cost.get_config() == learner.target_cost.get_config()
    assert_same_training(learner, loaded)


def test_what_is_saved_says_what_the_gates_are_at(tmp_path):
    learner = compiled("LogisticSigmoid")
    learner.temperature = 0.125
    learner.stop_sampling()
    learner.save(tmp_path / "learner.keras")
    loaded = keras.models.load_model(tmp_path / "learner.keras")
    assert loaded.temperature == 0.125
    assert float(ops.convert_to_numpy(loaded.gates.sampling)) == 0
    np.testing.assert_array_equal(loaded.gate_values(), learner.gate_values())


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
@pytest.mark.parametrize("name", ["GroupLasso", "LogisticSigmoid"])
def test_a_checkpoint_of_keras_brings_a_learner_back(name, weights_only, tmp_path):
    path = tmp_path / ("learner.weights.h5" if weights_only else "learner.keras")
    learner = compiled(name)
    train(learner, callbacks=[keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only)])
    if weights_only:
        back = compiled(name, seed=2, strength=0.0)
        back.load_weights(path)
    else:
        back = keras.models.load_model(path)
    assert_same(learner, back)
    if not weights_only:
        assert_same_training(learner, back)


class Killed(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


class Raising(keras.callbacks.Callback):
    """The strength is part of what is resumed."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.strength *= 2


@pytest.mark.parametrize("name", ["GroupLasso", "Gamma", "LogisticSigmoid"])
def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(name, tmp_path):
    keras.utils.set_random_seed(3)
    whole = compiled(name)
    train(whole, epochs=4, callbacks=[Raising()])
    keras.utils.set_random_seed(3)
    with pytest.raises(KeyboardInterrupt):
        train(compiled(name), epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Killed(), Raising()])
    resumed = compiled(name, seed=2, strength=0.0)
    history = train(resumed, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Raising()])
    assert history.epoch == [2, 3]
    np.testing.assert_allclose(resumed.strength, 16e-4, rtol=1e-6)
    assert resumed.strength == whole.strength
    for first, second in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-7)


class Unregistered(km.GroupLasso):
    """Registered by nobody, but the caller names it."""


class Own:
    """As docs describe a regularizer of one's own: threshold, sources and score."""

    threshold = 0.1

    def sources(self, graph):
        return km.GroupLasso().sources(graph)

    def score(self, weight, axes, xp):
        return xp.mean(xp.square(weight), axis=axes)


class OwnCost(km.FLOPs):
    def __init__(self, factor):
        self.scale = factor  # an argument that no attribute is named after


def test_a_regularizer_of_ones_own_is_loaded_by_its_name(tmp_path):
    learner = km.StructureLearner(models.build("plain"), regularizer=Unregistered(0.5))
    learner.save(tmp_path / "learner.keras")
    loaded = keras.models.load_model(tmp_path / "learner.keras", custom_objects={"Unregistered": Unregistered})
    assert (type(loaded.regularizer), loaded.regularizer.threshold) == (Unregistered, 0.5)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"regularizer": Own()}, "Own"), ({"cost": OwnCost(2)}, "OwnCost")],
    ids=["regularizer", "cost"],
)
def test_what_cannot_be_saved_says_what_it_lacks(options, name, tmp_path):
    learner = km.StructureLearner(models.build("plain"), **options)
    with pytest.raises(km.KerasMorphError, match=f"{name} cannot be saved. Expected: .*get_config"):
        learner.save(tmp_path / "learner.keras")
    learner.save_weights(tmp_path / "learner.weights.h5")
    other = km.StructureLearner(models.randomize(models.BUILDERS["plain"](), seed=9), **options)
    other.load_weights(tmp_path / "learner.weights.h5")
    np.testing.assert_array_equal(other.scores(), learner.scores())


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_is_saved(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        learner = compiled("GroupLasso")
        train(learner)
        learner.save(tmp_path / "learner.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "learner.keras")
    assert loaded.dtype_policy.name == policy
    assert_same(learner, loaded)
    assert_same_training(learner, loaded)
