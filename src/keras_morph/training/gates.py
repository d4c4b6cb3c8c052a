"""Gates of LogisticSigmoid: the seed's own layers, wired so that each reads its channels through their gates.

A channel's gate stands where the channel is read: after its normalization and activation, and behind every merge, so
that channels that are tied share one. What a gate of 0 leaves is the masked seed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.channels import Call, ChannelGraph, Layer
from keras_morph.errors import UnsupportedModelError
from keras_morph.graph.replaying import called, model_like, replay
from keras_morph.training.regularizers import LogisticSigmoid

__all__ = ["Gates", "gateable", "gated"]


def gateable(graph: ChannelGraph) -> np.ndarray:
    """Groups that every reader can read through a gate, bool, `(num_groups,)`; pinned ones are not.

    Raises:
        UnsupportedModelError: if there are none.
    """
    closed = graph.pinned_mask.copy()
    read = np.zeros(graph.num_groups, bool)

    def groups(tensors: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(graph.groups_of(graph.tensors[t]) for t in tensors)])

    for call in graph.calls:
        ends = np.setdiff1d(groups(call.inputs), groups(call.outputs))
        read[ends] = True
        if not _reads_through_gates(graph, call):
            closed[ends] = True
        rule = graph.layers[call.layer].rule
        if call.padded or (rule is not None and rule.mixes):  # a gate behind it would come too late
            closed[groups(call.inputs)] = True
        closed[groups(call.inputs[len(call.sources) :])] = True  # inside the layer
    if not np.any(read & ~closed):
        raise UnsupportedModelError(
            f"LogisticSigmoid finds no channel in {graph.model.name} that may be removed and that a convolution or Dense "
            "layer reads."
        )
    return read & ~closed


def _reads_through_gates(graph: ChannelGraph, call: Call) -> bool:
    layer = graph.layers[call.layer]
    return layer.made is not None and len(call.sources) == 1 and any(w.reads is not None for w in layer.weights)


class Gates(keras.layers.Layer):
    """One gate per group. Called on any tensor, it returns all gates and a 1 behind them, float32, `(n + 1,)`.

    Args:
        groups: the groups that have a gate, `(n,)`.
        regularizer: says how they are sampled.
    """

    def __init__(self, groups: np.ndarray, regularizer: LogisticSigmoid) -> None:
        super().__init__(name="gates", dtype="float32")
        self.gated_groups, self.regularizer, self.threshold = groups, regularizer, regularizer.threshold
        start = np.log(regularizer.initial / (1 - regularizer.initial)) / regularizer.speed
        self.logits = self.add_weight(
            name="logits", shape=(len(groups),), initializer=keras.initializers.Constant(start), autocast=False
        )
        self.temperature = self._number("temperature", regularizer.temperature)
        self.sampling = self._number("sampling", 1.0)
        self.noise = keras.random.SeedGenerator()

    def _number(self, name: str, value: float) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_weight(name=name, shape=(), initializer=initializer, trainable=False, autocast=False)

    # Gates are a regularizer whose only source they are themselves.

    other_axes = ()

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
        rule, logits = self.regularizer, ops.multiply(self.logits, self.regularizer.speed)
        p = ops.sigmoid(logits)
        if training:
            uniform = keras.random.uniform(p.shape, 1e-6, 1 - 1e-6, dtype="float32", seed=self.noise)
            sample = ops.sigmoid((logits + ops.log(uniform) - ops.log1p(-uniform)) / self.temperature)
            if rule.straight_through:
                hard = ops.cast(sample > 0.5, "float32")
                sample = sample + ops.stop_gradient(hard - sample)
            gates = self.sampling * sample + (1 - self.sampling) * p
        else:
            gates = ops.where(p > rule.threshold, p, ops.zeros_like(p))
        return ops.concatenate([gates, ops.ones(1)])

    def compute_output_shape(self, input_shape: Any) -> tuple[int]:
        return (len(self.gated_groups) + 1,)

    def values(self, num_groups: int) -> np.ndarray:
        """P of each group, and 1 where a group has no gate, float64, `(num_groups,)`."""
        values = np.ones(num_groups)
        logits = np.asarray(ops.convert_to_numpy(self.logits), np.float64)
        values[self.gated_groups] = self.regularizer.score(logits, (), np)
        return values


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

    def run(call: Call) -> list[Any]:
        read = through_gates if _reads_through_gates(graph, call) else as_it_is
        return called(call, graph.layers[call.layer].operation, read)

    replay([call for call in graph.calls if call.mode != "input"], tensors, run)
    inputs, outputs = [tensors[t] for t in graph.inputs], [tensors[t] for t in graph.outputs]
    with _unique_names(graph):
        return model_like(graph.model, inputs, outputs, f"{graph.model.name}_gated")


def _input_of(layer: Layer) -> Any:
    original = layer.operation.output
    return keras.Input(batch_shape=original.shape, dtype=original.dtype, name=layer.name)


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
