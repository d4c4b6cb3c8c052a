"""Models as files of other runtimes: ONNX, LiteRT, OpenVINO, SavedModel. What is written is run and compared first."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np

from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.formats import (
    FORMATS,
    FREE,
    PREFERENCE,
    Arrays,
    can,
    check_backends,
    nested_inputs,
    write_elsewhere,
    write_here,
)
from keras_morph.graph.tracing import known_graph
from keras_morph.keras_internals import parts_of, structs
from keras_morph.quantizing import CALIBRATED, check_quantizer
from keras_morph.runs import TEMPORARY, uncompiled
from keras_morph.runtimes import RUNTIMES, Session, first_line, installed, open_exported

__all__ = [
    "Exported",
    "bytes_of",
    "check_formats",
    "export",
    "export_all",
    "random_examples",
    "write_unchecked",
    "written_here",
]

TOLERANCE = 1e-4  # difference to the Keras model, relative to its largest output: float32 sums in another order
INT8_NOISE = 0.5  # of the outputs' standard deviation, root mean square: beyond, a quarter of their variance is lost
HALF = ("float16", "bfloat16")
OF_A_SAVED_MODEL = {"saved_model.pb", "variables", "assets", "assets.extra", "fingerprint.pb", "keras_metadata.pb"}
BATCHES = {3: FREE, 1: FREE + 16}  # batch sizes that are tried, each with the size of axes whose size is free
EXAMPLES = 32  # of the user's own, compared at a time


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared with the Keras model.

    Attributes:
        path: the file, or the folder of a SavedModel; OpenVINO's weights are beside it, in a file that ends in `.bin`.
        format: name of the format.
        backend: the Keras backend that wrote it.
        bytes: size, weights included.
        difference: largest difference to the outputs of the Keras model, relative to its largest output.
        precision: "float32" or "int8".

    Example:
        >>> print(km.Exported(Path("small.onnx"), "onnx", "tensorflow", 2644, 1.3e-7))
        small.onnx: 2,644 bytes; onnxruntime agrees with Keras to 1.3e-07
    """

    path: Path
    format: str
    backend: str
    bytes: int
    difference: float
    precision: str = "float32"

    def __str__(self) -> str:
        runtime = RUNTIMES[FORMATS[self.format].runtime].package
        precision = "" if self.precision == "float32" else f" in {self.precision}"
        return f"{self.path}: {self.bytes:,} bytes{precision}; {runtime} agrees with Keras to {self.difference:.1e}"


def export(
    model: keras.Model, path: str | os.PathLike[str], *, format: str | None = None, int8: Any = None, check: Any = None
) -> Exported:
    """Write a model as a file of another runtime, run it there, and compare its outputs with those of the Keras model.

    What only training uses (dropout, augmentation) is left out; a batch may have any size; a model of mixed or half precision
    computes in float32. A file that is there already is replaced once the new one has been checked, and stays where the
    export fails.

    Args:
        model: a functional or Sequential model, or what stands for one.
        path: `.onnx`, `.tflite` (LiteRT) or `.xml` (OpenVINO, whose weights go to a `.bin` beside it); without a suffix,
            the folder of a TensorFlow SavedModel.
        format: "onnx", "litert", "openvino" or "saved_model"; read off the path by default.
        int8: some hundred examples, as the model takes them, to calibrate a network in eight bits, of which up to 200 are
            used; by default it stays in float32. Inputs and outputs are as without.
        check: examples to compare with too, an array or as many as the model has inputs, nested as it takes them. Random
            ones are compared in any case, but for `int8`, where those that calibrate are.

    Raises:
        KerasMorphError: if a package is missing, no backend can export the model, or the outputs differ by more than 1e-4
            of the largest one; in eight bits, by more than half of their standard deviation, root mean square, over 32
            examples at a time.

    Example:
        >>> exported = km.export(model, "small.onnx", check=images)
        >>> exported.format, exported.difference < 1e-4, exported.bytes == Path("small.onnx").stat().st_size
        ('onnx', True, True)
        >>> km.export(model, "small_int8.onnx", int8=images).precision
        'int8'
    """
    (exported,) = export_all(model, [path], formats=[format], int8=int8, check=check)
    return exported


