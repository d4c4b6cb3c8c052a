"""Files of networks, opened in the runtimes that serve them. Nothing here needs Keras, but to open a `.keras` file."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.errors import KerasMorphError

__all__ = ["RUNTIMES", "Input", "Runtime", "Session", "installed", "is_exported", "open_exported", "runtime_of"]

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Input:
    """An input of a network.

    Attributes:
        name: as the file has it.
        shape: sizes; None where any size will do, as for the batch.
        dtype: of NumPy.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Session:
    """A file that a runtime has opened.

    Attributes:
        runtime: name of the runtime.
        inputs: what the network takes, in order.
        run: function from a list of arrays, one for each input, to the list of outputs.

    Example:
        >>> model.save("small.keras")
        >>> km.open_exported("small.keras").runtime
        'keras'
    """

    runtime: str
    inputs: tuple[Input, ...]
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Runtime:
    """What opens one kind of file.

    Attributes:
        suffix: how the file's name ends; nothing for a SavedModel, which is a folder.
        module: what Python imports.
        package: what pip installs.
        extra: of keras-morph, which contains it.
        open: function of a path and a number of threads.
    """

    suffix: str
    module: str
    package: str
    extra: str
    open: Callable[[Path, int], Session]

    @property
    def version(self) -> str:
        """Version of the installed package."""
        for name in (self.package, self.module, f"{self.package}-cpu"):
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return "unknown"


def open_exported(path: Path_, *, threads: int = 1) -> Session:
    """Open a network's file in its runtime, on the CPU, computing in float32 where its weights are.

    Args:
        path: `.onnx` for ONNX Runtime, `.tflite` for LiteRT, `.xml` for OpenVINO, `.keras` for Keras, or the folder of a
            SavedModel for TensorFlow.
        threads: how many the runtime may use. Keras's backends take theirs from the environment, before they start.

    Raises:
        KerasMorphError: if the runtime is not installed, or cannot open the file.

    Example:
        >>> model.save("small.keras")
        >>> session = km.open_exported("small.keras", threads=1)
        >>> session.inputs[0].shape, session.run([images])[0].shape
        ((None, 8, 8, 3), (64, 3))
    """
    path = Path(path)
    name = runtime_of(path)
    installed(name)
    if not path.exists():
        raise KerasMorphError(
            f"{RUNTIMES[name].package} expects a network's file. Received: {path}, which does not exist."
        )
    try:
        return RUNTIMES[name].open(path, threads)
    except Exception as error:  # whatever a runtime raises
        raise KerasMorphError(f"{path} cannot be opened by {RUNTIMES[name].package}: {first_line(error)}") from error


def runtime_of(path: Path_) -> str:
    """The name of the runtime that opens a file.

    Raises:
        KerasMorphError: if none does.
    """
    suffix = Path(path).suffix
    for name, runtime in RUNTIMES.items():
        if runtime.suffix == suffix:
            return name
    known = ", ".join(runtime.suffix for runtime in RUNTIMES.values() if runtime.suffix)
    raise KerasMorphError(f"Expected a file that ends in {known}, or a SavedModel's folder. Received: {path}.")


def is_exported(path: Path_) -> bool:
    """Whether a path is that of an exported file, or of a SavedModel's folder; a `.keras` file is none."""
    suffixes = {runtime.suffix for name, runtime in RUNTIMES.items() if name != "keras" and runtime.suffix}
    return Path(path).suffix in suffixes or (Path(path) / "saved_model.pb").exists()


def installed(name: str) -> None:
    """Make sure that a runtime is there.

    Raises:
        KerasMorphError: if its package is not installed.
    """
    runtime = RUNTIMES[name]
    if find_spec(runtime.module) is None:
        raise KerasMorphError(
            f"{name} needs the package {runtime.package}. Received: it is not installed. "
            f"Run pip install 'keras-morph[{runtime.extra}]'."
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _onnxruntime(path: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = tuple(Input(each.name, _sizes(each.shape), _onnx_type(each.type)) for each in session.get_inputs())
    names = [each.name for each in inputs]
    return Session("onnxruntime", inputs, lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))))


