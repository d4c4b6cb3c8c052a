"""The whole algorithm as one short function: learn, choose, fade out, rebuild, fine-tune; every step is public."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_morph.costs.costs import Cost, FLOPs
from keras_morph.errors import DataError, KerasMorphError
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import trace
from keras_morph.search.expansion import expand
from keras_morph.search.selection import fit_budget
from keras_morph.surgery.copying import cloned
from keras_morph.surgery.rebuilding import rebuild
from keras_morph.training.callbacks import EpochLog, FadeOut, StopWithin, StrengthController, StructureLog
from keras_morph.training.distilling import Distiller
from keras_morph.training.learner import StructureLearner
from keras_morph.training.regularizers import Gamma, Regularizer
from keras_morph.training.statistics import reestimate_statistics

__all__ = ["Shrunk", "prune", "shrink"]

LEARNING, FADING = 0.4, 0.3  # shares of the epochs; the rest fine-tunes
PER_COST = 0.0


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` gives back.

    Attributes:
        small: the rebuilt and fine-tuned model.
        structure: its structure, of the seed.
        learner: the trained network that was cut, of the seed's size; its dead channels are zero.
        rebuilt_weights: `small.get_weights()` right after the rebuild.
        reestimated_weights: the same with BatchNormalization's statistics estimated anew, before the fine-tuning.
        history: one dictionary per epoch.
    """

    small: keras.Model
    structure: Structure
    learner: StructureLearner
    rebuilt_weights: list[Any]
    reestimated_weights: list[Any]
    history: list[dict[str, Any]]


