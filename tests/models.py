"""Tiny networks, one per way in which channels can be wired; each is drawn in its docstring.

Widths differ wherever they may, so that a confusion of two vectors shows. `build(name)` builds one with random weights.
"""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

SIZE = 6


def plain():
    """image(3) -- conv1(5) -- bn -- relu -- conv2(4) -- pool -- mean -- dense(3)."""
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(5, 3, padding="same", name="conv1")(image)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="plain")


def residual_identity():
    """The stem is tied to conv2.

    image(3) -- stem(4) --+-- conv1(5) -- bn1 -- relu1 -- conv2(4) -- bn2 --+
                          |                                                 add -- relu2 -- mean -- dense(3)
                          +-------------------------------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    stem = layers.Conv2D(4, 3, padding="same", activation="relu", name="stem")(image)
    x = layers.Conv2D(5, 3, padding="same", use_bias=False, name="conv1")(stem)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(4, 3, padding="same", name="conv2")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.Add(name="add")([x, stem])
    x = layers.ReLU(name="relu2")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="residual_identity")


def residual_projection():
    """Two blocks with strides; each projection is tied to the last convolution of its block.

    image(3) -- stem(3) --+-- a1(4) -- a2(6) -- bn_a --+                 +-- b1(4) -- b2(6) -- bn_b --+
                          |                            add_a -- relu_a --+                            add_b -- flat -- dense(3)
                          +-- a0(6) -----------------  +                 +----------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    stem = layers.Conv2D(3, 3, padding="same", name="stem")(image)
    a = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="a1")(stem)
    a = layers.Conv2D(6, 3, padding="same", name="a2")(a)
    a = layers.BatchNormalization(name="bn_a")(a)
    a = layers.Add(name="add_a")([layers.Conv2D(6, 1, strides=2, name="a0")(stem), a])
    a = layers.ReLU(name="relu_a")(a)
    b = layers.Conv2D(4, 3, padding="same", activation="relu", name="b1")(a)
    b = layers.Conv2D(6, 3, padding="same", name="b2")(b)
    b = layers.BatchNormalization(name="bn_b")(b)
    x = layers.Flatten(name="flat")(layers.Add(name="add_b")([a, b]))
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="residual_projection")


def preactivation():
    """BatchNormalization and ReLU in front of the convolutions; the trunk itself is never normalized.

    image(3) -- stem(4) --+-- bn1 -- relu -- conv1(5) -- bn2 -- relu -- conv2(4) --+
                          |                                                        add -- bn3 -- relu -- mean -- dense(3)
                          +--------------------------------------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    stem = layers.Conv2D(4, 3, padding="same", name="stem")(image)
    x = stem
    for number, width in ((1, 5), (2, 4)):
        x = layers.BatchNormalization(name=f"bn{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
        x = layers.Conv2D(width, 3, padding="same", name=f"conv{number}")(x)
    x = layers.Add(name="add")([stem, x])
    x = layers.BatchNormalization(name="bn3")(x)
    x = layers.ReLU(name="relu3")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="preactivation")


def concatenating():
    """As in DenseNet: each layer reads everything before it.

    image(3) -- conv1(4) --+-- conv2(3) --+-- conv3(5) --+
                           |              |              join2(12) -- bn -- relu -- mean -- dense(3)
                           +---- join1(7)-+--------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    one = layers.Conv2D(4, 3, padding="same", name="conv1")(image)
    two = layers.Conv2D(3, 3, padding="same", activation="relu", name="conv2")(one)
    both = layers.Concatenate(name="join1")([one, two])
    three = layers.Conv2D(5, 3, padding="same", name="conv3")(both)
    x = layers.Concatenate(name="join2")([both, three])
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="concatenating")


def inverted_residual():
    """As in MobileNetV2, with its explicit zero padding, through which no constant can be folded.

    image(3) -- stem(4) --+-- expand(6) - bn - relu6 - pad - depthwise(6) - bn - relu - project(4) - bn --+
                          |                                                                               add - mean - dense(3)
                          +-------------------------------------------------------------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    stem = layers.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(image)
    x = layers.Conv2D(6, 1, use_bias=False, name="expand")(stem)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.ReLU(6.0, name="relu1")(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.DepthwiseConv2D(3, use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.Conv2D(4, 1, use_bias=False, name="project")(x)
    x = layers.BatchNormalization(name="bn3")(x)
    x = layers.Add(name="add")([stem, x])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="inverted_residual")


def separable():
    """As in Xception; the second one has a depth multiplier, and so has the depthwise layer in front.

    image(3) -- depthwise x2 (6) -- separable1(4) -- bn -- separable2 x2 (5) -- mean -- dense(3)
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", activation="relu", name="depthwise")(image)
    x = layers.SeparableConv2D(4, 3, padding="same", name="separable1")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.SeparableConv2D(5, 3, depth_multiplier=2, activation="relu", name="separable2")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="separable")


