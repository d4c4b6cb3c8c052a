"""The rows of Keras's layers, but for those over sequences."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_morph.channels import Tensor
from keras_morph.keras_internals import CustomScaleLayer, LayerScale
from keras_morph.layers.rules import (
    TABLE,
    Flow,
    Ids,
    Routed,
    Rule,
    Signal,
    fresh,
    joined,
    merged,
    reshaped,
    same,
    together,
    zero_at_zero,
)

__all__ = ["ROWS", "channel_axis", "mixes_channels", "spatial", "weighted"]


def channel_axis(operation: Any, rank: int) -> int:
    """The channel axis that a layer's data format means, for a tensor of a rank."""
    form = getattr(operation, "data_format", "channels_last") or keras.config.image_data_format()
    return 1 if form == "channels_first" else rank - 1


# Activations that treat every element alone; any other function may mix channels.
ELEMENTWISE = frozenset(
    """celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish relu
    relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink
    threshold""".split()  # noqa: SIM905
)


def mixes_channels(activation: Any) -> str | None:
    """Why an activation cannot be taken apart by channels, or None."""
    name = getattr(activation, "__name__", type(activation).__name__)
    if activation is None or (name in ELEMENTWISE and getattr(keras.activations, name, None) is activation):
        return None
    return (
        f"its activation {name} mixes channels" if hasattr(keras.activations, name) else f"activation {name} is unknown"
    )


# Flows: how ids pass through a call.


def weighted(flow: Flow) -> Routed:
    """Conv, transposed Conv and Dense: read every input channel, make `out`."""
    axis = channel_axis(flow.operation, flow.inputs[0].rank)
    made = flow.graph.make(flow.name, flow.output_shapes[0][axis] or 0)
    if reason := mixes_channels(getattr(flow.operation, "activation", None)):
        flow.graph.pin(made, reason)
    return Routed([(made, axis)], {"in": flow.read(axis), "out": made})


def _grouped(flow: Flow) -> Routed:
    """A grouped convolution: inputs and outputs of one conv group are one group of channels.

    Or, for equal counts in every conv group, the k-th inputs of all of them are one, and so are the k-th outputs; not
    where a conv group has a single input, which could never go.
    """
    routed, groups = weighted(flow), flow.operation.groups
    read, made = routed.sides["in"], routed.sides["out"]
    if read is None or made is None:
        flow.graph.pin(
            routed.results[0][0], f"{flow.name} is a grouped convolution over another axis than its channels'"
        )
        return Routed(routed.results, {"out": made})
    inputs, outputs = read.reshape(groups, -1), made.reshape(groups, -1)
    if flow.grouped == "equal" and inputs.shape[1] > 1:
        for members in (inputs, outputs):
            flow.graph.tie(np.tile(members[0], groups), members.ravel())
        return Routed(routed.results, {"group_in": inputs[0], "out": made})
    members = np.concatenate([inputs, outputs], axis=1)
    flow.graph.tie(np.repeat(members[:, 0], members.shape[1]), members.ravel())
    return Routed(routed.results, {"out": made})


def _depthwise(flow: Flow) -> Routed:
    """Each input channel is filtered alone, into `depth_multiplier` channels that carry its id."""
    axis = channel_axis(flow.operation, flow.inputs[0].rank)
    read = flow.read(axis)
    if read is None:
        return fresh(flow, "filters another axis than the one that its channels lie along")
    if reason := mixes_channels(flow.operation.activation):
        flow.graph.pin(read, reason)
    out = _repeat(read, flow.operation.depth_multiplier)
    return Routed([(out, axis)], {"in": read, "out": out})


def _repeat(ids: Ids, times: int) -> Ids:
    return ids if times == 1 else np.repeat(ids, times)


def _separable(flow: Flow) -> Routed:
    routed = weighted(flow)
    read = routed.sides["in"]
    mid = None if read is None else _repeat(read, flow.operation.depth_multiplier)
    return replace(routed, sides={**routed.sides, "mid": mid})


def _normalized(flow: Flow) -> Routed:
    """BatchNormalization: one scale, shift, mean and variance per channel."""
    signal = flow.inputs[0]
    read = flow.read(flow.operation.axis % signal.rank)
    return Routed([(signal.ids, signal.axis)], {"in": read}, mode="strict" if read is None else None)


