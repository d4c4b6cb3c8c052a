"""Random small networks, for Hypothesis: a recipe is data that prints and shrinks well, `build` makes the model.

A network is a stack of blocks; each takes the newest tensor and adds one, and some look back at an older one. An option
is a small whole number that a block reads as it likes. Blocks work in both data formats.
"""

from typing import NamedTuple

import keras
import models
import numpy as np
from functions import COMBINATIONS, ELEMENTWISE, JUMPING, REDUCING
from hypothesis import strategies as st
from keras import layers, ops
from keras.src.applications.convnext import LayerScale
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

# TensorFlow's CPU kernels know no channels_first convolution.
FORMATS = ["channels_last"] if keras.backend.backend() == "tensorflow" else ["channels_last", "channels_first"]


class Block(NamedTuple):
    kind: str
    width: int
    activation: str
    option: int


class Recipe(NamedTuple):
    """`rank` spatial axes of `size`, one or two inputs of these widths, the blocks, the head, and how many outputs."""

    format: str
    rank: int
    size: int
    inputs: tuple[int, ...]
    blocks: tuple[Block, ...]
    head: str
    outputs: int


class Stack:
    """The tensors so far, and shorthands for the layers of one rank and data format."""

    def __init__(self, recipe):
        self.rank = recipe.rank
        self.axis = -1 if recipe.format == "channels_last" else 1
        self.tensors = []

    def layer(self, name, *args, **kwargs):
        return getattr(layers, f"{name}{self.rank}D")(*args, **kwargs)

    def conv(self, x, width, activation=None, size=3, **options):
        options = {"padding": "same", "activation": activation, **options}
        return self.layer("Conv", width, size, **options)(x)

    def normalization(self, **options):
        return layers.BatchNormalization(axis=self.axis, **options)

    def width(self, x):
        return x.shape[self.axis]

    def space(self, x):
        return tuple(x.shape[1:-1] if self.axis == -1 else x.shape[2:])

    def shape(self, space, width):
        """A shape without its batch axis."""
        return (*space, width) if self.axis == -1 else (width, *space)

    def older(self, block):
        return self.tensors[block.option % len(self.tensors)]

    def like(self, x, other):
        """`other` itself if it has the shape of x; else projected, and over space reduced where that differs too."""
        if tuple(other.shape) == tuple(x.shape):
            return other
        if self.space(other) != self.space(x):
            other = self.layer("GlobalAveragePooling", keepdims=True)(other)
        return self.conv(other, self.width(x), size=1)

    def beside(self, x, other):
        """`other` itself if it can be joined with x; else a convolution of x."""
        return other if self.space(other) == self.space(x) else self.conv(x, self.width(x), "tanh")

    def join(self, operands):
        return layers.Concatenate(axis=self.axis)(operands)

    def sequence(self, x):
        """The positions of x as steps, and the way back."""
        places, space = int(np.prod(self.space(x))), self.space(x)
        if self.axis == 1:
            flat = layers.Permute((2, 1))(layers.Reshape((self.width(x), places))(x))
            return flat, lambda y: layers.Reshape((y.shape[-1], *space))(layers.Permute((2, 1))(y))
        return layers.Reshape((places, self.width(x)))(x), lambda y: layers.Reshape((*space, y.shape[-1]))(y)


def conv(stack, x, block):
    options = [{}, {"use_bias": False}, {"padding": "valid"}, {"strides": 2}, {"dilation_rate": 2}][block.option % 5]
    if options.get("padding") == "valid" and min(stack.space(x)) < 3:
        options = {}
    return stack.conv(x, block.width, block.activation, **options)


def normalized(stack, x, block):
    options = [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}][block.option % 4]
    return stack.normalization(**options)(x)


def activated(stack, x, block):
    return [
        layers.Activation(block.activation),
        layers.ReLU(negative_slope=0.1, max_value=2.0),
        layers.LeakyReLU(),
        layers.ELU(),
        layers.PReLU(shared_axes=list(range(1, stack.rank + 1))),
        layers.PReLU(),
        layers.Softmax(stack.axis),
        layers.Activation(ops.relu),
    ][block.option % 8](x)


def conv_bn_act(stack, x, block):
    x = stack.conv(x, block.width, size=3 - 2 * (block.option % 2), use_bias=block.option % 3 == 0)
    return layers.Activation(block.activation)(stack.normalization()(x))


def residual(stack, x, block):
    y = stack.conv(x, block.width, block.activation)
    y = stack.normalization()(stack.conv(y, stack.width(x)))
    return layers.Add()([x, y] if block.option % 2 else [y, x])


def projected_residual(stack, x, block):
    y = stack.conv(x, 3, block.activation, strides=2)
    y = stack.normalization()(stack.conv(y, block.width))
    x = stack.normalization()(stack.conv(x, block.width, size=1, strides=2))
    return layers.Activation(block.activation)(layers.Add()([x, y]))


