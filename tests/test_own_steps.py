"""A seed whose class trains in its own way is trained in that way, by a learner, by shrink, and with distillation."""

import keras
import models
import numpy as np
import pytest

import keras_morph as km

BACKEND = keras.backend.backend()


class Scaled:
    """A mixin, as users have them."""

    def scaled(self, x):
        return self.scale * x


class Mine(keras.Model, Scaled):
    """Inputs are scaled, the loss counts twice, and there is a metric of its own: the mean of the labels."""

    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale
        self.labels = keras.metrics.Mean(name="labels")
        self._traces = 0

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 2.0 * super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.labels.update_state(y)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    if BACKEND == "jax":

        def train_step(self, state, data):
            self._traces += 1
            return super().train_step(state, (self.scaled(data[0]), data[1]))

    else:

        def train_step(self, data):
            self._traces += 1
            return super().train_step((self.scaled(data[0]), data[1]))


def seed_of(kind, *, classes=False, **options):
    plain = keras.models.clone_model(models.build("plain"))
    outputs = keras.layers.Softmax()(plain.outputs[0]) if classes else plain.outputs
    seed = kind(plain.inputs, outputs, name="mine", **options)
    seed.compile("sgd", "mse", metrics=["mae"], run_eagerly=BACKEND == "tensorflow")
    return seed


def examples(seed, n=8):
    random = np.random.default_rng(0)
    x = random.normal(size=(n, *seed.input_shape[1:])).astype("float32")
    return x, random.normal(size=(n, *seed.output_shape[1:])).astype("float32")


def fitted(model, data, **options):
    model.compile(keras.optimizers.SGD(0.01), "mse")
    history = model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0, **options).history
    return [np.array(weight) for weight in model.trainable_weights], history


def test_a_learner_trains_as_the_seed_does():
    seed, twin = seed_of(Mine, scale=0.5), seed_of(Mine, scale=0.5)
    twin.set_weights(seed.get_weights())
    data = examples(seed)
    learner = km.StructureLearner(seed, regularizer=km.GroupLasso(), strength=0.0)
    assert isinstance(learner, km.StructureLearner)
    expected, plain = fitted(twin, data)
    weights, history = fitted(learner, data)
    for one, other in zip(expected, weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history["loss"], plain["loss"], rtol=1e-5)
    np.testing.assert_allclose(history["labels"], plain["labels"], rtol=1e-5)
    assert learner._traces >= 1
    assert {"penalty", "cost"} <= set(history)


def assert_scores_fall(kind):
    """Under the penalty they end lower than without it."""
    left, weights = {}, seed_of(kind).get_weights()
    for strength in (0.0, 1e-2):
        learner = km.StructureLearner(seed_of(kind), regularizer=km.GroupLasso(), strength=strength)
        learner.seed.set_weights(weights)
        fitted(learner, examples(learner.seed))
        left[strength] = learner.scores()[~learner.graph.pinned_mask].sum()
    assert left[1e-2] < 0.95 * left[0.0]


@pytest.mark.usefixtures("uncompiled")
def test_the_penalty_counts_where_the_step_is_the_users():
    assert_scores_fall(Mine)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_shrink_trains_as_the_seed_does(distillation):
    traces = []

    class Counted(Mine):
        def compute_loss(self, *args, **kwargs):
            traces.append(type(self).__mro__[1].__name__)
            return super().compute_loss(*args, **kwargs)

    seed = seed_of(Counted, scale=0.5, classes=bool(distillation))
    recipe = km.Recipe(distillation=distillation)
    result = km.shrink(seed, "60%", examples(seed), epochs=3, recipe=recipe, verbose=0)
    assert set(traces) == {"StructureLearner", "Distiller" if distillation else "Trainee"}
    assert km.FLOPs()(result.small) <= 0.6 * km.FLOPs()(seed)
    assert type(result.small) is type(keras.Model(seed.inputs, seed.outputs))


def test_a_learner_of_such_a_seed_is_saved_and_loaded(tmp_path):
    @keras.saving.register_keras_serializable("test_own_steps")
    class Doubled(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return 2.0 * super().compute_loss(*args, **kwargs)

    seed = seed_of(Doubled)
    learner = km.StructureLearner(seed, regularizer=km.GroupLasso(), strength=1e-3)
    learner.compile("sgd", "mse")
    learner.save(tmp_path / "learner.keras")
    back = keras.models.load_model(tmp_path / "learner.keras")
    data = examples(seed)
    np.testing.assert_allclose(learner.evaluate(*data, verbose=0), back.evaluate(*data, verbose=0), rtol=1e-5)


class LeftOut(keras.Model):
    """Adds up its loss itself."""

    if BACKEND == "jax":

        def train_step(self, state, data):
            answers, fixed = self.stateless_call(state[0], state[1], data[0], training=True)
            return {"loss": keras.ops.mean(keras.ops.square(data[1] - answers))}, (state[0], fixed, *state[2:])

    else:

        def train_step(self, data):
            loss = keras.ops.mean(keras.ops.square(data[1] - self(data[0], training=True)))
            return {"loss": loss}


def test_a_step_that_leaves_the_penalty_out_is_an_error():
    learner = km.StructureLearner(seed_of(LeftOut), regularizer=km.GroupLasso(), strength=1e-3)
    with pytest.raises(km.KerasMorphError, match=r"train_step of LeftOut leaves the penalty out.*sum\(self.losses\)"):
        fitted(learner, examples(learner.seed))


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_reads_a_layer_of_the_users_model_is_an_error_where_a_copy_is_trained():
    class Encoding(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
            return loss + 0.0 * keras.ops.sum(self.encoder(x))

    seed = seed_of(Encoding)
    seed.encoder = seed.layers[1]
    fitted(km.StructureLearner(seed, regularizer=km.GroupLasso()), examples(seed))
    with pytest.raises(km.KerasMorphError, match=r"Encoding trains with self\.encoder, a Conv2D of mine, .* a copy"):
        km.shrink(seed, "60%", examples(seed), epochs=3, verbose=0)


class Guided(keras.Model):
    """A step for JAX as Keras's guide writes it: the loss is computed outside of the stateless call."""

    def compute_loss_and_updates(self, trainable, fixed, x, y, training=False):
        y_pred, fixed = self.stateless_call(trainable, fixed, x, training=training)
        return self.compute_loss(x, y, y_pred), (y_pred, fixed)

    def train_step(self, state, data):
        import jax

        trainable, fixed, optimizer, metrics = state
        x, y = data
        gradient = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (loss, (_, fixed)), gradients = gradient(trainable, fixed, x, y, training=True)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": loss}, (trainable, fixed, optimizer, metrics)


@pytest.mark.only_on("jax")
def test_a_step_for_jax_as_in_the_guide_learns():
    assert_scores_fall(Guided)
