"""Options that several commands share, and checks of them: nothing here imports Keras, so that `--help` is quick."""

import dataclasses
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_morph.costs.hardware import HARDWARE
from keras_morph.errors import KerasMorphError
from keras_morph.processes import Process, of_tf_config

__all__ = [
    "ALGORITHMS",
    "BASE_MODELS",
    "COSTS",
    "DATA",
    "DEVICES",
    "EXPORTS",
    "OF_THE_PLACE",
    "OPTIMIZERS",
    "PIXELS",
    "RUNTIMES",
    "RUNTIMES_THAT_MEASURE",
    "SCHEDULES",
    "SCORES",
    "SUFFIXES",
    "Classes",
    "Grouped",
    "ImageSize",
    "JobAddresses",
    "Name",
    "PixelRange",
    "ProcessId",
    "Protect",
    "Resume",
    "Streamed",
    "Tie",
    "among",
    "check_folder",
    "check_name",
    "check_number",
    "check_output",
    "check_run_name",
    "command_of",
    "config_of",
    "formats_of",
    "plain",
    "process_of",
]

# Names of what only Keras can make; a test holds them against the tables that make it.
ALGORITHMS = ("GroupLasso", "Gamma", "LogisticSigmoid")
SCORES = ("contribution", "obs", "taylor", "flap", "minitron", "fpgm", "whc")
BASE_MODELS = (
    *("ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2", "VGG16", "VGG19", "Xception"),
    *("InceptionV3", "InceptionResNetV2", "MobileNet", "MobileNetV2", "DenseNet121", "DenseNet169", "DenseNet201"),
    *("NASNetLarge", "NASNetMobile"),
)
COSTS = ("FLOPs", "Latency", "ModelSize", "Activations")
DATA = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
DEVICES = (*HARDWARE, "Others")
EXPORTS = ("onnx", "litert", "openvino", "saved_model")
RUNTIMES_THAT_MEASURE = ("onnxruntime", "litert", "openvino")
SUFFIXES = {"onnx": ".onnx", "litert": ".tflite", "openvino": ".xml", "saved_model": "_saved_model"}
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "nadam", "adamax", "adagrad", "lion")
PIXELS = ("0-1", "0-255", "-1-1", "caffe", "torch")
RUNTIMES = ("onnxruntime", "litert", "openvino", "keras", "tensorflow")
SCHEDULES = ("constant", "cosine", "linear", "exponential")


LARGEST = 2**16  # pixels and classes; more are a slip, and a network of gigabytes


def among(choices: Iterable[str], *, show: bool = True) -> dict[str, Any]:
    """For `typer.Option`: names that the shell completes, and with `show` those of the help; a check is left to `one_of`."""
    names = tuple(choices)
    completed = {"autocompletion": lambda incomplete: [name for name in names if name.startswith(incomplete)]}
    return completed | ({"metavar": f"[{'|'.join(names)}]"} if show else {})


def _size(parameter: typer.CallbackParam, value: int) -> int:
    """A number that is no size is refused before anything is made of it."""
    check_number(f"--{(parameter.name or '').replace('_', '-')}", value, 1, LARGEST)
    return value


ImageSize = Annotated[int, typer.Option(help="height and width that a zoo model is built at", callback=_size)]
Classes = Annotated[int, typer.Option(help="classes that a zoo model is built with", callback=_size)]
PixelRange = Annotated[
    str,
    typer.Option(
        help="range of pixels that the model takes; auto: read off what stands in front of it, or tried on labelled images",
        **among(("auto", *PIXELS)),
    ),
]
Streamed = Annotated[
    bool | None,
    typer.Option(
        "--stream/--in-memory",
        help="decode the images of a folder or zip batch by batch, or once; default: in memory if they fill at most a "
        "quarter of what is free",
    ),
]
Protect = Annotated[list[str] | None, typer.Option(metavar="LAYER", help="keep all its channels; may be repeated")]
Tie = Annotated[
    list[str] | None, typer.Option(metavar="LAYER,LAYER", help="these lose the same channels; may be repeated")
]
Resume = Annotated[
    Path | None, typer.Option(metavar="RUN", help="go on with the unfinished run in this folder, under its own options")
]
Name = Annotated[str | None, typer.Option(help="name of the run's folder; by default the date and time")]
JobAddresses = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT,...",
        envvar="KERAS_DISTRIBUTION_JOB_ADDRESSES",
        help="Train in several processes, on one machine or several: the address of each; default: those of TF_CONFIG, if set.",
    ),
]
ProcessId = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        envvar="KERAS_DISTRIBUTION_PROCESS_ID",
        help="Which of --job-addresses is this process: from 0 on.",
    ),
]
OF_THE_PLACE = ("resume", "job_addresses", "process_id")
"""Options that a run which goes on does not take from its `config.json`."""
Grouped = Annotated[
    str,
    typer.Option(
        help="grouped convolutions lose whole conv groups, or equal counts in each",
        **among(("whole", "equal"), show=False),
    ),
]


