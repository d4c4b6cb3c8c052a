"""What a network costs at given numbers of alive channels, and what one more channel would cost.

A cost answers these two questions by a Table. That of a formula is made of monomials `coefficient * n_a * n_b` in the alive
entries of two id vectors (either may be absent), summed per call of a layer; a roofline is the larger of two such sums. A cost
of your own is one method: `monomials`, or `table` where it is no formula (a staircase, a measurement).
"""

import math
import warnings
import weakref
from abc import ABC
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import keras
import numpy as np

from keras_morph.channels import Call, ChannelGraph, Layer, Weight
from keras_morph.costs import counting
from keras_morph.costs.hardware import Hardware, hardware_named
from keras_morph.errors import UncountedLayerWarning, UnsupportedModelError
from keras_morph.graph.closure import Closed, close, whole
from keras_morph.graph.structure import Structure, graph_and_structure
from keras_morph.graph.tracing import graph_of
from keras_morph.layers.rules import at_side, variable
from keras_morph.saving import Configured

__all__ = [
    "CONSTANT",
    "Activations",
    "Clock",
    "Cost",
    "FLOPs",
    "Formula",
    "Latency",
    "ModelSize",
    "Monomials",
    "Table",
    "multiply_adds",
    "positions_of",
    "sides_of",
    "times_multiplied",
    "working",
]

_WARNED: Any = weakref.WeakKeyDictionary()  # model -> names of the costs whose uncounted layers were named

Clock = Callable[[Structure], tuple[float, float]]
CONSTANT = -1  # in place of a vector: no channels, a factor of 1


@dataclass(frozen=True)
class Monomials:
    """`sum over owners of max over branches of sum of coefficient * counts[a] * counts[b]`.

    Attributes:
        coefficient: float64, `(m,)`, in the cost's unit.
        a, b: vector numbers, or CONSTANT, `(m,)`.
        branch: 0, or 1 for the second roof of a roofline, `(m,)`.
        owner: index into `Closed.present`: a call, or `len(calls) + layer` for what a layer has once, `(m,)`.
    """

    coefficient: np.ndarray
    a: np.ndarray
    b: np.ndarray
    branch: np.ndarray
    owner: np.ndarray

    @classmethod
    def table(cls, rows: list[tuple[float, int, int, int, int]]) -> "Monomials":
        """From rows of (coefficient, a, b, branch, owner)."""
        columns = np.array(rows, np.float64).reshape(-1, 5).T
        return cls(columns[0], *columns[1:].astype(np.int64))

    def branch_sums(self, counts: np.ndarray, owners: int) -> np.ndarray:
        """Cost of each branch of each owner, float64, `(owners, branches)`."""
        n = np.append(counts, 1).astype(np.float64)
        branches = int(self.branch.max(initial=0)) + 1
        values = self.coefficient * n[self.a] * n[self.b]
        sums = np.bincount(self.owner * branches + self.branch, weights=values, minlength=owners * branches)
        return sums.reshape(owners, branches)

    def prices(self, counts: np.ndarray, owners: int) -> tuple[np.ndarray, np.ndarray]:
        """Derivative of the cost by the counts of `a` and of `b` in each monomial, float64, `(m,)` each."""
        n = np.append(counts, 1).astype(np.float64)
        active = self.branch_sums(counts, owners).argmax(axis=1)[self.owner] == self.branch
        scale = self.coefficient * active
        return scale * n[self.b] * (self.a != CONSTANT), scale * n[self.a] * (self.b != CONSTANT)


class Table(Protocol):
    """The answers of a cost for one graph, at given numbers of alive entries of each vector, int64, `(vectors,)`."""

    def costs(self, counts: np.ndarray) -> np.ndarray:
        """What each call and, behind them, each layer costs if it is present, float64, `(len(calls) + len(layers),)`."""

    def prices(self, counts: np.ndarray) -> np.ndarray:
        """What one more entry of each vector would cost, float64, `(vectors,)`."""


