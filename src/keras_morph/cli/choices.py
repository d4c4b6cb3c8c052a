"""From what stands on a command line to the objects that it names."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_morph import zoo
from keras_morph.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.errors import KerasMorphError
from keras_morph.hardware import HARDWARE, Hardware
from keras_morph.regularizers import Gamma, GroupLasso, Regularizer

__all__ = ["ALGORITHMS", "COSTS", "OPTIMIZERS", "cost_of", "load_model", "one_of", "optimizer_of", "regularizer_of"]

ALGORITHMS: dict[str, Callable[..., Regularizer]] = {"GroupLasso": GroupLasso, "Gamma": Gamma}
COSTS: dict[str, Callable[..., Cost]] = {
    "FLOPs": FLOPs,
    "Latency": Latency,
    "ModelSize": ModelSize,
    "Activations": Activations,
}
OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "rmsprop": keras.optimizers.RMSprop,
}


def one_of(option: str, value: str, choices: Any) -> Any:
    """A choice by its name."""
    if value not in choices:
        raise KerasMorphError(f"{option} expects one of {', '.join(choices)}. Received: {value!r}.")
    return choices[value]


def regularizer_of(name: str, threshold: float) -> Regularizer:
    """A regularizer by its name in the Model Zoo."""
    return one_of("--morphnet-regularizer-algorithm", name, ALGORITHMS)(threshold=threshold)


def cost_of(name: str, hardware: str, peak_flops: float | None = None, bandwidth: float | None = None) -> Cost:
    """A cost by its name; for Latency, `Others` is given by its peak (FLOP/s) and bandwidth (bytes/s)."""
    kind = one_of("--morphnet-target-cost", name, COSTS)
    if kind is not Latency:
        return kind()
    if hardware == "Others":
        if peak_flops is None or bandwidth is None:
            raise KerasMorphError(
                "--morphnet-hardware Others needs --peak-flops (FLOP/s) and --bandwidth (bytes/s) of the data sheet."
            )
        return Latency(Hardware("Others", peak_flops, bandwidth))
    return Latency(one_of("--morphnet-hardware", hardware, {**HARDWARE, "Others": None}))


def optimizer_of(name: str) -> Callable[..., keras.optimizers.Optimizer]:
    """A function from a learning rate to an optimizer."""
    return one_of("--optimizer", name, OPTIMIZERS)


def load_model(text: str, *, input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10) -> keras.Model:
    """MODEL of the command line: a `.keras` file, `package.module:function`, or a name of the zoo.

    Args:
        text: what the user typed.
        input_shape, classes: for a name of the zoo; a function gets them if it takes `input_shape` and `classes`.
    """
    if text.endswith(".keras"):
        return _load_file(text)
    if ":" in text:
        return _call_function(text, input_shape, classes)
    return zoo.build(text, input_shape=input_shape, classes=classes)


def _load_file(path: str) -> keras.Model:
    if not Path(path).is_file():
        raise KerasMorphError(
            f"MODEL: {path} does not exist. Expected a .keras file, a zoo name or package.module:function."
        )
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise KerasMorphError(
            f"MODEL: {path} cannot be loaded by Keras: {reason[0] if reason else type(error).__name__}"
        ) from error


def _call_function(text: str, input_shape: tuple[int, int, int], classes: int) -> keras.Model:
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise KerasMorphError(
            f"MODEL: {text} cannot be imported: {error}. Expected package.module:function."
        ) from error
    try:
        model = function(input_shape=input_shape, classes=classes)
    except TypeError:
        model = function()
    if not isinstance(model, keras.Model):
        raise KerasMorphError(f"MODEL: {text} returned {type(model).__name__}. Expected a keras.Model.")
    return model
