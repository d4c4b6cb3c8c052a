"""Law 4: strength 0 changes nothing; and what else the strength promises, from exactly zero channels to callbacks."""

import functools

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

# Compiling takes most of the time: TensorFlow runs eagerly but for the cases that ask for XLA, JAX has no other way.
EAGERLY = {"run_eagerly": keras.backend.backend() == "tensorflow"}
XLA = {"jit_compile": True}
COMPILED = {"jit_compile": keras.backend.backend() == "jax"}
REGULARIZERS = {
    "GroupLasso": km.GroupLasso(),
    "GroupLasso with l1": km.GroupLasso(l1_fraction=0.5),
    "Gamma": km.Gamma(),
}
# A chain, a shared trunk, and a network with dropout, whose random numbers must not shift.
CASES = [
    *((name, regularizer) for name in ("plain", "residual_identity") for regularizer in REGULARIZERS),
    ("sequential", "GroupLasso"),
]
STRENGTH = 1e-4


def build(name, zeroed):
    """A tiny network; if `zeroed`, channel 1 of conv1 is exactly zero, all that makes it and all that reads it."""
    keras.utils.set_random_seed(2)
    model = models.randomize(models.BUILDERS[name](), seed=1)
    if zeroed:
        for variable, axis in channel_weights(model, name):
            values = ops.convert_to_numpy(variable).copy()
            values[(slice(None),) * axis + (1,)] = 0
            variable.assign(values)
    return model


def channel_weights(model, name):
    """(variable, axis) of what makes the channels of conv1, scales them and reads them."""
    conv = model.get_layer("conv1")
    weights = [(weight, len(weight.shape) - 1) for weight in conv.weights]
    if name == "sequential":
        return [*weights, (model.get_layer("prelu").alpha, 2)]
    normalization = model.get_layer("bn1")
    return [*weights, (normalization.gamma, 0), (normalization.beta, 0), (model.get_layer("conv2").kernel, 2)]


def train(trained, optimizer, mode=EAGERLY):
    """Two epochs of two steps, shuffled; for a chain with dropout the last batch is a smaller one."""
    trained.compile(optimizer, loss="mse", **mode)
    count = 6 if "sequential" in getattr(trained, "seed", trained).name else 8
    x = np.random.default_rng(5).normal(0, 1, (count, models.SIZE, models.SIZE, 3)).astype("float32")
    y = np.random.default_rng(6).normal(0, 1, (count, 3)).astype("float32")
    keras.utils.set_random_seed(7)
    return trained.fit(x, y, batch_size=4, epochs=2, verbose=0)


@functools.cache
def weights_after_plain_fit(name, zeroed, xla=False):
    model = build(name, zeroed)
    train(model, keras.optimizers.SGD(0.05, momentum=0.9), XLA if xla else EAGERLY)
    return model.get_weights()


def assert_strength_0_changes_nothing(name, regularizer, zeroed, xla=False):
    model = build(name, zeroed)
    before = model.get_weights()
    learner = km.StructureLearner(model, regularizer=REGULARIZERS[regularizer], strength=0.0)
    train(learner, keras.optimizers.SGD(0.05, momentum=0.9), XLA if xla else EAGERLY)
    for old, received, expected in zip(
        before, model.get_weights(), weights_after_plain_fit(name, zeroed, xla), strict=True
    ):
        np.testing.assert_array_equal(received, expected)
        assert np.any(old != received)


@pytest.mark.parametrize(
    "zeroed",
    [
        pytest.param(False, id="random", marks=[pytest.mark.once, pytest.mark.slow]),
        pytest.param(True, id="one channel zero"),
    ],
)
@pytest.mark.parametrize(("name", "regularizer"), CASES)
def test_strength_0_gives_the_weights_of_plain_fit_to_the_bit(name, regularizer, zeroed):
    assert_strength_0_changes_nothing(name, regularizer, zeroed)


@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize("regularizer", ["GroupLasso", pytest.param("Gamma", marks=pytest.mark.slow)])
def test_strength_0_gives_the_weights_of_plain_fit_to_the_bit_under_xla(regularizer):
    assert_strength_0_changes_nothing("residual_identity", regularizer, zeroed=True, xla=True)


@pytest.mark.parametrize(("name", "regularizer"), CASES)
def test_an_exactly_zero_channel_stays_zero_and_everything_finite(name, regularizer):
    model = build(name, zeroed=True)
    learner = km.StructureLearner(model, regularizer=REGULARIZERS[regularizer], strength=STRENGTH)
    history = train(learner, keras.optimizers.Adam(0.01)).history
    for weight in model.get_weights():
        assert np.isfinite(weight).all()
    for variable, axis in channel_weights(model, name):
        np.testing.assert_array_equal(np.take(ops.convert_to_numpy(variable), 1, axis=axis), 0)
    assert np.isfinite(history["penalty"]).all()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_a_network_that_is_zero_everywhere_gets_no_nan(regularizer):
    model = build("residual_identity", zeroed=False)
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    learner = km.StructureLearner(model, regularizer=REGULARIZERS[regularizer], strength=STRENGTH)
    train(learner, keras.optimizers.SGD(0.01))
    for weight in model.get_weights():
        assert np.isfinite(weight).all()


