"""Random small networks, for Hypothesis: a recipe is data that prints and shrinks well, `build` makes the model.

A network is a stack of blocks; each takes the newest tensor and adds one, and some look back at an older one. An option
is a small whole number that a block reads as it likes.
"""

from typing import NamedTuple

import keras
import models
from hypothesis import strategies as st
from keras import layers, ops


class Block(NamedTuple):
    kind: str
    width: int
    activation: str
    option: int


class Recipe(NamedTuple):
    """`rank` spatial axes of `size`, one or two inputs of these widths, the blocks, the head, and how many outputs."""

    rank: int
    size: int
    inputs: tuple[int, ...]
    blocks: tuple[Block, ...]
    head: str
    outputs: int


class Stack:
    """The tensors so far, and shorthands for the layers of one rank."""

    def __init__(self, recipe):
        self.rank = recipe.rank
        self.tensors = []

    def layer(self, name, *args, **kwargs):
        return getattr(layers, f"{name}{self.rank}D")(*args, **kwargs)

    def conv(self, x, width, activation=None, size=3, **options):
        options = {"padding": "same", "activation": activation, **options}
        return self.layer("Conv", width, size, **options)(x)

    def older(self, block):
        return self.tensors[block.option % len(self.tensors)]

    def like(self, x, other):
        """`other` itself if it has the shape of x; else projected, and over space reduced where that differs too."""
        if tuple(other.shape) == tuple(x.shape):
            return other
        if tuple(other.shape[1:-1]) != tuple(x.shape[1:-1]):
            other = self.layer("GlobalAveragePooling", keepdims=True)(other)
        return self.conv(other, x.shape[-1], size=1)

    def beside(self, x, other):
        """`other` itself if it can be joined with x; else a convolution of x."""
        return other if tuple(other.shape[1:-1]) == tuple(x.shape[1:-1]) else self.conv(x, x.shape[-1], "tanh")


def conv(stack, x, block):
    options = [{}, {"use_bias": False}, {"padding": "valid"}, {"strides": 2}, {"dilation_rate": 2}][block.option % 5]
    if options.get("padding") == "valid" and min(x.shape[1:-1]) < 3:
        options = {}
    return stack.conv(x, block.width, block.activation, **options)


def normalized(stack, x, block):
    options = [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}][block.option % 4]
    return layers.BatchNormalization(**options)(x)


def activated(stack, x, block):
    return [
        layers.Activation(block.activation),
        layers.ReLU(negative_slope=0.1, max_value=2.0),
        layers.LeakyReLU(),
        layers.ELU(),
        layers.PReLU(shared_axes=list(range(1, stack.rank + 1))),
        layers.PReLU(),
        layers.Softmax(),
        layers.Activation(ops.relu),
    ][block.option % 8](x)


def conv_bn_act(stack, x, block):
    x = stack.conv(x, block.width, size=3 - 2 * (block.option % 2), use_bias=block.option % 3 == 0)
    return layers.Activation(block.activation)(layers.BatchNormalization()(x))


def residual(stack, x, block):
    y = stack.conv(x, block.width, block.activation)
    y = layers.BatchNormalization()(stack.conv(y, x.shape[-1]))
    return layers.Add()([x, y] if block.option % 2 else [y, x])


def projected_residual(stack, x, block):
    y = stack.conv(x, 3, block.activation, strides=2)
    y = layers.BatchNormalization()(stack.conv(y, block.width))
    x = layers.BatchNormalization()(stack.conv(x, block.width, size=1, strides=2))
    return layers.Activation(block.activation)(layers.Add()([x, y]))


def padded_residual(stack, x, block):
    y = layers.BatchNormalization()(stack.conv(x, block.width, size=1))
    y = stack.conv(stack.layer("ZeroPadding", 1)(y), x.shape[-1], padding="valid")
    return layers.Add()([x, y])


MERGES = [layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum]


def merged(stack, x, block):
    older = stack.like(x, stack.older(block))
    branch = stack.conv(stack.conv(x, block.width, block.activation, size=1), x.shape[-1], size=1)
    merge = MERGES[block.option % 6]
    operands = [[x, branch], [branch, x], [x, older], [x, branch, older], [older, branch, x]][block.width % 5]
    return merge()(operands[:2] if merge is layers.Subtract else operands)


def joined(stack, x, block):
    older = stack.beside(x, stack.older(block))
    operands = [[x, older], [older, x], [x, older, x]][block.width % 3]
    return ops.concatenate(operands, axis=-1) if block.option % 4 == 3 else layers.Concatenate()(operands)


def depthwise(stack, x, block):
    options = {"depth_multiplier": 1 + block.option % 2, "padding": "same", "activation": block.activation}
    if stack.rank == 3:
        return stack.conv(x, x.shape[-1], groups=x.shape[-1])
    return stack.layer("DepthwiseConv", 3, **options)(x)


def separable(stack, x, block):
    if stack.rank == 3:
        return stack.conv(x, block.width, block.activation)
    options = {"depth_multiplier": 1 + block.option % 2, "padding": "same", "activation": block.activation}
    return stack.layer("SeparableConv", block.width, 3, **options)(x)


def grouped(stack, x, block):
    groups = 2 if x.shape[-1] % 2 == 0 else x.shape[-1]
    return stack.conv(x, groups * (1 + block.option % 2), block.activation, groups=groups)