def _normalized_in_groups(flow: Flow) -> Routed:
    """GroupNormalization: the channels of a group are normalized together, so that they live and die together."""
    signal, groups = flow.inputs[0], flow.operation.groups
    read = flow.read(flow.operation.axis % signal.rank)
    if read is None:
        return Routed([(signal.ids, signal.axis)], mode="strict")
    if groups == 1:
        return _normalized_together(flow)
    members = read.reshape(groups, -1)
    flow.graph.tie(np.repeat(members[:, 0], members.shape[1]), read)
    return Routed([(signal.ids, signal.axis)], {"in": read})


def _normalized_together(flow: Flow) -> Routed:
    """LayerNormalization: zeros count among the channels, so that it works at full width.

    Its scale and shift are cut off with what is dead, so that this is zero behind it too.
    """
    signal, axes = flow.inputs[0], _axes(flow)
    if signal.axis not in axes:
        return Routed([(signal.ids, signal.axis)], mode="strict")
    routed = together(flow, "normalizes over channels")
    cut = len(axes) == 1 and getattr(flow.operation, "gamma", getattr(flow.operation, "scale", None)) is not None
    return replace(routed, sides={"in": signal.ids}, zero=cut) if routed.padded else routed


def _axes(flow: Flow) -> set[int]:
    axis, rank = flow.operation.axis, flow.inputs[0].rank
    return {a % rank for a in ([axis] if isinstance(axis, int) else axis)}


def _scaled_to_unit(flow: Flow) -> Routed:
    """RMSNormalization: with the mean over fewer channels its epsilon and scale change by a factor."""
    signal = flow.inputs[0]
    if _axes(flow) != {signal.axis} or not signal.zeroed:
        return _normalized_together(flow)
    return replace(same(flow), mode="strict")


def _over_several_axes(operation: Any) -> Rule | None:
    """A normalization whose weights have several axes."""
    return None if isinstance(operation.axis, int) or len(operation.axis) == 1 else Rule(_normalized_together, "strict")


