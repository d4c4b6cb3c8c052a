"""What a data set is, and how one is cut: limit, validation part, test part, each with every class in proportion.

A source hands over `Examples`: labels that are known at once, and images that are fetched only for the chosen ones. So
a limit of 2,000 costs 2,000 decoded images, however large the archive is; and images that would fill the memory are
decoded batch by batch while a model trains.
"""

__all__ = ["Dataset", "Examples", "Source", "assemble", "check_rank", "integer_labels", "resize", "unit_images"]

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_morph.datasets.pixels import PIXELS, Pixels
from keras_morph.datasets.streams import SHARE, Batches, Images, fits
from keras_morph.devices import padded
from keras_morph.errors import DataError
from keras_morph.machine import free_memory
from keras_morph.processes import here

# The test part does not depend on the user's seed: runs with different seeds are compared on the same images.
_TEST_SEED = 0
_TEST_SPLIT = 0.2
# More outputs than this are a mistake in the labels, and would be one of several gigabytes.
_LAST_LABEL = 65_535
# A small part of a data set may lack classes; more than half and this many are labels that are no numbers of classes.
_ABSENT = 100


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images for training, validation and test.

    Images are float32 of shape `(n, height, width, channels)` with values in [0, 1], or in the range of `pixels`; labels
    are int32 of shape `(n,)` and index `class_names`. Images that would fill the memory stay on disk: `Images`, which are
    indexed like arrays and decoded then.

    Attributes:
        notes: What was found or left out, and whether images are in memory; one line each.

    Example:
        >>> images = km.datasets.load("digits", limit=100)
        >>> images
        Dataset(digits: 90 training, 10 validation and 100 test images of 8x8x1, 10 classes)
        >>> images.resized((16, 16)).image_shape
        (16, 16, 1)
    """

    name: str
    x_train: Any
    y_train: np.ndarray
    x_val: Any
    y_val: np.ndarray
    x_test: Any
    y_test: np.ndarray
    class_names: tuple[str, ...]
    pixels: Pixels = PIXELS["0-1"]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: height, width, channels."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels

    @property
    def streamed(self) -> bool:
        """Whether images stay on disk and are decoded batch by batch."""
        return isinstance(self.x_train, Images)

    def training(self, batch_size: int, seed: int, *, examples: int | None = None) -> Any:
        """Give the first `examples` training images as `shrink` and `fit` take them: a pair of arrays, or `Batches`."""
        x, y = self.x_train[:examples], self.y_train[:examples]
        return Batches(x, y, batch_size, seed=seed) if self.streamed else (x, y)

    def validation(self, batch_size: int, *, devices: int = 1) -> Any:
        """Give the validation images likewise, in their order; `None` if there are none.

        Args:
            batch_size: Images per batch.
            devices: Number that share a batch; images of weight 0 make it a multiple. Several processes get a part each.
        """
        if not len(self.y_val):
            return None
        if self.streamed or here().count > 1:
            return Batches(self.x_val, self.y_val, batch_size, devices=devices)
        return padded(self.x_val, self.y_val, devices) if devices > 1 else (self.x_val, self.y_val)

    def test(self, batch_size: int) -> Any:
        """Give the test images as `predict` takes them: an array, or `Batches` in their order."""
        return Batches(self.x_test, self.y_test, batch_size) if self.streamed else self.x_test

    def resized(self, size: tuple[int, int]) -> "Dataset":
        """Give the same images at another height and width, in pixels."""
        return self._with_images(lambda images: images.resized(size) if self.streamed else resize(images, size))

    def in_pixels(self, pixels: Pixels) -> "Dataset":
        """Give the same images in another range, as a model takes them.

        Raises:
            DataError: If they are in another range than [0, 1] already, or if the range is for colours and they are grey.
        """
        if self.pixels != PIXELS["0-1"]:
            msg = f"pixels: expected images in [0, 1], received {self.pixels.name}; load them anew"
            raise DataError(msg)
        pixels.check(self.image_shape)
        changed = self._with_images(
            lambda images: dataclasses.replace(images, pixels=pixels) if self.streamed else pixels(images)
        )
        return dataclasses.replace(changed, pixels=pixels)

    def _with_images(self, change: Callable[[Any], Any]) -> "Dataset":
        x_train, x_val, x_test = (change(images) for images in (self.x_train, self.x_val, self.x_test))
        return dataclasses.replace(self, x_train=x_train, x_val=x_val, x_test=x_test)

    def __repr__(self) -> str:
        shape = "x".join(str(length) for length in self.image_shape)
        pixels = "" if self.pixels == PIXELS["0-1"] else f", pixels {self.pixels.name}"
        return (
            f"Dataset({self.name}: {len(self.x_train)} training, {len(self.x_val)} validation and "
            f"{len(self.x_test)} test images of {shape}, {self.num_classes} classes{pixels})"
        )

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"  {note}" for note in self.notes)])


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images that are fetched when they have been chosen.

    Attributes:
        labels: int32 of shape `(n,)`.
        images: Encoded `Images`, or what maps k indices to float32 images of shape `(k, height, width, channels)` with
            values in [0, 1].
    """

    labels: np.ndarray
    images: Images | Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a place has to offer.

    Attributes:
        train: Images for training, and for what has none of its own: a part of them is held out.
        class_names: One name per label.
        test, validation: Images for these, or `None`.
        notes: As in `Dataset`.
    """

    train: Examples
    class_names: tuple[str, ...]
    test: Examples | None = None
    validation: Examples | None = None
    notes: tuple[str, ...] = ()


def assemble(
    name: str,
    source: Source,
    *,
    limit: int | None,
    validation_split: float,
    seed: int,
    stream: bool | None = None,
) -> Dataset:
    """Choose images of a source, fetch them, and split them.

    Args:
        name: Name of the data set, used in errors.
        source: Where the images come from. Without test images, a fifth of those for training is split off, the same
            for every seed; without validation images, `validation_split`.
        limit: At most so many images for training and validation together, and at most so many for the test.
        validation_split: Part of the chosen training images that is held out, in [0, 1).
        seed: Chooses the limited and the held out training images.
        stream: Whether images stay on disk; by default if they would fill more than a quarter of the free memory.

    Raises:
        DataError: If an option is out of range, a class or an image is missing, or the images' shapes differ.
    """
    train, test, class_names = source.train, source.test, source.class_names
    if limit is not None and limit < len(class_names):
        msg = f"limit: expected at least one image for each of {len(class_names)} classes of {name}, received {limit}"
        raise DataError(msg)
    if seed < 0:
        msg = f"seed: expected a number from 0 on, received {seed}"
        raise DataError(msg)
    if not 0 <= validation_split < 1:
        msg = f"validation_split: expected a part in [0, 1), received {validation_split}"
        raise DataError(msg)
    if test is None:
        pool, test_chosen = _split(_stratified_order(train.labels, _TEST_SEED), _TEST_SPLIT)
        test = train
    else:
        pool, test_chosen = np.arange(len(train.labels)), _stratified_order(test.labels, _TEST_SEED)
    strangers = np.setdiff1d(test.labels, train.labels)
    if len(strangers):
        msg = (
            f"{name}: expected only test images of classes that have training images, received some of "
            f"{class_names[strangers[0]]!r}; remove them or add training images"
        )
        raise DataError(msg)
    chosen = pool[_stratified_order(train.labels[pool], seed)]
    if source.validation is None:
        held_out, (train_chosen, val_chosen) = train, _split(chosen[:limit], validation_split)
    else:
        held_out, both = source.validation, len(chosen) + len(source.validation.labels)
        most = both if limit is None else min(limit, both)
        for_validation = min(
            round(most * len(held_out.labels) / both), most - len(class_names)
        )  # each class is trained on
        train_chosen = chosen[: most - for_validation]
        val_chosen = _stratified_order(held_out.labels, seed)[:for_validation]
    test_chosen = test_chosen[:limit]
    if not len(train_chosen) or not len(test_chosen):
        msg = f"{name}: expected enough images for training and test, received {len(train.labels)} in all; add some"
        raise DataError(msg)
    parts = ((train, train_chosen), (held_out, val_chosen), (test, test_chosen))
    images, notes = _fetched(parts, stream, name)
    x_train, x_val, x_test = images
    return Dataset(
        name=name,
        x_train=x_train,
        y_train=train.labels[train_chosen],
        x_val=x_val,
        y_val=held_out.labels[val_chosen],
        x_test=x_test,
        y_test=test.labels[test_chosen],
        class_names=class_names,
        notes=(*source.notes, *notes),
    )


_Chosen = tuple[tuple[Examples, np.ndarray], ...]


def _fetched(parts: _Chosen, stream: bool | None, name: str) -> tuple[list[Any], list[str]]:
    """The chosen images of each part, all of one shape, in memory or on disk; and a note which, where that is a choice."""
    encoded = [each.images.take(chosen) for each, chosen in parts if isinstance(each.images, Images)]
    if not encoded:
        if stream:
            msg = f"stream: expected a folder or zip of images, received {name}, which is in memory"
            raise DataError(msg)
        nothing = np.empty((0, 0, 0, 1), np.float32)
        fetched = [each.images(chosen) if len(chosen) else nothing for each, chosen in parts]  # type: ignore[operator]
        return _alike(fetched, name), []
    first = encoded[0]
    height, width = first.size or first[:1].measured().shape[1:3]
    count = sum(len(images) for images in encoded)
    size = 4 * 3 * height * width * count
    said = f"{count:,} images of {height}x{width} take up to {_bytes(size)} decoded"
    if stream if stream is not None else not fits(size):
        why = "" if stream else f", more than {SHARE:.0%} of the {_bytes(free_memory())} that are free"
        measured = [images.measured() if len(images) else images for images in encoded]
        channels = max(images.channels or 1 for images in measured)
        for images in measured:
            if len(images) and images.size != measured[0].size:
                msg = (
                    f"{name}: expected test images of the training images' size {measured[0].size}, received "
                    f"{images.size}; give an image size"
                )
                raise DataError(msg)
        whole = [dataclasses.replace(images, size=measured[0].size, channels=channels) for images in measured]
        return whole, [f"images are read from disk while training: {said}{why}"]
    why = "" if stream is not None else f", of {_bytes(free_memory())} that are free"
    return _alike([np.asarray(images) for images in encoded], name), [f"images are in memory: {said}{why}"]


def _bytes(count: float) -> str:
    power = min(3, int(np.log10(max(1, count)) / 3))
    return f"{count / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def unit_images(images: np.ndarray, origin: str) -> np.ndarray:
    """Turn an array of images into float32 of shape `(n, height, width, channels)` with values in [0, 1].

    Args:
        images: uint8, which is divided by 255, or floating point in [0, 1]; `(n, height, width)` is taken as grey.
        origin: File and key, used in errors.

    Raises:
        DataError: If rank, dtype or values are others.
    """
    check_rank(images, origin)
    if images.ndim == 3:  # images, height, width
        images = images[..., np.newaxis]
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    if not np.issubdtype(images.dtype, np.floating):
        msg = f"{origin}: expected uint8 or floats in [0, 1], received {images.dtype}; convert it to uint8"
        raise DataError(msg)
    # Written so that a NaN fails it as well.
    if not (images.min() >= 0 and images.max() <= 1):
        msg = (
            f"{origin}: expected floats in [0, 1], received values from {images.min():g} to {images.max():g}; "
            "scale them, or save uint8"
        )
        raise DataError(msg)
    return images.astype(np.float32)


def check_rank(images: np.ndarray, origin: str) -> None:
    """Refuse an array that cannot be images.

    Raises:
        DataError: If its shape is neither `(n, height, width, channels)` nor `(n, height, width)`, or has a zero.
    """
    if images.ndim not in (3, 4) or 0 in images.shape:
        msg = f"{origin}: expected images of shape (n, height, width, channels), received shape {images.shape}"
        raise DataError(msg)


def integer_labels(labels: np.ndarray, origin: str) -> np.ndarray:
    """Turn an array of labels into int32 of shape `(n,)`; shape `(n, 1)` is taken too.

    Raises:
        DataError: If rank or dtype are others, or if a label is negative or absurdly large.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:  # labels in one column
        labels = labels[:, 0]
    if labels.ndim != 1 or not len(labels):
        advice = "; take argmax(axis=1) of one-hot labels" if labels.ndim == 2 else ""
        msg = f"{origin}: expected a vector of labels, received shape {labels.shape}{advice}"
        raise DataError(msg)
    if not np.issubdtype(labels.dtype, np.integer):
        msg = f"{origin}: expected integer labels, received {labels.dtype}; number the classes 0, 1, 2, ..."
        raise DataError(msg)
    if labels.min() < 0 or labels.max() > _LAST_LABEL:
        msg = (
            f"{origin}: expected labels from 0 to {_LAST_LABEL}, received {labels.min()} to {labels.max()}; "
            "number the classes 0, 1, 2, ..."
        )
        raise DataError(msg)
    different, classes = len(np.unique(labels)), int(labels.max()) + 1
    if classes > 2 * different + _ABSENT:
        msg = (
            f"{origin}: expected labels 0 to n - 1 of n classes, received {different} different ones up to {classes - 1}; "
            "number the classes 0, 1, 2, ..."
        )
        raise DataError(msg)
    return labels.astype(np.int32)


