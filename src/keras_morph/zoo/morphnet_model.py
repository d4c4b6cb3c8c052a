"""The Model Zoo's class: a network, its regularizer, its optimizer and its log folder, one batch at a time."""

__all__ = ["ALGORITHMS", "COSTS", "MorphNetModel", "cost_of", "one_of", "regularizer_of"]

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.costs.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.costs.hardware import Hardware
from keras_morph.devices import choose, existing, padded
from keras_morph.errors import KerasMorphError
from keras_morph.events import Events
from keras_morph.runs import new_run_folder, write_json
from keras_morph.surgery.copying import cloned
from keras_morph.surgery.rebuilding import masked
from keras_morph.training.learner import StructureLearner
from keras_morph.training.logistic_sigmoid import LogisticSigmoid
from keras_morph.training.regularizers import Gamma, GroupLasso, Regularizer
from keras_morph.training.steps import jit_compiles
from keras_morph.zoo.applications import build

ALGORITHMS: dict[str, Callable[..., Regularizer]] = {
    "GroupLasso": GroupLasso,
    "Gamma": Gamma,
    "LogisticSigmoid": LogisticSigmoid,
}
COSTS: dict[str, Callable[..., Cost]] = {
    "FLOPs": FLOPs,
    "Latency": Latency,
    "ModelSize": ModelSize,
    "Activations": Activations,
}


def one_of(argument: str, value: Any, choices: Any) -> Any:
    """A choice by its name."""
    if value not in choices:
        raise KerasMorphError(f"{argument} expects one of {', '.join(choices)}. Received: {value!r}.")
    return choices[value]


def regularizer_of(
    name: str, threshold: float | None, *, argument: str = "morphnet_regularizer_algorithm", **options: Any
) -> Regularizer:
    """A regularizer by its name in the Model Zoo, with keyword arguments of its own."""
    kind = one_of(argument, name, ALGORITHMS)
    known = [option for option in inspect.signature(kind).parameters if option != "threshold"]
    for option in options:
        if option not in known:
            raise KerasMorphError(
                f"{name} has no option {option!r}. Expected: {', '.join(known) or 'none'}; its threshold is an argument "
                "of its own."
            )
    return kind(**options) if threshold is None else kind(threshold=threshold, **options)


def cost_of(name: str, hardware: str | Hardware, *, argument: str = "morphnet_target_cost") -> Cost:
    """A cost by its name in the Model Zoo."""
    kind = one_of(argument, name, COSTS)
    return Latency(hardware) if kind is Latency else kind()


