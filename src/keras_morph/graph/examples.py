"""Some of a user's examples, as the model takes them: from arrays, data sets, and what can be read once."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.channels import ChannelGraph, Tensor
from keras_morph.errors import DataError
from keras_morph.keras_internals import as_taken, functional_in

__all__ = ["batches_in", "elements", "entries", "evenly", "image_batches", "lasting"]

MOST_IMAGES = 4096  # a late layer has one position of each, and a thousand unknowns
MOST_ELEMENTS = 2**27  # of a tensor for all images, 0.5 GB in float32: a handful of tensors are in memory at once
BATCH = 64  # images in one call of a layer


def image_batches(graph: ChannelGraph, data: Any) -> list[list[Any]]:
    """Inputs of a model without labels, for each batch a flat list of arrays, one per input.

    Up to 4,096 images, and no more than 2^27 elements of an input.

    Args:
        graph: the traced model.
        data: an array, or a list or dictionary of them for a model of several inputs; `(x, y)`; or whatever else `fit` takes
            as its first argument. Of arrays evenly spaced entries are taken, since they may be sorted by label.

    Raises:
        DataError: if there is no image, or not one array for each input, of its shape.
    """
    x = data[0] if isinstance(data, tuple) else data
    most = min(MOST_IMAGES, max(1, MOST_ELEMENTS // max(elements(graph.tensors[tensor]) for tensor in graph.inputs)))
    batches, left = [], most
    for item in [x] if _are_arrays(x) else batches_in(x):
        inputs = item[0] if isinstance(item, (tuple, list)) and not _are_arrays(x) else item
        size = len((tree.flatten(inputs) or [()])[0])
        chosen = evenly(size, min(size, left))
        for start in range(0, len(chosen), BATCH):
            part = chosen[start : start + BATCH]
            batches.append(_fitting(graph, tree.map_structure(lambda array, part=part: entries(array, part), inputs)))
        left -= len(chosen)
        if left <= 0:
            break
    if not batches:
        raise DataError("Expected a few hundred images. Received: none.")
    return batches


def _are_arrays(x: Any) -> bool:
    """Whether something is an array, or a list, tuple or dictionary of them, and no data set."""
    return isinstance(x, (list, tuple, dict)) or hasattr(x, "shape")


def evenly(size: int, count: int) -> np.ndarray:
    """Indices of `count` of `size` entries, evenly spaced."""
    return np.linspace(0, max(size - 1, 0), count).round().astype(int)


def entries(array: Any, part: np.ndarray) -> Any:
    """Some entries of an array or tensor, of whatever library."""
    if len(part) == len(array):
        return array
    return array[part] if isinstance(array, np.ndarray) else ops.take(ops.convert_to_tensor(array), part, axis=0)


def _fitting(graph: ChannelGraph, inputs: Any) -> list[Any]:
    """A batch as the model takes it.

    Raises:
        DataError: if it does not.
    """
    name, expected = graph.model.name, [tuple(each.shape) for each in functional_in(graph.model).inputs]
    arrays = tree.flatten(inputs)
    if not isinstance(inputs, dict) and len(arrays) != len(expected):
        raise DataError(f"Expected an array for each input of {name}. Received: {len(arrays)} arrays.")
    try:
        taken = as_taken(graph.model, inputs)
        shapes = [tuple(each.shape) for each in taken]
    except ValueError:
        taken, shapes = [], [tuple(np.shape(array)) for array in arrays]
    fits = len(shapes) == len(expected) and all(
        len(shape) == len(own) and all(size in (None, n) for size, n in zip(own[1:], shape[1:], strict=True))
        for own, shape in zip(expected, shapes, strict=True)
    )
    if not taken or not fits:
        of = ", ".join(str(("n", *shape[1:])).replace("'", "") for shape in expected)
        raise DataError(
            f"Expected images as {name} takes them, of shape {of}. Received: {', '.join(map(str, shapes))}."
        )
    return taken


def lasting(graph: ChannelGraph, data: Any) -> Any:
    """Images that can be read again and again: what can be read once, such as a generator, is read now. See `image_batches`."""
    return _Kept(image_batches(graph, data)) if isinstance(data, Iterator) else data


@dataclass(frozen=True, repr=False)
class _Kept:
    batches: list[list[Any]]

    def __iter__(self) -> Iterator[tuple[list[Any]]]:
        return ((batch,) for batch in self.batches)


def elements(tensor: Tensor) -> int:
    """Elements of a tensor for one example; sizes that are unknown count as 1."""
    rows = tensor.rows if math.isfinite(tensor.rows) else 1.0
    return math.ceil(rows * math.prod(size or 1 for size in tensor.shape[1:]))


def batches_in(data: Any) -> Iterable[Any]:
    """What a data set gives in one pass."""
    return (data[number] for number in range(len(data))) if isinstance(data, keras.utils.PyDataset) else data
