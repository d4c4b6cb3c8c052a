"""The graph that Keras records, and its layers made anew: the only file that reads the private attributes of that graph."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import tree
from keras.src.models.functional import Functional

from keras_morph.errors import UnsupportedModelError

__all__ = [
    "graph_in",
    "graph_of",
    "input_layers",
    "nodes_of",
    "operations_of",
    "remade",
    "replayed",
    "structs",
    "tensors_of",
]


def graph_in(model: Any) -> Any:
    """The functional graph that a model computes; None if it is not built, or if its `call` is the user's own."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None) if type(model).call is keras.Sequential.call else None
    return model if hasattr(model, "_nodes_by_depth") and type(model).call is Functional.call else None


def graph_of(model: Any) -> Any:
    """The functional graph inside a model.

    Raises:
        UnsupportedModelError: if there is none.
    """
    function = graph_in(model)
    if function is not None:
        return function
    if isinstance(model, keras.Sequential) and getattr(model, "_functional", None) is None:
        raise UnsupportedModelError(
            f"{model.name} is not built, so it has no graph to trace. Expected a model with a known input shape. "
            f"Received: an unbuilt Sequential; add keras.Input(shape) in front or call {model.name}.build(shape)."
        )
    name = getattr(model, "name", repr(model))
    raise UnsupportedModelError(
        f"{name} has no graph to trace. Expected a functional or Sequential model. "
        f"Received: {type(model).__name__}, whose call() is plain Python; call it on an input, x = keras.Input(shape), "
        "and give keras.Model(x, model(x)): a call that consists of layers and keras.ops is followed."
    )


def structs(model: keras.Model) -> tuple[Any, Any]:
    """How a model's inputs and outputs are nested: a tensor, or lists and dictionaries of them."""
    function = graph_of(model)
    return function._inputs_struct, function._outputs_struct


def input_layers(model: keras.Model) -> Any:
    """The InputLayers of a functional model, nested as its inputs are."""
    return tree.map_structure(lambda tensor: tensor._keras_history.operation, model.input)


def nodes_of(function: Any) -> list[Any]:
    """Calls of a functional graph, in the order in which they run."""
    depths = function._nodes_by_depth
    return [node for depth in sorted(depths, reverse=True) for node in depths[depth]]


def operations_of(function: Any) -> list[Any]:
    """Layers and operations of a functional graph."""
    return list(function._operations)


def tensors_of(args: Any, kwargs: Any) -> Any:
    """The Keras tensors among a call's arguments: a list, or the only one."""
    return _one_or_all([x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)])


def replayed(function: Any, call: Callable[[Any, tuple, dict], Any], name: str) -> keras.Model:
    """A functional graph once more, on inputs of its own; the results of a call are those of `call(node, args, kwargs)`."""
    tensors = {id(x): keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in function.inputs}
    inputs = list(tensors.values())
    for node in nodes_of(function):
        if not node.is_input:
            args, kwargs = node.arguments.convert(lambda x: tensors[id(x)] if isinstance(x, keras.KerasTensor) else x)
            tensors.update(zip(map(id, node.outputs), tree.flatten(call(node, args, kwargs)), strict=True))
    return keras.Model(_one_or_all(inputs), _one_or_all([tensors[id(x)] for x in function.outputs]), name=name)


def _one_or_all(values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]


def remade(layer: Any, name: str | None = None, *, lenient: bool = False) -> Any:
    """A layer made anew from its config, with fresh weights; or the layer itself, where that fails.

    It fails for a Lambda, and for a layer whose arguments Keras cannot write down and that has no `get_config`.

    Args:
        layer: a layer or operation.
        name: name of the copy; that of the layer by default.
        lenient: leave out what the config holds and the class does not take, as in some of KerasHub's transformers.
    """
    name = name or layer.name
    try:
        config = layer.get_config()
        config = {**config, "name": name} if "name" in config else config
        try:
            copy = type(layer).from_config(config)
        except TypeError:
            if not lenient:
                raise
            copy = _from_known_arguments(type(layer), config)
    except Exception:  # whatever a user's layer raises
        return layer
    copy.name = name  # where __init__ takes no name
    return copy


def _from_known_arguments(kind: Any, config: dict) -> Any:
    """A layer whose config holds more than its class takes.

    The copy's own config is without it, so that what is saved can be loaded.
    """
    parameters = inspect.signature(kind).parameters
    taken = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken |= {"name", "trainable", "dtype"}
    config = {key: value for key, value in config.items() if key in taken}
    copy = kind.from_config(config)
    copy.get_config = lambda: dict(config)
    return copy
