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

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.channels import ChannelGraph, Layer, Weight
from keras_morph.errors import KerasMorphError
from keras_morph.graph.examples import entries, evenly, image_batches
from keras_morph.graph.streaming import Stream
from keras_morph.graph.tracing import trace_as
from keras_morph.keras_internals import place_of, random_states, set_random_states
from keras_morph.layers.rules import variable
from keras_morph.surgery.copying import cloned
from keras_morph.surgery.rebuilding import as_computed
from keras_morph.training.recipe import Recipe, check_labelled, check_labels, fit_on
from keras_morph.training.regularizers import GroupLasso

__all__ = [
    "PER_COST",
    "check_trainable",
    "contribution_scores",
    "flap_scores",
    "fpgm_scores",
    "minitron_scores",
    "obs_scores",
    "scores_named",
    "taylor_scores",
    "whc_scores",
]


LARGEST = 2048  # channels of a weight that obs_scores lets go one by one: each takes time by their square
SMALLEST = 1e-9  # ridge: without any, what is said twice could not be inverted


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
    graph = as_computed(model)
    objective = Recipe(loss=loss, metrics=[]).objective(graph.model)
    check_labelled("data", data)
    check_labels(data, objective, graph.model)
    return _taylor(graph, data, objective, batch_size=batch_size, batches=batches)


def check_trainable(graph: ChannelGraph) -> None:
    """All weights that make channels are trainable.

    Raises:
        KerasMorphError: if one is not, which has no gradient.
    """
    for source in GroupLasso().sources(graph):
        if not source.variable.trainable:
            raise KerasMorphError(
                f"{source.layer.name} is not trainable, so that its channels have no Taylor score. Set trainable=True, or take "
                "other scores, such as contributions."
            )


