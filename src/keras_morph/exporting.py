"""Models as files of other runtimes: ONNX, LiteRT, OpenVINO, SavedModel. What is written is run and compared first.

A format is a row of `FORMATS`. Keras's own exporters write the files. Where the present backend has none for a format, or
what it wrote is wrong, the model is saved, and exported by a process on another backend that is installed.
"""

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np

from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.graph.tracing import known_graph
from keras_morph.keras_internals import one_or_all, parts_of, structs
from keras_morph.runs import save_model
from keras_morph.runtimes import RUNTIMES, Session, first_line, installed, open_exported

__all__ = ["FORMATS", "Exported", "Format", "export", "export_all", "work", "write_unchecked", "written_here"]

TOLERANCE = 1e-4  # difference to the Keras model, relative to its largest output: float32 sums in another order
FREE = 32  # size of an axis whose size is free
BATCHES = {3: FREE, 1: FREE + 16}  # batch sizes that are tried, each with the size of axes whose size is free
EXAMPLES = 32  # of the user's own, compared at a time
# TensorFlow's exporters come first, wherever Keras runs: what PyTorch's write pads by arithmetic on shapes, and leaves
# BatchNormalization apart from the convolution in front, so that it is slower.
PREFERENCE = ("tensorflow", "torch")
TENSORFLOW_OUTPUT = re.compile(r"Identity(_\d+)?:0$")


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        runtime: what opens it, a name of `RUNTIMES`.
        backends: those whose exporter serves, each with the modules that it needs.
        write: function of a model and a path.
    """

    runtime: str
    backends: dict[str, tuple[str, ...]]
    write: Callable[[keras.Model, Path], None]

    @property
    def suffix(self) -> str:
        return RUNTIMES[self.runtime].suffix


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared with the Keras model.

    Attributes:
        path: the file, or the folder of a SavedModel; OpenVINO's weights are beside it, in a file that ends in `.bin`.
        format: name of the format.
        backend: the Keras backend that wrote it.
        bytes: size, weights included.
        difference: largest difference to the outputs of the Keras model, relative to its largest output.

    Example:
        >>> print(km.Exported(Path("small.onnx"), "onnx", "tensorflow", 2644, 1.3e-7))
        small.onnx: 2,644 bytes; onnxruntime agrees with Keras to 1.3e-07
    """

    path: Path
    format: str
    backend: str
    bytes: int
    difference: float

    def __str__(self) -> str:
        runtime = RUNTIMES[FORMATS[self.format].runtime].package
        return f"{self.path}: {self.bytes:,} bytes; {runtime} agrees with Keras to {self.difference:.1e}"


def export(
    model: keras.Model, path: str | os.PathLike[str], *, format: str | None = None, check: Any = None
) -> Exported:
    """Write a model as a file of another runtime, run it there, and compare its outputs with those of the Keras model.

    What only training uses (dropout, augmentation) is left out; a batch may have any size. A file that is there already is
    replaced once the new one has been checked, and stays where the export fails.

    Args:
        model: a functional or Sequential model, or what stands for one.
        path: `.onnx`, `.tflite` (LiteRT) or `.xml` (OpenVINO, whose weights go to a `.bin` beside it); without a suffix,
            the folder of a TensorFlow SavedModel.
        format: "onnx", "litert", "openvino" or "saved_model"; read off the path by default.
        check: examples to compare with too, an array or as many as the model has inputs, nested as it takes them. Random
            ones are compared in any case.

    Raises:
        KerasMorphError: if a package is missing, no backend can export the model, or the outputs differ by more than 1e-4
            of the largest one.

    Example:
        >>> exported = km.export(model, "small.onnx", check=images)
        >>> exported.format, exported.difference < 1e-4, exported.bytes == Path("small.onnx").stat().st_size
        ('onnx', True, True)
    """
    (exported,) = export_all(model, [path], formats=[format], check=check)
    return exported