def _narrow_mean(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    return {**config, "epsilon": config["epsilon"] * (result.shape[result.axis] or 0) / max(len(kept), 1)}


def _rescale_mean(width: int, kept: int) -> dict[str, float]:
    """With S the sum of squares, x / sqrt(S / n + e) = sqrt(n / k) x / sqrt(S / k + e n / k)."""
    return {"scale": math.sqrt(width / max(kept, 1))}


def _narrow_norm_groups(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    width = result.shape[result.axis] or 0
    groups = width if config["groups"] == -1 else config["groups"]
    return {**config, "groups": max(1, len(kept) * groups // max(width, 1))}


def _activated(flow: Flow) -> Routed:
    reason = mixes_channels(flow.operation.activation)
    return together(flow, reason) if reason else same(flow)


def _softmaxed(flow: Flow) -> Routed:
    signal, axis = flow.inputs[0], flow.operation.axis
    axes = {a % signal.rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])}
    if signal.axis in axes:
        return together(flow, "mixes channels (softmax)")
    # What a softmax makes of a constant depends on how many there are.
    return same(flow) if all(a and signal.shape[a] for a in axes) else replace(same(flow), mode="strict")


def _rescaled(flow: Flow) -> Routed:
    """By numbers that may differ along other axes than that of the channels."""
    signal, operation = flow.inputs[0], flow.operation
    shapes = [np.shape(operation.scale), np.shape(operation.offset)]
    from_end = signal.rank - signal.axis
    spatial = any(math.prod(shape) > (shape[-from_end] if len(shape) >= from_end else 1) for shape in shapes)
    return replace(same(flow), mode="strict" if spatial else None)


def _pooled_globally(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    axis = channel_axis(flow.operation, signal.rank)
    if signal.axis != axis:
        return fresh(flow, "pools the axis that its channels lie along")
    return Routed([(signal.ids, axis if flow.operation.keepdims else 1)])


def spatial(flow: Flow) -> Routed:
    """Pooling, padding, cropping, upsampling: every channel alone, over the other axes."""
    signal = flow.inputs[0]
    if signal.axis != channel_axis(flow.operation, signal.rank):
        return fresh(flow, "works along the axis that its channels lie along")
    return same(flow)


def _flattened(flow: Flow) -> Routed:
    """Flatten moves channels last before it flattens, in both data formats."""
    signal = flow.inputs[0]
    if signal.rank > 2 and channel_axis(flow.operation, signal.rank) == 1:
        shape = (signal.shape[0], *signal.shape[2:], signal.shape[1])
        axis = signal.rank - 1 if signal.axis == 1 else signal.axis - 1
        flow = replace(flow, inputs=[Signal(signal.ids, axis, shape)])
    return reshaped(flow)


def _permuted(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    return Routed([(signal.ids, [0, *flow.operation.dims].index(signal.axis))])


def _vector_repeated(flow: Flow) -> Routed:
    """RepeatVector: a new axis in front of the features."""
    return Routed([(flow.inputs[0].ids, 2)])


# Configs that hold more than a width.


def _narrow_groups(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    width = config["filters"] // config["groups"]
    alive, count = np.unique(kept // width, return_counts=True)
    groups = len(kept) // width if np.all(count % width == 0) else len(alive)  # copies of whole groups are groups
    return {**config, "groups": groups, "filters": len(kept)}


def _narrow_projection(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    return {**config, "projection_dim": len(kept)}


def _narrow_target(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    target = list(config["target_shape"])
    if target[result.axis - 1] != -1:
        target[result.axis - 1] = len(kept)
    return {**config, "target_shape": tuple(target)}


def _narrow_constants(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    """Rescaling's scale and offset may hold one number per channel; it reshapes a scale where channels come first."""
    from_end = len(result.shape) - result.axis
    first = keras.config.image_data_format() == "channels_first"

    def narrowed(value: Any, behind: int = 0) -> Any:
        array = np.asarray(keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value)
        if array.ndim:
            array = array.reshape(*array.shape, *[1] * (behind - array.ndim))
        if array.ndim < from_end or array.shape[-from_end] == 1:
            return value
        return np.take(array, kept, axis=-from_end).tolist()

    return {**config, "scale": narrowed(config["scale"], 3 if first else 0), "offset": narrowed(config["offset"])}


# The table.

SAME = Rule(same, "uniform")
SPATIAL = Rule(spatial, "uniform")
MERGE = Rule(merged, "merge")
DENSE = Rule(
    weighted, "make", {"kernel": "in out", "bias": "out"}, {"kernel": "outputs"}, width="units", zero=zero_at_zero
)


def _convolution(kernel: str, positions: str = "outputs") -> Rule:
    weights = {"kernel": kernel, "bias": "out"}
    return Rule(weighted, "make", weights, {"kernel": positions}, width="filters", zero=zero_at_zero)


def _grouped_variant(kernel: str) -> Callable[[Any], Rule | None]:
    weights = {"kernel": kernel, "bias": "out"}
    grouped = Rule(_grouped, "strict", weights, {"kernel": "outputs"}, narrow=_narrow_groups, zero=zero_at_zero)
    return lambda operation: grouped if operation.groups > 1 else None


def _conv(space: str) -> Rule:
    return replace(_convolution(f"{space} in out"), variant=_grouped_variant(f"{space} group_in out"))


def _depthwise_conv(space: str) -> Rule:
    weights = {"kernel": f"{space} in multiplier", "bias": "out"}
    return Rule(_depthwise, "strict", weights, multiplies={"kernel": "outputs"}, zero=zero_at_zero)


def _separable_conv(space: str, ones: str) -> Rule:
    kernels = {"depthwise_kernel": f"{space} in multiplier", "pointwise_kernel": f"{ones} mid out", "bias": "out"}
    return Rule(
        _separable,
        "make",
        kernels,
        multiplies={"depthwise_kernel": "outputs", "pointwise_kernel": "outputs"},
        width="filters",
        zero=zero_at_zero,
    )


_NORMALIZED_WEIGHTS = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), "in")
_SCALE_AND_SHIFT = dict.fromkeys(("gamma", "beta"), "in")
_RENORM_WEIGHTS = dict.fromkeys(("moving_stddev", "renorm_mean", "renorm_stddev"), "in")


def _scaled_sum(flow: Flow) -> Routed:
    return merged(flow) if len(flow.inputs) == 2 else fresh(flow, "adds something that we do not know")


ROWS: dict[type, Rule] = {
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
    layers.BatchNormalization: Rule(
        _normalized, "uniform", {**_NORMALIZED_WEIGHTS, **_RENORM_WEIGHTS}, scale="gamma", masks=("mask",)
    ),
    LayerScale: Rule(same, "uniform", {"gamma": "in"}, narrow=_narrow_projection),
    CustomScaleLayer: Rule(_scaled_sum, "merge"),
    layers.LayerNormalization: Rule(_normalized_together, "strict", _SCALE_AND_SHIFT, variant=_over_several_axes),
    layers.GroupNormalization: Rule(
        _normalized_in_groups, "uniform", _SCALE_AND_SHIFT, narrow=_narrow_norm_groups, mixes=True
    ),
    layers.RMSNormalization: Rule(
        _scaled_to_unit,
        "strict",
        {"scale": "in"},
        rescale=_rescale_mean,
        narrow=_narrow_mean,
        variant=_over_several_axes,
        mixes=True,
    ),
    layers.Masking: Rule(partial(together, reason="finds out from all of them which steps count"), "strict"),
    layers.Resizing: replace(SPATIAL, mode="strict"),
    **dict.fromkeys(
        [layers.CategoryEncoding, layers.Discretization],
        Rule(partial(fresh, reason="makes categories of numbers"), "strict"),
    ),
    layers.CenterCrop: replace(SPATIAL, mode="strict"),
    layers.PReLU: Rule(same, "strict", {"alpha": "*"}),
    layers.Activation: Rule(_activated, "uniform"),
    layers.Softmax: Rule(_softmaxed, "uniform"),
    layers.Concatenate: Rule(joined, "join"),
    layers.Flatten: Rule(_flattened, "uniform"),
    layers.Reshape: Rule(reshaped, "uniform", narrow=_narrow_target),
    layers.Permute: Rule(_permuted, "uniform"),
    layers.RepeatVector: Rule(_vector_repeated, "uniform"),
    layers.Rescaling: Rule(_rescaled, "uniform", narrow=_narrow_constants),
    layers.Normalization: Rule(
        partial(together, reason="holds a mean and variance per channel in its config"), "strict"
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
            layers.AdaptiveAveragePooling1D,
            layers.AdaptiveAveragePooling2D,
            layers.AdaptiveAveragePooling3D,
            layers.AdaptiveMaxPooling1D,
            layers.AdaptiveMaxPooling2D,
            layers.AdaptiveMaxPooling3D,
        ],
        SPATIAL,
    ),
    # What they do while a model trains, they do to each channel alone; in inference to none.
    **dict.fromkeys(
        [
            layers.RandomBrightness,
            layers.RandomContrast,
            layers.RandomCrop,
            layers.RandomElasticTransform,
            layers.RandomErasing,
            layers.RandomFlip,
            layers.RandomGaussianBlur,
            layers.RandomInvert,
            layers.RandomPerspective,
            layers.RandomPosterization,
            layers.RandomRotation,
            layers.RandomSharpness,
            layers.RandomShear,
            layers.RandomTranslation,
            layers.RandomZoom,
        ],
        replace(SPATIAL, mode="strict"),
    ),
    **dict.fromkeys(
        [
            layers.AugMix,
            layers.AutoContrast,
            layers.ContrastLimitedAdaptiveHistogramEqualization,
            layers.RandAugment,
            layers.RandomColorDegeneration,
            layers.RandomColorJitter,
            layers.RandomGrayscale,
            layers.RandomHue,
            layers.RandomSaturation,
            layers.Solarization,
        ],
        Rule(partial(together, reason="takes them for the colours of an image"), "strict"),
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
        Rule(_pooled_globally, "uniform", masks=("mask",)),
    ),
    **dict.fromkeys([layers.Add, layers.Subtract, layers.Average, layers.Maximum, layers.Minimum], MERGE),
    layers.Multiply: replace(MERGE, absorbs=True),
}

TABLE.update(ROWS)
