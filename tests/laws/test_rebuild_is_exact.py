"""Law 1: for every structure, the rebuilt model returns in inference what the masked seed returns."""

import os
import subprocess
import sys

import keras
import models
import networks
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs, assert_exact
from hypothesis import given
from keras import layers, ops

import keras_morph as km
from keras_morph.graph.closure import close
from keras_morph.runs import save_model

pytestmark = pytest.mark.usefixtures("quick_initializers")

OTHER_BACKEND = "tensorflow" if keras.backend.backend() != "tensorflow" else "jax"


def drawn(name, kind):
    model = models.build(name)
    return model, structures.draw(km.trace(model), kind, seed=1)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_rebuilt_tiny_network_returns_what_the_masked_seed_returns(name, kind):
    assert_exact(*drawn(name, kind))


@given(networks.recipes(), networks.kills, networks.grouped_modes)
def test_rebuilt_random_network_returns_what_the_masked_seed_returns(recipe, kill, grouped):
    model = networks.build(recipe)
    assert_exact(model, structures.mixed(km.trace(model, grouped=grouped), *kill))


@pytest.mark.parametrize("name", models.PARAMETERS)
def test_with_every_channel_alive_the_rebuilt_network_returns_what_the_seed_returns(name):
    model = models.build(name)
    graph = km.trace(model)
    small = km.rebuild(model, km.Structure.closed(graph, np.ones(graph.num_groups, bool)))
    inputs = models.examples(model)
    assert_equal_outputs(models.outputs(small, inputs), models.outputs(model, inputs), tolerance=1e-6)
    np.testing.assert_equal(small.count_params(), model.count_params())


# What the law rests on, by hand: the masked seed, and a folded constant.


def test_the_masked_seed_has_zeros_where_dead_channels_are_made_and_where_they_are_read():
    model = models.build("plain")
    expected = {variable.path: ops.convert_to_numpy(variable).copy() for variable in model.weights}
    expected["conv1/kernel"][..., [1, 3]] = 0
    expected["conv1/bias"][[1, 3]] = 0
    expected["conv2/kernel"][:, :, [1, 3], :] = 0
    expected["conv2/kernel"][..., 0] = 0
    expected["conv2/bias"][0] = 0
    expected["dense/kernel"][0] = 0
    masked = km.masked(model, structure_with(model, conv1=[0, 2, 4], conv2=[1, 2, 3]))
    for variable in masked.weights:
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), expected[variable.path], err_msg=variable.path)


def test_a_branch_without_input_becomes_the_offset_that_its_bias_and_normalization_make():
    model = models.build("residual_identity")
    small = km.rebuild(model, structure_with(model, conv1=[], stem=[0, 2], conv2=[0, 2]))
    assert [type(layer).__name__ for layer in small.layers] == (
        ["InputLayer", "Conv2D", "Rescaling", "ReLU", "GlobalAveragePooling2D", "Dense"]
    )
    bias = ops.convert_to_numpy(model.get_layer("conv2").bias)
    bn = model.get_layer("bn2")
    gamma, beta, mean, variance = (
        ops.convert_to_numpy(x) for x in (bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance)
    )
    offset = (bias - mean) / np.sqrt(variance + bn.epsilon) * gamma + beta
    folded = next(layer for layer in small.layers if isinstance(layer, layers.Rescaling))
    np.testing.assert_allclose(np.ravel(folded.offset), offset[[0, 2]], rtol=1e-5)
    np.testing.assert_equal(folded.scale, 1.0)


def structure_with(model, **alive):
    """The closed structure in which these layers have these channels, and the others all of theirs."""
    graph = km.trace(model)
    groups = np.ones(graph.num_groups, bool)
    for layer in graph.layers:
        if layer.name in alive:
            groups[graph.group_of[np.delete(layer.made, alive[layer.name])]] = False
    return km.Structure.closed(graph, groups)


# Again, without weights, and closed twice.


@pytest.mark.one_of(3)
@pytest.mark.parametrize("first", ["half", "dead_branches", "one_layer_dead"])
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_the_rebuilt_network_can_be_rebuilt_again_exactly(name, first):
    small = km.rebuild(*drawn(name, first))
    assert_exact(small, structures.draw(km.trace(small), "half", seed=2))


