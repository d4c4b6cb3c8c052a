"""Calls made once more, on other tensors.

Copies, gates, constants and rebuilt models are all replays, which differ in how a call is run.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import tree

from keras_morph.channels import Call
from keras_morph.keras_internals import nodes_of, one_or_all, structs

__all__ = ["called", "filled", "inferring", "model_like", "replay", "replayed"]


def replay(calls: Iterable[Any], tensors: dict[Any, Any], run: Callable[[Any], Any]) -> None:
    """Run calls in their order, each of which finds in `tensors` what those before it made.

    Args:
        calls: whatever has `outputs`: nodes of Keras, or calls of a traced model.
        tensors: value of each tensor that is known so far; those of all outputs are added.
        run: `run(call)` gives the values of the call's outputs, in their order, nested or not.
    """
    for call in calls:
        tensors.update(zip(call.outputs, tree.flatten(run(call)), strict=True))


def filled(arguments: Any, value: Callable[[Any], Any]) -> tuple[tuple, dict]:
    """The arguments of a call, as Keras recorded them, with values for the Keras tensors among them: args and kwargs."""
    return arguments.convert(lambda x: value(x) if isinstance(x, keras.KerasTensor) else x)


def called(call: Call, operation: Any, value: Callable[[int, Any], Any]) -> list[Any]:
    """What an operation makes in a call, a flat list.

    Args:
        call: the call.
        operation: the call's own, or one that stands for it.
        value: `value(number, source)` gives what the operation reads for a tensor of the graph, Keras's own being source.
    """
    numbers = call.numbers
    if call.compute:
        return [call.compute(*(value(numbers[source], source) for source in call.sources))]
    args, kwargs = filled(call.arguments, lambda source: value(numbers[source], source))
    return tree.flatten(operation(*args, **kwargs))


def inferring(operation: Any) -> Callable[..., Any]:
    """An operation that is called in inference, whatever its call says: training would change statistics."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return operation(*args, **{**kwargs, "training": False} if "training" in kwargs else kwargs)

    return run


def replayed(function: Any, run: Callable[[Any, tuple, dict], Any], name: str) -> keras.Model:
    """A functional graph once more, on inputs of its own; the results of a call are those of `run(node, args, kwargs)`."""
    inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in function.inputs]
    tensors = dict(zip(function.inputs, inputs, strict=True))
    nodes = [node for node in nodes_of(function) if not node.is_input]
    replay(nodes, tensors, lambda node: run(node, *filled(node.arguments, tensors.__getitem__)))
    return keras.Model(one_or_all(inputs), one_or_all([tensors[x] for x in function.outputs]), name=name)


def model_like(model: keras.Model, inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> keras.Model:
    """A functional model between these tensors, nested as another model's are."""
    ins, outs = structs(model)
    return keras.Model(tree.pack_sequence_as(ins, inputs), tree.pack_sequence_as(outs, outputs), name=name)
