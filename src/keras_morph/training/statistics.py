"""Estimate anew what BatchNormalization knows of its input: after a cut, or where training was too short for it."""

import itertools
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops, tree

from keras_morph.graph.examples import batches_in, entries, evenly
from keras_morph.keras_internals import parts_of

__all__ = ["batches_of", "reestimate_statistics"]


def reestimate_statistics(model: keras.Model, data: Any, *, batch_size: int = 64, batches: int = 50) -> None:
    """Set the moving statistics of every BatchNormalization to the mean over some batches of data.

    Weights are left alone, and so are frozen layers (`trainable=False`), whose statistics are part of them.

    Args:
        model: a built model, changed in place.
        data: as in `shrink`: a pair of arrays, or whatever `fit` takes as its first argument.
        batch_size: examples per batch, where `data` is a pair of arrays.
        batches: at most so many batches are looked at.

    Example:
        >>> small = km.prune(model, "50%")
        >>> km.reestimate_statistics(small, (x, y), batch_size=32)
    """
    norms = [layer for layer in parts_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
    norms = [layer for layer in norms if layer.trainable]
    names = ("momentum", "renorm_momentum")  # the second where the layer has `renorm`
    momenta = [(layer, name, getattr(layer, name)) for layer in norms for name in names if hasattr(layer, name)]
    try:
        for number, x in enumerate(batches_of(data, batch_size, batches) if norms else ()):
            for layer, name, _ in momenta:
                setattr(layer, name, number / (number + 1))  # the mean of all batches so far
            model(x, training=True)
    finally:
        for layer, name, momentum in momenta:
            setattr(layer, name, momentum)


def batches_of(data: Any, batch_size: int, batches: int) -> Iterator[Any]:
    """Inputs of up to `batches` whole batches (of the first one, if there is no other)."""
    if hasattr(data, "shape"):  # an array of images without labels
        data = data, None
    if isinstance(data, tuple) and len(data) in (2, 3):
        size = len(tree.flatten(data[0])[0])
        number = min(batches, max(1, size // batch_size))
        chosen = evenly(size, min(size, number * batch_size))
        for first in range(number):  # each from all over the array, which may be sorted by label
            part = chosen[first::number]
            yield tree.map_structure(lambda x, part=part: ops.convert_to_tensor(entries(x, part)), data[0])
        return
    for item in itertools.islice(batches_in(data), batches):
        yield tree.map_structure(ops.convert_to_tensor, item[0] if isinstance(item, (tuple, list)) else item)
