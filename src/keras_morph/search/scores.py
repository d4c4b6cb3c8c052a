"""Scores from data: how much the loss depends on each channel of a model as it is."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.errors import KerasMorphError
from keras_morph.graph.tracing import graph_of, trace
from keras_morph.keras_internals import place_of
from keras_morph.surgery.copying import cloned
from keras_morph.training.recipe import Recipe, check_labelled, check_labels, fit_on
from keras_morph.training.regularizers import GroupLasso

__all__ = ["taylor_scores"]


def taylor_scores(model: Any, data: Any, *, loss: Any = None, batch_size: int = 64, batches: int = 16) -> np.ndarray:
    """How much the loss would change if a group were cut off, to first order, squared.

    The score of a channel is `(sum of gradient * weight over its kernel)^2`, that of a group the sum over its channels; the
    mean over batches is taken.

    Args:
        model: a functional or Sequential model, its ChannelGraph, or a StructureLearner; it is left alone.
        data: `(x, y)`, or whatever `fit` takes as its first argument.
        loss: as in `compile`; by default what the model was compiled with.
        batch_size: examples per batch, where `data` is a pair of arrays.
        batches: batches that are looked at, at most.

    Returns:
        float64, `(num_groups,)`, for `fit_budget(model, budget, scores=...)`.

    References:
        Molchanov et al., Importance estimation for neural network pruning, https://arxiv.org/abs/1906.10771

    Example:
        >>> structure = km.fit_budget(model, "50%", scores=km.taylor_scores(model, (x, y)))
    """
    graph = graph_of(model)
    objective = Recipe(loss=loss, metrics=[]).objective(graph.model)
    check_labelled("data", data)
    check_labels(data, objective)
    copy = cloned(graph.model)
    own = trace(copy)
    sources = GroupLasso().sources(own)
    recorder = _Recorder({id(source.variable): source.axis for source in sources})
    copy.compile(recorder, **{**objective, "metrics": None, "jit_compile": False})
    options: dict[str, Any] = {} if isinstance(data, tuple) else {"steps_per_epoch": batches}
    if isinstance(data, tuple):
        data = tuple(_first(part, batches * batch_size) for part in data)
    fit_on(copy, data, batch_size, seed=0, epochs=1, verbose=0, **options)
    scores = np.zeros(graph.num_groups)
    for source in sources:
        found = recorder.found.get(id(source.variable))
        if found is None:
            raise KerasMorphError(f"{source.layer.name} is not trainable, so that its channels have no Taylor score.")
        # The copy has the layers of the model, in the same order.
        np.add.at(scores, source.groups(own), np.asarray(ops.convert_to_numpy(found), np.float64))
    return scores / max(1, int(ops.convert_to_numpy(recorder.iterations)))


def _first(data: Any, count: int) -> Any:
    return keras.tree.map_structure(lambda part: part[:count], data)


class _Recorder(keras.optimizers.Optimizer):
    """An optimizer that changes nothing and adds up `(sum of gradient * weight)^2` per channel, on every backend."""

    def __init__(self, axes: dict[int, int]) -> None:
        super().__init__(learning_rate=0.0, name="recorder")
        self.axes = axes  # id of a variable -> the axis of its channels
        self.found: dict[int, Any] = {}
        self.places: list[tuple[int, Any] | None] = []

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        for variable in variables:
            axis = self.axes.get(id(variable))
            if axis is not None:
                total = self.add_variable((variable.shape[axis],), dtype="float32", name=f"{variable.name}_taylor")
                self.found[id(variable)] = total
            self.places.append(None if axis is None else (axis, total))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        place = self.places[place_of(self, variable)]
        if place is not None:
            axis, total = place
            other = [number for number in range(len(variable.shape)) if number != axis]
            change = ops.sum(ops.multiply(ops.cast(gradient, "float32"), ops.cast(variable, "float32")), axis=other)
            self.assign_add(total, ops.square(change))
