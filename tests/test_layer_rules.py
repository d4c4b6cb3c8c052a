"""Conformance of the whole table of layer rules: every row around one instance of its class, in a tiny network.

    image(3) -- before(5) -- trunk(6) -- the row -- flat -- last(3)

A row without an entry in ENTRIES below fails: a new row is tested by existing.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_exact
from functions import COMBINATIONS, ELEMENTWISE, REDUCING
from keras import layers, ops
from keras.src.applications.convnext import LayerScale
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from keras.src.ops import core, image, nn
from keras.src.ops import numpy as numeric

import keras_morph as km
from keras_morph.layers.rules import TABLE

pytestmark = pytest.mark.usefixtures("quick_initializers")

# Spatial sizes, then channels, no two the same: what confuses two axes fails.
SHAPES = {0: (6,), 1: (8, 6), 2: (5, 4, 6), 3: (4, 3, 5, 6)}
# The first on every backend; how a row is followed does not depend on it.
KINDS = ("half", "one_layer_dead", "everything_dead")
PER_CHANNEL = np.linspace(-1, 2, 6, dtype="float32")
PER_PLACE = np.linspace(-1, 2, 120, dtype="float32").reshape(5, 4, 6)


UNLESS_STEADY = "unless steady"  # an operand is filled up if its dead channels are constants, and pinned if not


class Entry(NamedTuple):
    """A row's instance: a layer's arguments or a function of the trunk, and whether the trunk has to be pinned."""

    kind: type
    rank: int
    call: dict | Callable
    pins: bool | str = False


def conv(x, width, size=1, **options):
    rank = len(x.shape) - 2
    if rank == 0:
        return layers.Dense(width, **options)(x)
    return getattr(layers, f"Conv{rank}D")(width, size, padding="same", **options)(x)


def branch(x):
    return conv(conv(x, 4, activation="tanh"), x.shape[-1])


def pooled(x):
    return layers.GlobalAveragePooling2D(keepdims=True)(x)


def near(x):
    """Whole numbers from 0 to 3."""
    return ops.cast(ops.clip(2 + 2 * ops.tanh(x), 0, 3), "int32")


def attention_pooling(x):
    """As in many notebooks: a softmax over the steps, repeated for each channel."""
    weights = layers.Softmax()(layers.Flatten()(layers.Dense(1, activation="tanh")(x)))
    return layers.Multiply()([x, layers.Permute((2, 1))(layers.RepeatVector(x.shape[-1])(weights))])


def each(kinds, rank, call):
    return [Entry(kind, rank, call) for kind in kinds]


def spatial(name, call, ranks=(1, 2, 3)):
    return [Entry(getattr(layers, name.format(rank)), rank, call) for rank in ranks]


CONVOLUTIONS = [
    *spatial("Conv{}D", {"filters": 4, "kernel_size": 3}),
    *spatial("Conv{}D", {"filters": 4, "kernel_size": 2, "padding": "same", "groups": 2, "activation": "relu"}),
    *spatial("Conv{}D", {"filters": 6, "kernel_size": 2, "padding": "same", "groups": 6, "use_bias": False}),
    Entry(layers.Conv1D, 1, {"filters": 4, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}),
    Entry(layers.Conv2D, 2, {"filters": 4, "kernel_size": (1, 3), "strides": (2, 1), "activation": "softmax"}),
    *spatial("Conv{}DTranspose", {"filters": 4, "kernel_size": 2, "strides": 2, "activation": "tanh"}),
    *spatial("DepthwiseConv{}D", {"kernel_size": 3, "padding": "same", "activation": "relu"}, ranks=(1, 2)),
    *spatial("DepthwiseConv{}D", {"kernel_size": 2, "depth_multiplier": 2, "use_bias": False}, ranks=(1, 2)),
    Entry(layers.DepthwiseConv2D, 2, {"kernel_size": 2, "activation": "softmax"}, pins=True),
    *spatial("SeparableConv{}D", {"filters": 4, "kernel_size": 3, "padding": "same"}, ranks=(1, 2)),
    *spatial("SeparableConv{}D", {"filters": 4, "kernel_size": 2, "depth_multiplier": 2}, ranks=(1, 2)),
]
DENSE_AND_RECURRENT = [
    *[Entry(layers.Dense, rank, {"units": 4, "activation": "relu"}) for rank in (0, 1, 2)],
    Entry(layers.LSTM, 1, {"units": 4}),
    Entry(layers.LSTM, 1, {"units": 4, "return_sequences": True, "go_backwards": True}),
    Entry(layers.GRU, 1, {"units": 4}),
    Entry(layers.GRU, 1, {"units": 4, "reset_after": False, "return_sequences": True}),
    Entry(layers.SimpleRNN, 1, {"units": 4, "use_bias": False}),
    Entry(layers.ConvLSTM1D, 2, {"filters": 4, "kernel_size": 3, "padding": "same"}),
    Entry(layers.ConvLSTM2D, 3, {"filters": 4, "kernel_size": 3, "padding": "same", "return_sequences": True}),
    Entry(layers.ConvLSTM3D, 3, lambda x: layers.ConvLSTM3D(4, 2, padding="same")(ops.expand_dims(x, 1))),
    Entry(layers.ConvLSTM1D, 2, {"filters": 4, "kernel_size": 3, "strides": 2}, pins=UNLESS_STEADY),
    # Looking up channels makes positions of them.
    Entry(
        layers.Embedding, 0, lambda x: layers.Embedding(7, 4)(ops.cast(ops.clip(9 * ops.abs(x), 0, 6), "int32")), True
    ),
]


def attention(kind, call, *arguments, pins=False, **options):
    return Entry(kind, 1, lambda x: call(kind(*arguments, **options), x), pins)


def to_itself(layer, x):
    return layer(x, x)


SEQUENCES = [
    Entry(layers.TimeDistributed, 1, {"layer": layers.Dense(4, activation="relu")}),
    Entry(layers.TimeDistributed, 2, {"layer": layers.Conv1D(4, 3, padding="same")}),
    Entry(layers.TimeDistributed, 3, {"layer": layers.Conv2D(4, 2, groups=2)}),
    Entry(layers.TimeDistributed, 3, {"layer": layers.DepthwiseConv2D(2, depth_multiplier=2)}),
    Entry(layers.TimeDistributed, 2, {"layer": layers.BatchNormalization()}),
    Entry(layers.TimeDistributed, 2, {"layer": layers.GlobalAveragePooling1D()}),
    Entry(layers.TimeDistributed, 3, {"layer": layers.Flatten()}),
    Entry(layers.TimeDistributed, 2, {"layer": layers.Reshape((2, 2, 6))}),
    Entry(layers.TimeDistributed, 2, {"layer": layers.GRU(4)}),
    Entry(layers.TimeDistributed, 2, {"layer": layers.LayerNormalization()}, pins=True),
    Entry(layers.TimeDistributed, 2, {"layer": layers.PReLU()}, pins=UNLESS_STEADY),
    Entry(
        layers.TimeDistributed,
        1,
        lambda x: layers.TimeDistributed(layers.Dense(4))(ops.swapaxes(x, 1, 2)),
        UNLESS_STEADY,
    ),
    Entry(layers.Bidirectional, 1, {"layer": layers.LSTM(4)}),
    Entry(layers.Bidirectional, 1, {"layer": layers.GRU(4, return_sequences=True), "merge_mode": "mul"}),
    Entry(layers.Bidirectional, 1, lambda x: ops.concatenate(layers.Bidirectional(layers.GRU(4), None)(x), axis=-1)),
    Entry(layers.Bidirectional, 1, lambda x: layers.Bidirectional(layers.LSTM(4, return_state=True))(x)[0]),
    Entry(
        layers.Bidirectional,
        1,
        {"layer": layers.LSTM(4), "backward_layer": layers.SimpleRNN(4, go_backwards=True)},
        pins=UNLESS_STEADY,
    ),
    attention(layers.MultiHeadAttention, to_itself, 3, 2),
    attention(layers.MultiHeadAttention, to_itself, 3, 2, use_bias=False, output_shape=5),
    attention(layers.MultiHeadAttention, lambda attend, x: attend(x, branch(x)), 4, 2, use_gate=True),
    attention(layers.MultiHeadAttention, lambda attend, x: attend(branch(x), x[:, 1:], branch(x)[:, 1:]), 2, 2),
    attention(layers.MultiHeadAttention, lambda attend, x: attend(value=x, query=x, use_causal_mask=True), 2, 2),
    attention(layers.MultiHeadAttention, lambda attend, x: attend(query=x, value=branch(x)), 2, 2),
    attention(
        layers.MultiHeadAttention, lambda attend, x: attend(x, x, return_attention_scores=True)[0], 2, 2, pins=False
    ),
    attention(layers.MultiHeadAttention, to_itself, 3, 2, output_shape=(2, 3), pins=True),
    attention(layers.GroupQueryAttention, lambda attend, x: attend(branch(x), x), 2, 6, 3, pins=True),
    attention(layers.GroupQueryAttention, to_itself, 2, 4, 2, use_gate=True, pins=True),
    attention(layers.Attention, lambda attend, x: attend([branch(x), x]), use_scale=True),
    attention(layers.Attention, lambda attend, x: attend([branch(x), x, branch(x)])),
    attention(layers.AdditiveAttention, lambda attend, x: attend([branch(x), x, branch(x)])),
    attention(layers.EinsumDense, lambda dense, x: dense(x), "abc,cd->abd", (8, 4), bias_axes="d", activation="relu"),
    attention(layers.EinsumDense, lambda dense, x: dense(x), "...x,yx->...y", 4),
    attention(layers.EinsumDense, lambda dense, x: dense(x), "abc,cd->abd", (8, 4), bias_axes="bd", pins=UNLESS_STEADY),
    attention(layers.EinsumDense, lambda dense, x: dense(x), "abc,cde->abde", (8, 2, 4), pins=UNLESS_STEADY),
    attention(layers.EinsumDense, lambda dense, x: dense(x), "abc,bd->adc", (3, 6), pins=UNLESS_STEADY),
]
NORMALIZATIONS = [
    *[Entry(layers.BatchNormalization, rank, {}) for rank in SHAPES],
    Entry(layers.BatchNormalization, 2, {"scale": False}),
    Entry(layers.BatchNormalization, 2, {"center": False}),
    Entry(layers.BatchNormalization, 2, {"renorm": True}),
    Entry(layers.BatchNormalization, 2, {"axis": 1}, pins=True),
    Entry(LayerScale, 2, lambda x: x + LayerScale(0.1, 6)(branch(x))),
    Entry(CustomScaleLayer, 2, lambda x: CustomScaleLayer(0.3)([x, branch(x)])),
    Entry(CustomScaleLayer, 2, lambda x: CustomScaleLayer(0.3)([branch(x), x])),
    # What they are given is zero where it is dead, as the trunk has no activation; behind a sigmoid it is one half.
    Entry(layers.LayerNormalization, 2, {}),
    Entry(layers.LayerNormalization, 2, {"axis": [1, 2, 3]}),
    # On PyTorch, Keras 3.15 takes the axis for the last one.
    *each([] if keras.backend.backend() == "torch" else [layers.LayerNormalization], 2, {"axis": 1}),
    Entry(layers.LayerNormalization, 2, lambda x: layers.LayerNormalization()(ops.sigmoid(x))),
    Entry(layers.LayerNormalization, 2, lambda x: layers.LayerNormalization()(ops.fmax(x, 0.7))),
    # An alive channel that is broadcast, or mixed in with weights of its own, is not zero where others are dead.
    Entry(layers.LayerNormalization, 2, lambda x: layers.LayerNormalization()(x - conv(x, 1)), pins=True),
    Entry(
        layers.LayerNormalization,
        1,
        lambda x: layers.LayerNormalization()(ops.matmul(ops.softmax(conv(x, 8)), ops.sigmoid(x))),
        pins=True,
    ),
    Entry(layers.RMSNormalization, 2, {}),
    Entry(layers.RMSNormalization, 2, {"axis": [1, 2, 3]}, pins=UNLESS_STEADY),
    Entry(layers.RMSNormalization, 2, lambda x: layers.RMSNormalization()(ops.sigmoid(x))),
    *[Entry(layers.GroupNormalization, 2, {"groups": groups, "epsilon": 0.1}) for groups in (-1, 6, 3, 2, 1)],
    Entry(layers.GroupNormalization, 2, {"groups": 3, "scale": False, "center": False}),
    Entry(layers.GroupNormalization, 2, lambda x: x + layers.GroupNormalization(3)(branch(x))),
    Entry(layers.GroupNormalization, 2, lambda x: layers.GroupNormalization(3)(ops.sigmoid(x))),
    Entry(layers.GroupNormalization, 2, lambda x: layers.GroupNormalization(1)(ops.sigmoid(x))),
    Entry(layers.GroupNormalization, 2, {"groups": 1, "axis": 1}, pins=True),
    Entry(layers.UnitNormalization, 2, {}),
    Entry(layers.UnitNormalization, 2, lambda x: layers.UnitNormalization()(ops.sigmoid(x))),
    Entry(layers.UnitNormalization, 2, lambda x: layers.UnitNormalization(axis=1)(ops.sigmoid(x))),
    Entry(nn.Normalize, 2, lambda x: ops.normalize(x, axis=-1)),
    Entry(nn.Normalize, 2, lambda x: ops.normalize(ops.exp(x), axis=-1)),
    Entry(nn.Moments, 2, lambda x: ops.moments(x, (1, 2), keepdims=True)[1] + x),
    Entry(nn.Moments, 2, lambda x: ops.subtract(*ops.moments(x, (1,)))),
    Entry(nn.Moments, 2, lambda x: ops.moments(x, (3,), keepdims=True)[0], pins=UNLESS_STEADY),
    Entry(layers.Masking, 1, {}, pins=UNLESS_STEADY),
    Entry(layers.SpectralNormalization, 1, {"layer": layers.Dense(4)}),
    Entry(layers.SpectralNormalization, 2, {"layer": layers.Conv2D(4, 3, padding="same")}),
    Entry(
        layers.SpectralNormalization,
        2,
        lambda x: layers.SpectralNormalization(layers.Conv2DTranspose(4, 3))(x),
        pins=UNLESS_STEADY,
    ),
    Entry(layers.Normalization, 2, {"mean": PER_CHANNEL, "variance": PER_CHANNEL + 2}, pins=UNLESS_STEADY),
]
PLAIN_LAYERS = [
    Entry(layers.PReLU, 2, {}),
    Entry(layers.PReLU, 2, {"shared_axes": [1, 2]}),
    Entry(layers.Activation, 2, {"activation": "relu"}),
    Entry(layers.Activation, 2, {"activation": "softmax"}, pins=UNLESS_STEADY),
    Entry(layers.Activation, 2, {"activation": "sparsemax"}, pins=UNLESS_STEADY),
    Entry(layers.Softmax, 2, {}, pins=UNLESS_STEADY),
    Entry(layers.Softmax, 2, {"axis": 1}),
    Entry(layers.Softmax, 2, {"axis": [1, 2]}),
    Entry(layers.ReLU, 2, {"max_value": 1.5, "negative_slope": 0.1, "threshold": 0.2}),
    Entry(layers.LeakyReLU, 2, {}),
    Entry(layers.ELU, 2, {}),
    Entry(layers.Identity, 2, {}),
    Entry(layers.ActivityRegularization, 2, {"l2": 0.1}),
    Entry(layers.Dropout, 2, {"rate": 0.5}),
    *spatial("SpatialDropout{}D", {"rate": 0.5}),
    Entry(layers.AlphaDropout, 2, {"rate": 0.5}),
    Entry(layers.GaussianDropout, 2, {"rate": 0.5}),
    Entry(layers.GaussianNoise, 2, {"stddev": 0.5}),
    Entry(layers.Rescaling, 2, {"scale": 0.5, "offset": 0.25}),
    Entry(layers.Rescaling, 2, {"scale": PER_CHANNEL.tolist(), "offset": PER_CHANNEL[::-1].tolist()}),
    Entry(layers.Rescaling, 0, {"scale": 2.0, "offset": PER_CHANNEL.tolist()}),
    *spatial("MaxPooling{}D", {"pool_size": 2}),
    *spatial("AveragePooling{}D", {"pool_size": 2, "strides": 1, "padding": "same"}),
    *spatial("Cropping{}D", {"cropping": 1}, ranks=(1, 2)),
    Entry(layers.Cropping3D, 3, {"cropping": ((1, 1), (1, 0), (0, 2))}),
    *spatial("UpSampling{}D", {"size": 2}),
    *spatial("ZeroPadding{}D", {"padding": 1}),
    *spatial("GlobalAveragePooling{}D", {}),
    *spatial("GlobalMaxPooling{}D", {"keepdims": True}),
    *spatial("AdaptiveAveragePooling{}D", {"output_size": 2}),
    *spatial("AdaptiveMaxPooling{}D", {"output_size": 2}),
    Entry(layers.GlobalMaxPooling1D, 1, {"data_format": "channels_first"}, pins=UNLESS_STEADY),
    Entry(layers.Resizing, 2, {"height": 3, "width": 7}),
    Entry(
        layers.Discretization, 0, lambda x: ops.cast(layers.Discretization([-0.3, 0.3])(x), "float32"), UNLESS_STEADY
    ),
    Entry(layers.CategoryEncoding, 0, lambda x: layers.CategoryEncoding(4, output_mode="multi_hot")(near(x))),
    Entry(layers.CenterCrop, 2, {"height": 3, "width": 2}),
    *[
        Entry(kind, 2, call)
        for kind, call in (
            (layers.RandomBrightness, {"factor": 0.1}),
            (layers.RandomContrast, {"factor": 0.1}),
            (layers.RandomCrop, {"height": 5, "width": 4}),  # Keras 3.15 crops nothing in inference
            (layers.RandomElasticTransform, {}),
            (layers.RandomErasing, {}),
            (layers.RandomFlip, {}),
            (layers.RandomGaussianBlur, {}),
            (layers.RandomInvert, {}),
            (layers.RandomPerspective, {}),
            (layers.RandomPosterization, {"factor": 4}),
            (layers.RandomRotation, {"factor": 0.1}),
            (layers.RandomSharpness, {"factor": 0.1}),
            (layers.RandomShear, {}),
            (layers.RandomTranslation, {"height_factor": 0.1, "width_factor": 0.1}),
            (layers.RandomZoom, {"height_factor": 0.1}),
        )
    ],
    *[
        Entry(kind, 2, lambda x, kind=kind, options=options: kind(**options)(255 * conv(x, 3, activation="sigmoid")))
        for kind, options in (
            (layers.AugMix, {}),
            (layers.AutoContrast, {}),
            (layers.ContrastLimitedAdaptiveHistogramEqualization, {"tile_grid_size": (2, 2)}),
            (layers.RandAugment, {}),
            (layers.RandomColorDegeneration, {"factor": 0.1}),
            (layers.RandomColorJitter, {"brightness_factor": 0.1}),
            (layers.RandomGrayscale, {}),
            (layers.RandomHue, {"factor": 0.1}),
            (layers.RandomSaturation, {"factor": 0.1}),
            (layers.Solarization, {}),
        )
    ],
]
SHAPING_LAYERS = [
    *[Entry(layers.Flatten, rank, {}) for rank in SHAPES],
    Entry(layers.Reshape, 2, {"target_shape": (20, 6)}),
    Entry(layers.Reshape, 2, {"target_shape": (5, 24)}),
    Entry(layers.Reshape, 2, {"target_shape": (-1,)}),
    Entry(layers.Reshape, 0, {"target_shape": (1, 1, 6)}),
    Entry(layers.Reshape, 0, {"target_shape": (2, 3)}),
    Entry(layers.Reshape, 2, {"target_shape": (4, 5, -1)}),
    Entry(layers.Permute, 2, {"dims": (2, 1, 3)}),
    Entry(layers.Permute, 2, {"dims": (3, 1, 2)}),
    Entry(layers.Permute, 2, lambda x: conv(layers.Permute((3, 1, 2))(x), 3), pins=True),
    Entry(layers.RepeatVector, 0, {"n": 3}),
]
MERGES = [layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum]
MERGING_LAYERS = [
    *[Entry(kind, 2, lambda x, kind=kind: kind()([x, branch(x)])) for kind in MERGES],
    *[Entry(kind, 1, lambda x, kind=kind: kind()([branch(x), x])) for kind in MERGES],
    *[Entry(kind, 2, lambda x, kind=kind: kind()([x, pooled(branch(x))])) for kind in MERGES],
    *[Entry(kind, 2, lambda x, kind=kind: kind()([pooled(x), branch(x)])) for kind in MERGES],
    *[Entry(kind, 2, lambda x, kind=kind: kind()([x, conv(x, 1)])) for kind in MERGES],
    *[
        Entry(kind, 0, lambda x, kind=kind: kind()([branch(x), x, branch(x)]))
        for kind in MERGES
        if kind is not layers.Subtract
    ],
    Entry(layers.Concatenate, 2, lambda x: layers.Concatenate()([x, conv(x, 4), x])),
    Entry(layers.Concatenate, 2, lambda x: layers.Concatenate(axis=1)([x, branch(x)])),
    # Operands of fewer axes, and channels along different axes.
    *[Entry(kind, 2, lambda x, kind=kind: kind()([x, layers.GlobalMaxPooling2D()(branch(x))])) for kind in MERGES],
    Entry(layers.Multiply, 2, lambda x: layers.Multiply()([layers.GlobalMaxPooling2D()(x), branch(x)])),
    Entry(layers.Multiply, 1, attention_pooling),
    Entry(
        layers.Add, 1, lambda x: layers.Add()([x, ops.repeat(ops.expand_dims(layers.Flatten()(conv(x, 1)), -1), 6, -1)])
    ),
]
BINARY = [
    entry
    for kind, combine in COMBINATIONS
    for entry in (
        Entry(kind, 2, lambda x, f=combine: f(x, branch(x))),
        Entry(kind, 1, lambda x, f=combine: f(branch(x), x)),
        Entry(kind, 2, lambda x, f=combine: f(x, pooled(branch(x)))),
        Entry(kind, 2, lambda x, f=combine: f(x, 0.7)),
        Entry(kind, 2, lambda x, f=combine: f(x, PER_CHANNEL)),
        Entry(kind, 0, lambda x, f=combine: f(PER_CHANNEL, x)),
        Entry(kind, 2, lambda x, f=combine: f(x, PER_PLACE)),
    )
]
REDUCTIONS = [
    entry
    for kind, reduce in REDUCING
    for entry in (
        Entry(kind, 2, lambda x, f=reduce: f(x, axis=(1, 2))),
        Entry(kind, 2, lambda x, f=reduce: f(x, axis=1, keepdims=True)),
        Entry(kind, 2, lambda x, f=reduce: f(x, axis=-1), pins=UNLESS_STEADY),
    )
]
# PyTorch knows no negative steps.
BACKWARDS = each([] if keras.backend.backend() == "torch" else [numeric.GetItem], 2, lambda x: x[..., ::-1])
PICKS_AND_SHAPES = [
    Entry(numeric.Concatenate, 2, lambda x: ops.concatenate([branch(x), x], axis=-1)),
    Entry(numeric.Concatenate, 2, lambda x: ops.concatenate([branch(x), x], axis=2)),
    Entry(numeric.Stack, 2, lambda x: ops.stack([branch(x), x], axis=1)),
    Entry(numeric.Stack, 2, lambda x: ops.stack([branch(x), x], axis=-1)),
    *each(
        [numeric.GetItem],
        2,
        lambda x: ops.concatenate([x[..., :4], x[..., 1::2], x[..., -2:]], axis=-1),
    ),
    Entry(numeric.GetItem, 2, lambda x: x[:, 1:, ::2]),
    Entry(numeric.GetItem, 2, lambda x: x[:, 1]),
    Entry(numeric.GetItem, 2, lambda x: x[:, None, ..., 2:5]),
    Entry(numeric.GetItem, 2, lambda x: x[:, :, :, 2], pins=UNLESS_STEADY),
    *BACKWARDS,  # the last one, so that the others have the same numbers where it is missing
    Entry(numeric.Take, 2, lambda x: ops.take(x, [5, 0, 0, -2], axis=-1)),
    Entry(numeric.Take, 2, lambda x: ops.take(x, np.array([3, 1]), axis=1)),
    Entry(numeric.Take, 2, lambda x: ops.take(x, 2, axis=-1), pins=UNLESS_STEADY),
    Entry(numeric.Split, 2, lambda x: ops.add(*ops.split(x, 2, axis=-1))),
    Entry(numeric.Split, 2, lambda x: ops.concatenate(ops.split(x, [1, 4], axis=-1)[::-1], axis=-1)),
    Entry(numeric.Split, 2, lambda x: ops.multiply(*ops.split(x, 2, axis=2))),
    Entry(numeric.Flip, 2, lambda x: ops.flip(x, axis=-1)),
    Entry(numeric.Flip, 2, lambda x: ops.flip(x, axis=1)),
    Entry(numeric.Repeat, 2, lambda x: ops.repeat(x, 2, axis=-1)),
    Entry(numeric.Repeat, 2, lambda x: ops.repeat(x, 2, axis=1)),
    Entry(numeric.Transpose, 2, lambda x: ops.transpose(x, (0, 3, 2, 1))),
    Entry(numeric.Moveaxis, 2, lambda x: ops.moveaxis(x, -1, 1)),
    Entry(numeric.Swapaxes, 2, lambda x: ops.swapaxes(x, 1, 3)),
    Entry(numeric.ExpandDims, 2, lambda x: ops.expand_dims(x, 2)),
    Entry(numeric.ExpandDims, 2, lambda x: x * ops.expand_dims(ops.expand_dims(ops.max(branch(x), (1, 2)), 1), 1)),
    Entry(numeric.ExpandDims, 0, lambda x: ops.expand_dims(x, -1)),
    Entry(numeric.Squeeze, 2, lambda x: ops.squeeze(pooled(x), (1, 2))),
    Entry(numeric.Squeeze, 2, lambda x: ops.squeeze(pooled(x), 1)),
    Entry(numeric.Reshape, 2, lambda x: ops.reshape(x, (-1, 20, 6))),
    Entry(numeric.Reshape, 2, lambda x: ops.reshape(x, (-1, 120))),
    Entry(numeric.Reshape, 0, lambda x: ops.reshape(x, (-1, 1, 6))),
    # As ShuffleNet shuffles: reshape, transpose, reshape.
    Entry(
        numeric.Reshape,
        2,
        lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 5, 4, 2, 3)), (0, 1, 2, 4, 3)), (-1, 5, 4, 6)),
    ),
    Entry(numeric.Pad, 2, lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)))),
    Entry(numeric.Pad, 2, lambda x: ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))), pins=False),
    *[Entry(numeric.Roll, 2, lambda x, axis=axis: ops.roll(x, 2, axis)) for axis in (1, -1)],
    Entry(numeric.Roll, 2, lambda x: ops.roll(x, (1, 2), (1, 2))),
    Entry(numeric.Roll, 2, lambda x: ops.roll(x, (1, 2), (1, 3)), pins=UNLESS_STEADY),
    *[Entry(numeric.Tile, 2, lambda x, n=n: ops.tile(x, n)) for n in ((1, 2, 3, 1), (1, 1, 1, 2), [2], [1])],
    Entry(numeric.Tile, 2, lambda x: ops.tile(x, (1, 2, 1, 2)), pins=UNLESS_STEADY),
    *[
        Entry(numeric.Cumsum, 2, lambda x, axis=axis: ops.cumsum(x, axis), UNLESS_STEADY if axis == -1 else False)
        for axis in (1, -1)
    ],
    Entry(
        numeric.TakeAlongAxis,
        2,
        lambda x: ops.take_along_axis(x, ops.argmax(conv(x, 1), axis=1, keepdims=True), axis=1),
    ),
    Entry(numeric.TakeAlongAxis, 2, lambda x: ops.take_along_axis(x, ops.argsort(branch(x), axis=1), axis=1)),
    Entry(numeric.TakeAlongAxis, 2, lambda x: ops.take_along_axis(x, ops.argsort(x, axis=-1), axis=-1), pins=True),
    Entry(numeric.Cumprod, 2, lambda x: ops.cumprod(ops.tanh(x), 1)),
    Entry(numeric.Sort, 2, lambda x: ops.sort(x, axis=1)),
    Entry(nn.Glu, 2, lambda x: ops.glu(x)),
    Entry(nn.Glu, 2, lambda x: keras.activations.glu(x, axis=2)),
    Entry(nn.MaxPool, 2, lambda x: ops.max_pool(x, 2, 2)),
    Entry(nn.AveragePool, 2, lambda x: ops.average_pool(x, 2, 2, padding="same")),
    Entry(image.Resize, 2, lambda x: ops.image.resize(x, (3, 7))),
    Entry(image.PadImages, 2, lambda x: ops.image.pad_images(x, 1, 2, target_height=9, target_width=9)),
    Entry(image.CropImages, 2, lambda x: ops.image.crop_images(x, 1, 1, target_height=3, target_width=2)),
    Entry(nn.DepthToSpace, 2, lambda x: ops.depth_to_space(conv(x, 8), 2)),
    Entry(nn.SpaceToDepth, 2, lambda x: ops.space_to_depth(x[:, :4], 2)),
    Entry(core.Unstack, 2, lambda x: ops.multiply(*ops.unstack(x[:, :2], axis=1))),
    Entry(core.Unstack, 2, lambda x: ops.unstack(x, axis=-1)[0], pins=UNLESS_STEADY),
    Entry(numeric.Where, 2, lambda x: ops.where(x > 0, x, PER_CHANNEL)),
    Entry(numeric.Where, 2, lambda x: ops.where(x > 0, 0.5, branch(x))),
    Entry(numeric.Matmul, 1, lambda x: ops.matmul(ops.transpose(x, (0, 2, 1)), branch(x)), pins=True),
    Entry(numeric.Matmul, 1, lambda x: ops.matmul(x, ops.transpose(branch(x), (0, 2, 1)))),
    Entry(numeric.Matmul, 1, lambda x: ops.matmul(ops.softmax(conv(x, 8)), x)),
    Entry(numeric.Dot, 1, lambda x: ops.dot(x, np.linspace(-1, 1, 24, dtype="float32").reshape(6, 4)), UNLESS_STEADY),
    Entry(numeric.Einsum, 1, lambda x: ops.einsum("bqc,bkc->bqk", x, branch(x))),
    Entry(numeric.Einsum, 1, lambda x: ops.einsum("bqc,bkc->bqk", ops.sigmoid(x), ops.sigmoid(branch(x))), pins=True),
    Entry(numeric.Einsum, 1, lambda x: ops.einsum("bqk,bkc->bqc", ops.softmax(conv(x, 8)), x)),
    Entry(numeric.Sum, 1, lambda x: ops.sum(x * branch(x), axis=-1, keepdims=True)),
    Entry(numeric.Sum, 1, lambda x: ops.sum(ops.sigmoid(x), axis=-1)),
    Entry(layers.Dot, 1, lambda x: layers.Dot(axes=2)([x, branch(x)])),
    Entry(layers.Dot, 0, lambda x: layers.Dot(axes=1, normalize=True)([x, branch(x)])),
    Entry(layers.Dot, 1, lambda x: layers.Dot(axes=1)([x, branch(x)]), pins=True),
    Entry(nn.Softmax, 2, lambda x: ops.softmax(x), pins=UNLESS_STEADY),
    Entry(nn.Softmax, 2, lambda x: ops.softmax(x, axis=1)),
    Entry(nn.LogSoftmax, 2, lambda x: ops.log_softmax(x), pins=UNLESS_STEADY),
    Entry(nn.LogSoftmax, 2, lambda x: ops.log_softmax(x, axis=2)),
]
ENTRIES = [
    *CONVOLUTIONS,
    *DENSE_AND_RECURRENT,
    *SEQUENCES,
    *NORMALIZATIONS,
    *PLAIN_LAYERS,
    *SHAPING_LAYERS,
    *MERGING_LAYERS,
    *[Entry(kind, 2, call) for kind, call in ELEMENTWISE],
    *BINARY,
    *REDUCTIONS,
    *PICKS_AND_SHAPES,
]


def named(entries):
    """`ops.Take-1` is the second entry of that class."""
    names, counts = {}, Counter()
    for entry in entries:
        module = entry.kind.__module__.split(".")[2]
        names[f"{module}.{entry.kind.__name__}-{counts[entry.kind]}"] = entry
        counts[entry.kind] += 1
    return names


BY_NAME = named(ENTRIES)
# Classes that share one rule, and the number of entries that are the same for each of them.
SHARED = [([kind for kind, _ in COMBINATIONS], 7), ([kind for kind, _ in REDUCING], 3), (MERGES, 7)]


def repeated(name):
    """Whether `make test` leaves out an entry: of those above it runs one for each class, and each for some classes."""
    kind, number = BY_NAME[name].kind, int(name.rpartition("-")[2])
    return any(kind in kinds and number < n and number != kinds.index(kind) % n for kinds, n in SHARED)


BACKENDS = ("tensorflow", "jax", "torch")
WITHOUT_WEIGHTS = {
    id(entry)
    for group in (
        *(PLAIN_LAYERS, SHAPING_LAYERS, MERGING_LAYERS, BINARY, REDUCTIONS, PICKS_AND_SHAPES),
        [entry for entry in ENTRIES if entry.kind in dict(ELEMENTWISE)],
    )
    for entry in group
    if entry.kind is not layers.PReLU and entry not in BACKWARDS
}


ORDER = {kind: number for number, kind in enumerate(dict.fromkeys(entry.kind for entry in ENTRIES))}


def case(name, kind):
    """A name and a kind of structure; `make test` has every name at the first one, and a twelfth of them at each other.

    What has no weights takes turns, since its row says the same on every backend: `make test` has a third on each.
    """
    late = KINDS.index(kind)
    number = ORDER[BY_NAME[name].kind] + int(name.rpartition("-")[2])
    elsewhere = id(BY_NAME[name]) in WITHOUT_WEIGHTS and BACKENDS[number % 3] != keras.backend.backend()
    slow = repeated(name) or elsewhere or (late and number % 12 != 3 * late)
    return pytest.param(name, kind, marks=[pytest.mark.once] * bool(late) + [pytest.mark.slow] * bool(slow))


NAMES = [pytest.param(name, marks=[pytest.mark.slow] * repeated(name)) for name in BY_NAME]
CASES = [case(name, kind) for name in BY_NAME for kind in KINDS]


@functools.cache
def build(name, activation=None, behind=None):
    entry = BY_NAME[name]
    image = keras.Input((*SHAPES[entry.rank][:-1], 3))
    x = conv(conv(image, 5, size=3, activation="relu", name="before"), 6, size=3, activation=activation, name="trunk")
    x = behind(x) if behind else x
    x = entry.call(x) if callable(entry.call) else entry.kind(**entry.call)(x)
    return models.randomize(keras.Model(image, layers.Dense(3, name="last")(layers.Flatten(name="flat")(x))), seed=1)


def reasons(graph, name):
    """Why channels of a layer are pinned."""
    made = next(layer.made for layer in graph.layers if layer.name == name)
    return {graph.pinned[group] for group in graph.group_of[made].tolist() if group in graph.pinned}


@pytest.mark.once
def test_every_row_of_the_table_has_an_entry_here():
    missing = [f"{kind.__module__}.{kind.__name__}" for kind in TABLE if kind not in {entry.kind for entry in ENTRIES}]
    assert not missing, f"rows without an entry in {__name__}.ENTRIES: {', '.join(missing)}"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_network_around_the_row_is_rebuilt_exactly(name, kind):
    model = build(name)
    graph = km.trace(model)
    structure = structures.draw(graph, kind, seed=1)
    small = assert_exact(model, structure)
    np.testing.assert_equal(km.ModelSize()(graph, structure), small.count_params())
    np.testing.assert_equal(km.FLOPs()(graph, structure), km.FLOPs()(small))


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_the_row_pins_the_trunk_only_where_it_has_to(name):
    graph = km.trace(build(name))
    assert BY_NAME[name].kind in {type(layer.operation) for layer in graph.layers}
    assert bool(reasons(graph, "trunk")) == (BY_NAME[name].pins is True), reasons(graph, "trunk")
    assert not reasons(graph, "before")


STEADY = [name for name in BY_NAME if BY_NAME[name].pins == UNLESS_STEADY]


def normalized(x):
    """Dead channels are what the normalization makes of zero."""
    return layers.BatchNormalization(name="normalized")(x)


def uneven(x):
    """Dead channels differ by position, or if there is none, by example."""
    first = ops.tanh(x)
    return x + ops.stop_gradient(ops.sum(first, axis=-1, keepdims=True)) if len(x.shape) == 2 else ops.cumsum(x, axis=1)


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kind", ["half", "one_layer_dead"])
@pytest.mark.parametrize("behind", [None, normalized])
@pytest.mark.parametrize("name", STEADY)
def test_where_all_channels_count_dead_ones_are_the_constants_that_they_were(name, behind, kind):
    model = build(name, activation="sigmoid", behind=behind)
    graph = km.trace(model)
    assert not reasons(graph, "trunk")
    small = assert_exact(model, structures.draw(graph, kind, seed=1))
    assert small.count_params() < model.count_params()


@pytest.mark.once
@pytest.mark.parametrize("name", STEADY)
def test_what_differs_by_position_where_it_is_dead_is_pinned_where_all_channels_count(name):
    graph = km.trace(build(name, activation="sigmoid", behind=uneven))
    assert any("dead differ by position there" in reason for reason in reasons(graph, "trunk")), reasons(graph, "trunk")
