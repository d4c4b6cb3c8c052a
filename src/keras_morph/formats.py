"""Formats of files: which Keras backend writes each, and how. Keras's own exporters do, here or in a process of their own."""

import functools
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import keras
import numpy as np

from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import one_or_all, parts_of, structs
from keras_morph.quantizing import litert_options, quantize_onnx, quantize_openvino
from keras_morph.runs import save_model
from keras_morph.runtimes import RUNTIMES

__all__ = [
    "FORMATS",
    "FREE",
    "PREFERENCE",
    "Arrays",
    "Format",
    "can",
    "check_backends",
    "nested_inputs",
    "work",
    "write_elsewhere",
    "write_here",
]

FREE = 32  # size of an axis whose size is free
# TensorFlow's exporters come first, wherever Keras runs: what PyTorch's write pads by arithmetic on shapes, and leaves
# BatchNormalization apart from the convolution in front, so that it is slower.
PREFERENCE = ("tensorflow", "torch")
TENSORFLOW_OUTPUT = re.compile(r"Identity(_\d+)?:0$")
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours of Keras's errors
# Where converters to LiteRT and OpenVINO name the operation.
COMPLAINT = re.compile(r"('tf\.\w+' op .*|No conversion rule found for operations: .*|error: ((?!loc).*))")
LONGEST_REASON = 200  # characters
Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        runtime: what opens it, a name of `RUNTIMES`.
        backends: those whose exporter serves, each with the modules that it needs.
        write: function of a model, a path, and calibration examples for eight bits, or nothing.
    """

    runtime: str
    backends: dict[str, tuple[str, ...]]
    write: Callable[[keras.Model, Path, Arrays | None], None]

    @property
    def suffix(self) -> str:
        return RUNTIMES[self.runtime].suffix


def can(backend: str, name: str) -> bool:
    """Whether a backend that is installed can export to a format."""
    needs = FORMATS[name].backends
    return backend in needs and all(find_spec(module) for module in (backend, *needs[backend]))


def check_backends(name: str) -> None:
    """Make sure that a backend is installed that can export to a format.

    Raises:
        KerasMorphError: if there is none.
    """
    if any(can(backend, name) for backend in PREFERENCE):
        return
    row = FORMATS[name]
    needed = " or ".join(" and ".join((backend, *needs)) for backend, needs in row.backends.items())
    raise KerasMorphError(
        f"An export to {name} needs {needed}: where Keras has another backend, a process on that one writes the file. "
        f"Received: not installed. Run pip install 'keras-morph[{RUNTIMES[row.runtime].extra},{next(iter(row.backends))}]'."
    )


def write_here(model: keras.Model, files: dict[str, Path], calibration: Arrays | None = None) -> dict[str, str]:
    """Write files of one model; returns for each format why that failed, or nothing."""
    reasons = dict.fromkeys(files, "")
    for name, path in files.items():
        try:
            with _quiet():
                FORMATS[name].write(model, path, calibration)
        except Exception as error:  # whatever exporters raise
            reasons[name] = _reason(error)
    return reasons


def _reason(error: Exception) -> str:
    """What an exporter complains of, out of the many lines that it may say it in."""
    text = ANSI.sub("", str(error))
    found = COMPLAINT.search(text)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Exception encountered when")]
    return (found.group(1) if found else lines[0].strip() if lines else type(error).__name__)[:LONGEST_REASON]


def write_elsewhere(
    models: Sequence[keras.Model], files: Sequence[dict[str, Path]], backend: str, calibration: Arrays | None = None
) -> list[dict[str, str]]:
    """Save models, and let one process on another backend write the files of each."""
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
            if calibration is not None:
                np.savez(saved.with_suffix(".npz"), *calibration)
            works.append({"model": str(saved), "files": {name: str(path.absolute()) for name, path in each.items()}})
        job.write_text(json.dumps({"works": works, "modules": sorted(modules)}))
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "CUDA_VISIBLE_DEVICES": "-1",  # the GPU belongs to this process
            "PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path),
        }
        code = f"from keras_morph import formats; formats.work({str(job)!r}, {str(answer)!r})"
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
        saved = Path(each["model"]).with_suffix(".npz")
        calibration = list(np.load(saved).values()) if saved.exists() else None
        reasons.append(write_here(model, {name: Path(path) for name, path in each["files"].items()}, calibration))
    Path(answer).write_text(json.dumps(reasons))


def nested_inputs(model: keras.Model, arrays: Sequence[Any]) -> Any:
    """A flat list as the model takes it."""
    return keras.tree.pack_sequence_as(structs(model)[0], list(arrays))


def _served(model: keras.Model, *, as_given: bool = False) -> keras.Model:
    """The model in inference, called once as Keras's exporters need it, with a flat list of inputs and of outputs."""
    taken = keras.tree.flatten(structs(model)[0])
    inputs = [keras.Input(batch_shape=each.shape, dtype=each.dtype, name=each.name) for each in taken]
    outputs = model(nested_inputs(model, inputs), training=False)
    if as_given:
        served = keras.Model(nested_inputs(model, inputs), outputs, name=model.name)
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
def _for_tf2onnx(model: keras.Model) -> Iterator[None]:
    """Inside, TensorFlow traces what tf2onnx knows.

    It knows no functions compiled by XLA, into which Keras puts grouped convolutions, as they do not run on a CPU otherwise:
    they become a part of their caller. And it takes tensors that layers hold besides their weights, such as the mean of a
    Normalization, for inputs: they become arrays.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    held = [
        (part, name, value)
        for part in parts_of(model)
        for name, value in vars(part).items()
        if isinstance(value, tf.Tensor)
    ]
    tf.config.run_functions_eagerly(True)
    try:
        for part, name, value in held:
            setattr(part, name, value.numpy())
        yield
    finally:
        for part, name, value in held:
            setattr(part, name, value)
        tf.config.run_functions_eagerly(before)


def _write_onnx(model: keras.Model, path: Path, calibration: Arrays | None) -> None:
    if keras.backend.backend() == "tensorflow":
        _teach_tf2onnx()
    served = _served(model)
    with _for_tf2onnx(model):
        served.export(path, format="onnx", verbose=False)
    if calibration is not None:
        quantize_onnx(path, calibration)


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


def _write_litert(model: keras.Model, path: Path, calibration: Arrays | None) -> None:
    import tensorflow as tf

    # Else operations of TensorFlow itself may be left in the file, which LiteRT does not have.
    built_in = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    names = [each.name for each in keras.tree.flatten(structs(model)[0])]
    options = {} if calibration is None else litert_options(names, calibration)
    with _unrolled(model), _softplus_without_overflow(tf):
        _served(model).export(path, format="litert", verbose=False, target_spec=built_in, **options)


def _write_openvino(model: keras.Model, path: Path, calibration: Arrays | None) -> None:
    with _unrolled(model):
        _served(model).export(str(path), format="openvino", verbose=False)
    _leave_out_unnamed(path)
    if calibration is not None:
        quantize_openvino(path, calibration)


def _leave_out_unnamed(path: Path) -> None:
    """What a layer works out for training alone is an output of its own in OpenVINO's files from TensorFlow: not in ours."""
    import openvino

    written = openvino.Core().read_model(path)
    outputs = [each for each in written.outputs if any(TENSORFLOW_OUTPUT.match(name) for name in each.names)]
    if not 0 < len(outputs) < len(written.outputs):
        return
    results = [each.get_node() for each in outputs]
    least = openvino.Model(results, written.get_parameters())
    with TemporaryDirectory(dir=path.parent) as folder:
        openvino.serialize(least, str(Path(folder) / path.name))
        del written, least, results, outputs  # they hold the weights' file open
        for suffix in (".bin", ".xml"):
            (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))


