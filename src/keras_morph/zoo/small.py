"""Small residual networks: ResNet20 and ResNet56 for 32x32 images, and a smaller one for scikit-learn's 8x8 digits.

The networks of He et al. 2015 (https://arxiv.org/abs/1512.03385), section 4.2: a 3x3 convolution, three stages of
`n = (depth - 2) / 6` blocks with widths w, 2w and 4w, average pooling, one Dense layer. Where a block changes the
shape, the shortcut is a 1x1 convolution with BatchNormalization (option B of the paper). There is no weight decay: what
shrinks the weights here is the MorphNet penalty.

Every layer is named, so that structures of two runs can be compared line by line.
"""

__all__ = ["SMALL_NETWORKS", "digits_resnet", "resnet20", "resnet56", "resnet_cifar"]

from collections.abc import Callable

import keras
from keras import layers

from keras_morph.errors import KerasMorphError

Shape = tuple[int, int, int]


def resnet_cifar(
    depth: int,
    *,
    input_shape: Shape = (32, 32, 3),
    classes: int = 10,
    width: int = 16,
    classifier_activation: str | None = "softmax",
    name: str | None = None,
) -> keras.Model:
    """Build a residual network of basic blocks.

    Args:
        depth: Number of layers with weights on the longest path, 6n + 2: 8, 14, 20, 32, 44, 56, ...
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.
        classes: Number of outputs.
        width: Channels of the first stage; the second has twice as many, the third four times.
        classifier_activation: Activation of the last layer; `None` returns logits.
        name: Name of the model; `ResNet{depth}` if not given.

    Returns:
        An uncompiled functional model with fresh weights.

    Raises:
        KerasMorphError: If no network has this depth.

    Example:
        >>> km.zoo.resnet_cifar(14, classes=100).output_shape
        (None, 100)
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        msg = f"depth: expected 6n + 2 (8, 14, 20, ..., 56), received {depth}; take {max(8, depth - rest)}"
        raise KerasMorphError(msg)

    inputs = keras.Input(input_shape, name="image")
    x = _conv_bn(inputs, width, name="stem", number="", size=3)
    x = layers.ReLU(name="stem_relu")(x)
    for stage in (1, 2, 3):
        for block in range(1, blocks + 1):
            x = _basic_block(
                x,
                width * 2 ** (stage - 1),
                strides=2 if stage > 1 and block == 1 else 1,
                name=f"stage{stage}_block{block}",
            )
    x = layers.GlobalAveragePooling2D(name="global_average_pooling")(x)
    # In float32 under a mixed precision policy too.
    dtype = keras.config.dtype_policy().variable_dtype
    outputs = layers.Dense(classes, activation=classifier_activation, name="logits", dtype=dtype)(x)
    return keras.Model(inputs, outputs, name=name or f"ResNet{depth}")


def resnet20(
    input_shape: Shape = (32, 32, 3), classes: int = 10, *, classifier_activation: str | None = "softmax"
) -> keras.Model:
    """Build ResNet20 of He et al.: 0.27 million parameters and 82 million FLOPs at 32x32.

    Example:
        >>> km.zoo.resnet20().count_params()
        274042
    """
    return resnet_cifar(
        20, input_shape=input_shape, classes=classes, classifier_activation=classifier_activation, name="ResNet20"
    )


def resnet56(
    input_shape: Shape = (32, 32, 3), classes: int = 10, *, classifier_activation: str | None = "softmax"
) -> keras.Model:
    """Build ResNet56 of He et al.: 0.86 million parameters and 252 million FLOPs at 32x32.

    Example:
        >>> km.zoo.resnet56().name
        'ResNet56'
    """
    return resnet_cifar(
        56, input_shape=input_shape, classes=classes, classifier_activation=classifier_activation, name="ResNet56"
    )


def digits_resnet(
    input_shape: Shape = (8, 8, 1), classes: int = 10, *, classifier_activation: str | None = "softmax"
) -> keras.Model:
    """Build a ResNet8 that learns scikit-learn's digits within seconds: the network of examples and tests.

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> seed.input_shape, seed.count_params()
        ((None, 8, 8, 1), 78426)
    """
    return resnet_cifar(
        8, input_shape=input_shape, classes=classes, classifier_activation=classifier_activation, name="DigitsResNet"
    )


SMALL_NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "ResNet20": resnet20,
    "ResNet56": resnet56,
    "DigitsResNet": digits_resnet,
}


def _basic_block(x: keras.KerasTensor, width: int, *, strides: int, name: str) -> keras.KerasTensor:
    shortcut = x
    if strides != 1 or x.shape[_channel_axis()] != width:
        shortcut = _conv_bn(x, width, name=f"{name}_shortcut", number="", size=1, strides=strides)
    x = _conv_bn(x, width, name=name, number="1", size=3, strides=strides)
    x = layers.ReLU(name=f"{name}_relu1")(x)
    x = _conv_bn(x, width, name=name, number="2", size=3)
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_relu2")(x)


def _conv_bn(
    x: keras.KerasTensor, width: int, *, name: str, number: str, size: int, strides: int = 1
) -> keras.KerasTensor:
    x = layers.Conv2D(
        width,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv{number}",
    )(x)
    return layers.BatchNormalization(axis=_channel_axis(), momentum=0.9, name=f"{name}_bn{number}")(x)


def _channel_axis() -> int:
    return 1 if keras.config.image_data_format() == "channels_first" else -1
