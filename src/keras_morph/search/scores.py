"""Scores besides the regularizers': from data, and from how much alike channels are. Each is an array `(num_groups,)`.

    taylor_scores          how much the loss depends on a channel; needs labels
    contribution_scores    its share in the variance of what layers make that read it
    obs_scores             what these layers lose without it, if the other channels make up for it as far as they can
    flap_scores            how much it varies, times the kernel that reads it, standardized within each layer
    minitron_scores        how large it is
    fpgm_scores            how far its kernel is from the others
    whc_scores             the same by angles, times its norm

All but the first and the last two need some images without labels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.channels import ChannelGraph, Layer, Weight
from keras_morph.errors import KerasMorphError
from keras_morph.graph.examples import entries, evenly, image_batches
from keras_morph.graph.streaming import Stream
from keras_morph.graph.tracing import graph_of, trace_as
from keras_morph.keras_internals import place_of, random_states, set_random_states
from keras_morph.layers.rules import variable
from keras_morph.surgery.copying import cloned
from keras_morph.training.recipe import Recipe, check_labelled, check_labels, fit_on
from keras_morph.training.regularizers import GroupLasso

__all__ = [
    "contribution_scores",
    "flap_scores",
    "fpgm_scores",
    "minitron_scores",
    "obs_scores",
    "taylor_scores",
    "whc_scores",
]


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
    own = trace_as(copy, graph.wiring)
    sources = GroupLasso().sources(own)
    recorder = _Recorder({id(source.variable): source.axis for source in sources})
    copy.compile(recorder, **{**objective, "metrics": None, "jit_compile": False})
    options: dict[str, Any] = {} if isinstance(data, tuple) else {"steps_per_epoch": batches}
    if isinstance(data, tuple):
        chosen = evenly(len(data[1]), min(len(data[1]), batches * batch_size))  # they may be sorted by label
        data = keras.tree.map_structure(lambda part: entries(part, chosen), data)
    before = random_states()
    try:
        fit_on(copy, data, batch_size, seed=0, epochs=1, verbose=0, **options)
    finally:
        set_random_states(before)
    scores = np.zeros(graph.num_groups)
    for source in sources:
        found = recorder.found.get(id(source.variable))
        if found is None:
            raise KerasMorphError(f"{source.layer.name} is not trainable, so that its channels have no Taylor score.")
        # The copy has the layers of the model, in the same order.
        np.add.at(scores, source.groups(own), np.asarray(ops.convert_to_numpy(found), np.float64))
    return scores / max(1, int(ops.convert_to_numpy(recorder.iterations)))


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
        for each in variables:
            axis = self.axes.get(id(each))
            if axis is not None:
                total = self.add_variable((each.shape[axis],), dtype="float32", name=f"{each.name}_taylor")
                self.found[id(each)] = total
            self.places.append(None if axis is None else (axis, total))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        place = self.places[place_of(self, variable)]
        if place is not None:
            axis, total = place
            other = [number for number in range(len(variable.shape)) if number != axis]
            change = ops.sum(ops.multiply(ops.cast(gradient, "float32"), ops.cast(variable, "float32")), axis=other)
            self.assign_add(total, ops.square(change))


# From activations: what a layer reads, and by which weight.


def contribution_scores(model: Any, images: Any) -> np.ndarray:
    """The share that a channel has in the variance of what the layers make that read it, as if channels varied alone.

    Var(x_j) ||W_j||^2 / sum over channels i of Var(x_i) ||W_i||^2, summed over layers that read it and over the channels of a
    group. Channels that no weight reads, such as heads of attention, or queries and keys that are multiplied with each other,
    have their share in the squared norms of the kernels that make them, of heads times those that read them in the same layer.
    Meant to be divided by prices: `Budget(per_cost=1)`.

    Args:
        model: a functional or Sequential model, its ChannelGraph, or a StructureLearner; it is left alone.
        images: as in `recover`.

    Returns:
        float64, `(num_groups,)`, for `fit_budget(model, budget, scores=...)`.

    Example:
        >>> scores = km.contribution_scores(model, images)
        >>> structure = km.fit_budget(model, km.Budget("50%", per_cost=1), scores=scores)
    """
    return _scored(model, images, np.add, lambda energies, x: _shares(energies, x.variances))


def obs_scores(model: Any, images: Any, *, ridge: float = 1e-2) -> np.ndarray:
    """What layers lose that read a channel, if the kernels of the other channels make up for it as far as they can.

    As `contribution_scores`, with what the other channels do not say of x_j in the place of Var(x_j) in the numerator. That is
    1 / (H^-1)_jj - l, where H is the covariance of what a layer reads plus l = `ridge` times its mean variance on the diagonal.
    All positions of a kernel are treated alike.

    Args:
        model: as in `contribution_scores`.
        images: as in `recover`.
        ridge: as in `recover`.

    Returns:
        As `contribution_scores`.

    References:
        Hassibi and Stork, Second order derivatives for network pruning: optimal brain surgeon, 1993
        Kurtic et al., ZipLM, https://arxiv.org/abs/2302.04089

    Example:
        >>> structure = km.fit_budget(model, "50%", scores=km.obs_scores(model, images))
    """

    def lost(energies: np.ndarray, x: _Read) -> np.ndarray:
        held = ridge * x.variances.mean() or 1.0
        alone = 1 / np.diag(np.linalg.inv(x.covariance + held * np.eye(len(energies)))) - held
        return energies * np.maximum(alone, 0.0) / ((energies @ x.variances) or 1.0)

    return _scored(model, images, np.add, lost)


def flap_scores(model: Any, images: Any) -> np.ndarray:
    """Var(x_j) ||W_j||^2, standardized within each layer that reads; a group has the largest of its channels.

    Args:
        model: as in `contribution_scores`.
        images: as in `recover`.

    Returns:
        float64, `(num_groups,)`; some are negative, so that they should not be divided by prices.

    References:
        An et al., Fluctuation-based adaptive structured pruning, https://arxiv.org/abs/2312.11983

    Example:
        >>> structure = km.fit_budget(model, "50%", scores=km.flap_scores(model, images))
    """

    def standardized(energies: np.ndarray, x: _Read) -> np.ndarray:
        values = energies * x.variances
        return (values - values.mean()) / (values.std() or 1.0)

    return _scored(model, images, np.maximum, standardized)


def minitron_scores(model: Any, images: Any) -> np.ndarray:
    """How large a channel is: the root mean square over images of the mean of |x_j| over positions.

    It is taken as a multiple of the mean over the channels of a layer, and a group has the largest of its channels.

    Args:
        model: as in `contribution_scores`.
        images: as in `recover`.

    Returns:
        As `contribution_scores`.

    References:
        Muralidharan et al., Compact language models via pruning and knowledge distillation, https://arxiv.org/abs/2407.14679

    Example:
        >>> structure = km.fit_budget(model, "50%", scores=km.minitron_scores(model, images))
    """
    return _scored(model, images, np.maximum, lambda _, x: x.sizes / (x.sizes.mean() or 1.0))


def _shares(energies: np.ndarray, variances: np.ndarray) -> np.ndarray:
    each = energies * variances
    return each / (each.sum() or 1.0)


class _Read:
    """Statistics of what a layer reads: one number per entry of its channel axis.

    Attributes:
        covariance: between channels, all positions being samples.
        sizes: root mean square over images of the mean absolute value over positions.
    """

    def __init__(self, batches: list[Any], axis: int) -> None:
        count, images = 0, 0
        total, products, sizes = [np.zeros(1)] * 3
        for batch in batches:
            x = np.moveaxis(np.asarray(ops.convert_to_numpy(batch), np.float64), axis, -1)
            x = x.reshape(len(x), -1, x.shape[-1])
            images, sizes = images + len(x), sizes + np.square(np.abs(x).mean(1)).sum(0)
            x = x.reshape(-1, x.shape[-1])
            count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
        mean = total / count
        self.covariance = products / count - np.outer(mean, mean)
        self.sizes = np.sqrt(sizes / images)

    @property
    def variances(self) -> np.ndarray:
        return np.maximum(np.diag(self.covariance), 0.0)


def _scored(model: Any, images: Any, reduce: np.ufunc, score: Callable[[np.ndarray, _Read], np.ndarray]) -> np.ndarray:
    """Scores of groups from each weight that reads them and what it reads.

    Args:
        model, images: as in `contribution_scores`.
        reduce: np.add or np.maximum, over the channels of a group and the layers that read it.
        score: a number per channel, from the squared norm of each channel's part of the weight and what is read.
    """
    graph = graph_of(model)
    reading = [
        (energies, groups, graph.calls[graph.layer_calls[number][0]].inputs[0])
        for number, layer in enumerate(graph.layers)
        if layer.made is not None
        for energies, groups in _read_by(graph, layer)
    ]
    stream = Stream(graph, image_batches(graph, images), [tensor for *_, tensor in reading])
    # No channel is below what nothing reads.
    scores = np.zeros(graph.num_groups) if reduce is np.add else np.full(graph.num_groups, -np.inf)
    read = graph.pinned_mask.copy()
    for energies, groups, tensor in reading:
        reduce.at(scores, groups, score(energies, _Read(stream[tensor], graph.tensors[tensor].axis)))
        read[groups] = True
        stream.release(tensor)
    if reduce is np.add:
        for energies, groups in _unread(graph, read):
            np.add.at(scores, groups, energies)
    return np.where(np.isfinite(scores), scores, scores[np.isfinite(scores)].min(initial=0.0))


def _read_by(graph: ChannelGraph, layer: Layer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each weight that reads channels: squared norms of what each of them meets, and the groups of the channels."""
    squares = {weight.name: _squares(layer, weight) for weight in layer.weights}
    for weight in layer.weights:
        values, axis = squares[weight.name], weight.reads
        if axis is not None and weight.vectors[axis] >= 0:
            if weight.name == "depthwise_kernel" and "pointwise_kernel" in squares:  # of a separable convolution
                points = squares["pointwise_kernel"]
                values = values * points.sum(axis=-1).reshape(values.shape[-2:])
            yield _along(values, axis), graph.groups_of(weight.vectors[axis])
        elif getattr(layer.operation, "groups", 1) > 1 and weight.name == "kernel" and weight.vectors[-2] >= 0:
            # A grouped convolution whose groups keep equal counts: (.., channels of a group, groups * results of one).
            number = layer.operation.groups
            parts = values.sum(axis=tuple(range(values.ndim - 2))).reshape(values.shape[-2], number, -1).sum(-1)
            yield parts.T.ravel(), np.tile(graph.groups_of(weight.vectors[-2]), number)