@dataclass(frozen=True)
class Formula:
    """The Table of monomials."""

    monomials: Monomials
    owners: int
    vectors: int

    def costs(self, counts: np.ndarray) -> np.ndarray:
        return self.monomials.branch_sums(counts, self.owners).max(axis=1)

    def prices(self, counts: np.ndarray) -> np.ndarray:
        by_vector = np.zeros(self.vectors + 1)  # the last one is CONSTANT's
        sides = (self.monomials.a, self.monomials.b)
        for side, price in zip(sides, self.monomials.prices(counts, self.owners), strict=True):
            np.add.at(by_vector, np.where(side == CONSTANT, self.vectors, side), price)
        return by_vector[:-1]


class Cost(Configured, ABC):
    """A cost is a name, a unit, and a Table of what it answers for a graph.

    Calling it gives the cost of a model: `FLOPs()(model)`, or of a structure of it: `FLOPs()(model, structure)`.

    Example:
        >>> class Multiplications(km.FLOPs):
        ...     unit = "multiplications"
        ...     def monomials(self, graph):
        ...         table = super().monomials(graph)
        ...         return dataclasses.replace(table, coefficient=table.coefficient / 2)
        >>> seed = km.zoo.digits_resnet()
        >>> Multiplications()(seed) == km.FLOPs()(seed) / 2
        True
    """

    unit: str
    block = 8  # channels that are computed at once, as far as anybody knows: what widths are rounded to
    margin = 0.0  # share of a budget that is left, since what is foretold may be wrong

    @property
    def name(self) -> str:
        return type(self).__name__

    def monomials(self, graph: ChannelGraph) -> Monomials | None:
        """The formula of one graph; None where the cost is none, and has a `table` of its own."""
        return None

    def table(self, graph: ChannelGraph) -> Table:
        """What it answers for one graph."""
        monomials = self.monomials(graph)
        if monomials is None:
            raise NotImplementedError(f"{type(self).__name__} needs a method `monomials` or `table`.")
        return Formula(monomials, len(graph.calls) + len(graph.layers), len(graph.vectors))

    def __call__(self, model: Any, structure: Any = None) -> float:
        """Cost in `unit` of a model, or of a structure of it.

        Args:
            model: a functional or Sequential model, its ChannelGraph, or a StructureLearner.
            structure: a Structure, counts per layer, or a path to either; None for all channels.
        """
        if structure is None:
            graph = graph_of(model)
            closed = whole(graph)
        else:
            graph, structure = graph_and_structure(model, structure)
            closed = close(graph, structure.copies(graph))
        self._name_uncounted(graph)
        return self.total(graph, closed)

    def uncounted(self, graph: ChannelGraph) -> tuple[str, ...]:
        """Layers that this cost leaves out, since nobody can tell what they cost, such as `mix (Lambda)`."""
        return ()

    def _name_uncounted(self, graph: ChannelGraph) -> None:
        """Warn of them, once for each model."""
        names = self.uncounted(graph)
        known = _WARNED.setdefault(graph.model, set())
        if names and self.name not in known:
            known.add(self.name)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            left_out = ", ".join(names[:8]) + more
            warnings.warn(
                f"{self.name} of {graph.model.name} leaves out {left_out}: what they compute cannot be counted.",
                UncountedLayerWarning,
                stacklevel=3,
            )

    def clock(self, graph: ChannelGraph) -> AbstractContextManager[Clock | None]:
        """Inside, a function that measures what a structure and the whole network cost, in `unit`; None where nothing does."""
        return nullcontext()

    def total(self, graph: ChannelGraph, closed: Closed) -> float:
        """Cost of a closed structure."""
        return float(self.per_owner(graph, closed).sum())

    def per_owner(self, graph: ChannelGraph, closed: Closed) -> np.ndarray:
        """Cost of each call and, behind them, each layer, float64, `(len(calls) + len(layers),)`."""
        return self.table(graph).costs(closed.counts) * closed.present

    def per_layer(self, graph: ChannelGraph, closed: Closed) -> np.ndarray:
        """Cost of each layer, float64, `(len(layers),)`."""
        owners = np.array([call.layer for call in graph.calls] + list(range(len(graph.layers))))
        return np.bincount(owners, weights=self.per_owner(graph, closed), minlength=len(graph.layers))

    def __repr__(self) -> str:
        return f"{self.name}()"


def working(graph: ChannelGraph) -> list[tuple[int, Call, Layer]]:
    """Calls of layers that multiply: convolutions, Dense, recurrent layers and attention."""
    numbered = ((number, call, graph.layers[call.layer]) for number, call in enumerate(graph.calls))
    return [(n, call, layer) for n, call, layer in numbered if any(weight.multiplies for weight in layer.weights)]


