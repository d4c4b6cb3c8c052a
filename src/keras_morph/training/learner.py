"""Learning a structure while training: a Keras model around the seed whose losses contain the penalty."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.costs.costs import Cost, FLOPs
from keras_morph.errors import KerasMorphError
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of, trace
from keras_morph.keras_internals import losses_are_given, sync_weights, weights_are_elsewhere
from keras_morph.saving import serialized
from keras_morph.training.penalty import Penalty
from keras_morph.training.regularizers import GroupLasso, Regularizer, attached, check_finite, group_scores
from keras_morph.training.steps import Trainee, has_own_steps, training_as

__all__ = ["StructureLearner"]

# (learner, its penalty) while a loss is computed. By thread: each of TensorFlow's replicas has its own penalty.
_COUNTED: ContextVar[tuple[Any, Any]] = ContextVar("counted", default=(None, None))

PARTS = ("seed", "regularizer", "cost", "dtype")  # what is saved of a learner besides its numbers


@keras.saving.register_keras_serializable("keras_morph")
class StructureLearner(Trainee):
    """A model that learns which channels it needs, under plain `compile` and `fit`, or in a training loop of your own.

    It computes what the seed computes and trains the seed's own weights in place; its loss is the compiled one plus
    `strength * sum of price * score`, which `losses` contains. Two metrics are added: `penalty` (strength included) and
    `cost` (that of the channels alive by the threshold, in the cost's unit, before closing). `val_loss` contains the
    penalty: watch `val_accuracy`. It is saved and loaded as any Keras model, seed, regularizer and cost included. A seed whose
    class has a `train_step`, `compute_loss` or the like of its own is trained by it.

    Args:
        seed: a functional or Sequential model, or its ChannelGraph, which says what is protected and tied.
        regularizer: gives scores; GroupLasso() by default.
        cost: gives prices; FLOPs() by default.
        strength: factor of the penalty, at least 0. It can be set at any time, also while training. The Model
            Zoo's choice is `multiplier / cost(seed)`.

    Raises:
        UnsupportedModelError: if the seed cannot be traced, or the regularizer finds nothing to read in it.
        KerasMorphError: if the strength is negative or not finite.

    Example:
        >>> learner = km.StructureLearner(model, regularizer=km.Gamma(), cost=km.FLOPs(), strength=1e-6)
        >>> learner.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> _ = learner.fit(x, y, verbose=0)
        >>> learner.structure().widths
        {'conv': 8, 'last': 8, 'head': 3}
    """

    def __new__(cls, seed: Any, **options: Any) -> "StructureLearner":  # noqa: ARG004
        return super().__new__(training_as(graph_of(seed).model, cls))

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
        regularizer = regularizer or GroupLasso()
        parts = attached(regularizer, graph)
        super().__init__(parts.network, name=name or f"{graph.model.name}_learner")
        self.seed, self.regularizer, self.target_cost = graph.model, regularizer, cost or FLOPs()
        self.graph, self.gates, self._scorer = parts.graph, parts.gates, parts.scorer
        self._penalty = Penalty(self.graph, self._scorer, self.target_cost)
        self._strength = self.add_weight(
            name="strength", shape=(), dtype="float32", initializer="zeros", trainable=False, autocast=False
        )
        if not self._penalty.is_formula:
            scored = (len(self._penalty.scored),)
            self._penalty.held = [
                self.add_weight(
                    name=name, shape=shape, dtype="float32", initializer="zeros", trainable=False, autocast=False
                )
                for name, shape in (("prices", scored), ("held_cost", ()))
            ]
            self.renew_prices()
        self._asked, self._trained = False, False  # for the penalty, by a step of the user's
        self._of_call: list[Any] = []  # losses of the last stateless call
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
        """Temperature of the samples of a gate, such as LogisticSigmoid's; it can be set while training."""
        sync_weights(self)
        return float(ops.convert_to_numpy(self._temperature()))

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise KerasMorphError(f"Expected a finite temperature above 0. Received: temperature={value}.")
        sync_weights(self)
        self._temperature().assign(value)

    def _temperature(self) -> Any:
        if not hasattr(self.gates, "temperature"):
            raise KerasMorphError(
                "Expected a regularizer whose gates have a temperature, such as LogisticSigmoid. "
                f"Received: {self.regularizer!r}."
            )
        return self.gates.temperature

    def stop_sampling(self) -> None:
        """Let gates that are sampled be constant while training too, once the structure is chosen."""
        if hasattr(self.gates, "stop_sampling"):
            sync_weights(self)
            self.gates.stop_sampling()

    def renew_prices(self) -> None:
        """Take prices and cost at the present counts, where the cost is no formula; `fit` does so before each epoch."""
        if not self._penalty.is_formula:
            sync_weights(self)
            for held, value in zip(self._penalty.held, self._penalty.renewed(), strict=True):
                held.assign(value)

    def fit(self, *args: Any, callbacks: Any = None, **options: Any) -> Any:
        """As in Keras."""
        ours = []
        if not self._penalty.is_formula:
            ours.append(keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: self.renew_prices()))
        if has_own_steps(self.seed) and not self._trained:
            ours.append(_PenaltyIsAskedFor(self))
        given = callbacks if isinstance(callbacks, (list, tuple)) else filter(None, [callbacks])
        return super().fit(*args, callbacks=[*given, *ours] if ours else callbacks, **options)

    def penalty(self) -> Any:
        """`strength * sum of price * score` at the current weights: a float32 scalar tensor, differentiable."""
        sync_weights(self)
        return ops.multiply(self._strength, self._penalty()[0])

    def stateless_call(self, *args: Any, return_losses: bool = False, **options: Any) -> Any:
        if return_losses or not has_own_steps(self.seed):
            return super().stateless_call(*args, return_losses=return_losses, **options)
        # As Keras's guide has steps for JAX: `compute_loss` follows, outside of the call, where weights are out of date.
        asked = self._asked
        *results, losses = super().stateless_call(*args, return_losses=True, **options)
        self._of_call[:], self._asked = losses, asked
        return tuple(results)

    @property
    def losses(self) -> list[Any]:
        """Keras's losses of the seed (`add_loss`, weight regularizers), and behind them the penalty."""
        self._asked = True
        if weights_are_elsewhere(self) and self._of_call:
            return self._of_call
        others = super().losses
        if losses_are_given(self):
            return others
        learner, counted = _COUNTED.get()
        return [*others, counted if learner is self else self.penalty()]

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        self._asked = True
        if weights_are_elsewhere(self) and self._of_call:  # no metrics: these are not in scope either
            return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        penalty, cost = self._penalty()
        penalty = ops.multiply(self._strength, penalty)
        self.penalty_tracker.update_state(penalty)
        self.cost_tracker.update_state(cost)
        # Keras adds `losses` by the trainer's own aggregation: TensorFlow's replicas together add the penalty once.
        with _counted(self, ops.cast(penalty, keras.config.floatx())):
            return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

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
        """The structure of the channels whose score is above the threshold, closed.

        Raises:
            KerasMorphError: if a score is NaN or infinite.
        """
        scores = self.scores()
        check_finite(self.graph, scores)
        return Structure.closed(self.graph, scores > self.regularizer.threshold, scores)

    def get_config(self) -> dict[str, Any]:
        wiring = self.graph.wiring
        parts = (self.seed, self.regularizer, self.target_cost, self.dtype_policy)
        return {
            "name": self.name,
            **{key: serialized(part) for key, part in zip(PARTS, parts, strict=True)},
            "strength": self.strength,
            "wiring": {"protect": list(wiring.protect), "tie": [*map(list, wiring.tie)], "grouped": wiring.grouped},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "StructureLearner":
        seed, regularizer, cost, policy = (
            keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects) for key in PARTS
        )
        graph = trace(seed, **config["wiring"])
        learner = cls(graph, regularizer=regularizer, cost=cost, strength=config["strength"], name=config["name"])
        learner.dtype_policy = policy  # by which `compile` decides whether the loss is scaled
        return learner


@contextmanager
def _counted(learner: StructureLearner, penalty: Any) -> Iterator[None]:
    """Inside, the learner's `losses` hold this penalty, so that it is not computed a second time."""
    token = _COUNTED.set((learner, penalty))
    try:
        yield
    finally:
        _COUNTED.reset(token)


class _PenaltyIsAskedFor(keras.callbacks.Callback):
    """Ends a learner's first training after a step, if that leaves the penalty out."""

    def __init__(self, learner: StructureLearner) -> None:
        super().__init__()
        self.learner = learner

    def on_train_begin(self, logs: Any = None) -> None:
        self.learner._asked = False  # building it has asked

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.learner._asked:
            raise KerasMorphError(
                f"The train_step of {type(self.learner.seed).__name__} leaves the penalty out, so that no channel would be given "
                "up. Expected: a loss of self.compute_loss(...), or one to which sum(self.losses) is added. "
                "Received: a step that asks for neither."
            )
        self.learner._trained = True
