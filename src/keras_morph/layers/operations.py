"""The rows of functional operations: `x + y`, `x[..., :8]`, `keras.ops.relu(x)` and the like.

Functional operations are no layers: they hold no weights, but their arguments may hold constants, indices and shapes that
depend on channels. These are rewritten when a call is replayed; what cannot be is pinned.
"""

import math
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_morph.channels import Tensor
from keras_morph.keras_internals import activations, core, maths, nn, numeric
from keras_morph.keras_internals import image as images
from keras_morph.layers.keras_layers import channel_axis, spatial
from keras_morph.layers.rules import (
    TABLE,
    Flow,
    Rewriting,
    Routed,
    Rule,
    fresh,
    joined,
    merged,
    reshaped,
    same,
    together,
)

__all__ = ["OPERATION_ROWS"]


# Elementwise operations of a tensor with another one, a number or an array.


def _combined(flow: Flow) -> Routed:
    shapes = [np.shape(value) for value in _constants(flow.args, flow.kwargs)]
    if len(flow.inputs) > 1:  # and arrays beside them, in `where`
        routed = merged(flow)
        return replace(routed, mode="strict") if shapes else routed
    signal = flow.inputs[0]
    if any(len(shape) > signal.rank for shape in shapes) or flow.output_shapes[0] != signal.shape:
        return fresh(flow, "broadcasts it against a larger constant")
    from_end = signal.rank - signal.axis
    spatial = any(math.prod(shape) > (shape[-from_end] if len(shape) >= from_end else 1) for shape in shapes)
    return Routed([(signal.ids, signal.axis)], mode="strict" if spatial else "uniform")


