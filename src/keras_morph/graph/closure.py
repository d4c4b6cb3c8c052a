"""Closing a structure: what really remains of a network when some groups are removed.

Cost, masked seed and rebuild all take the closed structure, so that they agree. A tensor of the remaining network is

    LIVE      it has alive channels, and they depend on the model's input
    CONSTANT  it has alive channels, but what makes them has nothing alive left to read
    EMPTY     it has no alive channels

and closing repeats, until nothing changes:

    1. a group of constant channels only is dead;
    2. a group that no remaining layer reads is dead;
    3. a group that only calls which are gone held together falls apart, and each part is judged by itself;
    4. an operand that would be CONSTANT or EMPTY where that cannot be folded, and a model output, get an input back: of
       the layer that makes them one input channel is kept, that of the highest score, and so on up to a model input.
"""

from dataclasses import dataclass, replace

import numpy as np

from keras_morph.channels import Call, ChannelGraph, Partition, Tensor

__all__ = ["CONSTANT", "EMPTY", "LIVE", "Closed", "close", "whole"]

EMPTY, CONSTANT, LIVE = 0, 1, 2


@dataclass(frozen=True)
class Closed:
    """A closed structure.

    Attributes:
        alive: groups of which anything is left, bool, `(num_groups,)`.
        channels: how often each channel is there: 0 or 1, and more where a structure is expanded; int64,
            `(num_channels,)`.
        states: EMPTY, CONSTANT or LIVE for each tensor, `(len(tensors),)`.
        present: whether each call, and behind them each layer, is in the rebuilt model,
            bool, `(len(calls) + len(layers),)`.
        counts: alive entries of each vector, int64, `(len(vectors),)`.
    """

    alive: np.ndarray
    channels: np.ndarray
    states: np.ndarray
    present: np.ndarray
    counts: np.ndarray


def close(graph: ChannelGraph, alive: np.ndarray, scores: np.ndarray | None = None) -> Closed:
    """Close a structure.

    Args:
        graph: the traced model.
        alive: groups that should stay, bool, `(num_groups,)`; pinned groups stay whatever it says. Whole numbers say
            how often.
        scores: one number per group, `(num_groups,)`: where a path would be lost the input of the highest score is
            kept. Without scores it is the first.

    Returns:
        The closed structure. Closing it again changes nothing.
    """
    wanted = (alive > 0) | graph.pinned_mask
    closer = _Closer(graph, wanted, scores)
    parts, left = graph.partition, wanted
    absent = np.zeros(len(graph.calls), bool)
    while True:
        counts = parts.counts(left)
        states, blocked = closer.states(counts)
        present, involved = closer.present(states)
        absent |= ~involved
        finer = graph.without(absent)
        left, parts = left[parts.labels[finer.first]], finer
        remaining = left & closer.useful(parts, states, present)
        if not np.array_equal(remaining, left):
            left = remaining
        elif blocked:
            for tensor in blocked:
                closer.keep_path(tensor, states)
            parts, left = graph.partition, wanted | graph.partition.any(closer.kept)
            absent[:] = False
        else:
            return _closed(graph, np.maximum(alive, 1)[graph.group_of] * left[parts.labels], states, present)


def whole(graph: ChannelGraph) -> Closed:
    """All of a network as it is, with what nothing reads: closing would leave that out."""
    live = np.full(len(graph.tensors), LIVE)
    return _closed(
        graph, np.ones(graph.num_channels, np.int64), live, np.ones(len(graph.calls) + len(graph.layers), bool)
    )


def _closed(graph: ChannelGraph, channels: np.ndarray, states: np.ndarray, present: np.ndarray) -> Closed:
    lengths = [len(vector) for vector in graph.vectors]
    vector = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.concatenate(graph.vectors) if graph.vectors else np.zeros(0, np.int64)
    counts = np.bincount(vector, weights=channels[ids], minlength=len(lengths)).astype(np.int64)
    return Closed(graph.partition.any(channels > 0), channels.astype(np.int64), states, present, counts)


