"""Learning a structure while training: a Keras model around the seed whose loss contains the penalty."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.costs.costs import Cost, FLOPs
from keras_morph.errors import KerasMorphError
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of
from keras_morph.keras_internals import share_between_replicas, sync_weights
from keras_morph.training.gates import Gates, gateable, gated
from keras_morph.training.penalty import Penalty
from keras_morph.training.regularizers import GroupLasso, LogisticSigmoid, Regularizer, group_scores, pin_sourceless

__all__ = ["StructureLearner"]


class StructureLearner(keras.Model):
    """A model that learns which channels it needs, under plain `compile` and `fit`.

    It computes what the seed computes and trains the seed's own weights in place; its loss is the compiled one plus
    `strength * sum of price * score`. Two metrics are added: `penalty` (strength included) and `cost` (that of the
    channels alive by the threshold, in the cost's unit, before closing). `val_loss` contains the penalty: watch
    `val_accuracy`.

    Args:
        seed: a functional or Sequential model, or its ChannelGraph, which says what is protected and tied.
        regularizer: gives scores; GroupLasso() by default.
        cost: gives prices; FLOPs() by default.
        strength: factor of the penalty, at least 0. It can be set at any time, also while training. The Model
            Zoo's choice is `multiplier / cost(seed)`.

    Raises:
        UnsupportedModelError: if the seed cannot be traced, or the regularizer finds nothing to read in it.
        KerasMorphError: if the strength is negative or not finite.
    """

    def __init__(
        self,
        seed: Any,
        *,
        regularizer: Regularizer | None = None,
        cost: Cost | None = None,
        strength: float = 0.0,
        name: str | None = None,
    ) -> None:
        graph = graph_of(seed)
        seed = graph.model
        super().__init__(name=name or f"{seed.name}_learner")
        self.seed = seed
        self.regularizer = regularizer or GroupLasso()
        self.target_cost = cost or FLOPs()
        self.gates, self._network = None, seed
        if isinstance(self.regularizer, LogisticSigmoid):
            self.gates = Gates(np.flatnonzero(gateable(graph)), self.regularizer)
            self._network = gated(graph, self.gates)
        self._scorer = self.gates or self.regularizer
        self.graph = pin_sourceless(graph, self._scorer)
        self._penalty = Penalty(self.graph, self._scorer, self.target_cost)
        self._strength = self.add_weight(
            name="strength", shape=(), dtype="float32", initializer="zeros", trainable=False, autocast=False
        )
        self.penalty_tracker = keras.metrics.Mean(name="penalty")
        self.cost_tracker = keras.metrics.Mean(name="cost")
        self.strength = strength

    @property
    def strength(self) -> float:
        """Factor of the penalty."""
        sync_weights(self)
        return float(ops.convert_to_numpy(self._strength))

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise KerasMorphError(f"Expected a finite strength of at least 0. Received: strength={value}.")
        sync_weights(self)
        self._strength.assign(value)

    @property
    def temperature(self) -> float:
        """Temperature of LogisticSigmoid's samples; it can be set while training."""
        sync_weights(self)
        return float(ops.convert_to_numpy(self._gates().temperature))

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise KerasMorphError(f"Expected a finite temperature above 0. Received: temperature={value}.")
        sync_weights(self)
        self._gates().temperature.assign(value)

    def _gates(self) -> Gates:
        if self.gates is None:
            raise KerasMorphError(f"Only LogisticSigmoid has a temperature. Received: {self.regularizer!r}.")
        return self.gates

    def stop_sampling(self) -> None:
        """Let LogisticSigmoid's gates be their p while training too, once the structure is chosen."""
        if self.gates is not None:
            sync_weights(self)
            self.gates.sampling.assign(0.0)

    def build(self, input_shape: Any = None) -> None:
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._network(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        penalty, cost = self._penalty()
        penalty = self._strength * penalty
        self.penalty_tracker.update_state(penalty)
        self.cost_tracker.update_state(cost)
        # The trainer's own aggregation: TensorFlow's replicas together add the penalty once.
        penalty = share_between_replicas(self, penalty)
        return penalty if loss is None else loss + ops.cast(penalty, loss.dtype)

    def scores(self, *, comparable: bool = False) -> Any:
        """Score of each group, float64, `(graph.num_groups,)`; `comparable` as in `group_scores`."""
        sync_weights(self)
        return group_scores(self.graph, self._scorer, comparable=comparable)

    def gate_values(self) -> Any:
        """What each group is multiplied by where it is read, float64, `(graph.num_groups,)`; without gates all 1."""
        sync_weights(self)
        n = self.graph.num_groups
        return np.ones(n) if self.gates is None else self.gates.values(n)

    def structure(self) -> Structure:
        """The structure of the channels whose score is above the threshold, closed."""
        scores = self.scores()
        return Structure.closed(self.graph, scores > self.regularizer.threshold, scores)
