"""Layers made of layers: what their `call` does, recorded as a functional graph.

A residual block or a transformer's encoder is often a class of its own whose `call` is Python. Run on Keras tensors it
leaves the same graph as a nested functional model, and is followed like one. A recording is only used where it is all
that the layer does; elsewhere the layer is one that we do not know.
"""

import inspect
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.graph.replaying import filled, replayed
from keras_morph.keras_internals import (
    as_if_training,
    call_on,
    graph_in,
    mask_of,
    nodes_of,
    one_or_all,
    parts_of,
    pytorch_modules,
    settings_of,
    tensors_of,
    to_snake_case,
)
from keras_morph.layers.rules import rule_for

__all__ = ["local_names", "recorded_or_none", "recordings_in"]

UNKNOWN_SIZES = (32, 6)  # stand for sizes that are unknown, where a recording is tried
TOLERANCE = {"float32": 1e-4, "float64": 1e-8}  # of a trial, relative to the largest output; 0.05 in half precision

_RECORDINGS: Any = weakref.WeakKeyDictionary()  # layer -> {what it is called with: a graph, or why there is none}
_TRIED: set[Any] = set()  # classes, what they were called with, and the steps of recordings that a trial has confirmed


def recordings_in(nodes: Sequence[Any]) -> dict[int, Any]:
    """The functional graphs of the layers that are made of layers, among those that are called.

    Args:
        nodes: calls of a graph.

    Returns:
        The layer's id -> a functional model of its own layers, whose inputs are the tensors among the call's arguments;
        or a string that says why the layer cannot be followed.
    """
    calls: dict[int, list[Any]] = {}
    for node in nodes:
        operation = node.operation
        if not node.is_input and _is_candidate(operation) and rule_for(operation) is None:
            calls.setdefault(id(operation), []).append(node)
    return {number: _recording(group) for number, group in calls.items()}


def _is_candidate(operation: Any) -> bool:
    own = isinstance(operation, keras.Layer) and not type(operation).__module__.startswith("keras.")
    return own and graph_in(operation) is None


def _recording(calls: Sequence[Any]) -> Any:
    keys = {_key(call) for call in calls}
    if len(keys) > 1:
        return "is called in two ways"
    layer = calls[0].operation
    key = keys.pop(), repr(settings_of(layer)), tuple(map(id, layer.weights))
    known = _RECORDINGS.setdefault(layer, {})
    if key not in known:
        try:
            known[key] = _record(layer, calls[0])
        except _Refused as reason:
            known[key] = str(reason)
    return known[key]


def recorded_or_none(layer: Any, call: Any, shapes: Sequence[tuple] = ()) -> Any:
    """The graph that a layer's `call` leaves in inference, even where it is not all that the layer does; or None.

    Args:
        layer: a layer.
        call: one call of it, with its `arguments`; None for a call on tensors of some shapes.
        shapes: these shapes.
    """
    if call is None:
        tensors = [keras.KerasTensor(shape, layer.compute_dtype) for shape in shapes]
        call = call_on(tensors)
    try:
        return _graph(layer, call, training=False)
    except _Refused:
        return None


def local_names(function: Any, owner: Any = None) -> dict[int, str]:
    """Names of what a recording calls, by id: the attributes of the layer that holds it, or else of its class.

    They do not depend on `Layer.name`, which counts through a whole program: `dense_7` has another name each time it is made.

    Args:
        function: the recording, or a nested model that is called in one.
        owner: the layer that was recorded.
    """
    attributes = _attributes(owner)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for node in nodes_of(function):
        operation = node.operation
        if id(operation) in names:
            continue
        name = attributes.get(id(operation)) or to_snake_case(type(operation).__name__)
        number, unique = 0, name
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        names[id(operation)] = unique
    return names


def _attributes(owner: Any) -> dict[int, str]:
    """Layers that a layer holds, by id: `conv` for `self.conv`, `blocks_0` for `self.blocks[0]`."""
    names: dict[int, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, keras.Layer):
            names.setdefault(id(value), name.replace("/", "_").replace(":", "_"))
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}_{key}", item)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                add(f"{name}_{number}", item)

    held = {**vars(owner), **pytorch_modules(owner)} if owner is not None else {}
    for name, value in held.items():
        if isinstance(value, keras.Layer) or not name.startswith("_"):
            add(name.strip("_"), value)
    return names


class _Refused(Exception):
    """Why a layer cannot be recorded."""