def export_all(
    model: keras.Model,
    paths: Sequence[str | os.PathLike[str]],
    *,
    formats: Sequence[str | None] | None = None,
    int8: Any = None,
    check: Any = None,
) -> list[Exported]:
    """Export to several formats: where another backend is needed, one process writes all files. See `export`."""
    graph = known_graph(model)
    model = _in_float32(graph.model if graph is not None else model)
    chosen = [_format_of(Path(path), name) for path, name in zip(paths, formats or [None] * len(paths), strict=True)]
    if len(set(chosen)) < len(chosen):
        raise KerasMorphError(f"Expected a file for each format. Received: {', '.join(map(str, paths))}.")
    targets = dict(zip(chosen, map(Path, paths), strict=True))
    for name in targets:
        _check_place(targets[name], name)
    check_formats(targets, int8=int8 is not None)
    calibration = None if int8 is None else [each[:CALIBRATED] for each in _arrays_of(model, "int8", int8)]
    given = [] if check is None else _batches(_arrays_of(model, "check", check))
    trials = [*(random_examples(model) if calibration is None else _batches(calibration)), *given]
    expected = [_outputs(model, arrays) for arrays in trials]
    done: dict[str, Exported] = {}
    failures: dict[str, list[str]] = {name: [] for name in targets}
    for backend in PREFERENCE:
        names = [name for name in targets if name not in done and can(backend, name)]
        for name, file, reason in _written(model, {name: targets[name] for name in names}, backend, calibration):
            try:
                if not reason:
                    received = _received(open_exported(file), model, trials)
                    difference = _difference(received, expected)
                    reason = _refused(difference) if calibration is None else _refused_int8(received, expected)
            except Exception as error:  # whatever runtimes raise
                reason = first_line(error)
            if reason:
                failures[name].append(f"by {backend}: {reason}")
                continue
            size, precision = bytes_of(file), "float32" if calibration is None else "int8"
            _move(file, targets[name])
            done[name] = Exported(targets[name], name, backend, size, difference, precision)
    for name in targets.keys() - done.keys():
        raise UnsupportedModelError(
            f"{model.name} cannot be exported to {name}. Expected a file whose outputs are those of the model. "
            f"Received, {'; '.join(failures[name])}. {targets[name]} was not written."
        )
    return [done[name] for name in chosen]


def check_formats(names: Iterable[str], *, int8: bool) -> None:
    """Make sure that files of some formats can be written and opened here.

    Raises:
        KerasMorphError: if a package is missing, or a format has no eight bits.
    """
    for name in names:
        installed(FORMATS[name].runtime)
        check_backends(name)
        if int8:
            check_quantizer(name)


def _format_of(path: Path, name: str | None) -> str:
    if name is None:
        found = [each for each, row in FORMATS.items() if row.suffix == path.suffix]
        if not found:
            known = ", ".join(f"{row.suffix} ({each})" for each, row in FORMATS.items() if row.suffix)
            raise KerasMorphError(
                f"path: expected a file name that ends in {known}, or no suffix (saved_model). Received: {path}."
            )
        return found[0]
    if name not in FORMATS:
        raise KerasMorphError(f"format: expected {', '.join(FORMATS)}. Received: {name!r}.")
    others = {row.suffix for row in FORMATS.values()} - {""}
    if path.suffix != FORMATS[name].suffix if FORMATS[name].suffix else path.suffix in others:
        suffix = f"a name that ends in {FORMATS[name].suffix}" if FORMATS[name].suffix else "the name of a folder"
        raise KerasMorphError(f"path: {name} expects {suffix}. Received: {path}.")
    return name


def _check_place(path: Path, name: str) -> None:
    """Make sure that nothing is lost but an older export."""
    if not FORMATS[name].suffix:
        found = {each.name for each in path.iterdir()} if path.is_dir() else set()
        if path.exists() and "saved_model.pb" not in found:
            raise KerasMorphError(
                f"path: expected the folder of a SavedModel, or none. Received: {path}, which is something else."
            )
        if further := sorted(found - OF_A_SAVED_MODEL):
            raise KerasMorphError(
                f"path: the folder of a SavedModel is replaced as a whole. Expected nothing else in it. Received: {path}, which "
                f"holds {further[0]}, too."
            )
        return
    for each in _files(path):
        if each.is_dir():
            raise KerasMorphError(f"path: expected a file. Received: {each}, which is a folder.")
    for beside in _files(path)[:-1]:
        if beside.exists() and not path.exists():
            raise KerasMorphError(
                f"path: the weights of {path} go to {beside}. Expected no such file, or one of an earlier export. "
                f"Received: {beside} without {path.name}, which is something else; take another name."
            )