def _unread(graph: ChannelGraph, read: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What can be said of channels that no weight reads: shares in the squared norms of what makes them."""
    for layer in graph.layers:
        for weight in layer.weights:
            if weight.scores is None or weight.vectors[weight.scores] < 0:
                continue
            groups = graph.groups_of(weight.vectors[weight.scores])
            lost = ~read[groups]
            if not lost.any():
                continue
            energies = _along(_squares(layer, weight), weight.scores)
            for other in layer.weights:
                if other is weight or other.scores is None:
                    continue
                for axis, vector in enumerate(other.vectors):
                    inside = graph.groups_of(vector) if vector >= 0 and axis != other.scores else groups[:0]
                    if len(inside) and np.isin(inside, groups).all():  # heads, and what reads them
                        sums = np.zeros(graph.num_groups)
                        np.add.at(sums, inside, _along(_squares(layer, other), axis))
                        energies = energies * sums[groups]
            yield (energies / (energies.sum() or 1.0))[lost], groups[lost]


def _squares(layer: Layer, weight: Weight) -> np.ndarray:
    return np.square(np.asarray(ops.convert_to_numpy(variable(layer.operation, weight.name)), np.float64))


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    """Sums of what lies at each place of an axis."""
    return values.sum(axis=tuple(other for other in range(values.ndim) if other != axis))


# From weights alone: how much alike channels are.


def fpgm_scores(model: Any) -> np.ndarray:
    """How far a channel's kernel is from the others of its layer: the sum over j of ||w_i - w_j||.

    It is taken as a multiple of the layer's mean, and a group has the largest of its channels.

    Args:
        model: a functional or Sequential model, its ChannelGraph, or a StructureLearner.

    Returns:
        float64, `(num_groups,)`, for `fit_budget(model, budget, scores=...)`.

    References:
        He et al., Filter pruning via geometric median, https://arxiv.org/abs/1811.00250

    Example:
        >>> structure = km.fit_budget(model, "50%", scores=km.fpgm_scores(model))
    """

    def distances(w: np.ndarray) -> np.ndarray:
        squares = np.square(w).sum(1)
        return np.sqrt(np.maximum(squares[:, None] + squares - 2 * w @ w.T, 0.0)).sum(1)

    return _from_kernels(model, distances)


def whc_scores(model: Any) -> np.ndarray:
    """A kernel's norm times how far it is from the others in angle: ||w_i|| * sum over j of ||w_j|| (1 - |cos(w_i, w_j)|).

    Args:
        model: as in `fpgm_scores`.

    Returns:
        As `fpgm_scores`.

    References:
        Chen et al., WHC: weighted hybrid criterion for filter pruning, https://arxiv.org/abs/2302.08185

    Example:
        >>> structure = km.fit_budget(model, "50%", scores=km.whc_scores(model))
    """

    def weighted(w: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(w, axis=1)
        return (np.outer(norms, norms) - np.abs(w @ w.T)).clip(0.0).sum(1)

    return _from_kernels(model, weighted)


def _from_kernels(model: Any, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The largest score of each group, from the rows `(channel, entry)` of each weight that makes channels."""
    graph = graph_of(model)
    scores = np.zeros(graph.num_groups)
    for source in GroupLasso().sources(graph):
        kernel = np.asarray(ops.convert_to_numpy(source.variable), np.float64)
        each = score(np.moveaxis(kernel, source.axis, 0).reshape(kernel.shape[source.axis], -1))
        np.maximum.at(scores, source.groups(graph), each / (each.mean() or 1.0))
    return scores