def squeeze_excite(stack, x, block):
    channels = x.shape[-1]
    if block.option % 2:
        gate = stack.layer("GlobalAveragePooling")(x)
        gate = layers.Dense(block.width, activation=block.activation)(gate)
        gate = layers.Dense(channels, activation="sigmoid")(gate)
        gate = layers.Reshape((1,) * stack.rank + (channels,))(gate)
    else:
        gate = stack.layer("GlobalMaxPooling", keepdims=True)(x)
        gate = stack.conv(gate, block.width, block.activation, size=1)
        gate = stack.conv(gate, channels, "hard_sigmoid", size=1)
    return layers.Multiply()([x, gate] if block.width % 2 else [gate, x])


def resized(stack, x, block):
    if min(x.shape[1:-1]) < 3:
        return stack.layer("UpSampling", 2)(x)
    return [
        stack.layer("MaxPooling", 2),
        stack.layer("AveragePooling", 2, padding="same"),
        stack.layer("ZeroPadding", 1),
        stack.layer("Cropping", 1),
        stack.layer("UpSampling", 2) if max(x.shape[1:-1]) < 8 else stack.layer("MaxPooling", 3, strides=2),
        stack.layer("AveragePooling", 3, strides=1, padding="same"),
    ][block.option % 6](x)


def transposed(stack, x, block):
    strides = 2 if max(x.shape[1:-1]) < 6 else 1
    options = {"strides": strides, "padding": ("same", "valid")[block.option % 2], "activation": block.activation}
    return getattr(layers, f"Conv{stack.rank}DTranspose")(block.width, 2, **options)(x)


def dense(stack, x, block):
    return layers.Dense(block.width, activation=block.activation, use_bias=block.option % 2 == 0)(x)


def dropped(stack, x, block):
    return [
        layers.Dropout(0.5),
        stack.layer("SpatialDropout", 0.5),
        layers.GaussianNoise(0.1),
        layers.Identity(),
        layers.Rescaling(0.5, offset=0.25),
    ][block.option % 5](x)


def shared(stack, x, block):
    twins = stack.layer("Conv", x.shape[-1], 3, padding="same", activation=block.activation)
    older = stack.like(x, stack.older(block))
    return [
        lambda: twins(twins(x)),
        lambda: layers.Add()([twins(x), twins(older)]),
        lambda: layers.Concatenate()([twins(x), twins(stack.beside(x, older))]),
    ][block.option % 3]()


def operation(stack, x, block):
    older = stack.like(x, stack.older(block))
    return [
        lambda: ops.relu(x),
        lambda: x + older,
        lambda: x * 2.0,
        lambda: x[..., : max(1, x.shape[-1] // 2)],
        lambda: ops.take(x, list(reversed(range(x.shape[-1]))), axis=-1),
        lambda: ops.maximum(x, older),
        lambda: ops.split(ops.concatenate([x, stack.beside(x, older)], axis=-1), 2, axis=-1)[block.width % 2],
        lambda: x - older,
        lambda: ops.multiply(older, x),
        lambda: 1.0 - x,
    ][block.option % 10]()


def nested(stack, x, block):
    inside = keras.Input(tuple(x.shape[1:]))
    y = layers.BatchNormalization()(stack.conv(inside, block.width, block.activation))
    if block.option % 2:
        return keras.Model(inside, y)(x)
    return keras.Model(inside, layers.Add()([inside, stack.conv(y, x.shape[-1])]))(x)


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
        nested,
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
    return layers.Dense(3)(layers.BatchNormalization()(x))


def maps(stack, x):
    return stack.conv(x, 2, size=1)


def reshaped(stack, x):
    x = stack.layer("GlobalMaxPooling")(x)
    return layers.Dense(2)(layers.Reshape((1, x.shape[-1]))(x))


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
        rank=draw(st.sampled_from([2, 2, 2, 1, 3])),
        size=draw(st.integers(4, 6)),
        inputs=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))),
        blocks=tuple(draw(st.lists(blocks, min_size=1, max_size=7))),
        head=draw(st.sampled_from(list(HEADS))),
        outputs=draw(st.sampled_from([1, 1, 2])),
    )


def build(recipe):
    """The recipe's model, with random weights."""
    keras.backend.clear_session(free_memory=False)
    stack = Stack(recipe)
    space = (recipe.size,) * recipe.rank
    inputs = [keras.Input((*space, width)) for width in recipe.inputs]
    x = inputs[0]
    if len(inputs) == 2:
        x = layers.Concatenate()([stack.conv(inputs[0], 3, "relu"), stack.conv(inputs[1], 2, "relu")])
    for block in recipe.blocks:
        stack.tensors.append(x)
        x = KINDS[block.kind](stack, x, block)
    ends = [HEADS[recipe.head](stack, x)]
    if recipe.outputs == 2:
        middle = stack.tensors[len(stack.tensors) // 2]
        ends.append(layers.Dense(2)(stack.layer("GlobalAveragePooling")(middle)))
    return models.randomize(keras.Model(inputs, ends), seed=1)


# What to kill: a share of the layers, a share of the other channels, and which.
kills = st.tuples(st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.sampled_from([0.0, 0.3, 0.7, 0.9]), st.integers(0, 999))
