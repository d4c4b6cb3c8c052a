"""What we know of each layer type: one row of one table, keyed by the class object.

A row says how channels flow through the layer, how a call treats operands that are constant or gone, which config field
holds the width, and what lies along each axis of each weight. Tokens of an axis string:

    in    ids of the operand's channel axis
    out   ids of the result's channel axis
    mid   ids between the two kernels of a separable layer
    *     the weight has the operand's shape without the batch axis (PReLU)
    any other word: an axis that holds no channels

so that `Conv2D: kernel="kh kw in out", bias="out"` is documentation, parameter count, multiply-adds, lasso axes, masks
and slicing in one. A layer without a row is left as it is, and its channels are pinned.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_morph.channels import GraphBuilder, Tensor
from keras_morph.errors import KerasMorphError

__all__ = ["Flow", "Rule", "Signal", "register_rule", "rule_for"]

Ids = np.ndarray


@dataclass(frozen=True)
class Signal:
    """An operand or result as a row sees it: the ids along its channel axis, that axis, and the static shape."""

    ids: Ids
    axis: int
    shape: tuple[int | None, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Flow:
    """One call of a layer, as a row's `flow` receives it.

    Attributes:
        name: unique name of the layer.
        operation: the Keras layer or operation.
        inputs: its tensor operands.
        output_shapes: static shapes of its results.
        graph: where ids are made, tied and pinned.
        default_axis: channel axis of tensors of unknown origin, as a function of their rank.
    """

    name: str
    operation: Any
    inputs: list[Signal]
    output_shapes: list[tuple[int | None, ...]]
    graph: GraphBuilder
    default_axis: Callable[[int], int]

    def read(self, axis: int) -> Ids | None:
        """Ids that the layer reads along `axis` of its operand; None, and pinned, if they lie along another axis."""
        signal = self.inputs[0]
        if signal.axis == axis:
            return signal.ids
        self.graph.pin(signal.ids, f"{self.name} reads another axis than the one that its channels lie along")
        return None


@dataclass(frozen=True)
class Routed:
    """What a row's `flow` finds out about one call.

    Attributes:
        results: ids and channel axis of each result.
        sides: token of the axis strings -> ids; a token that is missing stands for an axis that cannot be narrowed.
        mode: overrides the row's mode for this call.
    """

    results: list[tuple[Ids, int]]
    sides: Mapping[str, Ids | None] = field(default_factory=dict)
    mode: str | None = None


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        flow: how ids pass through a call; ties and pins on the way.
        mode: how a call treats constant operands:
            "make": weights read the operand; with nothing alive to read, the result is constant.
            "uniform": maps a spatially uniform constant to a spatially uniform constant.
            "merge": elementwise over several operands; constants are folded.
            "join": joins the operands' vectors.
            "strict": operands must not be constant.
        weights: attribute -> axis string.
        multiplies: attribute -> "outputs" or "inputs": each element is multiplied once per position of that tensor.
        width: config field that holds the number of `out` channels.
        scale: attribute that scales each channel (the gamma of BatchNormalization).
        narrow: `narrow(config, kept positions of the result's channel axis, result) -> config` where the config holds
            more than a width.
        variant: `variant(operation) -> Rule | None`, a different row for some instances of the class.
    """

    flow: Callable[[Flow], Routed]
    mode: str
    weights: Mapping[str, str] = field(default_factory=dict)
    multiplies: Mapping[str, str] = field(default_factory=dict)
    width: str | None = None
    scale: str | None = None
    narrow: Callable[[dict, np.ndarray, Tensor], dict] | None = None
    variant: Callable[[Any], "Rule | None"] | None = field(default=None, repr=False)


def _channel_axis(operation: Any, rank: int) -> int:
    return 1 if getattr(operation, "data_format", "channels_last") == "channels_first" else rank - 1


# Activations that treat every element alone; any other function may mix channels.
ELEMENTWISE = frozenset(
    """celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish relu
    relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink
    threshold""".split()  # noqa: SIM905
)


def _mixes_channels(activation: Any) -> str | None:
    """Why an activation cannot be taken apart by channels, or None."""
    name = getattr(activation, "__name__", type(activation).__name__)
    if activation is None or (name in ELEMENTWISE and getattr(keras.activations, name, None) is activation):
        return None
    return (
        f"its activation {name} mixes channels" if hasattr(keras.activations, name) else f"activation {name} is unknown"
    )


# Flows: how ids pass through a call.