def test_a_folded_constant_is_narrowed_with_its_channels():
    model = models.build("residual_identity")
    small = km.rebuild(model, structure_with(model, conv1=[]))
    smaller = assert_exact(small, structure_with(small, stem=[1, 3]))
    before, after = (
        next(np.ravel(layer.offset) for layer in each.layers if isinstance(layer, layers.Rescaling))
        for each in (small, smaller)
    )
    np.testing.assert_array_equal(after, before[[1, 3]])


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kind", ["half", "dead_branches", "everything_dead"])
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_without_weights_the_rebuilt_network_has_the_same_shapes_and_fresh_weights(name, kind):
    model, structure = drawn(name, kind)
    filled, fresh = km.rebuild(model, structure), km.rebuild(model, structure, weights=False)
    shapes = [{variable.path: tuple(variable.shape) for variable in each.weights} for each in (filled, fresh)]
    assert shapes[0] == shapes[1]
    assert (fresh.input_shape, fresh.output_shape) == (filled.input_shape, filled.output_shape)
    kernels = [
        {v.path: ops.convert_to_numpy(v) for v in each.weights if "kernel" in v.path} for each in (filled, fresh)
    ]
    for path, kernel in kernels[0].items():
        assert not np.array_equal(kernel, kernels[1][path]), path


@pytest.mark.once
@pytest.mark.one_of(2)
@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("name", models.NAMES)
def test_closing_a_closed_structure_changes_nothing(name, kind):
    graph = km.trace(models.build(name))
    random = np.random.default_rng(1)
    assert_closed(graph, structures.KINDS[kind](graph, random), random.random(graph.num_groups))


@pytest.mark.once
@given(networks.recipes(), networks.kills, networks.grouped_modes)
def test_closing_a_closed_structure_of_a_random_network_changes_nothing(recipe, kill, grouped):
    graph = km.trace(networks.build(recipe), grouped=grouped)
    random = np.random.default_rng(kill[-1])
    assert_closed(graph, random.random(graph.num_groups) < 1 - kill[1], random.random(graph.num_groups))


def assert_closed(graph, alive, scores):
    """Closed once, and again with the same, other or no scores: the same channels, states and layers."""
    once = close(graph, alive, scores)
    assert once.alive[graph.pinned_mask].all()
    for again in (scores, -scores, None):
        twice = close(graph, once.alive, again)
        for field in ("alive", "states", "present", "counts"):
            np.testing.assert_array_equal(getattr(twice, field), getattr(once, field), err_msg=field)


# Elsewhere: what is saved opens where nobody has heard of keras_morph, on another backend.

LOADER = """
import pathlib, sys
import keras, numpy as np
for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
    model = keras.models.load_model(path)
    with np.load(path.with_suffix(".npz")) as flat:
        inputs = keras.tree.pack_sequence_as(model.input, [flat[str(n)] for n in range(len(flat.files))])
    outputs = keras.tree.flatten(model(inputs, training=False))
    np.savez(path.with_suffix(".outputs.npz"), *[keras.ops.convert_to_numpy(output) for output in outputs])
assert "keras_morph" not in sys.modules
print(keras.backend.backend())
"""
WITH_FOLDED_CONSTANTS = ("residual_identity", "preactivation", "three_dimensional", "merges", "operations")
SAVED = [(name, "half") for name in models.NAMES] + [(name, "dead_branches") for name in WITH_FOLDED_CONSTANTS]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, request):
    """Predictions of the saved tiny networks of this session here and elsewhere: (name, kind) -> two lists of arrays."""
    folder = tmp_path_factory.mktemp("elsewhere")
    asked = [item.callspec.params for item in request.session.items if "elsewhere" in item.fixturenames]
    here = {}
    for name, kind in [(case["name"], case["kind"]) for case in asked]:
        small = km.rebuild(*drawn(name, kind))
        inputs = models.examples(small)
        here[name, kind] = models.outputs(small, inputs)
        save_model(small, folder / f"{name}.{kind}.keras")
        flat = keras.tree.flatten(inputs)
        np.savez(folder / f"{name}.{kind}.npz", **{str(n): array for n, array in enumerate(flat)})
    environment = {**os.environ, "KERAS_BACKEND": OTHER_BACKEND, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", LOADER, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == OTHER_BACKEND
    there = {}
    for name, kind in here:
        with np.load(folder / f"{name}.{kind}.outputs.npz") as arrays:
            there[name, kind] = list(arrays.values())
    return here, there


@pytest.mark.one_of(3)
@pytest.mark.parametrize(("name", "kind"), SAVED)
def test_the_saved_network_predicts_the_same_on_another_backend_without_keras_morph(elsewhere, name, kind):
    here, there = elsewhere
    assert_equal_outputs(there[name, kind], here[name, kind])


# Other ways to come by a seed.


def test_a_sequential_seed_that_was_built_by_its_shape_is_rebuilt_exactly():
    model = keras.Sequential(
        [layers.Conv2D(4, 3, activation="relu", name="conv"), layers.Flatten(), layers.Dense(2)], name="late"
    )
    model.build((None, 5, 5, 3))
    models.randomize(model, seed=1)
    small = assert_exact(model, structure_with(model, conv=[0, 3]))
    assert (small.name, small.input_shape, small.output_shape) == ("late", (None, 5, 5, 3), (None, 2))
    assert small.get_layer("conv").filters == 2


@pytest.mark.parametrize("kind", structures.KINDS)
def test_a_seed_of_unknown_size_is_rebuilt_exactly(kind):
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    y = layers.BatchNormalization()(layers.Conv2D(5, 3, padding="same")(x))
    x = layers.Add()([x, layers.Conv2D(4, 1)(layers.ReLU()(y))])
    model = models.randomize(keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))), seed=1)
    small = assert_exact(model, structures.draw(km.trace(model), kind, seed=1))
    assert small.input_shape == model.input_shape


