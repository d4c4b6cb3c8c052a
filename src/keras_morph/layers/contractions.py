"""Rows of what sums over channels: dot products, matmul, einsum, and norms over channels.

A layer with weights reads a channel through a row of its kernel, which is zero where the channel is dead. A sum over
channels has no such row: a dead channel leaves it only where it is exactly zero in the masked seed, `Signal.zeroed`.
Where it is another constant, a sum over one operand is computed at full width.

    sum_c u_c v_c   u and v are tied index by index, and one of them has to be zero where they are dead
    x / |x|         x has to be zero where it is dead
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from keras import layers

from keras_morph.keras_internals import CustomScaleLayer, LayerScale, image, nn, numeric
from keras_morph.layers import keras_layers, operations, sequences  # noqa: F401 -- rows that are completed here
from keras_morph.layers import sequences as sequence_rows  # noqa: F401 -- rows that are completed here
from keras_morph.layers.rules import TABLE, Flow, Routed, Rule, Signal, always, fresh, same, together, zero_at_zero

__all__ = ["CONTRACTION_ROWS"]


def _contracted(flow: Flow, operands: Sequence[str], result: str) -> Routed:
    """An einsum: each axis of each operand, and of the result, has a letter.

    The letter of an operand's channel axis either stands in the result too, and is its channel axis, or is summed over.
    Where another operand has the same letter along its channel axis, they are tied; along another of its axes, the
    channels are pinned.
    """
    places = {
        number: letters[signal.axis] for number, (signal, letters) in enumerate(zip(flow.inputs, operands, strict=True))
    }
    axis = flow.default_axis(len(result))
    kept: dict[str, Signal] = {}
    for letter in dict.fromkeys(places.values()):
        signals = [signal for number, signal in enumerate(flow.inputs) if places[number] == letter]
        others = [number for number, letters in enumerate(operands) if letter in letters and places[number] != letter]
        reason = ""
        if others or len({len(signal.ids) for signal in signals}) > 1:
            reason = "meets its channels with another axis"
        elif letter not in result and not any(signal.zeroed for signal in signals):
            reason = "sums over channels that are not zero where they are dead"
        elif letter in result and result.index(letter) == 0:
            reason = "moves channels to the batch axis"
        for signal in signals:
            if reason:
                flow.graph.pin(signal.ids, f"{flow.name} {reason}")
            else:
                flow.graph.tie(signals[0].ids, signal.ids)
        if letter in result and result.index(letter):
            kept[letter] = signals[0]
    if not kept:
        made = flow.graph.make(flow.name, flow.output_shapes[0][axis] or 0 if result else 0, "result")
        flow.graph.pin(made, f"{flow.name} has no channels of its own")
        return Routed([(made, axis)], mode="strict")
    letter = max(kept, key=lambda one: (result.index(one) == axis, result.index(one)))
    for other, signal in kept.items():
        if other != letter:
            flow.graph.pin(signal.ids, f"{flow.name} has another axis of channels")
    return Routed([(kept[letter].ids, result.index(letter))], mode="strict")


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _multiplied(flow: Flow) -> Routed:
    """`ops.matmul(x, y)` of operands of at least two axes: the last of x meets the last but one of y."""
    if len(flow.inputs) != 2 or min(signal.rank for signal in flow.inputs) < 2:
        return fresh(flow, "multiplies matrices that we do not know")
    rank = max(signal.rank for signal in flow.inputs)
    stacked = LETTERS[: rank - 2]
    left, right = (stacked[rank - signal.rank :] for signal in flow.inputs)
    if any(1 in signal.shape[1:-2] for signal in flow.inputs):
        return fresh(flow, "broadcasts matrices")
    return _contracted(flow, [f"{left}xz", f"{right}zy"], f"{stacked}xy")


def _multiplied_all(flow: Flow) -> Routed:
    return fresh(flow, "multiplies matrices that we do not know")


def _summed_by_name(flow: Flow) -> Routed:
    """`ops.einsum` of Keras tensors, with all axes named."""
    left, arrow, result = flow.operation.subscripts.replace(" ", "").partition("->")
    operands = left.split(",")
    fits = len(operands) == len(flow.inputs) and all(
        len(set(letters)) == len(letters) == signal.rank for letters, signal in zip(operands, flow.inputs, strict=False)
    )
    plain = arrow and "." not in flow.operation.subscripts and len(set(result)) == len(result)
    return _contracted(flow, operands, result) if fits and plain else fresh(flow, "is an einsum that we cannot follow")


def _dotted(flow: Flow) -> Routed:
    """`layers.Dot(axes)`: one axis of each operand is summed over, the batch axis is shared."""
    if len(flow.inputs) != 2:
        return fresh(flow, "multiplies something that we do not know")
    axes, normalized = flow.operation.axes, flow.operation.normalize
    axes = [axes, axes] if isinstance(axes, int) else list(axes)
    operands = []
    for number, (signal, axis) in enumerate(zip(flow.inputs, axes, strict=True)):
        letters = ["a", *LETTERS[1 + 8 * number :][: signal.rank - 1]]
        letters[axis % signal.rank] = "z"
        operands.append("".join(letters))
    if normalized and not all(signal.zeroed for signal in flow.inputs):
        return fresh(flow, "divides by a norm over channels that are not zero where they are dead")
    result = "a" + "".join(letter for letters in operands for letter in letters[1:] if letter != "z")
    if len(result) == 1:
        for signal in flow.inputs:
            if signal.axis != signal.rank - 1:
                return fresh(flow, "sums over an axis without channels")
        result = "ay"  # one number per example
    return _contracted(flow, operands, result)


def _total(flow: Flow) -> Routed:
    """`ops.sum` over the channel axis."""
    signal, operation = flow.inputs[0], flow.operation
    axis = operation.axis
    axes = range(signal.rank) if axis is None else [axis] if isinstance(axis, int) else axis
    gone = {a % signal.rank for a in axes}
    if signal.axis not in gone or 0 in gone:
        return TABLE_SUM.flow(flow)
    if not signal.zeroed:
        return fresh(flow, "sums over channels")
    letters = LETTERS[: signal.rank]
    if not operation.keepdims:
        return _contracted(flow, [letters], "".join(c for n, c in enumerate(letters) if n not in gone))
    result = "".join(c.upper() if n in gone else c for n, c in enumerate(letters))
    return _contracted(flow, [letters], result)


def _divided_by_norm(flow: Flow) -> Routed:
    """Division by the norm over some axes; over the channels, what is zero adds nothing to it."""
    signal, axis = flow.inputs[0], flow.operation.axis
    axes = {a % signal.rank for a in ([axis] if isinstance(axis, int) else axis)}
    if signal.axis in axes and not signal.zeroed:
        return together(flow, "divides by a norm over channels")
    return replace(same(flow), mode="strict")


TABLE_SUM = TABLE[numeric.Sum]

CONTRACTION_ROWS: dict[type, Rule] = {
    numeric.Matmul: Rule(_multiplied, "strict", zero=always, absorbs=True),
    numeric.Dot: Rule(_multiplied_all, "strict"),
    numeric.Einsum: Rule(_summed_by_name, "strict", zero=always, absorbs=True),
    numeric.Sum: replace(TABLE_SUM, flow=_total, zero=always),
    layers.Dot: Rule(_dotted, "strict", zero=always),
    layers.UnitNormalization: Rule(_divided_by_norm, "strict", mixes=True, zero=always),
    nn.Normalize: Rule(_divided_by_norm, "strict", mixes=True, zero=always),
}
TABLE.update(CONTRACTION_ROWS)

# What is zero stays zero in them.
ZERO_STAYS_ZERO = {
    layers: """Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout Identity ActivityRegularization
        ReLU LeakyReLU ELU PReLU MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D
        AveragePooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D
        GlobalMaxPooling2D GlobalMaxPooling3D AdaptiveAveragePooling1D AdaptiveAveragePooling2D
        AdaptiveAveragePooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D ZeroPadding1D
        ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D CenterCrop Resizing UpSampling1D UpSampling2D
        UpSampling3D Flatten Reshape Permute RepeatVector Add Subtract Average Multiply Maximum Minimum Concatenate
        Attention AdditiveAttention RMSNormalization""",
    numeric: """Add Subtract Multiply Maximum Minimum Concatenate Stack GetItem Take Split Flip Repeat Roll
        Tile Transpose Moveaxis Swapaxes ExpandDims Squeeze Reshape Mean Max Min Amax Amin Cumsum Absolute Abs Fabs
        Negative Sign Sqrt Square Cbrt Tanh Sin Sinh Tan Arctan Arcsin Arcsinh Arctanh Copy Expm1 Log1p Round Floor Ceil
        Trunc""",
    nn: """Relu Relu6 Silu LeakyRelu Elu Selu Gelu Celu Glu TanhShrink HardTanh HardShrink HardSilu SoftShrink Softsign
        MaxPool AveragePool DepthToSpace SpaceToDepth""",
    image: "Resize CropImages",
}
for _module, _names in ZERO_STAYS_ZERO.items():
    for _kind in (getattr(_module, name) for name in _names.split()):
        TABLE[_kind] = replace(TABLE[_kind], zero=always)
for _kind in (LayerScale, CustomScaleLayer):
    TABLE[_kind] = replace(TABLE[_kind], zero=always)


def _keeps_zero(operation: Any) -> bool:
    """Those whose arguments say whether zero stays zero."""
    if getattr(operation, "pad_to_aspect_ratio", False):
        return not operation.fill_value
    initial = getattr(operation, "initial", None)
    if initial is not None:  # the result of a maximum or minimum of nothing
        return initial <= 0 if isinstance(operation, (numeric.Max, numeric.Amax)) else initial >= 0
    return not (getattr(operation, "threshold", 0) and getattr(operation, "negative_slope", 0))


for _kind in (layers.ReLU, layers.Resizing, image.Resize, numeric.Max, numeric.Min):
    TABLE[_kind] = replace(TABLE[_kind], zero=_keeps_zero)
TABLE[layers.Activation] = replace(TABLE[layers.Activation], zero=zero_at_zero)
