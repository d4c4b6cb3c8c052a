"""Make the smaller model of a structure: replay the traced calls with narrower layers.

A tensor of the rebuilt model is a Keras tensor with the alive channels only; or nothing, where no channel is alive; or
a constant, where nothing alive makes it. Constants are computed with the seed's own layers and folded where they meet
what is alive, at a merge.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops, tree

from keras_morph.channels import Call, ChannelGraph, Layer
from keras_morph.closure import CONSTANT, LIVE, Closed, close
from keras_morph.learning import StructureLearner
from keras_morph.structure import structure_from
from keras_morph.tracing import structs, trace

__all__ = ["masked", "rebuild"]

UNKNOWN_SIZE = 32  # stands for a size that is unknown, where a constant is computed


def rebuild(
    seed: Any,
    structure: Any,
    *,
    weights: bool = True,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
) -> keras.Model:
    """The model of a structure: narrower layers, dead layers and branches gone.

    Args:
        seed: the model that the structure belongs to, or a StructureLearner.
        structure: a Structure, `{layer: count}`, or a path to either's JSON; counts keep the first channels.
        weights: whether the result gets the seed's weights, so that it computes what the masked seed computes, or
            fresh ones.
        protect: as in `trace`.
        tie: as in `trace`.

    Returns:
        A functional model of stock Keras layers and operations, with the seed's name, layer names, inputs and outputs.

    Raises:
        StructureMismatchError: if the structure is not one of this seed.
    """
    graph, closed = _closed(seed, structure, protect, tie)
    return _Replay(graph, closed, weights).model()


def masked(seed: Any, structure: Any, *, protect: Sequence[str] = (), tie: Sequence[Sequence[str]] = ()) -> keras.Model:
    """The seed with every dead channel cut off: what makes it and the rows by which it is read are zero.

    Args:
        seed: the model that the structure belongs to, or a StructureLearner.
        structure: as in `rebuild`.
        protect: as in `trace`.
        tie: as in `trace`.

    Returns:
        A copy of the seed, of its full size.
    """
    graph, closed = _closed(seed, structure, protect, tie)
    copy = keras.models.clone_model(graph.model)
    copy.set_weights(graph.model.get_weights())
    for layer in graph.layers:
        makes = any(weight.multiplies for weight in layer.weights)
        for weight in layer.weights if makes else ():
            variable = getattr(copy.get_layer(layer.name), weight.name)
            values = ops.convert_to_numpy(variable).copy()
            for axis, vector in enumerate(weight.vectors):
                if vector >= 0:
                    dead = ~closed.alive[graph.group_of[graph.vectors[vector]]]
                    values[(slice(None),) * axis + (dead,)] = 0
            variable.assign(values)
    return copy


def _closed(
    seed: Any, structure: Any, protect: Sequence[str], tie: Sequence[Sequence[str]]
) -> tuple[ChannelGraph, Closed]:
    graph = seed.graph if isinstance(seed, StructureLearner) else trace(seed, protect=protect, tie=tie)
    return graph, close(graph, structure_from(structure, graph).groups(graph))


class _Replay:
    """One pass over the calls that are present, from the inputs to the outputs."""

    def __init__(self, graph: ChannelGraph, closed: Closed, weights: bool) -> None:
        self.graph, self.closed, self.weights = graph, closed, weights
        self.tensors: dict[int, Any] = {}
        self.copies: dict[int, Any] = {}
        self.constants = _Constants(graph)

    def model(self) -> keras.Model:
        for call, present in zip(self.graph.calls, self.closed.present, strict=False):
            if present:
                self.tensors.update(zip(call.outputs, self.replay(call), strict=True))
        inputs, outputs = structs(self.graph)
        model = keras.Model(
            tree.pack_sequence_as(inputs, [self.tensors[t] for t in self.graph.inputs]),
            tree.pack_sequence_as(outputs, [self.tensors[t] for t in self.graph.outputs]),
            name=self.graph.model.name,
        )
        if self.weights:
            for number, copy in self.copies.items():
                self.carry(self.graph.layers[number], copy)
        return model

    def kept(self, vector: int) -> np.ndarray:
        """Positions of a vector that are alive."""
        return np.flatnonzero(self.closed.alive[self.graph.group_of[self.graph.vectors[vector]]])

    def replay(self, call: Call) -> list[Any]:
        if call.mode == "input":
            return [self.copy(call).output]
        if call.mode in ("merge", "join"):
            return [self.combine(call)]
        live = {id(source): self.tensors[t] for t, source in zip(call.inputs, call.sources, strict=True)}
        args, kwargs = call.arguments.convert(lambda x: live[id(x)] if isinstance(x, keras.KerasTensor) else x)
        return tree.flatten(self.copy(call)(*args, **kwargs))

    def combine(self, call: Call) -> Any:
        """A merge or concatenation of what is left of its operands."""
        states = self.closed.states
        live = [self.tensors[t] for t in call.inputs if states[t] == LIVE]
        if all(states[t] != CONSTANT for t in call.inputs):
            return live[0] if len(live) == 1 < len(call.inputs) else self.copy(call)(live)
        result = self.graph.tensors[call.outputs[0]]
        kept = self.kept(result.vector)
        shape = (len(kept), *[1] * (len(result.shape) - result.axis - 1))
        operands = [
            self.tensors[t] if states[t] == LIVE else self.constants[t][kept].reshape(shape) if self.weights else None
            for t in call.inputs
        ]
        return fold(self.graph.layers[call.layer].operation, operands, lambda: self.copy(call)(live))

    def copy(self, call: Call) -> Any:
        """The narrower copy of a call's layer."""
        if call.layer not in self.copies:
            self.copies[call.layer] = self.narrowed(self.graph.layers[call.layer], call)
        return self.copies[call.layer]

    def narrowed(self, layer: Layer, call: Call) -> Any:
        config, rule = layer.operation.get_config(), layer.rule
        result = self.graph.tensors[call.outputs[0]]
        if rule and rule.width:
            config[rule.width] = len(self.kept(result.vector))
        if rule and rule.narrow:
            config = rule.narrow(config, self.kept(result.vector), result)
        return type(layer.operation).from_config(config)

    def carry(self, layer: Layer, copy: Any) -> None:
        """Give a copy the seed's weights, sliced along every axis that holds channels."""
        if not layer.weights and isinstance(copy, layers.Layer):
            copy.set_weights(layer.operation.get_weights())
        for weight in layer.weights:
            values = ops.convert_to_numpy(getattr(layer.operation, weight.name))
            for axis, vector in enumerate(weight.vectors):
                if vector >= 0:
                    values = np.take(values, self.kept(vector), axis=axis)
            getattr(copy, weight.name).assign(values)


