"""Calls that are followed as one: channel shuffles, and the masks that Concatenate computes."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_morph.keras_internals import mask_of, nodes_of
from keras_morph.layers.rules import Flow, Routed, Rule, always

__all__ = ["Chain", "chained"]

LARGEST_SHUFFLE = 1 << 22  # elements of a tensor whose shuffle is followed
MOVES = ("Reshape", "Permute", "Transpose", "Swapaxes")


@dataclass(frozen=True)
class Chain:
    """Several calls that are followed as one.

    Attributes:
        sources: what they read.
        rule: how the channels flow through all of them.
        compute: what they compute of what they read.
    """

    sources: tuple[Any, ...]
    rule: Rule
    compute: Callable[..., Any]


Chains = dict[int, Chain | None]  # id of a call -> the chain that it ends, or None where it is inside of one


def chained(function: Any, axis_of: Callable[[Any], int]) -> Iterator[tuple[Any, Chain | None]]:
    """Calls of a functional graph, in the order in which they run, each with the chain that it stands for or None.

    Args:
        function: the graph.
        axis_of: channel axis of a tensor, asked for when all calls before have been handed out.
    """
    nodes, users = nodes_of(function), _users(function)
    chains = _mask_joins(nodes)
    for node in nodes:
        if type(node.operation).__name__ == "Reshape" and id(node) not in chains:
            chains |= _shuffle_from(node, users, axis_of)
        chain = chains.get(id(node))
        if chain is not None or id(node) not in chains:
            yield node, chain


def _users(function: Any) -> dict[Any, list[Any]]:
    """Tensor -> the calls that read it; None among them if it is an output."""
    users: dict[Any, list[Any]] = {output: [None] for output in function.outputs}
    for node in nodes_of(function):
        for source in node.arguments.keras_tensors:
            users.setdefault(source, []).append(node)
    return users


def _shuffle_from(node: Any, users: Mapping[Any, list[Any]], axis_of: Callable[[Any], int]) -> Chains:
    """The channel shuffle that begins at a reshape: its calls, of which the last one stands for all; or nothing.

    The calls are run on the numbers of the elements: if they end in the shape that they began with, and every position
    holds the channels that it held before in one and the same order, then they are a gather of channels.
    """
    (source, *_), chain = node.arguments.keras_tensors, Chains()
    shape = tuple(source.shape[1:])
    if len(node.outputs[0].shape) <= len(source.shape) or None in shape or math.prod(shape) > LARGEST_SHUFFLE:
        return {}
    start = values = np.arange(math.prod(shape), dtype=np.int32).reshape(1, *shape)
    while node is not None and type(node.operation).__name__ in MOVES and _keeps_examples(node, start.size):
        values = keras.ops.convert_to_numpy(node.operation(keras.ops.convert_to_tensor(values)))
        chain[id(node)] = None
        order = _channel_order(start, values, axis_of(source))
        if order is not None:
            return chain | {id(node): _shuffle(source, order, axis_of(source))}
        node = _only(users.get(node.outputs[0], []))
    return {}


def _keeps_examples(node: Any, elements: int) -> bool:
    """Whether a call leaves the batch axis alone, so that an example has as many elements as before."""
    sizes = node.outputs[0].shape[1:]
    return None not in sizes and math.prod(sizes) == elements


def _only(users: list[Any]) -> Any:
    return users[0] if len(users) == 1 else None


def _channel_order(before: np.ndarray, after: np.ndarray, axis: int) -> np.ndarray | None:
    """The channel that lies at each place of an axis after elements were moved, if that is so at every position."""
    if before.shape != after.shape:
        return None
    old, new = (np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]) for x in (before, after))
    order = np.searchsorted(old[0], new[0]) % len(old[0])
    return order if np.array_equal(old[:, order], new) else None


def _shuffle(source: Any, order: np.ndarray, axis: int) -> Chain:
    """A chain of reshapes and transpositions that ends in a permutation of channels."""

    def flow(flow: Flow) -> Routed:
        return Routed([(flow.inputs[0].ids[order], axis)], mode="uniform", gathers=(order,))

    return Chain((source,), Rule(flow, "strict", zero=always), lambda x: keras.ops.take(x, order, axis=axis))


def _mask_joins(nodes: Sequence[Any]) -> Chains:
    """The calls by which Concatenate computes the masks of its results.

    Keras spreads each operand's mask over its channels, joins them, and asks for each step whether any channel counts:
    along the channel axis this is the OR of the masks, whatever the channels are; an operand without mask always counts.
    """
    makers = {output: node for node in nodes for output in node.outputs}
    chains = Chains()
    for node in nodes:
        if isinstance(node.operation, keras.layers.Concatenate) and _joins_last_axis(node):
            chains |= _mask_join(node, makers)
    return chains


def _joins_last_axis(node: Any) -> bool:
    rank = len(node.outputs[0].shape)
    return bool(node.operation.axis % rank == rank - 1)


def _mask_join(node: Any, makers: Mapping[Any, Any]) -> Chains:
    """The calls that compute the mask of one Concatenate, of which the last one stands for all; or nothing."""
    last = makers.get(mask_of(node.outputs[0]))
    if last is None or type(last.operation).__name__ != "Any":
        return {}
    operands = node.arguments.keras_tensors
    masks = [mask_of(x) for x in operands if mask_of(x) is not None]
    inner = _makers_of(last, makers)[:1]
    if not inner or any(len(mask.shape) >= len(operands[0].shape) for mask in masks):
        return {}
    below = _makers_of(inner[0], makers)
    within = [maker for part in below for maker in _makers_of(part, makers)]
    spread = [maker for maker in within if type(maker.operation).__name__ in ("ExpandDims", "ZerosLike")]
    compute = functools.partial(_any_counts, every=len(masks) < len(operands))
    chain = Chain(tuple(masks), Rule(_joined_masks, "strict", zero=always), compute)
    return {**dict.fromkeys(map(id, [*inner, *below, *spread])), id(last): chain}


def _makers_of(node: Any, makers: Mapping[Any, Any]) -> list[Any]:
    """The calls that make what a call reads."""
    return [makers[x] for x in node.arguments.keras_tensors if x in makers]


def _joined_masks(flow: Flow) -> Routed:
    for signal in flow.inputs:
        flow.graph.pin(signal.ids, f"{flow.name} joins masks")
    return Routed([(flow.inputs[0].ids, flow.inputs[0].axis)], mode="strict")


def _any_counts(*masks: Any, every: bool) -> Any:
    """Whether a step counts in any operand of a Concatenate; in an operand without a mask all of them do."""
    return keras.ops.ones_like(masks[0]) if every else functools.reduce(keras.ops.logical_or, masks)