def export_all(
    model: keras.Model,
    paths: Sequence[str | os.PathLike[str]],
    *,
    formats: Sequence[str | None] | None = None,
    check: Any = None,
) -> list[Exported]:
    """Export to several formats: where another backend is needed, one process writes all files. See `export`."""
    graph = known_graph(model)
    model = graph.model if graph is not None else model
    chosen = [_format_of(Path(path), name) for path, name in zip(paths, formats or [None] * len(paths), strict=True)]
    targets = dict(zip(chosen, map(Path, paths), strict=True))
    for name in targets:
        _check_place(targets[name])
        installed(FORMATS[name].runtime)
        _check_backends(name)
    trials = [*_random_examples(model), *_given_examples(model, check)]
    expected = [_outputs(model, arrays) for arrays in trials]
    done: dict[str, Exported] = {}
    failures: dict[str, list[str]] = {name: [] for name in targets}
    for backend in PREFERENCE:
        names = [name for name in targets if name not in done and _can(backend, name)]
        for name, file, reason in _written(model, {name: targets[name] for name in names}, backend):
            try:
                difference = _difference(open_exported(file), model, trials, expected) if not reason else np.nan
                if difference <= TOLERANCE:
                    size = _bytes(file)
                    _move(file, targets[name])
                    done[name] = Exported(targets[name], name, backend, size, difference)
                    continue
                reason = reason or f"its outputs differ by {difference:.1e} of the largest one"
            except Exception as error:  # whatever runtimes raise
                reason = first_line(error)
            failures[name].append(f"by {backend}: {reason}")
    for name in targets.keys() - done.keys():
        raise UnsupportedModelError(
            f"{model.name} cannot be exported to {name}. Expected a file whose outputs are those of the model. "
            f"Received, {'; '.join(failures[name])}. {targets[name]} was not written."
        )
    return [done[name] for name in chosen]


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
    if path.suffix != FORMATS[name].suffix:
        suffix = f"a name that ends in {FORMATS[name].suffix}" if FORMATS[name].suffix else "the name of a folder"
        raise KerasMorphError(f"path: {name} expects {suffix}. Received: {path}.")
    return name


def _check_place(path: Path) -> None:
    """Make sure that nothing is lost but an older export."""
    if path.suffix and path.is_dir():
        raise KerasMorphError(f"path: expected a file. Received: {path}, which is a folder.")
    if not path.suffix and path.exists() and not (path / "saved_model.pb").exists():
        raise KerasMorphError(
            f"path: expected the folder of a SavedModel, or none. Received: {path}, which is something else."
        )


def _can(backend: str, name: str) -> bool:
    """Whether a backend that is installed can export to a format."""
    needs = FORMATS[name].backends
    return backend in needs and all(find_spec(module) for module in (backend, *needs[backend]))


def _check_backends(name: str) -> None:
    """Make sure that a backend is installed that can export to a format.

    Raises:
        KerasMorphError: if there is none.
    """
    if any(_can(backend, name) for backend in PREFERENCE):
        return
    row = FORMATS[name]
    needed = " or ".join(" and ".join((backend, *needs)) for backend, needs in row.backends.items())
    raise KerasMorphError(
        f"An export to {name} needs {needed}: where Keras has another backend, a process on that one writes the file. "
        f"Received: not installed. Run pip install 'keras-morph[{RUNTIMES[row.runtime].extra},{next(iter(row.backends))}]'."
    )


# Writing.


def _written(model: keras.Model, targets: dict[str, Path], backend: str) -> Iterator[tuple[str, Path, str]]:
    """For each format, the file that a backend wrote beside its target, and why it could not; they last until the next one."""
    if not targets:
        return
    with ExitStack() as folders:
        files = {}
        for name, path in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files[name] = (
                Path(folders.enter_context(TemporaryDirectory(dir=path.parent, prefix=".export-"))) / path.name
            )
        here = backend == keras.backend.backend()
        reasons = _write_here(model, files) if here else _write_elsewhere(model, files, backend)
        for name, path in files.items():
            yield name, path, reasons[name]


def _write_here(model: keras.Model, files: dict[str, Path]) -> dict[str, str]:
    """Write files; returns for each format why that failed, or nothing."""
    reasons = dict.fromkeys(files, "")
    for name, path in files.items():
        try:
            with _quiet():
                FORMATS[name].write(model, path)
        except Exception as error:  # whatever exporters raise
            reasons[name] = first_line(error)
    return reasons


def _write_elsewhere(model: keras.Model, files: dict[str, Path], backend: str) -> dict[str, str]:
    """Save the model, and let a process on another backend write the files."""
    (reasons,) = _write_all_elsewhere([model], [files], backend)
    return reasons