def _onnx_type(text: str) -> np.dtype[Any]:
    """`tensor(float)`, `tensor(int64)`, ... as NumPy calls it."""
    name = text.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def _litert(path: Path, threads: int) -> Session:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    (key, signature), *_ = interpreter.get_signature_list().items()
    runner = interpreter.get_signature_runner(key)
    # A signature is sorted by name; the file's own inputs have the order of the network, its outputs are numbered.
    details = runner.get_input_details()
    names = sorted(signature["inputs"], key=lambda name: _place(interpreter.get_input_details(), details[name]))
    places = [details[name]["index"] for name in names]
    outputs = [runner.get_output_details()[name]["index"] for name in sorted(signature["outputs"], key=_in_order)]
    inputs = tuple(
        Input(name, _sizes(details[name]["shape_signature"]), np.dtype(details[name]["dtype"])) for name in names
    )
    shapes: list[tuple[int, ...]] = []

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        wanted = [array.shape for array in arrays]
        if shapes != wanted:
            for place, shape in zip(places, wanted, strict=True):
                interpreter.resize_tensor_input(place, shape)
            interpreter.allocate_tensors()
            shapes[:] = wanted
        for place, array in zip(places, arrays, strict=True):
            interpreter.set_tensor(place, array)
        interpreter.invoke()
        return [interpreter.get_tensor(place) for place in outputs]

    return Session("litert", inputs, run)


def _place(all_details: list[dict[str, Any]], details: dict[str, Any]) -> int:
    return [each["index"] for each in all_details].index(details["index"])


def _in_order(name: str) -> tuple[int, str]:
    """`output_2` comes before `output_10`."""
    return len(name), name


def _openvino(path: Path, threads: int) -> Session:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16, on processors that have it
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    inputs = tuple(
        Input(
            each.get_any_name(),
            tuple(None if size.is_dynamic else size.get_length() for size in each.get_partial_shape()),
            np.dtype(each.get_element_type().to_dtype()),
        )
        for each in compiled.inputs
    )
    places = range(len(compiled.outputs))

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = request.infer(list(arrays), share_inputs=True)
        return [np.array(found[place]) for place in places]

    return Session("openvino", inputs, run)


def _keras(path: Path, threads: int) -> Session:
    import keras

    model = keras.models.load_model(path, compile=False)
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    inputs = tuple(
        Input(each.name, tuple(each.shape), np.dtype(each.dtype)) for each in keras.tree.flatten(model.inputs)
    )

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        given = keras.tree.pack_sequence_as(structure, list(arrays))
        return [np.asarray(each) for each in keras.tree.flatten(model.predict_on_batch(given))]

    return Session("keras", inputs, run)


def _tensorflow(path: Path, threads: int) -> Session:
    import tensorflow as tf

    model = tf.saved_model.load(str(path))
    signature = model.serve.input_signature
    inputs = tuple(
        Input(each.name, tuple(each.shape), np.dtype(each.dtype.as_numpy_dtype)) for each in tf.nest.flatten(signature)
    )

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        given = tf.nest.pack_sequence_as(signature, [tf.convert_to_tensor(array) for array in arrays])
        return [each.numpy() for each in tf.nest.flatten(model.serve(*given))]

    return Session("tensorflow", inputs, run)


def _sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    """Sizes; None for names and for -1."""
    return tuple(int(size) if isinstance(size, (int, np.integer)) and size >= 0 else None for size in shape)


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(".onnx", "onnxruntime", "onnxruntime", "onnx", _onnxruntime),
    "litert": Runtime(".tflite", "ai_edge_litert", "ai-edge-litert", "litert", _litert),
    "openvino": Runtime(".xml", "openvino", "openvino", "openvino", _openvino),
    "keras": Runtime(".keras", "keras", "keras", "tensorflow", _keras),
    "tensorflow": Runtime("", "tensorflow", "tensorflow", "tensorflow", _tensorflow),
}