def _taylor(
    graph: ChannelGraph,
    data: Any,
    objective: Mapping[str, Any],
    *,
    batch_size: int = 64,
    batches: int = 16,
    class_weight: Any = None,
) -> np.ndarray:
    check_trainable(graph)
    copy = cloned(graph.model)
    own = trace_as(copy, graph.wiring)
    sources = GroupLasso().sources(own)
    recorder = _Recorder({id(source.variable): source.axis for source in sources})
    copy.compile(recorder, **{**objective, "metrics": None, "weighted_metrics": None, "jit_compile": False})
    options: dict[str, Any] = {} if class_weight is None else {"class_weight": class_weight}
    options |= {} if isinstance(data, tuple) else {"steps_per_epoch": batches}
    if isinstance(data, tuple):
        examples = len(keras.tree.flatten(data[0])[0])
        chosen = evenly(examples, min(examples, batches * batch_size))  # they may be sorted by label
        data = keras.tree.map_structure(lambda part: entries(part, chosen), data)
    before = random_states()
    try:
        fit_on(copy, data, batch_size, seed=0, epochs=1, verbose=0, **options)
    finally:
        set_random_states(before)
    scores = np.zeros(graph.num_groups)
    for source in sources:
        found = recorder.found[id(source.variable)]
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

    Channels go one after the other, the one that is missed least first. A channel's score is what is lost when its turn comes,
    by layers that have adapted to all that went before: of two that say the same, one is free and the other is not.
    It is K_j K_j' (1 / (H^-1)_jj - l) as a share of what `contribution_scores` divides by, where H is the covariance of what is
    read and left plus l = `ridge` times its mean variance on the diagonal, and K_j what the kernel by then makes of the channel.
    All positions of a kernel are treated alike. Channels that no weight reads are scored as there, and so is what a weight
    reads that reads more than 2,048.

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
        >>> structure = km.fit_budget(model, km.Budget("50%", per_cost=1), scores=km.obs_scores(model, images))
    """
    graph = as_computed(model)
    lost, scores = np.zeros(graph.num_groups), np.zeros(graph.num_groups)
    read, met = np.zeros(graph.num_groups, bool), defaultdict(list)
    for matrix, groups, x in _readings(graph, images):
        read[groups] = True
        if len(groups) > LARGEST:
            np.add.at(lost, groups, _shares(np.square(matrix).sum(1), x.variances))
            continue  # each removal would take a second
        reader = _Reader(matrix, groups, x, ridge)
        np.add.at(lost, groups, reader.losses())
        for group in np.unique(groups).tolist():
            met[group].append(reader)
    left, least = read & ~graph.pinned_mask, 0.0
    for _ in range(left.sum()):
        group = int(np.where(left, lost, np.inf).argmin())
        scores[group] = least = max(least, lost[group])  # what a later one costs, those before it cost with it
        left[group] = False
        for reader in met[group]:
            np.subtract.at(lost, reader.groups, reader.losses())
            reader.remove(group)
            np.add.at(lost, reader.groups, reader.losses())
    for energies, groups in _unread(graph, read | graph.pinned_mask):
        np.add.at(scores, groups, energies)
    return scores


class _Reader:
    """A weight that adapts to what is left of the channels it reads, while these go one after the other.

    Attributes:
        groups: of each channel that it reads.
    """

    def __init__(self, matrix: np.ndarray, groups: np.ndarray, x: "_Read", ridge: float) -> None:
        self.groups = groups
        self.held = max(ridge, SMALLEST) * (x.variances.mean() or 1.0)
        self.inverse = np.linalg.inv(x.covariance + self.held * np.eye(len(groups)))
        self.products = matrix @ matrix.T  # of the kernel's parts that meet two channels
        self.made = float(np.diag(self.products) @ x.variances) or 1.0
        order = np.argsort(groups, kind="stable")
        together = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
        self.together = [channels for channels in together if len(channels) > 1]  # such as positions of a flattened map

    def losses(self) -> np.ndarray:
        """What is lost with each channel, as a share of what all contribute; several of one group share its loss."""
        alone = np.maximum(1 / np.diag(self.inverse) - self.held, 0.0)  # what the others do not say of each
        lost = np.diag(self.products) * alone
        for channels in self.together:  # none of them is left to make up for another
            inside = np.ix_(channels, channels)
            rest = np.linalg.inv(self.inverse[inside]) - self.held * np.eye(len(channels))
            lost[channels] = max(float(np.sum(self.products[inside] * rest)), 0.0) / len(channels)
        return lost / self.made

    def remove(self, group: int) -> None:
        """Let a group's channels go, and the kernel make up for them."""
        for j in np.flatnonzero(self.groups == group):
            row, products = self.inverse[j].copy(), self.products[j].copy()
            share = row / row[j]
            self.inverse -= np.outer(share, row)
            self.inverse[j] = self.inverse[:, j] = 0.0
            self.inverse[j, j] = 1.0  # nothing meets it any more
            self.products += np.outer(share, share * products[j] - products) - np.outer(products, share)
            self.products[j] = self.products[:, j] = 0.0


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
    """Statistics of what a layer reads: one number per entry of its channel axis, all positions being samples.

    Attributes:
        variances: of each channel.
        sizes: root mean square over images of the mean absolute value over positions.
    """

    def __init__(self, batches: list[Any], axis: int) -> None:
        self.batches, self.axis = batches, axis
        count, images = 0, 0
        total, squares, sizes = [np.zeros(1)] * 3
        for x in self:
            images, sizes = images + len(x), sizes + np.square(np.abs(x).mean(1)).sum(0)
            count, total = count + x[..., 0].size, total + x.sum((0, 1))
        self.mean = total / count
        for x in self:  # in a second pass: means may be huge
            squares = squares + np.square(x - self.mean).sum((0, 1))
        self.variances = squares / count
        self.sizes = np.sqrt(sizes / images)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(image, position, channel), float64."""
        for batch in self.batches:
            x = np.moveaxis(np.asarray(ops.convert_to_numpy(batch), np.float64), self.axis, -1)
            yield x.reshape(len(x), -1, x.shape[-1])

    @property
    def covariance(self) -> np.ndarray:
        """Between channels: of so many as a flattened image has it would take gigabytes."""
        count, products = 0, np.zeros(1)
        for x in self:
            centered = x.reshape(-1, x.shape[-1]) - self.mean
            count, products = count + len(centered), products + centered.T @ centered
        return products / count


def _scored(model: Any, images: Any, reduce: np.ufunc, score: Callable[[np.ndarray, _Read], np.ndarray]) -> np.ndarray:
    """Scores of groups from each weight that reads them and what it reads.

    Args:
        model, images: as in `contribution_scores`.
        reduce: np.add or np.maximum, over the channels of a group and the layers that read it.
        score: a number per channel, from the squared norm of each channel's part of the weight and what is read.
    """
    graph = as_computed(model)
    # No channel is below what nothing reads.
    scores = np.zeros(graph.num_groups) if reduce is np.add else np.full(graph.num_groups, -np.inf)
    read = graph.pinned_mask.copy()
    for matrix, groups, x in _readings(graph, images):
        reduce.at(scores, groups, score(np.square(matrix).sum(1), x))
        read[groups] = True
        del matrix, x  # before the next ones are made
    if reduce is np.add:
        for energies, groups in _unread(graph, read):
            np.add.at(scores, groups, energies)
    return np.where(np.isfinite(scores), scores, scores[np.isfinite(scores)].min(initial=0.0))


def _readings(graph: ChannelGraph, images: Any) -> Iterator[tuple[np.ndarray, np.ndarray, _Read]]:
    """For each weight that reads channels: the part of it that meets each of them, their groups, and what is read."""
    reading = [
        (layer, weight, graph.calls[call].inputs[0])
        for number, layer in enumerate(graph.layers)
        if layer.made is not None
        for call in graph.layer_calls[number]
        for weight in layer.weights
        if _reads(layer, weight)
    ]
    stream = Stream(graph, image_batches(graph, images), [tensor for *_, tensor in reading])
    for layer, weight, tensor in reading:
        yield *_parts(graph, layer, weight), _Read(stream.finite(tensor, layer.name), graph.tensors[tensor].axis)
        stream.release(tensor)


def _reads(layer: Layer, weight: Weight) -> bool:
    return (weight.reads is not None and weight.vectors[weight.reads] >= 0) or _is_grouped(layer, weight)


def _is_grouped(layer: Layer, weight: Weight) -> bool:
    """A grouped convolution whose groups keep equal counts: its kernel is (.., channels of a group, results of all)."""
    inside = weight.reads is None and _name(weight) == "kernel" and weight.vectors[-2] >= 0
    return inside and getattr(_wrapped(layer), "groups", 1) > 1


def _name(weight: Weight) -> str:
    """The weight's name in the layer that has it, which may be inside a TimeDistributed."""
    return weight.name.rpartition(".")[2]


