"""What nothing alive makes is constant: its values, computed with the seed's own layers, and merges that take them in."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_morph.channels import Call, ChannelGraph, on_axis
from keras_morph.graph.replaying import called, inferring, replay
from keras_morph.keras_internals import CustomScaleLayer
from keras_morph.layers.rules import rests_at_activation

__all__ = ["Constants", "DeadValues", "fold"]

UNKNOWN_SIZES = (32, 1024)  # stand for a size that is unknown, where a constant is computed


class Constants(dict):
    """Tensor number -> its value per entry of its vector, where nothing alive makes it; computed when asked for."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.maker = {output: call for call in graph.calls for output in call.outputs}

    def __missing__(self, tensor: int) -> np.ndarray:
        replay([self.maker[tensor]], self, self._run)
        return self[tensor]

    def _run(self, call: Call) -> list[np.ndarray]:
        if call.gathers or call.moves:
            return [self[call.inputs[0]][order] for order in call.gathers or call.moves]
        for size in UNKNOWN_SIZES[:-1]:
            try:
                return self._results(call, size)
            except Exception:  # whatever a layer raises on what is too small for it
                continue
        return self._results(call, UNKNOWN_SIZES[-1])

    def _results(self, call: Call, size_of_unknown: int) -> list[np.ndarray]:
        """What a call makes of constants, one number per entry of each result's vector."""

        def value(number: int, source: Any) -> Any:
            # A layer that reads nothing alive reads zeros, whatever it would read.
            values = self.zeros(number) if call.mode == "make" else self[number]
            return self._spread(number, values, source.dtype, size_of_unknown)

        results = called(call, inferring(self.graph.layers[call.layer].operation), value)
        return [self._gathered(number, result) for number, result in zip(call.outputs, results, strict=True)]

    def _spread(self, number: int, values: np.ndarray, dtype: Any, size_of_unknown: int) -> Any:
        """One example of a tensor that is constant along all axes but its channels'."""
        tensor = self.graph.tensors[number]
        full = (1, *(size or size_of_unknown for size in tensor.shape[1:]))
        return ops.convert_to_tensor(np.broadcast_to(on_axis(values, tensor.axis, len(full)), full), dtype)

    def _gathered(self, number: int, result: Any) -> np.ndarray:
        """What such a tensor has for each channel."""
        values = np.moveaxis(ops.convert_to_numpy(result), self.graph.tensors[number].axis, -1)
        return values.reshape(-1, values.shape[-1])[0]

    def zeros(self, tensor: int) -> np.ndarray:
        return np.zeros(len(self.graph.channels_of(self.graph.tensors[tensor])))


class DeadValues(Constants):
    """Tensor number -> what each entry of its vector is in the masked seed if its channel is dead, where that is steady.

    What makes a dead channel makes zeros; what follows makes of them what it makes of a constant.
    """

    def __missing__(self, tensor: int) -> np.ndarray:
        if self.graph.tensors[tensor].zeroed:
            return self.setdefault(tensor, self.zeros(tensor))
        layer = self.graph.layers[self.maker[tensor].layer]
        if rests_at_activation(layer.operation, layer.rule):
            rest = layer.operation.activation(ops.convert_to_tensor(self.zeros(tensor).astype(layer.operation.dtype)))
            return self.setdefault(tensor, ops.convert_to_numpy(rest))
        return super().__missing__(tensor)


def fold(merge: Any, operands: list[Any], combine: Callable[[], Any], name: str) -> Any:
    """A merge in which some operands are constant.

    Args:
        merge: the seed's merge layer.
        operands: Keras tensors, and NumPy arrays that broadcast to them from the right, one number per channel.
        combine: applies the merge to the Keras tensors alone.
        name: of the layer that adds the constant, where there is one.

    Returns:
        A Keras tensor.
    """
    live = [x for x in operands if isinstance(x, keras.KerasTensor)]
    known = [x.astype(np.float64) for x in operands if isinstance(x, np.ndarray)]
    kind = type(merge)
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
    if isinstance(merge, CustomScaleLayer):
        scale = 1.0 if operands[0] is live[0] else merge.scale
        return _affine(merge, live[0], scale, known[0] * (merge.scale if operands[0] is live[0] else 1.0), name)
    extreme = {layers.Maximum: np.maximum, layers.Minimum: np.minimum}[kind].reduce(known)
    return {layers.Maximum: ops.maximum, layers.Minimum: ops.minimum}[kind](x, extreme.astype(x.dtype))


def _affine(merge: Any, x: Any, scale: Any, offset: Any, name: str) -> Any:
    """`scale * x + offset` by a stock layer, or x itself where that changes nothing."""
    if np.all(np.asarray(scale) == 1.0) and np.all(np.asarray(offset) == 0.0):
        return x
    if x.dtype == "float64" or (np.ndim(scale) and keras.config.image_data_format() == "channels_first"):
        # Rescaling rounds its numbers to float32, and reshapes its scale for images, whatever its operand is.
        return ops.add(ops.multiply(x, np.asarray(scale, x.dtype)), np.asarray(offset, x.dtype))
    scale, offset = np.asarray(scale).tolist(), np.asarray(offset).tolist()
    return layers.Rescaling(scale, offset, name=name, dtype=merge.dtype_policy)(x)
