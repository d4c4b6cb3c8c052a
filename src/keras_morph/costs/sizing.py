"""FileSize: a budget in bytes is the size of an exported file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import keras
import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import CONSTANT, Clock, Cost, ModelSize, Monomials
from keras_morph.errors import KerasMorphError
from keras_morph.exporting import bytes_of, random_examples, write_unchecked
from keras_morph.formats import FORMATS
from keras_morph.graph.closure import close
from keras_morph.graph.identities import network_of
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of
from keras_morph.surgery.rebuilding import rebuild

__all__ = ["FileSize", "FileSizeOf"]


@keras.saving.register_keras_serializable("keras_morph")
class FileSize(Cost):
    """Bytes of the file that `export` writes: what names and shapes take, and what each parameter takes.

    `FileSize.measured` finds the two numbers from two files of the very network.

    Args:
        bytes_per_parameter: how much the file grows by a parameter.
        overhead: bytes of a file without parameters.

    Example:
        >>> km.FileSize(1.1, overhead=20_000)(model) == 1.1 * model.count_params() + 20_000
        True
    """

    unit = "bytes"
    margin = 0.02  # of a budget: what is foretold was off by up to 1 % where it was tried

    def __init__(self, bytes_per_parameter: float = 4.0, *, overhead: float = 0.0) -> None:
        self.bytes_per_parameter, self.overhead = bytes_per_parameter, overhead

    @classmethod
    def measured(cls, model: Any, format: str = "litert", *, int8: Any = None) -> Self:
        """Write the network, and one with half of its channels, and see how large the files are.

        Args:
            model: a functional or Sequential model, or its ChannelGraph.
            format: "onnx", "litert" or "openvino".
            int8: examples that calibrate, as for `export`; by default the file is in float32.

        Raises:
            KerasMorphError: if the format is unknown, or the network cannot be exported to it.
        """
        if format not in FORMATS or not FORMATS[format].suffix:
            raise KerasMorphError(f"format: expected onnx, litert or openvino. Received: {format!r}.")
        graph = graph_of(model)
        half = Structure.closed(graph, graph.pinned_mask | (np.arange(graph.num_groups) % 2 == 0))
        models = [graph.model, rebuild(graph, half)]
        sizes = _sizes(models, format, int8)
        parameters = [each.count_params() for each in models]
        if parameters[0] == parameters[1]:
            raise KerasMorphError(
                f"{graph.model.name} has no parameters that could be cut off, and its files only one size. Expected: a network "
                "of which channels may be removed. Received: all of them are pinned; km.trace(model) says why."
            )
        rate = (sizes[0] - sizes[1]) / (parameters[0] - parameters[1])
        return cls(rate, overhead=sizes[0] - rate * parameters[0])

    def monomials(self, graph: ChannelGraph) -> Monomials:
        size = ModelSize().monomials(graph)
        # What is there once belongs to a call that is there in every structure.
        owner = int(np.argmax(close(graph, graph.pinned_mask).present))
        parts = zip(
            (self.bytes_per_parameter * size.coefficient, size.a, size.b, size.branch, size.owner),
            (self.overhead, CONSTANT, CONSTANT, 0, owner),
            strict=True,
        )
        return Monomials(*(np.append(part, last).astype(part.dtype) for part, last in parts))


@keras.saving.register_keras_serializable("keras_morph")
class FileSizeOf(Cost):
    """The FileSize of a format, measured for each network that it is asked about: what `"2MB litert int8"` is for.

    Random examples calibrate what is only weighed: a file's size does not depend on them.

    Args:
        format: "onnx", "litert" or "openvino".
        int8: whether it is in eight bits.
    """

    unit, margin = FileSize.unit, FileSize.margin
    known: dict[tuple[str, str, bool], FileSize] = {}  # by network

    def __init__(self, format: str, int8: bool = False) -> None:
        self.format, self.int8 = format, int8

    @property
    def name(self) -> str:
        return repr(self)

    @property
    def precision(self) -> str:
        return "int8" if self.int8 else "float32"

    def monomials(self, graph: ChannelGraph) -> Monomials:
        key = network_of(graph), self.format, self.int8
        if key not in self.known:
            self.known[key] = FileSize.measured(graph, self.format, int8=self._examples(graph))
        return self.known[key].monomials(graph)

    @contextmanager
    def clock(self, graph: ChannelGraph) -> Iterator[Clock]:
        """Bytes of the files that are written."""
        examples = self._examples(graph)
        (whole,) = _sizes([graph.model], self.format, examples)

        def measured(structure: Structure) -> tuple[float, float]:
            return float(_sizes([rebuild(graph, structure)], self.format, examples)[0]), float(whole)

        yield measured

    def _examples(self, graph: ChannelGraph) -> Any:
        return random_examples(graph.model)[0] if self.int8 else None

    def __repr__(self) -> str:
        return f"FileSize({self.format} {self.precision})"


def _sizes(models: list[keras.Model], format: str, int8: Any) -> list[int]:
    """Bytes of the files of models."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}{FORMATS[format].suffix}" for number in range(len(models))]
        write_unchecked(models, paths, format, int8=int8)
        return [bytes_of(path) for path in paths]
