"""What we know of each layer type: one row of one table, keyed by the class object.

A row says how channels flow through the layer, how a call treats operands that are constant or gone, which config field
holds the width, and what lies along each axis of each weight. Tokens of an axis string:

    in    ids of the operand's channel axis
    out   ids of the result's channel axis
    mid   ids between the two kernels of a separable layer
    *     the weight has the operand's shape without the batch axis (PReLU)
    any other word: an axis that holds no channels

so that `Conv2D: kernel="kh kw in out", bias="out"` is documentation, parameter count, multiply-adds, lasso axes, masks
and slicing in one. A layer without a row is left as it is, and its channels are pinned.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from keras_morph.channels import GraphBuilder, Tensor
from keras_morph.errors import KerasMorphError

__all__ = ["Flow", "Routed", "Rule", "Signal", "register_rule", "rule_for", "variable"]

Ids = np.ndarray


@dataclass(frozen=True)
class Signal:
    """An operand or result as a row sees it: the ids along its channel axis, that axis, and the static shape."""

    ids: Ids
    axis: int
    shape: tuple[int | None, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Flow:
    """One call of a layer, as a row's `flow` receives it.

    Attributes:
        name: unique name of the layer.
        operation: the Keras layer or operation.
        inputs: its tensor operands.
        output_shapes: static shapes of its results.
        graph: where ids are made, tied and pinned.
        default_axis: channel axis of tensors of unknown origin, as a function of their rank.
        args: positional arguments of the call, Keras's own tensors among them.
        kwargs: keyword arguments of the call.
        grouped: "whole" or "equal", as in `trace`.
    """

    name: str
    operation: Any
    inputs: list[Signal]
    output_shapes: list[tuple[int | None, ...]]
    graph: GraphBuilder
    default_axis: Callable[[int], int]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    grouped: str = "whole"

    def read(self, axis: int) -> Ids | None:
        """Ids that the layer reads along `axis` of its operand; None, and pinned, if they lie along another axis."""
        signal = self.inputs[0]
        if signal.axis == axis:
            return signal.ids
        self.graph.pin(signal.ids, f"{self.name} reads another axis than the one that its channels lie along")
        return None


@dataclass(frozen=True)
class Routed:
    """What a row's `flow` finds out about one call.

    Attributes:
        results: ids and channel axis of each result.
        sides: token of the axis strings -> ids; a token that is missing stands for an axis that cannot be narrowed.
        mode: overrides the row's mode for this call.
        gathers: for each result the positions of its channels along the operand's channel axis, where the call picks
            channels (slices, splits, takes, shuffles).
        hidden: ids of the channels inside the layer, of which one has to stay, or None.
        followed: False where the row does not say what this call does: the layer is then one that we do not know.
    """

    results: list[tuple[Ids, int]]
    sides: Mapping[str, Ids | None] = field(default_factory=dict)
    mode: str | None = None
    gathers: tuple[np.ndarray, ...] = ()
    hidden: Ids | None = None
    followed: bool = True


@dataclass(frozen=True)
class Rewriting:
    """What a row's `rewrite` may ask of the call that is replayed.

    Attributes:
        operand: the first tensor operand in the seed.
        result: the first result in the seed.
        kept: positions of the operand's channel axis that are alive.
        kept_result: positions of the result's channel axis that are alive.
    """

    operand: Tensor
    result: Tensor
    kept: np.ndarray
    kept_result: np.ndarray


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        flow: how ids pass through a call; ties and pins on the way.
        mode: how a call treats constant operands:
            "make": weights read the operand; with nothing alive to read, the result is constant.
            "uniform": maps a spatially uniform constant to a spatially uniform constant.
            "merge": elementwise over several operands; constants are folded.
            "join": joins the operands' vectors.
            "strict": operands must not be constant.
        weights: attribute -> axis string.
        multiplies: attribute -> "outputs" or "inputs": each element is multiplied once per position of the result, or
            of the last operand.
        scored: attribute -> token of the axis whose channels the weight makes, by which GroupLasso scores them; where there
            is nothing, the `out` axis of what multiplies.
        width: config field that holds the number of channels that the layer makes.
        scale: attribute that scales each channel (the gamma of BatchNormalization).
        narrow: `narrow(config, kept, result) -> config` where the config holds more than a width; kept are the
            positions, of the channels that the layer makes or else of the result's, that are alive.
        rewrite: `rewrite(args, kwargs, Rewriting) -> (args, kwargs)`, where arguments of the call depend on channels:
            constant arrays, indices, shapes. It is called before tensors are filled in.
        variant: `variant(operation) -> Rule | None`, a different row for some instances of the class.
    """

    flow: Callable[[Flow], Routed]
    mode: str
    weights: Mapping[str, str] = field(default_factory=dict)
    multiplies: Mapping[str, str] = field(default_factory=dict)
    scored: Mapping[str, str] = field(default_factory=dict)
    width: str | None = None
    scale: str | None = None
    narrow: Callable[[dict, np.ndarray, Tensor], dict] | None = None
    rewrite: Callable[[tuple, dict, Rewriting], tuple[tuple, dict]] | None = None
    variant: Callable[[Any], "Rule | None"] | None = field(default=None, repr=False)

    def of(self, operation: Any) -> "Rule":
        """The row of one instance of the class."""
        return (self.variant(operation) if self.variant else None) or self

    def narrowed(self, config: dict, kept: np.ndarray, result: Tensor) -> dict:
        """The config of a copy that keeps these channels."""
        if self.narrow:
            config = self.narrow(config, kept, result)
        return {**config, self.width: len(kept)} if self.width else config


