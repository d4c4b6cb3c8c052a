"""What one adds to `fit` of a StructureLearner: logs of the structure, and fading what will be cut."""

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.costs.budget import budget_from, group_prices
from keras_morph.errors import KerasMorphError
from keras_morph.graph.closure import close
from keras_morph.graph.structure import Structure
from keras_morph.layers.rules import variable
from keras_morph.runs import going_on, write_json, write_text
from keras_morph.training.learner import StructureLearner

__all__ = ["Anneal", "EpochLog", "FadeOut", "StopWithin", "StrengthController", "StructureLog"]

INITIAL = 20.0  # of a controlled strength, times the cost of the seed: between 20 and 100 hardly matters
FACTOR = 1.5  # by which a controlled strength moves
FADED = 1e-4  # what is left of a weight in the end, before it is set to zero


class _OfLearner(keras.callbacks.Callback):
    """A callback that only makes sense with a StructureLearner."""

    @property
    def learner(self) -> StructureLearner:
        if not isinstance(self.model, StructureLearner):
            raise KerasMorphError(
                f"{type(self).__name__} expects fit of a StructureLearner. Received: {type(self.model).__name__}."
            )
        return self.model


class StructureLog(_OfLearner):
    """Write `FOLDER/alive_STEP`, the counts of alive channels, before the first epoch and after each.

    The format is the Model Zoo's: JSON, `{"conv1_conv/Conv2D": 64, ...}`, keys sorted.

    Args:
        folder: usually `RUN/learned_structure`.

    Example:
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> _ = learner.fit(x, y, batch_size=64, verbose=0, callbacks=[km.StructureLog("learned_structure")])
        >>> sorted(path.name for path in Path("learned_structure").iterdir())
        ['alive_0', 'alive_1']
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not any(self.folder.glob("alive_*")):
            self._write()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._write()

    def _write(self) -> None:
        step = int(ops.convert_to_numpy(self.model.optimizer.iterations))
        counts = self.learner.structure().counts()
        with going_on(self.folder):
            write_json(self.folder / f"alive_{step}", dict(sorted(counts.items())))


class EpochLog(keras.callbacks.Callback):
    """One row per epoch, in `history.csv` and as a line: loss, accuracy, cost as a share of the seed's, strength, channels.

    Cost, strength and channels are those of a StructureLearner; in `fit` of another model they stay empty. In a short
    training no score falls below the threshold, so that these say little: `choice` also tells what a cut would leave now.

    Args:
        path: the CSV file, rewritten after each epoch, or None. Rows that are there already are kept.
        phase: what the rows are called, such as "learn".
        line: receives one line of text per epoch, such as `print`, or None.
        structure: the structure whose cost is logged; by default the learner's own at each epoch.
        choice: from a learner to the structure that a cut now would give, such as
            `lambda learner: km.fit_budget(learner, "50%")`, or None.
        left: epochs that are left when this `fit` begins, of all that the run has, for the time that is left.

    Example:
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> log = km.EpochLog(choice=lambda learner: km.fit_budget(learner, "50%"))
        >>> _ = learner.fit(x, y, verbose=0, callbacks=[log])
        >>> log.rows[0]["channels"]
        19
    """

    FIELDS = (
        "phase",
        "epoch",
        "loss",
        "accuracy",
        "val_accuracy",
        "cost_share",
        "strength",
        "channels",
        "scores_left",
        "channels_after_cut",
        "changed",
    )

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        phase: str = "learn",
        line: Callable[[str], Any] | None = None,
        structure: Structure | None = None,
        choice: Callable[[StructureLearner], Structure] | None = None,
        left: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.phase, self.line, self.structure, self.choice, self.left = (
            path,
            phase,
            line,
            structure,
            choice,
            left,
        )
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.started, self.already = time.monotonic(), len(self.rows)
        self.before = _text_of(self.path)
        if self.choice is not None:
            self.initial = np.maximum(self.model.scores(), np.finfo(np.float64).tiny)
            self.chosen = self.choice(self.model).alive

    def get_state(self) -> dict[str, Any]:
        state = {"rows": self.rows, "before": self.before}
        return state if self.choice is None else state | {"initial": self.initial, "chosen": dict(self.chosen)}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rows, self.before, self.already = list(state["rows"]), state["before"], len(state["rows"])
        if self.choice is not None:
            self.initial = np.array(state["initial"])
            self.chosen = {layer: np.array(indices, np.int64) for layer, indices in state["chosen"].items()}
        self._write()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {field: (logs or {}).get(field) for field in self.FIELDS} | {"phase": self.phase, "epoch": epoch + 1}
        if isinstance(self.model, StructureLearner):
            learner = self.model
            structure = self.structure or learner.structure()
            row["cost_share"] = learner.target_cost(learner.graph, structure) / learner.target_cost(learner.graph)
            row["strength"] = learner.strength
            row["channels"] = sum(structure.widths.values())
            if self.choice is not None:
                row |= self._of_a_cut(learner)
        self.rows.append(row)
        self._write()
        if self.line is not None:
            self.line(_in_words(row, self.params.get("epochs")) + self._time_left())

    def _write(self) -> None:
        """All rows: what could not be written after an epoch is there after the next."""
        if self.path is not None and (self.before or self.rows):
            with going_on(self.path):
                write_text(self.path, self.before + _csv(self.rows, self.FIELDS, header=not self.before))

    def _of_a_cut(self, learner: StructureLearner) -> dict[str, Any]:
        """What a cut would leave now, how many channels changed sides since the last epoch, and what is left of scores."""
        before, self.chosen = self.chosen, self.choice(learner).alive  # type: ignore[misc]
        changed = sum(len(np.setxor1d(alive, before[layer])) for layer, alive in self.chosen.items())
        free = ~learner.graph.pinned_mask
        left = np.minimum(learner.scores() / self.initial, 1.0)[free]
        widths = sum(map(len, self.chosen.values()))
        return {"scores_left": float(left.mean()), "channels_after_cut": widths, "changed": changed}

    def _time_left(self) -> str:
        if self.left is None:
            return ""
        here = len(self.rows) - self.already  # since this `fit` began, which may have gone on with an earlier one
        seconds = (time.monotonic() - self.started) / here * max(0, self.left - len(self.rows))
        return f"  left {seconds / 60:.0f} min" if seconds >= 120 else f"  left {seconds:.0f} s"


def _in_words(row: dict[str, Any], epochs: int | None) -> str:
    parts = [f"{row['phase']:<9} {row['epoch']:>3}/{epochs or '?'}"]
    parts += [f"{name} {row[name]:.3f}" for name in ("loss", "accuracy", "val_accuracy") if row[name] is not None]
    if row["cost_share"] is not None:
        parts.append(f"cost {row['cost_share']:.1%}  strength {row['strength']:.3g}  channels {row['channels']:,}")
    if row["channels_after_cut"] is not None:
        parts.append(
            f"scores {row['scores_left']:.0%}  a cut by them leaves {row['channels_after_cut']:,} ({row['changed']:,} changed)"
        )
    return "  ".join(parts)


def _text_of(path: str | Path | None) -> str:
    """What a CSV file holds; nothing where there is none."""
    return Path(path).read_text(encoding="utf-8") if path is not None and Path(path).exists() else ""


def _csv(rows: list[dict[str, Any]], fields: tuple[str, ...], *, header: bool) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({field: "" if row.get(field) is None else row[field] for field in fields} for row in rows)
    return buffer.getvalue()


class StopWithin(_OfLearner):
    """Stop training as soon as the channels above the threshold cost no more than a budget.

    Args:
        budget: as in `fit_budget`.

    Example:
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> history = learner.fit(x, y, epochs=3, verbose=0, callbacks=[km.StopWithin("100%")])
        >>> len(history.epoch)
        1
    """

    def __init__(self, budget: Any) -> None:
        super().__init__()
        self.budget = budget

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if share_of_budget(self.learner, self.budget) <= 1:
            self.model.stop_training = True


class StrengthController(_OfLearner):
    """Move the learner's strength after each epoch, so that its cost is on its way to a budget; nobody has to tune it.

    Long before channels die their scores fall. What is left of the scores, each weighted by its channel's price, should
    fall along a straight line from 1 at the beginning to the budget, as a share of the seed's cost, in the last epoch.
    While more is left the strength is multiplied by `factor`; where less is left by more than `slack`, divided by it. A
    learner whose strength is 0 begins at 20 / cost of the seed, or at the regularizer's own `initial_strength`.
    LogisticSigmoid's strength begins at 1 / cost and stays there.

    Args:
        budget: as in `fit_budget`.
        epochs: epochs until the budget should be met; by default all of `fit`.
        factor: above 1; by default the regularizer's own `strength_factor`, or 1.5.
        slack: what may be missing before the strength is lowered.

    Example:
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> _ = learner.fit(x, y, epochs=2, verbose=0, callbacks=[km.StrengthController("50%")])
        >>> learner.strength > 0
        True
    """

    def __init__(
        self, budget: Any, *, epochs: int | None = None, factor: float | None = None, slack: float = 0.05
    ) -> None:
        super().__init__()
        if factor is not None and not factor > 1:
            raise KerasMorphError(f"StrengthController expects a factor above 1. Received: factor={factor}.")
        self.budget, self.epochs, self.factor, self.slack = budget, epochs, factor, slack

    def on_train_begin(self, logs: dict | None = None) -> None:
        learner = self.learner
        if not learner.strength:
            learner.strength = getattr(learner.regularizer, "initial_strength", INITIAL) / learner.target_cost(
                learner.graph
            )
        limits = budget_from(self.budget).limits(learner.graph, learner.target_cost)
        self.goal = min(1.0, *(limit.limit / limit.cost(learner.graph) for limit in limits))
        self.prices = group_prices(learner.graph, limits) * ~learner.graph.pinned_mask
        self.initial = np.maximum(learner.scores(), np.finfo(np.float64).tiny)

    def get_state(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def set_state(self, state: dict[str, Any]) -> None:
        self.initial = np.array(state["initial"])

    def left(self) -> float:
        """What is left of the scores, weighted by prices, 0 to 1."""
        ratios = np.minimum(self.learner.scores() / self.initial, 1.0)
        return float(ratios @ self.prices / max(self.prices.sum(), np.finfo(np.float64).tiny))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        epochs = self.epochs or self.params.get("epochs") or 1
        chosen = getattr(self.learner.regularizer, "strength_factor", FACTOR) if self.factor is None else self.factor
        factor = float(chosen)
        planned, left = 1 - (1 - self.goal) * min(1.0, (epoch + 1) / epochs), self.left()
        if left > planned:
            self.learner.strength *= factor
        elif left < planned - self.slack:
            self.learner.strength /= factor


class Anneal(_OfLearner):
    """Lower the temperature of LogisticSigmoid's samples geometrically during `fit`, so that they end near 0 and 1.

    Args:
        final: temperature in the last epoch.

    Example:
        >>> learner = km.StructureLearner(model, regularizer=km.LogisticSigmoid())
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> _ = learner.fit(x, y, epochs=2, verbose=0, callbacks=[km.Anneal(final=0.5)])
        >>> learner.temperature
        0.5
    """

    def __init__(self, final: float = 0.1) -> None:
        super().__init__()
        if not 0 < final < float("inf"):
            raise KerasMorphError(f"Anneal expects a final temperature above 0. Received: final={final}.")
        self.final = final

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.initial = self.learner.temperature

    def get_state(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def set_state(self, state: dict[str, Any]) -> None:
        self.initial = state["initial"]

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        last = max(1, (self.params.get("epochs") or 1) - 1)
        self.learner.temperature = self.initial * (self.final / self.initial) ** min(1.0, epoch / last)


class FadeOut(_OfLearner):
    """Let the channels that a structure removes fade to zero during `fit`, while the others learn to do without them.

    After each optimizer step, what makes a dead channel and the rows that read it are multiplied by a constant
    factor; at the end they are zero. The learner then computes what the masked seed computes, and so does the rebuilt
    model: nothing is lost in the cut.

    Args:
        structure: a structure of the learner's seed.
        steps: optimizer steps until nothing is left; the whole `fit` by default.

    Example:
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> structure = km.fit_budget(learner, "50%")
        >>> _ = learner.fit(x, y, verbose=0, callbacks=[km.FadeOut(structure)])
        >>> small = km.rebuild(learner, structure)
        >>> np.allclose(small.predict(x, verbose=0), learner.predict(x, verbose=0), atol=1e-5)
        True
    """

    def __init__(self, structure: Structure, *, steps: int | None = None) -> None:
        super().__init__()
        self.structure, self.steps = structure, steps

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.learner.stop_sampling()
        steps = self.steps or (self.params.get("steps") or 100) * (self.params.get("epochs") or 1)
        rate = FADED ** (1 / max(1, steps))
        graph = self.learner.graph
        entries = graph.dead_entries(close(graph, self.structure.groups(graph)).channels)
        self.faded = [(variable(layer.operation, weight.name), dead) for layer, weight, dead in entries if dead.any()]
        self.previous = [(weight, weight.constraint) for weight, _ in self.faded]
        for weight, dead in self.faded:
            weight.constraint = _Fade(np.where(dead, rate, 1.0).astype(np.float32), weight.constraint)
        # The train function may have been compiled without the constraints.
        self.model.make_train_function(force=True)

    def on_train_end(self, logs: dict | None = None) -> None:
        for weight, constraint in self.previous:
            weight.constraint = constraint
        for weight, dead in self.faded:
            weight.assign(np.where(dead, 0, ops.convert_to_numpy(weight)))
        self.model.make_train_function(force=True)


class _Fade:
    """A Keras constraint: multiply by a constant array, after whatever constraint was there."""

    def __init__(self, factor: np.ndarray, before: Callable | None) -> None:
        self.factor, self.before = factor, before

    def __call__(self, value: Any) -> Any:
        if self.before is not None:
            value = self.before(value)
        return ops.multiply(value, ops.cast(self.factor, value.dtype))


def share_of_budget(learner: StructureLearner, budget: Any) -> float:
    """Cost of the channels above the threshold as a share of the budget, of the tightest one."""
    limits, structure = budget_from(budget).limits(learner.graph, learner.target_cost), learner.structure()
    return max(limit.cost(learner.graph, structure) / limit.limit for limit in limits)
