"""How to train: everything that a run needs besides the model, the budget and the data, as one value."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.errors import DataError, KerasMorphError
from keras_morph.keras_internals import compiled_with, maker_of, optimizer_like, seed_shared
from keras_morph.training.batches import Batches
from keras_morph.training.steps import has_own_steps, jit_compiles

__all__ = [
    "SCORES",
    "Recipe",
    "answers_classes",
    "check_callbacks",
    "check_labelled",
    "check_labels",
    "check_repeatable",
    "check_teacher",
    "cosine",
    "ends_in_softmax",
    "failures_of",
    "fit_on",
]

SCORES = ("contribution", "obs", "taylor", "flap", "minitron", "fpgm", "whc")  # functions of `search/scores.py`


@dataclass(frozen=True)
class Recipe:
    """How `shrink` trains.

    Args:
        epochs: of all phases and rounds together, at least 3 for each round. At least two are left after a learning.
        learning_rate: peak learning rate: constant while the structure is learned, then along one cosine to 0.
        optimizer: a name, a class or function that makes an optimizer from a learning rate or schedule, or an optimizer,
            whose settings are taken over.
        loss: as in `compile`; by default what the model was compiled with, or sparse_categorical_crossentropy for an
            uncompiled classifier that ends in a softmax.
        metrics: as in `compile`; by default what the model was compiled with, or accuracy.
        loss_weights: as in `compile`; by default what the model was compiled with.
        class_weight: as in `fit`.
        batch_size: examples per step, where the data are arrays.
        learning: share of the epochs that learn which channels are needed, at most; it ends as soon as those alive meet the
            budget. With 0 no penalty is at work. By default 0 for a seed that is trained, of which neither a regularizer nor
            a strength is asked; else 0.4, which leaves more than half of the epochs to recover.
        fading: share of the epochs in which the others fade to zero, while all train at full width. With 0 they are cut at
            once, and what that loses is regressed back by `recover`. The rest fine-tunes.
        rounds: how often the seed is shrunk; between two rounds it is expanded to its cost, with fresh weights.
        strength: factor of the penalty; by default a controller moves it.
        scores: what chooses the channels: "contribution", "obs", "taylor", "flap", "minitron", "fpgm" or "whc", as in
            `contribution_scores` and so on, the first three per unit of cost. By default contributions, or what a regularizer
            that is asked for has learned.
        distillation: share of the seed's answers in the loss of fine-tuning, 0 to 1. By default that in which a trained
            classifier (one output, a softmax or a cross-entropy from logits) is right, on validation data or else
            training data, up to 0.9; where nobody can tell 0.5; of others 0.
        calibration: a few hundred images without labels, as in `recover`, by which channels are chosen and
            what a cut loses is recovered; by default the first of the training data. Give them where those are augmented: by
            images as they are it comes out better.
        jit_compile: as in `compile`; `"auto"` is what the model was compiled with, but not XLA by TensorFlow on a CPU, where it
            is a loss. (Keras keeps no difference between `True` and its own `"auto"`.)
        phases: functions from a Progress to a Progress; by default `learn, choose, fade, cut, tune` of `pipeline.py`.

    Raises:
        KerasMorphError: if a value is out of range.

    Example:
        >>> km.Recipe(epochs=60, learning_rate=1e-3).epochs
        60
    """

    epochs: int = 30
    learning_rate: float = 2e-3
    optimizer: str | Callable[[Any], keras.optimizers.Optimizer] | keras.optimizers.Optimizer = "adam"
    loss: Any = None
    metrics: Any = None
    loss_weights: Any = None
    class_weight: Mapping[int, float] | None = None
    batch_size: int = 64
    learning: float | None = None
    fading: float = 0.0
    rounds: int = 1
    strength: float | None = None
    scores: str | None = None
    distillation: float | None = None
    calibration: Any = field(default=None, repr=False, compare=False)
    jit_compile: bool | str = "auto"
    phases: Sequence[Callable[[Any], Any]] | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.epochs < 3 * self.rounds:
            raise KerasMorphError(
                "shrink needs an epoch for each of its three phases. Expected: rounds >= 1 and epochs >= 3 * rounds. "
                f"Received: rounds={self.rounds}, epochs={self.epochs}."
            )
        for name, low, high in (
            ("learning_rate", 0, np.inf),
            ("batch_size", 1, np.inf),
            ("learning", 0, 1),
            ("fading", 0, 1),
            ("distillation", 0, 1),
            ("strength", 0, np.inf),
        ):
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and np.isfinite(value)):
                raise KerasMorphError(f"Expected {name} from {low} to {high}. Received: {name}={value}.")
        if self.scores not in (None, *SCORES):
            raise KerasMorphError(f"Expected scores of {', '.join(SCORES)}, or None. Received: scores={self.scores!r}.")

    def make_optimizer(self, rate: Any) -> keras.optimizers.Optimizer:
        """An optimizer with this learning rate or schedule."""
        if isinstance(self.optimizer, str):
            try:
                return keras.optimizers.get({"class_name": self.optimizer, "config": {"learning_rate": rate}})
            except ValueError as error:
                raise KerasMorphError(
                    f"optimizer: expected the name of one of Keras's, such as adam. Received: {self.optimizer!r}."
                ) from error
        if isinstance(self.optimizer, keras.optimizers.Optimizer):
            return optimizer_like(self.optimizer, rate)
        return self.optimizer(rate)

    def objective(self, model: keras.Model) -> dict[str, Any]:
        """Loss, metrics, loss weights and switches for `compile`; what the recipe leaves open is taken from the model.

        Raises:
            KerasMorphError: if neither says what the loss is, and the model's class has no step of its own that may know.
        """
        compiled = compiled_with(model)
        given = {"loss": self.loss, "loss_weights": self.loss_weights, "metrics": self.metrics}
        if self.loss is not None:  # the weights of other losses
            compiled.pop("loss_weights", None)
        found = {key: compiled.get(key) if value is None else value for key, value in given.items()}
        found |= {key: compiled.get(key) for key in ("weighted_metrics", "run_eagerly")}
        found["jit_compile"] = self.jit_compile if self.jit_compile != "auto" else _jit_compile(compiled)
        if found["loss"] is None and not has_own_steps(model):
            if not ends_in_softmax(model):
                raise KerasMorphError(
                    f"{model.name} is not compiled, and its output is not a softmax, so nobody knows its loss. Expected: a "
                    "model that was compiled with a loss, or Recipe(loss=...). Received: neither."
                )
            found["loss"] = "sparse_categorical_crossentropy"
        if found["metrics"] is None and not compiled and answers_classes(model, found["loss"]):
            found["metrics"] = ["accuracy"]
        # Metrics keep counts: each model has its own.
        return {key: _copied(value) for key, value in found.items() if value is not None}


def _jit_compile(compiled: Mapping[str, Any]) -> Any:
    ours = jit_compiles()
    return compiled.get("jit_compile") if ours == "auto" else ours


def _copied(value: Any) -> Any:
    if isinstance(value, keras.metrics.Metric):
        try:
            return type(value).from_config(value.get_config())
        except (TypeError, ValueError):  # a user's own, whose arguments its config does not say
            return value
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def ends_in_softmax(model: keras.Model) -> bool:
    """Whether a model of one output gives probabilities of classes: a layer's or an operation's, of a nested model too."""
    if len(getattr(model, "outputs", ())) != 1:
        return False
    last = maker_of(model.outputs[0])
    if isinstance(last, keras.Model):
        return ends_in_softmax(last)
    # `ops.softmax` of a Keras tensor is an operation, whose class has the name of the layer's.
    if type(last).__name__ == "Softmax":
        return getattr(last, "axis", -1) in (-1, len(model.outputs[0].shape) - 1)
    return getattr(last, "activation", None) in (keras.activations.softmax, ops.softmax)


def answers_classes(model: keras.Model, loss: Any) -> bool:
    """Whether a model of one output gives probabilities of classes, or logits to a loss that makes some of them."""
    kinds = keras.losses.CategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy
    return ends_in_softmax(model) or (len(model.outputs) == 1 and isinstance(loss, kinds) and loss.from_logits)


def cosine(rate: float, steps: int, done: int = 0) -> Any:
    """A learning rate that falls to 0 along a cosine; `done` steps of it are over when the optimizer begins."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, max(1, steps))
    return Later(schedule, done) if done else schedule