class MorphNetModel:
    """A classifier that learns its structure, batch by batch, as in the MorphNet Model Zoo.

    The network is `base_model` without its top, global average pooling, a hidden Dense layer of 1024 with ReLU, and a
    Dense layer per class. Under it is a StructureLearner, `learner`, which can also be trained by `fit` within
    `devices.scope()`. Files are written to `folder`, `LOG_DIR/YYYYMMDD-HHMMSS`.

    Args:
        base_model: a callable like a `keras.applications` function (see `keras_morph.zoo.build`), or a name of the zoo.
        num_classes: outputs of the network.
        learning_rate: a number or a `keras.optimizers.schedules.LearningRateSchedule`.
        batch_size: examples per step on all devices together; `validate` and `test` cut what they get into such
            batches.
        num_gpus: accelerators to train on, data-parallel; by default all that are visible. 0 is the CPU.
        main_train_device: the first of the devices that train. Each of them holds the parameters.
        main_eval_device: where `validate` and `test` run; by default where training does. Elsewhere a copy of the
            network takes over its weights first.
        morphnet_regularizer_algorithm: "GroupLasso" or "Gamma", or a regularizer.
        morphnet_target_cost: "FLOPs", "Latency", "ModelSize" or "Activations", or a cost.
        morphnet_hardware: for Latency: "V100", "P100", another name of `keras_morph.HARDWARE`, or a Hardware.
        morphnet_regularizer_threshold: channels whose score is above it are alive.
        morphnet_regularization_strength: factor of the penalty; it can be changed at any time.
        log_dir: where the run's folder is made.
        input_shape: shape of one image.
        morphnet_regularizer_kwargs: further keyword arguments of the regularizer, such as `{"l1_fraction": 0.5}`.
        optimizer: makes an optimizer from a learning rate.
        run: the folder of a run that goes on, instead of a new one in `log_dir`.

    Raises:
        KerasMorphError: if a value is out of range, or a device is not there.
        UnsupportedModelError: if the regularizer finds nothing to read in the network.

    Example:
        >>> def base_model(input_shape):
        ...     image = keras.Input(input_shape)
        ...     return keras.Model(image, keras.layers.Conv2D(8, 3, activation="relu")(image))
        >>> model = km.zoo.MorphNetModel(base_model, num_classes=10, num_gpus=0, input_shape=(8, 8, 1))
        >>> loss, accuracy, cost = model.train(np.zeros((4, 8, 8, 1)), np.zeros(4, int))
        >>> cost == model.get_model_cost()
        True
        >>> model.export_model_config_with_inputs().name
        'alive_1'
        >>> model.close()
    """

    def __init__(
        self,
        base_model: str | Callable[..., keras.Model],
        num_classes: int,
        learning_rate: Any = 1e-3,
        batch_size: int = 256,
        num_gpus: int | None = None,
        main_train_device: str | None = None,
        main_eval_device: str | None = None,
        morphnet_regularizer_algorithm: str | Regularizer = "GroupLasso",
        morphnet_target_cost: str | Cost = "FLOPs",
        morphnet_hardware: str | Hardware = "V100",
        morphnet_regularizer_threshold: float = 1e-2,
        morphnet_regularization_strength: float = 1e-9,
        log_dir: str | Path = "./morphnet_log",
        *,
        input_shape: tuple[int, int, int] = (32, 32, 3),
        morphnet_regularizer_kwargs: Mapping[str, Any] | None = None,
        optimizer: Callable[[Any], keras.optimizers.Optimizer] = keras.optimizers.Adam,
        run: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise KerasMorphError(f"batch_size expects at least 1. Received: {batch_size}.")
        regularizer, cost = morphnet_regularizer_algorithm, morphnet_target_cost
        if isinstance(regularizer, str):
            options = dict(morphnet_regularizer_kwargs or {})
            regularizer = regularizer_of(regularizer, morphnet_regularizer_threshold, **options)
        if isinstance(cost, str):
            cost = cost_of(cost, morphnet_hardware)
        self.devices = choose(num_gpus, first=main_train_device)
        self.devices.check_batch_size(batch_size)
        self.batch_size, self.image_shape, self.num_classes = batch_size, tuple(input_shape), num_classes
        with self.devices.scope():
            seed = build(base_model, input_shape=input_shape, classes=num_classes)
            self.learner = StructureLearner(
                seed, regularizer=regularizer, cost=cost, strength=morphnet_regularization_strength
            )
            self.learner.compile(optimizer(learning_rate), **self._objective())
        self._copy, self._copy_device = None, None if main_eval_device is None else existing(main_eval_device)
        if self._copy_device is not None and self._copy_device not in self.devices:
            with keras.device(self._copy_device):
                self._copy = cloned(seed)
                self._copy.compile(**self._objective())
        self.folder = new_run_folder(log_dir) if run is None else Path(run)
        self._events = Events(self.folder)

    def train(self, inputs: Any, labels: Any) -> tuple[float, float, float]:
        """Train on one batch, under the penalty.

        Args:
            inputs: images in [0, 1], `(n, *input_shape)`.
            labels: class numbers, `(n,)`, or one-hot, `(n, num_classes)`.

        Returns:
            Loss with the penalty, accuracy, and cost of the channels alive by the threshold, in its unit.
        """
        inputs, labels = self._checked(inputs, labels)
        self.devices.check_batch_size(len(inputs))
        with self.devices.scope():
            if self.devices.count == 1:
                logs = self.learner.train_on_batch(inputs, labels, return_dict=True)
            else:  # train_on_batch would hand the whole batch to each of TensorFlow's replicas
                history = self.learner.fit(inputs, labels, batch_size=len(inputs), shuffle=False, verbose=0).history
                logs = {name: values[-1] for name, values in history.items()}
        self._events.scalar("RegularizationLoss", logs["penalty"], self.step)
        self._events.scalar(self.learner.target_cost.name, logs["cost"], self.step)
        return float(logs["loss"]), float(logs["accuracy"]), float(logs["cost"])

    def validate(self, inputs: Any, labels: Any) -> tuple[float, float]:
        """Accuracy, with the moving averages of BatchNormalization, and cost of the current structure in its unit."""
        inputs, labels, weights = padded(*self._checked(inputs, labels), self.devices.count)
        with self._evaluating() as network:
            logs = network.evaluate(
                inputs, labels, sample_weight=weights, batch_size=self.batch_size, return_dict=True, verbose=0
            )
        return float(logs["accuracy"]), self.get_model_cost(inputs)

    def test(self, inputs: Any) -> np.ndarray:
        """Probabilities, float32, `(n, num_classes)`."""
        inputs, _ = self._checked(inputs, np.zeros(len(inputs)))
        filled, _, _ = padded(inputs, np.zeros(len(inputs)), self.devices.count)
        with self._evaluating() as network:
            return network.predict(filled, batch_size=self.batch_size, verbose=0)[: len(inputs)]

    def export_model_config_with_inputs(self, inputs: Any = None) -> Path:
        """Write `learned_structure/alive_STEP`, the alive channels of each convolution, and give its path.

        Args:
            inputs: the original's argument; the structure depends on the weights alone.
        """
        path = self.folder / "learned_structure" / f"alive_{self.step}"
        write_json(path, dict(sorted(self.learner.structure().counts().items())))
        return path

    def get_model_cost(self, inputs: Any = None) -> float:
        """Cost of the current structure for one image, in its unit; `inputs` is the original's argument."""
        return self.learner.target_cost(self.learner.graph, self.learner.structure())

    def set_morphnet_regularization_strength(self, morphnet_regularization_strength: float) -> None:
        """Set the factor of the penalty, from the next step on."""
        self.learner.strength = morphnet_regularization_strength

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return int(ops.convert_to_numpy(self.learner.optimizer.iterations))

    @property
    def evaluates_elsewhere(self) -> bool:
        """Evaluation runs on another device than training."""
        return self._copy is not None

    def close(self) -> None:
        """Write out the events."""
        self._events.close()

    def _objective(self) -> dict[str, Any]:
        # Weighted, so that what pads a batch does not count.
        loss = keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight")
        return {"loss": loss, "weighted_metrics": ["accuracy"], "jit_compile": jit_compiles()}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[keras.Model]:
        """The network that evaluates, on its device."""
        if self._copy is None:
            with self.devices.scope():
                yield self.learner
        else:
            learner = self.learner
            gateless = learner.seed if learner.gates is None else masked(learner, learner.structure())
            weights = gateless.get_weights()
            with keras.device(self._copy_device):
                self._copy.set_weights(weights)
                yield self._copy

    def _checked(self, inputs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        """Arrays of the expected shapes; one-hot labels as numbers."""
        inputs, labels = np.asarray(inputs), np.asarray(labels)
        if inputs.shape[1:] != self.image_shape or not len(inputs):
            raise KerasMorphError(
                f"Expected a batch of images of {self.image_shape}. Received: inputs of shape {inputs.shape}; give "
                "input_shape to MorphNetModel, or resize the images."
            )
        if labels.shape == (len(inputs), self.num_classes):
            labels = labels.argmax(axis=1)
        if labels.shape != (len(inputs),):
            raise KerasMorphError(
                f"Expected {len(inputs)} class numbers, or one-hot labels of {self.num_classes} classes. "
                f"Received: labels of shape {labels.shape}."
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise KerasMorphError(
                f"Expected labels from 0 to {self.num_classes - 1}. Received: {labels.min()} to {labels.max()}."
            )
        return inputs, labels