def flattening():
    """As in VGG: 4 positions x 3 channels are 12 rows of dense1.

    image(2) -- conv1(4) -- pool -- conv2(3) -- pool -- flat(12) -- dense1(5) -- bn -- dense2(3)
    """
    image = keras.Input((SIZE, SIZE, 2), name="image")
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv1")(image)
    x = layers.AveragePooling2D(2, padding="same", name="pool1")(x)
    x = layers.Conv2D(3, 2, padding="same", name="conv2")(x)
    x = layers.MaxPooling2D(2, padding="same", name="pool2")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(5, activation="tanh", name="dense1")(x)
    x = layers.BatchNormalization(name="bn")(x)
    return keras.Model(image, layers.Dense(3, name="dense2")(x), name="flattening")


def two_inputs():
    """Two images and one vector.

    left(3)  -- conv1(4) --+
                           add(4) --+
    right(2) -- conv2(4) --+        join(7) -- conv4(5) -- flat --+
             \\- conv3(3) ----------+                              join2 -- dense2(3)
    vector(4) -- dense1(6) ---------------------------------------+
    """
    left = keras.Input((SIZE, SIZE, 3), name="left")
    right = keras.Input((SIZE, SIZE, 2), name="right")
    vector = keras.Input((4,), name="vector")
    x = layers.Add(name="add")(
        [layers.Conv2D(4, 3, name="conv1")(left), layers.Conv2D(4, 3, activation="relu", name="conv2")(right)]
    )
    x = layers.Concatenate(name="join")([x, layers.Conv2D(3, 3, name="conv3")(right)])
    x = layers.Conv2D(5, 3, activation="relu", name="conv4")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Concatenate(name="join2")([x, layers.Dense(6, activation="relu", name="dense1")(vector)])
    return keras.Model([left, right, vector], layers.Dense(3, name="dense2")(x), name="two_inputs")


def two_outputs():
    """One output is a map, the other a vector, by name.

    image(3) -- conv1(5) -- relu --+-- conv2(4) -- map(2)           -> "map"
                                   +-- mean -- dense(3)             -> "label"
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(5, 3, padding="same", name="conv1")(image)
    x = layers.ReLU(name="relu")(x)
    y = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv2")(x)
    outputs = {
        "map": layers.Conv2D(2, 1, name="map")(y),
        "label": layers.Dense(3, name="dense")(layers.GlobalMaxPooling2D(name="mean")(x)),
    }
    return keras.Model({"image": image}, outputs, name="two_outputs")


def squeeze_and_excite():
    """The gate has one number per channel, which Multiply broadcasts over space.

    image(3) -- conv1(5) --+-----------------------------------------------------+
                           |                                                     multiply -- conv2(4) -- mean -- dense(3)
                           +-- mean -- reshape(1,1,5) -- reduce(2) -- expand(5) -+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(5, 3, padding="same", name="conv1")(image)
    gate = layers.GlobalAveragePooling2D(name="squeeze")(x)
    gate = layers.Reshape((1, 1, 5), name="reshape")(gate)
    gate = layers.Conv2D(2, 1, activation="relu", name="reduce")(gate)
    gate = layers.Conv2D(5, 1, activation="sigmoid", name="expand")(gate)
    x = layers.Multiply(name="multiply")([x, gate])
    x = layers.Conv2D(4, 3, activation="relu", name="conv2")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="squeeze_and_excite")


def one_dimensional():
    """signal(2) -- conv1(4) -- bn -- pad -- separable(5) -- pool -- depthwise(5) -- flat -- dense(3)."""
    signal = keras.Input((12, 2), name="signal")
    x = layers.Conv1D(4, 3, activation="relu", name="conv1")(signal)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ZeroPadding1D(1, name="pad")(x)
    x = layers.SeparableConv1D(5, 3, name="separable")(x)
    x = layers.MaxPooling1D(2, name="pool")(x)
    x = layers.DepthwiseConv1D(3, name="depthwise")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(signal, layers.Dense(3, name="dense")(x), name="one_dimensional")


