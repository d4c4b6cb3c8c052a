"""What the tensors of a traced model hold for some images: made call by call, and let go when nothing reads them any more."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.channels import Call, ChannelGraph, Tensor
from keras_morph.errors import DataError
from keras_morph.graph.replaying import called, inferring
from keras_morph.keras_internals import as_taken, functional_in, mask_of

__all__ = ["Stream", "entries", "evenly", "image_batches", "lasting"]

MOST_IMAGES = 1024  # more add little to means and covariances
MOST_ELEMENTS = 2**27  # of a tensor for all images, 0.5 GB in float32: a handful of tensors are in memory at once
BATCH = 64  # images in one call of a layer


def image_batches(graph: ChannelGraph, data: Any) -> list[list[Any]]:
    """Inputs of a model without labels, for each batch a flat list of arrays, one per input.

    Up to 1,024 images, and no more than 2^27 elements of any tensor: large images have many positions.

    Args:
        graph: the traced model.
        data: an array, or a list or dictionary of them for a model of several inputs; `(x, y)`; or whatever else `fit` takes
            as its first argument. Of arrays evenly spaced entries are taken, since they may be sorted by label.

    Raises:
        DataError: if there is no image, or not one array for each input, of its shape.
    """
    x = data[0] if isinstance(data, tuple) else data
    most = min(MOST_IMAGES, max(1, MOST_ELEMENTS // max(map(_elements, graph.tensors))))
    batches, left = [], most
    for item in [x] if _are_arrays(x) else _items(x):
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
    """Whether something is an array, or a list or dictionary of them, and no data set."""
    return isinstance(x, (list, dict)) or hasattr(x, "shape")


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
    return _Read(image_batches(graph, data)) if isinstance(data, Iterator) else data


@dataclass(frozen=True, repr=False)
class _Read:
    batches: list[list[Any]]

    def __iter__(self) -> Iterator[tuple[list[Any]]]:
        return ((batch,) for batch in self.batches)


def _elements(tensor: Tensor) -> int:
    """Elements of a tensor for one example; sizes that are unknown count as 1."""
    rows = tensor.rows if math.isfinite(tensor.rows) else 1.0
    return math.ceil(rows * math.prod(size or 1 for size in tensor.shape[1:]))


def _items(data: Any) -> Iterable[Any]:
    return (data[number] for number in range(len(data))) if isinstance(data, keras.utils.PyDataset) else data


class Stream:
    """The tensors of a traced model in inference, in batches: `stream[tensor]` runs the calls up to the one that makes it.

    Args:
        graph: the traced model.
        batches: as `image_batches` gives them.
        looks: tensors that are looked at from outside, each as often as it stands here; `release` ends a look.
    """

    def __init__(self, graph: ChannelGraph, batches: Sequence[Sequence[Any]], looks: Iterable[int] = ()) -> None:
        self.graph, self.batches = graph, len(batches)
        self.uses = Counter(looks)
        for call in graph.calls:
            self.uses.update(set(call.numbers.values()))
        dtypes = [source.dtype for source in functional_in(graph.model).inputs]
        self.values = {
            number: [ops.convert_to_tensor(batch[place], dtype) for batch in batches]
            for place, (number, dtype) in enumerate(zip(graph.inputs, dtypes, strict=True))
        }
        self.ahead = (call for call in graph.calls if call.mode != "input")

    def __getitem__(self, tensor: int) -> list[Any]:
        while tensor not in self.values:
            self.run(next(self.ahead))
        return self.values[tensor]

    def __iter__(self) -> Iterator[Call]:
        """The calls to come; each is run after the body of the loop."""
        for call in self.ahead:
            yield call
            self.run(call)

    def run(self, call: Call) -> None:
        operation = inferring(self.graph.layers[call.layer].operation)
        results = [
            called(call, operation, lambda number, _, batch=batch: self.values[number][batch])  # type: ignore[misc]
            for batch in range(self.batches)
        ]
        for place, output in enumerate(call.outputs):
            self.values[output] = [_detached(result[place]) for result in results]
        for tensor in set(call.numbers.values()):
            self.release(tensor)

    def release(self, tensor: int) -> None:
        """A call or a look is done with a tensor."""
        self.uses[tensor] -= 1
        if self.uses[tensor] <= 0:
            self.values.pop(tensor, None)


def _detached(x: Any) -> Any:
    """Without what a gradient would need, which PyTorch keeps; a copy would lose a Keras mask."""
    return x if mask_of(x) is not None else ops.stop_gradient(x)
