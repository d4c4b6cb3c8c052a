"""Which model it is: names of layers that Keras's counters have no part in, and hashes of how they are connected."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from keras_morph.channels import ChannelGraph
from keras_morph.keras_internals import to_snake_case

__all__ = ["connections", "counterparts", "fingerprint", "fingerprint_of", "identities", "network_of"]


def fingerprint(graph: ChannelGraph) -> str:
    """A hash of what a structure depends on: names, classes and widths of the layers, and how they are wired.

    Layers are named by their identities, so that it does not depend on what else was made in the same program; calls by
    what they read, not by their order: the same network may have its branches made in another one.
    """
    return fingerprint_of(graph, identities(graph))


def fingerprint_of(graph: ChannelGraph, names: Mapping[str, str]) -> str:
    """The fingerprint, with other names of the layers."""
    widths = {layer.name: 0 if layer.made is None else len(layer.made) for layer in graph.layers}
    layers = sorted((names[layer.name], layer.kind, widths[layer.name]) for layer in graph.layers)
    tensors: dict[int, str] = {}
    calls = []
    for call in graph.calls:
        name = _hash([names[graph.layers[call.layer].name], [tensors.get(number) for number in call.inputs]])
        tensors |= {number: f"{name}:{position}" for position, number in enumerate(call.outputs)}
        calls.append(name)
    return _hash([layers, sorted(calls)])


def counterparts(graph: ChannelGraph, after: ChannelGraph) -> dict[str, str]:
    """Layers of a rebuilt model -> those of the seed that they stand for.

    A rebuilt layer has the seed's name, but where a nested model was taken apart: `enc/dense` is `enc_dense` then, or, where
    a layer of the seed is called so, `enc_dense_1`. Where two of the seed may be meant, it is none.
    """
    theirs, ours = {layer.name for layer in graph.layers}, {layer.name for layer in after.layers}
    flat: dict[str, list[str]] = {}
    for name in theirs - ours:
        flat.setdefault(name.replace("/", "_"), []).append(name)
    found = {name: name for name in ours & theirs}
    for name in sorted(ours - theirs):
        whole = name.replace("/", "_")
        meant = flat.get(whole) or flat.get(re.sub(r"_\d+$", "", whole), [])
        if len(meant) == 1:
            found[name] = meant[0]
    return found


def network_of(graph: ChannelGraph) -> str:
    """Which network a file is of: with other sizes of images, kernels or strides it is another one."""
    shapes = [str(graph.tensors[number].shape[1:]) for number in graph.inputs]
    inside = [str(tensor.shape[1:]) for tensor in graph.tensors]
    inside += [str(tuple(weight.shape)) for layer in graph.layers for weight in getattr(layer.operation, "weights", ())]
    return " ".join([fingerprint(graph), hashlib.sha256(" ".join(inside).encode()).hexdigest()[:16], *shapes])


def identities(graph: ChannelGraph) -> dict[str, str]:
    """Layer -> a name that Keras's counters have no part in.

    Keras calls the layers that nobody names after their class and counts through a whole program: `conv2d_7` has another
    name when the same code runs again. Here they count through the model, in the order in which they run: `conv2d#2`.
    """
    kinds = {layer.name: layer.kind for layer in graph.layers}
    known: dict[str, str] = {"": ""}
    counts: Counter[str] = Counter()

    def identity(name: str) -> str:
        if name not in known:
            above, _, own = name.rpartition("/")
            # What is nested may be of another class in a copy: of its name all but a number behind it counts.
            base = to_snake_case(kinds[name]) if name in kinds else re.sub(r"_\d+$", "", own)
            if re.fullmatch(rf"{re.escape(base)}(_\d+)?", own):
                key = f"{identity(above)}/{base}"
                own = f"{base}#{counts[key]}"
                counts[key] += 1
            known[name] = f"{identity(above)}/{own}".removeprefix("/")
        return known[name]

    return {layer.name: identity(layer.name) for layer in graph.layers}


def connections(graph: ChannelGraph) -> dict[str, str]:
    """Identity of each layer -> a hash of its class and of the layers that its calls read, to say what differs."""
    names = identities(graph)
    maker: dict[int, str] = {}
    reads: dict[str, list[Any]] = {layer: [] for layer in names.values()}
    for call in graph.calls:
        name = names[graph.layers[call.layer].name]
        reads[name].append([maker.get(number) for number in call.inputs])
        maker |= dict.fromkeys(call.outputs, name)
    kinds = {names[layer.name]: layer.kind for layer in graph.layers}
    return {name: _hash([kinds[name], calls])[:6] for name, calls in reads.items()}


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