class _Constants(dict):
    """Tensor number -> its value per entry of its vector, where nothing alive makes it; computed when asked for."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.maker = {output: call for call in graph.calls for output in call.outputs}

    def __missing__(self, tensor: int) -> np.ndarray:
        call = self.maker[tensor]
        operands = {}
        for number, source in zip(call.inputs, call.sources, strict=True):
            operand = self.graph.tensors[number]
            # A layer that reads nothing alive reads zeros, whatever it would read.
            values = np.zeros(len(self.graph.vectors[operand.vector])) if call.mode == "make" else self[number]
            values = np.moveaxis(values.reshape([1] * (len(operand.shape) - 1) + [-1]), -1, operand.axis)
            full = (1, *(size or UNKNOWN_SIZE for size in operand.shape[1:]))
            operands[id(source)] = ops.convert_to_tensor(np.broadcast_to(values, full), source.dtype)
        args, kwargs = call.arguments.convert(lambda x: operands[id(x)] if isinstance(x, keras.KerasTensor) else x)
        results = tree.flatten(self.graph.layers[call.layer].operation(*args, **kwargs))
        for number, result in zip(call.outputs, results, strict=True):
            values = np.moveaxis(ops.convert_to_numpy(result), self.graph.tensors[number].axis, -1)
            self[number] = values.reshape(-1, values.shape[-1])[0]
        return self[tensor]


def fold(merge: Any, operands: list[Any], combine: Callable[[], Any]) -> Any:
    """A merge in which some operands are constant.

    Args:
        merge: the seed's merge layer.
        operands: Keras tensors, and NumPy arrays that broadcast to them from the right, one number per channel; None
            stands for a constant that nobody knows yet (fresh weights) and changes nothing.
        combine: applies the merge to the Keras tensors alone.

    Returns:
        A Keras tensor.
    """
    live = [x for x in operands if isinstance(x, keras.KerasTensor)]
    known = [x.astype(np.float64) for x in operands if isinstance(x, np.ndarray)]
    kind, name = type(merge), f"{merge.name}_constant"
    if kind is layers.Subtract:
        if operands[0] is live[0]:
            return _affine(merge, live[0], 1.0, -sum(known), name)
        return _affine(merge, live[0], -1.0, sum(known), name)
    x = live[0] if len(live) == 1 else combine()
    if kind is layers.Add:
        return _affine(merge, x, 1.0, sum(known), name)
    if kind is layers.Average:
        return _affine(merge, x, len(live) / len(operands), sum(known) / len(operands), name)
    if kind is layers.Multiply:
        return _affine(merge, x, np.prod(known, axis=0), 0.0, name)
    if not known:
        return x
    extreme = {layers.Maximum: np.maximum, layers.Minimum: np.minimum}[kind].reduce(known)
    return {layers.Maximum: ops.maximum, layers.Minimum: ops.minimum}[kind](x, extreme.astype(x.dtype))


def _affine(merge: Any, x: Any, scale: Any, offset: Any, name: str) -> Any:
    """`scale * x + offset` by a stock layer, or x itself where that changes nothing."""
    if np.all(np.asarray(scale) == 1.0) and np.all(np.asarray(offset) == 0.0):
        return x
    if np.ndim(scale) and keras.config.image_data_format() == "channels_first":
        # Rescaling would reshape the scale for images, whatever its operand is.
        return ops.multiply(x, np.asarray(scale, x.dtype))
    scale, offset = np.asarray(scale).tolist(), np.asarray(offset).tolist()
    return layers.Rescaling(scale, offset, name=name, dtype=merge.dtype_policy)(x)
