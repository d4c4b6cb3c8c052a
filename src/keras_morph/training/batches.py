"""Batches of arrays, in an order that depends on a seed and the number of the epoch, and on nothing else.

Keras shuffles by the state of whatever random generator its backend takes, so that a resumed training would see the examples
in another order than an undisturbed one.
"""

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.processes import here

__all__ = ["Batches"]


class Batches(keras.utils.PyDataset):
    """Batches of examples, shuffled anew in each epoch.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)`; each an array, or arrays in lists and dictionaries.
        batch_size: examples per batch; the last one of an epoch may be smaller.
        seed: of the order, at least 0.
    """

    def __init__(self, data: tuple[Any, ...], batch_size: int, seed: int) -> None:
        super().__init__()
        self.arrays = _without_lists(tree.map_structure(_array, data if data[-1] is not None else data[:-1]))
        self.count = len(tree.flatten(self.arrays)[0])
        self.batch_size, self.seed = batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.order = np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def skip(self, batches: int) -> None:
        """Leave out the first batches of this epoch."""
        self.order = self.order[batches * self.batch_size :]

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> Any:
        chosen = here().part(self.order[number * self.batch_size : (number + 1) * self.batch_size])
        return tree.map_structure(lambda array: array[chosen], self.arrays)


def _without_lists(data: Any) -> Any:
    """Tuples for lists: TensorFlow's data sets make tensors of a list."""
    if isinstance(data, dict):
        return {key: _without_lists(value) for key, value in data.items()}
    return tuple(_without_lists(value) for value in data) if isinstance(data, list | tuple) else data


def _array(values: Any) -> np.ndarray:
    """As Keras takes arrays: numbers with a fraction in its own precision."""
    array = (
        ops.convert_to_numpy(values) if hasattr(values, "shape") and hasattr(values, "dtype") else np.asarray(values)
    )
    return array.astype(keras.config.floatx(), copy=False) if array.dtype.kind == "f" else array