@keras.saving.register_keras_serializable("keras_morph")
class Later(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule from a later step on, for an optimizer that begins anew.

    To set the optimizer's `iterations` instead would be wrong: Adam corrects its moments, which are zero at first, by the
    number of steps that it believes to have made, and would take steps that are too large.

    Args:
        schedule: any other.
        start: its step with which this one begins.
    """

    def __init__(self, schedule: Any, start: int) -> None:
        super().__init__()
        self.schedule, self.start = schedule, start

    def __call__(self, step: Any) -> Any:
        return self.schedule(step + self.start)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "start": self.start}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Later":
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["start"])


def check_labelled(name: str, data: Any) -> None:
    """Arrays come with labels, as a tuple: `fit` would take a list or dictionary for the inputs of a model without any.

    Raises:
        DataError: for a bare array, a list or dictionary of arrays, a tuple of another length, no examples, arrays of different
            lengths, and nothing at all where the data are.
    """
    if isinstance(data, tuple) and len(data) in (2, 3):
        lengths = [len(each) if np.ndim(each) else 0 for each in keras.tree.flatten(data) if hasattr(each, "__len__")]
        if lengths and (not min(lengths) or min(lengths) < max(lengths)):
            raise DataError(
                f"{name} expects arrays of one length, with an example at least. Received: lengths of "
                f"{', '.join(map(str, lengths))}."
            )
    if isinstance(data, tuple) and any(isinstance(each, int | float) for each in keras.tree.flatten(data)):
        raise DataError(
            f"{name} expects arrays. Received: lists of numbers; give np.array(...) of them, of inputs and labels."
        )
    if data is None and name == "data":
        raise DataError("data expects (x, y), or a tf.data.Dataset, PyDataset or the like. Received: None.")
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


def check_labels(data: Any, objective: Mapping[str, Any], model: keras.Model) -> None:
    """Labels as the loss takes them: all of those in arrays, of a PyDataset and a tf.data.Dataset those in the first batch.

    Raises:
        DataError: for one-hot labels where the loss expects class numbers, and for others that are no numbers of a class, of a
            model of one answer per example.
    """
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2:
        return
    labelled = data if isinstance(data, tuple) else _first_batch(data)
    if not isinstance(labelled, tuple) or len(labelled) < 2:
        return
    loss, labels = objective.get("loss"), labelled[1]
    name = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    if name == "sparse_categorical_crossentropy" and np.ndim(labels) == 2 and np.shape(labels)[1] > 1:
        raise DataError(
            f"Expected class numbers of shape (n,) for {name}. Received: labels of shape {np.shape(labels)}, which look "
            'one-hot; compile the model with loss="categorical_crossentropy", or give y.argmax(axis=1).'
        )
    classes, known = model.outputs[0].shape[1], getattr(labels, "dtype", None) is not None
    if (
        name != "sparse_categorical_crossentropy"
        or not classes
        or not known
        or getattr(loss, "ignore_class", None) is not None
    ):
        return
    values = np.asarray(ops.convert_to_numpy(labels))
    if values.dtype.kind not in "iubf":
        raise DataError(
            f"Expected class numbers from 0 to {classes - 1} for {name}. Received: labels of type {values.dtype}."
        )
    wrong = values[(values < 0) | (values >= classes) | (values != np.round(values))] if values.size else values
    if wrong.size:
        raise DataError(
            f"Expected class numbers from 0 to {classes - 1}, as {model.name} has {classes} outputs. Received: labels such as "
            f"{wrong.flat[0]}."
        )


def _first_batch(data: Any) -> Any:
    """What a PyDataset or a tf.data.Dataset gives first; of anything else nothing, since it may be worn by reading."""
    if isinstance(data, keras.utils.PyDataset):
        if hasattr(data, "set_epoch"):
            data.set_epoch(0)
        return data[0] if len(data) else None
    return next(iter(data), None) if hasattr(data, "element_spec") else None


def check_callbacks(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Callbacks that leave the learning rate alone.

    Raises:
        KerasMorphError: for those of Keras that set it, which they cannot where it falls along a cosine.
    """
    for callback in callbacks:
        if isinstance(callback, (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)):
            raise KerasMorphError(
                "callbacks: expected some that leave the learning rate alone, which falls along a cosine from "
                f"Recipe(learning_rate=...). Received: {type(callback).__name__}, which sets it."
            )


def check_repeatable(name: str, data: Any) -> None:
    """Data that can be read in every epoch, in batches, and end.

    Raises:
        DataError: for generators and other iterators, and for a tf.data.Dataset that is repeated without an end, or gives single
            examples.
    """
    if isinstance(data, Iterator):
        received = f"a {type(data).__name__}, which can be read once"
    elif hasattr(data, "cardinality") and int(data.cardinality()) == -1:
        received = "a tf.data.Dataset without an end; leave out repeat()"
    elif any(getattr(spec, "shape", None) == () for spec in keras.tree.flatten(getattr(data, "element_spec", ()))):
        received = "a tf.data.Dataset of single examples; append batch(64)"
    else:
        return
    raise DataError(
        f"{name}: expected what can be read in every epoch, such as arrays or a PyDataset. Received: {received}."
    )


def check_teacher(model: keras.Model, loss: Any) -> None:
    """A model that can teach.

    Raises:
        KerasMorphError: if its answers are no probabilities of classes, nor said to be logits.
    """
    if not answers_classes(model, loss):
        raise KerasMorphError(
            "Recipe(distillation=...) expects a classifier of one output: one that ends in a softmax, or gives logits to a "
            f"cross-entropy such as keras.losses.CategoricalCrossentropy(from_logits=True). Received: {model.name}, of "
            f"{len(model.outputs)} outputs, with loss={loss!r}; give distillation=0."
        )


def fit_on(
    model: keras.Model,
    data: Any,
    batch_size: int,
    *,
    seed: int = 0,
    first: int = 0,
    skip: int = 0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **options: Any,
) -> Any:
    """`fit` on a pair of arrays or on anything else that `fit` takes.

    Args:
        model: a compiled model.
        data: arrays are shuffled by `seed` and the number of the epoch. Of other data, `set_epoch` is called with that number
            before each epoch, if there is such a method, as PyTorch's samplers have it. The random generators that a
            program shares are set by the same two numbers.
        batch_size: for arrays.
        seed: of the order, at least 0.
        first: the number of this `fit`'s first epoch among all of a run.
        skip: batches that are left out when `fit` begins, of arrays or of data with a method `skip`.
        callbacks, options: as in `fit`.
    """
    if isinstance(data, tuple) and len(data) in (2, 3):
        data = Batches(data, batch_size, seed)
        if isinstance(options.get("validation_data"), tuple):
            options["validation_batch_size"] = batch_size
    if hasattr(data, "set_epoch"):
        options.setdefault("shuffle", False)  # batches that know their order would be mixed once more, by chance

    def begin(epoch: int, logs: Any) -> None:
        seed_shared(seed, first + epoch)
        if hasattr(data, "set_epoch"):
            data.set_epoch(first + epoch)
        if skip and epoch == options.get("initial_epoch", 0):
            data.skip(skip)

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_begin=begin), *callbacks]
    with failures_of(data, options.get("validation_data")), warnings.catch_warnings():
        if skip:  # Keras wonders at an epoch that is shorter than the others
            warnings.filterwarnings("ignore", message="Your input ran out of data")
        return model.fit(data, callbacks=list(callbacks), **options)


@contextmanager
def failures_of(*data: Any) -> Iterator[None]:
    """Inside, an error of a data set that has kept it (`failure`) is raised as it was: TensorFlow wraps it in one of its own."""
    try:
        yield
    except Exception:
        for failure in (getattr(each, "failure", None) for each in data):
            if failure is not None:
                raise failure from None
        raise
