"""What ends a training that is lost, and what is said before one begins that cannot be right."""

import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.errors import ChanceWarning, DataError, DivergedError
from keras_morph.graph.examples import batches_in, entries, evenly
from keras_morph.keras_internals import sync_weights
from keras_morph.training.learner import StructureLearner

__all__ = ["StopDiverging", "is_trained", "judged"]

EXAMPLES = 1024  # that say whether a classifier is right by more than chance
TOO_LARGE = 1e4
"""Times the first epoch's loss, or 1 if that is less: no training comes back from there."""


class StopDiverging(keras.callbacks.Callback):
    """End `fit` with an error as soon as the loss is NaN or infinite, or has grown without bounds.

    Args:
        phase: for the message, such as "learn".
        kept: where the state after the last whole epoch is, for the message.

    Raises:
        DivergedError: names epoch, step, loss, and what to try.
        DataError: if only the loss on validation data is no number.

    Example:
        >>> model.compile("sgd", "sparse_categorical_crossentropy")
        >>> model.optimizer.learning_rate = 1e30
        >>> history = model.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[km.StopDiverging()])
        Traceback (most recent call last):
            ...
        keras_morph.errors.DivergedError: The training diverged in epoch 1, step ...
    """

    async_safe = True  # Keras may look at the loss in another thread, while the next step runs

    def __init__(self, phase: str = "", *, kept: Any = None) -> None:
        super().__init__()
        self.phase, self.kept = phase, kept
        self.epoch, self.first = 0, 0.0
        self.rate, self.strength = 0.0, 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Now, since in the middle of an epoch JAX's variables hold nothing.
        self.epoch, self.rate = epoch, float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.strength = self.model.strength if isinstance(self.model, StructureLearner) else 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._check(batch, (logs or {}).get("loss"))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        self._check(None, logs.get("loss"))
        # The penalty may grow as the strength does.
        loss = (logs.get("loss") or 0.0) - (logs.get("penalty") or 0.0)
        self.first = self.first or max(1.0, loss)
        if loss > TOO_LARGE * self.first:
            self._stop(None, "loss", loss)
        sync_weights(self.model)
        lost = [weight for weight in self.model.weights if not np.all(np.isfinite(ops.convert_to_numpy(weight)))]
        for weight in lost:
            if weight.trainable:
                self._stop(None, weight.path, "NaN or infinity")
        value = logs.get("val_loss")
        if value is not None and not np.isfinite(value) and not lost:
            raise DataError(
                f"validation_data gives a val_loss of {float(value)} in epoch {epoch + 1}, where the training's loss and all "
                "weights are finite. Expected: finite inputs and labels. Look for NaN or very large numbers in them."
                + self._where()
            )
        self._check(None, value, "val_loss")

    def get_state(self) -> dict[str, Any]:
        return {"first": self.first}

    def set_state(self, state: dict[str, Any]) -> None:
        self.first = state["first"]

    def _check(self, batch: int | None, loss: Any, name: str = "loss") -> None:
        if loss is not None and not np.isfinite(loss):
            self._stop(batch, name, float(loss))

    def _stop(self, batch: int | None, name: str, received: Any) -> None:
        place = f"{self.phase and f'{self.phase}, '}epoch {self.epoch + 1}" + (
            "" if batch is None else f", step {batch + 1}"
        )
        tried = [f"a learning rate below {self.rate:.3g}"]
        if self.strength:
            tried.append(f"a strength below {self.strength:.3g}")
        first = self.epoch == 0 and batch == 0
        raise DivergedError(
            f"The training diverged in {place}. Expected: a finite {name}. Received: {received}. "
            + ("Look for NaN in the data and the model's weights. " if first else "")
            + f"Try {', or '.join(tried)}."
            + self._where()
        )

    def _where(self) -> str:
        return "" if self.kept is None else f" The state before is kept in {self.kept}."


def is_trained(model: keras.Model) -> bool:
    """Whether a model seems to be trained.

    Its optimizer has made steps, or a moving mean is not zero, or a bias has more than two values: a fresh one is a constant,
    and an LSTM's zeros and ones.
    """
    optimizer = getattr(model, "optimizer", None) if model.compiled else None
    if optimizer is not None and int(ops.convert_to_numpy(optimizer.iterations)) > 0:
        return True
    for weight in model.weights:
        if weight.name == "moving_mean" and np.any(ops.convert_to_numpy(weight)):
            return True
        if weight.name in ("bias", "beta") and len(np.unique(ops.convert_to_numpy(weight))) > 2:
            return True
    return False


def _some(data: Any) -> tuple[Any, Any] | None:
    """Inputs and labels of some examples; None where there are none that can be read again."""
    if isinstance(data, tuple):
        size = len(keras.tree.flatten(data[1])[0])
        chosen = evenly(size, min(size, EXAMPLES))
        return keras.tree.map_structure(lambda part: entries(part, chosen), data[:2])
    batches, count = [], 0
    for batch in () if data is None or isinstance(data, Iterator) else batches_in(data):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            return None
        batches.append(keras.tree.map_structure(ops.convert_to_numpy, tuple(batch[:2])))
        count += len(keras.tree.flatten(batches[-1])[-1])
        if count >= EXAMPLES:
            break
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches) if batches else None


def judged(model: keras.Model, data: Any, kind: str, batch_size: int = 64) -> float | None:
    """How often a trained classifier is right; 0 with a warning if no more often than an answer that never changes.

    Args:
        model: of one output with a number per class.
        data: as `fit` takes them, with labels; up to 1,024 examples are looked at.
        kind: of the data, such as "validation".
        batch_size: examples at a time.

    Returns:
        A share from 0 to 1; None of other models, of labels that are no classes, and of data that can be read once.
    """
    shape = model.output_shape
    if not (isinstance(shape, tuple) and len(shape) == 2 and shape[1] and shape[1] > 1):
        return None
    found = _some(data)
    if found is None:
        return None
    x, y = found
    labels = np.asarray(ops.convert_to_numpy(keras.tree.flatten(y)[0]))
    if labels.shape == (len(labels), shape[1]):
        classes = labels.argmax(-1)
        known = np.allclose(labels.sum(-1), 1)  # one-hot
    else:
        classes = labels.reshape(len(labels), -1)[:, 0]
        known = labels.size == len(labels) and np.array_equal(labels, np.round(labels))
    if not len(labels) or not known:
        return None
    answers = model.predict(x, batch_size=batch_size, verbose=0).argmax(-1)
    right, most = np.mean(answers == classes), np.unique(classes, return_counts=True)[1].max() / len(labels)
    if right > most:
        return float(right)
    warnings.warn(
        f"{model.name} seems to be trained, and is right on {right:.1%} of the {kind} data, where the most frequent "
        f"class is {most:.1%}. Look whether inputs and labels are what it was trained on: the range of pixels (0 to 1, or "
        "0 to 255), the order of the classes. Train a new head before its network is shrunk.",
        ChanceWarning,
        3,
    )
    return 0.0