def resize(images: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize float32 images of shape `(n, height, width, channels)` to `size`, smoothly in both directions.

    Raises:
        DataError: If they would fill the memory.
    """
    if size is None or images.shape[1:3] == size:
        return images
    from PIL import Image

    needed = 4 * len(images) * size[0] * size[1] * images.shape[3]
    if needed > free_memory():
        msg = (
            f"image_size: expected one at which {len(images):,} images fit into the {_bytes(free_memory())} of free memory, "
            f"received {size[0]}x{size[1]}, which takes {_bytes(needed)}"
        )
        raise DataError(msg)
    result = np.empty((len(images), *size, images.shape[3]), np.float32)
    for image, target in zip(images, result, strict=True):
        for channel in range(images.shape[3]):
            plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
            target[..., channel] = np.asarray(plane.resize(size[::-1], Image.Resampling.BILINEAR))
    return result


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle such that any stretch of the result holds every class in proportion, and its start at least one of each.

    The k-th of the n examples of a class gets the place k / n; examples are sorted by place, ties by chance.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    place = (np.arange(len(labels)) - np.repeat(first, counts)) / np.repeat(counts, counts)
    return by_class[np.lexsort((rng.random(len(labels)), place))]


def _split(order: np.ndarray, part: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut a part off the end; a part that is not zero is at least one example."""
    held_out = max(1, round(len(order) * part)) if part else 0
    cut = len(order) - held_out
    return order[:cut], order[cut:]


def _alike(parts: list[np.ndarray], name: str) -> list[np.ndarray]:
    """Give all arrays the same number of channels: grey images become colour where others are."""
    filled = [x for x in parts if len(x)]
    channels = {x.shape[3] for x in filled}
    if channels == {1, 3}:
        parts = [np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x for x in parts]
        filled = [x for x in parts if len(x)]
    for other in filled:
        if other.shape[1:] != filled[0].shape[1:]:
            advice = "give an image size" if len(channels) == 1 else "save both with the same channels"
            msg = (
                f"{name}: expected test images of the training images' shape {filled[0].shape[1:]}, received "
                f"{other.shape[1:]}; {advice}"
            )
            raise DataError(msg)
    return [x if len(x) else np.empty((0, *filled[0].shape[1:]), np.float32) for x in parts]