def _same(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    return Routed([(signal.ids, signal.axis)], {"in": signal.ids})


def _weighted(flow: Flow) -> Routed:
    """Conv, transposed Conv and Dense: read every input channel, make `out`."""
    axis = _channel_axis(flow.operation, flow.inputs[0].rank)
    made = flow.graph.make(flow.name, flow.output_shapes[0][axis] or 0)
    if reason := _mixes_channels(getattr(flow.operation, "activation", None)):
        flow.graph.pin(made, reason)
    return Routed([(made, axis)], {"in": flow.read(axis), "out": made})


def _grouped(flow: Flow) -> Routed:
    """A grouped convolution: inputs and outputs of one conv group are one group of channels."""
    routed, groups = _weighted(flow), flow.operation.groups
    read, made = routed.sides["in"], routed.sides["out"]
    if read is None or made is None:
        flow.graph.pin(
            routed.results[0][0], f"{flow.name} is a grouped convolution over another axis than its channels'"
        )
    else:
        members = np.concatenate([read.reshape(groups, -1), made.reshape(groups, -1)], axis=1)
        flow.graph.tie(np.repeat(members[:, 0], members.shape[1]), members.ravel())
    return Routed(routed.results, {"out": made})


def _depthwise(flow: Flow) -> Routed:
    """Each input channel is filtered alone, into `depth_multiplier` channels that carry its id."""
    axis = _channel_axis(flow.operation, flow.inputs[0].rank)
    read = flow.read(axis)
    if read is None:
        return _fresh(flow, "filters another axis than the one that its channels lie along")
    if reason := _mixes_channels(flow.operation.activation):
        flow.graph.pin(read, reason)
    out = _repeat(read, flow.operation.depth_multiplier)
    return Routed([(out, axis)], {"in": read, "out": out})


def _repeat(ids: Ids, times: int) -> Ids:
    return ids if times == 1 else np.repeat(ids, times)


def _separable(flow: Flow) -> Routed:
    routed = _weighted(flow)
    read = routed.sides["in"]
    mid = None if read is None else _repeat(read, flow.operation.depth_multiplier)
    return replace(routed, sides={**routed.sides, "mid": mid})


def _normalized(flow: Flow) -> Routed:
    """BatchNormalization: one scale, shift, mean and variance per channel."""
    signal = flow.inputs[0]
    read = flow.read(flow.operation.axis % signal.rank)
    return Routed([(signal.ids, signal.axis)], {"in": read}, mode="strict" if read is None else None)


def _activated(flow: Flow) -> Routed:
    reason = _mixes_channels(flow.operation.activation)
    return _together(flow, reason) if reason else _same(flow)


def _softmaxed(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis
    axes = {a % signal.rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])}
    return _together(flow, "mixes channels (softmax)") if signal.axis in axes else _same(flow)


def _together(flow: Flow, reason: str) -> Routed:
    """Hands ids on, but works on all channels together: they are pinned."""
    signal = flow.inputs[0]
    flow.graph.pin(signal.ids, f"{flow.name} {reason}")
    return Routed([(signal.ids, signal.axis)], mode="strict")


