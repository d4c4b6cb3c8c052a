"""Gates: the seed's own layers, wired so that each reads its channels through their gates.

A channel's gate stands where the channel is read: after its normalization and activation, and behind every merge, so
that channels that are tied share one. What a gate of 0 leaves is the masked seed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.channels import Call, ChannelGraph
from keras_morph.errors import UnsupportedModelError
from keras_morph.keras_internals import structs
from keras_morph.training.regularizers import Attached, pin_sourceless

__all__ = ["Gates", "attach_gates", "gateable", "gated"]


def gateable(graph: ChannelGraph) -> np.ndarray:
    """Groups that every reader can read through a gate, bool, `(num_groups,)`; pinned ones are not.

    Raises:
        UnsupportedModelError: if there are none.
    """
    closed = graph.pinned_mask.copy()
    read = np.zeros(graph.num_groups, bool)
    for call in graph.calls:
        groups = [graph.group_of[graph.vectors[graph.tensors[t].vector]] for t in (*call.inputs, *call.outputs)]
        ends = np.concatenate(groups[: len(call.inputs)]) if call.inputs else np.zeros(0, np.int64)
        ends = np.setdiff1d(ends, np.concatenate(groups[len(call.inputs) :]))
        read[ends] = True
        if not _reads_through_gates(graph, call):
            closed[ends] = True
        rule = graph.layers[call.layer].rule
        if call.padded or (rule is not None and rule.mixes):  # a gate behind it would come too late
            closed[np.concatenate(groups[: len(call.inputs)])] = True
        for hidden in groups[len(call.sources) : len(call.inputs)]:  # inside the layer
            closed[hidden] = True
    if not np.any(read & ~closed):
        raise UnsupportedModelError(
            f"There is nothing to gate: {graph.model.name} has no channel that may be removed and that a convolution or Dense "
            "layer reads."
        )
    return read & ~closed


def _reads_through_gates(graph: ChannelGraph, call: Call) -> bool:
    layer = graph.layers[call.layer]
    return layer.made is not None and len(call.sources) == 1 and any(w.reads is not None for w in layer.weights)


class Gates(keras.layers.Layer, ABC):
    """One learned gate per group, and the scorer of what it gates. A gate of your own is a subclass with one method, `gate`.

    Called on any tensor, it returns all gates and a 1 behind them, float32, `(n + 1,)`. Score and value of a group in inference
    are `regularizer.score` of its logit.

    Args:
        groups: the groups that have a gate, `(n,)`.
        regularizer: has `threshold` and `score`.
        start: of each logit.
    """

    other_axes = ()  # the logits are a source of their own: one number per group, nothing to reduce

    def __init__(self, groups: np.ndarray, regularizer: Any, *, start: float = 0.0) -> None:
        super().__init__(name="gates", dtype="float32")
        self.gated_groups, self.regularizer, self.threshold = groups, regularizer, regularizer.threshold
        initializer = keras.initializers.Constant(start)
        self.logits = self.add_weight(name="logits", shape=(len(groups),), initializer=initializer, autocast=False)

    @abstractmethod
    def gate(self, training: bool) -> Any:
        """What each group is multiplied by where it is read, float32, `(n,)`; in inference 0 below the threshold."""

    def sources(self, graph: ChannelGraph) -> list[Any]:
        return [self]

    def groups(self, graph: ChannelGraph) -> np.ndarray:
        return self.gated_groups

    @property
    def variable(self) -> Any:
        return self.logits

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        return self.regularizer.score(weight, axes, xp)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return ops.concatenate([self.gate(bool(training)), ops.ones(1)])

    def compute_output_shape(self, input_shape: Any) -> tuple[int]:
        return (len(self.gated_groups) + 1,)

    def values(self, num_groups: int) -> np.ndarray:
        """The score of each group, and 1 where a group has no gate, float64, `(num_groups,)`."""
        values = np.ones(num_groups)
        logits = np.asarray(ops.convert_to_numpy(self.logits), np.float64)
        values[self.gated_groups] = self.regularizer.score(logits, (), np)
        return values


def attach_gates(graph: ChannelGraph, make: Callable[[np.ndarray], Gates]) -> Attached:
    """The seed wired through gates.

    Args:
        graph: the traced seed.
        make: gives the Gates of some groups.

    Raises:
        UnsupportedModelError: if no group can be gated.
    """
    gates = make(np.flatnonzero(gateable(graph)))
    return Attached(gated(graph, gates), gates, pin_sourceless(graph, gates))


def gated(graph: ChannelGraph, gates: Gates) -> keras.Model:
    """The seed with gates: its own layers, called once more."""
    position = np.full(graph.num_groups, len(gates.gated_groups))
    position[gates.gated_groups] = np.arange(len(gates.gated_groups))
    tensors: dict[int, Any] = {}
    values: Any = None

    def through_gates(number: int) -> Any:
        tensor, x = graph.tensors[number], tensors[number]
        places = position[graph.group_of[graph.vectors[tensor.vector]]]
        if np.all(places == len(gates.gated_groups)):
            return x
        shape = [-1 if axis == tensor.axis else 1 for axis in range(len(tensor.shape))]
        return ops.multiply(x, ops.cast(ops.reshape(ops.take(values, places), shape), x.dtype))

    for call in graph.calls:
        if call.mode == "input":
            original = call.arguments.keras_tensors or graph.layers[call.layer].operation.output
            original = original[0] if isinstance(original, (list, tuple)) else original
            name = graph.layers[call.layer].name
            tensors[call.outputs[0]] = keras.Input(batch_shape=original.shape, dtype=original.dtype, name=name)
            continue
        if values is None:
            values = gates(tensors[graph.inputs[0]])
        layer = graph.layers[call.layer]
        if call.compute:  # it stands for several operations
            results = [call.compute(*(tensors[t] for t in call.operands))]
        else:
            read = through_gates if _reads_through_gates(graph, call) else tensors.__getitem__
            given = {id(source): read(t) for t, source in zip(call.operands, call.sources, strict=True)}
            given |= {id(source): tensors[t] for t, source in zip(call.masks, call.mask_sources, strict=True)}
            args, kwargs = call.arguments.convert(
                lambda x, g=given: g[id(x)] if isinstance(x, keras.KerasTensor) else x
            )
            results = tree.flatten(layer.operation(*args, **kwargs))
        tensors.update(zip(call.outputs, results, strict=True))
    ins, outs = structs(graph.model)
    with _unique_names(graph):
        return keras.Model(
            tree.pack_sequence_as(ins, [tensors[t] for t in graph.inputs]),
            tree.pack_sequence_as(outs, [tensors[t] for t in graph.outputs]),
            name=f"{graph.model.name}_gated",
        )


@contextmanager
def _unique_names(graph: ChannelGraph) -> Iterator[None]:
    """Keras wants the names in one model to differ; those in different nested models may be the same."""
    before = [(layer.operation, layer.operation.name) for layer in graph.layers]
    try:
        for number, layer in enumerate(graph.layers):
            layer.operation.name = f"gated_{number}"
        yield
    finally:
        for operation, name in before:
            operation.name = name