def _key(call: Any) -> str:
    """What a layer is called with, whatever the order of a dictionary."""
    args, kwargs = filled(call.arguments, _spec)
    return repr((_sorted(args), _sorted(kwargs)))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _sorted(value[key])) for key in sorted(value, key=repr)]
    return [_sorted(each) for each in value] if isinstance(value, list | tuple) else value


def _spec(tensor: Any) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def _record(layer: Any, call: Any) -> Any:
    """The graph of a layer; refused if that is not all that the layer does."""
    _check_layer(layer, call)
    function, training = _graph(layer, call, training=False), _graph(layer, call, training=True)
    _check_weights(layer, function)
    for node in nodes_of(function):
        _check_call(node)
    _check_training(function, training)
    function = _completed(function)
    for ours, theirs in zip(function.outputs, call.outputs, strict=True):
        _check_result(ours, theirs)
    steps = type(layer), _key(call), _steps(function, named=True)
    if steps not in _TRIED:  # the blocks of a transformer are many and alike
        for size in UNKNOWN_SIZES if any(None in x.shape[1:] for x in function.inputs) else UNKNOWN_SIZES[:1]:
            _try(layer, function, call, size)
        _TRIED.add(steps)
    return function


def _check_layer(layer: Any, call: Any) -> None:
    if layer.activity_regularizer is not None:
        raise _Refused("has an activity regularizer")
    for tensor in call.arguments.keras_tensors:
        if mask_of(tensor) is not None:
            raise _Refused("is given a mask")


def _check_weights(layer: Any, function: Any) -> None:
    if {id(v) for v in layer.weights} != {id(v) for v in function.weights}:
        raise _Refused("has weights of its own")


def _check_training(inference: Any, training: Any) -> None:
    """Training does the same, but for layers that Keras tells by itself that they are called in training."""
    if _steps(training) != _steps(inference):
        raise _Refused("does other things in training than in inference, or each time that it is called")
    for one, other in zip(nodes_of(inference), nodes_of(training), strict=True):
        fixed = one.arguments.kwargs.get("training")
        if fixed is not None and fixed is other.arguments.kwargs.get("training"):
            raise _Refused(f"says itself that {one.operation.name} is called with training={fixed}")


def _check_result(ours: Any, theirs: Any) -> None:
    fits = len(ours.shape) == len(theirs.shape) and ours.dtype == theirs.dtype
    if not fits or any(a != b and None not in (a, b) for a, b in zip(ours.shape, theirs.shape, strict=True)):
        raise _Refused(f"returns {_spec(theirs)}, and {_spec(ours)} when it is recorded")


