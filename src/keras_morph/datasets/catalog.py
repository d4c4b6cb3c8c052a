"""Data sets by name or path, all in one form: `load("digits")`, `load("photos.zip", image_size=64)`."""

__all__ = ["NAMES", "load"]

import difflib
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np

from keras_morph.datasets.arrays import (
    Dataset,
    Examples,
    Source,
    assemble,
    check_rank,
    integer_labels,
    resize,
    unit_images,
)
from keras_morph.datasets.decoding import reason, shortened
from keras_morph.datasets.images import image_folder, image_zip
from keras_morph.datasets.records import image_records, record_files
from keras_morph.datasets.streams import Images
from keras_morph.errors import DataError
from keras_morph.machine import free_memory

Size = tuple[int, int] | None

_TFDS = "tfds:"
_LARGEST = 2**16  # pixels of a side
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load(
    name_or_path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    validation_split: float = 0.1,
    seed: int = 0,
    stream: bool | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        name_or_path: One of `NAMES`; `tfds:NAME`; a folder or a zip of images (`train/CLASS/*.png`, `val/CLASS/*.png`
            and `test/CLASS/*.jpg`, or `CLASS/*.png`); a folder of TFRecord files, or one; or an `.npz` with `x_train`,
            `y_train`, `x_test` and `y_test`. A name goes before a file that is called the same; write `./digits` for the
            file.
        image_size: Height and width in pixels that the images are resized to, or one number for both; by default they
            keep their size.
        limit: At most so many images for training and validation together, and at most so many for the test; every
            class in proportion. Others are not decoded.
        validation_split: Part of the training images that is held out for validation, in [0, 1).
        seed: Chooses the images for training and validation. The test images do not depend on it.
        stream: Whether the images of a folder or zip stay on disk and are decoded batch by batch; by default if they
            would fill more than a quarter of the free memory.

    Returns:
        The data set, in the order in which it was drawn: classes are mixed.

    Raises:
        DataError: In one line, if the data are missing, cannot be read or downloaded, or have another form, or if an
            option is out of range.

    Example:
        >>> images = km.datasets.load("digits", limit=200)
        >>> images.x_train.shape, images.y_train.shape
        ((180, 8, 8, 1), (180,))
    """
    size = _pair(image_size)
    text = os.fspath(name_or_path)
    if text in _SOURCES and not isinstance(name_or_path, os.PathLike):
        name, source = text, _SOURCES[text](size)
    elif text.startswith(_TFDS):
        name, source = text, _tfds(text.removeprefix(_TFDS), size)
    else:
        path = _existing(text)
        name, source = Path(os.path.abspath(path)).stem, _from_path(path, size)
    return assemble(name, source, limit=limit, validation_split=validation_split, seed=seed, stream=stream)


def _existing(text: str) -> Path:
    """A path that is there.

    Raises:
        DataError: If it is not, or cannot be one.
    """
    why = "check the path"
    try:
        path = Path(text).expanduser()
        if text.strip() and (path.is_file() or path.is_dir()):
            return path
        if text.strip() and path.exists():
            why = "which is neither a file nor a folder"
    except (OSError, ValueError, RuntimeError) as error:
        why = reason(error)
    close = difflib.get_close_matches(text, NAMES, n=1)
    advice = f"did you mean {close[0]}?" if close else why
    msg = f"data: expected {', '.join(NAMES)}, {_TFDS}NAME or an existing path, received {shortened(text)}; {advice}"
    raise DataError(msg)


def _from_path(path: Path, size: Size) -> Source:
    if record_files(path):
        return image_records(path, size)
    if path.is_dir():
        return image_folder(path, size)
    if path.suffix.lower() == ".npz":
        return _npz(path, size)
    if path.suffix.lower() == ".zip":
        return image_zip(path, size)
    msg = f"{path}: expected a folder, a .zip of images, an .npz or a .tfrecord, received a file that ends in {path.suffix!r}"
    raise DataError(msg)


def _npz(path: Path, size: Size) -> Source:
    arrays = {}
    try:
        # An object array would be unpickled, which runs whatever code its author put there.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            for key in ("x_train", "y_train", "x_test", "y_test"):
                if key not in file:
                    found = ", ".join(file) or "no arrays"
                    msg = f"{path}: expected x_train, y_train, x_test and y_test, received {found}; {key} is missing"
                    raise DataError(msg)
            _check_headers(path, ("x_train", "y_train", "x_test", "y_test"))
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except DataError:
        raise
    except Exception as error:  # whatever zipfile, zlib and NumPy, which runs a tokenizer over headers, raise
        msg = f"{path}: expected an .npz of plain arrays, received one that cannot be read ({reason(error)})"
        raise DataError(msg) from error
    return _array_source(arrays, str(path), size)


def _check_headers(path: Path, keys: Iterable[str]) -> None:
    """Refuse arrays that are not what their headers say, or that would fill the memory, before they are made.

    Raises:
        DataError: For these.
    """
    needed = 0
    with zipfile.ZipFile(path) as archive:
        for key in keys:
            member = archive.getinfo(f"{key}.npy")
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
                said, there = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
            if said != there and not dtype.hasobject:
                msg = f"{path}: {key}: expected {said:,} bytes for shape {shape}, received {there:,}; save it anew"
                raise DataError(msg)
            needed += math.prod(shape) * 4 + said  # as it is, and as float32
    if needed > free_memory():
        msg = (
            f"{path}: expected arrays that fit into the {free_memory() / 1e9:.3g} GB of free memory, received "
            f"{needed / 1e9:.3g} GB; a folder of images is read from disk"
        )
        raise DataError(msg)


def _digits(size: Size) -> Source:
    try:
        from sklearn.datasets import load_digits  # an extra
    except ImportError as error:
        msg = "digits: expected scikit-learn, which is not installed; run pip install 'keras-morph[demo]'"
        raise DataError(msg) from error
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1) / 16
    return Source(_array_examples(images, integer_labels(labels, "digits"), "digits", size), _numbers(10))


def _downloaded(name: str, class_names: tuple[str, ...]) -> Callable[[Size], Source]:
    def source(size: Size) -> Source:
        try:
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras raises a plain Exception when it cannot download
            msg = (
                f"{name}: expected a download or a copy in Keras's cache, received {reason(error)}; check the "
                "connection, or give a folder or zip of images"
            )
            raise DataError(msg) from error
        if x_train.ndim == 4 and keras.config.image_data_format() == "channels_first":  # CIFAR
            x_train, x_test = np.moveaxis(x_train, 1, -1), np.moveaxis(x_test, 1, -1)
        arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        return replace(_array_source(arrays, name, size), class_names=class_names)

    return source


def _tfds(name: str, size: Size) -> Source:
    try:
        import tensorflow_datasets as tfds  # an extra
    except ImportError as error:
        msg = (
            f"{_TFDS}{name}: expected tensorflow-datasets, which is not installed; run pip install 'keras-morph[tfds]'"
        )
        raise DataError(msg) from error
    try:
        builder = tfds.builder(name)
        builder.download_and_prepare()
        image_key, label_key = builder.info.supervised_keys
        class_names = tuple(builder.info.features[label_key].names)
        # The images stay encoded, so that here too only the chosen ones are decoded.
        decoders = {image_key: tfds.decode.SkipDecoding()}
        rows = {
            part: [
                (row[image_key], row[label_key]) for row in tfds.as_numpy(builder.as_dataset(part, decoders=decoders))
            ]
            for part in ("train", "test")
            if part == "train" or part in builder.info.splits
        }
    except Exception as error:  # its errors share no class
        msg = (
            f"{_TFDS}{name}: expected a data set of images with one label each, received "
            f"{type(error).__name__}: {reason(error)}; check the name and the connection"
        )
        raise DataError(msg) from error
    parts = {part: _encoded_examples(rows[part], f"{_TFDS}{name} {part}", size) for part in rows}
    return Source(parts["train"], class_names, test=parts.get("test"))


def _encoded_examples(rows: list[tuple[bytes, int]], origin: str, size: Size) -> Examples:
    images = [image for image, _ in rows]
    encoded = Images(lambda i: (f"{origin}[{i}]", partial(images.__getitem__, i)), np.arange(len(images)), size)
    return Examples(np.array([label for _, label in rows], np.int32), encoded)


def _array_source(arrays: dict[str, np.ndarray], origin: str, size: Size) -> Source:
    labels = {part: integer_labels(arrays[f"y_{part}"], f"{origin}: y_{part}") for part in ("train", "test")}
    train, test = (_array_examples(arrays[f"x_{part}"], labels[part], f"{origin}: x_{part}", size) for part in labels)
    return Source(train, _numbers(1 + max(int(part.max()) for part in labels.values())), test=test)


def _array_examples(images: np.ndarray, labels: np.ndarray, origin: str, size: Size) -> Examples:
    if images.shape[:1] != labels.shape:
        msg = f"{origin}: expected {len(labels)} images, as many as labels, received shape {images.shape}"
        raise DataError(msg)
    check_rank(images, origin)
    return Examples(labels, lambda chosen: resize(unit_images(images[chosen], origin), size))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _pair(image_size: int | tuple[int, int] | None) -> Size:
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(side, int) and 0 < side <= _LARGEST for side in pair):
        msg = f"image_size: expected a number of pixels from 1 to {_LARGEST}, or (height, width), received {image_size}"
        raise DataError(msg)
    return pair


_SOURCES: dict[str, Callable[[Size], Source]] = {
    "digits": _digits,
    "mnist": _downloaded("mnist", _numbers(10)),
    "fashion_mnist": _downloaded("fashion_mnist", _FASHION),
    "cifar10": _downloaded("cifar10", _CIFAR10),
    "cifar100": _downloaded("cifar100", _numbers(100)),
}

NAMES = tuple(_SOURCES)
"""The data sets that need no path."""