def _write_all_elsewhere(
    models: Sequence[keras.Model], files: Sequence[dict[str, Path]], backend: str
) -> list[dict[str, str]]:
    """The same for several models, in one process."""
    modules = {type(part).__module__ for model in models for part in parts_of(model)}
    modules = {module for module in modules if module.partition(".")[0] not in ("keras", "keras_morph", "builtins")}
    if "__main__" in modules:
        reason = (
            "a class of layers is defined in the script itself, where no other process finds it; move it to a module"
        )
        return [dict.fromkeys(each, reason) for each in files]
    with TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        works = []
        for number, (model, each) in enumerate(zip(models, files, strict=True)):
            saved = Path(folder) / f"{number}.keras"
            save_model(model, saved)
            works.append({"model": str(saved), "files": {name: str(path.absolute()) for name, path in each.items()}})
        job.write_text(json.dumps({"works": works, "modules": sorted(modules)}))
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "CUDA_VISIBLE_DEVICES": "-1",  # the GPU belongs to this process
            "PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path),
        }
        code = f"from keras_morph import exporting; exporting.work({str(job)!r}, {str(answer)!r})"
        finished = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        if answer.exists():
            return [dict(reasons) for reasons in json.loads(answer.read_text())]
        lines = finished.stderr.strip().splitlines() or ["it was killed"]
        return [dict.fromkeys(each, lines[-1]) for each in files]


def work(job: str, answer: str) -> None:
    """What the other process does: write the files that one file describes; say in another one which failed, and why."""
    described = json.loads(Path(job).read_text())
    for module in described["modules"]:
        import_module(module)  # whose classes are registered by it
    reasons = []
    for each in described["works"]:
        # The file is the work of the process that asks, whose own objects are in it: there is nothing to distrust.
        model = keras.models.load_model(each["model"], compile=False, safe_mode=False)
        reasons.append(_write_here(model, {name: Path(path) for name, path in each["files"].items()}))
    Path(answer).write_text(json.dumps(reasons))


def written_here(name: str) -> bool:
    """Whether the present backend is the one that writes a format."""
    _check_backends(name)
    return next(backend for backend in PREFERENCE if _can(backend, name)) == keras.backend.backend()


def write_unchecked(models: Sequence[keras.Model], paths: Sequence[Path], name: str) -> None:
    """Write models as files of one format, without comparing outputs: for files that are only timed.

    Raises:
        UnsupportedModelError: if one cannot be written.
    """
    files = [{name: path} for path in paths]
    backend = next(each for each in PREFERENCE if _can(each, name))
    if written_here(name):
        reasons = [_write_here(model, each) for model, each in zip(models, files, strict=True)]
    else:
        reasons = _write_all_elsewhere(models, files, backend)
    for model, found in zip(models, reasons, strict=True):
        if found[name]:
            raise UnsupportedModelError(
                f"{model.name} cannot be exported to {name}. Expected a network that {backend} can export. "
                f"Received: {found[name]}."
            )