@contextmanager
def _nothing_new(layer: Any) -> Iterator[None]:
    """What a layer holds and has never called, in inference or training, must not be built: it would add weights."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise _Refused("calls a layer for the first time")

    unbuilt = [part for part in parts_of(layer, itself=False) if not part.built]
    for part in unbuilt:
        part.__dict__["build"] = refuse
    try:
        yield
    finally:
        for part in unbuilt:
            del part.__dict__["build"]


def _graph(layer: Any, call: Any, *, training: bool) -> Any:
    """The graph that a layer's `call` leaves, its inputs in the order of the call's tensors."""
    inputs: list[Any] = []

    def placed(x: Any) -> Any:
        sparse = x.sparse and keras.backend.backend() != "torch"  # which knows no sparse inputs
        inputs.append(keras.Input(batch_shape=x.shape, dtype=x.dtype, sparse=sparse, name=f"input_{len(inputs)}"))
        casts = layer.autocast and "float" in x.dtype and x.dtype != layer.compute_dtype
        return ops.cast(inputs[-1], layer.compute_dtype) if casts else inputs[-1]

    args, kwargs = filled(call.arguments, placed)
    try:
        with as_if_training(layer, training), _nothing_new(layer):
            outputs = layer.call(*args, **{**kwargs, **_training(layer, training)})
        return keras.Model(tensors_of(inputs, {}), outputs, name=layer.name)
    except _Refused:
        raise
    except Exception as error:  # whatever a user's call raises on Keras tensors
        raise _Refused(f"is more than layers and keras.ops ({_first_line(error)})") from error


def _training(layer: Any, training: bool) -> dict[str, bool]:
    return {"training": training} if "training" in inspect.signature(layer.call).parameters else {}


def _steps(function: Any, *, named: bool = False) -> str:
    """What a graph does, call by call: the layer or operation, what else it is given and holds, and what it reads.

    Layers with weights are themselves, or with `named` their classes and shapes.
    """
    numbers: dict[Any, tuple[int, int]] = {}
    steps = []
    for number, node in enumerate(nodes_of(function)):
        args, kwargs = filled(node.arguments, numbers.__getitem__)
        kwargs.pop("training", None)
        steps.append((type(node.operation).__name__, _held(node.operation, named), args, sorted(kwargs.items())))
        numbers |= {x: (number, position) for position, x in enumerate(node.outputs)}
    return repr((steps, [numbers[x] for x in function.outputs]))


def _held(operation: Any, named: bool) -> Any:
    """What says which layer or operation it is."""
    if getattr(operation, "weights", None) and not named:
        return id(operation)
    if isinstance(operation, keras.Layer):
        return [tuple(weight.shape) for weight in operation.weights]
    return [(key, value) for key, value in vars(operation).items() if key != "name" and key[0] != "_"]


def _check_call(node: Any) -> None:
    for value in tree.flatten((node.arguments.args, node.arguments.kwargs)):
        if isinstance(value, keras.Variable) or (ops.is_tensor(value) and not isinstance(value, keras.KerasTensor)):
            raise _Refused(f"gives {type(node.operation).__name__} a tensor that it makes itself")
        if callable(value) and not isinstance(value, keras.KerasTensor):
            raise _Refused(f"gives {type(node.operation).__name__} a function")
    if any(mask_of(tensor) is not None for tensor in node.outputs):
        raise _Refused("works with masks")


def _lacks_a_size(node: Any) -> bool:
    """Whether a call is a reshape to (batch size, ...), which is unknown when it is recorded."""
    operation = node.operation
    return type(operation).__name__ == "Reshape" and None in getattr(operation, "newshape", ())


def _completed(function: Any) -> Any:
    """The same graph with reshapes that need not know the batch size; itself where it has no others."""
    if not any(_lacks_a_size(node) for node in nodes_of(function)):
        return function

    def run(node: Any, args: tuple, kwargs: dict) -> Any:
        operation = node.operation
        if _lacks_a_size(node):
            operation = type(operation)(_without_batch(tuple(operation.newshape), args[0].shape))
        return operation(*args, **kwargs)

    return replayed(function, run, function.name)


def _without_batch(shape: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[int, ...]:
    if shape[0] is not None or None in shape[1:] or None in given[1:]:
        raise _Refused("reshapes to a size that is unknown")
    known = math.prod(size for size in shape[1:] if size != -1)
    return (-1, *(math.prod(given[1:]) // known if size == -1 else size for size in shape[1:]))


def _try(layer: Any, function: Any, call: Any, unknown: int) -> None:
    """Hold a recording against the layer itself, on random numbers; sizes that are unknown are this one."""
    random = np.random.default_rng(0)
    values = [_random(random, tensor, unknown) for tensor in function.inputs]
    given = iter(values)
    args, kwargs = filled(call.arguments, lambda _: next(given))
    try:
        expected = tree.flatten(layer(*args, **{**kwargs, **_training(layer, False)}))
    except Exception as error:  # whatever a user's call raises
        if unknown != UNKNOWN_SIZES[0]:
            return  # too small for the layer itself
        raise _Refused(f"fails when it is tried ({_first_line(error)})") from error
    try:
        received = tree.flatten(function(one_or_all(values), training=False))
    except Exception as error:  # whatever it was that cannot be recorded
        raise _Refused(f"fails when what is recorded is tried ({_first_line(error)})") from error
    if not all(_agree(one, other) for one, other in zip(received, expected, strict=True)):
        raise _Refused("does more than what is recorded of it")


def _random(random: np.random.Generator, tensor: Any, unknown: int) -> Any:
    """Two examples of a tensor: random numbers, or zeros where it does not hold such."""
    shape = [(unknown if axis else 2) if size is None else size for axis, size in enumerate(tensor.shape)]
    array = random.normal(size=shape) if "float" in tensor.dtype else np.zeros(shape)
    return ops.cast(ops.convert_to_tensor(array.astype("float32")), tensor.dtype)


def _agree(received: Any, expected: Any) -> bool:
    one, other = (np.asarray(ops.convert_to_numpy(x), np.float64) for x in (received, expected))
    tolerance = TOLERANCE.get(keras.backend.standardize_dtype(expected.dtype), 0.05) * np.abs(other).max(initial=1e-6)
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=tolerance)


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:120]}"
