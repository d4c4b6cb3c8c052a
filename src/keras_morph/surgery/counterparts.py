"""Which call of the seed each layer of a smaller model stands for, by their names."""

from keras_morph.channels import Call, ChannelGraph

__all__ = ["counterparts"]


def counterparts(graph: ChannelGraph, after: ChannelGraph) -> dict[int, Call]:
    """Calls of the seed by the numbers of the smaller model's layers, for those that are called once in both.

    Args:
        graph: of the seed.
        after: of what was rebuilt from it.
    """
    # What is inside a nested model may have another prefix in the smaller one.
    originals = {layer.name.replace("/", "_"): number for number, layer in enumerate(graph.layers)}
    found = {}
    for number, layer in enumerate(after.layers):
        original = originals.get(layer.name.replace("/", "_"), -1)
        if original >= 0 and len(graph.layer_calls[original]) == len(after.layer_calls[number]) == 1:
            found[number] = graph.calls[graph.layer_calls[original][0]]
    return found