def _served(model: keras.Model, *, nested: bool = False) -> keras.Model:
    """The model in inference, called once as Keras's exporters need it, with a flat list of inputs and of outputs."""
    taken = keras.tree.flatten(structs(model)[0])
    inputs = [keras.Input(batch_shape=each.shape, dtype=each.dtype, name=each.name) for each in taken]
    outputs = model(_nested(model, inputs), training=False)
    if nested:
        served = keras.Model(_nested(model, inputs), outputs, name=model.name)
    else:
        served = keras.Model(one_or_all(inputs), one_or_all(keras.tree.flatten(outputs)), name=model.name)
    ones = [np.ones([size or FREE for size in (each.shape[0] or 1, *each.shape[1:])], each.dtype) for each in taken]
    served(keras.tree.pack_sequence_as(served.input, ones))
    return served


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and notes of exporters, which are of no use to whoever calls them through us."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _inlined() -> Iterator[None]:
    """Inside, TensorFlow traces what is called as a part of its caller: tf2onnx knows no functions compiled by XLA.

    Keras puts grouped convolutions into one, as they do not run on a CPU otherwise.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _write_onnx(model: keras.Model, path: Path) -> None:
    if keras.backend.backend() == "tensorflow":
        _teach_tf2onnx()
    served = _served(model)
    with _inlined():
        served.export(path, format="onnx", verbose=False)


@functools.cache
def _teach_tf2onnx() -> None:
    """GELU is made of Erfc on TensorFlow, which tf2onnx does not know: 1 - Erf."""
    from tf2onnx.handler import tf_op

    @tf_op("Erfc")
    class _Erfc:
        @classmethod
        def version_9(cls, graph: Any, node: Any, **_: Any) -> None:
            (output,), (shape,), (dtype,) = node.output, node.output_shapes, node.output_dtypes
            graph.remove_node(node.name)
            one = graph.make_const(f"{node.name}_one", np.ones((), np.float32))
            erf = graph.make_node("Erf", node.input)
            graph.make_node("Sub", [*one.output, *erf.output], outputs=[output], shapes=[shape], dtypes=[dtype])


def _write_litert(model: keras.Model, path: Path) -> None:
    import tensorflow as tf

    # Else operations of TensorFlow itself may be left in the file, which LiteRT does not have.
    built_in = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    _served(model).export(path, format="litert", verbose=False, target_spec=built_in)


def _write_openvino(model: keras.Model, path: Path) -> None:
    import openvino

    _served(model).export(str(path), format="openvino", verbose=False)
    written = openvino.Core().read_model(path)
    outputs = [each for each in written.outputs if any(TENSORFLOW_OUTPUT.match(name) for name in each.names)]
    if not 0 < len(outputs) < len(written.outputs):
        return
    # What a layer works out for training alone, from TensorFlow, is an output of its own here.
    results = [each.get_node() for each in outputs]
    least = openvino.Model(results, written.get_parameters())
    openvino.serialize(least, str(path.with_name("least.xml")))
    del written, least, results, outputs  # they hold the weights' file open
    _move(path.with_name("least.xml"), path)


def _write_saved_model(model: keras.Model, path: Path) -> None:
    _served(model, nested=True).export(path, format="tf_saved_model", verbose=False)


FORMATS: dict[str, Format] = {
    "onnx": Format("onnxruntime", {"tensorflow": ("tf2onnx",), "torch": ("onnx",)}, _write_onnx),
    "litert": Format("litert", {"tensorflow": ()}, _write_litert),
    "openvino": Format("openvino", {"tensorflow": (), "torch": ()}, _write_openvino),
    "saved_model": Format("tensorflow", {"tensorflow": ()}, _write_saved_model),
}


# Comparing.


def _random_examples(model: keras.Model) -> list[list[np.ndarray]]:
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


def _given_examples(model: keras.Model, check: Any) -> list[list[np.ndarray]]:
    """The user's examples in batches, in the model's types."""
    if check is None:
        return []
    taken = keras.tree.flatten(structs(model)[0])
    given = [np.asarray(each) for each in keras.tree.flatten(check)]
    fits = len(given) == len(taken) and all(
        array.ndim == len(tensor.shape)
        and all(size in (None, own) for size, own in zip(tensor.shape[1:], array.shape[1:], strict=True))
        for array, tensor in zip(given, taken, strict=True)
    )
    if not fits or not len(given[0]):
        raise KerasMorphError(
            f"check: {model.name} expects examples of shape {', '.join(str(tuple(each.shape)) for each in taken)}. "
            f"Received: {', '.join(str(each.shape) for each in given)}."
        )
    arrays = [array.astype(tensor.dtype) for array, tensor in zip(given, taken, strict=True)]
    return [[array[start : start + EXAMPLES] for array in arrays] for start in range(0, len(given[0]), EXAMPLES)]


def _nested(model: keras.Model, arrays: Sequence[Any]) -> Any:
    return keras.tree.pack_sequence_as(structs(model)[0], list(arrays))


def _outputs(model: keras.Model, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    outputs = model(_nested(model, arrays), training=False)
    return [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(outputs)]


def _difference(
    session: Session,
    model: keras.Model,
    trials: Sequence[Sequence[np.ndarray]],
    expected: Sequence[Sequence[np.ndarray]],
) -> float:
    """The largest difference of any output to what was expected, relative to its largest value; NaN where one is NaN."""
    names = [each.name for each in keras.tree.flatten(structs(model)[0])]
    own = [each.name for each in session.inputs]
    # By name where the file has kept the names, else by position.
    order = [names.index(name) for name in own] if sorted(own) == sorted(names) else range(len(own))
    worst = []
    for arrays, wanted in zip(trials, expected, strict=True):
        given = [arrays[place].astype(each.dtype) for place, each in zip(order, session.inputs, strict=True)]
        for received, right in zip(session.run(given), wanted, strict=True):
            if received.shape != right.shape:
                raise KerasMorphError(f"an output of shape {received.shape} instead of {right.shape}")
            largest = np.abs(right, dtype=np.float64).max(initial=0) or 1
            worst.append(np.abs(np.subtract(received, right, dtype=np.float64)).max(initial=0) / largest)
    return float(np.max(worst))


# Files.


def _files(path: Path) -> list[Path]:
    """All files of an export: weights before what refers to them."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return sum(each.stat().st_size for each in _files(path))


def _move(source: Path, path: Path) -> None:
    """Put what was written in its place, instead of what is there."""
    if not source.is_dir():
        for each in _files(source):
            each.replace(path.with_suffix(each.suffix))
        return
    old = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    if path.exists():
        path.replace(old)
    source.replace(path)
    shutil.rmtree(old, ignore_errors=True)
