"""Files of networks in eight bits: weights per channel, activations by the ranges that calibration examples show.

Each runtime's own quantizer does it: of ONNX Runtime, of the converter to LiteRT, and NNCF for OpenVINO.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from keras_morph.errors import KerasMorphError

__all__ = ["CALIBRATED", "check_quantizer", "litert_options", "quantize_onnx", "quantize_openvino"]

CALIBRATED = 200  # examples that quantizers look at, at most: ranges hardly change after some hundred


def check_quantizer(name: str) -> None:
    """Make sure that a format has a quantizer, and that it is installed.

    Raises:
        KerasMorphError: if not.
    """
    if name == "saved_model":
        raise KerasMorphError("int8: expected onnx, litert or openvino. Received: saved_model, which has no int8.")
    if name == "openvino" and find_spec("nncf") is None:
        raise KerasMorphError(
            "int8 for OpenVINO needs the package nncf. Received: it is not installed. Run pip install 'keras-morph[int8]'."
        )


def examples_of(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Batches of one."""
    for number in range(len(arrays[0])):
        yield [array[number : number + 1] for array in arrays]


def quantize_onnx(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Quantize an ONNX file in place, as pairs of QuantizeLinear and DequantizeLinear, which every ONNX runtime reads."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class _Reader(CalibrationDataReader):
        def __init__(self, names: Sequence[str]) -> None:
            self.names, self.examples = names, examples_of(arrays)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.examples, None)
            return None if found is None else dict(zip(self.names, found, strict=True))

    with TemporaryDirectory(dir=path.parent) as folder:
        prepared = Path(folder) / path.name
        # BatchNormalization becomes a part of its convolution.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        names = [each.name for each in onnx.load(prepared, load_external_data=False).graph.input]
        quantize_static(prepared, path, _Reader(names), per_channel=True)


def litert_options(names: Sequence[str], arrays: Sequence[np.ndarray]) -> dict[str, Any]:
    """Options of the converter to LiteRT: what has no eight-bit kernel stays in float32, and so do inputs and outputs."""
    import tensorflow as tf

    def representative_dataset() -> Iterator[dict[str, np.ndarray]]:
        for found in examples_of(arrays):
            yield dict(zip(names, found, strict=True))

    return {"optimizations": [tf.lite.Optimize.DEFAULT], "representative_dataset": representative_dataset}


def quantize_openvino(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Quantize OpenVINO's two files in place."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    model = openvino.Core().read_model(path)
    examples = nncf.Dataset(list(examples_of(arrays)))
    # All eight bits, as the others use them, and no correction of biases: docs/decisions.md has the figures.
    settings = nncf.AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.DISABLE,
        disable_bias_correction=True,
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        quantized = nncf.quantize(model, examples, subset_size=len(arrays[0]), advanced_parameters=settings)
    with TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        openvino.serialize(quantized, str(written))
        del model, quantized  # they hold the weights' file open
        for suffix in (".bin", ".xml"):
            written.with_suffix(suffix).replace(path.with_suffix(suffix))
