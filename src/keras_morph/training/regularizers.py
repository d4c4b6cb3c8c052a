"""How strong each channel is, and when it counts as dead.

A regularizer reads one weight per channel (a slice of a kernel, a gamma, or a logit) and gives a score. Channels of a group
are reduced by their maximum: a group lives while one of its channels does. Attached to a graph, it says which network is
trained and what scores it: for most the seed and they themselves, for a gate the seed wired through gates and these gates.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np

from keras_morph.channels import ChannelGraph, Layer, Weight
from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.layers.rules import variable
from keras_morph.saving import Configured

__all__ = [
    "Attached",
    "Gamma",
    "GroupLasso",
    "Regularizer",
    "Source",
    "attached",
    "check_finite",
    "checked_threshold",
    "group_scores",
    "pin_sourceless",
]


@dataclass(frozen=True)
class Source:
    """A weight that gives scores to the channels of one vector.

    Attributes:
        layer: the layer.
        weight: its weight.
        axis: the weight's axis along which the channels lie.
    """

    layer: Layer
    weight: Weight
    axis: int

    def groups(self, graph: ChannelGraph) -> np.ndarray:
        """Group number of each channel along the axis."""
        return graph.groups_of(self.weight.vectors[self.axis])

    @property
    def other_axes(self) -> tuple[int, ...]:
        """Axes that the score reduces."""
        return tuple(axis for axis in range(len(self.weight.shape)) if axis != self.axis)

    @property
    def variable(self) -> Any:
        """The Keras variable."""
        return variable(self.layer.operation, self.weight.name)


class Regularizer(Protocol):
    """What a regularizer of your own has to have.

    It may also have `attach(graph)`, which returns an Attached where it needs more than the seed's own weights;
    `comparable(scores, entries)`, as GroupLasso has, where scores of layers of different sizes have to
    be scaled before `fit_budget` chooses among them; `initial_strength` and `strength_factor`: where a StrengthController
    begins, times the cost of the seed, and the factor by which it goes on; and `get_config` and `from_config`, without which
    its learner is not saved whole.
    """

    threshold: float

    def sources(self, graph: ChannelGraph) -> list[Any]:
        """The weights that it reads: objects with the `groups`, `variable` and `other_axes` of a Source."""

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        """One non-negative score per channel: `weight` reduced over `axes`, with `xp` = keras.ops or numpy.

        Its gradient must be finite where the weight is exactly zero.
        """


@dataclass(frozen=True)
class Attached:
    """A regularizer at work on one model.

    Attributes:
        network: what is trained: the seed itself, or its layers wired through gates.
        scorer: has the `threshold`, `sources` and `score` of a Regularizer. A gate has `values(num_groups)` too: what each group
            is multiplied by in inference. One that samples has `stop_sampling()`, and `temperature`, a Keras variable.
        graph: the traced seed; groups that the scorer has no score for are pinned.
    """

    network: keras.Model
    scorer: Any
    graph: ChannelGraph

    @property
    def gates(self) -> Any:
        """The scorer, where it is one of gates; else None."""
        return None if self.network is self.graph.model else self.scorer


def attached(regularizer: Any, graph: ChannelGraph) -> Attached:
    """A regularizer attached to a graph: by its own `attach`, or as what reads the seed's weights.

    Raises:
        UnsupportedModelError: if it finds nothing to read.
    """
    if hasattr(regularizer, "attach"):
        return regularizer.attach(graph)
    return Attached(graph.model, regularizer, pin_sourceless(graph, regularizer))


def checked_threshold(value: float) -> float:
    """A threshold of at least 0.

    Raises:
        KerasMorphError: if it is not.
    """
    if not value >= 0:
        raise KerasMorphError(f"Expected a threshold of at least 0. Received: threshold={value}.")
    return float(value)


@keras.saving.register_keras_serializable("keras_morph")
class GroupLasso(Configured):
    """Root mean square of each channel's kernel, of convolutions and Dense layers alike.

    score = (1 - l1_fraction) * sqrt(mean(w^2)) + l1_fraction * mean(|w|), over all axes of the kernel but the output's.
    Depthwise kernels are no source: their channels are scored by the layers that make them.

    Args:
        threshold: a channel is alive when its score is strictly above.
        l1_fraction: share of the L1 term, 0 to 1.

    References:
        Gordon et al., MorphNet, https://arxiv.org/abs/1711.06798

    Example:
        >>> km.StructureLearner(model, regularizer=km.GroupLasso(threshold=0.05)).scores().shape
        (22,)
    """

    def __init__(self, threshold: float = 1e-2, *, l1_fraction: float = 0.0) -> None:
        if not 0 <= l1_fraction <= 1:
            raise KerasMorphError(f"GroupLasso expects 0 <= l1_fraction <= 1. Received: l1_fraction={l1_fraction}.")
        self.threshold, self.l1_fraction = checked_threshold(threshold), float(l1_fraction)

    def sources(self, graph: ChannelGraph) -> list[Source]:
        return [
            Source(layer, weight, weight.scores)
            for layer in graph.layers
            for weight in layer.weights
            if weight.scores is not None and weight.vectors[weight.scores] >= 0
        ]

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        if axes == tuple(range(len(weight.shape) - 1)):
            # A matrix is reduced twice as fast as a kernel of four axes (XLA on CPU).
            weight, axes = xp.reshape(weight, (-1, weight.shape[-1])), (0,)
        square = xp.mean(xp.square(weight), axis=axes)
        # The gradient of sqrt at 0 is infinite: a channel that is exactly zero takes the other branch, with gradient 0.
        zero = square == 0  # and not `square > 0`, by which NaN would be a score of 0
        norm = xp.where(zero, xp.zeros_like(square), xp.sqrt(xp.where(zero, xp.ones_like(square), square)))
        if not self.l1_fraction:
            return norm
        return (1 - self.l1_fraction) * norm + self.l1_fraction * xp.mean(_magnitude(weight, xp), axis=axes)

    def comparable(self, scores: np.ndarray, entries: int) -> np.ndarray:
        """Norms instead of root mean squares, for kernels of so many entries per channel.

        Initializers give channels that read more inputs smaller entries, and all channels norms of about 1: chosen by
        root mean squares, late layers would be emptied first.
        """
        return scores * np.sqrt(entries)

    def __repr__(self) -> str:
        return f"GroupLasso(threshold={self.threshold}, l1_fraction={self.l1_fraction})"


@keras.saving.register_keras_serializable("keras_morph")
class Gamma(Configured):
    """|gamma| of the BatchNormalizations that a channel passes.

    Args:
        threshold: a channel is alive when its score is strictly above.

    References:
        Gordon et al., MorphNet, https://arxiv.org/abs/1711.06798

    Example:
        >>> km.fit_budget(model, "50%", scores=km.Gamma()).widths["head"]
        3
    """

    def __init__(self, threshold: float = 1e-2) -> None:
        self.threshold = checked_threshold(threshold)

    def sources(self, graph: ChannelGraph) -> list[Source]:
        found = [
            Source(layer, weight, 0)
            for layer in graph.layers
            for weight in layer.weights
            if layer.rule.scale == weight.name and weight.vectors[0] >= 0
        ]
        if not found:
            without = [layer.name for layer in graph.layers if layer.name in graph.widths][:3]
            raise UnsupportedModelError(
                f"Gamma needs BatchNormalization with scale=True, and {graph.model.name} has none "
                f"(first layers without: {', '.join(without)}). Use GroupLasso, which reads kernels."
            )
        return found

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        return _magnitude(weight, xp)

    def __repr__(self) -> str:
        return f"Gamma(threshold={self.threshold})"


def _magnitude(x: Any, xp: Any) -> Any:
    # |x| whose gradient at 0 is 0 on every backend (JAX gives 1 for abs), and NaN where x is.
    return xp.where(x == 0, xp.zeros_like(x), xp.where(x < 0, -x, x))


def pin_sourceless(graph: ChannelGraph, regularizer: Regularizer) -> ChannelGraph:
    """Pin the groups that a regularizer has no score for: it could never tell whether they are needed."""
    scored = np.zeros(graph.num_groups, bool)
    for source in regularizer.sources(graph):
        scored[source.groups(graph)] = True
    name = type(getattr(regularizer, "regularizer", regularizer)).__name__
    reason = f"{name} finds no weight that scores it"
    return graph.pinned_with({int(group): reason for group in np.flatnonzero(~scored)})


def group_scores(graph: ChannelGraph, regularizer: Regularizer, *, comparable: bool = False) -> np.ndarray:
    """Score of each group from the current weights, float64, `(num_groups,)`; 0 where nothing scores it.

    With `comparable` scores of different layers may be held against each other, if the regularizer knows how.
    """
    scores = np.zeros(graph.num_groups)
    scaled = getattr(regularizer, "comparable", None) if comparable else None
    for source in regularizer.sources(graph):
        weight = np.asarray(keras.ops.convert_to_numpy(source.variable), np.float64)
        each = regularizer.score(weight, source.other_axes, np)
        if scaled is not None:
            each = scaled(each, weight.size // each.size)
        with np.errstate(invalid="ignore"):  # NaN stays NaN, and whoever chooses by it is told
            np.maximum.at(scores, source.groups(graph), each)
    return scores


def check_finite(graph: ChannelGraph, scores: np.ndarray) -> None:
    """Every group that may be removed has a score that is a number: NaN is neither alive nor dead.

    Raises:
        KerasMorphError: if one has not; the message names the first layers.
    """
    lost = ~np.isfinite(scores) & ~graph.pinned_mask
    if not lost.any():
        return
    layers = [layer.name for layer in graph.layers if layer.made is not None and lost[graph.group_of[layer.made]].any()]
    raise KerasMorphError(
        f"Expected finite scores. Received: NaN or infinity for {lost.sum()} of {len(lost)} groups of {graph.model.name}, "
        f"first in {', '.join(layers[:3])}. Where a training has diverged, go back to a checkpoint, with a lower learning "
        "rate or strength."
    )