def three_dimensional():
    """volume(2) --+-- conv1(4) -- relu -- conv2(3) --+
    |                                  add -- pool -- mean -- dense(3)
    +-- conv0(3) ----------------------+
    """
    volume = keras.Input((4, 4, 4, 2), name="volume")
    x = layers.Conv3D(4, 3, padding="same", activation="relu", name="conv1")(volume)
    x = layers.Conv3D(3, 3, padding="same", name="conv2")(x)
    x = layers.Add(name="add")([layers.Conv3D(3, 1, name="conv0")(volume), x])
    x = layers.AveragePooling3D(2, name="pool")(x)
    x = layers.GlobalAveragePooling3D(name="mean")(x)
    return keras.Model(volume, layers.Dense(3, name="dense")(x), name="three_dimensional")


def u_net():
    """Down, up by a transposed convolution, and joined with what was there before.

    image(3) -- down1(4) --+-- pool -- down2(5) -- bn -- up(3) --+
                           |                                     join(7) -- last(4) -- map(2)
                           +-------------------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    skip = layers.Conv2D(4, 3, padding="same", activation="relu", name="down1")(image)
    x = layers.MaxPooling2D(2, name="pool")(skip)
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="down2")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2DTranspose(3, 2, strides=2, activation="relu", name="up")(x)
    x = layers.Concatenate(name="join")([skip, x])
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="last")(x)
    return keras.Model(image, layers.Conv2D(2, 1, name="map")(x), name="u_net")


def grouped():
    """As in ResNeXt: conv2 has 3 conv groups of 2 inputs and 1 output each.

    image(3) -- conv1(6) -- bn -- conv2(3, groups=3) -- relu -- conv3(4) -- mean -- dense(3)
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same", name="conv1")(image)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2D(3, 3, groups=3, padding="same", name="conv2")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(4, 1, activation="relu", name="conv3")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="grouped")


def shared_layer():
    """The same convolution on both images, and once more on its own output: conv1, twice and twins are tied.

    left(3)  -- conv1(4) -- twins(4) -- twins(4) --+
                                                   join(8) -- mean -- dense(3)
    right(3) -- conv2(4) -- twins(4) --------------+
    """
    left = keras.Input((SIZE, SIZE, 3), name="left")
    right = keras.Input((SIZE, SIZE, 3), name="right")
    twins = layers.Conv2D(4, 3, padding="same", activation="relu", name="twins")
    x = twins(twins(layers.Conv2D(4, 3, padding="same", name="conv1")(left)))
    y = twins(layers.Conv2D(4, 3, padding="same", name="conv2")(right))
    x = layers.Concatenate(name="join")([x, y])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model([left, right], layers.Dense(3, name="dense")(x), name="shared_layer")


def merges():
    """Every elementwise merge, one after the other, each of the trunk (4) with a branch of its own.

    trunk --+-- branch1(3) -- branch2(4) --+
            |                              merge -- trunk
            +------------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", activation="tanh", name="stem")(image)
    for merge in (layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum):
        name = merge.__name__.lower()
        branch = layers.Conv2D(3, 3, padding="same", activation="relu", name=f"{name}1")(x)
        branch = layers.Conv2D(4, 3, padding="same", activation="tanh", name=f"{name}2")(branch)
        x = merge(name=name)([branch, x])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="merges")


def operations():
    """Operations instead of layers, and a Sequential inside.

    image(3) -- conv1(4) --+-- ops.relu -- inner: [conv2(6) -- bn] -- conv3(4) --+
                           |                                                     x + y -- mean -- dense(3)
                           +-----------------------------------------------------+
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv1")(image)
    inner = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 4)),
            layers.Conv2D(6, 3, padding="same", name="conv2"),
            layers.BatchNormalization(name="bn"),
        ],
        name="inner",
    )
    y = layers.Conv2D(4, 3, padding="same", name="conv3")(inner(ops.relu(x)))
    x = layers.GlobalAveragePooling2D(name="mean")(x + y)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="operations")


def sequential():
    """image(3) -- conv1(5) -- prelu -- up -- crop -- flat -- dense1(4) -- dropout -- dense2(3)."""
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(5, 3, name="conv1"),
            layers.PReLU(name="prelu"),
            layers.UpSampling2D(2, name="up"),
            layers.Cropping2D(3, name="crop"),
            layers.Flatten(name="flat"),
            layers.Dense(4, activation="relu", name="dense1"),
            layers.Dropout(0.5, name="dropout"),
            layers.Dense(3, name="dense2"),
        ],
        name="sequential",
    )