def _write_saved_model(model: keras.Model, path: Path, _: Arrays | None) -> None:
    _served(model, as_given=True).export(path, format="tf_saved_model", verbose=False)


@contextmanager
def _softplus_without_overflow(tf: Any) -> Iterator[None]:
    """Inside, softplus is traced as `max(x, 0) + log(1 + exp(-|x|))`: LiteRT's own is `log(1 + exp(x))`, infinite above 88."""

    def softplus(features: Any, name: str | None = None) -> Any:
        return tf.add(tf.nn.relu(features), tf.math.log(1 + tf.exp(-tf.abs(features))), name=name)

    def log_sigmoid(x: Any, name: str | None = None) -> Any:
        return tf.negative(softplus(-x), name=name)

    with patch.multiple(tf.math, softplus=softplus, log_sigmoid=log_sigmoid):
        yield


@contextmanager
def _unrolled(model: keras.Model) -> Iterator[None]:
    """Inside, recurrent layers are traced step by step: LiteRT and OpenVINO have no loops over TensorFlow's lists.

    Their inputs need a fixed number of steps for it.
    """
    loops = [part for part in parts_of(model) if hasattr(part, "unroll")]
    before = [part.unroll for part in loops]
    try:
        for part in loops:
            part.unroll = True
        yield
    finally:
        for part, unroll in zip(loops, before, strict=True):
            part.unroll = unroll


FORMATS: dict[str, Format] = {
    "onnx": Format("onnxruntime", {"tensorflow": ("tf2onnx",), "torch": ("onnx",)}, _write_onnx),
    "litert": Format("litert", {"tensorflow": ()}, _write_litert),
    "openvino": Format("openvino", {"tensorflow": (), "torch": ()}, _write_openvino),
    "saved_model": Format("tensorflow", {"tensorflow": ()}, _write_saved_model),
}
