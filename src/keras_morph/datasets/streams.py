"""Images that stay on disk until a batch of them is asked for, and batches in an order that can be repeated."""

__all__ = ["Batches", "Images", "fits"]

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from threading import Lock
from typing import Any

import keras
import numpy as np

from keras_morph.datasets.decoding import Encoded, check_size, decode, headers, pool, threads
from keras_morph.datasets.pixels import PIXELS, Pixels
from keras_morph.machine import free_memory
from keras_morph.processes import here

SHARE = 0.25  # of the free memory that images may fill: a backend may copy them once, and training needs some too
_QUEUE = 2**27  # bytes of decoded batches that wait to be trained on
_CHUNK = 64  # images that one thread decodes at a time
WHITE = np.float32(255)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Encoded images, decoded when they are indexed: as an array to those who read it, but for the memory.

    A slice gives images that are not decoded either; numbers and arrays of numbers, and `np.asarray`, decode.

    Attributes:
        encoded: Maps the number of an image to what reads it.
        numbers: int64 of shape `(n,)`: which images these are.
        size: Height and width that they are resized to; `None` keeps theirs.
        channels: 1 or 3; `None` is 1 where all that are decoded at once are grey.
        pixels: The range of their values.

    Example:
        >>> from PIL import Image
        >>> for index in range(8):
        ...     path = Path("photos") / ("cat", "dog")[index % 2] / f"{index}.png"
        ...     path.parent.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (6, 4)).save(path)
        >>> images = km.datasets.load("photos", stream=True).x_train
        >>> images.shape, images[:2].shape, np.asarray(images[:2]).shape, images[0].shape
        ((5, 4, 6, 3), (2, 4, 6, 3), (2, 4, 6, 3), (4, 6, 3))
    """

    encoded: Callable[[int], Encoded]
    numbers: np.ndarray
    size: tuple[int, int] | None = None
    channels: int | None = None
    pixels: Pixels = PIXELS["0-1"]

    dtype = np.dtype(np.float32)
    ndim = 4

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number, height, width and channels; known after `measured`."""
        assert self.size is not None
        assert self.channels is not None
        return len(self), *self.size, self.channels

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self.take(self.numbers[key])
        if np.ndim(key) == 0:
            return self.pixels(self.values(np.array([key])))[0]
        return self.pixels(self.values(key))

    def values(self, chosen: np.ndarray) -> np.ndarray:
        """Some of them in [0, 1], before the range that a model takes."""
        return self._decoded(self.numbers[chosen].tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Decode all of them, several at a time."""
        parts = [self.numbers[start : start + _CHUNK].tolist() for start in range(0, len(self), _CHUNK)]
        if not parts:
            return np.empty((0, *(self.size or (0, 0)), self.channels or 1), dtype or np.float32)
        result: np.ndarray | None = None
        grey = True
        for start, part in zip(range(0, len(self), _CHUNK), pool().map(self._decoded, parts), strict=True):
            if result is None:
                result = np.empty((len(self), *part.shape[1:3], self.channels or 3), np.float32)
            check_size(self.encoded(int(self.numbers[start]))[0], part.shape[1:3], result.shape[1:3])
            grey &= part.shape[3] == 1
            result[start : start + len(part)] = part
        assert result is not None
        result = result[..., :1].copy() if grey and self.channels is None else result
        return self.pixels(result).astype(dtype or np.float32, copy=False)

    def take(self, numbers: np.ndarray) -> "Images":
        """Others of the same images, not decoded."""
        return dataclasses.replace(self, numbers=numbers)

    def resized(self, size: tuple[int, int]) -> "Images":
        """The same at another height and width."""
        return dataclasses.replace(self, size=size)

    def measured(self) -> "Images":
        """The same with their size and channels, which the headers of all of them say.

        Raises:
            DataError: If one cannot be read, or if they are not all of one size and none is given.
        """
        sizes, grey = headers(self.encoded(int(number)) for number in self.numbers)
        size = self.size or (int(sizes[0, 0]), int(sizes[0, 1]))
        if self.size is None:
            for index in np.flatnonzero((sizes != sizes[0]).any(axis=1))[:1]:
                check_size(self.encoded(int(self.numbers[index]))[0], sizes[index].tolist(), size)
        return dataclasses.replace(self, size=size, channels=1 if grey.all() else 3)

    def _decoded(self, numbers: Sequence[int]) -> np.ndarray:
        return decode([self.encoded(number) for number in numbers], self.size, self.channels)


class _Kept:
    """Images that are decoded once, and from then on bytes in memory."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.bytes = np.empty(images.shape, np.uint8)  # pages of it are taken when they are filled
        self.there = np.zeros(len(images), bool)
        self.fit = True  # those of 16 bits do not

    @classmethod
    def of(cls, images: Images) -> "_Kept | Images":
        """These images, kept if there is room for them."""
        return cls(images) if fits(int(np.prod(images.shape))) else images

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        if not self.fit:
            return self.images[chosen]
        missing = chosen[~self.there[chosen]]
        if len(missing):
            found = self.images.values(missing)
            as_bytes = np.rint(found * WHITE).astype(np.uint8)
            if not np.array_equal(as_bytes / WHITE, found):
                self.fit = False
                return self.images[chosen]
            self.bytes[missing], self.there[missing] = as_bytes, True
        return self.images.pixels(self.bytes[chosen] / WHITE)


class Batches(keras.utils.PyDataset):
    """Batches of labelled images, in memory or on disk, for `fit`, `evaluate` and `predict` on every backend.

    The order is a function of the seed and the number of the epoch alone, so that a run that is resumed sees what it
    would have seen: `set_epoch` says how many epochs are done. Give `fit` `shuffle=False`; it would else draw
    an order of its own. Threads decode the next batches while a model trains, those of the next epoch too. Where all
    images fit into memory as bytes, a quarter of what they are as floats, they are kept so once they are decoded.

    Args:
        images: An array, or `Images`.
        labels: Class numbers, `(n,)`.
        batch_size: Images per batch; the last one may be smaller.
        seed: Chooses the order of each epoch; `None` keeps the order as it is.
        epoch: Epochs that are done.
        devices: Number that share a batch: its last image is repeated with weight 0 up to a multiple. Several processes
            each get their own part.

    Attributes:
        failure: What went wrong while decoding, or `None`: TensorFlow hides it behind an error of its own.

    Example:
        >>> batches = km.datasets.Batches(x, y, 16, seed=1)
        >>> first = batches.order()
        >>> batches.set_epoch(1)  # as after an epoch
        >>> len(batches), bool((first == batches.order()).all())
        (4, False)
        >>> batches.set_epoch(0)
        >>> bool((first == batches.order()).all())
        True
    """

    def __init__(
        self,
        images: Any,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        devices: int = 1,
    ) -> None:
        # Keras's own threads decode a few batches more than it asks for, and give them to the next epoch.
        super().__init__(workers=1)
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self._kept = _Kept.of(images) if isinstance(images, Images) else images
        self.seed, self.epoch, self.devices = seed, epoch, devices
        self.failure: Exception | None = None
        one = 4 * batch_size * int(np.prod(images.shape[1:]))
        self._most = max(2, min(2 * threads(), _QUEUE // max(1, one)))
        self._ahead = 1 if isinstance(images, Images) else 0  # more as soon as one was not ready
        self._waiting: dict[int, Future[np.ndarray]] = {}
        self._place, self._seen, self._skipped = -1, 0, 0
        self._lock = Lock()

    def __len__(self) -> int:
        return self._whole - self._skipped

    @property
    def _whole(self) -> int:
        """Batches of an epoch of which none is left out."""
        return -(-len(self.labels) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        index += self._skipped
        place = self.epoch * self._whole + index
        chosen, weights = self._chosen(self.epoch, index)
        labels = self.labels[chosen]
        self._seen += 1
        try:
            x = self._decoded(place)
        except Exception as error:
            self.failure = error
            raise
        return (x, labels, weights) if self.devices > 1 else (x, labels)

    def order(self, epoch: int | None = None) -> np.ndarray:
        """Which examples an epoch shows, in order, int64 `(n,)`; by default that which is under way."""
        return _order(self.seed, self.epoch if epoch is None else epoch, len(self.labels))

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, as PyTorch's samplers have it: a training that goes on says where it is."""
        self.epoch, self._skipped = epoch, 0

    def skip(self, batches: int) -> None:
        """Leave out the first batches of this epoch: a training that goes on within it has made their steps."""
        self._skipped = batches

    def on_epoch_begin(self) -> None:
        """Count what this epoch shows."""
        self._seen, self.failure = 0, None

    def on_epoch_end(self) -> None:
        """Go on to the next epoch, unless Keras has only looked at a batch to learn its shape."""
        if self._seen >= len(self):
            self.set_epoch(self.epoch + 1)
        self._seen = 0

    def _chosen(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a batch, as far as this process has it, and what each of them counts."""
        whole = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        missing = -len(whole) % self.devices
        weights = np.pad(np.ones(len(whole), np.float32), (0, missing))
        return here().part(np.pad(whole, (0, missing), mode="edge")), here().part(weights)

    def _decoded(self, place: int) -> np.ndarray:
        """A batch by its number since the first epoch; meanwhile those that follow, where they are asked for in order."""
        if not self._ahead:
            return np.asarray(self._kept[self._chosen(*divmod(place, self._whole))[0]])
        with self._lock:
            follows = place in (self._place + 1, self.epoch * self._whole + self._skipped)
            wanted = range(place, place + 1 + (self._ahead if follows else 0))
            self._place = place
            for other in [known for known in self._waiting if known not in wanted]:
                self._waiting.pop(other).cancel()
            for each in wanted:
                if each not in self._waiting:
                    chosen, _ = self._chosen(*divmod(each, self._whole))
                    self._waiting[each] = pool().submit(self._kept.__getitem__, chosen)
            future = self._waiting.pop(place)
            if (
                follows and not future.done()
            ):  # threads that do not wait for one another take the cores from the training
                self._ahead = min(self._most, self._ahead + 1)
        return future.result()


@lru_cache(maxsize=8)
def _order(seed: int | None, epoch: int, count: int) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    return np.random.default_rng([seed, epoch]).permutation(count)


def fits(size: int) -> bool:
    """Whether so many bytes of images are at most a quarter of the free memory."""
    return size <= SHARE * free_memory()
