"""Copies of layers and models, with all that they hold."""

import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.graph.composites import local_names, recordings_in
from keras_morph.graph.replaying import replayed
from keras_morph.keras_internals import graph_in, input_layers, nodes_of, parts_of, remade, tensors_of
from keras_morph.layers.rules import rule_for

__all__ = ["cloned", "transfer"]


def transfer(source: Any, target: Any) -> None:
    """Give a layer or model everything that saving another one writes: weights, statistics, vocabularies."""
    for one, other in zip(parts_of(source), parts_of(target), strict=True):
        if one is other:
            continue
        other.trainable = one.trainable  # parents first: what a layer holds has the last word
        state: dict[str, Any] = {}
        one.save_own_variables(state)
        # JAX gives a variable's array away when it trains: what is trained must not share it.
        other.load_own_variables({key: np.array(ops.convert_to_numpy(value)) for key, value in state.items()})
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)


def cloned(model: keras.Model) -> keras.Model:
    """A copy of a model. Layers that cannot be made anew are shared with it, as `remade` says.

    A layer made of layers becomes a nested functional model of what it does: its config need not tell all of that.
    """
    copies: dict[Any, tuple[Any, Any]] = {}
    recordings: dict[int, Any] = {}

    def copied(layer: Any, name: str | None = None) -> Any:
        recorded = recordings.get(id(layer))
        followed = recorded is not None and not isinstance(recorded, str)
        key = id(layer), id(recorded) if followed else None
        if key not in copies:
            inner = recorded if followed else graph_in(layer)
            if inner is not None:
                outer = dict(recordings)
                recordings.update(recordings_in(nodes_of(inner)))
                if followed or (name is not None and rule_for(layer) is None):
                    copy = _recorded(layer, inner, copied, name or layer.name)
                else:
                    copy = _cloned_graph(layer, copied)
                recordings.clear()
                recordings.update(outer)
            else:
                copy = remade(layer, name, lenient=True)
            copies[key] = layer, copy
        return copies[key][1]

    copy = copied(model)
    # Layer by layer: a subclass of a functional model may keep the same layers in another order.
    for source, target in copies.values():
        if graph_in(target) is None and isinstance(source, keras.layers.Layer):
            transfer(source, target)
    return copy


def _cloned_graph(model: keras.Model, copied: Callable[[Any], Any]) -> keras.Model:
    """`clone_model`, which by itself would call input layers by the names of their tensors."""
    if isinstance(model, keras.Sequential):
        return keras.models.clone_model(model, clone_function=copied)
    replays: set[int] = set()

    def copy_of(layer: Any) -> Any:
        copy = copied(layer)
        if graph_in(copy) is not None and graph_in(layer) is None:
            replays.add(id(copy))
        return copy

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer(tensors_of(args, kwargs)) if id(layer) in replays else layer(*args, **kwargs)

    inputs = tree.map_structure(lambda layer: remade(layer).output, input_layers(model))
    return keras.models.clone_model(model, input_tensors=inputs, clone_function=copy_of, call_function=call)


def _recorded(layer: Any, function: Any, copied: Callable[..., Any], name: str) -> keras.Model:
    """A functional model that does what is recorded of a layer, with copies under their local names.

    A nested model in it is called in the same way, under local names too.
    """
    names = local_names(function, None if graph_in(layer) is not None else layer)

    def run(node: Any, args: tuple, kwargs: dict) -> Any:
        copy = copied(node.operation, names[id(node.operation)])
        if graph_in(copy) is not None and graph_in(node.operation) is None:
            return copy(tensors_of(args, kwargs))
        return copy(*args, **kwargs)

    return replayed(function, run, name)
