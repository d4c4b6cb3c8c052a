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
from keras_morph.keras_internals import functional_in, mask_of

__all__ = ["Stream", "image_batches", "lasting"]

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
        DataError: if there is no image, or not one array for each input.
    """
    x = data[0] if isinstance(data, tuple) else data
    most = min(MOST_IMAGES, max(1, MOST_ELEMENTS // max(map(_elements, graph.tensors))))
    if isinstance(x, (list, dict)) or hasattr(x, "shape"):
        arrays = tree.flatten(x)
        size = len(arrays[0]) if arrays else 0
        chosen = np.linspace(0, max(size - 1, 0), min(size, most)).round().astype(int)
        parts = (chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH))
        batches = [[array[part] for array in arrays] for part in parts]
    else:
        batches, images = [], 0
        for item in _items(x):
            batches.append(tree.flatten(item[0] if isinstance(item, (tuple, list)) else item))
            images += len(batches[-1][0])
            if images >= most:
                break
    if not batches:
        raise DataError("Expected a few hundred images. Received: none.")
    if len(batches[0]) != len(graph.inputs):
        raise DataError(f"Expected an array for each input of {graph.model.name}. Received: {len(batches[0])} arrays.")
    return batches


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
