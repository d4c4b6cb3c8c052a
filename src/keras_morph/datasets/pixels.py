"""The range of pixels that a model takes: read off what stands in front of its weights, or tried on labelled images.

Data sets hold values in [0, 1]. A model that was trained on others tells no class from another on these.
"""

__all__ = ["PIXELS", "Choice", "Pixels", "choose_pixels", "front_of"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_morph.errors import DataError
from keras_morph.keras_internals import graph_in, nodes_of, parts_of

TRIED = 256  # images that each range is tried on: a difference of 10 % is three standard errors
_SURE = 3  # standard errors by which a model has to beat the most frequent class
# Between 1 / 128, the smallest usual factor for pixels from 0 to 255 that is not 1 / 255, and 1: a geometric mean.
_SMALL_FACTOR = 1 / 12


@dataclass(frozen=True)
class Pixels:
    """A range of pixels: what a model reads where an image in [0, 1] is meant.

    Attributes:
        name: what `--pixels` calls it.
        scale, offset: `x * scale + offset` for a value x in [0, 1]; one number, or one per colour.
        reverse: colours come as blue, green, red. Scale and offset are in that order too.

    Example:
        >>> km.datasets.PIXELS["0-255"](np.array([[[[0.2]]]], np.float32)).item()
        51.0
    """

    name: str
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0
    reverse: bool = False

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Give float32 images `(n, height, width, channels)` in [0, 1] in this range.

        Raises:
            DataError: If the range is defined for colours and the images are grey.
        """
        if self.name == "0-1":
            return images
        self.check(images.shape)
        images = images[..., ::-1] if self.reverse else images
        result = images * np.asarray(self.scale, np.float32)
        result += np.asarray(self.offset, np.float32)
        return result

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images that this range is not defined for; the last length of their shape is the number of colours.

        Raises:
            DataError: If the range is defined for colours and the images are grey.
        """
        if isinstance(self.scale, tuple) and shape[-1] != len(self.scale):
            msg = f"pixels: expected images of {len(self.scale)} colours for {self.name}, received {shape[-1]}"
            raise DataError(msg)


_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, in [0, 1]

PIXELS: Mapping[str, Pixels] = {
    pixels.name: pixels
    for pixels in (
        Pixels("0-1"),
        Pixels("0-255", 255.0),
        Pixels("-1-1", 2.0, -1.0),
        # What `preprocess_input` of keras.applications calls so: ResNet and VGG take the first, DenseNet the second.
        Pixels("caffe", (255.0,) * 3, (-103.939, -116.779, -123.68), reverse=True),
        Pixels(
            "torch", tuple(1 / d for d in _DEVIATION), tuple(-m / d for m, d in zip(_MEAN, _DEVIATION, strict=True))
        ),
    )
}
"""The ranges by name: `0-1`, `0-255`, `-1-1`, and `caffe` and `torch` as in `preprocess_input` of keras.applications."""


@dataclass(frozen=True)
class Choice:
    """A range, and why it was chosen; prints as one line.

    Example:
        >>> print(km.datasets.choose_pixels(model, images).why)
        nothing in front of the model scales them; --pixels says otherwise
    """

    pixels: Pixels
    why: str

    def __str__(self) -> str:
        return f"pixels {self.pixels.name}: {self.why}"


def choose_pixels(model: keras.Model, images: np.ndarray, labels: np.ndarray | None = None) -> Choice:
    """Find out which range of pixels a model takes.

    What stands in front of the first weights says it where it scales pixels (Rescaling, Normalization, operations,
    layers of your own without weights, also in nested models). Else each range is tried on labelled images: the model
    that was trained on one of them has the smallest loss there. Where none is better than guessing, it is 0-1.

    Args:
        model: A model of one input.
        images: float32 of shape `(n, height, width, channels)` with values in [0, 1]; up to 256 are looked at.
        labels: Class numbers of shape `(n,)`; without them nothing is tried.

    Example:
        >>> front = keras.layers.Rescaling(1 / 255, name="rescaling")
        >>> seed = keras.Sequential([keras.Input((8, 8, 1)), front, keras.layers.Conv2D(4, 3)])
        >>> print(km.datasets.choose_pixels(seed, np.zeros((1, 8, 8, 1), np.float32)))
        pixels 0-255: they become 0 to 1 in front of the model's weights (rescaling)
    """
    images = np.asarray(images[:TRIED])
    if keras.backend.is_int_dtype(model.inputs[0].dtype):
        return Choice(PIXELS["0-255"], f"the model's input is {model.inputs[0].dtype}")
    found = _read_off(model, images.shape[1:])
    if found is not None:
        return found
    if labels is None or not len(images):
        return Choice(PIXELS["0-1"], "nothing in front of the model scales them; --pixels says otherwise")
    return _tried(model, images, np.asarray(labels[:TRIED]))


def _read_off(model: keras.Model, shape: tuple[int, ...]) -> Choice | None:
    """By what becomes of images of one value: which value becomes 0, and how fast values grow from there."""
    names, models = front_of(model)
    if not models:
        return None
    try:
        x = np.broadcast_to(np.array([0, 1, 255], np.float32)[:, None, None, None], (3, *shape))
        for each in models:
            x = each.predict_on_batch(x)
        zero, one, white = np.asarray(x, np.float64).reshape(3, -1)
    except Exception:  # whatever a user's layer raises on an image of its input's shape
        return None
    slopes = one - zero
    # At borders, padding leaves zeros.
    moved = slopes != 0
    if not moved.any() or not np.allclose(white - zero, 255 * slopes, rtol=1e-2, atol=1e-3):
        return None
    slope, start = (
        float(np.median(np.abs(slopes[moved]))),
        float(np.median((-zero / np.where(moved, slopes, 1))[moved])),
    )
    if np.isclose(slope, 1) and np.isclose(start, 0, atol=1e-6):
        return None
    if start > 1 or (start >= 0 and slope < _SMALL_FACTOR):
        name, low, high = "0-255", zero, white
    elif start >= 0:
        name, low, high = "0-1", zero, one
    else:
        return None
    ends = np.stack([low, high])[:, moved]
    made = f"{ends.min():.3g} to {ends.max():.3g}"
    return Choice(PIXELS[name], f"they become {made} in front of the model's weights ({', '.join(names[-3:])})")


def front_of(model: Any) -> tuple[list[str], list[keras.Model]]:
    """What a model does to images before its first weights; statistics of Normalization are none.

    Returns:
        Names of the layers and operations, and the models that do it, one after the other: from a nested model the
        part in front of its weights follows the part of the outer one. Nothing, if there is no graph to read.
    """
    function = graph_in(model)
    if function is None or len(function.inputs) != 1:
        return [], []
    names: list[str] = []
    for node in nodes_of(function):
        layer = node.operation
        if isinstance(layer, keras.layers.InputLayer):
            continue
        if _prepares(layer):
            names.append(layer.name)
            continue
        (tensor, *others) = node.arguments.keras_tensors
        here = [] if tensor is function.inputs[0] else [keras.Model(function.inputs[0], tensor)]
        inner_names, inner = ([], []) if others else front_of(layer)
        return names + inner_names, here + inner
    return [], []


def _prepares(layer: Any) -> bool:
    """A layer or operation whose only weights are the statistics of a Normalization."""
    if not isinstance(layer, keras.Layer):
        return True
    parts = [part for part in parts_of(layer) if isinstance(part, keras.layers.Normalization)]
    statistics = {id(weight) for part in parts for weight in part.weights}
    return all(id(weight) in statistics for weight in layer.weights)


def _tried(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> Choice:
    """The range with the smallest loss, of those whose accuracy is that of the best one."""
    count = len(images)
    ranges = [p for p in PIXELS.values() if not isinstance(p.scale, tuple) or images.shape[-1] == len(p.scale)]
    scores = np.stack([_log_probabilities(model.predict(p(images), batch_size=64, verbose=0)) for p in ranges])
    if labels.max() >= scores.shape[-1]:
        classes, given = labels.max() + 1, scores.shape[-1]
        return Choice(
            PIXELS["0-1"], f"the model's {given} output{'s' * (given > 1)} cannot be tried on {classes} classes"
        )
    right = (scores.argmax(axis=-1) == labels).mean(axis=-1)
    losses = -np.take_along_axis(scores, labels[None, :, None], axis=-1).mean(axis=(1, 2))
    guess = np.bincount(labels).max() / count
    error = np.sqrt(max(guess * (1 - guess), 1 / count) / count)
    if not np.isfinite(losses).any() or right.max() < guess + _SURE * error:
        return Choice(
            PIXELS["0-1"],
            f"on {count} training images the model is not better than guessing in any range; --pixels says otherwise",
        )
    candidates = right >= right.max() - _SURE * np.sqrt(right.max() * (1 - right.max()) / count)
    best = int(np.argmin(np.where(candidates, losses, np.inf)))
    others = ", ".join(f"{right[i]:.1%} at {p.name}" for i, p in enumerate(ranges) if i != best)
    return Choice(ranges[best], f"the model tells {right[best]:.1%} of {count} training images right ({others})")


def _log_probabilities(outputs: np.ndarray) -> np.ndarray:
    """Of class scores, `(n, classes)`, which are probabilities where they are positive and add up to 1."""
    outputs = np.asarray(outputs, np.float64).reshape(len(outputs), -1)
    if (outputs >= 0).all() and np.allclose(outputs.sum(axis=-1), 1, atol=1e-3):
        return np.log(np.maximum(outputs, 1e-12))
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
