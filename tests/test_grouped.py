"""Grouped convolutions by whole conv groups and by equal counts in every conv group.

    image(3) --+-- conv1(12) -- bn1 -- grouped1(6) -- relu1 -- grouped2(9) -- conv2(12) -- bn2 --+
               |                                                                                 add -- mean -- dense(3)
               +-- conv0(12) --------------------------------------------------------------------+

Both grouped convolutions have 3 conv groups: of 4 inputs and 2 outputs, and of 2 inputs and 3 outputs.
"""

import functools
from dataclasses import replace

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_exact
from keras import layers, ops
from laws.test_costs_agree import assert_costs_agree

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

MODES = ("whole", "equal")


@functools.cache
def resnext():
    image = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(12, 3, padding="same", name="conv1")(image)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.Conv2D(6, 3, groups=3, padding="same", name="grouped1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(9, 3, groups=3, padding="same", activation="relu", name="grouped2")(x)
    x = layers.BatchNormalization(name="bn2")(layers.Conv2D(12, 1, name="conv2")(x))
    x = layers.Add(name="add")([layers.Conv2D(12, 1, name="conv0")(image), x])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return models.randomize(keras.Model(image, layers.Dense(3, name="dense")(x), name="resnext"), seed=1)


def groups_of(graph, layer):
    """Which channels of a layer belong together: sorted lists of indices."""
    made = next(each.made for each in graph.layers if each.name == layer)
    groups = graph.group_of[made]
    return sorted(np.flatnonzero(groups == group).tolist() for group in set(groups.tolist()))


@pytest.mark.once
def test_channels_of_a_conv_group_or_those_at_one_place_of_every_conv_group_belong_together():
    whole, equal = (km.trace(resnext(), grouped=grouped) for grouped in MODES)
    assert groups_of(whole, "conv1") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert groups_of(equal, "conv1") == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert groups_of(whole, "grouped1") == [[0, 1], [2, 3], [4, 5]]
    assert groups_of(equal, "grouped1") == [[0, 2, 4], [1, 3, 5]]
    assert groups_of(whole, "grouped2") == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert groups_of(equal, "grouped2") == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert groups_of(whole, "conv2") == groups_of(equal, "conv2") == [[n] for n in range(12)]


@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("grouped", MODES)
def test_it_is_rebuilt_exactly_and_costs_what_the_structure_costs(grouped, kind):
    graph = km.trace(resnext(), grouped=grouped)
    structure = structures.draw(graph, kind, seed=1)
    assert_exact(resnext(), structure)
    assert_costs_agree(graph, structure)


def test_equal_counts_keep_the_conv_groups_and_narrow_the_kernel():
    graph = km.trace(resnext(), grouped="equal")
    groups = np.ones(graph.num_groups, bool)
    made = {layer.name: layer.made for layer in graph.layers}
    groups[graph.group_of[made["conv1"][[1, 2]]]] = False
    groups[graph.group_of[made["grouped2"][1]]] = False
    structure = km.Structure.closed(graph, groups)
    assert structure.widths == {"conv1": 6, "grouped1": 6, "grouped2": 6, "conv2": 12, "conv0": 12, "dense": 3}
    small = assert_exact(resnext(), structure)
    layer, seed = small.get_layer("grouped1"), resnext().get_layer("grouped1")
    assert (layer.groups, layer.filters, tuple(layer.kernel.shape)) == (3, 6, (3, 3, 2, 6))
    kernels = [ops.convert_to_numpy(each.kernel) for each in (layer, seed)]
    np.testing.assert_array_equal(kernels[0], kernels[1][:, :, [0, 3]])
    assert (small.get_layer("grouped2").groups, small.get_layer("grouped2").filters) == (3, 6)


@pytest.mark.once
def test_a_conv_group_of_one_input_goes_whole_in_both_modes():
    image = keras.Input((4, 4, 3))
    x = layers.Conv2D(4, 1, name="conv")(image)
    x = layers.Conv2D(8, 3, groups=4, name="depthwise")(x)
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(x)))
    for grouped in MODES:
        assert groups_of(km.trace(model, grouped=grouped), "depthwise") == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.once
def test_a_structure_of_equal_counts_is_refused_where_conv_groups_go_whole():
    structure = structures.draw(km.trace(resnext(), grouped="equal"), "half", seed=1)
    with pytest.raises(km.StructureMismatchError, match="tied to"):
        km.rebuild(resnext(), replace(structure, wiring=None))  # as of format 1
    with pytest.raises(km.StructureMismatchError, match="another wiring"):
        km.rebuild(km.StructureLearner(resnext()), structure)


@pytest.mark.once
def test_the_option_reaches_learner_budget_and_rebuilt_model():
    learner = km.StructureLearner(km.trace(resnext(), grouped="equal"))
    structure = km.fit_budget(learner, "50%")
    assert structure == km.fit_budget(km.trace(resnext(), grouped="equal"), "50%")
    assert km.FLOPs()(km.rebuild(learner, structure)) == km.FLOPs()(learner.graph, structure)
    assert km.prune(km.trace(resnext(), grouped="equal"), "50%").get_layer("grouped1").groups == 3


@pytest.mark.once
def test_another_mode_is_refused():
    with pytest.raises(km.KerasMorphError, match='"whole" or grouped="equal"'):
        km.trace(resnext(), grouped="some")
