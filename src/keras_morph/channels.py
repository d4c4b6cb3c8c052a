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

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from keras_morph.showing import html_table, shortened

__all__ = [
    "Call",
    "ChannelGraph",
    "GraphBuilder",
    "Layer",
    "Partition",
    "Scope",
    "Tensor",
    "Weight",
    "Wiring",
    "on_axis",
]

LARGEST_CACHE = 64  # partitions that a graph remembers: a search closes many structures that lack the same calls


@dataclass(frozen=True)
class Wiring:
    """What a graph was told besides the model: given to `trace`, and kept by graphs and structures.

    Attributes:
        protect: regular expressions; layers whose whole name matches one keep all their channels.
        tie: layers that keep the same channels, index by index, for each tuple of names.
        grouped: how grouped convolutions are narrowed: "whole" conv groups, or "equal" counts in every conv group.
    """

    protect: tuple[str, ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    grouped: str = "whole"

    def __str__(self) -> str:
        return f"protect={list(self.protect)}, tie={[list(names) for names in self.tie]}, grouped={self.grouped!r}"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the traced model: which vector of ids lies along which of its axes.

    Attributes:
        vector: number of its id vector in `ChannelGraph.vectors`.
        axis: the channel axis, counted from 0 with the batch axis included.
        shape: static shape, batch included; unknown sizes are None.
        rows: rows of the batch axis per example of the model's batch: 16 where a reshape moves 16 windows of an image
            into the batch, the number of steps inside a TimeDistributed model.
        masked: whether it may carry a Keras mask when the model runs.
        zeroed: whether a dead channel is exactly zero here in the masked seed, and not another constant.
        steady: whether a dead channel has one value here in the masked seed, at every position and for every example.
    """

    vector: int
    axis: int
    shape: tuple[int | None, ...]
    rows: float = 1.0
    masked: bool = False
    zeroed: bool = False
    steady: bool = False

    @property
    def positions(self) -> int | None:
        """Elements per channel for one example (H x W of an image); None when a size is unknown."""
        sizes = [size for axis, size in enumerate(self.shape) if axis not in (0, self.axis)]
        if None in sizes or math.isnan(self.rows):
            return None
        return round(self.rows * math.prod(size for size in sizes if size is not None))


@dataclass(frozen=True)
class Weight:
    """A weight of a layer: which vector lies along each axis.

    Attributes:
        name: attribute of the layer that holds it, such as `kernel`.
        shape: its shape in the seed.
        vectors: per axis the number of its id vector, or -1 where the axis holds no channels.
        multiplies: "outputs", "inputs" or "first" if each of its elements is multiplied once per position of the result, of
            the last operand, or of the first one.
        scores: the axis whose channels this weight makes (the axis of GroupLasso), or None.
        reads: the axis that lies along the layer's operand, or None.
        whole: whether it is rebuilt at full size, though what it has for dead channels is cut off in the masked seed.
    """

    name: str
    shape: tuple[int, ...]
    vectors: tuple[int, ...]
    multiplies: str | None = None
    scores: int | None = None
    reads: int | None = None
    whole: bool = False

    @property
    def static_size(self) -> int:
        """Product of the extents of the axes that stay as they are."""
        fixed = [n for n, v in zip(self.shape, self.vectors, strict=True) if v < 0 or self.whole]
        return int(np.prod(fixed, dtype=np.int64))

    @property
    def sides(self) -> list[int]:
        """Vector numbers of the axes that are narrowed with their channels (at most two)."""
        return [] if self.whole else [v for v in self.vectors if v >= 0]


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
        """Whether zeros in its weights cut channels off: those that make or read them, and those that stay whole.

        BatchNormalization's do not.
        """
        return self.made is not None or any(weight.multiplies or weight.whole for weight in self.weights)


@dataclass(frozen=True)
class Call:
    """One call of one layer.

    Attributes:
        layer: number of the layer in `ChannelGraph.layers`.
        mode: how the call treats constant and missing operands, one of the modes of `graph/closure.py`.
        inputs, outputs: numbers of its tensors in `ChannelGraph.tensors`. Behind the operands there may be one of the
            channels inside the layer (the heads of attention), which must not be empty either.
        arguments: the arguments as Keras recorded them, for the replay.
        gathers: for each output the positions of its channels in the first input's vector, where the call picks
            channels; else empty.
        sources: Keras's own tensors that the operands stand for, in the same order.
        masks: numbers of the tensors that the call is given as masks; they say which steps count, and have no channels.
        mask_sources: Keras's own tensors that these stand for.
        moves: as `gathers`, where the call moves axes without picking channels (a reshape); else empty.
        compute: where the call is none of the model's own, or stands for several: what it computes from the operands; else None.
        takes, padded: as in `Routed`.
    """

    layer: int
    mode: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Any = None
    sources: tuple[Any, ...] = ()
    gathers: tuple[np.ndarray, ...] = ()
    masks: tuple[int, ...] = ()
    mask_sources: tuple[Any, ...] = ()
    moves: tuple[np.ndarray, ...] = ()
    compute: Callable[..., Any] | None = None
    takes: tuple[int, ...] = ()
    padded: bool = False

    @property
    def numbers(self) -> dict[Any, int]:
        """Keras's own tensors among the arguments, masks included, and the tensors that they stand for."""
        sources = zip(self.sources, self.operands, strict=True), zip(self.mask_sources, self.masks, strict=True)
        return dict(itertools.chain(*sources))

    @property
    def operands(self) -> tuple[int, ...]:
        """Numbers of the tensors that the call is given, masks aside."""
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
        stepped: whether a TimeDistributed calls the model at every step; its first and last call move the axis of time.
    """

    name: str
    model: Any
    function: Any
    arguments: Any
    start: int
    stop: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stepped: bool = False


@dataclass(frozen=True)
class Partition:
    """Channels that live or die together, as far as some calls tie them: the groups, or finer parts of them.

    Attributes:
        labels: part of each channel, `(num_channels,)`.
        pairs: which parts lie in which vector, how often: `(vector, part, count)`, sorted by vector, then part.
        pinned: whether each part has a pinned channel, bool, `(parts,)`.
        first: the first channel of each part, `(parts,)`.
        vectors: number of vectors.
    """

    labels: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray]
    pinned: np.ndarray
    first: np.ndarray
    vectors: int

    def counts(self, alive: np.ndarray) -> np.ndarray:
        """Entries of each vector whose part is alive, int64, `(vectors,)`; alive may say how often a part is there."""
        vector, part, count = self.pairs
        return np.bincount(vector, weights=count * alive[part], minlength=self.vectors).astype(np.int64)

    def any(self, channels: np.ndarray) -> np.ndarray:
        """Whether any channel of each part is among these, bool, `(parts,)`."""
        return np.bincount(self.labels, weights=channels, minlength=len(self.first)) > 0


def _partition(labels: np.ndarray, vectors: tuple[np.ndarray, ...], pinned: np.ndarray) -> Partition:
    parts = int(labels.max(initial=-1)) + 1
    lengths = [len(v) for v in vectors]
    vector = np.repeat(np.arange(len(vectors)), lengths)
    part = labels[np.concatenate(vectors)] if vectors else np.zeros(0, np.int64)
    keys, counts = np.unique(vector * max(parts, 1) + part, return_counts=True)
    first = np.full(parts, len(labels))
    np.minimum.at(first, labels, np.arange(len(labels)))
    pairs = keys // max(parts, 1), keys % max(parts, 1), counts
    return Partition(labels, pairs, np.bincount(labels, weights=pinned, minlength=parts) > 0, first, len(vectors))


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
        ties: `(call, one channel, another)` for each pair of channels that a call ties, int64, `(n, 3)`; call -1 stands
            for what holds whichever calls there are.
        pinned_channels: the channels that were pinned themselves, bool, `(num_channels,)`.
        wiring: what was protected and tied by the user, and how grouped convolutions are narrowed.

    Example:
        >>> km.trace(model)
        <ChannelGraph of small: 22 channels of 8 layers in 22 groups, 6 of them pinned>
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
    scopes: tuple[Scope, ...]
    ties: np.ndarray
    pinned_channels: np.ndarray
    wiring: Wiring = Wiring()

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
        return self.partition.pairs

    @cached_property
    def partition(self) -> Partition:
        """The groups as a partition of the channels."""
        return _partition(self.group_of, self.vectors, self.pinned_channels)

    @cached_property
    def tying_calls(self) -> np.ndarray:
        """Calls that tie channels, ascending."""
        calls = np.unique(self.ties[:, 0])
        return calls[calls >= 0]

    @cached_property
    def _finer(self) -> dict[bytes, Partition]:
        return {}

    def without(self, absent: np.ndarray) -> Partition:
        """What is left of the groups where some calls are absent, which tie nothing then.

        Args:
            absent: bool, one per call.
        """
        gone = absent[self.tying_calls]
        if not gone.any():
            return self.partition
        key = gone.tobytes()
        if key not in self._finer:
            if len(self._finer) >= LARGEST_CACHE:
                self._finer.clear()
            calls, left, right = self.ties.T
            holds = (calls < 0) | ~absent[np.maximum(calls, 0)]
            roots = _connected(self.num_channels, [(left[holds], right[holds])])
            _, labels = np.unique(roots, return_inverse=True)
            self._finer[key] = _partition(labels, self.vectors, self.pinned_channels)
        return self._finer[key]

    @cached_property
    def layer_calls(self) -> list[list[int]]:
        """Call numbers of each layer."""
        calls: list[list[int]] = [[] for _ in self.layers]
        for number, call in enumerate(self.calls):
            calls[call.layer].append(number)
        return calls

    @cached_property
    def holders(self) -> list[int]:
        """For each layer the first one that holds some of its weights: itself, unless several hold them."""
        first: dict[int, int] = {}
        holders = []
        for number, layer in enumerate(self.layers):
            weights = getattr(layer.operation, "weights", ())
            holders.append(min((first.setdefault(id(weight), number) for weight in weights), default=number))
        return holders

    @cached_property
    def widths(self) -> dict[str, int]:
        """Number of channels of each layer that makes channels and has a rule, in order."""
        return {layer.name: len(layer.made) for layer in self.layers if layer.made is not None and layer.rule}

    def channels_of(self, place: "Tensor | int") -> np.ndarray:
        """Channel id of each entry of a tensor's channel axis, or of the vector of a number."""
        return self.vectors[place.vector if isinstance(place, Tensor) else place]

    def groups_of(self, place: "Tensor | int") -> np.ndarray:
        """Group number of each entry of a tensor's channel axis, or of the vector of a number."""
        return self.group_of[self.channels_of(place)]

    def along(self, weight: Weight, values: np.ndarray) -> dict[int, np.ndarray]:
        """Each axis of a weight that holds channels, and along it what `values` says of them, `(num_channels,)`."""
        return {axis: values[self.vectors[vector]] for axis, vector in enumerate(weight.vectors) if vector >= 0}

    def dead_entries(self, copies: np.ndarray) -> Iterator[tuple[Layer, Weight, np.ndarray]]:
        """What is zero in the masked seed: all that makes or reads a dead channel.

        Args:
            copies: how often each channel is there, `Closed.channels`.

        Returns:
            Every weight whose zeros cut channels off, with its layer, and whether each entry is zero, bool, of its shape.
        """
        for layer in self.layers:
            for weight in layer.weights if layer.cuts else ():
                dead = np.zeros(weight.shape, bool)
                for axis, along in self.along(weight, copies).items():
                    dead |= on_axis(along == 0, axis, dead.ndim)
                yield layer, weight, dead

    def counts(self, alive: np.ndarray) -> np.ndarray:
        """Entries of each vector whose group is alive.

        Args:
            alive: bool, `(num_groups,)`, or how often each group is there.

        Returns:
            int64, `(len(vectors),)`.
        """
        return self.partition.counts(alive)

    def pinned_with(self, extra: dict[int, str]) -> "ChannelGraph":
        """The same graph with more pinned groups (a regularizer's, say); reasons that were there stay."""
        channels = self.pinned_channels | np.isin(self.group_of, list(extra))
        return replace(self, pinned={**extra, **self.pinned}, pinned_channels=channels)

    def __repr__(self) -> str:
        return (
            f"<ChannelGraph of {self.model.name}: {self.num_channels:,} channels of {len(self.layers)} layers in "
            f"{self.num_groups:,} groups, {len(self.pinned):,} of them pinned>"
        )

    def table(self) -> list[tuple[str, str, int, int, str]]:
        """(layer, class, channels, groups, why some of them are pinned) of each layer that makes channels."""
        rows = []
        for layer in self.layers:
            if layer.made is not None:
                groups = np.unique(self.group_of[layer.made])
                reasons = {self.pinned[g] for g in groups.tolist() if g in self.pinned}
                rows.append((layer.name, layer.kind, len(layer.made), len(groups), "; ".join(sorted(reasons))))
        return rows

    def __str__(self) -> str:
        lines = [
            f"  {name:<40} {kind:<18} {channels:>6} channels in {groups:>6} groups"
            + (f"  pinned: {reasons}" if reasons else "")
            for name, kind, channels, groups, reasons in self.table()
        ]
        return "\n".join([repr(self)[1:-1].removeprefix("ChannelGraph of "), *shortened(lines, "layers")])

    def _repr_html_(self) -> str:
        head = ("layer", "kind", "channels", "groups", "pinned")
        return html_table(repr(self)[1:-1], head, self.table())


class GraphBuilder:
    """Collects ids, ties and pins while a model is traced; `build` turns them into groups."""

    def __init__(self) -> None:
        self.num_channels = 0
        self.made: dict[str, np.ndarray] = {}
        self.parts: dict[tuple[str, str], np.ndarray] = {}
        self.vectors: list[np.ndarray] = []
        self.call = -1  # the call whose ties are collected; -1 for ties that hold whichever calls there are
        self._vector_numbers: dict[int, int] = {}
        self._ties: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._pins: list[tuple[np.ndarray, str]] = []

    def make(self, layer: str, width: int, part: str = "") -> np.ndarray:
        """The ids of a layer's channels: new ones, or at a later call of a shared layer those of its first.

        Args:
            layer: the layer's name.
            width: how many.
            part: tells ids of one layer apart; those of the part "" are the layer's channels in a structure.
        """
        if (layer, part) not in self.parts:
            self.parts[layer, part] = np.arange(self.num_channels, self.num_channels + width)
            self.num_channels += width
            if not part:
                self.made[layer] = self.parts[layer, part]
        return self.parts[layer, part]

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """Let two vectors of equal length live and die together, index by index."""
        if left is not right:
            self._ties.append((self.call, left, right))

    def are_tied(self, call: int, left: np.ndarray, right: np.ndarray) -> bool:
        """Whether the latest call tied two vectors to each other."""
        latest = itertools.takewhile(lambda tie: tie[0] == call, reversed(self._ties))
        return any((a is left and b is right) or (a is right and b is left) for _, a, b in latest)

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """Forbid the removal of channels."""
        self._pins.append((ids, reason))

    def is_pinned(self, ids: np.ndarray) -> bool:
        """Whether some of the channels were pinned themselves so far."""
        return any(np.isin(ids, pinned).any() for pinned, _ in self._pins)

    def vector(self, ids: np.ndarray) -> int:
        """Number of an id vector; the same array object always has the same number."""
        number = self._vector_numbers.get(id(ids))
        if number is None:
            number = self._vector_numbers[id(ids)] = len(self.vectors)
            self.vectors.append(ids)
        return number

    def ties(self) -> np.ndarray:
        """All ties, `(call, one channel, another)`, int64, `(n, 3)`."""
        rows = [np.stack([np.full(len(a), call), a, b], axis=1) for call, a, b in self._ties]
        return np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)

    def groups(self) -> tuple[np.ndarray, dict[int, str]]:
        """Group number of each id, and the pinned groups with their first reasons."""
        roots = _connected(self.num_channels, [(left, right) for _, left, right in self._ties])
        _, group_of = np.unique(roots, return_inverse=True)
        pinned: dict[int, str] = {}
        for ids, reason in self._pins:
            for group in np.unique(group_of[ids]).tolist():
                pinned.setdefault(group, reason)
        return group_of, pinned

    def pinned_channels(self) -> np.ndarray:
        """The ids that were pinned themselves, bool, `(num_channels,)`."""
        pinned = np.zeros(self.num_channels, bool)
        for ids, _ in self._pins:
            pinned[ids] = True
        return pinned


def on_axis(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """One value per channel, shaped so that it broadcasts to a tensor of a rank whose channels lie along an axis."""
    return values.reshape([-1 if number == axis else 1 for number in range(rank)])


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
