"""Folders and zips of images: `train/CLASS/*.png` and `test/CLASS/*.jpg`, or class folders alone.

Finding images is apart from decoding them, so that a few of many cost a few; and what is decoded is bytes with a name,
whether they come from a file, from a member of a zip or from memory.
"""

__all__ = ["Encoded", "decode", "image_folder", "image_zip", "reason"]

import io
import os
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keras_morph.datasets.arrays import Examples
from keras_morph.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Encoded = tuple[str, Callable[[], bytes]]
"""One image that is not decoded yet: its name in errors, and what reads it."""

Found = tuple[Examples, Examples | None, tuple[str, ...]]
"""Training examples, test examples or `None`, names of the classes."""

_Parts = dict[str, tuple[str, ...]]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# What Pillow, zipfile and zlib raise for files that are damaged or encrypted.
_UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def image_folder(path: Path, size: tuple[int, int] | None) -> Found:
    """Find the images of a folder.

    Hidden files, and images outside a class folder, are left out; folders that hold everything else are passed over
    (`cifar/train/...`). Classes are numbered by sorted name.

    Args:
        path: The folder.
        size: Height and width that images are resized to when they are fetched; `None` keeps theirs.

    Raises:
        DataError: If there are no images or fewer than two classes, or if a class is in the test part only.
    """
    names = [
        (Path(folder) / file).relative_to(path).as_posix()
        for folder, _, files in os.walk(path, followlinks=True)
        for file in files
    ]

    def fetch(chosen: Sequence[str]) -> np.ndarray:
        return decode([(str(path / name), (path / name).read_bytes) for name in chosen], size)

    return _by_class(names, fetch, path)


def image_zip(path: Path, size: tuple[int, int] | None) -> Found:
    """Find the images of a zip, as in `image_folder`; members are decoded straight from the archive.

    Raises:
        DataError: If the file is no zip, and as in `image_folder`.
    """
    try:
        # Stays open as long as its examples live: to read the list of 60,000 members once more takes half a second.
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        msg = f"{path}: expected a zip of images, received a file that cannot be opened ({reason(error)})"
        raise DataError(msg) from error

    def fetch(chosen: Sequence[str]) -> np.ndarray:
        return decode([(f"{path}: {name}", partial(archive.read, name)) for name in chosen], size)

    return _by_class(archive.namelist(), fetch, path)


def decode(images: Sequence[Encoded], size: tuple[int, int] | None) -> np.ndarray:
    """Decode images into one float32 array of shape `(n, height, width, channels)` with values in [0, 1].

    There is one channel if all images are grey, else three; transparency is dropped.

    Raises:
        DataError: If an image cannot be read, or if `size` is `None` and they are not all of one size.
    """
    result: np.ndarray | None = None
    grey = True
    for index, (name, read) in enumerate(images):
        pixels = _pixels(name, read, size)
        if result is None:
            result = np.empty((len(images), *pixels.shape[:2], 3), np.float32)
        if pixels.shape[:2] != result.shape[1:3]:
            (height, width), (expected_height, expected_width) = pixels.shape[:2], result.shape[1:3]
            msg = (
                f"{name}: expected {expected_height}x{expected_width} pixels as in the images before it, received "
                f"{height}x{width}; give an image size"
            )
            raise DataError(msg)
        grey &= pixels.shape[2] == 1
        result[index] = pixels
    if result is None:
        return np.empty((0, *(size or (0, 0)), 1), np.float32)
    return result[..., :1].copy() if grey else result


def reason(error: BaseException) -> str:
    """Put what an error says in at most one line of 200 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _pixels(name: str, read: Callable[[], bytes], size: tuple[int, int] | None) -> np.ndarray:
    """Decode one image into floats of shape `(height, width, 1 or 3)` with values in [0, 1]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read())) as opened:
            image, white = _plain_mode(opened)
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        msg = f"{name}: expected an image, received one that cannot be read ({reason(error)}); repair or remove it"
        raise DataError(msg) from error
    pixels = np.asarray(image, np.float32) / np.float32(white)
    return np.atleast_3d(pixels)


def _plain_mode(image: "Image.Image") -> "tuple[Image.Image, int]":
    """Convert to grey or RGB, and give the value that means white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip on the way to 8
        return image.convert("F"), 2**16 - 1
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("L"), 255
    if image.mode == "P":  # by way of RGBA: Pillow warns of a transparent palette that goes straight to RGB
        return image.convert("RGBA").convert("RGB"), 255
    return image.convert("RGB"), 255


def _by_class(names: Sequence[str], fetch: Callable[[Sequence[str]], np.ndarray], path: Path) -> Found:
    train, test = _train_and_test(_image_parts(names, path), path)
    class_names = tuple(sorted({parts[0] for parts in train.values()}))
    if len(class_names) < 2:
        msg = (
            f"{path}: expected at least two folders of images, one per class (train/CLASS/*.png, test/CLASS/*.png, or "
            f"CLASS/*.png), received {class_names[0] if class_names else 'none'}; sort the images into folders"
        )
        raise DataError(msg)
    strangers = sorted({parts[0] for parts in test.values()} - set(class_names))
    if strangers:
        msg = (
            f"{path}: expected in test/ only classes that train/ has too, received {strangers[0]!r}; remove it, or add "
            "its training images"
        )
        raise DataError(msg)

    number = {name: index for index, name in enumerate(class_names)}

    def examples(part: _Parts) -> Examples:
        files = sorted(part)
        labels = np.array([number[part[file][0]] for file in files], np.int32)
        return Examples(labels, lambda indices: fetch([files[index] for index in indices]))

    return examples(train), examples(test) if test else None, class_names


def _image_parts(names: Sequence[str], path: Path) -> _Parts:
    """Split the names of images at slashes; without hidden ones, and without folders that hold everything else."""
    split = {
        name: tuple(part for part in name.split("/") if part not in ("", "."))
        for name in names
        if name.lower().endswith(_SUFFIXES)
    }
    images = {
        name: parts for name, parts in split.items() if not any(part.startswith((".", "__MACOSX")) for part in parts)
    }
    if not images:
        msg = f"{path}: expected images ({', '.join(_SUFFIXES)}), received none; check the path"
        raise DataError(msg)
    while True:
        images = {name: parts for name, parts in images.items() if len(parts) > 1}
        tops = {parts[0] for parts in images.values()}
        holds_folders = any(len(parts) > 2 for parts in images.values())
        if len(tops) != 1 or not holds_folders or _holds_classes(images, "train"):
            return images
        images = {name: parts[1:] for name, parts in images.items()}


def _holds_classes(images: _Parts, folder: str) -> bool:
    # A class may be called "train", as in CIFAR-100: then images lie right inside.
    return any(parts[0].lower() == folder and len(parts) > 2 for parts in images.values())


def _train_and_test(images: _Parts, path: Path) -> tuple[_Parts, _Parts]:
    if not _holds_classes(images, "train"):
        return images, {}
    train, test = (
        {name: parts[1:] for name, parts in images.items() if parts[0].lower() == part and len(parts) > 2}
        for part in ("train", "test")
    )
    others = sorted({parts[0] for parts in images.values() if parts[0].lower() != "train"})
    if others and not test:
        msg = f"{path}: expected test/CLASS beside train/, received {', '.join(others)}; rename the test images' folder"
        raise DataError(msg)
    return train, test
