"""The penalty outside of plain `fit`: `learner.penalty()`, `learner.losses`, loops and steps of one's own."""

import re
from pathlib import Path

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

PAGE = (Path(__file__).parents[1] / "docs" / "custom-training.md").read_text()
SECTIONS = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}
MODE = {"run_eagerly": keras.backend.backend() == "tensorflow"}
X = np.random.default_rng(0).normal(0, 1, (8, models.SIZE, models.SIZE, 3)).astype("float32")
Y = np.random.default_rng(1).normal(0, 1, (8, 3)).astype("float32")
STRENGTH = 1e-4


def blocks_of(section):
    """Code of a part of the page; of its beginning, if that is what is asked for."""
    text = {part.partition("\n")[0]: part for part in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)}[section]
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(*sections):
    names = {"__name__": "docs"}
    for section in sections:
        for block in blocks_of(section):
            exec(compile(block, "custom-training.md", "exec"), names)
    return names


def numbers(values):
    return [np.asarray(ops.convert_to_numpy(value)) for value in values]


def test_the_loop_of_the_page_trains_as_fit_does():
    keras.utils.set_random_seed(4)
    page = run("A training loop of your own", SECTIONS[keras.backend.backend()])
    keras.utils.set_random_seed(4)
    fitted = run("A training loop of your own")
    before = fitted["learner"].get_weights()
    learner = fitted["learner"]
    learner.compile(keras.optimizers.SGD(0.1), fitted["loss_of"], **MODE)
    x, y = (np.concatenate(arrays) for arrays in zip(*fitted["batches"], strict=True))
    learner.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    changed = 0
    for old, expected, received in zip(before, learner.get_weights(), page["learner"].get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)
        changed += np.any(old != received)
    assert changed > 5
    # Without the penalty the gammas end elsewhere by far more than that.
    keras.utils.set_random_seed(4)
    plain = run("A training loop of your own")["learner"]
    plain.strength = 0.0
    plain.compile(keras.optimizers.SGD(0.1), fitted["loss_of"], **MODE)
    plain.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert np.all(plain.scores() - page["learner"].scores() >= 0)
    assert np.max(plain.scores() - page["learner"].scores()) > 1e-3


def test_the_subclass_of_the_page_trains():
    names = run("A training loop of your own", "A `train_step` of your own")
    learner = names["modest"]
    assert np.any(learner.scores() != 1)
    x, y = names["batches"][0]
    learner.compile(keras.optimizers.SGD(0.0), names["loss_of"], **MODE)
    predicted = learner.predict(x, verbose=0)
    logs = learner.evaluate(x, y, return_dict=True, verbose=0)
    expected = float(names["loss_of"](y, predicted)) + 0.1 * np.mean(predicted**2) + logs["penalty"]
    assert logs["penalty"] > 0.01
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def with_losses_of_its_own():
    image = keras.Input((models.SIZE, models.SIZE, 3), name="image")
    x = layers.Conv2D(4, 3, kernel_regularizer=keras.regularizers.L2(0.1), name="conv1")(image)
    x = layers.ActivityRegularization(l2=0.1, name="activity")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return models.randomize(keras.Model(image, layers.Dense(3, name="dense")(x)), seed=1)


def frozen(seed=None, optimizer=None, **options):
    learner = km.StructureLearner(seed or with_losses_of_its_own(), strength=STRENGTH, **options)
    learner.compile(optimizer or keras.optimizers.SGD(0.0), "mse", **MODE)
    return learner


@pytest.mark.parametrize("regularizer", [km.GroupLasso(), km.LogisticSigmoid()], ids=lambda r: type(r).__name__)
def test_the_penalty_is_one_float32_and_the_last_of_the_losses(regularizer):
    learner = frozen(regularizer=regularizer)
    expected = STRENGTH * float(ops.convert_to_numpy(learner._penalty()[0]))
    penalty = learner.penalty()
    assert (keras.backend.standardize_dtype(penalty.dtype), tuple(penalty.shape)) == ("float32", ())
    np.testing.assert_allclose(ops.convert_to_numpy(penalty), expected, rtol=1e-6)
    learner(X, training=True)
    activity, weights, last = numbers(learner.losses)
    np.testing.assert_allclose(last, expected, rtol=1e-6)
    kernel = ops.convert_to_numpy(learner.seed.get_layer("conv1").kernel)
    np.testing.assert_allclose(weights, 0.1 * np.sum(kernel**2), rtol=1e-5)
    assert activity > 0
    learner.strength = 2 * STRENGTH
    np.testing.assert_allclose(numbers(learner.losses)[-1], 2 * expected, rtol=1e-6)


