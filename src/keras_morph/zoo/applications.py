"""The architectures of the Model Zoo, and every other one of `keras.applications`, by name.

`build` puts the Model Zoo's head on a network without its top: global average pooling, a hidden Dense layer, one Dense
layer per class. The names of all layers depend on the architecture alone: Keras numbers anonymous layers (`conv2d_7`;
Inception, NASNet, Xception and others have them) through the whole process, so that a second build would not fit the
first one's structure; here every build starts to count at zero, as after `keras.utils.clear_session()`.
"""

__all__ = ["NAMES", "WITHOUT_GAMMA", "build", "known_names", "minimum_size"]

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import count_names_anew
from keras_morph.zoo.small import SMALL_NETWORKS

NAMES = (
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "ResNet50V2",
    "ResNet101V2",
    "ResNet152V2",
    "VGG16",
    "VGG19",
    "Xception",
    "InceptionV3",
    "InceptionResNetV2",
    "MobileNet",
    "MobileNetV2",
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "NASNetLarge",
    "NASNetMobile",
)
"""The Model Zoo's architectures in the order of its document, which lists ResNet101V2 twice."""

WITHOUT_GAMMA = frozenset(
    {"VGG16", "VGG19", "InceptionV3", "InceptionResNetV2"}
    | {f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")}
)
"""Architectures without a gamma: no BatchNormalization at all, or only such as say `scale=False`."""

_MINIMUM_SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
_KERAS_MINIMUM = 32
# Two stages halve the image; below 4 pixels the last one would convolve mostly padding.
_SMALL_MINIMUM = 4


def known_names() -> tuple[str, ...]:
    """List every name that `build` takes: the Model Zoo's, the small networks, the rest of `keras.applications`.

    Example:
        >>> {"ResNet50", "DigitsResNet", "EfficientNetB0"} <= set(km.zoo.known_names())
        True
    """
    rest = sorted(
        name
        for name, value in vars(keras.applications).items()
        if inspect.isfunction(value) and name[0].isupper() and name not in NAMES
    )
    return (*NAMES, *SMALL_NETWORKS, *rest)


def minimum_size(base_model: str | Callable[..., keras.Model]) -> int:
    """Give the smallest height and width of an image, in pixels, that an architecture takes.

    Raises:
        KerasMorphError: If there is no such architecture.

    Example:
        >>> km.zoo.minimum_size("InceptionV3")
        75
    """
    name, _ = _named(base_model)
    if name in SMALL_NETWORKS:
        return _SMALL_MINIMUM
    return _MINIMUM_SIZES.get(name, _KERAS_MINIMUM) if hasattr(keras.applications, name) else 1


def build(
    base_model: str | Callable[..., keras.Model],
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    classifier_activation: str | None = "softmax",
    head: int | None = 1024,
) -> keras.Model:
    """Build an architecture with fresh weights, for images whose values lie in [0, 1].

    Args:
        base_model: One of `known_names()`, or a callable like a `keras.applications` function. It gets those of
            `include_top=False`, `weights=None` and `input_shape` that it takes, and returns a functional or Sequential
            model whose output is feature maps.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.
        classes: Number of outputs.
        classifier_activation: Activation of the last layer, named `logits`; `None` returns logits. This layer computes
            in float32 under a mixed precision policy too.
        head: Width of the hidden Dense layer in front of it, named `head`; `None` leaves it out. The small networks
            have none in any case.

    Returns:
        An uncompiled functional model that carries the architecture's name.

    Raises:
        KerasMorphError: If there is no such architecture, if the images are too small for it, if a number is not
            positive, if Keras does not build it on this backend, or if a callable returns no feature maps.

    Example:
        >>> seed = km.zoo.build("MobileNet", input_shape=(32, 32, 3), classes=7)
        >>> seed.name, seed.output_shape
        ('MobileNet', (None, 7))
    """
    name, function = _named(base_model)
    _check_shape(name, input_shape)
    for option, value in (("classes", classes), ("head", head)):
        if value is not None and value < 1:
            msg = f"{option}: expected a positive number, received {value}"
            raise KerasMorphError(msg)
    with count_names_anew():
        if name in SMALL_NETWORKS:
            return SMALL_NETWORKS[name](input_shape, classes, classifier_activation=classifier_activation)
        backbone = _backbone(name, function, input_shape)
        x = keras.layers.GlobalAveragePooling2D(name="global_average_pooling")(backbone.outputs[0])
        if head is not None:
            x = keras.layers.Dense(head, activation="relu", name="head")(x)
        outputs = keras.layers.Dense(
            classes, activation=classifier_activation, name="logits", dtype=keras.config.dtype_policy().variable_dtype
        )(x)
        return keras.Model(backbone.inputs[0], outputs, name=name)


def _named(base_model: str | Callable[..., keras.Model]) -> tuple[str, Callable[..., keras.Model]]:
    """An architecture's name, under which the zoo may know more about it, and what builds it."""
    if callable(base_model):
        name = getattr(base_model, "__name__", type(base_model).__name__)
        if not name.isidentifier():  # a lambda
            name = "base_model"
        ours = SMALL_NETWORKS.get(name) or getattr(keras.applications, name, None)
        return (f"{name}_of_yours" if ours not in (None, base_model) else name), base_model
    _check_name(base_model)
    return base_model, SMALL_NETWORKS.get(base_model) or getattr(keras.applications, base_model)


def _backbone(name: str, function: Callable[..., keras.Model], input_shape: tuple[int, int, int]) -> keras.Model:
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {"include_top": False, "weights": None, "input_shape": input_shape}
    required = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if missing := [each for each in required if each not in options]:
        msg = (
            f"{name}: expected a function that takes input_shape (and include_top, weights) and returns feature maps. Received: "
            f"one that needs {', '.join(missing)} too."
        )
        raise KerasMorphError(msg)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        options = {option: value for option, value in options.items() if option in parameters}
    if "include_preprocessing" in parameters:
        options["include_preprocessing"] = False
    elif name.startswith("EfficientNetB"):
        # These always divide by 255; our images are in [0, 1] already, and the rest would drown in the first
        # BatchNormalization's epsilon.
        image = keras.Input(input_shape)
        options["input_tensor"] = keras.layers.Rescaling(255.0, name="to_0_255")(image)
    try:
        backbone = function(**options)
    except ValueError as error:
        reason = " ".join(str(error).split())
        msg = f"{name}: Keras {keras.__version__} does not build it on {keras.backend.backend()}: {reason}"
        raise KerasMorphError(msg) from error
    outputs = getattr(backbone, "outputs", None) or []
    if len(outputs) != 1 or len(outputs[0].shape) != 4:  # images, height, width, channels
        found = f"outputs of shape {[output.shape for output in outputs]}" if outputs else type(backbone).__name__
        msg = f"{name}: expected a functional model whose one output is feature maps (no top), received {found}"
        raise KerasMorphError(msg)
    return backbone


def _check_name(name: str) -> None:
    names = known_names()
    if name in names:
        return
    lowered = {known.lower(): known for known in names}
    close = [lowered[match] for match in difflib.get_close_matches(str(name).lower(), lowered, n=3)]
    advice = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"
    msg = f"model: expected the name of an architecture, received {name!r}; {advice}"
    raise KerasMorphError(msg)


def _check_shape(name: str, input_shape: tuple[int, int, int]) -> None:
    if len(input_shape) != 3:  # height, width, channels
        msg = f"input_shape: expected (height, width, channels), received {tuple(input_shape)}"
        raise KerasMorphError(msg)
    first = keras.config.image_data_format() == "channels_first"
    minimum = minimum_size(name) if name in known_names() else 1
    if any(side is not None and side < minimum for side in input_shape[first : first + 2]):
        advice = f"enlarge the images (image_size={minimum})"
        if name not in SMALL_NETWORKS:
            advice += f" or choose a small network ({', '.join(SMALL_NETWORKS)})"
        msg = (
            f"{name}: expected images of at least {minimum}x{minimum} pixels, "
            f"received input_shape={tuple(input_shape)}; {advice}"
        )
        raise KerasMorphError(msg)