def pixel_shuffle():
    """As in super-resolution: 12 channels become 3 channels of twice the height and width.

    image(3) -- conv1(4) -- conv2(12) -- reshape(.., 2, 2, 3) -- transpose -- reshape(3) -- conv3(5) -- map(2)
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv1")(image)
    x = layers.Conv2D(12, 3, padding="same", name="conv2")(x)
    x = layers.Reshape((SIZE, SIZE, 2, 2, 3), name="split")(x)
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    x = layers.Reshape((2 * SIZE, 2 * SIZE, 3), name="shuffle")(x)
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="conv3")(x)
    return keras.Model(image, layers.Conv2D(2, 1, name="map")(x), name="pixel_shuffle")


def intermediate_outputs():
    """As for a feature pyramid or distillation: two layers on the way are outputs too, and one output stands twice.

    image(3) -- conv1(5) -- relu --+-- conv2(4) -- bn --+-- conv3(6) -- mean -- dense(3)
                                   |                    |
                                  out                  out
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    first = layers.ReLU(name="relu")(layers.Conv2D(5, 3, padding="same", name="conv1")(image))
    second = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv2")(first))
    x = layers.Conv2D(6, 3, activation="relu", name="conv3")(second)
    last = layers.Dense(3, name="dense")(layers.GlobalAveragePooling2D(name="mean")(x))
    return keras.Model(image, [first, last, second, last], name="intermediate_outputs")


def channels_first():
    """residual_identity with the channels in front, and Flatten in place of the mean."""
    first = {"padding": "same", "data_format": "channels_first"}
    image = keras.Input((3, SIZE, SIZE), name="image")
    stem = layers.Conv2D(4, 3, activation="relu", **first, name="stem")(image)
    x = layers.Conv2D(5, 3, **first, name="conv1")(stem)
    x = layers.BatchNormalization(axis=1, name="bn1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(4, 3, **first, name="conv2")(x)
    x = layers.BatchNormalization(axis=1, name="bn2")(x)
    x = layers.Add(name="add")([x, stem])
    x = layers.Flatten(data_format="channels_first", name="flat")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="channels_first")


def transformer():
    """A vision transformer's block: normalization pins the trunk, whole heads and the inside of the MLP may go.

    image(3) -- patches(4) -- flat --+-- norm1 -- attention(2 heads) --+
                                     |                                 add1 --+-- norm2 -- inner(5) -- outer(4) --+
                                     +---------------------------------+      |                                   add2 -- ...
                                                                              +-----------------------------------+
    ... -- norm3 -- mean -- dense(3)
    """
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Conv2D(4, 2, strides=2, name="patches")(image)
    x = layers.Reshape((9, 4), name="flat")(x)
    y = layers.LayerNormalization(name="norm1")(x)
    x = layers.Add(name="add1")([x, layers.MultiHeadAttention(2, 3, name="attention")(y, y)])
    y = layers.LayerNormalization(name="norm2")(x)
    y = layers.Dense(5, activation="gelu", name="inner")(y)
    x = layers.Add(name="add2")([x, layers.Dense(4, name="outer")(y)])
    x = layers.LayerNormalization(name="norm3")(x)
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="dense")(x), name="transformer")


def channels_first_u_net():
    """u_net with a depthwise layer and a gate per channel, all with the channels in front.

    image(3) -- down1(4) --+-- depthwise -- pool -- down2(5) -- bn --+-------- multiply -- up(3) --+
                           |                                         +-- mean -- gate(5) --+       |
                           +-------------------------------------------------------------------- join(7) -- last(4) -- map(2)
    """
    first = {"data_format": "channels_first"}
    image = keras.Input((3, SIZE, SIZE), name="image")
    skip = layers.Conv2D(4, 3, padding="same", activation="relu", **first, name="down1")(image)
    x = layers.DepthwiseConv2D(3, padding="same", **first, name="depthwise")(skip)
    x = layers.MaxPooling2D(2, **first, name="pool")(x)
    x = layers.SeparableConv2D(5, 3, padding="same", activation="relu", **first, name="down2")(x)
    x = layers.BatchNormalization(axis=1, name="bn")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True, **first, name="mean")(x)
    gate = layers.Conv2D(5, 1, activation="sigmoid", **first, name="gate")(gate)
    x = layers.Multiply(name="multiply")([x, gate])
    x = layers.Conv2DTranspose(3, 2, strides=2, activation="relu", **first, name="up")(x)
    x = layers.Concatenate(axis=1, name="join")([skip, x])
    x = layers.Conv2D(4, 3, padding="same", activation="relu", **first, name="last")(x)
    return keras.Model(image, layers.Conv2D(2, 1, **first, name="map")(x), name="channels_first_u_net")


