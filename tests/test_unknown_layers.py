"""A layer that we do not know stays as it is, everything else shrinks, and one warning lists what was pinned."""

import re
import warnings

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs, assert_exact
from keras import layers, ops

import keras_morph as km
from keras_morph.layers.rules import TABLE
from keras_morph.runs import save_model
from keras_morph.surgery.copying import cloned

pytestmark = [
    pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning"),
    pytest.mark.usefixtures("quick_initializers"),
]


@keras.saving.register_keras_serializable("unknown_layers")
class Scaled(layers.Layer):
    """Its config holds its own argument only, and no name."""

    def __init__(self, power):
        super().__init__()
        self.power = power

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return ops.sign(x) * ops.abs(x) ** self.power * self.scale

    def get_config(self):
        return {"power": self.power}


class Wrapped(layers.Layer):
    """Its argument is a function: it has no config, so that nobody can make it anew."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return self.function(x) * self.scale


@keras.saving.register_keras_serializable("unknown_layers")
class Block(keras.Model):
    """A subclassed model: its layers are in plain Python, and have statistics of their own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.conv, self.bn = layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()

    def call(self, x, training=False):
        return self.bn(self.conv(x), training=training)


@keras.saving.register_keras_serializable("unknown_layers")
class Doubled(keras.Model):
    """A functional model that does more than its graph says."""

    def __init__(self, **options):
        x = keras.Input((6, 6, 4))
        super().__init__(x, layers.Conv2D(4, 1)(x), **options)

    def get_config(self):
        return {"name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def call(self, x, training=False, mask=None):
        return 2 * super().call(x) + 1


@keras.saving.register_keras_serializable("unknown_layers")
class Halved(keras.Sequential):
    """The same for a Sequential."""

    def call(self, x, training=None, mask=None):
        return super().call(x) / 2


def twice(x):
    return 2 * x


@keras.saving.register_keras_serializable("unknown_layers")
def mixing(x):
    return ops.flip(x, axis=-1) + 1


def inside_another_model():
    return keras.Sequential([keras.Input((6, 6, 4)), layers.Conv2D(5, 1), layers.Lambda(mixing), layers.Conv2D(4, 1)])


UNKNOWN = {
    "a Lambda": lambda: layers.Lambda(mixing),
    "a lambda of one's own": lambda: layers.Lambda(lambda x: 1 - x),
    "a layer without get_config": lambda: Wrapped(mixing),
    "a layer whose config has no name": lambda: Scaled(1.5),
    "a subclassed model": Block,
    "a functional model with its own call": Doubled,
    "a Sequential with its own call": lambda: Halved([keras.Input((6, 6, 4)), layers.Conv2D(4, 1)]),
    "a Lambda inside another model": inside_another_model,
}
ONLY_IN_MEMORY = ("a layer without get_config",)


def network(unknown, position="middle"):
    """image(3) -- conv1(6) -- conv2(4) -- UNKNOWN -- conv3(7) -- mean -- dense(2), beside conv1 a branch without it."""
    image = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="conv1")(image)
    y = layers.Conv2D(4, 3, padding="same", name="conv2")(x)
    y = layers.Concatenate(name="join")([unknown(y), layers.Conv2D(5, 1, name="branch")(x)])
    y = layers.Conv2D(7, 3, activation="relu", name="conv3")(y)
    y = layers.GlobalAveragePooling2D(name="mean")(y)
    return models.randomize(keras.Model(image, layers.Dense(2, name="dense")(y), name="with_unknown"), seed=1)


@pytest.fixture(params=UNKNOWN)
def model(request):
    return network(UNKNOWN[request.param]())


@pytest.mark.parametrize("kind", ["half", "tenth", "dead_layers", "one_layer_dead", "everything_dead"])
def test_everything_else_shrinks_exactly_and_the_seed_stays_as_it_is(model, kind):
    with models.weights_stay(model):
        structure = structures.draw(km.trace(model), kind, seed=1)
        small = assert_exact(model, structure)
        assert km.ModelSize()(model, structure) == small.count_params() < model.count_params()


def test_with_every_channel_alive_rebuilt_and_masked_return_what_the_seed_returns(model):
    # Law 1 compares two copies: this one would see what both of them get wrong.
    inputs = models.examples(model)
    for copy in (km.rebuild(model, structures.whole(model)), km.masked(model, structures.whole(model))):
        assert copy is not model
        assert_equal_outputs(models.outputs(copy, inputs), models.outputs(model, inputs))


def test_what_an_unknown_layer_reads_and_makes_is_kept_and_all_else_may_die():
    graph = km.trace(network(layers.Lambda(mixing, name="mix")))
    free = structures.draw(graph, "everything_dead", seed=1).widths
    assert free == {"conv1": 1, "conv2": 4, "branch": 0, "conv3": 1, "dense": 2}
    reasons = {graph.pinned[group] for group in graph.group_of[graph.layers[2].made].tolist()}
    assert graph.layers[2].name == "conv2"
    assert reasons == {"mix is a layer that we do not know (Lambda)"}