@pytest.mark.parametrize("kind", structures.KINDS)
def test_dictionaries_of_inputs_and_outputs_keep_their_keys(kind):
    # The names are not in the order of the layers, and the inputs are of one shape: confused, they would go unnoticed.
    inputs = {"z": keras.Input((4, 4, 3), name="z"), "a": keras.Input((4, 4, 3), name="a")}
    first, second = layers.Conv2D(5, 3, name="first")(inputs["z"]), layers.Conv2D(5, 3, name="second")(inputs["a"])
    x = layers.Flatten()(layers.Maximum()([first, second]))
    results = {"late": layers.Dense(2, name="late")(x), "early": layers.Dense(2)(layers.Flatten()(first))}
    model = models.randomize(keras.Model(inputs, results), seed=1)
    structure = structures.draw(km.trace(model), kind, seed=1)
    small, masked = assert_exact(model, structure), km.masked(model, structure)
    x = models.examples(model)
    received, expected = small(x), masked(x)
    assert set(received) == {"late", "early"}
    for key, output in expected.items():
        np.testing.assert_allclose(
            ops.convert_to_numpy(received[key]), ops.convert_to_numpy(output), rtol=1e-4, atol=1e-5, err_msg=key
        )


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """A functional model of a class of its own, whose config holds its arguments."""

    def __init__(self, width, **options):
        image = keras.Input((6, 6, 3))
        super().__init__(image, layers.ReLU()(layers.Conv2D(width, 3, name="conv")(image)), **options)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}


class Classifier(keras.Model):
    """One that holds its layers in another order than they are called in."""

    def __setattr__(self, name, value):
        """As in KerasHub: PyTorch takes no layer before its own __init__, and what is set here is in the graph anyway."""
        if keras.backend.backend() == "torch" and not hasattr(self, "_initialized"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __init__(self, backbone):
        self.head, self.hidden = layers.Dense(2, name="head"), layers.Dense(4, name="hidden")
        self.backbone = backbone
        x = self.hidden(layers.GlobalAveragePooling2D()(backbone(backbone.input)))
        super().__init__(backbone.input, self.head(x), name="classifier")


@pytest.mark.parametrize("kind", structures.KINDS)
def test_subclasses_of_functional_models_are_rebuilt_exactly(kind):
    model = models.randomize(Classifier(Backbone(5, name="backbone")), seed=1)
    assert_exact(model, structures.draw(km.trace(model), kind, seed=1))


def test_a_nested_model_that_loses_nothing_stays_of_its_class():
    model = models.randomize(Classifier(Backbone(5, name="backbone")), seed=1)
    kept = assert_exact(model, structure_with(model, hidden=[0, 2]))
    assert type(kept.get_layer("backbone")) is Backbone
    narrowed = assert_exact(model, structure_with(model, **{"backbone/conv": [0, 2]}))
    assert type(narrowed.get_layer("backbone")) is not Backbone