# Writing.


def _written(
    model: keras.Model, targets: dict[str, Path], backend: str, calibration: Arrays | None
) -> Iterator[tuple[str, Path, str]]:
    """For each format, the file that a backend wrote beside its target, and why it could not; they last until the next one."""
    if not targets:
        return
    with ExitStack() as folders:
        files = {}
        for name, path in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files[name] = Path(folders.enter_context(TemporaryDirectory(dir=path.parent, prefix=TEMPORARY))) / path.name
        here = backend == keras.backend.backend()
        if here:
            reasons = write_here(model, files, calibration)
        else:
            (reasons,) = write_elsewhere([model], [files], backend, calibration)
        for name, path in files.items():
            yield name, path, reasons[name]


def written_here(name: str) -> bool:
    """Whether the present backend is the one that writes a format."""
    check_backends(name)
    return next(backend for backend in PREFERENCE if can(backend, name)) == keras.backend.backend()


def write_unchecked(models: Sequence[keras.Model], paths: Sequence[Path], name: str, *, int8: Any = None) -> None:
    """Write models as files of one format, without comparing outputs: for files that are only timed or weighed.

    Args:
        models: of the same inputs.
        paths: where they go.
        name: of the format.
        int8: as for `export`.

    Raises:
        UnsupportedModelError: if one cannot be written.
    """
    models, files = list(map(_in_float32, models)), [{name: path} for path in paths]
    backend = next(each for each in PREFERENCE if can(each, name))
    calibration = None if int8 is None else [each[:CALIBRATED] for each in _arrays_of(models[0], "int8", int8)]
    if written_here(name):
        reasons = [write_here(model, each, calibration) for model, each in zip(models, files, strict=True)]
    else:
        reasons = write_elsewhere(models, files, backend, calibration)
    for model, found in zip(models, reasons, strict=True):
        if found[name]:
            raise UnsupportedModelError(
                f"{model.name} cannot be exported to {name}. Expected a network that {backend} can export. "
                f"Received: {found[name]}."
            )


def _in_float32(model: keras.Model) -> keras.Model:
    """The model itself, or a copy of one that computes in half precision, which runtimes round otherwise."""
    if all(getattr(part, "compute_dtype", "float32") not in HALF for part in parts_of(model)):
        return model

    def widened(config: Any) -> Any:
        if isinstance(config, dict):
            return {key: widened(value) for key, value in config.items()}
        if isinstance(config, (list, tuple)):
            return type(config)(widened(value) for value in config)
        return "float32" if isinstance(config, str) and config.removeprefix("mixed_") in HALF else config

    with uncompiled(model):  # what it was compiled with may not be what Keras can write down
        config = widened(keras.saving.serialize_keras_object(model))
    copy = keras.saving.deserialize_keras_object(config, safe_mode=False)
    copy.set_weights(
        [np.asarray(each, np.float32 if "float" in str(each.dtype) else None) for each in model.get_weights()]
    )
    return copy


# Comparing.


def random_examples(model: keras.Model) -> list[list[np.ndarray]]:
    """Batches of random numbers from 0 to 1, and of integers that embeddings know."""
    rng = np.random.default_rng(0)
    known = [part.input_dim for part in parts_of(model) if isinstance(part, keras.layers.Embedding)]

    def drawn(tensor: Any, batch: int, free: int) -> np.ndarray:
        shape = [tensor.shape[0] or batch, *(size or free for size in tensor.shape[1:])]
        if keras.backend.is_float_dtype(tensor.dtype):
            return rng.random(shape).astype(tensor.dtype)
        if tensor.dtype == "string":
            raise UnsupportedModelError(
                f"{model.name} cannot be exported. Expected inputs that are numbers. Received: {tensor.name}, of text."
            )
        return rng.integers(0, min(known, default=2), shape).astype(tensor.dtype)

    taken = keras.tree.flatten(structs(model)[0])
    return [[drawn(tensor, batch, free) for tensor in taken] for batch, free in BATCHES.items()]


