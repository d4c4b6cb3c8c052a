"""Law 6: no strength makes a network unusable. Whatever dies, every output still depends on an input."""

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km
from keras_morph.graph.closure import LIVE, close

pytestmark = pytest.mark.usefixtures("quick_initializers")

TOO_HIGH = 1e9


def zero_scores(graph):
    return np.zeros(graph.num_groups, bool), np.zeros(graph.num_groups)


def random_scores(graph):
    return np.zeros(graph.num_groups, bool), np.random.default_rng(0).random(graph.num_groups)


def no_scores(graph):
    return np.zeros(graph.num_groups, bool), None


def one_of_ten(graph):
    random = np.random.default_rng(1)
    return random.random(graph.num_groups) < 0.1, random.random(graph.num_groups)


KILLS = {kill.__name__: kill for kill in (zero_scores, random_scores, no_scores, one_of_ten)}


def positive(name):
    """A network whose weights are all positive, so that no activation is cut off and nothing cancels."""
    model = models.BUILDERS[name]()
    random = np.random.default_rng(0)
    for variable in model.weights:
        if "seed_generator" not in variable.path:
            variable.assign(random.uniform(0.1, 0.3, variable.shape))
    return model


def assert_outputs_depend_on_inputs(model):
    """Each output moves when all inputs grow."""
    shapes = [tuple(size or 8 for size in tensor.shape[1:]) for tensor in model.inputs]
    results = []
    for level in (0.2, 0.4):
        inputs = {
            tensor.name: np.full((1, *shape), level, "float32")
            for tensor, shape in zip(model.inputs, shapes, strict=True)
        }
        packed = keras.tree.map_structure(lambda tensor, given=inputs: given[tensor.name], model.input)
        results.append(models.outputs(model, packed))
    for before, after in zip(*results, strict=True):
        assert np.all(np.abs(after - before) > 1e-6 * np.abs(before))


def live_makers(graph, closed, group):
    """Layers that make a channel of a group, are in the rebuilt model, and give what depends on an input."""
    owners = np.unique(graph.owner[graph.groups[group]])
    return [
        graph.layers[call.layer].name
        for number, call in enumerate(graph.calls)
        if call.layer in owners and closed.present[number] and closed.states[list(call.outputs)].max() == LIVE
    ]


@pytest.mark.once
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("name", models.NAMES)
def test_no_output_is_constant_and_every_pinned_group_has_a_live_maker(name, kill):
    graph = km.trace(models.build(name))
    closed = close(graph, *KILLS[kill](graph))
    np.testing.assert_array_equal(closed.states[list(graph.outputs)], LIVE)
    for group in graph.pinned:
        assert closed.alive[group]
        assert live_makers(graph, closed, group)


# Where its branches die, the network of all merges clips the trunk between two constants: no weights can prevent that.
@pytest.mark.one_of(2)
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("name", [name for name in models.NAMES if name != "merges"])
def test_every_output_still_depends_on_an_input(name, kill):
    model = positive(name)
    graph = km.trace(model)
    small = km.rebuild(model, km.Structure.closed(graph, *KILLS[kill](graph)))
    assert small.count_params() < model.count_params()
    assert_outputs_depend_on_inputs(small)


@pytest.mark.parametrize("regularizer", [km.GroupLasso(threshold=TOO_HIGH), km.Gamma(threshold=TOO_HIGH)], ids=repr)
@pytest.mark.parametrize(
    "name", ["plain", "residual_identity", "residual_projection", "concatenating", "inverted_residual"]
)
def test_a_threshold_that_is_far_too_high_leaves_a_path(name, regularizer):
    model = positive(name)
    learner = km.StructureLearner(model, regularizer=regularizer)
    assert_outputs_depend_on_inputs(km.rebuild(model, learner.structure()))


def test_training_at_a_strength_that_is_far_too_high_leaves_a_path():
    model = positive("residual_identity")
    learner = km.StructureLearner(model, regularizer=km.GroupLasso(threshold=0.1), strength=1e6)
    rate = keras.optimizers.schedules.CosineDecay(0.03, 20)
    learner.compile(keras.optimizers.Adam(rate), loss="mse", run_eagerly=keras.backend.backend() == "tensorflow")
    x, y = models.examples(model, count=16), np.zeros((16, 3), "float32")
    learner.fit(x, y, batch_size=8, epochs=10, verbose=0)
    structure = learner.structure()
    small = km.rebuild(model, structure)
    assert structure.widths == {"stem": 1, "conv1": 0, "conv2": 1, "dense": 3}
    np.testing.assert_equal(small.output_shape, model.output_shape)
    assert all(np.isfinite(output).all() for output in models.outputs(small, x))
    graph = km.trace(model)
    np.testing.assert_array_equal(close(graph, structure.groups(graph)).states[list(graph.outputs)], LIVE)