def _wrapped(layer: Layer) -> Any:
    return layer.operation.layer if isinstance(layer.operation, keras.layers.TimeDistributed) else layer.operation


def _parts(graph: ChannelGraph, layer: Layer, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """A weight as a row for each channel that it reads, float64, and the groups of the channels."""
    values = _values(layer, weight)
    if _is_grouped(layer, weight):
        number, inside = _wrapped(layer).groups, values.shape[-2]
        values = values.reshape(-1, inside, number, values.shape[-1] // number).transpose(2, 1, 0, 3)
        apart = np.zeros((number, inside, number, values[0, 0].size))  # what one conv group makes, no other does
        apart[np.arange(number), :, np.arange(number)] = values.reshape(number, inside, -1)
        return apart.reshape(number * inside, -1), np.tile(graph.groups_of(weight.vectors[-2]), number)
    assert weight.reads is not None
    points = next((each for each in layer.weights if _name(each) == "pointwise_kernel"), None)
    if _name(weight) == "depthwise_kernel" and points is not None:  # of a separable convolution
        channels, multiplier = values.shape[-2:]
        values = values.reshape(-1, channels, multiplier)
        values = np.einsum(
            "pcm,cmo->cpo", values, _values(layer, points).reshape(channels, multiplier, -1), optimize=False
        )
    else:
        values = np.moveaxis(values, weight.reads, 0)
    return values.reshape(len(values), -1), graph.groups_of(weight.vectors[weight.reads])


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
            energies = _along(np.square(_values(layer, weight)), weight.scores)
            for other in layer.weights:
                if other is weight or other.scores is None:
                    continue
                for axis, vector in enumerate(other.vectors):
                    inside = graph.groups_of(vector) if vector >= 0 and axis != other.scores else groups[:0]
                    if len(inside) and np.isin(inside, groups).all():  # heads, and what reads them
                        sums = np.zeros(graph.num_groups)
                        np.add.at(sums, inside, _along(np.square(_values(layer, other)), axis))
                        energies = energies * sums[groups]
            yield (energies / (energies.sum() or 1.0))[lost], groups[lost]


def _values(layer: Layer, weight: Weight) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(variable(layer.operation, weight.name)), np.float64)


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
    graph = as_computed(model)
    scores = np.zeros(graph.num_groups)
    for source in GroupLasso().sources(graph):
        kernel = np.asarray(ops.convert_to_numpy(source.variable), np.float64)
        each = score(np.moveaxis(kernel, source.axis, 0).reshape(kernel.shape[source.axis], -1))
        np.maximum.at(scores, source.groups(graph), each / (each.mean() or 1.0))
    return scores


# By name.

BY_IMAGES: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "contribution": contribution_scores,
    "obs": obs_scores,
    "flap": flap_scores,
    "minitron": minitron_scores,
}
BY_KERNELS: dict[str, Callable[[Any], np.ndarray]] = {"fpgm": fpgm_scores, "whc": whc_scores}
PER_COST = ("contribution", "obs", "taylor")  # better by what a channel costs: docs/recovery.md


def scores_named(
    name: str, model: Any, images: Any, data: Any, objective: Mapping[str, Any], class_weight: Any = None
) -> np.ndarray:
    """The scores of one of `SCORES`.

    Args:
        name: which.
        model: as in all of them.
        images: without labels, for those that need some.
        data: as in `taylor_scores`.
        objective: for `compile`.
        class_weight: as in `fit`.
    """
    if name == "taylor":
        return _taylor(as_computed(model), data, objective, class_weight=class_weight)
    return BY_KERNELS[name](model) if name in BY_KERNELS else BY_IMAGES[name](model, images)
