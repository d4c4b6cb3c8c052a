"""Copies of layers and models, with all that they hold."""

import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.tracing import graph_in, input_layers

__all__ = ["cloned", "remade", "transfer"]


def remade(layer: Any, name: str | None = None) -> Any:
    """A layer made anew from its config, with fresh weights; or the layer itself, where that fails.

    It fails for a Lambda, and for a layer whose arguments Keras cannot write down and that has no `get_config`.

    Args:
        layer: a layer or operation.
        name: name of the copy; that of the layer by default.
    """
    name = name or layer.name
    try:
        config = layer.get_config()
        copy = type(layer).from_config({**config, "name": name} if "name" in config else config)
    except Exception:  # whatever a user's layer raises
        return layer
    copy.name = name  # where __init__ takes no name
    return copy


def transfer(source: Any, target: Any) -> None:
    """Give a layer or model everything that saving another one writes: weights, statistics, vocabularies."""
    for one, other in zip(source._flatten_layers(), target._flatten_layers(), strict=True):
        if one is other:
            continue
        state: dict[str, Any] = {}
        one.save_own_variables(state)
        # JAX gives a variable's array away when it trains: what is trained must not share it.
        other.load_own_variables({key: np.array(ops.convert_to_numpy(value)) for key, value in state.items()})
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)


def cloned(model: keras.Model) -> keras.Model:
    """A copy of a model. Layers that cannot be made anew are shared with it, as `remade` says."""
    copies: dict[int, tuple[Any, Any]] = {}

    def copied(layer: Any) -> Any:
        if id(layer) not in copies:
            nested = graph_in(layer) is not None
            copy = _cloned_graph(layer, copied) if nested else remade(layer)
            copies[id(layer)] = layer, copy
        return copies[id(layer)][1]

    copy = copied(model)
    # Layer by layer: a subclass of a functional model may keep the same layers in another order.
    for source, target in copies.values():
        if graph_in(source) is None and isinstance(source, keras.layers.Layer):
            transfer(source, target)
    return copy


def _cloned_graph(model: keras.Model, copied: Callable[[Any], Any]) -> keras.Model:
    """`clone_model`, which by itself would call input layers by the names of their tensors."""
    inputs = None
    if not isinstance(model, keras.Sequential):
        inputs = keras.tree.map_structure(lambda layer: remade(layer).output, input_layers(model))
    return keras.models.clone_model(model, input_tensors=inputs, clone_function=copied)