def check_number(option: str, value: float | None, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """A finite number from `low` to `high`; with `above`, larger than `low`. None passes: the option was left out."""
    if value is None or (low <= value <= high and math.isfinite(value) and not (above and value == low)):
        return
    expected = f"a number {'above' if above else 'of at least'} {low}" + ("" if high == math.inf else f", up to {high}")
    raise KerasMorphError(f"{option} expects {expected}. Received: {value}.")


def check_name(option: str, name: str, choices: Iterable[str]) -> None:
    """One of some names."""
    if name not in (names := tuple(choices)):
        raise KerasMorphError(f"{option} expects one of {', '.join(names)}. Received: {name!r}.")


def check_run_name(name: str | None) -> None:
    """A name that can be a folder's."""
    if name is not None and (
        name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\") or len(name.encode()) > 200
    ):
        raise KerasMorphError(f"--name expects a name for a folder, without slashes. Received: {name!r}.")


def formats_of(option: str, text: str) -> list[str]:
    """Formats that are separated by commas, each once."""
    formats = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in formats if name not in EXPORTS]:
        raise KerasMorphError(
            f"{option} expects formats out of {', '.join(EXPORTS)}. Received: {unknown[0] or text!r}."
        )
    return formats


def check_folder(option: str, folder: Path) -> None:
    """A folder that is there or can be made, and can be written."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        fine = nearest.is_dir() and os.access(nearest, os.W_OK) and not nearest.is_relative_to("/proc")
    except (OSError, ValueError):  # too long, or with a zero byte
        fine = False
    if not fine:
        raise KerasMorphError(f"{option} expects a folder that can be written. Received: {folder}.")


def check_output(option: str, path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """A file that can be written, and is none of those that are read."""
    check_folder(f"the folder of {option}", path.parent)
    if not path.name or path.is_dir():
        raise KerasMorphError(f"{option} expects a file name. Received: {str(path)!r}, which is a folder.")
    if any(Path(each).resolve() == path.resolve() for each in inputs if "\0" not in str(each)):
        raise KerasMorphError(f"{option} expects another file than those that are read. Received: {path}.")


def process_of(addresses: str | None, number: int | None) -> Process:
    """Which process of a training this is, by `--job-addresses` and `--process-id`, or else by TF_CONFIG.

    Raises:
        KerasMorphError: if they do not say it.
    """
    if addresses is None:
        if number is not None:
            raise KerasMorphError(
                "--process-id expects --job-addresses too: HOST:PORT of each process. Received: none."
            )
        text = os.environ.get("TF_CONFIG")
        process = of_tf_config(text) if text else Process()
    else:
        listed = tuple(address.strip() for address in addresses.split(","))
        if number is None:
            raise KerasMorphError(f"--job-addresses expects --process-id too: 0 to {len(listed) - 1}. Received: none.")
        process = Process(number, listed)
    wrong = [each for each in process.addresses if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", each)]
    if wrong or len(set(process.addresses)) < len(process.addresses):
        raise KerasMorphError(
            f"--job-addresses expects a different HOST:PORT for each process. Received: {', '.join(wrong or process.addresses)}."
        )
    check_number("--process-id", process.number, 0, process.count - 1)
    return process


def plain(options: Any) -> dict[str, Any]:
    """A dataclass of options as plain data, for `config.json`."""
    values = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _resumed(options: Any, command: str, given: Collection[str]) -> Any:
    """The options of the run that `--resume` names, besides which none may be given.

    Raises:
        KerasMorphError: if there is no such run, or further options are given.
    """
    folder = options.resume
    fields = {field.name: field for field in dataclasses.fields(options)}
    here = {name: getattr(options, name) for name in OF_THE_PLACE if name in fields}
    given = [name for name in fields if name in given and name not in here]
    if given:
        raise KerasMorphError(
            f"--resume takes all options from {folder / 'config.json'}. Expected: no others. Received: {', '.join(given)}."
        )
    config = config_of(folder)
    if config.get("command") != command:
        raise KerasMorphError(
            f"--resume expects the folder of a run of keras-morph {command}. Received: {folder}, which holds "
            f"{'a run of ' + str(config['command']) if 'command' in config else 'no config.json of one'}."
        )
    values = {name: value for name, value in config["options"].items() if name in fields}
    for name, value in values.items():
        if not _fits(value, fields[name].default):
            raise KerasMorphError(
                f"{folder / 'config.json'} cannot be read. Expected: {name} as {command} writes it. Received: {value!r}."
            )
    paths = {name: Path(values[name]) for name in values if isinstance(fields[name].default, Path)}
    return type(options)(**values | paths | here)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value of `config.json` is one that an option with this default has."""
    if default is None:
        return value is None or isinstance(value, str | int | float | list)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, str) if isinstance(default, Path) else type(value) is type(default)


def config_of(folder: Path) -> dict[str, Any]:
    """`config.json` of a run; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and isinstance(config.get("options"), dict) else {}


def command_of(options: type[Any]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Make a function of a dataclass of options a command: its parameters are the fields, its help is the docstring."""

    def decorate(run: Callable[[Any], None]) -> Callable[..., None]:
        def command(context: typer.Context, **values: Any) -> None:
            found = options(**values)
            if found.resume is not None:
                sources = {name: context.get_parameter_source(name) for name in values}
                by_hand = [
                    name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"
                ]
                found = _resumed(found, run.__name__, by_hand)
            found.check()
            run(found)

        own = inspect.signature(options)
        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        command.__name__, command.__doc__ = run.__name__, options.__doc__
        command.__signature__ = own.replace(  # type: ignore[attr-defined]  # what Typer reads
            parameters=[context, *own.parameters.values()], return_annotation=None
        )
        return command

    return decorate
