"""Checkpoints: everything that a training needs to go on as if nothing had happened, in one file.

Keras's BackupAndRestore keeps weights, optimizer and epoch, in two files that a kill can part. Here are also the states of the
random generators and of the other callbacks, the history, and that a callback has ended the training.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import build_metrics, forget_averages, random_states, set_random_states, sync_weights
from keras_morph.runs import plain, write_atomically, write_somewhere
from keras_morph.status import now_running
from keras_morph.training.guards import StopDiverging
from keras_morph.training.recipe import fit_on

__all__ = ["Checkpoint", "Saved", "fill", "fit_resumably"]

FORMAT = 1
IN_ORDER = ("set_epoch", "skip", "__getitem__")
"""What data have that can begin in the middle of an epoch; a tf.data.Dataset skips in another way."""
KERAS_STATES = ("best", "best_epoch", "cooldown_counter", "stopped_epoch", "wait", "_ema_weights_in_model")
"""What EarlyStopping, ReduceLROnPlateau and ModelCheckpoint count, and which weights SwapEMAWeights has put into the model."""


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint.

    Attributes:
        state: whatever JSON can hold.
        arrays: lists of arrays by name.
    """

    state: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write an `.npz`, whole or not at all."""
        text = json.dumps({"format": FORMAT, **self.state}, default=plain)
        named = {f"{name}/{i}": array for name, arrays in self.arrays.items() for i, array in enumerate(arrays)}
        counts = {name: len(arrays) for name, arrays in self.arrays.items()}
        texts = {"state": np.array(text), "counts": np.array(json.dumps(counts))}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **texts, **named)  # type: ignore[arg-type]

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> "Saved | None":
        """Read a checkpoint; None if there is none.

        Raises:
            KerasMorphError: if the file is damaged, or of another version.
        """
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as found:
                state, counts = (json.loads(str(found[name])) for name in ("state", "counts"))
                arrays = {name: [found[f"{name}/{i}"] for i in range(count)] for name, count in counts.items()}
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise KerasMorphError(
                f"{path} cannot be read as a checkpoint of this version. Received: {type(error).__name__} {error}. To go on "
                f"from the best epoch copy best.npz over it, if that is there; to start again remove {path.parent}."
            ) from error
        return cls(state, arrays)


def _values_of(variables: Sequence[Any]) -> list[np.ndarray]:
    """The values of some Keras variables."""
    return [np.asarray(ops.convert_to_numpy(variable)) for variable in variables]


def fill(variables: Sequence[Any], values: Sequence[np.ndarray], what: str) -> None:
    """Set Keras variables to saved values.

    Raises:
        KerasMorphError: if they do not fit.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise KerasMorphError(
            f"The checkpoint does not fit {what}. Expected: the model, regularizer and optimizer that it was made with. "
            f"Received: {len(values)} saved arrays for {len(shapes)} variables, or other shapes."
        )
    for variable, value in zip(variables, values, strict=True):
        # NumPy has no bfloat16: its bytes come back without their type.
        variable.assign(value.view(_values_of([variable])[0].dtype) if value.dtype.kind == "V" else value)


