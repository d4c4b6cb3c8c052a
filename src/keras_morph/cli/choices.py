"""From command-line arguments to the objects that they name."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_morph.cli.options import check_number
from keras_morph.costs.costs import Cost, Latency
from keras_morph.costs.hardware import HARDWARE, Hardware
from keras_morph.datasets import PIXELS, Choice, Dataset, choose_pixels, load
from keras_morph.errors import KerasMorphError, of_users
from keras_morph.runtimes import open_exported
from keras_morph.saving import open_model
from keras_morph.training.recipe import ends_in_softmax, failures_of
from keras_morph.training.regularizers import Regularizer
from keras_morph.zoo import build, minimum_size, morphnet_model
from keras_morph.zoo.morphnet_model import ALGORITHMS, COSTS, one_of

__all__ = [
    "ALGORITHMS",
    "COSTS",
    "OPTIMIZERS",
    "SCHEDULES",
    "accuracy_of",
    "base_model_of",
    "check_fits",
    "cost_of",
    "dataset_of",
    "image_size_of",
    "images_for",
    "is_named",
    "load_model",
    "loss_of",
    "one_of",
    "optimizer_of",
    "pixels_of",
    "regularizer_of",
    "wiring_of",
]

OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "sgd": lambda rate, momentum=0.9, **options: keras.optimizers.SGD(
        rate, momentum=momentum, nesterov=momentum > 0, **options
    ),
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "rmsprop": keras.optimizers.RMSprop,
    "nadam": keras.optimizers.Nadam,
    "adamax": keras.optimizers.Adamax,
    "adagrad": keras.optimizers.Adagrad,
    "lion": keras.optimizers.Lion,
}
SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "constant": lambda rate, _: rate,
    "cosine": keras.optimizers.schedules.CosineDecay,
    "linear": lambda rate, steps: keras.optimizers.schedules.PolynomialDecay(rate, steps, end_learning_rate=0.0),
    "exponential": lambda rate, steps: keras.optimizers.schedules.ExponentialDecay(rate, steps, decay_rate=0.01),
}


def regularizer_of(
    name: str,
    threshold: float | None,
    options: Iterable[str] = (),
    *,
    argument: str = "--morphnet-regularizer-algorithm",
) -> Regularizer:
    """A regularizer by its name in the Model Zoo; options are `KEY=VALUE`."""
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key.isidentifier() and equals and value):
            raise KerasMorphError(
                f"--regularizer-option expects KEY=VALUE, such as l1_fraction=0.5. Received: {option}."
            )
        values[key] = _plain(value)
    try:
        return morphnet_model.regularizer_of(name, threshold, argument=argument, **values)
    except TypeError as error:
        raise KerasMorphError(f"--regularizer-option {' '.join(options)}: {error}.") from error


def _plain(text: str) -> Any:
    """A number, true, false or null; else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def cost_of(
    name: str,
    hardware: str,
    peak_flops: float | None = None,
    bandwidth: float | None = None,
    *,
    arguments: tuple[str, str] = ("--morphnet-target-cost", "--morphnet-hardware"),
) -> Cost:
    """A cost by its name; for Latency, `Others` is given by its peak (FLOP/s) and bandwidth (bytes/s)."""
    device = one_of(arguments[1], hardware, {**HARDWARE, "Others": None})
    for option, value in (("--peak-flops", peak_flops), ("--bandwidth", bandwidth)):
        check_number(option, value, 0, above=True)
        if value is not None and hardware != "Others":
            raise KerasMorphError(f"{option} belongs to {arguments[1]} Others. Received: {hardware}.")
    if COSTS.get(name) is Latency and device is None:
        if peak_flops is None or bandwidth is None:
            raise KerasMorphError(
                f"{arguments[1]} Others needs --peak-flops (FLOP/s) and --bandwidth (bytes/s) of the data sheet."
            )
        device = Hardware("Others", peak_flops, bandwidth)
    return morphnet_model.cost_of(name, device or "V100", argument=arguments[0])


def optimizer_of(
    name: str, momentum: float | None = None, weight_decay: float | None = None
) -> Callable[..., keras.optimizers.Optimizer]:
    """A function from a learning rate to an optimizer."""
    kind = one_of("--optimizer", name, OPTIMIZERS)
    check_number("--momentum", momentum, 0, 1)
    check_number("--weight-decay", weight_decay, 0)
    if momentum is not None and "momentum" not in inspect.signature(kind).parameters:
        takers = [each for each, maker in OPTIMIZERS.items() if "momentum" in inspect.signature(maker).parameters]
        raise KerasMorphError(f"--momentum belongs to --optimizer {' or '.join(takers)}. Received: {name}.")
    options = {"momentum": momentum, "weight_decay": weight_decay}
    given = {option: value for option, value in options.items() if value is not None}
    return lambda rate: kind(rate, **given)


def wiring_of(
    protect: Iterable[str] | None = None, tie: Iterable[str] | None = None, grouped: str = "whole"
) -> dict[str, Any]:
    """`--protect`, `--tie` and `--grouped` as `trace` takes them."""
    ties = [text.split(",") for text in tie or ()]
    if any(len(names) < 2 or not all(names) for names in ties):
        raise KerasMorphError(f"--tie expects two or more layers, LAYER,LAYER. Received: {', '.join(tie or ())}.")
    one_of("--grouped", grouped, dict.fromkeys(("whole", "equal")))
    return {"protect": list(protect or ()), "tie": ties, "grouped": grouped}