def padded_residual(stack, x, block):
    y = stack.normalization()(stack.conv(x, block.width, size=1))
    y = stack.conv(stack.layer("ZeroPadding", 1)(y), stack.width(x), padding="valid")
    return layers.Add()([x, y])


MERGES = [layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum]


def merged(stack, x, block):
    older = stack.like(x, stack.older(block))
    branch = stack.conv(stack.conv(x, block.width, block.activation, size=1), stack.width(x), size=1)
    merge = MERGES[block.option % 6]
    operands = [[x, branch], [branch, x], [x, older], [x, branch, older], [older, branch, x]][block.width % 5]
    return merge()(operands[:2] if merge is layers.Subtract else operands)


def joined(stack, x, block):
    older = stack.beside(x, stack.older(block))
    operands = [[x, older], [older, x], [x, older, x]][block.width % 3]
    return ops.concatenate(operands, axis=stack.axis) if block.option % 4 == 3 else stack.join(operands)


def depthwise(stack, x, block):
    options = {"depth_multiplier": 1 + block.option % 2, "padding": "same", "activation": block.activation}
    if stack.rank == 3:
        return stack.conv(x, stack.width(x), groups=stack.width(x))
    return stack.layer("DepthwiseConv", 3, **options)(x)


def separable(stack, x, block):
    if stack.rank == 3:
        return stack.conv(x, block.width, block.activation)
    options = {"depth_multiplier": 1 + block.option % 2, "padding": "same", "activation": block.activation}
    return stack.layer("SeparableConv", block.width, 3, **options)(x)


def grouped(stack, x, block):
    width = stack.width(x)
    groups = next((n for n in (2, 3, 5) if width % n == 0), 1)
    return stack.conv(x, groups * (1 + block.option % 3), block.activation, groups=groups)


def squeeze_excite(stack, x, block):
    channels = stack.width(x)
    if block.option % 2:
        gate = stack.layer("GlobalAveragePooling")(x)
        gate = layers.Dense(block.width, activation=block.activation)(gate)
        gate = layers.Dense(channels, activation="sigmoid")(gate)
        gate = layers.Reshape(stack.shape((1,) * stack.rank, channels))(gate)
    else:
        gate = stack.layer("GlobalMaxPooling", keepdims=True)(x)
        gate = stack.conv(gate, block.width, block.activation, size=1)
        gate = stack.conv(gate, channels, "hard_sigmoid", size=1)
    return layers.Multiply()([x, gate] if block.width % 2 else [gate, x])


def resized(stack, x, block):
    # In one dimension, cropping knows no data format: it takes from the first axis, whatever that is.
    if min(stack.space(x)) < 3 or (stack.rank == 1 and x.shape[1] < 3):
        return stack.layer("UpSampling", 2)(x)
    return [
        stack.layer("MaxPooling", 2),
        stack.layer("AveragePooling", 2, padding="same"),
        stack.layer("ZeroPadding", 1),
        stack.layer("Cropping", 1),
        stack.layer("UpSampling", 2) if max(stack.space(x)) < 8 else stack.layer("MaxPooling", 3, strides=2),
        stack.layer("AveragePooling", 3, strides=1, padding="same"),
    ][block.option % 6](x)


def transposed(stack, x, block):
    strides = 2 if max(stack.space(x)) < 6 else 1
    options = {"strides": strides, "padding": ("same", "valid")[block.option % 2], "activation": block.activation}
    return getattr(layers, f"Conv{stack.rank}DTranspose")(block.width, 2, **options)(x)


def dense(stack, x, block):
    return layers.Dense(block.width, activation=block.activation, use_bias=block.option % 2 == 0)(x)


def dropped(stack, x, block):
    return [
        layers.Dropout(0.5),
        stack.layer("SpatialDropout", 0.5),
        layers.GaussianNoise(0.1),
        layers.AlphaDropout(0.5),
        layers.GaussianDropout(0.5),
        layers.ActivityRegularization(0.1),
        layers.Identity(),
        layers.Rescaling(0.5, offset=0.25),
    ][block.option % 8](x)


def shared(stack, x, block):
    groups = 2 if block.option % 2 and stack.width(x) % 2 == 0 else 1
    twins = stack.layer("Conv", stack.width(x), 3, padding="same", activation=block.activation, groups=groups)
    older = stack.like(x, stack.older(block))
    return [
        lambda: twins(twins(x)),
        lambda: layers.Add()([twins(x), twins(older)]),
        lambda: stack.join([twins(x), twins(stack.beside(x, older))]),
    ][block.option % 3]()


def part(stack, x, slice_):
    """Some of the channels."""
    return x[(Ellipsis, slice_) if stack.axis == -1 else (slice(None), slice_)]