def _arrays_of(model: keras.Model, argument: str, examples: Any) -> list[np.ndarray]:
    """The user's examples in the model's types, one array for each of its inputs.

    Raises:
        KerasMorphError: if they do not fit the model.
    """
    taken = keras.tree.flatten(structs(model)[0])
    given = [np.asarray(each) for each in keras.tree.flatten(examples)]
    fits = len(given) == len(taken) and all(
        array.ndim == len(tensor.shape)
        and all(size in (None, own) for size, own in zip(tensor.shape[1:], array.shape[1:], strict=True))
        for array, tensor in zip(given, taken, strict=True)
    )
    if not fits or not len(given[0]):
        raise KerasMorphError(
            f"{argument}: {model.name} expects examples of shape "
            f"{', '.join(str(tuple(each.shape)) for each in taken)}. "
            f"Received: {', '.join(str(each.shape) for each in given)}."
        )
    typed = [array.astype(tensor.dtype) for array, tensor in zip(given, taken, strict=True)]
    for array, own in zip(given, typed, strict=True):
        if not keras.backend.is_float_dtype(own.dtype.name) and not np.array_equal(array, own):
            raise KerasMorphError(
                f"{argument}: expected whole numbers, as {model.name} takes {own.dtype}. "
                f"Received: {array.dtype} from {float(array.min()):g} to {float(array.max()):g}."
            )
    return typed


def _batches(arrays: Arrays) -> list[list[np.ndarray]]:
    return [[array[start : start + EXAMPLES] for array in arrays] for start in range(0, len(arrays[0]), EXAMPLES)]


def _outputs(model: keras.Model, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    outputs = model(nested_inputs(model, arrays), training=False)
    return [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(outputs)]


def _received(session: Session, model: keras.Model, trials: Sequence[Arrays]) -> list[list[np.ndarray]]:
    """What a file answers."""
    names = [each.name for each in keras.tree.flatten(structs(model)[0])]
    own = [each.name for each in session.inputs]
    if len(own) != len(names):
        raise KerasMorphError(f"a file of {len(own)} inputs ({', '.join(own)}) instead of {len(names)}")
    # By name where the file has kept the names, else by position.
    order = [names.index(name) for name in own] if sorted(own) == sorted(names) else range(len(own))
    return [
        session.run([arrays[place].astype(each.dtype) for place, each in zip(order, session.inputs, strict=True)])
        for arrays in trials
    ]


Outputs = Sequence[Sequence[np.ndarray]]  # of each batch, of each output


def _difference(received: Outputs, expected: Outputs) -> float:
    """The largest difference of any output to what was expected, relative to its largest value; NaN where one is NaN."""
    worst = [
        np.abs(found - right).max(initial=0) / (np.abs(right).max(initial=0) or 1)
        for found, right in _pairs(received, expected)
    ]
    return float(np.max(worst))


def _refused(difference: float) -> str:
    return "" if difference <= TOLERANCE else f"its outputs differ by {difference:.1e} of the largest one"


def _refused_int8(received: Outputs, expected: Outputs) -> str:
    """Why a network in eight bits is not what it was; nothing if it is, in every batch."""
    for found, right in _pairs(received, expected):
        noise = np.sqrt(np.mean((found - right) ** 2)) / (right.std() or np.abs(right).max() or 1)
        if not noise <= INT8_NOISE:
            return f"in eight bits its outputs are off by {noise:.1f} times their standard deviation, root mean square"
    return ""


def _pairs(received: Outputs, expected: Outputs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """In float64, output by output of batch after batch."""
    for outputs, wanted in zip(received, expected, strict=True):
        for found, right in zip(outputs, wanted, strict=True):
            if found.shape != right.shape:
                raise KerasMorphError(f"an output of shape {found.shape} instead of {right.shape}")
            yield found.astype(np.float64), right.astype(np.float64)


# Files.


def _files(path: Path) -> list[Path]:
    """All files of an export: weights before what refers to them."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


def bytes_of(path: Path) -> int:
    """Size of an exported file, or of all that belongs to it."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return sum(each.stat().st_size for each in _files(path))


def _move(source: Path, path: Path) -> None:
    """Put what was written in its place, instead of what is there."""
    if not source.is_dir():
        for each, target in zip(_files(source), _files(path), strict=True):
            each.replace(target.resolve() if target.is_symlink() else target)
        return
    path = path.resolve() if path.is_symlink() else path
    old = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}.{path.name}")
    if path.exists():
        path.replace(old)
    source.replace(path)
    shutil.rmtree(old, ignore_errors=True)
