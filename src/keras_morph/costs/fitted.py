"""A cost whose coefficients were fitted to times: what a runtime takes for each kind of call.

    t = call + work * P(n_in) R(n_out) + ragged * n_in n_out [n_in is no multiple of q] + weights * n_in n_out
        + read * n_in + write * R(n_out)

summed over the calls of a network; P and R round up to whole blocks. All coefficients are at least 0 and shared by the calls
of one kind (class and kernel size). The blocks and multiples q are those that foretell best what was left out of the fit.
Some terms are there in some structures only:

    channel * n             depthwise layers, whose q is their own, where n is no multiple of it: ONNX Runtime computes them
                            in its fast layout only in whole blocks, and else one channel after the other
    reorder * n_in + turn   where what is read is no multiple of the block, and is brought into another layout
    heads                   attention with more heads than one
    Pad, Take               what fills a narrowed stream up, where the rebuilt model works at full width
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph, Layer, Weight
from keras_morph.costs import counting
from keras_morph.costs.costs import CONSTANT, Formula, Monomials, positions_of, times_multiplied, working
from keras_morph.errors import KerasMorphError
from keras_morph.graph.closure import Closed

__all__ = ["Coefficients", "FittedTable", "fit", "telling"]

TERMS = ("call", "heads", "work", "ragged", "channel", "reorder", "turn", "weights", "read", "write")
OUT_OF_BLOCK = TERMS.index("reorder"), TERMS.index("turn")
RAGGED_TERMS = TERMS.index("ragged"), TERMS.index("channel"), *OUT_OF_BLOCK
STEPS = tuple(itertools.product((1, 4, 8, 16), (1, 4, 8, 16, 32), (1, 4, 8)))  # blocks read and written, multiple
DEPTHWISE = (1, 4, 8, 16)  # multiples of depthwise layers
FOLDS = 5
FREE = ("BatchNormalization", "Dropout", "Flatten", "InputLayer", "Reshape", "ZeroPadding2D")  # they move nothing
TYPICAL, PRIOR = (1, 16, 4, 4), 1e-2  # steps of a design before anything was timed, and what is believed without it
ANY = 2**62
ALWAYS = (CONSTANT, 0, ANY)  # vector, least, below
RIDGE = 1e-3  # share of its size by which a coefficient is held back, so that two that look alike share the time


@dataclass(frozen=True)
class Coefficients:
    """What a runtime takes.

    Attributes:
        seconds: kind of call -> term -> seconds per unit of it: a call, a multiply-add, an element.
        reads, block: input and output channels that are computed together; a part of a block takes as long as all of it.
        multiple: input channels of a convolution that are no multiple of this cost what `ragged` says.
        depthwise: the same for the channels of a depthwise convolution.
        error: median relative error for networks that were left out of the fit.
        within: share of these whose error was at most 10 %.
    """

    seconds: Mapping[str, Mapping[str, float]]
    reads: int = 1
    block: int = 1
    multiple: int = 1
    depthwise: int = 1
    error: float = float("nan")
    within: float = float("nan")

    @property
    def steps(self) -> tuple[int, int, int, int]:
        return self.reads, self.block, self.multiple, self.depthwise


@dataclass(frozen=True)
class Rows:
    """All terms of a graph: `(rows,)` each.

    Attributes:
        kind: number of the kind of call, an index into `kinds`.
        term: index into TERMS.
        coefficient, a, b, owner: as in Monomials.
        vector, least, below: a row is 0 unless this vector has so many entries, from `least` to one less than `below`.
        kinds: names of the kinds.
    """

    kind: np.ndarray
    term: np.ndarray
    coefficient: np.ndarray
    a: np.ndarray
    b: np.ndarray
    owner: np.ndarray
    vector: np.ndarray
    least: np.ndarray
    below: np.ndarray
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, graph: ChannelGraph) -> "Rows":
        rows = [(*row, *ALWAYS) for row in (*_of_layers_that_multiply(graph), *_of_others(graph))]
        rows += [*_of_heads(graph), *_of_filling(graph)]
        kinds = tuple(sorted({kind for kind, *_ in rows}))
        numbers = {kind: number for number, kind in enumerate(kinds)}
        table = np.array([(numbers[kind], TERMS.index(term), *rest) for kind, term, *rest in rows], np.float64)
        kind, term, coefficient, *others = table.reshape(-1, 9).T
        kind, term, a, b, owner, vector, least, below = (each.astype(int) for each in (kind, term, *others))
        return cls(kind, term, coefficient, a, b, owner, vector, least, below, kinds)

    @property
    def ragged_depthwise(self) -> np.ndarray:
        """Rows that the multiple of depthwise layers is for, bool, `(rows,)`."""
        return ((self.term == TERMS.index("ragged")) & (self.b == CONSTANT)) | (self.term == TERMS.index("channel"))

    def units(self, counts: np.ndarray, steps: tuple[int, int, int, int]) -> np.ndarray:
        """How much of its unit each row is at some counts, float64, `(rows,)`; steps as in Coefficients."""
        reads, block, multiple, depthwise = steps
        n, read, written = (np.append(-(-counts // step) * step, 1).astype(np.float64) for step in (1, reads, block))
        units = self.coefficient * n[self.a] * n[self.b]
        units = np.where(self.term == TERMS.index("work"), self.coefficient * read[self.a] * written[self.b], units)
        units = np.where(self.term == TERMS.index("write"), self.coefficient * written[self.b], units)
        aligned = np.where(self.ragged_depthwise, depthwise, multiple)
        aligned = np.where(np.isin(self.term, OUT_OF_BLOCK), block, aligned)
        units = np.where(self.term == TERMS.index("turn"), 1.0, units)
        ragged = np.isin(self.term, RAGGED_TERMS)
        return np.where(self.there(counts) & ~(ragged & (n[self.a] % aligned == 0)), units, 0.0)

    def there(self, counts: np.ndarray) -> np.ndarray:
        """Which rows are there at some counts, bool, `(rows,)`."""
        n = np.append(counts, 1)[self.vector]
        return (self.least <= n) & (n < self.below)

    @property
    def columns(self) -> np.ndarray:
        """Which coefficient each row has, `(rows,)`, of `len(kinds) * len(TERMS)`."""
        return self.kind * len(TERMS) + self.term

    def design(self, closed: Sequence[Closed], steps: tuple[int, int, int, int]) -> np.ndarray:
        """Units of each coefficient in some structures, float64, `(structures, coefficients)`."""
        size = len(self.kinds) * len(TERMS)
        sums = [
            np.bincount(self.columns, self.units(one.counts, steps) * one.present[self.owner], minlength=size)
            for one in closed
        ]
        return np.array(sums)

    def seconds(self, coefficients: Coefficients) -> np.ndarray:
        """Seconds per unit of each row, float64, `(rows,)`; 0 for kinds that were not there when it was fitted."""
        by_kind = [coefficients.seconds.get(kind, {}) for kind in self.kinds]
        table = np.array([[found.get(term, 0.0) for term in TERMS] for found in by_kind]).reshape(-1, len(TERMS))
        return table[self.kind, self.term]


def _kind(layer: Layer, weight_size: int) -> str:
    return f"{layer.kind} {weight_size}"


def _sides(weight: Weight) -> tuple[int, int]:
    """The vectors that a weight reads and makes; of a depthwise kernel the only one is made."""
    sides = list(weight.sides)
    if len(sides) < 2:
        return CONSTANT, sides[0] if sides else CONSTANT
    # What is inside a layer, such as between the kernels of a separable one, is read along the first axis.
    read = sides[0] if weight.reads is None else weight.vectors[weight.reads]
    return read, next((side for side in sides if side != read), read)


def _of_layers_that_multiply(graph: ChannelGraph) -> list[tuple[str, str, float, int, int, int]]:
    rows: list[tuple[str, str, float, int, int, int]] = []
    for number, call, layer in working(graph):
        sizes = [weight.static_size for weight in layer.weights if weight.multiplies]
        kind = _kind(layer, max(sizes))
        rows.append((kind, "call", 1.0, CONSTANT, CONSTANT, number))
        for weight in layer.weights:
            if weight.multiplies:
                each, sides = _kind(layer, weight.static_size), _sides(weight)
                macs = times_multiplied(graph, call, layer, weight, "Latency") * weight.static_size
                rows.append((each, "work", macs, *sides, number))
                rows.append((each, "ragged", macs, *(sides[::-1] if sides[0] == CONSTANT else sides), number))
                rows.append((each, "weights", weight.static_size, *sides, number))
                if sides[0] == CONSTANT:
                    rows.append((each, "channel", 1.0, sides[1], CONSTANT, number))
        read, written = (graph.tensors[tensors[0]].vector for tensors in (call.operands, call.outputs))
        positions = [positions_of(graph, call, layer, where, "Latency") for where in ("first", "outputs")]
        rows.append((kind, "read", positions[0], read, CONSTANT, number))
        rows.append((kind, "write", positions[1], CONSTANT, written, number))
        if read != written:
            rows.append((kind, "reorder", positions[0], read, CONSTANT, number))
            rows.append((kind, "turn", 1.0, read, CONSTANT, number))
    for macs, number in counting.fixed_multiply_adds(graph):
        kind = graph.layers[graph.calls[number].layer].kind
        rows += [(kind, "call", 1.0, CONSTANT, CONSTANT, number), (kind, "work", macs, CONSTANT, CONSTANT, number)]
    return rows


def _of_others(graph: ChannelGraph) -> list[tuple[str, str, float, int, int, int]]:
    """Merges, pooling, softmax and the like; runtimes compute normalizations and activations with what stands before."""
    multiply = {number for number, *_ in working(graph)} | {number for _, number in counting.fixed_multiply_adds(graph)}
    rows: list[tuple[str, str, float, int, int, int]] = []
    for number, call in enumerate(graph.calls):
        layer = graph.layers[call.layer]
        if number in multiply or layer.kind in FREE or not call.outputs:
            continue
        tensor = graph.tensors[call.outputs[0]]
        rows.append((layer.kind, "call", 1.0, CONSTANT, CONSTANT, number))
        if tensor.positions is not None:
            rows.append((layer.kind, "write", tensor.positions, CONSTANT, tensor.vector, number))
    return rows


Conditional = tuple[str, str, float, int, int, int, int, int, int]


def _of_heads(graph: ChannelGraph) -> list[Conditional]:
    """What attention costs where it has more heads than one: a single head needs no transposing."""
    rows: list[Conditional] = []
    for number, call, layer in working(graph):
        kernels = [weight for weight in layer.weights if weight.multiplies]
        found = Counter(side for weight in kernels for side in set(weight.sides))
        inside = {side for side, times in found.items() if times > 1} - {graph.tensors[t].vector for t in call.operands}
        kind = _kind(layer, max(weight.static_size for weight in kernels))
        rows += [(kind, "heads", 1.0, CONSTANT, CONSTANT, number, vector, 2, ANY) for vector in sorted(inside)]
    return rows


def _of_filling(graph: ChannelGraph) -> list[Conditional]:
    """What fills narrowed operands up, and takes what is alive out of the results, where a call works at full width."""
    rows: list[Conditional] = []
    for number, call in enumerate(graph.calls):
        sides = [(t, ("Pad", "Take")) for t in call.operands] + [(t, ("Take",)) for t in call.outputs]
        for tensor, kinds in sides if call.padded else ():
            one = graph.tensors[tensor]
            vector, width = one.vector, len(graph.vectors[one.vector])
            for kind in kinds:
                rows.append((kind, "call", 1.0, CONSTANT, CONSTANT, number, vector, 0, width))
                if one.positions is not None:
                    rows.append((kind, "write", one.positions, CONSTANT, vector, number, vector, 0, width))
    return rows


@dataclass(frozen=True)
class FittedTable:
    """The Table of fitted coefficients for one graph. Costs are those of rounded counts, prices their slope."""

    rows: Rows
    coefficients: Coefficients
    owners: int
    vectors: int

    @classmethod
    def of(cls, graph: ChannelGraph, coefficients: Coefficients) -> "FittedTable":
        return cls(Rows.of(graph), coefficients, len(graph.calls) + len(graph.layers), len(graph.vectors))

    def unknown(self, graph: ChannelGraph) -> tuple[str, ...]:
        """Layers of kinds that were not there when it was fitted."""
        numbers = {place for place, kind in enumerate(self.rows.kinds) if kind not in self.coefficients.seconds}
        owners = sorted(
            {int(owner) for kind, owner in zip(self.rows.kind, self.rows.owner, strict=True) if kind in numbers}
        )
        layers = [graph.layers[graph.calls[owner].layer] for owner in owners]
        return tuple(dict.fromkeys(f"{layer.name} ({layer.kind})" for layer in layers))

    def costs(self, counts: np.ndarray) -> np.ndarray:
        units = self.rows.units(counts, self.coefficients.steps)
        return np.bincount(self.rows.owner, units * self.rows.seconds(self.coefficients), minlength=self.owners)

    def prices(self, counts: np.ndarray) -> np.ndarray:
        rows, smooth = self.rows, self.rows.there(counts) & ~np.isin(self.rows.term, RAGGED_TERMS)
        seconds = self.rows.seconds(self.coefficients) * self.rows.coefficient * smooth
        zero = np.zeros(len(rows.kind), np.int64)
        return Formula(Monomials(seconds, rows.a, rows.b, zero, rows.owner), self.owners, self.vectors).prices(counts)


def fit(graph: ChannelGraph, closed: Sequence[Closed], seconds: np.ndarray) -> Coefficients:
    """Coefficients by non-negative least squares on relative errors.

    Args:
        graph: of the seed.
        closed: structures of it that were timed.
        seconds: of each, `(structures,)`.

    References:
        Zhang et al., nn-Meter, MobiSys 2021, for what a kernel's latency depends on.
    """
    rows = Rows.of(graph)
    depthwise = DEPTHWISE if rows.ragged_depthwise.any() else (1,)
    tried = [(*steps, each) for steps in STEPS for each in depthwise]
    trials = {steps: _left_out(rows.design(closed, steps), seconds) for steps in tried}
    steps = min(trials, key=lambda each: float(np.mean(trials[each] ** 2)))
    errors = np.abs(trials[steps])
    values = _non_negative(rows.design(closed, steps), seconds).reshape(len(rows.kinds), len(TERMS))
    found: dict[str, dict[str, Any]] = {
        kind: {term: float(value) for term, value in zip(TERMS, line, strict=True) if value > 0}
        for kind, line in zip(rows.kinds, values, strict=True)
    }
    return Coefficients(found, *steps, float(np.median(errors)), float(np.mean(errors <= 0.1)))


def telling(graph: ChannelGraph, closed: Sequence[Closed], number: int, first: int) -> list[int]:
    """Which structures to time, so that coefficients can be told apart by them.

    Each is the one whose terms those before it say least of (a greedy D-optimal design).

    Args:
        graph: of the seed.
        closed: structures to choose from.
        number: how many, at most.
        first: the one to begin with.

    Returns:
        Indices, in the order in which they were chosen: any number of the first ones serves.

    References:
        Fedorov, Theory of optimal experiments, 1972
    """
    design = Rows.of(graph).design(closed, TYPICAL)
    design = design[:, design.any(axis=0)]
    design = design / design.max(axis=0)
    design = design / design.sum(axis=1, keepdims=True)
    design = design / np.sqrt(np.square(design).mean(axis=0))
    known = PRIOR * np.eye(design.shape[1]) + np.outer(design[first], design[first])
    chosen = [first]
    while len(chosen) < min(number, len(closed)):
        news = np.einsum("ij,ij->i", design @ np.linalg.inv(known), design)
        news[chosen] = -1.0
        chosen.append(int(news.argmax()))
        known += np.outer(design[chosen[-1]], design[chosen[-1]])
    return chosen


def _left_out(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Relative error for each structure of a fit to the others, by fifths."""
    errors = np.zeros(len(seconds))
    for fold in range(FOLDS):
        out = np.arange(len(seconds)) % FOLDS == fold
        foretold = design[out] @ _non_negative(design[~out], seconds[~out])
        errors[out] = foretold / seconds[out] - 1
    return errors


def _non_negative(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    try:
        from scipy.optimize import nnls
    except ModuleNotFoundError as error:
        raise KerasMorphError(
            "MeasuredLatency needs the package scipy to fit times. Received: it is not installed. Run pip install scipy."
        ) from error
    scale = np.maximum(np.abs(design).max(axis=0), 1e-30) / seconds.max()
    relative = design / scale / seconds[:, None]
    held = RIDGE * np.eye(len(scale))
    target = np.concatenate([np.ones(len(seconds)), np.zeros(len(scale))])
    return np.asarray(nnls(np.concatenate([relative, held]), target)[0]) / scale