def operation(stack, x, block):
    older, width = stack.like(x, stack.older(block)), stack.width(x)
    return [
        lambda: ops.relu(x),
        lambda: x + older,
        lambda: x * 2.0,
        lambda: part(stack, x, slice(max(1, width // 2))),
        lambda: part(stack, x, slice(None, None, 2)),
        lambda: ops.take(x, [*reversed(range(width)), 0], axis=stack.axis),
        lambda: ops.split(
            ops.concatenate([x, stack.beside(x, older)], axis=stack.axis), 2 if width % 2 == 0 else [1], axis=stack.axis
        )[block.width % 2],
        lambda: ops.flip(x, axis=[1, 2, -1][block.width % 3]),
        lambda: ops.repeat(x, 2, axis=stack.axis),
        lambda: ops.add(*ops.split(x, 2, axis=stack.axis)) if width % 2 == 0 else older - x,
        lambda: ops.pad(x, [(0, 0), *[(1, 0) if n == block.width % 3 else (0, 0) for n in range(stack.rank + 1)]]),
        lambda: 1.0 - x,
        lambda: x * np.linspace(0.5, 1.5, width, dtype="float32").reshape(stack.shape((1,) * stack.rank, width)),
        lambda: ops.where(x > 0, x, older),
        lambda: ops.stack([x, older], axis=1)[:, block.width % 2],
    ][block.option % 15]()


SMOOTH = [function for kind, function in ELEMENTWISE if kind not in JUMPING]
COMBINING = [function for kind, function in COMBINATIONS if kind not in JUMPING]


def elementwise(stack, x, block):
    """Any function of the table; of tanh, so that none overflows."""
    x = ops.tanh(x)
    if block.option % 2:
        return SMOOTH[(block.option // 2 * 5 + block.width) % len(SMOOTH)](x)
    combine = COMBINING[(block.option // 2) % len(COMBINING)]
    branch = ops.tanh(stack.conv(x, stack.width(x), block.activation))
    return combine(x, branch) if block.width % 2 else combine(branch, x)


def reduced(stack, x, block):
    axes = [n for n in range(1, stack.rank + 2) if n != stack.axis % (stack.rank + 2)]
    kept = ops.tanh(x)
    _, reduce = REDUCING[block.option % len(REDUCING)]
    return (
        kept * reduce(kept + 1, axis=axes, keepdims=True)
        if block.width % 2
        else kept - reduce(kept, axis=axes[0], keepdims=True)
    )


def moved(stack, x, block):
    """Axes are moved, and moved back after something that works on them."""
    axes = [0, *range(2, stack.rank + 2), 1]
    back = [0, stack.rank + 1, *range(1, stack.rank + 1)]
    return [
        lambda: ops.transpose(ops.relu(ops.transpose(x, axes)), back),
        lambda: layers.Permute(back[1:])(layers.Activation(block.activation)(layers.Permute(axes[1:])(x))),
        lambda: ops.moveaxis(layers.Dense(x.shape[1])(ops.moveaxis(x, 1, -1)), -1, 1),
        lambda: ops.swapaxes(layers.Dense(x.shape[1])(ops.swapaxes(x, 1, -1)), 1, -1),
        lambda: ops.squeeze(ops.expand_dims(x, block.width % (stack.rank + 2) + 1), block.width % (stack.rank + 2) + 1),
        lambda: ops.reshape(ops.reshape(x, (-1, int(np.prod(x.shape[1:])))), (-1, *x.shape[1:])),
    ][block.option % 6]()


def shuffled(stack, x, block):
    """As ShuffleNet shuffles; and as PixelShuffle does, where the channels allow."""
    width, space, groups = stack.width(x), stack.space(x), 2 if stack.width(x) % 2 == 0 else 3
    if stack.axis == 1 or width % groups:
        return stack.conv(x, 4, block.activation)
    if block.option % 2 or stack.rank != 2 or width % 4 or max(space) > 6:
        split = ops.reshape(x, (-1, *space, groups, width // groups))
        swapped = ops.swapaxes(split, -1, -2)
        return ops.reshape(swapped, (-1, *space, width))
    high, wide = space
    x = ops.reshape(x, (-1, high, wide, 2, 2, width // 4))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 2 * high, 2 * wide, width // 4))


def normalizing(stack, x, block):
    """What normalizes or scales."""
    width = stack.width(x)
    return [
        # On PyTorch, Keras 3.15 takes the axis of these two for the last one.
        lambda: layers.LayerNormalization()(x) if stack.axis == -1 else x,
        lambda: layers.RMSNormalization()(x) if stack.axis == -1 else x,
        lambda: layers.GroupNormalization(groups=1, axis=stack.axis)(x),
        lambda: layers.UnitNormalization(axis=stack.axis)(x),
        lambda: layers.Normalization(axis=stack.axis, mean=[0.5] * width, variance=[2.0] * width)(x),
        lambda: stack.normalization(renorm=True)(x),
        lambda: x + LayerScale(0.1, width)(stack.conv(x, width)) if stack.axis == -1 else x,
        lambda: CustomScaleLayer(0.3)([x, stack.conv(stack.conv(x, block.width, block.activation), width)]),
        lambda: stack.layer("AveragePooling", 2)(layers.Resizing(6, 5)(x)) if stack.rank == 2 else x,
    ][block.option % 9]()


def recurrent(stack, x, block):
    steps, back = stack.sequence(x)
    options = {"return_sequences": True, "use_bias": block.option % 2 == 0}
    layer = [layers.LSTM, layers.GRU, layers.SimpleRNN][block.width % 3](block.width, **options)
    if block.option % 3 == 0:
        layer = layers.Bidirectional(layer, merge_mode=["concat", "sum", "ave", "mul"][block.option % 4])
    if block.option % 7 == 6:
        short = layers.RepeatVector(steps.shape[1])(layers.GRU(block.width, reset_after=False)(steps))
        return back(layers.Concatenate()([short, steps]))
    return back(layer(steps))


def transformer(stack, x, block):
    """A residual block with attention and one with an MLP; without LayerNormalization nothing pins the trunk."""
    steps, back = stack.sequence(x)
    width = steps.shape[-1]
    y = layers.LayerNormalization()(steps) if block.option % 2 else steps
    attended = [
        lambda: layers.MultiHeadAttention(3, 2, use_bias=block.width % 2 == 0)(y, y),
        lambda: layers.MultiHeadAttention(2, 3, output_shape=width)(y, layers.Dense(block.width)(y)),
        lambda: layers.GroupQueryAttention(2, 4, 2)(y, y),
        lambda: layers.Attention()([layers.Dense(4)(y), layers.Dense(width)(y), layers.Dense(4)(y)]),
        lambda: layers.AdditiveAttention()([y, y]),
        lambda: ops.matmul(ops.softmax(ops.matmul(y, ops.transpose(y, (0, 2, 1)))), layers.Dense(width)(y)),
        lambda: ops.einsum("bqk,bkc->bqc", ops.einsum("bqc,bkc->bqk", ops.tanh(y), y), layers.Dense(width)(y)),
    ][block.option % 7]()
    steps = layers.Add()([steps, attended])
    y = layers.EinsumDense("abc,cd->abd", (steps.shape[1], block.width), bias_axes="d", activation="gelu")(steps)
    return back(layers.Add()([steps, layers.Dense(width)(y)]))


def distributed(stack, x, block):
    """The first axis of space as time."""
    if stack.axis == 1 or stack.rank == 1:
        return layers.TimeDistributed(layers.Dense(x.shape[-1], block.activation))(x)
    convolution, pooling = (getattr(layers, f"{name}{stack.rank - 1}D") for name in ("Conv", "MaxPooling"))
    options = {"padding": "same", "activation": block.activation}
    return layers.TimeDistributed(
        [
            lambda: convolution(block.width, 3, **options),
            lambda: convolution(2 * block.width, 3, groups=2 if x.shape[-1] % 2 == 0 else 1, **options),
            lambda: pooling(2, padding="same"),
            lambda: layers.BatchNormalization(),
            lambda: layers.Dense(block.width),
        ][block.option % 5]()
    )(x)


def looked_up(stack, x, block):
    """What channels say is looked up, and multiplied with them."""
    tokens = ops.cast(ops.clip(3 * ops.abs(stack.layer("GlobalMaxPooling")(x)), 0, 0), "int32")
    gate = layers.GlobalAveragePooling1D(data_format="channels_last")(layers.Embedding(3, stack.width(x))(tokens))
    return layers.Multiply()([x, layers.Reshape(stack.shape((1,) * stack.rank, stack.width(x)))(gate)])


def nested(stack, x, block):
    inside = keras.Input(tuple(x.shape[1:]))
    y = stack.normalization()(stack.conv(inside, block.width, block.activation))
    if block.option % 2:
        return keras.Model(inside, y)(x)
    model = keras.Model(inside, layers.Add()([inside, stack.conv(y, stack.width(x))]))
    return model(model(x)) if block.option % 4 == 2 else model(x)


class Enclosed(layers.Layer):
    """A layer made of a functional model, which nothing in its config tells."""

    def __init__(self, model, **options):
        super().__init__(**options)
        self.model = model

    def call(self, x, training=None):
        return self.model(x, training=training)


def _convolution(rank, axis):
    form = "channels_last" if axis == -1 else "channels_first"  # as its config has to say, wherever it is made anew
    return lambda *args, **options: getattr(layers, f"Conv{rank}D")(*args, data_format=form, **options)


@keras.saving.register_keras_serializable("networks")
class Gated(layers.Layer):
    """Squeeze and excitation beside a residual branch, made of layers, a layer of layers, and operators."""

    def __init__(self, rank, axis, width, squeezed, **options):
        super().__init__(**options)
        self.rank, self.axis, self.width, self.squeezed = rank, axis, width, squeezed
        convolution = _convolution(rank, axis)
        self.branch = [convolution(2 * width, 3, padding="same"), layers.BatchNormalization(axis=axis)]
        self._last = convolution(width, 1)
        self.relu = layers.ReLU()
        self.gate = keras.Sequential(
            [convolution(squeezed, 1, activation="relu"), convolution(width, 1, activation="sigmoid")]
        )

    def call(self, x):
        y = x
        for layer in self.branch:
            y = self.relu(layer(y))
        y = self._last(y)
        space = [n for n in range(1, self.rank + 2) if n != self.axis % (self.rank + 2)]
        return y * self.gate(ops.mean(y, axis=space, keepdims=True)) + x

    def get_config(self):
        names = ("rank", "axis", "width", "squeezed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable("networks")
class Twofold(layers.Layer):
    """Reads two tensors, and hands back two."""

    def __init__(self, rank, axis, width, **options):
        super().__init__(**options)
        self.rank, self.axis, self.width = rank, axis, width
        self.inner = Gated(rank, axis, width, 3)
        self.project = _convolution(rank, axis)(width, 1)

    def call(self, x, other):
        y = self.inner(self.project(x + other))
        return x, ops.concatenate([y, self.inner(x)], axis=self.axis)

    def get_config(self):
        return {**super().get_config(), "rank": self.rank, "axis": self.axis, "width": self.width}


def composite(stack, x, block):
    """Layers made of layers."""
    width = stack.width(x)
    if block.option % 3 == 1:
        return Gated(stack.rank, stack.axis, width, block.width)(x)
    if block.option % 3 == 2:
        kept, more = Twofold(stack.rank, stack.axis, width)(x, stack.like(x, stack.older(block)))
        return stack.join([kept, more]) if block.width % 2 else more
    kinds = [conv_bn_act, residual, depthwise, grouped, squeeze_excite, operation, nested, normalizing, shared]
    inside = keras.Input(tuple(x.shape[1:]))
    beneath = Stack.__new__(Stack)
    beneath.rank, beneath.axis, beneath.tensors = stack.rank, stack.axis, [inside]
    return Enclosed(keras.Model(inside, kinds[(block.option // 3 + block.width) % len(kinds)](beneath, inside, block)))(
        x
    )


def spread(stack, x, block):
    """One layer in two nested models, and beside them."""
    width = stack.width(x)
    twin = (
        stack.layer("Conv", width, 3, padding="same") if block.option % 2 else Gated(stack.rank, stack.axis, width, 2)
    )
    one, other = (keras.Input(tuple(x.shape[1:])) for _ in range(2))
    first = keras.Model(one, layers.Activation(block.activation)(twin(one)))
    second = keras.Model(other, layers.Add()([other, stack.conv(twin(other), width)]))
    ends = [first(x), second(x)]
    return layers.Add()([*ends, twin(x)] if block.width % 2 else ends)


def gate(stack, x, vector, block):
    """x times a vector for each example, of any width."""
    width = stack.width(x)
    scale = layers.Dense(width, activation="sigmoid")(vector)
    if stack.axis == -1 and block.option % 2:
        return layers.Multiply()([x, scale])  # of fewer axes than x
    return layers.Multiply()([x, layers.Reshape(stack.shape((1,) * stack.rank, width))(scale)])


def masked(stack, x, block):
    """Steps that a mask leaves out, through merges and whatever hands masks on."""
    first, _ = stack.sequence(stack.tensors[0])
    tokens = ops.cast(ops.clip(ops.abs(2 * first[..., 0]), 0, 3), "int32")
    known = layers.Embedding(4, block.width, mask_zero=True)(tokens)
    other = layers.Dense(block.width, block.activation)(layers.Dense(3)(first))
    twice = layers.Embedding(4, block.width, mask_zero=True)(tokens)
    merge = [
        layers.Add(),
        layers.Average(),
        layers.Multiply(),
        layers.Maximum(),
        layers.Concatenate(),
        layers.Subtract(),
    ]
    operands = [[known, other], [other, known], [known, twice]][block.width % 3]
    steps = [
        lambda: merge[block.option % 6](operands),
        lambda: ops.concatenate(operands, axis=-1),
        lambda: ops.add(*operands),
        lambda: layers.LayerNormalization()(layers.Add()(operands)),
        lambda: layers.Dropout(0.5)(layers.Dense(block.width)(known)),
        lambda: layers.MultiHeadAttention(2, 2)(known, known),
        lambda: layers.Masking()(first),
    ][block.option // 3 % 7]()
    kind = [layers.LSTM, layers.GRU, layers.SimpleRNN][block.option % 3]
    vector = [
        lambda: kind(block.width)(steps),
        lambda: layers.Bidirectional(kind(3))(steps),
        lambda: layers.GlobalAveragePooling1D(data_format="channels_last")(steps),
        lambda: kind(4)(layers.Attention()([steps, steps])),
        lambda: kind(4)(kind(block.width, return_sequences=True)(steps)),
        lambda: kind(5)(steps, mask=ops.greater(first[..., 0], 0)),
    ][block.option % 6 if block.width % 2 else 0]()
    return gate(stack, x, vector, block)


def split(stack, x, block):
    """Reshapes that split the channel axis, as in the radix softmax of ResNeSt, and constants through them."""
    width, pooled = stack.width(x), stack.layer("GlobalAveragePooling")(x)
    hidden = layers.Dense(block.width, activation=block.activation)(pooled)
    made = layers.Dense(2 * width, activation=["softplus", None][block.width % 2])(hidden)
    two = layers.Reshape((2, width))(made) if block.option % 2 else ops.reshape(made, (-1, 2, width))
    if block.option % 3 == 0:
        weights = ops.softmax(two, axis=1)
        one, other = (layers.Reshape(stack.shape((1,) * stack.rank, width))(weights[:, n]) for n in range(2))
        return x * one + ops.tanh(stack.conv(x, width)) * other
    if block.option % 3 == 1:
        live = layers.Reshape((2, width))(layers.Dense(2 * width)(pooled))
        return gate(stack, x, layers.Flatten()(layers.Add()([two, live])), block)
    grown = layers.Reshape(stack.shape((2,) * stack.rank, block.width))(
        layers.Dense(2**stack.rank * block.width)(hidden)
    )
    return gate(stack, x, stack.layer("GlobalMaxPooling")(stack.conv(grown, 3, "relu")), block)


def batched(stack, x, block):
    """Reshapes that move an axis into the batch, and back: windows, and TimeDistributed by hand."""
    if stack.axis == 1 or stack.rank == 1:
        return stack.conv(x, block.width, block.activation)
    first, *rest = stack.space(x)
    inside = ops.reshape(x, (-1, *rest, stack.width(x)))
    convolution = getattr(layers, f"Conv{stack.rank - 1}D")(block.width, 3, padding="same", activation=block.activation)
    steps = [
        lambda: convolution(inside),
        lambda: layers.Dense(block.width)(layers.Dense(3, block.activation)(inside)),
        lambda: layers.BatchNormalization()(inside),
    ][block.option % 3]()
    y = ops.reshape(steps, (-1, first, *rest, steps.shape[-1]))
    if stack.rank != 2 or first % 2 or rest[0] % 2 or block.option % 2:
        return y
    half, wide, width = first // 2, rest[0] // 2, y.shape[-1]
    windows = ops.transpose(ops.reshape(y, (-1, half, 2, wide, 2, width)), (0, 1, 3, 2, 4, 5))
    windows = ops.reshape(windows, (-1, 4, width))
    windows = windows + layers.MultiHeadAttention(2, 2)(windows, windows)
    back = ops.transpose(ops.reshape(windows, (-1, half, wide, 2, 2, width)), (0, 1, 3, 2, 4, 5))
    return ops.reshape(back, (-1, first, rest[0], width))


def stepped(stack, x, block):
    """A model that TimeDistributed calls at every step."""
    if stack.axis == 1 or stack.rank == 1:
        return stack.conv(x, block.width, block.activation)
    inside = keras.Input(tuple(x.shape[2:]))
    beneath = Stack.__new__(Stack)
    beneath.rank, beneath.axis, beneath.tensors = stack.rank - 1, -1, [inside]
    y = beneath.conv(beneath.normalization()(beneath.conv(inside, block.width, block.activation)), 3)
    if block.option % 3 == 0:
        y = layers.Add()([y, beneath.conv(inside, 3)])
    if block.option % 2:
        return layers.TimeDistributed(keras.Model(inside, y))(x)
    vectors = layers.TimeDistributed(keras.Model(inside, beneath.layer("GlobalAveragePooling")(y)))(x)
    return gate(stack, x, layers.GRU(4)(vectors), block)


def resizable(stack, x, block):
    """One backbone of unknown size, called at two resolutions; and one Reshape for blocks of two widths."""
    inside = keras.Input(stack.shape((None,) * stack.rank, stack.width(x)))
    y = stack.conv(stack.normalization()(stack.conv(inside, block.width, block.activation)), 4)
    y = y if block.option % 2 else layers.Add()([y, stack.conv(inside, 4)])
    backbone = keras.Model(inside, stack.layer("GlobalAveragePooling")(y))
    small = stack.layer("AveragePooling", 2)(x) if min(stack.space(x)) > 1 else x
    vector = layers.Add()([backbone(x), backbone(small)])
    if stack.axis == 1:
        return gate(stack, x, vector, block)
    reshape = layers.Reshape((*(1,) * stack.rank, -1))
    one = layers.Multiply()([x, reshape(layers.Dense(stack.width(x), activation="sigmoid")(vector))])
    y = stack.conv(one, block.width, block.activation)
    return layers.Multiply()([y, reshape(layers.Dense(block.width, activation="sigmoid")(vector))])


@keras.saving.register_keras_serializable("networks")
class Owned(layers.Layer):
    """A layer without a row: it has a weight of its own."""

    def __init__(self, axis, **options):
        super().__init__(**options)
        self.axis = axis

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[self.axis],), name="scale")

    def call(self, x):
        return x * ops.reshape(self.scale, [-1 if n == self.axis % len(x.shape) else 1 for n in range(1, len(x.shape))])

    def get_config(self):
        return {**super().get_config(), "axis": self.axis}


def unknown(stack, x, block):
    """Layers without rows, odd names, and what reads all channels at once."""
    width = stack.width(x)
    odd = (
        ">".join(["block", str(len(stack.tensors))])
        if keras.backend.backend() == "tensorflow"
        else f"b:{len(stack.tensors)}"
    )
    y = getattr(layers, f"Conv{stack.rank}D")(
        width, 1, activation=[None, "relu", "softplus"][block.width % 3], name=odd
    )(x)
    if block.option % 6 == 0:
        return Owned(stack.axis)(y)
    if stack.axis == 1:
        return ops.softmax(y, axis=1)
    return [
        lambda: layers.Softmax()(y),
        lambda: x * ops.mean(y, axis=-1, keepdims=True),
        lambda: x * ops.max(y, axis=-1, keepdims=True),
        lambda: layers.LayerNormalization()(y) + x,
        lambda: ops.cumsum(y, axis=-1),
    ][block.option % 6 - 1]()


def grouped_norm(stack, x, block):
    """Normalizations that can be narrowed, of a branch or of the trunk."""
    width = stack.width(x)
    groups = [n for n in range(1, width + 1) if width % n == 0]
    y = stack.conv(x, width, [None, "relu", block.activation][block.width % 3])
    y = [
        layers.GroupNormalization(-1, axis=stack.axis, epsilon=0.01),
        layers.GroupNormalization(groups[block.width % len(groups)], axis=stack.axis, epsilon=0.01),
        layers.UnitNormalization(axis=stack.axis),
        layers.RMSNormalization(epsilon=0.01) if stack.axis == -1 else layers.Identity(),
        layers.LayerNormalization(epsilon=0.01) if stack.axis == -1 else layers.Identity(),
    ][block.option % 5](y)
    return layers.Add()([x, y]) if block.option % 2 else y


def contracted(stack, x, block):
    """Sums over channels without weights, and channels that meet along different axes."""
    steps, back = stack.sequence(x)
    width, one = steps.shape[-1], layers.Dense(4)(steps)
    other = layers.Dense(4, activation=[None, "tanh", "softplus"][block.width % 3])(steps)
    return [
        lambda: gate(stack, x, layers.Dot(axes=1)([ops.mean(one, 1), ops.mean(other, 1)]), block),
        lambda: gate(stack, x, ops.sum(one * other, axis=-1), block),
        lambda: back(layers.Multiply()([steps, weights_of_steps(one, width)])),
        lambda: back(ops.matmul(ops.softmax(ops.matmul(one, ops.swapaxes(other, 1, 2))), steps)),
        lambda: back(
            ops.sum(ops.stack([steps, layers.Dense(width)(other)], axis=-1) * ops.softmax(one[..., None, :2]), -1)
        ),
        lambda: back(ops.glu(layers.Dense(2 * width)(one))),
        lambda: back(ops.roll(ops.where(steps > 0, steps, layers.Dense(width)(other)), 1, axis=block.width % 2 + 1)),
        lambda: back(keras.activations.relu(ops.tile(layers.Dense(width)(one)[:, :1], (1, steps.shape[1], 1)))),
    ][block.option % 8]()


def weights_of_steps(steps, width):
    """As in many notebooks: a softmax over the steps, repeated for each channel."""
    weights = layers.Softmax()(layers.Flatten()(layers.Dense(1, activation="tanh")(steps)))
    return layers.Permute((2, 1))(layers.RepeatVector(width)(weights))


def over_channels(stack, x, block):
    """What counts all channels, behind what makes other constants than zero of dead ones: CBAM's maps, and norms."""
    x = [
        lambda: x,
        lambda: stack.normalization()(x),
        lambda: stack.conv(x, block.width, "sigmoid"),
        lambda: layers.Activation("softplus")(layers.Add()([x, stack.normalization()(stack.conv(x, stack.width(x)))])),
        lambda: stack.join([stack.normalization()(x), stack.conv(x, block.width, "hard_sigmoid")]),
    ][block.option % 5]()
    spread = {"axis": stack.axis, "keepdims": True}

    def cbam():
        maps = [ops.mean(x, **spread), ops.max(x, **spread)]
        return x * stack.conv(stack.join(maps), 1, "sigmoid")

    return [
        cbam,
        lambda: x * ops.sigmoid(ops.var(x, **spread)),
        lambda: x - ops.sum(ops.tanh(x), **spread),
        lambda: layers.LayerNormalization(epsilon=0.1)(x) if stack.axis == -1 else x / (1 + ops.std(x, **spread)),
        lambda: layers.GroupNormalization(1, axis=stack.axis, epsilon=0.1)(x),
        lambda: ops.normalize(x + 3.0, axis=stack.axis),
    ][block.width % 6]()


KINDS = {
    kind.__name__: kind
    for kind in (
        conv,
        normalized,
        activated,
        conv_bn_act,
        residual,
        projected_residual,
        padded_residual,
        merged,
        joined,
        depthwise,
        separable,
        grouped,
        squeeze_excite,
        resized,
        transposed,
        dense,
        dropped,
        shared,
        operation,
        elementwise,
        reduced,
        moved,
        shuffled,
        normalizing,
        recurrent,
        transformer,
        distributed,
        looked_up,
        nested,
        composite,
        spread,
        masked,
        split,
        batched,
        stepped,
        resizable,
        unknown,
        grouped_norm,
        contracted,
        over_channels,
    )
}
# Those that neither grow fast enough to overflow in a chain, nor answer large inputs with constants only.
ACTIVATIONS = [
    "linear",
    "relu",
    "relu6",
    "tanh",
    "sigmoid",
    "elu",
    "gelu",
    "silu",
    "softplus",
    "hard_silu",
    "leaky_relu",
    "mish",
    "selu",
    "softsign",
    "hard_tanh",
    "celu",
    "tanh_shrink",
    "soft_shrink",
    "squareplus",
    "log_sigmoid",
    "hard_shrink",
    "softmax",
]


def flat(stack, x):
    return layers.Dense(3)(layers.Flatten()(x))


def mean(stack, x):
    return layers.Dense(3)(stack.layer("GlobalAveragePooling")(x))


def hidden(stack, x):
    x = layers.Dense(5, activation="relu")(layers.Flatten()(x))
    return layers.Dense(3)(stack.normalization()(x))


def maps(stack, x):
    return stack.conv(x, 2, size=1)


def reshaped(stack, x):
    x = stack.layer("GlobalMaxPooling")(x)
    return layers.Dense(2)(layers.Reshape((1, stack.width(x)))(x))


def bare(stack, x):
    return x


HEADS = {head.__name__: head for head in (flat, mean, hidden, maps, reshaped, bare)}


@st.composite
def recipes(draw):
    """Recipes of one to seven blocks on images of four to six pixels."""
    blocks = st.builds(
        Block,
        kind=st.sampled_from(list(KINDS)),
        width=st.integers(1, 5),
        activation=st.sampled_from(ACTIVATIONS),
        option=st.integers(0, 29),
    )
    return Recipe(
        format=draw(st.sampled_from(FORMATS)),
        rank=draw(st.sampled_from([2, 2, 2, 1, 3])),
        size=draw(st.integers(4, 6)),
        inputs=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))),
        blocks=tuple(draw(st.lists(blocks, min_size=1, max_size=7))),
        head=draw(st.sampled_from(list(HEADS))),
        outputs=draw(st.sampled_from([1, 1, 2])),
    )


def build(recipe):
    """The recipe's model, with random weights."""
    before = keras.config.image_data_format()
    keras.config.set_image_data_format(recipe.format)
    try:
        return models.randomize(_built(recipe), seed=1)
    finally:
        keras.config.set_image_data_format(before)


def _built(recipe):
    keras.backend.clear_session(free_memory=False)
    stack = Stack(recipe)
    space = (recipe.size,) * recipe.rank
    inputs = [keras.Input(stack.shape(space, width)) for width in recipe.inputs]
    x = inputs[0]
    if len(inputs) == 2:
        x = stack.join([stack.conv(inputs[0], 3, "relu"), stack.conv(inputs[1], 2, "relu")])
    for block in recipe.blocks:
        stack.tensors.append(x)
        x = KINDS[block.kind](stack, x, block)
    ends = [HEADS[recipe.head](stack, x)]
    if recipe.outputs == 2:
        middle = stack.tensors[len(stack.tensors) // 2]
        ends.append(layers.Dense(2)(stack.layer("GlobalAveragePooling")(middle)))
    return keras.Model(inputs, ends)


# What to kill: a share of the layers, a share of the other channels, and which.
kills = st.tuples(st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.sampled_from([0.0, 0.3, 0.7, 0.9]), st.integers(0, 999))
grouped_modes = st.sampled_from(["whole", "equal"])