# Flows that layers and functional operations share.


def same(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    return Routed([(signal.ids, signal.axis)], {"in": signal.ids})


def together(flow: Flow, reason: str) -> Routed:
    """Hands ids on, but works on all channels together: they are pinned."""
    signal = flow.inputs[0]
    flow.graph.pin(signal.ids, f"{flow.name} {reason}")
    return Routed([(signal.ids, signal.axis)], mode="strict")


def fresh(flow: Flow, reason: str) -> Routed:
    """Results whose channels we cannot follow: new ids, pinned on both sides."""
    for signal in flow.inputs:
        flow.graph.pin(signal.ids, f"{flow.name} {reason}")
    results = []
    for number, shape in enumerate(flow.output_shapes):
        axis = flow.default_axis(len(shape))
        made = flow.graph.make(f"{flow.name}:{number}" if number else flow.name, (shape[axis] or 0) if shape else 0)
        flow.graph.pin(made, f"{flow.name} {reason}")
        results.append((made, axis))
    return Routed(results, mode="strict", followed=False)


def merged(flow: Flow) -> Routed:
    """Elementwise merge: equal channel axes are tied index by index; broadcasting over space changes nothing."""
    widest = max(flow.inputs, key=lambda signal: len(signal.ids))
    if any((signal.rank, signal.axis) != (widest.rank, widest.axis) for signal in flow.inputs):
        return fresh(flow, "merges operands whose channels lie along different axes")
    for signal in flow.inputs:
        if len(signal.ids) == len(widest.ids):
            flow.graph.tie(widest.ids, signal.ids)
        else:
            flow.graph.pin(signal.ids, f"{flow.name} broadcasts it over channels")
    return Routed([(widest.ids, widest.axis)])


def joined(flow: Flow) -> Routed:
    first = flow.inputs[0]
    if any(signal.axis != first.axis for signal in flow.inputs):
        return fresh(flow, "joins operands whose channels lie along different axes")
    if flow.operation.axis % first.rank == first.axis:
        return Routed([(np.concatenate([signal.ids for signal in flow.inputs]), first.axis)])
    return replace(merged(flow), mode="strict")


def follow_reshape(ids: Ids, axis: int, before: tuple, after: tuple) -> tuple[Ids, int] | None:
    """Where the channel axis is after a row-major reshape, or None where it was torn apart.

    Args:
        ids: ids along `axis`.
        axis: channel axis before, batch axis included.
        before, after: static shapes, batch included.
    """
    if None in before[1:] or None in after[1:]:
        same = axis == len(before) - 1 and before[-1] == after[-1]
        return (ids, len(after) - 1) if same else None
    sizes = after[1:]
    outer, inner = math.prod(before[1:axis]), math.prod(before[axis + 1 :])
    for new, size in enumerate(sizes):
        if size == len(ids) and math.prod(sizes[:new]) == outer:
            return ids, new + 1
    for new in reversed(range(len(sizes))):
        outside, inside = math.prod(sizes[:new]), math.prod(sizes[new + 1 :])
        # The new axis swallows the channel axis whole, a tail of what lay outside it and a head of what lay inside.
        if outer % outside == 0 and inner % inside == 0:
            return np.tile(np.repeat(ids, inner // inside), outer // outside), new + 1
    return None


def reshaped(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    followed = follow_reshape(signal.ids, signal.axis, signal.shape, flow.output_shapes[0])
    if followed is None:
        followed = _split_by_reshape(flow, signal, flow.output_shapes[0])
    return Routed([followed]) if followed else fresh(flow, "tears the channel axis apart")


def _split_by_reshape(flow: Flow, signal: Signal, after: tuple[Any, ...]) -> tuple[Ids, int] | None:
    """A channel axis that is split in several, such as C -> (r, r, C / r^2): the longest of them stays the channel axis.

    Channels that lie at the same place of it are tied, so that the others keep their lengths.
    """
    if None in signal.shape[1:] or None in after[1:]:
        return None
    after = tuple(int(size or 0) for size in after)
    outer, width = math.prod(size or 0 for size in signal.shape[1 : signal.axis]), len(signal.ids)
    for start in range(1, len(after)):
        for stop in range(start + 2, len(after) + 1):
            if math.prod(after[1:start]) == outer and math.prod(after[start:stop]) == width:
                axis = max(range(start, stop), key=lambda a: (after[a], a))
                grid = np.moveaxis(signal.ids.reshape(after[start:stop]), axis - start, -1).reshape(-1, after[axis])
                for row in grid[1:]:
                    flow.graph.tie(grid[0], row)
                return grid[0].copy(), axis
    return None


TABLE: dict[type, Rule] = {}
MODES = ("make", "uniform", "merge", "join", "strict")
SIDES = ("outputs", "inputs")


def variable(operation: Any, name: str) -> Any:
    """A layer's variable by the name that its row gives it, such as `kernel` or `cell.kernel`; None if there is none."""
    for part in name.split("."):
        operation = getattr(operation, part, None)
    return operation


def rule_for(operation: Any) -> Rule | None:
    """The row of an operation's exact class, or None where we have none."""
    rule = TABLE.get(type(operation))
    if rule is None or getattr(operation, "lora_enabled", False) or getattr(operation, "quantization_mode", None):
        return None
    return rule.of(operation)


def register_rule(layer_class: type, rule: Rule | None = None, *, like: type | None = None) -> None:
    """Add a row for a layer class of your own, so that it can be narrowed.

    Args:
        layer_class: the class; it is matched exactly, subclasses need rows of their own.
        rule: a row in full, or
        like: a class whose row it shares: the same weights under the same names, the same config field for the width.

    Raises:
        KerasMorphError: if neither or both are given, `like` has no row, or the rule makes no sense.
    """
    if not isinstance(layer_class, type):
        raise KerasMorphError(f"register_rule expects a class of layers. Received: {layer_class!r}, an instance.")
    if (rule is None) == (like is None):
        raise KerasMorphError(
            f"register_rule({layer_class.__name__}) expects either a rule or like=LayerClass. "
            f"Received: rule={rule}, like={like}"
        )
    if like is not None and like not in TABLE:
        raise KerasMorphError(
            f"register_rule({layer_class.__name__}): like={like.__name__} has no rule to share; "
            "give a class that has one, or a Rule in full."
        )
    if rule is not None:
        _check(layer_class, rule)
    TABLE[layer_class] = rule or TABLE[like]  # type: ignore[index]


def _check(layer_class: type, rule: Any) -> None:
    where = f"register_rule({layer_class.__name__})"
    if not isinstance(rule, Rule):
        raise KerasMorphError(f"{where} expects a Rule. Received: {rule!r}; like=... shares the row of a class.")
    if rule.mode not in MODES:
        raise KerasMorphError(f"{where} received mode={rule.mode!r}. Expected one of {', '.join(map(repr, MODES))}.")
    wrong = {name: side for name, side in rule.multiplies.items() if name not in rule.weights or side not in SIDES}
    if wrong:
        raise KerasMorphError(
            f"{where} received multiplies={wrong}. Expected names among the weights {list(rule.weights)}, each with "
            f"{' or '.join(map(repr, SIDES))}."
        )