def sides_of(vectors: list[int]) -> tuple[int, int]:
    """Two vectors, CONSTANT where there are fewer."""
    return tuple([*vectors, CONSTANT, CONSTANT][:2])  # type: ignore[return-value]


def times_multiplied(graph: ChannelGraph, call: Call, layer: Layer, weight: Weight, cost: str) -> int:
    """How often a call multiplies by each element of a weight, for one example.

    Raises:
        UnsupportedModelError: if that depends on a size that is unknown.
    """
    where = weight.multiplies or "outputs"
    positions = positions_of(graph, call, layer, where, cost)
    reads = {(each.shape[each.reads], each.vectors[each.reads]) for each in layer.weights if each.reads is not None}
    sizes = {size for size, _ in reads}
    if where == "outputs" or len(sizes) != 1 or any(vector >= 0 for _, vector in reads):
        return positions
    # What is read lies along another axis than the channels that are followed, such as the steps of a series of numbers.
    tensor = graph.tensors[at_side(where, call.operands, call.outputs)]
    return positions * (tensor.shape[tensor.axis] or 1) // sizes.pop()


def positions_of(graph: ChannelGraph, call: Call, layer: Layer, where: str, cost: str) -> int:
    """Positions at a side of a call, such as H x W: "outputs", "inputs" (the last operand) or "first" (the first one).

    Raises:
        UnsupportedModelError: if their size is unknown.
    """
    tensor = graph.tensors[at_side(where, call.operands, call.outputs)]
    if tensor.positions is None:
        side = "outputs" if where == "outputs" else "inputs"
        raise UnsupportedModelError(
            f"{cost} of {layer.name} depends on the size of its {side}, which is unknown. Expected a model with a "
            f"static input size. Received: shape {tensor.shape}; build it with input_shape=(height, width, channels)."
        )
    return tensor.positions


def multiply_adds(graph: ChannelGraph, cost: str) -> list[tuple[float, int, int, int]]:
    """Rows of (multiply-adds per pair of channels, a, b, call)."""
    followed: list[tuple[float, int, int, int]] = [
        (
            times_multiplied(graph, call, layer, weight, cost) * weight.static_size,
            *sides_of(weight.sides),
            number,
        )
        for number, call, layer in working(graph)
        for weight in layer.weights
        if weight.multiplies
    ]
    return followed + [(macs, CONSTANT, CONSTANT, number) for macs, number in counting.fixed_multiply_adds(graph)]


@keras.saving.register_keras_serializable("keras_morph")
class FLOPs(Cost):
    """Floating point operations of one forward pass for one example.

    2 per multiply-add of convolutions, transposed, depthwise and separable ones included, of Dense and recurrent layers
    (at every step), and of attention's projections, at the model's input shape; lookups, biases, normalization,
    activations, pooling and products of two tensors count 0. What a layer computes whose channels are not followed (inside
    a wrapper, quantized, with LoRA) is a fixed cost; where it cannot be counted, `uncounted` names it.

    Example:
        >>> seed = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
        >>> km.FLOPs()(seed)  # 6 x 6 positions, 3 x 3 x 1 inputs, 4 channels, 2 per multiply-add
        2592.0
    """

    unit = "FLOPs"

    def monomials(self, graph: ChannelGraph) -> Monomials:
        return Monomials.table([(2 * macs, a, b, 0, call) for macs, a, b, call in multiply_adds(graph, self.name)])

    def uncounted(self, graph: ChannelGraph) -> tuple[str, ...]:
        return counting.uncounted(graph)


@keras.saving.register_keras_serializable("keras_morph")
class ModelSize(Cost):
    """Parameters of the model, all of them: kernels, biases, normalization with its statistics (`count_params()`).

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> km.ModelSize()(seed) == seed.count_params()
        True
    """

    unit = "parameters"

    def monomials(self, graph: ChannelGraph) -> Monomials:
        rows: list[tuple[float, int, int, int, int]] = []
        counted: set[int] = set()  # a weight that several layers hold counts once
        for number, layer in enumerate(graph.layers):
            owner = len(graph.calls) + number
            own = {id(value): value for value in getattr(layer.operation, "weights", ()) if id(value) not in counted}
            for weight in layer.weights:
                if own.pop(id(variable(layer.operation, weight.name)), None) is not None:
                    rows.append((weight.static_size, *sides_of(weight.sides), 0, owner))
            rest = sum(math.prod(value.shape) for value in own.values())
            rows += [(rest, CONSTANT, CONSTANT, 0, owner)] if rest else []
            counted.update(map(id, getattr(layer.operation, "weights", ())))
        return Monomials.table(rows)