def recorded(function, *, action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        function()
    return [str(warning.message) for warning in caught if warning.category is km.UnknownLayerWarning]


def test_one_warning_lists_all_unknown_layers():
    image = keras.Input((6, 6, 3))
    x = layers.Conv2D(6, 3, padding="same", name="conv")(image)
    x = layers.Lambda(twice, name="double")(x)
    x = layers.Conv2D(4, 3, padding="same", name="free")(Scaled(2.0)(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 1, name="last")(x))
    x = Wrapped(mixing, name="wrapped")(layers.Reshape((1, 1, 5))(x))
    model = keras.Model(image, layers.Dense(2)(x), name="three")
    # 6 of conv, the Lambda and Scaled each, 5 of last and of wrapped: 28 of the 3 + 28 + 4 of free + 2 of the Dense layer.
    (message,) = recorded(lambda: km.trace(model), action="always")
    names = re.search(r"^three has layers that we cannot follow: (.*?)\. What", message)[1]
    assert re.sub(r"scaled\w* ", "scaled ", names) == "double (Lambda), scaled (Scaled), wrapped (Wrapped)"
    assert "28 of 37 channels" in message
    assert "register_rule" in message


def test_a_model_is_warned_of_once_whatever_is_done_with_it():
    fresh = network(layers.Lambda(twice, name="shown_once"))

    def everything():
        km.FLOPs()(fresh)
        km.prune(fresh, "60%")
        km.StructureLearner(fresh)

    assert len(recorded(everything, action="always")) == 1


def test_a_model_of_known_layers_warns_of_nothing():
    assert (
        recorded(
            lambda: km.rebuild(models.build("operations"), structures.whole(models.build("operations"))),
            action="always",
        )
        == []
    )


def test_a_layer_that_cannot_be_made_anew_is_shared_and_all_others_are_copies():
    model = network(Wrapped(mixing))
    small = km.rebuild(model, structures.whole(model))
    shared = {layer.name for layer in small.layers if layer in model.layers}
    assert shared == {layer.name for layer in model.layers if isinstance(layer, Wrapped)}


@pytest.mark.usefixtures("uncompiled")
def test_shrink_trains_a_copy_of_what_can_be_copied():
    model = network(layers.Lambda(twice))
    with models.weights_stay(model):
        x, y = models.examples(model, count=16), np.eye(2)[np.arange(16) % 2]
        result = km.shrink(
            model, "60%", (x, y), epochs=3, regularizer=km.GroupLasso(), recipe=km.Recipe(loss="mse", metrics=[])
        )
        assert km.FLOPs()(result.small) <= 0.6 * km.FLOPs()(model)


# Saved and loaded, where the seed itself can be.


@pytest.mark.parametrize("name", [name for name in UNKNOWN if name not in ONLY_IN_MEMORY])
def test_the_rebuilt_network_is_loaded_as_the_seed_is(name, tmp_path):
    model = network(UNKNOWN[name]())
    small = km.rebuild(model, structures.draw(km.trace(model), "half", seed=1))
    inputs = models.examples(model)
    for each in (model, small):
        save_model(each, tmp_path / "saved.keras")
        loaded = keras.models.load_model(tmp_path / "saved.keras", safe_mode=False)
        assert_equal_outputs(models.outputs(loaded, inputs), models.outputs(each, inputs))


# State that is not among the weights.


def test_the_statistics_of_a_normalization_come_along():
    image = keras.Input((6, 6, 3))
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(np.random.default_rng(0).normal(3, 2, (64, 6, 6, 3)))
    x = layers.Conv2D(4, 3, name="conv")(normalization(image))
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    inputs = models.examples(model)
    for copy in (km.rebuild(model, structures.whole(model)), km.masked(model, structures.whole(model))):
        assert_equal_outputs(models.outputs(copy, inputs), models.outputs(model, inputs))
        np.testing.assert_allclose(np.ravel(copy.get_layer("normalization").mean), np.ravel(normalization.mean))


@pytest.mark.only_on("tensorflow")
def test_the_vocabulary_of_a_lookup_comes_along():
    words = keras.Input((2,), dtype="string")
    lookup = layers.StringLookup(name="lookup")
    lookup.adapt([["red", "green"], ["blue", "red"]])
    x = layers.Flatten()(layers.Embedding(5, 3, name="embedding")(lookup(words)))
    model = keras.Model(words, layers.Dense(2, name="dense")(layers.Dense(4, name="hidden")(x)))
    small = km.rebuild(model, structures.whole(model))
    assert small.get_layer("lookup").get_vocabulary() == lookup.get_vocabulary()
    given = ops.convert_to_tensor([["red", "blue"], ["green", "green"]])
    np.testing.assert_allclose(small(given), model(given), rtol=1e-6)


# Errors.


def test_a_model_with_its_own_call_cannot_be_traced():
    with pytest.raises(km.UnsupportedModelError, match="Doubled, whose call"):
        km.trace(Doubled())


def test_a_layer_with_a_rule_needs_a_config(monkeypatch):
    class Bare(layers.Dense):
        def __init__(self, units, function):
            super().__init__(units)
            self.function = function

        def get_config(self):
            return {"units": self.units}

    monkeypatch.setitem(TABLE, Bare, TABLE[layers.Dense])
    x = keras.Input((3,))
    model = keras.Model(x, layers.Dense(2)(Bare(4, abs)(x)))
    before = ops.convert_to_numpy(model.layers[1].kernel).copy()
    structure = structures.draw(km.trace(model), "half", seed=1)
    for function in (km.rebuild, km.masked):
        with pytest.raises(km.UnsupportedModelError, match=r"bare\w* has a rule.*get_config"):
            function(model, structure)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.layers[1].kernel), before)


def test_lora_goes_on_learning_in_a_copy():
    """Keras saves the kernel with what was learned added to it, and two factors of zero, which have no gradient."""
    dense, x = keras.layers.Dense(6), keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(2)(dense(x)))
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.ones((2, 6)))
    copy = cloned(model)
    for one, other in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.any(keras.ops.convert_to_numpy(copy.layers[1].lora_kernel_a))