def channels_first_volume():
    """A signal and a volume with the channels in front.

    signal(2) -- conv1(4) -- bn -- pool -- flat1 --+
                                                   join -- dense(3)
    volume(2) -- conv2(3) -- relu -- flat2 --------+
    """
    first = {"data_format": "channels_first"}
    signal, volume = keras.Input((2, 12), name="signal"), keras.Input((2, 4, 4, 4), name="volume")
    x = layers.Conv1D(4, 3, **first, name="conv1")(signal)
    x = layers.BatchNormalization(axis=1, name="bn")(x)
    x = layers.AveragePooling1D(2, **first, name="pool")(x)
    x = layers.Flatten(**first, name="flat1")(x)
    y = layers.ReLU(name="relu")(layers.Conv3D(3, 3, **first, name="conv2")(volume))
    y = layers.Flatten(**first, name="flat2")(y)
    x = layers.Concatenate(name="join")([x, y])
    return keras.Model([signal, volume], layers.Dense(3, name="dense")(x), name="channels_first_volume")


EVERYWHERE = (
    plain,
    residual_identity,
    residual_projection,
    preactivation,
    concatenating,
    inverted_residual,
    separable,
    flattening,
    two_inputs,
    two_outputs,
    squeeze_and_excite,
    one_dimensional,
    three_dimensional,
    u_net,
    grouped,
    shared_layer,
    merges,
    operations,
    sequential,
    transformer,
    pixel_shuffle,
    intermediate_outputs,
)
CHANNELS_FIRST = (channels_first, channels_first_u_net, channels_first_volume)
BUILDERS = {builder.__name__: builder for builder in (*EVERYWHERE, *CHANNELS_FIRST)}
NAMES = [builder.__name__ for builder in EVERYWHERE]
# TensorFlow's CPU kernels know no channels_first convolution.
PARAMETERS = [
    *NAMES,
    *(pytest.param(builder.__name__, marks=pytest.mark.only_on("jax", "torch")) for builder in CHANNELS_FIRST),
]


@functools.cache
def build(name):
    """A tiny network with random weights; built once, so leave its weights alone."""
    return randomize(BUILDERS[name](), seed=1)


def randomize(model, seed):
    """Gives every weight a random value, so that no constant folds to 0: kernels of He's scale, gammas and variances around 1."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed_generator" in variable.path:
            continue
        shape, name = tuple(variable.shape), variable.name
        if name in ("gamma", "variance", "moving_variance", "moving_stddev", "renorm_stddev"):
            value = random.uniform(0.5, 1.5, shape)
        elif name.endswith("kernel"):
            value = random.normal(0, np.sqrt(2 / max(1, _fan_in(name, shape))), shape)
        else:
            value = random.normal(0, 0.3, shape)
        variable.assign(value)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()
    return model


def _fan_in(name, shape):
    depthwise = name == "depthwise_kernel"
    return int(np.prod(shape[:-2] if depthwise else shape[:-1]))


def examples(model, count=4, seed=0):
    """Random inputs for a model, nested as it takes them; sizes that are unknown become 8."""
    random = np.random.default_rng(seed)
    return keras.tree.map_structure(
        lambda tensor: random.normal(0, 1, (count, *(size or 8 for size in tensor.shape[1:]))).astype("float32"),
        model.inputs[0] if isinstance(model, keras.Sequential) else model.input,
    )


@contextlib.contextmanager
def weights_stay(model):
    """What is done inside leaves all weights of a model as they are."""
    before = [ops.convert_to_numpy(value).copy() for value in model.weights]
    yield
    for value, expected in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(value), expected, err_msg=value.path)


def outputs(model, inputs):
    """The model's outputs in inference, a flat list of arrays."""
    return [ops.convert_to_numpy(output) for output in keras.tree.flatten(model(inputs, training=False))]