def _pooled_globally(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    axis = _channel_axis(flow.operation, signal.rank)
    if signal.axis != axis:
        return _fresh(flow, "pools the axis that its channels lie along")
    return Routed([(signal.ids, axis if flow.operation.keepdims else 1)])


def _spatial(flow: Flow) -> Routed:
    """Pooling, padding, cropping, upsampling: every channel alone, over the other axes."""
    signal = flow.inputs[0]
    if signal.axis != _channel_axis(flow.operation, signal.rank):
        return _fresh(flow, "works along the axis that its channels lie along")
    return _same(flow)


def _fresh(flow: Flow, reason: str) -> Routed:
    """Results whose channels we cannot follow: new ids, pinned on both sides."""
    for signal in flow.inputs:
        flow.graph.pin(signal.ids, f"{flow.name} {reason}")
    results = []
    for number, shape in enumerate(flow.output_shapes):
        axis = flow.default_axis(len(shape))
        made = flow.graph.make(f"{flow.name}:{number}" if number else flow.name, (shape[axis] or 0) if shape else 0)
        flow.graph.pin(made, f"{flow.name} {reason}")
        results.append((made, axis))
    return Routed(results, mode="strict")


def unknown(flow: Flow) -> Routed:
    """The flow of a layer without a row."""
    return _fresh(flow, f"is a layer that we do not know ({type(flow.operation).__name__})")


def follow_reshape(ids: Ids, axis: int, before: tuple, after: tuple) -> tuple[Ids, int] | None:
    """Where the channel axis is after a row-major reshape, or None where it was torn apart.

    Args:
        ids: ids along `axis`.
        axis: channel axis before, batch axis included.
        before, after: static shapes, batch included.
    """
    if None in before[1:] or None in after[1:]:
        same = axis == len(before) - 1 and before[-1] == after[-1]
        return (ids, len(after) - 1) if same else None
    sizes = after[1:]
    outer, inner = math.prod(before[1:axis]), math.prod(before[axis + 1 :])
    for new, size in enumerate(sizes):
        if size == len(ids) and math.prod(sizes[:new]) == outer:
            return ids, new + 1
    for new in reversed(range(len(sizes))):
        outside, inside = math.prod(sizes[:new]), math.prod(sizes[new + 1 :])
        # The new axis swallows the channel axis whole, a tail of what lay outside it and a head of what lay inside.
        if outer % outside == 0 and inner % inside == 0:
            return np.tile(np.repeat(ids, inner // inside), outer // outside), new + 1
    return None


def _reshaped(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    followed = follow_reshape(signal.ids, signal.axis, signal.shape, flow.output_shapes[0])
    return Routed([followed]) if followed else _fresh(flow, "tears the channel axis apart")


def _flattened(flow: Flow) -> Routed:
    """Flatten moves channels last before it flattens, in both data formats."""
    signal = flow.inputs[0]
    if signal.rank > 2 and _channel_axis(flow.operation, signal.rank) == 1:
        shape = (signal.shape[0], *signal.shape[2:], signal.shape[1])
        axis = signal.rank - 1 if signal.axis == 1 else signal.axis - 1
        flow = replace(flow, inputs=[Signal(signal.ids, axis, shape)])
    return _reshaped(flow)


def _permuted(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    return Routed([(signal.ids, [0, *flow.operation.dims].index(signal.axis))])


def _vector_repeated(flow: Flow) -> Routed:
    """RepeatVector: a new axis in front of the features."""
    return Routed([(flow.inputs[0].ids, 2)])


def _merged(flow: Flow) -> Routed:
    """Elementwise merge: equal channel axes are tied index by index; broadcasting over space changes nothing."""
    widest = max(flow.inputs, key=lambda signal: len(signal.ids))
    if any((signal.rank, signal.axis) != (widest.rank, widest.axis) for signal in flow.inputs):
        return _fresh(flow, "merges operands whose channels lie along different axes")
    for signal in flow.inputs:
        if len(signal.ids) == len(widest.ids):
            flow.graph.tie(widest.ids, signal.ids)
        else:
            flow.graph.pin(signal.ids, f"{flow.name} broadcasts it over channels")
    return Routed([(widest.ids, widest.axis)])


def _joined(flow: Flow) -> Routed:
    first = flow.inputs[0]
    if any(signal.axis != first.axis for signal in flow.inputs):
        return _fresh(flow, "joins operands whose channels lie along different axes")
    if flow.operation.axis % first.rank == first.axis:
        return Routed([(np.concatenate([signal.ids for signal in flow.inputs]), first.axis)])
    return replace(_merged(flow), mode="strict")


# Configs that hold more than a width.


def _narrow_groups(config: dict, kept: np.ndarray, result: Tensor) -> dict:
    return {**config, "groups": config["groups"] * len(kept) // config["filters"], "filters": len(kept)}


def _narrow_target(config: dict, kept: np.ndarray, result: Tensor) -> dict:
    target = list(config["target_shape"])
    target[result.axis - 1] = len(kept)
    return {**config, "target_shape": tuple(target)}


def _narrow_constants(config: dict, kept: np.ndarray, result: Tensor) -> dict:
    """Rescaling's scale and offset may hold one number per channel."""
    from_end = len(result.shape) - result.axis

    def narrowed(value: Any) -> Any:
        array = np.asarray(value)
        if array.ndim < from_end or array.shape[-from_end] == 1:
            return value
        return np.take(array, kept, axis=-from_end).tolist()

    return {**config, "scale": narrowed(config["scale"]), "offset": narrowed(config["offset"])}


# The table.

SAME = Rule(_same, "uniform")
SPATIAL = Rule(_spatial, "uniform")
MERGE = Rule(_merged, "merge")
DENSE = Rule(_weighted, "make", {"kernel": "in out", "bias": "out"}, multiplies={"kernel": "outputs"}, width="units")


def _convolution(kernel: str, positions: str = "outputs") -> Rule:
    return Rule(_weighted, "make", {"kernel": kernel, "bias": "out"}, {"kernel": positions}, width="filters")


def _grouped_variant(kernel: str) -> Callable[[Any], Rule | None]:
    grouped = Rule(_grouped, "strict", {"kernel": kernel, "bias": "out"}, {"kernel": "outputs"}, narrow=_narrow_groups)
    return lambda operation: grouped if operation.groups > 1 else None


def _conv(space: str) -> Rule:
    return replace(_convolution(f"{space} in out"), variant=_grouped_variant(f"{space} group_in out"))


def _depthwise_conv(space: str) -> Rule:
    return Rule(
        _depthwise, "strict", {"kernel": f"{space} in multiplier", "bias": "out"}, multiplies={"kernel": "outputs"}
    )


def _separable_conv(space: str, ones: str) -> Rule:
    kernels = {"depthwise_kernel": f"{space} in multiplier", "pointwise_kernel": f"{ones} mid out", "bias": "out"}
    return Rule(
        _separable,
        "make",
        kernels,
        multiplies={"depthwise_kernel": "outputs", "pointwise_kernel": "outputs"},
        width="filters",
    )


_NORMALIZED_WEIGHTS = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), "in")
_RENORM_WEIGHTS = dict.fromkeys(("moving_stddev", "renorm_mean", "renorm_stddev"), "in")

TABLE: dict[type, Rule] = {
    layers.Conv1D: _conv("k"),
    layers.Conv2D: _conv("kh kw"),
    layers.Conv3D: _conv("kd kh kw"),
    layers.Conv1DTranspose: _convolution("k out in", "inputs"),
    layers.Conv2DTranspose: _convolution("kh kw out in", "inputs"),
    layers.Conv3DTranspose: _convolution("kd kh kw out in", "inputs"),
    layers.DepthwiseConv1D: _depthwise_conv("k"),
    layers.DepthwiseConv2D: _depthwise_conv("kh kw"),
    layers.SeparableConv1D: _separable_conv("k", "one"),
    layers.SeparableConv2D: _separable_conv("kh kw", "one one"),
    layers.Dense: DENSE,
    layers.BatchNormalization: Rule(_normalized, "uniform", {**_NORMALIZED_WEIGHTS, **_RENORM_WEIGHTS}, scale="gamma"),
    layers.PReLU: Rule(_same, "strict", {"alpha": "*"}),
    layers.Activation: Rule(_activated, "uniform"),
    layers.Softmax: Rule(_softmaxed, "uniform"),
    layers.Concatenate: Rule(_joined, "join"),
    layers.Flatten: Rule(_flattened, "uniform"),
    layers.Reshape: Rule(_reshaped, "uniform", narrow=_narrow_target),
    layers.Permute: Rule(_permuted, "uniform"),
    layers.RepeatVector: Rule(_vector_repeated, "uniform"),
    layers.Rescaling: Rule(_same, "uniform", narrow=_narrow_constants),
    layers.Normalization: Rule(
        partial(_together, reason="holds a mean and variance per channel in its config"), "strict"
    ),
    **dict.fromkeys(
        [
            layers.ReLU,
            layers.LeakyReLU,
            layers.ELU,
            layers.Identity,
            layers.ActivityRegularization,
            layers.Dropout,
            layers.SpatialDropout1D,
            layers.SpatialDropout2D,
            layers.SpatialDropout3D,
            layers.AlphaDropout,
            layers.GaussianDropout,
            layers.GaussianNoise,
        ],
        SAME,
    ),
    **dict.fromkeys(
        [
            layers.MaxPooling1D,
            layers.MaxPooling2D,
            layers.MaxPooling3D,
            layers.AveragePooling1D,
            layers.AveragePooling2D,
            layers.AveragePooling3D,
            layers.Cropping1D,
            layers.Cropping2D,
            layers.Cropping3D,
            layers.UpSampling1D,
            layers.UpSampling2D,
            layers.UpSampling3D,
        ],
        SPATIAL,
    ),
    **dict.fromkeys(
        [layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D], replace(SPATIAL, mode="strict")
    ),
    **dict.fromkeys(
        [
            layers.GlobalAveragePooling1D,
            layers.GlobalAveragePooling2D,
            layers.GlobalAveragePooling3D,
            layers.GlobalMaxPooling1D,
            layers.GlobalMaxPooling2D,
            layers.GlobalMaxPooling3D,
        ],
        Rule(_pooled_globally, "uniform"),
    ),
    **dict.fromkeys(
        [layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum], MERGE
    ),
}


def rule_for(operation: Any) -> Rule | None:
    """The row of an operation's exact class, or None where we have none."""
    rule = TABLE.get(type(operation))
    if rule is None or getattr(operation, "lora_enabled", False) or getattr(operation, "quantization_mode", None):
        return None
    return (rule.variant(operation) if rule.variant else None) or rule


def register_rule(layer_class: type, rule: Rule | None = None, *, like: type | None = None) -> None:
    """Add a row for a layer class of your own, so that it can be narrowed.

    Args:
        layer_class: the class; it is matched exactly, subclasses need rows of their own.
        rule: a row in full, or
        like: a class whose row it shares: the same weights under the same names, the same config field for the width.

    Raises:
        KerasMorphError: if neither or both are given, or `like` has no row.
    """
    if (rule is None) == (like is None):
        raise KerasMorphError(
            f"register_rule({layer_class.__name__}) expects either a rule or like=LayerClass. "
            f"Received: rule={rule}, like={like}"
        )
    if like is not None and like not in TABLE:
        raise KerasMorphError(
            f"register_rule({layer_class.__name__}): like={like.__name__} has no rule to share; "
            "give a class that has one, or a Rule in full."
        )
    TABLE[layer_class] = rule or TABLE[like]  # type: ignore[index]
