"""Who makes, ties and consumes each channel of a network. Pure Python and NumPy.

A tensor's channel axis is a vector of channel ids; a layer maps vectors to vectors. A channel id stands for one output
feature of one layer, `(layer, index)`; the same id may stand at many places of a vector (Flatten tiles, a depthwise
layer repeats), and in the vectors of many tensors (BatchNormalization hands its input's ids on).

    Conv2D(3)   -> [7 8 9]          makes ids
    ReLU        -> [7 8 9]          hands them on
    Add         -> [7 8 9] ~ [4 5 6]  ties them: 7~4, 8~5, 9~6
    Concatenate -> [7 8 9 10 11]    joins vectors
    Flatten     -> [7 8 9 7 8 9]    tiles

Channels that are tied form a group, which lives or dies as one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["Call", "ChannelGraph", "GraphBuilder", "Layer", "Scope", "Tensor", "Weight"]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the traced model: which vector of ids lies along which of its axes.

    Attributes:
        vector: number of its id vector in `ChannelGraph.vectors`.
        axis: the channel axis, counted from 0 with the batch axis included.
        shape: static shape, batch included; unknown sizes are None.
    """

    vector: int
    axis: int
    shape: tuple[int | None, ...]

    @property
    def positions(self) -> int | None:
        """Elements per channel for one example (H x W of an image); None when a size is unknown."""
        sizes = [size for axis, size in enumerate(self.shape) if axis not in (0, self.axis)]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Weight:
    """A weight of a layer: which vector lies along each axis.

    Attributes:
        name: attribute of the layer that holds it, such as `kernel`.
        shape: its shape in the seed.
        vectors: per axis the number of its id vector, or -1 where the axis holds no channels.
        multiplies: "outputs" or "inputs" if each of its elements is multiplied once per position of the result, or of
            the last operand.
        scores: the axis whose channels this weight makes (the axis of GroupLasso), or None.
        reads: the axis that lies along the layer's operand, or None.
    """

    name: str
    shape: tuple[int, ...]
    vectors: tuple[int, ...]
    multiplies: str | None = None
    scores: int | None = None
    reads: int | None = None

    @property
    def static_size(self) -> int:
        """Product of the extents of the axes that hold no channels."""
        return int(np.prod([n for n, v in zip(self.shape, self.vectors, strict=True) if v < 0], dtype=np.int64))

    @property
    def sides(self) -> list[int]:
        """Vector numbers of the axes that hold channels (at most two)."""
        return [v for v in self.vectors if v >= 0]


@dataclass(frozen=True)
class Layer:
    """A layer or operation of the model: what it is and which weights it has.

    Attributes:
        name: unique in the model; `outer/inner` inside a nested model.
        kind: class name, such as `Conv2D`.
        operation: the Keras layer or operation itself.
        rule: its row of the table, or None for a layer that we do not know.
        weights: those that the row names and the layer has.
        made: ids of the channels that it makes, or None.
    """

    name: str
    kind: str
    operation: Any
    rule: Any
    weights: tuple[Weight, ...]
    made: np.ndarray | None

    @property
    def cuts(self) -> bool:
        """Whether its weights make or read channels, so that zeros in them cut channels off; a normalization's do not."""
        return self.made is not None or any(weight.multiplies for weight in self.weights)


@dataclass(frozen=True)
class Call:
    """One call of one layer.

    Attributes:
        layer: number of the layer in `ChannelGraph.layers`.
        mode: how the call treats constant and missing operands, one of the modes of `closure.py`.
        inputs, outputs: numbers of its tensors in `ChannelGraph.tensors`. Behind the operands there may be one of the
            channels inside the layer (the heads of attention), which must not be empty either.
        arguments: the arguments as Keras recorded them, for the replay.
        gathers: for each output the positions of its channels in the first input's vector, where the call picks
            channels; else empty.
        sources: Keras's own tensors that the operands stand for, in the same order.
    """

    layer: int
    mode: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Any = None
    sources: tuple[Any, ...] = ()
    gathers: tuple[np.ndarray, ...] = ()

    @property
    def operands(self) -> tuple[int, ...]:
        """Numbers of the tensors that the call is given."""
        return self.inputs[: len(self.sources)]