def root_mean_squares(layer):
    kernel = ops.convert_to_numpy(layer.kernel)
    return np.sqrt((kernel**2).mean(axis=tuple(range(kernel.ndim - 1))))


CHAINS = {"plain": ["conv1", "conv2"], "flattening": ["conv1", "conv2", "dense1"], "sequential": ["conv1", "dense1"]}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CHAINS)
def test_of_a_chain_that_dies_each_layer_keeps_its_strongest_channel(name, seed):
    model = models.randomize(models.BUILDERS[name](), seed=seed)
    structure = km.StructureLearner(model, regularizer=km.GroupLasso(threshold=TOO_HIGH)).structure()
    for layer in CHAINS[name]:
        strongest = np.argmax(root_mean_squares(model.get_layer(layer)))
        np.testing.assert_array_equal(structure.alive[layer], [strongest])


@pytest.mark.parametrize("seed", range(4))
def test_gamma_keeps_the_channel_of_the_largest_gamma(seed):
    model = models.randomize(models.BUILDERS["plain"](), seed=seed)
    gamma = model.get_layer("bn1").gamma
    gamma.assign(ops.convert_to_numpy(gamma) * [1, -1, 1, -1, 1])
    structure = km.StructureLearner(model, regularizer=km.Gamma(threshold=TOO_HIGH)).structure()
    np.testing.assert_array_equal(structure.alive["conv1"], [np.argmax(np.abs(ops.convert_to_numpy(gamma)))])


@pytest.mark.parametrize("seed", range(4))
def test_of_a_trunk_that_dies_the_strongest_channel_of_any_of_its_layers_is_kept_and_the_branch_goes(seed):
    model = models.randomize(models.BUILDERS["residual_identity"](), seed=seed)
    structure = km.StructureLearner(model, regularizer=km.GroupLasso(threshold=TOO_HIGH)).structure()
    strengths = np.maximum(*(root_mean_squares(model.get_layer(name)) for name in ("stem", "conv2")))
    for layer in ("stem", "conv2"):
        np.testing.assert_array_equal(structure.alive[layer], [np.argmax(strengths)])
    assert structure.widths["conv1"] == 0
    assert "conv1" not in [layer.name for layer in km.rebuild(model, structure).layers]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_above_the_threshold_goes_before_what_has_to_be_revived(seed):
    # Of conv1 one channel is alive, though another group, a dead one, has the higher score.
    graph = km.trace(models.build("plain"))
    conv1 = next(layer.made for layer in graph.layers if layer.name == "conv1")
    scores, alive = np.random.default_rng(seed).random(graph.num_groups), np.zeros(graph.num_groups, bool)
    weakest = int(np.argmin(scores[graph.group_of[conv1]]))
    alive[graph.group_of[conv1[weakest]]] = True
    np.testing.assert_array_equal(km.Structure.closed(graph, alive, scores).alive["conv1"], [weakest])


def test_a_branch_beside_a_path_may_vanish_but_not_the_path():
    """image(3) --+-- conv(4) --+
                  |             add -- mean -- dense(2)
                  +-- skip(4) --+
    """  # fmt: skip
    image = keras.Input((6, 6, 3), name="image")
    conv, skip = (layers.Conv2D(4, 3, padding="same", name=name)(image) for name in ("conv", "skip"))
    x = layers.GlobalAveragePooling2D(name="mean")(layers.Add(name="add")([conv, skip]))
    model = keras.Model(image, layers.Dense(2, name="dense")(x))
    widths = km.StructureLearner(model, regularizer=km.GroupLasso(threshold=TOO_HIGH)).structure().widths
    assert widths == {"conv": 1, "skip": 1, "dense": 2}


@pytest.mark.once
def test_budgets_revive_too_and_counts_are_refused():
    model = models.build("plain")
    graph = km.trace(model)
    with pytest.raises(km.StructureMismatchError, match=r"conv1.*the only path to an output"):
        km.rebuild(model, {"conv1": 0, "conv2": 0})
    cheapest = km.FLOPs().total(graph, close(graph, graph.pinned_mask))
    assert km.fit_budget(model, cheapest).widths == {"conv1": 1, "conv2": 1, "dense": 3}
