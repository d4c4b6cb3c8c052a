"""Encoded images become arrays: the same pixels whether they come from a file, a member of a zip or memory."""

__all__ = [
    "FILE_LIMIT",
    "PIXEL_LIMIT",
    "Encoded",
    "check_size",
    "decode",
    "headers",
    "pool",
    "reason",
    "threads",
]

import io
import os
import struct
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_morph.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Encoded = tuple[str, Callable[[], bytes]]
"""One image that is not decoded yet: its name in errors, and what reads it."""

PIXEL_LIMIT = 100_000_000
"""Pixels of an image, above which it is taken for a decompression bomb: 300 MB, and more than any camera makes."""

FILE_LIMIT = 2**28
"""Bytes of an encoded image, likewise: 100 million pixels without compression are 300 MB at most."""

UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
"""What Pillow, NumPy, zipfile and zlib raise for files that are damaged or encrypted."""

_ORIENTATION = 0x0112  # the tag of EXIF that says how the camera was held
_SIDEWAYS = range(5, 9)
_THREADS = 8  # more only wait for one another: what Pillow does in Python holds the interpreter's lock


def threads() -> int:
    """How many threads decode: one per core that may be used, from 2 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_THREADS, cores))


@cache
def pool() -> ThreadPoolExecutor:
    """Those threads. What they run must not wait for them."""
    return ThreadPoolExecutor(threads(), thread_name_prefix="decode")


def decode(images: Sequence[Encoded], size: tuple[int, int] | None, channels: int | None = None) -> np.ndarray:
    """Decode images into one float32 array of shape `(n, height, width, channels)` with values in [0, 1].

    They are turned as EXIF says; transparency is dropped; of an animation the first picture is taken.

    Args:
        images: What to decode.
        size: Height and width that they are resized to; `None` keeps theirs.
        channels: 1 or 3; by default 1 if all images are grey.

    Raises:
        DataError: If an image cannot be read, or if `size` is `None` and they are not all of one size.
    """
    result: np.ndarray | None = None
    grey = True
    for index, (name, read) in enumerate(images):
        pixels, white = _pixels(name, read, size)
        if result is None:
            result = np.empty((len(images), *pixels.shape[:2], channels or 3), np.float32)
        check_size(name, pixels.shape[:2], result.shape[1:3])
        if channels == 1 and pixels.shape[2] == 3:
            msg = f"{name}: expected a grey image, as its header said, received one with colours; repair or remove it"
            raise DataError(msg)
        grey &= pixels.shape[2] == 1
        np.divide(pixels, np.float32(white), out=result[index])
    if result is None:
        return np.empty((0, *(size or (0, 0)), channels or 1), np.float32)
    return result[..., :1].copy() if grey and channels is None else result


def check_size(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse an image of another height and width than those before it.

    Raises:
        DataError: If they differ.
    """
    if tuple(found) != tuple(expected):
        msg = (
            f"{name}: expected {expected[0]}x{expected[1]} pixels as in the images before it, received "
            f"{found[0]}x{found[1]}; give an image size"
        )
        raise DataError(msg)


def headers(images: Iterable[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Read what the headers of images say, without decoding them; several at a time.

    Returns:
        Height and width of each, as it is turned, int64 `(n, 2)`; and whether it is grey, bool `(n,)`.

    Raises:
        DataError: If an image cannot be read or is too large.
    """
    found = list(pool().map(_header, images))
    sizes = np.array([size for size, _ in found], np.int64).reshape(-1, 2)
    return sizes, np.array([grey for _, grey in found], bool)


def reason(error: BaseException) -> str:
    """Put what an error says in at most one line of 200 characters."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(said, 200)


def shortened(text: str) -> str:
    """A user's text in quotation marks, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


@contextmanager
def _opened(name: str, read: Callable[[], bytes]) -> "Iterator[Image.Image]":
    """An image whose header was read; whatever is wrong with it inside is one line.

    Raises:
        DataError: If it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read())) as image:
            if image.width * image.height > PIXEL_LIMIT:
                msg = f"{image.width}x{image.height} pixels, more than {PIXEL_LIMIT:,}"
                raise ValueError(msg)
            yield image
    except (*UNREADABLE, TypeError, IndexError, KeyError, Image.DecompressionBombError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        msg = f"{name}: expected an image, received one that cannot be read ({reason(error)}); repair or remove it"
        raise DataError(msg) from error


def _header(encoded: Encoded) -> tuple[tuple[int, int], bool]:
    with _opened(*encoded) as image:
        # Pillow would decode a whole PNG to find its EXIF behind the pixels.
        exif: Any = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        size = image.size if exif.get(_ORIENTATION) in _SIDEWAYS else image.size[::-1]
        return size, image.mode.startswith("I") or image.mode in _GREY


_GREY = ("1", "L", "LA", "La")


def _pixels(name: str, read: Callable[[], bytes], size: tuple[int, int] | None) -> tuple[np.ndarray, int]:
    """Decode one image into numbers of shape `(height, width, 1 or 3)`, and give the one that means white."""
    from PIL import Image, ImageOps

    with _opened(name, read) as opened:
        opened.load()
        turned = ImageOps.exif_transpose(opened) if opened.getexif().get(_ORIENTATION, 1) != 1 else opened
        image, white = _plain_mode(turned)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image)), white


def _plain_mode(image: "Image.Image") -> "tuple[Image.Image, int]":
    """Convert to grey or RGB, and give the value that means white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip on the way to 8
        return image.convert("F"), 2**16 - 1
    if image.mode in ("L", "RGB"):
        return image, 255
    if image.mode in _GREY:
        return image.convert("L"), 255
    if image.mode == "P":  # by way of RGBA: Pillow warns of a transparent palette that goes straight to RGB
        return image.convert("RGBA").convert("RGB"), 255
    return image.convert("RGB"), 255