@dataclass(frozen=True)
class Scope:
    """One call of a nested model, whose own calls stand in the graph like all others.

    Attributes:
        name: its name; `outer/inner` inside another one.
        model: the nested Keras model, or a layer that is made of layers.
        function: its functional graph.
        arguments: those of the call, as Keras recorded them.
        start, stop: its calls are `ChannelGraph.calls[start:stop]`.
        inputs, outputs: numbers of the tensors that go in and come out.
    """

    name: str
    model: Any
    function: Any
    arguments: Any
    start: int
    stop: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """The channels of a model, their groups, and every call that touches them.

    Attributes:
        model: the traced Keras model.
        layers: all layers in the order in which they run.
        calls: all calls in that order.
        tensors: all tensors.
        vectors: id vectors; `vectors[tensor.vector]` are the ids along a tensor's channel axis.
        inputs, outputs: tensor numbers of the model's own inputs and outputs.
        group_of: group number of each channel id, `(num_channels,)`.
        pinned: group number -> why the group may not be removed.
        owner: layer number that makes each channel id; `(num_channels,)`.
        scopes: calls of nested models, inner ones first.
    """

    model: Any
    layers: tuple[Layer, ...]
    calls: tuple[Call, ...]
    tensors: tuple[Tensor, ...]
    vectors: tuple[np.ndarray, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    group_of: np.ndarray
    pinned: dict[int, str]
    owner: np.ndarray
    scopes: tuple[Scope, ...] = ()

    @property
    def num_channels(self) -> int:
        """Number of channel ids: of the inputs, of every layer that makes channels, of every layer we do not know."""
        return len(self.group_of)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.group_of.max()) + 1 if len(self.group_of) else 0

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The channel ids of each group, in group order."""
        order = np.argsort(self.group_of, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.group_of, minlength=self.num_groups))[:-1])

    @cached_property
    def pinned_mask(self) -> np.ndarray:
        """True for each group that may not be removed, `(num_groups,)`."""
        mask = np.zeros(self.num_groups, bool)
        mask[list(self.pinned)] = True
        return mask

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which groups lie in which vector, how often: `(vector, group, count)`, sorted by vector, then group."""
        lengths = [len(v) for v in self.vectors]
        vector = np.repeat(np.arange(len(self.vectors)), lengths)
        group = self.group_of[np.concatenate(self.vectors)] if self.vectors else np.zeros(0, np.int64)
        keys, counts = np.unique(vector * max(self.num_groups, 1) + group, return_counts=True)
        return keys // max(self.num_groups, 1), keys % max(self.num_groups, 1), counts

    @cached_property
    def layer_calls(self) -> list[list[int]]:
        """Call numbers of each layer."""
        calls: list[list[int]] = [[] for _ in self.layers]
        for number, call in enumerate(self.calls):
            calls[call.layer].append(number)
        return calls

    @cached_property
    def widths(self) -> dict[str, int]:
        """Number of channels of each layer that makes channels and has a rule, in order."""
        return {layer.name: len(layer.made) for layer in self.layers if layer.made is not None and layer.rule}

    def counts(self, alive: np.ndarray) -> np.ndarray:
        """Entries of each vector whose group is alive.

        Args:
            alive: bool, `(num_groups,)`, or how often each group is there.

        Returns:
            int64, `(len(vectors),)`.
        """
        vector, group, count = self.pairs
        return np.bincount(vector, weights=count * alive[group], minlength=len(self.vectors)).astype(np.int64)

    def pinned_with(self, extra: dict[int, str]) -> "ChannelGraph":
        """The same graph with more pinned groups (a regularizer's, say); reasons that were there stay."""
        return replace(self, pinned={**extra, **self.pinned})

    def __str__(self) -> str:
        rows = [
            f"{self.model.name}: {self.num_channels:,} channels of {len(self.layers)} layers in {self.num_groups:,} "
            f"groups, {len(self.pinned):,} of them pinned"
        ]
        for layer in self.layers:
            if layer.made is None:
                continue
            groups = np.unique(self.group_of[layer.made])
            reasons = {self.pinned[g] for g in groups.tolist() if g in self.pinned}
            rows.append(
                f"  {layer.name:<40} {layer.kind:<18} {len(layer.made):>6} channels in {len(groups):>6} groups"
                + (f"  pinned: {'; '.join(sorted(reasons))}" if reasons else "")
            )
        return "\n".join(rows)


class GraphBuilder:
    """Collects ids, ties and pins while a model is traced; `build` turns them into groups."""

    def __init__(self) -> None:
        self.num_channels = 0
        self.made: dict[str, np.ndarray] = {}
        self.vectors: list[np.ndarray] = []
        self._vector_numbers: dict[int, int] = {}
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._pins: list[tuple[np.ndarray, str]] = []

    def make(self, layer: str, width: int) -> np.ndarray:
        """The ids of a layer's channels: new ones, or at a later call of a shared layer those of its first."""
        if layer not in self.made:
            self.made[layer] = np.arange(self.num_channels, self.num_channels + width)
            self.num_channels += width
        return self.made[layer]

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """Let two vectors of equal length live and die together, index by index."""
        if left is not right:
            self._ties.append((left, right))

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """Forbid the removal of channels."""
        self._pins.append((ids, reason))

    def vector(self, ids: np.ndarray) -> int:
        """Number of an id vector; the same array object always has the same number."""
        number = self._vector_numbers.get(id(ids))
        if number is None:
            number = self._vector_numbers[id(ids)] = len(self.vectors)
            self.vectors.append(ids)
        return number

    def groups(self) -> tuple[np.ndarray, dict[int, str]]:
        """Group number of each id, and the pinned groups with their first reasons."""
        roots = _connected(self.num_channels, self._ties)
        _, group_of = np.unique(roots, return_inverse=True)
        pinned: dict[int, str] = {}
        for ids, reason in self._pins:
            for group in np.unique(group_of[ids]).tolist():
                pinned.setdefault(group, reason)
        return group_of, pinned


def _connected(size: int, ties: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Smallest id that each id is connected with: hook roots to smaller roots and jump pointers until nothing moves."""
    parent = np.arange(size)
    ties = list(ties)
    if not ties:
        return parent
    left = np.concatenate([a for a, _ in ties])
    right = np.concatenate([b for _, b in ties])
    while True:
        a, b = parent[left], parent[right]
        low, high = np.minimum(a, b), np.maximum(a, b)
        if np.array_equal(low, high):
            return parent
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, jumped := parent[parent]):
            parent = jumped