class Checkpoint(keras.callbacks.Callback):
    """Keep `FOLDER/last.npz` when `fit` begins and after each epoch, and the best epoch of this `fit` in `FOLDER/best.npz`.

    Where a signal asks for an end, the state after the step is kept, if the rest of the epoch can be found again.

    It stands behind all other callbacks, so that it sees their states as they are after the epoch; those of callbacks with
    `get_state` and `set_state` are kept, and the counts of Keras's own. The best epoch is that of the highest `val_accuracy`;
    without it of the lowest `val_loss`, or `loss`, in both cases without the penalty.

    Args:
        folder: usually `RUN/checkpoint`.
        phase: the name of this `fit`.
        models: by name; their variables are kept, those of nested models and random generators included.
        further: what else a checkpoint has to hold.
        callbacks: those in front of this one.
        saved: a checkpoint to go on from: `fit` has to begin with `initial_epoch`, without the first `steps` of that epoch.
        batch: some examples, if the order of all is known, so that `fit` can begin in the middle of an epoch.
    """

    def __init__(
        self,
        folder: Path,
        phase: str,
        models: Mapping[str, keras.Model],
        *,
        further: Saved | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        saved: Saved | None = None,
        batch: Any = None,
    ) -> None:
        super().__init__()
        self.folder, self.phase, self.models, self.further = folder, phase, models, further or Saved()
        self.callbacks, self.saved, self.batch = list(callbacks), saved, batch
        self.done, self.best = 0, -np.inf
        self.steps = 0 if saved is None else saved.state["steps"]
        if saved is not None and saved.state["phase"] != phase:
            raise KerasMorphError(
                f"{folder} was written while {saved.state['phase']!r} was under way. Expected: {phase!r}. A phase of your own "
                "that trains more than once cannot go on."
            )

    @property
    def path(self) -> Path:
        return self.folder / "last.npz"

    def initial_epoch(self, epochs: int) -> int:
        """The epoch that `fit` begins with; `epochs` where nothing is left to do."""
        if self.saved is None:
            return 0
        return epochs if self.saved.state["stopped"] else min(epochs, self.saved.state["epoch"])

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not self.model.optimizer.built:  # TensorFlow's trainer does it in the first step
            self.model.optimizer.build(self.model.trainable_variables)
        if self.saved is None:
            self._save()
        else:
            if self.steps:
                build_metrics(self.model, self.batch)
            self._restore(self.saved)
        self._place(self.done + 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.done, self.steps, self.saved = epoch + 1, 0, None
        value = _goodness(logs or {})
        improved, self.best = value > self.best, max(value, self.best)
        self._save(improved)
        self._place(self.done + 1)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch == 0 and self.steps and self.saved is not None:
            self._restore(self.saved)  # again, since an epoch that begins changes some of it
            fill(self.model.metrics_variables, self.saved.arrays["metrics"], "the metrics")
        if (run := now_running()) is not None:
            run.waits = True
            if run.asked is not None and batch > 0 and self.batch is not None:
                self.steps += batch
                self._save()
            run.stop_if_asked()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if (run := now_running()) is not None:
            run.waits = False
            run.stop_if_asked()

    def _place(self, epoch: int) -> None:
        if (run := now_running()) is not None:
            run.place = f"{self.phase}, epoch {epoch}"
            run.write("running", phase=self.phase, epoch=self.done, epochs=self.params.get("epochs"))
            run.stop_if_asked()

    def _save(self, improved: bool = False) -> None:
        sync_weights(self.model)
        state = {
            "phase": self.phase,
            "epoch": self.done,
            "steps": self.steps,
            "stopped": bool(self.model.stop_training),
            "best": self.best,
            "callbacks": [_state_of(callback) for callback in self.callbacks],
            "random": random_states(),
        }
        arrays = {name: _values_of(model.variables) for name, model in self.models.items()}
        arrays["optimizer"] = _values_of(self.model.optimizer.variables)
        arrays["metrics"] = _values_of(self.model.metrics_variables) if self.steps else []
        arrays |= {_best_of(place): best for place, best in enumerate(map(_best_weights, self.callbacks)) if best}
        saved = Saved({**self.further.state, **state}, {**self.further.arrays, **arrays})
        # The best first: killed in between, the epoch is done again, and written again.
        for path in (*([self.folder / "best.npz"] if improved else []), self.path):
            write_somewhere(path, saved.save)

    def _restore(self, saved: Saved) -> None:
        for name, model in self.models.items():
            fill(model.variables, saved.arrays[name], name)
        fill(self.model.optimizer.variables, saved.arrays["optimizer"], "the optimizer")
        for place, (callback, state) in enumerate(zip(self.callbacks, saved.state["callbacks"], strict=True)):
            _set_state(callback, state)
            if _best_of(place) in saved.arrays:
                callback.best_weights = saved.arrays[_best_of(place)]
        self.done, self.best = saved.state["epoch"], saved.state["best"]
        set_random_states(saved.state["random"])


def fit_resumably(
    model: keras.Model,
    data: Any,
    batch_size: int,
    *,
    phase: str,
    epochs: int,
    folder: Path | None,
    models: Mapping[str, keras.Model] | None = None,
    further: Saved | None = None,
    saved: Saved | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **options: Any,
) -> None:
    """`fit_on` that ends when the loss is lost, keeps checkpoints, and begins where one of them was.

    Args:
        model, data, batch_size, options: as in `fit_on`.
        phase, models, further, saved: as in Checkpoint; `models` are the model itself by default.
        epochs: of the whole phase.
        folder: where the checkpoints are kept, or None.
        callbacks: as in `fit`.
    """
    forget_averages(callbacks)
    callbacks = [*callbacks, StopDiverging(phase, kept=folder)]
    begin = {"initial_epoch": 0, "skip": 0}
    if folder is not None:
        models, batch = models or {"model": model}, None
        if isinstance(data, tuple):
            batch = tree.map_structure(lambda array: array[:1], data)
        elif all(hasattr(data, name) for name in IN_ORDER):
            batch = tree.map_structure(lambda array: array[:1], data[0])
        checkpoint = Checkpoint(folder, phase, models, further=further, callbacks=callbacks, saved=saved, batch=batch)
        begin = {"initial_epoch": checkpoint.initial_epoch(epochs), "skip": checkpoint.steps}
        callbacks = [*callbacks, checkpoint]
    fit_on(model, data, batch_size, epochs=epochs, callbacks=callbacks, **begin, **options)


def _goodness(logs: Mapping[str, Any]) -> float:
    """The higher, the better was an epoch."""
    if "val_accuracy" in logs:
        return float(logs["val_accuracy"])
    prefix = "val_" if "val_loss" in logs else ""
    return float(logs.get(f"{prefix}penalty", 0.0)) - float(logs.get(f"{prefix}loss", np.inf))


def _state_of(callback: Any) -> Any:
    if hasattr(callback, "get_state"):
        return callback.get_state()
    if not type(callback).__module__.startswith("keras."):
        return None
    return {name: vars(callback)[name] for name in KERAS_STATES if name in vars(callback)}


def _best_weights(callback: Any) -> list[np.ndarray]:
    """What EarlyStopping goes back to when it ends a training."""
    kept = callback.best_weights if isinstance(callback, keras.callbacks.EarlyStopping) else None
    return [np.asarray(each) for each in kept or ()]


def _best_of(place: int) -> str:
    return f"best weights of callback {place}"


def _set_state(callback: Any, state: Any) -> None:
    if hasattr(callback, "set_state"):
        callback.set_state(state)
    elif state is not None:
        vars(callback).update(state)
