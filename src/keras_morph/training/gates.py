"""Gates: the seed's own layers, wired so that each reads its channels through their gates.

A channel's gate stands where the channel is read: after its normalization and activation, and behind every merge, so
that channels that are tied share one. What a gate of 0 leaves is the masked seed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.channels import Call, ChannelGraph, Layer, Scope
from keras_morph.errors import UnsupportedModelError
from keras_morph.graph.replaying import called, filled, model_like, replay
from keras_morph.keras_internals import functional_in
from keras_morph.training.regularizers import Attached, pin_sourceless

__all__ = ["Gates", "attach_gates", "gateable", "gated"]


def gateable(graph: ChannelGraph) -> np.ndarray:
    """Groups that every reader can read through a gate, bool, `(num_groups,)`; pinned ones are not.

    Raises:
        UnsupportedModelError: if there are none.
    """
    closed = graph.pinned_mask.copy()
    read = np.zeros(graph.num_groups, bool)

    def groups(tensors: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(graph.groups_of(graph.tensors[t]) for t in tensors)])

    stepped = np.zeros(len(graph.calls), bool)
    for scope in graph.scopes:
        stepped[scope.start : scope.stop] |= scope.stepped
    for number, call in enumerate(graph.calls):
        ends = np.setdiff1d(groups(call.inputs), groups(call.outputs))
        read[ends] = True
        if stepped[number] or not _reads_through_gates(graph, call):
            closed[ends] = True
        rule = graph.layers[call.layer].rule
        if call.padded or (rule is not None and rule.mixes):  # a gate behind it would come too late
            closed[groups(call.inputs)] = True
        closed[groups(call.inputs[len(call.sources) :])] = True  # inside the layer
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
    entering = [call for call in graph.calls if call.mode == "input"]
    replay(entering, tensors, lambda call: _input_of(graph.layers[call.layer]))
    values = gates(tensors[graph.inputs[0]])

    def as_it_is(number: int, source: Any) -> Any:
        return tensors[number]

    def through_gates(number: int, source: Any) -> Any:
        tensor, x = graph.tensors[number], tensors[number]
        places = position[graph.groups_of(tensor)]
        if np.all(places == len(gates.gated_groups)):
            return x
        shape = [-1 if axis == tensor.axis else 1 for axis in range(len(tensor.shape))]
        return ops.multiply(x, ops.cast(ops.reshape(ops.take(values, places), shape), x.dtype))

    def run(call: Call | Scope) -> Any:
        if isinstance(call, Scope):
            args, kwargs = filled(call.arguments, lambda _: tensors[call.inputs[0]])
            return call.model(*args, **kwargs)
        read = through_gates if _reads_through_gates(graph, call) else as_it_is
        return called(call, graph.layers[call.layer].operation, read)

    replay(_calls_to_gate(graph), tensors, run)
    inputs, outputs = [tensors[t] for t in graph.inputs], [tensors[t] for t in graph.outputs]
    with _unique_names(graph):
        model = model_like(graph.model, inputs, outputs, f"{graph.model.name}_gated")
    model.output_names = list(functional_in(graph.model).output_names)  # by which losses and metrics are given
    return model


def _calls_to_gate(graph: ChannelGraph) -> Iterator[Call | Scope]:
    """The calls after the inputs, in their order; a TimeDistributed is one of them, whatever it holds."""
    whole = {scope.start: scope for scope in graph.scopes if scope.stepped}
    stop = 0
    for number, call in enumerate(graph.calls):
        if number in whole and number >= stop:
            stop = whole[number].stop
            yield whole[number]
        elif number >= stop and call.mode != "input":
            yield call


def _input_of(layer: Layer) -> Any:
    original = layer.operation.output
    return keras.Input(batch_shape=original.shape, dtype=original.dtype, name=layer.name)


@contextmanager
def _unique_names(graph: ChannelGraph) -> Iterator[None]:
    """Keras wants the names in one model to differ; those in different nested models may be the same."""
    operations = [layer.operation for layer in graph.layers if isinstance(layer.operation, keras.Operation)]
    operations += [scope.model for scope in graph.scopes if scope.stepped]
    before = [(operation, operation.name) for operation in operations]
    try:
        for number, operation in enumerate(operations):
            operation.name = f"gated_{number}"
        yield
    finally:
        for operation, name in before:
            operation.name = name
