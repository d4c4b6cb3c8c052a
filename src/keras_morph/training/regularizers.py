"""How strong each channel is, and when it counts as dead.

A regularizer reads one weight per channel (a slice of a kernel, a gamma, or a logit) and gives a score. Channels of a group
are reduced by their maximum: a group lives while one of its channels does.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np

from keras_morph.channels import ChannelGraph, Layer, Weight
from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.layers.rules import variable

__all__ = ["Gamma", "GroupLasso", "LogisticSigmoid", "Regularizer", "Source", "group_scores", "pin_sourceless"]


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

    It may also have `comparable(scores, entries)`, as GroupLasso has, where scores of layers of different sizes have to
    be scaled before `fit_budget` chooses among them; and `initial_strength` and `strength_factor`: where a StrengthController
    begins, times the cost of the seed, and the factor by which it goes on.
    """

    threshold: float

    def sources(self, graph: ChannelGraph) -> list[Any]:
        """The weights that it reads: objects with the `groups`, `variable` and `other_axes` of a Source."""

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        """One non-negative score per channel: `weight` reduced over `axes`, with `xp` = keras.ops or numpy.

        Its gradient must be finite where the weight is exactly zero.
        """


def _threshold(value: float) -> float:
    if not value >= 0:
        raise KerasMorphError(f"Expected a threshold of at least 0. Received: threshold={value}.")
    return float(value)


class GroupLasso:
    """Root mean square of each channel's kernel, of convolutions and Dense layers alike.

    score = (1 - l1_fraction) * sqrt(mean(w^2)) + l1_fraction * mean(|w|), over all axes of the kernel but the output's.
    Depthwise kernels are no source: their channels are scored by the layers that make them.

    Args:
        threshold: a channel is alive when its score is strictly above.
        l1_fraction: share of the L1 term, 0 to 1.

    References:
        Gordon et al., MorphNet, https://arxiv.org/abs/1711.06798
    """

    def __init__(self, threshold: float = 1e-2, *, l1_fraction: float = 0.0) -> None:
        if not 0 <= l1_fraction <= 1:
            raise KerasMorphError(f"GroupLasso expects 0 <= l1_fraction <= 1. Received: l1_fraction={l1_fraction}.")
        self.threshold, self.l1_fraction = _threshold(threshold), float(l1_fraction)

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
        norm = xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, xp.ones_like(square))), xp.zeros_like(square))
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


class Gamma:
    """|gamma| of the BatchNormalizations that a channel passes.

    Args:
        threshold: a channel is alive when its score is strictly above.

    References:
        Gordon et al., MorphNet, https://arxiv.org/abs/1711.06798
    """

    def __init__(self, threshold: float = 1e-2) -> None:
        self.threshold = _threshold(threshold)

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


class LogisticSigmoid:
    """A learned gate per group, as in FiGS: sampled while training, folded into the weights when rebuilt.

    Each group that may be removed has a logit; p = sigmoid(logit) is its score. Where a layer reads channels they are
    multiplied by their gates: while training by a sample, sigmoid((logit + logistic noise) / temperature), the same for
    all channels of the group; in inference by p where p is above the threshold, else by 0. The logits live in the
    StructureLearner, and only a learner can be scored with them.

    Args:
        threshold: a group is alive when its p is strictly above.
        initial: p of every group at the start, in (0, 1).
        temperature: of the samples; the lower, the closer they are to 0 and 1. `learner.temperature` changes it while
            training, and so does the callback `Anneal`.
        straight_through: whether samples are rounded to 0 or 1, their gradients being those of the unrounded ones.
        speed: factor between the trained variable and the logit, so that logits can move as far as they need within a
            short training whose learning rate fits the weights.

    References:
        Gordon et al., Fine-grained stochastic architecture search, https://arxiv.org/abs/2006.09581
    """

    # Adam gives logits steps of one size, however small the penalty; under a strength that grows they would fall alike.
    initial_strength, strength_factor = 1.0, 1.0

    def __init__(
        self,
        threshold: float = 0.1,
        *,
        initial: float = 0.97,
        temperature: float = 1.0,
        straight_through: bool = False,
        speed: float = 10.0,
    ) -> None:
        if not 0 < initial < 1:
            raise KerasMorphError(f"LogisticSigmoid expects 0 < initial < 1. Received: initial={initial}.")
        for name, value in (("temperature", temperature), ("speed", speed)):
            if not 0 < value < float("inf"):
                raise KerasMorphError(f"LogisticSigmoid expects {name} > 0. Received: {name}={value}.")
        self.threshold, self.initial, self.temperature = _threshold(threshold), float(initial), float(temperature)
        self.straight_through, self.speed = bool(straight_through), float(speed)

    def sources(self, graph: ChannelGraph) -> list[Any]:
        raise KerasMorphError(
            "LogisticSigmoid scores channels by logits that are learned. Expected a StructureLearner that was trained "
            f"with it. Received: {graph.model.name} as it is; use GroupLasso or Gamma for a model without a learner."
        )

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        return 1.0 / (1.0 + xp.exp(-self.speed * weight))

    def __repr__(self) -> str:
        return f"LogisticSigmoid(threshold={self.threshold})"


def _magnitude(x: Any, xp: Any) -> Any:
    # |x| whose gradient at 0 is 0 on every backend (JAX gives 1 for abs).
    return xp.where(x > 0, x, xp.where(x < 0, -x, xp.zeros_like(x)))


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
        np.maximum.at(scores, source.groups(graph), each)
    return scores
