"""Random structures of several severities: each kind maps a graph and a random generator to alive groups."""

import numpy as np

import keras_morph as km


def half(graph, random):
    return random.random(graph.num_groups) < 0.5


def tenth(graph, random):
    return random.random(graph.num_groups) < 0.1


def dead_layers(graph, random):
    """A third of the layers entirely dead, and in the others nine channels of ten."""
    return tenth(graph, random) & ~_channels_of(graph, random.random(len(graph.layers)) < 1 / 3)


def dead_branches(graph, random):
    """Whatever only one layer makes is dead: of residual networks the trunk is left, of chains nothing."""
    makers = [np.unique(graph.owner[channels]) for channels in graph.groups]
    return np.array([len(layers) > 1 for layers in makers], bool)


def dead_trunk(graph, random):
    """Whatever several layers make is dead: of residual networks the insides of the branches are left."""
    return ~dead_branches(graph, random)


def one_layer_dead(graph, random):
    makers = [number for number, layer in enumerate(graph.layers) if layer.name in graph.widths]
    return ~_channels_of(graph, np.arange(len(graph.layers)) == random.choice(makers or [-1]))


def everything_dead(graph, random):
    return np.zeros(graph.num_groups, bool)


def _channels_of(graph, layers):
    """Groups with a channel of one of these layers, bool, `(num_groups,)`."""
    return np.bincount(graph.group_of, weights=layers[graph.owner], minlength=graph.num_groups) > 0


KINDS = {
    kind.__name__: kind
    for kind in (half, tenth, dead_layers, dead_branches, dead_trunk, one_layer_dead, everything_dead)
}


def whole(model, _=None):
    """The structure of a model, or of its graph, in which everything is alive."""
    graph = km.trace(model)
    return km.Structure.closed(graph, np.ones(graph.num_groups, bool))


def draw(graph, kind, seed):
    """The closed structure of one kind, with random scores."""
    random = np.random.default_rng(seed)
    return km.Structure.closed(graph, KINDS[kind](graph, random), random.random(graph.num_groups))


def mixed(graph, layer_share, channel_share, seed):
    """A closed structure in which these shares of the layers and of the other groups were killed."""
    random = np.random.default_rng(seed)
    dead = _channels_of(graph, random.random(len(graph.layers)) < layer_share)
    dead |= random.random(graph.num_groups) < channel_share
    return km.Structure.closed(graph, ~dead, random.random(graph.num_groups))
