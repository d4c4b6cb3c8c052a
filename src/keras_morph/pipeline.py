"""The whole algorithm as one short function: learn, choose, fade out, rebuild, fine-tune."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_morph.callbacks import EpochLog, FadeOut, StopWithin, StructureLog
from keras_morph.copying import cloned
from keras_morph.costs import Cost, FLOPs
from keras_morph.errors import KerasMorphError
from keras_morph.learning import StructureLearner
from keras_morph.rebuilding import rebuild
from keras_morph.regularizers import Gamma, Regularizer
from keras_morph.selection import fit_budget
from keras_morph.structure import Structure
from keras_morph.tracing import trace

__all__ = ["Shrunk", "prune", "shrink"]

MULTIPLIER = 5.0  # strength = MULTIPLIER / cost of the seed, where none is given
LEARNING_BOOST = 5.0  # learning rate while learning, as a multiple of the given one


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` gives back.

    Attributes:
        small: the rebuilt and fine-tuned model.
        structure: its structure, of the seed.
        learner: the trained network that was cut, of the seed's size; its dead channels are zero.
        rebuilt_weights: `small.get_weights()` right after the rebuild, before the fine-tuning.
        history: one dictionary per epoch.
    """

    small: keras.Model
    structure: Structure
    learner: StructureLearner
    rebuilt_weights: list[Any]
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
    """Shrink a trained model to a budget.

    Up to 40 % of the epochs learn which channels are needed, under the penalty, until those alive cost no more than the
    budget; the channels that meet the budget are chosen; 30 % of the epochs let the others fade to zero; the smaller
    model is rebuilt and fine-tuned for the rest.

    Args:
        seed: a trained functional or Sequential model; it is left alone, but for layers that cannot be made anew from
            their config (a layer with weights and without `get_config`): these are trained in place.
        budget: as in `fit_budget`.
        data: `(x, y)`, or whatever `fit` takes as its first argument (`tf.data.Dataset`, PyDataset, ...).
        validation_data: as in `fit`.
        epochs: of all three phases together, at least 3.
        cost: what the budget is for; FLOPs() by default.
        regularizer: gives the scores; Gamma() by default.
        strength: factor of the penalty; by default 5 / cost of the seed.
        optimizer: makes an optimizer from a learning rate or schedule.
        learning_rate: peak learning rate of fading, which follows a cosine; learning runs at 5 times that, so that
            channels can die within few epochs, and fine-tuning at half.
        loss: as in `compile`.
        metrics: as in `compile`.
        batch_size: examples per step, where `data` is a pair of arrays.
        folder: a run's folder to write `history.csv` and `learned_structure/` into, or None.
        line: receives one line per epoch, such as `print`.
        protect: as in `trace`.
        tie: as in `trace`.
        grouped: as in `trace`.

    Returns:
        A Shrunk. `small` costs no more than the budget.

    Raises:
        BudgetError: before any training, if the budget cannot be read or reached.
    """
    if epochs < 3:
        raise KerasMorphError(
            f"shrink needs an epoch for each of its three phases. Expected: epochs >= 3. Received: {epochs}."
        )
    cost, regularizer = cost or FLOPs(), regularizer or Gamma()
    trace(seed, protect=protect, tie=tie, grouped=grouped)  # a model without a graph has no clone either
    copy = cloned(seed)
    learner = StructureLearner(copy, regularizer=regularizer, cost=cost, protect=protect, tie=tie, grouped=grouped)
    fit_budget(learner, budget)  # raises now if it cannot be met
    learner.strength = MULTIPLIER / cost(seed) if strength is None else strength
    learning, fading = max(1, round(0.4 * epochs)), max(1, round(0.3 * epochs))
    csv = None if folder is None else Path(folder) / "history.csv"
    logs = [] if folder is None else [StructureLog(Path(folder) / "learned_structure")]

    def train(model: keras.Model, count: int, rate: Any, callbacks: list) -> Any:
        model.compile(optimizer=optimizer(rate), loss=loss, metrics=list(metrics))
        fit_on(model, data, batch_size, epochs=count, validation_data=validation_data, verbose=0, callbacks=callbacks)

    learn = EpochLog(csv, phase="learn", line=line)
    train(learner, learning, LEARNING_BOOST * learning_rate, [learn, StopWithin(budget), *logs])
    structure = fit_budget(learner, budget)
    learner.strength = 0.0
    learned = len(learn.rows)
    steps = int(ops.convert_to_numpy(learner.optimizer.iterations)) // learned
    fade = EpochLog(csv, phase="fade", line=line, structure=structure)
    train(learner, fading, cosine(learning_rate, steps * fading), [fade, FadeOut(structure, steps=steps * fading)])
    small = rebuild(learner, structure)
    rebuilt_weights = small.get_weights()
    tune = EpochLog(csv, phase="fine-tune", line=line)
    remaining = max(1, epochs - learned - fading)
    train(small, remaining, cosine(learning_rate / 2, steps * remaining), [tune])
    return Shrunk(small, structure, learner, rebuilt_weights, learn.rows + fade.rows + tune.rows)


def prune(
    model: keras.Model,
    budget: Any,
    *,
    regularizer: Regularizer | None = None,
    cost: Cost | None = None,
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
        protect: as in `trace`.
        tie: as in `trace`.
        grouped: as in `trace`.

    Returns:
        The rebuilt model, to be fine-tuned.
    """
    structure = fit_budget(model, budget, regularizer=regularizer, cost=cost, protect=protect, tie=tie, grouped=grouped)
    return rebuild(model, structure, protect=protect, tie=tie, grouped=grouped)


def fit_on(model: keras.Model, data: Any, batch_size: int, **options: Any) -> Any:
    """`fit` on a pair of arrays or on anything else that `fit` takes."""
    if isinstance(data, tuple) and len(data) in (2, 3):
        x, y, *weights = data
        return model.fit(x, y, sample_weight=weights[0] if weights else None, batch_size=batch_size, **options)
    return model.fit(data, **options)


def cosine(rate: float, steps: int) -> Any:
    """A learning rate that falls to 0 along a cosine."""
    return keras.optimizers.schedules.CosineDecay(rate, max(1, steps))