def pixels_of(option: str, model: keras.Model, dataset: Dataset, *, named: bool, trained: bool = True) -> Choice:
    """`--pixels`: which range a model takes, and why.

    Args:
        option: a name of a range, or auto.
        model: what the images are for.
        dataset: images in [0, 1]; training images are tried where nothing else says the range.
        named: the model is one of the zoo, which takes values in [0, 1].
        trained: the model may know the classes, so that trying makes sense.
    """
    if option != "auto":
        return Choice(PIXELS[option], "as --pixels says")
    if named:
        return Choice(PIXELS["0-1"], "what networks of the zoo take; --pixels says otherwise")
    return choose_pixels(model, dataset.x_train, dataset.y_train if trained else None)


def base_model_of(text: str) -> str | Callable[..., keras.Model]:
    """`--base-model-name`: a name of the zoo, or `package.module:function` like one of `keras.applications`."""
    base_model = _imported(text, "--base-model-name") if ":" in text else text
    minimum_size(base_model)
    return base_model


def load_model(text: str, *, input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10) -> keras.Model:
    """MODEL of the command line: a `.keras` file, `package.module:function`, or a name of the zoo.

    Args:
        text: what the user typed.
        input_shape, classes: for a name of the zoo; a function gets them if it takes `input_shape` and `classes`.
    """
    if is_named(text):
        try:
            return build(text, input_shape=input_shape, classes=classes)
        except KerasMorphError as error:
            if os.sep not in text and not Path(text).exists():
                raise
            raise KerasMorphError(
                f"MODEL: {text} is no .keras file. Expected one that model.save(...) wrote, a zoo name or "
                "package.module:function."
            ) from error
    return open_model(text) if text.endswith(".keras") else _call_function(text, input_shape, classes)


def is_named(text: str) -> bool:
    """Whether MODEL is a name of the zoo, and no file or function."""
    return not text.endswith(".keras") and ":" not in text


def images_for(model: Any, data: str, pixels: str = "auto") -> Dataset:
    """A data set at the size and in the range of pixels that a model takes; auto is 0-1 for an exported file."""
    dataset = load(data, image_size=image_size_of(model))
    if not isinstance(model, keras.Model):
        wanted = open_exported(model).inputs[0].shape[-1]
        if wanted != dataset.image_shape[-1]:
            raise KerasMorphError(
                f"{model} expects images of {wanted} channels. Received: {dataset.name}, whose images have "
                f"{dataset.image_shape[-1]}."
            )
        return dataset if pixels == "auto" else dataset.in_pixels(PIXELS[pixels])
    check_fits(model, dataset)
    return dataset.in_pixels(pixels_of(pixels, model, dataset, named=False).pixels)


def dataset_of(options: Any) -> Dataset:
    """The data that the options of a run name, and the random seed set for all that comes."""
    keras.utils.set_random_seed(options.random_seed)
    return load(
        options.data,
        image_size=options.image_size,
        limit=options.limit,
        seed=options.random_seed,
        stream=options.stream,
    )


def check_fits(model: keras.Model, dataset: Dataset) -> None:
    """The model takes these images and tells these classes apart."""
    wanted, given = model.input_shape, (None, *dataset.image_shape)
    if len(wanted) != 4 or any(w is not None and g is not None and w != g for w, g in zip(wanted, given, strict=True)):
        sizes = len(wanted) == 4 and any(w not in (None, g) for w, g in zip(wanted[1:3], given[1:3], strict=True))
        raise KerasMorphError(
            f"{model.name} expects inputs of shape {wanted}. Received: images of {dataset.image_shape}; "
            + ("give --image-size, or build" if sizes else "build")
            + " the model for these images."
        )
    if len(model.outputs) != 1 or model.output_shape[-1] != dataset.num_classes:
        raise KerasMorphError(
            f"{model.name} gives outputs of shape {model.output_shape}. Expected: one score for each of the "
            f"{dataset.num_classes} classes of {dataset.name}."
        )


def loss_of(model: keras.Model) -> keras.losses.Loss:
    """What a classifier is trained by: labels are numbers of classes."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in_softmax(model))


def accuracy_of(model: keras.Model, dataset: Dataset) -> float:
    """On the test images, from 0 to 1."""
    images = dataset.test(256)
    with failures_of(images):
        predictions = model.predict(images, batch_size=None if dataset.streamed else 256, verbose=0)
    return float(np.mean(np.argmax(predictions, axis=-1) == dataset.y_test))


def image_size_of(model: Any) -> tuple[int, int] | None:
    """Height and width of a model's images, or of those of an exported file; None if any will do."""
    shape = model.input_shape if isinstance(model, keras.Model) else open_exported(model).inputs[0].shape
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise KerasMorphError(f"data: expected a model that takes images. Received: inputs of shape {shape}.")
    height, width = shape[1:3]
    return None if height is None or width is None else (height, width)


def _imported(text: str, argument: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the user, as `python -m` finds it
    try:
        with of_users(text):
            function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise KerasMorphError(
            f"{argument}: {text} cannot be imported: {error}. Expected package.module:function."
        ) from error
    if not callable(function):
        raise KerasMorphError(f"{argument}: {text} is a {type(function).__name__}. Expected a function.")
    return function


def _call_function(text: str, input_shape: tuple[int, int, int], classes: int) -> keras.Model:
    function = _imported(text, "MODEL")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # of a built-in one
        raise KerasMorphError(
            f"MODEL: {text} cannot be called: {error}. Expected a function that returns a model."
        ) from error
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    offered = {"input_shape": input_shape, "classes": classes}
    with of_users(text):
        model = function(**{name: value for name, value in offered.items() if open_ended or name in parameters})
    if not isinstance(model, keras.Model):
        raise KerasMorphError(f"MODEL: {text} returned {type(model).__name__}. Expected a keras.Model.")
    return model