def shrink(
    seed: keras.Model,
    budget: Any,
    *,
    data: Any,
    validation_data: Any = None,
    epochs: int = 30,
    cost: Cost | None = None,
    regularizer: Regularizer | None = None,
    strength: float | None = None,
    per_cost: float = PER_COST,
    round_to: int = 1,
    rounds: int = 1,
    distillation: float = 0.0,
    optimizer: Callable[[Any], keras.optimizers.Optimizer] = keras.optimizers.Adam,
    learning_rate: float = 2e-3,
    loss: Any = "sparse_categorical_crossentropy",
    metrics: Sequence[Any] = ("accuracy",),
    batch_size: int = 64,
    folder: str | Path | None = None,
    line: Callable[[str], Any] | None = None,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> Shrunk:
    """Shrink a model, trained or fresh, to a budget.

    Up to 40 % of the epochs learn which channels are needed, under a penalty whose strength a controller moves, until
    those alive cost no more than the budget; the channels that meet the budget are chosen; 30 % of the epochs let the
    others fade to zero; the smaller model is rebuilt, BatchNormalization's statistics are estimated anew, and the rest of
    the epochs fine-tunes it. The learning rate is constant while learning and then falls along one cosine.

    Args:
        seed: a functional or Sequential model; it is left alone, but for layers that cannot be made anew from their
            config (a layer with weights and without `get_config`): these are trained in place.
        budget: as in `fit_budget`.
        data: `(x, y)`, or whatever `fit` takes as its first argument (`tf.data.Dataset`, PyDataset, ...).
        validation_data: as in `fit`.
        epochs: of all phases and rounds together, at least 3 for each round.
        cost: what the budget is for, and what channels are priced by; FLOPs() by default.
        regularizer: gives the scores; Gamma() by default.
        strength: factor of the penalty; by default it is controlled.
        per_cost: as in `fit_budget`.
        round_to: as in `fit_budget`.
        rounds: shrink, expand to the seed's cost with fresh weights, and shrink again, so many times.
        distillation: share of the seed's answers in the loss of fine-tuning, 0 to 1; for a seed that is trained.
        optimizer: makes an optimizer from a learning rate or schedule.
        learning_rate: peak learning rate.
        loss: as in `compile`.
        metrics: as in `compile`.
        batch_size: examples per step, where `data` is a pair of arrays.
        folder: a run's folder to write `history.csv` and `learned_structure/` into, or None.
        line: receives one line per epoch, such as `print`.
        protect: as in `trace`.
        tie: as in `trace`.
        grouped: as in `trace`.

    Returns:
        A Shrunk. `small` costs no more than the budget; its structure is one of the seed, or after several rounds of
        the last expanded model.

    Raises:
        BudgetError: before any training, if the budget cannot be read or reached.
        DataError: if the data are arrays without labels.
    """
    if epochs < 3 * rounds or rounds < 1:
        raise KerasMorphError(
            f"shrink needs an epoch for each of its three phases. Expected: rounds >= 1 and epochs >= 3 * rounds. "
            f"Received: rounds={rounds}, epochs={epochs}."
        )
    if rounds > 1 and grouped != "whole":
        raise KerasMorphError(f'Several rounds expect grouped="whole", as expand does. Received: grouped={grouped!r}.')
    for name, given in (("data", data), ("validation_data", validation_data)):
        check_labelled(name, given)
    cost, regularizer = cost or FLOPs(), regularizer or Gamma()
    wiring: dict[str, Any] = {"protect": protect, "tie": tie, "grouped": grouped}
    training = _Training(data, validation_data, batch_size, optimizer, loss, metrics, folder, line)
    learning, fading = max(1, round(LEARNING * epochs / rounds)), max(1, round(FADING * epochs))
    trace(seed, **wiring)  # a model without a graph has no clone either
    copy = cloned(seed)
    for number in range(rounds):
        learner = StructureLearner(copy, regularizer=regularizer, cost=cost, strength=strength or 0.0, **wiring)
        fit_budget(learner, budget, round_to=round_to)  # raises now if it cannot be met
        control = [StrengthController(budget)] if strength is None else []
        training.run(learner, "learn", learning, learning_rate, [*control, StopWithin(budget)])
        structure = fit_budget(learner, budget, per_cost=per_cost, round_to=round_to)
        if number < rounds - 1:
            wider = expand(copy, structure, cost, cost(seed), round_to=round_to, protect=protect, tie=tie)
            copy = rebuild(copy, wider, weights=False, **wiring)
    learner.strength = 0.0
    remaining = max(2, epochs - len(training.history))
    fading = min(fading, remaining - 1)
    schedule = cosine(learning_rate, training.steps_per_epoch * remaining)
    training.run(learner, "fade", fading, schedule, [FadeOut(structure)], structure=structure)
    small = rebuild(learner, structure)
    rebuilt_weights = small.get_weights()
    reestimate_statistics(small, data, batch_size=batch_size)
    reestimated_weights = small.get_weights()
    model = small
    if distillation:
        from_logits = getattr(loss, "from_logits", False)
        model = Distiller(small, seed, weight=distillation, from_logits=from_logits)
    training.run(model, "fine-tune", remaining - fading, schedule, [], done=fading)
    return Shrunk(small, structure, learner, rebuilt_weights, reestimated_weights, training.history)


@dataclass
class _Training:
    """What all phases have in common, and what they leave: rows of history, steps per epoch."""

    data: Any
    validation_data: Any
    batch_size: int
    optimizer: Callable[[Any], keras.optimizers.Optimizer]
    loss: Any
    metrics: Sequence[Any]
    folder: str | Path | None
    line: Callable[[str], Any] | None
    history: list[dict[str, Any]] = field(default_factory=list)
    steps_per_epoch: int = 0

    def run(
        self,
        model: keras.Model,
        phase: str,
        epochs: int,
        rate: Any,
        callbacks: list[Any],
        *,
        structure: Structure | None = None,
        done: int = 0,
    ) -> None:
        """Train for some epochs; `done` of those that the schedule of learning rates spans are over."""
        folder = None if self.folder is None else Path(self.folder)
        log = EpochLog(folder and folder / "history.csv", phase=phase, line=self.line, structure=structure)
        if folder is not None and phase == "learn":
            callbacks = [*callbacks, StructureLog(folder / "learned_structure")]
        model.compile(optimizer=self.optimizer(rate), loss=self.loss, metrics=list(self.metrics))
        start = done * self.steps_per_epoch
        model.optimizer.iterations.assign(start)
        fit_on(
            model,
            self.data,
            self.batch_size,
            epochs=epochs,
            validation_data=self.validation_data,
            verbose=0,
            callbacks=[log, *callbacks],
        )
        self.history += log.rows
        self.steps_per_epoch = (int(ops.convert_to_numpy(model.optimizer.iterations)) - start) // len(log.rows)


def prune(
    model: keras.Model,
    budget: Any,
    *,
    regularizer: Regularizer | None = None,
    cost: Cost | None = None,
    per_cost: float = 0.0,
    round_to: int = 1,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> keras.Model:
    """Cut a trained model to a budget in one shot, by the scores of its weights as they are.

    Args:
        model: a functional or Sequential model; it is left alone.
        budget: as in `fit_budget`.
        regularizer: as in `fit_budget`.
        cost: as in `fit_budget`.
        per_cost: as in `fit_budget`.
        round_to: as in `fit_budget`.
        protect: as in `trace`.
        tie: as in `trace`.
        grouped: as in `trace`.

    Returns:
        The rebuilt model, to be fine-tuned.
    """
    wiring: dict[str, Any] = {"protect": protect, "tie": tie, "grouped": grouped}
    structure = fit_budget(
        model, budget, regularizer=regularizer, cost=cost, per_cost=per_cost, round_to=round_to, **wiring
    )
    return rebuild(model, structure, **wiring)


def fit_on(model: keras.Model, data: Any, batch_size: int, **options: Any) -> Any:
    """`fit` on a pair of arrays or on anything else that `fit` takes."""
    if isinstance(data, tuple) and len(data) in (2, 3):
        x, y, *weights = data
        return model.fit(x, y, sample_weight=weights[0] if weights else None, batch_size=batch_size, **options)
    return model.fit(data, **options)


def check_labelled(name: str, data: Any) -> None:
    """Arrays come with labels, as a tuple: `fit` would take a list or dictionary for the inputs of a model without any.

    Raises:
        DataError: for a bare array, a list or dictionary of arrays, and a tuple of another length.
    """
    if isinstance(data, (list, tuple, dict)) and not (isinstance(data, tuple) and len(data) in (2, 3)):
        received = f"a {type(data).__name__} of {len(data)}"
    elif hasattr(data, "shape") and hasattr(data, "dtype"):
        received = f"an array of shape {tuple(data.shape)}"
    else:
        return
    raise DataError(
        f"{name} expects (x, y), (x, y, sample_weight), or a tf.data.Dataset, PyDataset or the like that gives both. "
        f"Received: {received}; labels belong to it."
    )


def cosine(rate: float, steps: int) -> Any:
    """A learning rate that falls to 0 along a cosine."""
    return keras.optimizers.schedules.CosineDecay(rate, max(1, steps))
