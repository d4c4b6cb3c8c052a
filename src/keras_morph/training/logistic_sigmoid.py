"""LogisticSigmoid: gates that are sampled while training."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.channels import ChannelGraph
from keras_morph.errors import KerasMorphError
from keras_morph.saving import Configured
from keras_morph.training.gates import Gates, attach_gates
from keras_morph.training.regularizers import Attached, checked_threshold

__all__ = ["LogisticSigmoid"]


@keras.saving.register_keras_serializable("keras_morph")
class LogisticSigmoid(Configured):
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

    Example:
        >>> learner = km.StructureLearner(model, regularizer=km.LogisticSigmoid(temperature=0.5))
        >>> learner.temperature
        0.5
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
        self.threshold, self.initial, self.temperature = (
            checked_threshold(threshold),
            float(initial),
            float(temperature),
        )
        self.straight_through, self.speed = bool(straight_through), float(speed)

    def sources(self, graph: ChannelGraph) -> list[Any]:
        raise KerasMorphError(
            "LogisticSigmoid scores channels by logits that are learned. Expected a StructureLearner that was trained "
            f"with it. Received: {graph.model.name} as it is; use GroupLasso or Gamma for a model without a learner."
        )

    def score(self, weight: Any, axes: tuple[int, ...], xp: Any) -> Any:
        return 1.0 / (1.0 + xp.exp(-self.speed * weight))

    def attach(self, graph: ChannelGraph) -> Attached:
        return attach_gates(graph, lambda groups: SampledGates(groups, self))

    def __repr__(self) -> str:
        return f"LogisticSigmoid(threshold={self.threshold})"


class SampledGates(Gates):
    """Gates of LogisticSigmoid; temperature and whether they are sampled can be set while training."""

    def __init__(self, groups: np.ndarray, regularizer: LogisticSigmoid) -> None:
        start = np.log(regularizer.initial / (1 - regularizer.initial)) / regularizer.speed
        super().__init__(groups, regularizer, start=float(start))
        self.temperature = self._number("temperature", regularizer.temperature)
        self.sampling = self._number("sampling", 1.0)
        self.noise = keras.random.SeedGenerator()

    def _number(self, name: str, value: float) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_weight(name=name, shape=(), initializer=initializer, trainable=False, autocast=False)

    def stop_sampling(self) -> None:
        """Let gates be their p while training too."""
        self.sampling.assign(0.0)

    def gate(self, training: bool) -> Any:
        rule, logits = self.regularizer, ops.multiply(self.logits, self.regularizer.speed)
        p = ops.sigmoid(logits)
        if not training:
            return ops.where(p > rule.threshold, p, ops.zeros_like(p))
        uniform = keras.random.uniform(p.shape, 1e-6, 1 - 1e-6, dtype="float32", seed=self.noise)
        sample = ops.sigmoid((logits + ops.log(uniform) - ops.log1p(-uniform)) / self.temperature)
        if rule.straight_through:
            hard = ops.cast(sample > 0.5, "float32")
            sample = sample + ops.stop_gradient(hard - sample)
        return self.sampling * sample + (1 - self.sampling) * p

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store["noise"] = ops.convert_to_numpy(
            self.noise.state
        )  # Keras does not save it: a resumed run would repeat its samples

    def load_own_variables(self, store: Any) -> None:
        values = dict(store)
        self.noise.state.assign(values.pop("noise"))
        super().load_own_variables(values)