@keras.saving.register_keras_serializable("keras_morph")
class Activations(Cost):
    """Elements of the outputs of convolutions and Dense layers for one example (H x W x channels).

    Of layers whose channels are not followed a fixed number; where nobody knows whether they multiply, `uncounted` names them.

    Example:
        >>> seed = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
        >>> km.Activations()(seed)  # 6 x 6 positions of 4 channels
        144.0
    """

    unit = "elements"

    def monomials(self, graph: ChannelGraph) -> Monomials:
        rows: list[tuple[float, int, int, int, int]] = [
            (
                positions_of(graph, call, layer, "outputs", self.name),
                *sides_of([graph.tensors[call.outputs[0]].vector]),
                0,
                n,
            )
            for n, call, layer in working(graph)
        ]
        for _, n in counting.fixed_multiply_adds(graph):
            call = graph.calls[n]
            tensor = graph.tensors[call.outputs[0]]
            positions = positions_of(graph, call, graph.layers[call.layer], "outputs", self.name)
            rows.append((positions * (tensor.shape[tensor.axis] or 1), CONSTANT, CONSTANT, 0, n))
        return Monomials.table(rows)

    def uncounted(self, graph: ChannelGraph) -> tuple[str, ...]:
        return counting.uncounted(graph)


@keras.saving.register_keras_serializable("keras_morph")
class Latency(Cost):
    """Roofline seconds of one forward pass: per layer `max(flops / peak, bytes / bandwidth)`.

    Convolutions and Dense layers count; normalization, activations, merges and pooling, which inference engines fuse
    into their producer, do not. Bytes are weights, inputs and outputs at the hardware's precision.

    Args:
        hardware: a name of `keras_morph.costs.hardware.HARDWARE` or a Hardware.
        batch_size: examples that pass at once; the result is for the whole batch.

    Example:
        >>> seconds = km.Latency("V100")(km.zoo.digits_resnet())
        >>> f"{1e6 * seconds:.2f} microseconds"
        '0.20 microseconds'
    """

    unit = "seconds"

    def __init__(self, hardware: str | Hardware = "V100", *, batch_size: int = 1) -> None:
        self.hardware = hardware_named(hardware)
        self.batch_size = batch_size

    def monomials(self, graph: ChannelGraph) -> Monomials:
        seconds_per_flop = 2 * self.batch_size / self.hardware.peak_flops
        seconds_per_element = self.hardware.bytes_per_element / self.hardware.bandwidth
        rows = [(macs * seconds_per_flop, a, b, 0, call) for macs, a, b, call in multiply_adds(graph, self.name)]
        for number, call, layer in working(graph):
            rows += [(w.static_size * seconds_per_element, *sides_of(w.sides), 1, number) for w in layer.weights]
            for where, tensors in (("first", call.operands), ("outputs", call.outputs)):
                positions = positions_of(graph, call, layer, where, self.name) * self.batch_size
                vector = graph.tensors[tensors[0]].vector
                rows.append((positions * seconds_per_element, vector, CONSTANT, 1, number))
        for _, number in counting.fixed_multiply_adds(
            graph
        ):  # their weights; what goes in and out is left to computing
            layer = graph.layers[graph.calls[number].layer]
            rows.append((layer.operation.count_params() * seconds_per_element, CONSTANT, CONSTANT, 1, number))
        return Monomials.table(rows)

    def uncounted(self, graph: ChannelGraph) -> tuple[str, ...]:
        return counting.uncounted(graph)

    def get_config(self) -> dict[str, Any]:
        return {"hardware": asdict(self.hardware), "batch_size": self.batch_size}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Latency":
        return cls(Hardware(**config["hardware"]), batch_size=config["batch_size"])

    def __repr__(self) -> str:
        batch = f", batch_size={self.batch_size}" if self.batch_size != 1 else ""
        return f"Latency({self.hardware.name!r}{batch})"