def frozen_learner(mode=EAGERLY, **options):
    """A learner whose weights stay where they are, so that penalty / strength is one number."""
    learner = km.StructureLearner(models.build("plain"), **options)
    learner.compile(keras.optimizers.SGD(0.0), loss="mse", **mode)
    penalty, cost = (float(ops.convert_to_numpy(value)) for value in learner._penalty())
    return learner, penalty, cost


def fit_frozen(learner, callbacks=(), epochs=1, **options):
    x, y = np.zeros((8, models.SIZE, models.SIZE, 3), np.float32), np.zeros((8, 3), np.float32)
    return learner.fit(x, y, batch_size=2, epochs=epochs, verbose=0, callbacks=list(callbacks), **options).history


def test_penalty_and_cost_are_in_the_history_and_the_penalty_includes_the_strength():
    learner, penalty, cost = frozen_learner(strength=STRENGTH)
    held_out = np.zeros((2, models.SIZE, models.SIZE, 3), np.float32), np.zeros((2, 3), np.float32)
    history = fit_frozen(learner, epochs=2, validation_data=held_out)
    assert penalty > 0
    for prefix in ("", "val_"):
        np.testing.assert_allclose(history[f"{prefix}penalty"], [STRENGTH * penalty] * 2, rtol=1e-6)
        np.testing.assert_allclose(history[f"{prefix}cost"], [cost] * 2, rtol=1e-6)
    np.testing.assert_allclose(cost, km.FLOPs()(learner.seed), rtol=1e-6)


def test_the_loss_contains_the_penalty():
    losses = []
    for strength in (0.0, STRENGTH):
        learner, penalty, _ = frozen_learner(strength=strength)
        losses.append(fit_frozen(learner, shuffle=False)["loss"][0])
    np.testing.assert_allclose(losses[1] - losses[0], STRENGTH * penalty, rtol=1e-4)


def test_the_strength_can_be_set_between_fits_without_compiling_again():
    learner, penalty, _ = frozen_learner(strength=0.0)
    received = []
    for strength in (0.0, 1e-3, 2e-5):
        learner.strength = strength
        received += fit_frozen(learner)["penalty"]
    np.testing.assert_allclose(received, np.array([0.0, 1e-3, 2e-5]) * penalty, rtol=1e-6)


class RaisedEachEpoch(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.strength = (epoch + 1) * STRENGTH


class RaisedEachBatch(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.strength = (batch + 1) * STRENGTH


def test_a_callback_can_set_the_strength_each_epoch():
    learner, penalty, _ = frozen_learner()
    history = fit_frozen(learner, [RaisedEachEpoch()], epochs=3)
    np.testing.assert_allclose(history["penalty"], np.array([1, 2, 3]) * STRENGTH * penalty, rtol=1e-6)
    np.testing.assert_allclose(learner.strength, 3 * STRENGTH, rtol=1e-6)


def test_a_callback_can_set_the_strength_each_batch():
    learner, penalty, _ = frozen_learner()
    history = fit_frozen(learner, [RaisedEachBatch()])
    # Four batches: the metric is the mean of 1, 2, 3 and 4 times the strength.
    np.testing.assert_allclose(history["penalty"], [2.5 * STRENGTH * penalty], rtol=1e-6)


def test_a_function_that_knows_only_the_learner_can_set_the_strength_while_it_trains():
    learner, penalty, _ = frozen_learner()

    def raise_strength(batch, logs=None):
        learner.strength = (batch + 1) * STRENGTH

    history = fit_frozen(learner, [keras.callbacks.LambdaCallback(on_train_batch_begin=raise_strength)])
    np.testing.assert_allclose(history["penalty"], [2.5 * STRENGTH * penalty], rtol=1e-6)


class CountingTraces(km.GroupLasso):
    calls = 0

    def score(self, weight, axes, xp):
        self.calls += 1
        return super().score(weight, axes, xp)


@pytest.mark.only_on("tensorflow", "jax")
def test_a_new_strength_traces_nothing_again():
    regularizer = CountingTraces()
    learner, penalty, _ = frozen_learner(COMPILED, regularizer=regularizer, strength=STRENGTH)
    fit_frozen(learner)
    traced = regularizer.calls
    learner.strength = 2 * STRENGTH
    history = fit_frozen(learner)
    assert regularizer.calls == traced
    np.testing.assert_allclose(history["penalty"], [2 * STRENGTH * penalty], rtol=1e-6)