def _constants(args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    return [x for x in (*args, *kwargs.values()) if not isinstance(x, keras.KerasTensor) and np.ndim(x) > 0]


def _narrow_arrays(
    args: tuple[Any, ...], kwargs: dict[str, Any], call: Rewriting
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Constants with one number per channel keep those of the alive channels."""
    # Of the result, since the first operand of `where` may be a mask of one channel.
    from_end, width = len(call.result.shape) - call.result.axis, call.result.shape[call.result.axis]

    def narrowed(x: Any) -> Any:
        if isinstance(x, keras.KerasTensor) or np.ndim(x) < from_end or np.shape(x)[-from_end] != width or width == 1:
            return x
        return np.take(keras.ops.convert_to_numpy(x), call.kept_result, axis=-from_end)

    return tuple(map(narrowed, args)), {key: narrowed(value) for key, value in kwargs.items()}


# Operations that pick channels.


def _picked(flow: Flow, positions: list[np.ndarray], axis: int) -> Routed:
    ids = flow.inputs[0].ids
    return Routed([(ids[p], axis) for p in positions], gathers=tuple(positions))


def _key(args: tuple[Any, ...], kwargs: Any, rank: int) -> list[Any]:
    """The key of `x[key]`, one entry per axis and new axis."""
    key = args[1] if len(args) > 1 else kwargs["key"]
    entries = list(key) if isinstance(key, (tuple, list)) else [key]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    at = next((n for n, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    return entries[:at] + [slice(None)] * (rank - used) + entries[at + 1 :]


def _indexed(flow: Flow) -> Routed:
    """`x[key]` with numbers, slices, None and Ellipsis."""
    signal = flow.inputs[0]
    axis, new = 0, 0
    for entry in _key(flow.args, flow.kwargs, signal.rank):
        if entry is not None and axis == signal.axis:
            if not isinstance(entry, slice):
                return fresh(flow, "takes a single channel")
            every = entry == slice(None)
            if every:
                return Routed([(signal.ids, new)], mode="uniform")
            return _picked(flow, [np.arange(len(signal.ids))[entry]], new)
        axis += entry is not None
        new += entry is None or isinstance(entry, slice)
    return fresh(flow, "is indexed in a way that we do not know")


def _whole_channels(
    args: tuple[Any, ...], kwargs: dict[str, Any], call: Rewriting
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The key of `x[key]` with all channels; picking them comes afterwards."""
    entries, axis = _key(args, kwargs, len(call.operand.shape)), 0
    for number, entry in enumerate(entries):
        if entry is not None:
            if axis == call.operand.axis and isinstance(entry, slice):
                entries[number] = slice(None)
            axis += 1
    return (args[0], tuple(entries)), {}


def _taken(flow: Flow) -> Routed:
    signal, operation = flow.inputs[0], flow.operation
    indices = flow.args[1] if len(flow.args) > 1 else flow.kwargs.get("indices")
    if operation.axis is None or len(flow.inputs) > 1:
        return fresh(flow, "takes elements by position or by a computed index")
    indices, axis = np.asarray(keras.ops.convert_to_numpy(indices)), operation.axis % signal.rank
    if indices.ndim != 1:
        return fresh(flow, "takes by an index of another rank than 1")
    if axis != signal.axis:
        return replace(same(flow), mode="uniform", rows=1.0 if axis else len(indices) / signal.rows)
    return _picked(flow, [indices % len(signal.ids)], axis)


def _split(flow: Flow) -> Routed:
    signal, operation = flow.inputs[0], flow.operation
    if operation.axis % signal.rank != signal.axis:
        return Routed([(signal.ids, signal.axis)] * len(flow.output_shapes), mode="uniform")
    ends = np.cumsum([shape[signal.axis] for shape in flow.output_shapes])
    starts = [0, *ends[:-1]]
    return _picked(flow, [np.arange(start, end) for start, end in zip(starts, ends, strict=True)], signal.axis)


def _flipped(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis
    axes = range(signal.rank) if axis is None else [axis] if isinstance(axis, int) else axis
    if signal.axis not in {a % signal.rank for a in axes}:
        return same(flow)
    return (
        _picked(flow, [np.arange(len(signal.ids))[::-1]], signal.axis) if len(axes) == 1 else fresh(flow, "flips axes")
    )


def _repeated(flow: Flow) -> Routed:
    signal, operation = flow.inputs[0], flow.operation
    if operation.axis is None or not isinstance(operation.repeats, int):
        return fresh(flow, "repeats elements one by one")
    if operation.axis % signal.rank != signal.axis:
        return replace(same(flow), rows=operation.repeats if operation.axis % signal.rank == 0 else 1.0)
    return _picked(flow, [np.repeat(np.arange(len(signal.ids)), operation.repeats)], signal.axis)


def _rolled(flow: Flow) -> Routed:
    signal, shift, axis = flow.inputs[0], flow.operation.shift, flow.operation.axis
    if not isinstance(axis, int) or not isinstance(shift, int):
        shifted = axis is not None and signal.axis not in {a % signal.rank for a in np.atleast_1d(axis)}
        return same(flow) if shifted else fresh(flow, "shifts channels along with another axis")
    if axis % signal.rank != signal.axis:
        return same(flow)
    return _picked(flow, [np.roll(np.arange(len(signal.ids)), shift)], signal.axis)


def _tiled(flow: Flow) -> Routed:
    signal, repeats = flow.inputs[0], np.atleast_1d(flow.operation.repeats)
    rank = len(flow.output_shapes[0])
    if rank != signal.rank or (len(repeats) == rank and repeats[0] != 1):
        examples = float(repeats[0]) if len(repeats) == rank == signal.rank else 1.0
        return replace(fresh(flow, "repeats examples, or adds an axis"), rows=examples)
    times = int(repeats[signal.axis - rank]) if len(repeats) >= rank - signal.axis else 1
    if times == 1:
        return same(flow)
    if math.prod(repeats) != times:
        return fresh(flow, "repeats channels along with another axis")
    return _picked(flow, [np.tile(np.arange(len(signal.ids)), times)], signal.axis)


def _gated(flow: Flow) -> Routed:
    """Glu: the first half of an axis times the sigmoid of the second."""
    signal, axis = flow.inputs[0], flow.operation.axis
    if axis % signal.rank != signal.axis:
        return same(flow)
    first, second = signal.ids.reshape(2, -1)
    flow.graph.tie(first, second)
    return Routed([(first, signal.axis)])


def _depth_to_space(flow: Flow) -> Routed:
    """`(h, w, r r c) -> (r h, r w, c)`: the channels of one place of c live and die together."""
    signal, block = flow.inputs[0], flow.operation.block_size
    if signal.axis != 3 or channel_axis(flow.operation, 4) != 3:
        return fresh(flow, "moves channels to other places")
    places = signal.ids.reshape(block * block, -1)
    flow.graph.tie(np.tile(places[0], len(places)), signal.ids)
    return Routed([(places[0], 3)], mode="strict")


def _space_to_depth(flow: Flow) -> Routed:
    signal, block = flow.inputs[0], flow.operation.block_size
    if signal.axis != 3 or channel_axis(flow.operation, 4) != 3:
        return fresh(flow, "makes channels of places")
    return Routed([(np.tile(signal.ids, block * block), 3)], mode="uniform")


# Operations that move axes.


def _transposed(flow: Flow) -> Routed:
    signal, axes = flow.inputs[0], flow.operation.axes
    axes = list(axes) if axes is not None else list(range(signal.rank))[::-1]
    return _moved(flow, [axis % signal.rank for axis in axes])


def _moved_axis(flow: Flow) -> Routed:
    signal, operation = flow.inputs[0], flow.operation
    source = [axis % signal.rank for axis in operation.source]
    target = [axis % signal.rank for axis in operation.destination]
    order = [axis for axis in range(signal.rank) if axis not in source]
    for place, axis in sorted(zip(target, source, strict=True)):
        order.insert(place, axis)
    return _moved(flow, order)


def _swapped(flow: Flow) -> Routed:
    rank = flow.inputs[0].rank
    order = list(range(rank))
    one, other = flow.operation.axis1 % rank, flow.operation.axis2 % rank
    order[one], order[other] = order[other], order[one]
    return _moved(flow, order)


def _moved(flow: Flow, order: list[int]) -> Routed:
    signal = flow.inputs[0]
    if order[0] != 0:
        return fresh(flow, "moves the batch axis")
    return Routed([(signal.ids, order.index(signal.axis))])


def _expanded(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis
    rank = len(flow.output_shapes[0])
    new = {a % rank for a in ([axis] if isinstance(axis, int) else axis)}
    kept = [a for a in range(rank) if a not in new]
    return Routed([(signal.ids, kept[signal.axis])])


def _squeezed(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis
    if axis is None:
        gone = {a for a, size in enumerate(signal.shape) if size == 1}
    else:
        gone = {a % signal.rank for a in ([axis] if isinstance(axis, int) else axis)}
    return _without_axes(flow, gone, "squeezes its channel axis away")


def _reduced(flow: Flow) -> Routed:
    """Mean, max, min and the like over axes without channels."""
    signal, operation = flow.inputs[0], flow.operation
    axis = operation.axis
    gone = (
        set(range(signal.rank))
        if axis is None
        else {a % signal.rank for a in ([axis] if isinstance(axis, int) else axis)}
    )
    if signal.axis in gone or 0 in gone:
        return fresh(flow, "reduces over channels or examples")
    return same(flow) if operation.keepdims else _without_axes(flow, gone, "")


def _without_axes(flow: Flow, gone: set[int], reason: str) -> Routed:
    signal = flow.inputs[0]
    if signal.axis in gone:
        return fresh(flow, reason)
    return Routed([(signal.ids, signal.axis - sum(a < signal.axis for a in gone))])


def _scanned(flow: Flow) -> Routed:
    """Cumulative sums, differences and sorting along an axis without channels."""
    signal, axis = flow.inputs[0], flow.operation.axis
    if axis is None or axis % signal.rank == signal.axis:
        return fresh(flow, "mixes channels")
    return same(flow)


def _moments(flow: Flow) -> Routed:
    """Mean and variance over axes without channels."""
    signal, operation = flow.inputs[0], flow.operation
    gone = {a % signal.rank for a in ([operation.axes] if isinstance(operation.axes, int) else operation.axes)}
    if signal.axis in gone or 0 in gone:
        return fresh(flow, "reduces over channels or examples")
    axis = signal.axis if operation.keepdims else signal.axis - sum(a < signal.axis for a in gone)
    return Routed([(signal.ids, axis)] * 2)


def _unstacked(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis % flow.inputs[0].rank
    if axis == signal.axis:
        return fresh(flow, "takes channels one by one")
    return Routed([(signal.ids, signal.axis - (axis < signal.axis))] * len(flow.output_shapes))


def _reshape_narrowed(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    shape = [config["newshape"]] if isinstance(config["newshape"], int) else list(config["newshape"])
    if shape[result.axis] != -1:
        shape[result.axis] = len(kept)
    return {**config, "newshape": tuple(shape)}


def _softmaxed(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis
    axes = {a % signal.rank for a in (axis if isinstance(axis, (list, tuple)) else [-1 if axis is None else axis])}
    if signal.axis in axes:
        return together(flow, "mixes channels (softmax)")
    # What a softmax makes of a constant depends on how many there are.
    return same(flow) if all(a and signal.shape[a] for a in axes) else replace(same(flow), mode="strict")


def _padded(flow: Flow) -> Routed:
    """Along the channel axis, what is added are channels that stay."""
    signal, pads = flow.inputs[0], flow.operation.pad_width
    before, after = pads[signal.axis % len(pads)]
    width = flow.output_shapes[0][signal.axis] or 0
    if width != len(signal.ids) + before + after:
        return fresh(flow, "pads its channel axis by a number that we do not know")
    value = flow.args[3] if len(flow.args) > 3 else flow.kwargs.get("constant_values")
    zero = signal.zeroed and (value is None or not np.any(value)) and flow.operation.mode in PADS_ZEROS_TO_ZEROS
    if not before and not after:
        return replace(same(flow), zero=zero)
    if flow.operation.mode != "constant":
        return fresh(flow, "pads its channel axis with channels of its own")
    made = flow.graph.make(flow.name, before + after, "padding")
    flow.graph.pin(made, f"{flow.name} pads with them")
    return Routed([(np.concatenate([made[:before], signal.ids, made[before:]]), signal.axis)], mode="strict", zero=zero)


PADS_ZEROS_TO_ZEROS = ("constant", "reflect", "symmetric")


def _clipped(flow: Flow) -> Routed:
    bounds = flow.operation.x_min, flow.operation.x_max
    return together(flow, "clips by arrays") if any(np.size(bound) > 1 for bound in bounds) else same(flow)


def _taken_along_axis(flow: Flow) -> Routed:
    """Every channel alone, by indices of its own or of all."""
    signal, axis = flow.inputs[0], flow.operation.axis
    if len(flow.inputs) != 2 or axis is None or axis % signal.rank == signal.axis:
        return fresh(flow, "takes channels, or by indices that we do not know")
    indices = flow.inputs[1]
    flow.graph.pin(indices.ids, f"{flow.name} takes them for indices")
    size = indices.shape[signal.axis]
    if size not in (1, len(signal.ids)) or indices.masked:
        return fresh(flow, "takes elements by indices of another shape")
    return Routed([(signal.ids, signal.axis)], mode="strict", takes=(-1, -1 if size == 1 else signal.axis))


def _stacked(flow: Flow) -> Routed:
    if len({signal.axis for signal in flow.inputs}) > 1:
        return fresh(flow, "stacks operands whose channels lie along different axes")
    rank = len(flow.output_shapes[0])
    routed = merged(flow)
    (ids, axis), new = routed.results[0], flow.operation.axis % rank
    if len(routed.results) != 1 or routed.mode == "strict":
        return routed
    return Routed([(ids, axis + (new <= axis))], mode="strict")


UNARY = Rule(same, "uniform")
BINARY = Rule(_combined, "merge", rewrite=_narrow_arrays)
SHIFT = replace(BINARY, shifts=True)
REDUCTION = Rule(_reduced, "uniform")

OPERATION_ROWS: dict[type, Rule] = {
    **dict.fromkeys(
        [
            *(nn.Relu, nn.Relu6, nn.Sigmoid, nn.SparseSigmoid, nn.Softplus, nn.Softsign, nn.SoftShrink, nn.SparsePlus),
            *(
                nn.Silu,
                nn.Squareplus,
                nn.LogSigmoid,
                nn.LeakyRelu,
                nn.HardSigmoid,
                nn.HardSilu,
                nn.Elu,
                nn.Selu,
                nn.Gelu,
            ),
            *(nn.Celu, nn.TanhShrink, nn.HardTanh, nn.HardShrink, nn.Threshold, numeric.Absolute, numeric.Arctan),
            *(numeric.Ceil, numeric.Cos, numeric.Exp, numeric.Expm1, numeric.Floor, numeric.Log),
            *(
                numeric.Log1p,
                numeric.Negative,
                numeric.Reciprocal,
                numeric.Round,
                numeric.Sign,
                numeric.Sin,
                numeric.Sinh,
            ),
            *(
                numeric.Sqrt,
                numeric.Square,
                numeric.Tan,
                numeric.Tanh,
                numeric.Copy,
                numeric.NanToNum,
                numeric.OnesLike,
            ),
            *(
                numeric.Abs,
                numeric.Fabs,
                numeric.Arcsin,
                numeric.Arcsinh,
                numeric.Arccos,
                numeric.Arccosh,
                numeric.Arctanh,
            ),
            *(numeric.Cbrt, numeric.Cosh, numeric.Exp2, numeric.Log10, numeric.Log2, numeric.Trunc, numeric.Sinc),
            *(numeric.Isnan, numeric.Isinf, numeric.Isfinite, numeric.LogicalNot, numeric.Deg2rad, numeric.Rad2deg),
            *(maths.Erfc, activations.ReLU),
            *(numeric.ZerosLike, maths.Rsqrt, maths.Erf, core.Cast, core.SaturateCast, core.StopGradient),
        ],
        UNARY,
    ),
    **dict.fromkeys(
        [
            *(numeric.Divide, numeric.TrueDivide, numeric.DivideNoNan, numeric.FloorDivide, numeric.Mod, numeric.Power),
            *(numeric.Logaddexp, numeric.Logaddexp2, numeric.Fmax, numeric.Fmin, numeric.Fmod, numeric.Arctan2),
            *(numeric.LogicalAnd, numeric.LogicalOr, numeric.LogicalXor, numeric.Where),
            *(numeric.Greater, numeric.GreaterEqual, numeric.Less, numeric.LessEqual, numeric.Equal, numeric.NotEqual),
        ],
        BINARY,
    ),
    **dict.fromkeys([numeric.Add, numeric.Subtract, numeric.Maximum, numeric.Minimum], SHIFT),
    numeric.Multiply: replace(BINARY, absorbs=True),
    **dict.fromkeys(
        [numeric.Mean, numeric.Max, numeric.Min, numeric.Amax, numeric.Amin, numeric.Any, numeric.All], REDUCTION
    ),
    # Over an unknown number of positions these are not what they are over some of them (folding.py).
    **dict.fromkeys(
        [numeric.Sum, numeric.Prod, numeric.Var, numeric.Std, maths.Logsumexp], replace(REDUCTION, mode="strict")
    ),
    **dict.fromkeys([numeric.Cumsum, numeric.Cumprod, numeric.Sort], Rule(_scanned, "strict")),
    **dict.fromkeys(
        [nn.MaxPool, nn.AveragePool, images.CropImages],
        Rule(spatial, "uniform"),
    ),
    **dict.fromkeys([images.Resize, images.PadImages], Rule(spatial, "strict")),
    nn.Moments: Rule(_moments, "uniform"),
    nn.Glu: Rule(_gated, "uniform"),
    nn.DepthToSpace: Rule(_depth_to_space, "strict"),
    nn.SpaceToDepth: Rule(_space_to_depth, "uniform"),
    core.Unstack: Rule(_unstacked, "uniform"),
    numeric.Roll: Rule(_rolled, "uniform"),
    numeric.Tile: Rule(_tiled, "uniform"),
    numeric.Concatenate: Rule(joined, "join"),
    numeric.Stack: Rule(_stacked, "strict"),
    numeric.GetItem: Rule(_indexed, "uniform", rewrite=_whole_channels),
    numeric.Take: Rule(_taken, "uniform"),
    numeric.Split: Rule(_split, "uniform"),
    numeric.Flip: Rule(_flipped, "uniform"),
    numeric.Repeat: Rule(_repeated, "uniform"),
    numeric.Transpose: Rule(_transposed, "uniform"),
    numeric.Moveaxis: Rule(_moved_axis, "uniform"),
    numeric.Swapaxes: Rule(_swapped, "uniform"),
    numeric.ExpandDims: Rule(_expanded, "uniform"),
    numeric.Squeeze: Rule(_squeezed, "uniform"),
    numeric.Reshape: Rule(reshaped, "uniform", narrow=_reshape_narrowed),
    numeric.Pad: Rule(_padded, "strict"),
    numeric.Clip: Rule(_clipped, "uniform"),
    numeric.TakeAlongAxis: Rule(_taken_along_axis, "strict"),
    nn.Softmax: Rule(_softmaxed, "uniform"),
    nn.LogSoftmax: Rule(_softmaxed, "uniform"),
}
TABLE.update(OPERATION_ROWS)