class _Closer:
    """What closing needs of a graph, and the groups that it has to keep.

    States are the least fixpoint of one transfer function per mode, run forward over the calls: `FORWARD[mode]` gives the state
    of a call's results from those of its operands. A call is run once, since its operands are made before it. Where it
    refuses some of its operands, `BACKWARD[mode]` runs the other way: which operands of a call have to come to life so
    that its results do. What is kept never falls away again, so that closing ends.
    """

    def __init__(self, graph: ChannelGraph, wanted: np.ndarray, scores: np.ndarray | None) -> None:
        self.graph = graph
        self.vectors = [tensor.vector for tensor in graph.tensors]
        # A channel axis of unknown size has no channels, and is never empty.
        self.unknown = np.array([len(graph.vectors[vector]) == 0 for vector in self.vectors])
        self.kept = np.zeros(graph.num_channels, bool)
        self.maker = {output: call for call in graph.calls for output in call.outputs}
        # The order in which groups are kept for a path: those that are wanted first, then by score, then the earliest.
        order = np.lexsort((np.zeros(graph.num_groups) if scores is None else -scores, ~wanted))
        self.rank = np.empty(graph.num_groups, np.int64)
        self.rank[order] = np.arange(graph.num_groups)

    def states(self, counts: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """State of every tensor, and those that may not be what they are."""
        # Before its call is run, a tensor's state says whether it has channels.
        states = np.where((counts[self.vectors] > 0) | self.unknown, LIVE, EMPTY).tolist()
        blocked: list[int] = []
        for call in self.graph.calls:
            filled = [t for t in call.outputs if states[t] != EMPTY]
            if filled:
                made, refused = FORWARD[call.mode](self.graph, call, [states[t] for t in call.inputs])
                for output in filled:
                    states[output] = made
                blocked += [t for t in call.masks if states[t] != LIVE]
                blocked += [t for t in call.inputs if states[t] in refused]
        blocked += [t for t in self.graph.outputs if states[t] == CONSTANT]
        return np.array(states), blocked

    def keep_path(self, tensor: int, states: np.ndarray) -> None:
        """Keep a path of channels from a tensor that may not be CONSTANT or EMPTY up to one that is LIVE."""
        ahead = [(tensor, self.keep_best(tensor) if states[tensor] == EMPTY else None)]
        while ahead:
            tensor, group = ahead.pop()
            if states[tensor] != LIVE and tensor in self.maker:
                call = self.maker[tensor]
                ahead += BACKWARD[call.mode](self, call, states, group)

    def keep_best(self, tensor: int) -> int:
        """Keep the best group of a tensor: what of it lies there."""
        groups = self.groups_in(tensor)
        group = int(groups[np.argmin(self.rank[groups])])
        self.kept[self.graph.channels_of(self.graph.tensors[tensor])[groups == group]] = True
        return group

    def groups_in(self, tensor: int) -> np.ndarray:
        return self.graph.groups_of(self.graph.tensors[tensor])

    def size(self, tensor: int) -> int:
        return int(np.prod([size or 1 for size in self.graph.tensors[tensor].shape[1:]], dtype=np.int64))

    def present(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Calls and layers that the outputs of the remaining network depend on, and calls that say what a constant is.

        Returns:
            Whether each call and, behind them, each layer runs, bool, `(len(calls) + len(layers),)`; and whether each call
            runs or makes a constant that is folded, bool, `(len(calls),)`: these hold their groups together.
        """
        graph, state, used = self.graph, states.tolist(), set(self.graph.outputs)
        present = np.zeros(len(graph.calls) + len(graph.layers), bool)
        involved = np.zeros(len(graph.calls), bool)
        for number in reversed(range(len(graph.calls))):
            call = graph.calls[number]
            made = {LIVE} if call.mode == "input" else {state[t] for t in call.outputs if t in used}
            if LIVE in made:
                present[number] = present[len(graph.calls) + call.layer] = True
                present[len(graph.calls) + graph.holders[call.layer]] = True
            if LIVE in made or CONSTANT in made:
                involved[number] = True
                used.update(t for t in (*call.inputs, *call.masks) if state[t] != EMPTY)
        return present, involved

    def useful(self, parts: Partition, states: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Parts that are pinned or kept, or that a remaining layer reads and not only constants make."""
        graph = self.graph
        read = np.zeros(len(graph.vectors), bool)
        constant = np.zeros(len(graph.layers), bool)
        for number, call in enumerate(graph.calls):
            if call.mode in ("make", "strict") and present[number]:
                read[[graph.tensors[t].vector for t in (*call.inputs, *call.masks)]] = True
            if call.mode == "make" and states[call.outputs[0]] == CONSTANT:
                constant[call.layer] = True
        vector, part, _ = parts.pairs
        is_read = np.bincount(part, weights=read[vector], minlength=len(parts.first)) > 0
        return parts.pinned | parts.any(self.kept) | (is_read & parts.any(~constant[graph.owner]))


# Forward: the state of a call's results, LIVE or CONSTANT, given those of its operands; and which states it refuses.

Transfer = tuple[int, tuple[int, ...]]


def _enters(graph: ChannelGraph, call: Call, operands: list[int]) -> Transfer:
    return LIVE, ()


def _makes(graph: ChannelGraph, call: Call, operands: list[int]) -> Transfer:
    """Weights read nothing where all is dead, and leave a bias; constants that they read cannot be folded."""
    return (LIVE, (CONSTANT,)) if LIVE in operands or CONSTANT in operands else (CONSTANT, ())


def _needs_all(graph: ChannelGraph, call: Call, operands: list[int]) -> Transfer:
    return LIVE, (EMPTY,) if EMPTY in operands else (CONSTANT,)


def _hands_on(graph: ChannelGraph, call: Call, operands: list[int]) -> Transfer:
    """What is constant stays so, unless it is joined with what is not."""
    return (CONSTANT, ()) if CONSTANT in operands and LIVE not in operands else (LIVE, (CONSTANT,))


def _merges(graph: ChannelGraph, call: Call, operands: list[int]) -> Transfer:
    made, refused = _hands_on(graph, call, operands)
    folds = CONSTANT in operands and made == LIVE and _folds(graph, call, operands)
    return made, () if folds else refused


FORWARD = {
    "input": _enters,
    "make": _makes,
    "strict": _needs_all,
    "uniform": _hands_on,
    "join": _hands_on,
    "merge": _merges,
}


def _folds(graph: ChannelGraph, call: Call, operands: list[int]) -> bool:
    """Whether what is alive in a merge has the shape of its result by itself, so that constants can be folded."""
    result = graph.tensors[call.outputs[0]]
    aligned = [_aligned(graph.tensors[t], len(result.shape)) for t in call.inputs]
    left = [tensor for tensor, state in zip(aligned, operands, strict=True) if state != EMPTY]
    live = [tensor for tensor, state in zip(aligned, operands, strict=True) if state == LIVE]
    return _broadcast(live) == _without(result.shape, result.axis) and all(
        tensor.shape[result.axis] == result.shape[result.axis] for tensor in left
    )


# Backward: the operands of a call that a path goes on through, each with the group to follow; None stands for all.

Path = list[tuple[int, int | None]]


def _through_one(closer: _Closer, call: Call, states: np.ndarray, group: int | None) -> Path:
    """The operand that holds the group, or else the first."""
    holding = [t for t in call.inputs if group is not None and group in closer.groups_in(t)]
    return [(t, group) for t in (*holding, *call.inputs)[:1]]


def _through_weights(closer: _Closer, call: Call, states: np.ndarray, group: int | None) -> Path:
    """Another group, that of the highest score: one channel is enough for all that a layer makes."""
    return [(call.inputs[0], closer.keep_best(call.inputs[0]))]


def _through_joined(closer: _Closer, call: Call, states: np.ndarray, group: int | None) -> Path:
    """All that is constant, or the operand that holds the group."""
    if group is not None:
        return _through_one(closer, call, states, group)
    return [(t, None) for t in call.inputs if states[t] == CONSTANT]


def _through_largest(closer: _Closer, call: Call, states: np.ndarray, group: int | None) -> Path:
    return [(max(call.inputs, key=lambda t: (closer.size(t), -t)), group)]


BACKWARD = {
    "input": _through_one,
    "make": _through_weights,
    "strict": _through_one,
    "uniform": _through_one,
    "join": _through_joined,
    "merge": _through_largest,
}


def _aligned(tensor: Tensor, rank: int) -> Tensor:
    """An operand of fewer axes as a merging layer lines it up: those that are missing are put behind the batch axis."""
    missing = rank - len(tensor.shape)
    shape = (tensor.shape[0], *[1] * missing, *tensor.shape[1:])
    return replace(tensor, axis=tensor.axis + missing, shape=shape)


def _without(shape: tuple, axis: int) -> tuple:
    return tuple(size for number, size in enumerate(shape) if number not in (0, axis))


def _broadcast(tensors: list[Tensor]) -> tuple:
    """Shape that tensors of one rank broadcast to, batch and channel axes left out; None means unknown."""
    return tuple(
        max(sizes, key=lambda size: (size is None, size or 0))
        for sizes in zip(*(_without(tensor.shape, tensor.axis) for tensor in tensors), strict=True)
    )
