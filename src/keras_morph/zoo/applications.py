"""The architectures of the Model Zoo, and every other one of `keras.applications`, by name.

`build` puts the Model Zoo's head on a network without its top: global average pooling, a hidden Dense layer, one Dense
layer per class. The names of all layers depend on the architecture alone: Keras numbers anonymous layers (`conv2d_7`;
Inception, NASNet, Xception and others have them) through the whole process, so that a second build would not fit the
first one's structure; here every build starts to count at zero, as after `keras.utils.clear_session()`.
"""

__all__ = ["NAMES", "build", "known_names", "minimum_size"]

import collections
import contextlib
import difflib
import inspect
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state

from keras_morph.errors import KerasMorphError
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

_MINIMUM_SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
_KERAS_MINIMUM = 32
# Two stages halve the image; below 4 pixels the last one would convolve mostly padding.
_SMALL_MINIMUM = 4


def known_names() -> tuple[str, ...]:
    """List every name that `build` takes: the Model Zoo's, the small networks, the rest of `keras.applications`."""
    rest = sorted(
        name
        for name, value in vars(keras.applications).items()
        if inspect.isfunction(value) and name[0].isupper() and name not in NAMES
    )
    return (*NAMES, *SMALL_NETWORKS, *rest)


def minimum_size(name: str) -> int:
    """Give the smallest height and width of an image, in pixels, that an architecture takes.

    Raises:
        KerasMorphError: If there is no such architecture.
    """
    _check_name(name)
    return _SMALL_MINIMUM if name in SMALL_NETWORKS else _MINIMUM_SIZES.get(name, _KERAS_MINIMUM)


def build(
    name: str,
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    classifier_activation: str | None = "softmax",
    head: int | None = 1024,
) -> keras.Model:
    """Build an architecture with fresh weights, for images whose values lie in [0, 1].

    Args:
        name: One of `known_names()`.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.
        classes: Number of outputs.
        classifier_activation: Activation of the last layer, named `logits`; `None` returns logits.
        head: Width of the hidden Dense layer in front of it, named `head`; `None` leaves it out. The small networks
            have none in any case.

    Returns:
        An uncompiled functional model that carries the architecture's name.

    Raises:
        KerasMorphError: If there is no such architecture, if the images are too small for it, if a number is not
            positive, or if Keras does not build it on this backend.
    """
    _check_name(name)
    _check_shape(name, input_shape)
    for option, value in (("classes", classes), ("head", head)):
        if value is not None and value < 1:
            msg = f"{option}: expected a positive number, received {value}"
            raise KerasMorphError(msg)
    with _fresh_names():
        if name in SMALL_NETWORKS:
            return SMALL_NETWORKS[name](input_shape, classes, classifier_activation=classifier_activation)
        backbone = _backbone(name, input_shape)
        x = keras.layers.GlobalAveragePooling2D(name="global_average_pooling")(backbone.output)
        if head is not None:
            x = keras.layers.Dense(head, activation="relu", name="head")(x)
        outputs = keras.layers.Dense(classes, activation=classifier_activation, name="logits")(x)
        return keras.Model(backbone.input, outputs, name=name)


def _backbone(name: str, input_shape: tuple[int, int, int]) -> keras.Model:
    function = getattr(keras.applications, name)
    options = {"include_top": False, "weights": None, "input_shape": input_shape}
    if "include_preprocessing" in inspect.signature(function).parameters:
        options["include_preprocessing"] = False
    elif name.startswith("EfficientNetB"):
        # These always divide by 255; our images are in [0, 1] already, and the rest would drown in the first
        # BatchNormalization's epsilon.
        image = keras.Input(input_shape)
        options["input_tensor"] = keras.layers.Rescaling(255.0, name="to_0_255")(image)
    try:
        return function(**options)
    except ValueError as error:
        reason = " ".join(str(error).split())
        msg = f"{name}: Keras {keras.__version__} does not build it on {keras.backend.backend()}: {reason}"
        raise KerasMorphError(msg) from error


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
    minimum = minimum_size(name)
    if any(side is not None and side < minimum for side in input_shape[first : first + 2]):
        advice = f"enlarge the images (image_size={minimum})"
        if name not in SMALL_NETWORKS:
            advice += f" or choose a small network ({', '.join(SMALL_NETWORKS)})"
        msg = (
            f"{name}: expected images of at least {minimum}x{minimum} pixels, "
            f"received input_shape={tuple(input_shape)}; {advice}"
        )
        raise KerasMorphError(msg)


@contextlib.contextmanager
def _fresh_names() -> Iterator[None]:
    """Let Keras number the anonymous layers that are built inside from zero.

    Afterwards each counter stands at the larger of its two values, so that a layer which the user adds to the model
    gets a name that is still free in it.
    """
    before = global_state.get_global_attribute("object_name_uids") or {}
    global_state.set_global_attribute("object_name_uids", collections.defaultdict(int))
    try:
        yield
    finally:
        inside = global_state.get_global_attribute("object_name_uids")
        merged = {key: max(before.get(key, 0), inside.get(key, 0)) for key in {*before, *inside}}
        global_state.set_global_attribute("object_name_uids", collections.defaultdict(int, merged))
