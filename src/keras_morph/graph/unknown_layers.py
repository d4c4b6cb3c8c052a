"""Layers that we cannot follow: what they read and make stays, and a warning says so once."""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_morph.channels import ChannelGraph, Layer
from keras_morph.errors import UnknownLayerWarning
from keras_morph.keras_internals import parts_of
from keras_morph.layers.rules import Flow, Routed, fresh, rule_for, why_not_followed

__all__ = ["held_by_unknown", "unknown", "warn_of_unknown"]

_WARNED: Any = weakref.WeakSet()  # models whose unknown layers were named


def unknown(flow: Flow, reason: str | None) -> Routed:
    """A call of a layer that no row is for; the reason is why it is not followed inside, where that was tried."""
    kind = type(flow.operation)
    reason = reason or why_not_followed(flow.operation)
    more = f"; it {reason}" if reason else ""
    known = _is_of_keras(flow.operation) and kind is not keras.layers.Lambda
    return fresh(flow, f"is a layer that we do not know ({kind.__name__}{more})", known=known)


def held_by_unknown(layers: Iterable[Layer]) -> Iterator[tuple[Layer, Layer]]:
    """Pairs of a layer that we do not know and one that it holds, which the model calls by itself too."""
    layers = list(layers)
    for holder in layers:
        if holder.rule is None and isinstance(holder.operation, keras.Layer):
            held = {id(part) for part in parts_of(holder.operation, itself=False)}
            yield from ((holder, layer) for layer in layers if id(layer.operation) in held)


def warn_of_unknown(graph: ChannelGraph) -> None:
    """Name all layers of a model that we cannot follow, once."""
    calls = [call for call in graph.calls if call.mode != "input" and _is_unknown(graph.layers[call.layer])]
    if not calls or graph.model in _WARNED:
        return
    _WARNED.add(graph.model)
    layers = {call.layer: graph.layers[call.layer] for call in calls}.values()
    tensors = {tensor for call in calls for tensor in (*call.inputs, *call.outputs)}
    pinned = np.concatenate([graph.groups_of(graph.tensors[tensor]) for tensor in tensors])
    own = not all(_is_of_keras(layer.operation) for layer in layers)
    advice = " keras_morph.register_rule tells us of a layer of yours." if own else ""
    names = ", ".join(f"{layer.name} ({layer.kind})" for layer in layers)
    warnings.warn(
        f"{graph.model.name} has layers that we cannot follow: {names}. What they read and make cannot be "
        f"removed, {np.isin(graph.group_of, pinned).sum():,} of {graph.num_channels:,} channels; everything else can."
        f"{advice}",
        UnknownLayerWarning,
        stacklevel=1,
    )


def _is_unknown(layer: Layer) -> bool:
    """Whether a layer has no row, or wraps one that has none; a row may also say that a call cannot be followed, and why."""
    wraps = isinstance(layer.operation, keras.layers.Wrapper)
    return layer.rule is None and (wraps or rule_for(layer.operation) is None)


def _is_of_keras(operation: Any) -> bool:
    return type(operation).__module__.startswith("keras.")