def test_fit_and_evaluate_count_each_loss_once():
    learner = frozen()
    history = learner.fit(X, Y, batch_size=8, verbose=0, validation_data=(X, Y)).history
    predicted = ops.convert_to_numpy(learner(X, training=False))
    losses = numbers(learner.losses)
    assert len(losses) == 3
    expected = np.mean((predicted - Y) ** 2) + sum(losses)
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"], [expected], rtol=1e-5)
    np.testing.assert_allclose(history["penalty"], [losses[-1]], rtol=1e-5)


def test_the_penalty_alone_can_be_the_loss():
    learner = km.StructureLearner(models.build("plain"), strength=STRENGTH)
    learner.compile(keras.optimizers.SGD(0.0), **MODE)
    history = learner.fit(X, Y, verbose=0).history
    np.testing.assert_allclose(history["loss"], history["penalty"], rtol=1e-6)
    assert history["loss"][0] > 0


def test_a_callback_sees_the_penalty_of_the_moment():
    learner = frozen(models.randomize(models.BUILDERS["plain"](), seed=1), keras.optimizers.SGD(0.1))
    seen = []
    log = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(ops.convert_to_numpy(learner.penalty())))
    )
    learner.fit(X, Y, batch_size=2, verbose=0, callbacks=[log])
    assert len(set(seen)) == 4
    np.testing.assert_allclose(seen[-1], ops.convert_to_numpy(learner.penalty()), rtol=1e-6)


class Counting(km.GroupLasso):
    calls = 0

    def score(self, weight, axes, xp):
        self.calls += 1
        return super().score(weight, axes, xp)


@pytest.mark.only_on("torch", "tensorflow")
def test_a_step_computes_the_penalty_once():
    regularizer = Counting()
    learner = frozen(models.randomize(models.BUILDERS["plain"](), seed=1), regularizer=regularizer)
    learner.fit(X, Y, batch_size=4, verbose=0)  # Keras tries the model out first
    regularizer.calls = 0
    learner.fit(X, Y, batch_size=4, verbose=0)
    assert regularizer.calls == 2 * len(regularizer.sources(learner.graph))


def test_losses_metrics_and_weights_of_several_outputs_are_those_of_the_compiled_seed():
    layers = keras.layers
    image = keras.Input((6, 6, 1))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(6, 3)(image))))
    seed = keras.Model(image, [layers.Dense(3, activation="softmax", name="kind")(x), layers.Dense(1, name="size")(x)])
    seed.compile(
        "sgd",
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.0},
        metrics={"kind": ["accuracy"]},
        weighted_metrics={"size": ["mae"]},
        **MODE,
    )
    random = np.random.default_rng(0)
    images, kinds, sizes = random.normal(size=(16, 6, 6, 1)), random.integers(0, 3, 16), random.normal(size=(16, 1))
    logs = {}

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, new=None):
            logs.update(new)

    for labels in ([kinds, sizes], {"kind": kinds, "size": sizes}):
        km.shrink(seed, "60%", (images, labels), epochs=3, verbose=0, callbacks=[Keep()])
        assert {"kind_accuracy", "size_mae", "kind_loss", "size_loss"} <= set(logs)
        assert logs["loss"] == pytest.approx(logs["kind_loss"], rel=1e-5)  # the last phase has no penalty


def test_class_weights_count():
    losses = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(logs["loss"])

    seed = keras.models.clone_model(models.build("plain"))
    x = np.random.default_rng(0).normal(size=(8, *seed.input_shape[1:]))
    seed.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **MODE)
    recipe = km.Recipe(class_weight={0: 0.0, 1: 0.0, 2: 0.0})
    km.shrink(seed, "80%", (x, np.zeros(8, int)), epochs=3, recipe=recipe, verbose=0, callbacks=[Keep()])
    assert losses[-1] == 0
