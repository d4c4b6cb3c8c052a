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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_morph.channels import GraphBuilder, Tensor
from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import builds_weights, own_variables, parts_of

__all__ = [
    "Flow",
    "Routed",
    "Rule",
    "Signal",
    "at_side",
    "register_rule",
    "row_of",
    "rule_for",
    "variable",
    "why_not_followed",
]

Ids = np.ndarray


@dataclass(frozen=True)
class Signal:
    """An operand or result as a row sees it: the ids along its channel axis, that axis, and the static shape.

    `zeroed`, `steady` and `masked` as in `Tensor`: dead channels are exactly zero there, or at least the same number at
    every position; it may carry a Keras mask. `rows` too: rows of the batch axis per example.
    """

    ids: Ids
    axis: int
    shape: tuple[int | None, ...]
    zeroed: bool = False
    masked: bool = False
    steady: bool = False
    rows: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Flow:
    """One call of a layer, as a row's `flow` receives it.

    Attributes:
        name: unique name of the layer.
        operation: the Keras layer or operation.
        inputs: its tensor operands, in the order of the arguments of its `call`; masks aside, where the row takes them.
        output_shapes: static shapes of its results.
        graph: where ids are made, tied and pinned.
        default_axis: channel axis of tensors of unknown origin, as a function of their rank.
        args: positional arguments of the call, Keras's own tensors among them.
        kwargs: keyword arguments of the call.
        grouped: "whole" or "equal", as in `trace`.
        names: the argument of `call` that each operand is, or is part of.
        masked: whether the call is given a mask.
    """

    name: str
    operation: Any
    inputs: list[Signal]
    output_shapes: list[tuple[int | None, ...]]
    graph: GraphBuilder
    default_axis: Callable[[int], int]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    grouped: str = "whole"
    names: tuple[str, ...] = ()
    masked: bool = False

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
        moves: as `gathers`, where the call moves axes and picks nothing: by it constants are followed.
        rows: by how much the batch axis grows, as in `Tensor.rows`; NaN if unknown.
        takes: for each operand whose channels lie along another axis than the result's: that axis of the result, along
            which the rebuilt call takes the operand's entries for what is alive; -1 for all others. Empty where there is none.
        padded: whether the rebuilt call fills the operand up to its full width, with the values that dead channels have in
            the masked seed, and picks what is alive of the result. Then weights that lie along the operand stay whole.
        zero: whether dead channels of the results are exactly zero, for all or for each of them; None where that follows from
            the row and the operands.
        hidden: ids of the channels inside the layer, of which one has to stay, or None.
        followed: False where the row does not say what this call does: the layer is then one that we do not know.
    """

    results: list[tuple[Ids, int]]
    sides: Mapping[str, Ids | None] = field(default_factory=dict)
    mode: str | None = None
    gathers: tuple[np.ndarray, ...] = ()
    moves: tuple[np.ndarray, ...] = ()
    rows: float = 1.0
    takes: tuple[int, ...] = ()
    padded: bool = False
    zero: bool | tuple[bool, ...] | None = None
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


def always(operation: Any) -> bool:
    return True


def never(operation: Any) -> bool:
    return False


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
        multiplies: attribute -> "outputs", "inputs" or "first": each element is multiplied once per position of the result, of
            the last operand, or of the first one, behind which states may follow.
        scored: attribute -> token of the axis whose channels the weight makes, by which GroupLasso scores them; where there
            is nothing, the `out` axis of what multiplies.
        width: config field that holds the number of channels that the layer makes.
        scale: attribute that scales each channel (the gamma of BatchNormalization).
        rescale: `rescale(width, kept) -> {attribute: factor}`: what weights are multiplied by where a layer keeps so many of
            its channels.
        narrow: `narrow(config, kept, result) -> config` where the config holds more than a width; kept are the
            positions, of the channels that the layer makes or else of the result's, that are alive.
        rewrite: `rewrite(args, kwargs, Rewriting) -> (args, kwargs)`, where arguments of the call depend on channels:
            constant arrays, indices, shapes. It is called before tensors are filled in.
        variant: `variant(operation) -> Rule | None`, a different row for some instances of the class.
        mixes: whether a channel of its result depends on other channels too, though it hands ids on.
        masks: arguments of its `call` that are masks: they say which steps count, and have no channels.
        zero: `zero(operation) -> bool`, whether what is zero stays zero; of a layer whose weights make or read channels,
            whether it makes zeros of zero weights.
        absorbs: whether its result is zero already where one of its operands is.
        shifts: whether a number or an array beside a single operand makes something else of zero.

    Example:
        >>> from keras_morph.layers.rules import same
        >>> class Scale(keras.layers.Layer):
        ...     def build(self, shape):
        ...         self.slope = self.add_weight(shape=(shape[-1],), name="slope")
        ...     def call(self, inputs):
        ...         return inputs * self.slope
        >>> km.register_rule(Scale, km.Rule(same, "uniform", {"slope": "in"}))
    """

    flow: Callable[[Flow], Routed]
    mode: str
    weights: Mapping[str, str] = field(default_factory=dict)
    multiplies: Mapping[str, str] = field(default_factory=dict)
    scored: Mapping[str, str] = field(default_factory=dict)
    width: str | None = None
    scale: str | None = None
    rescale: Callable[[int, int], Mapping[str, float]] | None = None
    narrow: Callable[[dict[str, Any], np.ndarray, Tensor], dict[str, Any]] | None = None
    rewrite: Callable[[tuple[Any, ...], dict[str, Any], Rewriting], tuple[tuple[Any, ...], dict[str, Any]]] | None = (
        None
    )
    variant: Callable[[Any], "Rule | None"] | None = field(default=None, repr=False)
    mixes: bool = False
    masks: tuple[str, ...] = ()
    zero: Callable[[Any], bool] = field(default=never, repr=False)
    absorbs: bool = False
    shifts: bool = False

    def of(self, operation: Any) -> "Rule":
        """The row of one instance of the class."""
        return (self.variant(operation) if self.variant else None) or self

    def narrowed(self, config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
        """The config of a copy that keeps these channels."""
        if self.narrow:
            config = self.narrow(config, kept, result)
        return {**config, self.width: len(kept)} if self.width else config


# Flows that layers and functional operations share.


def same(flow: Flow) -> Routed:
    signal = flow.inputs[0]
    return Routed([(signal.ids, signal.axis)], {"in": signal.ids})


def together(flow: Flow, reason: str) -> Routed:
    """Hands ids on, but works on all channels together: filled up if dead ones are the same everywhere, else pinned."""
    signal = flow.inputs[0]
    if fills_up(flow):
        return Routed([(signal.ids, signal.axis)], mode="strict", padded=True)
    flow.graph.pin(signal.ids, f"{flow.name} {reason}{_why_not_filled(signal)}")
    return Routed([(signal.ids, signal.axis)], mode="strict")


def fills_up(flow: Flow) -> bool:
    """Whether a call may be given its operand at full width, with constants for what is dead: it computes what it did.

    Keras's mask is lost on the way.
    """
    return len(flow.inputs) == 1 and flow.inputs[0].steady and not flow.inputs[0].masked


def _why_not_filled(signal: Signal) -> str:
    return "" if signal.masked else ", and those that are dead differ by position there"


def fresh(flow: Flow, reason: str, *, known: bool = True) -> Routed:
    """Results whose channels we cannot follow: new ids, pinned on both sides, but for an operand that can be filled up.

    Args:
        flow: the call.
        reason: why, for the pins.
        known: False for a layer that we do not know.
    """
    filled = known and fills_up(flow)
    for signal in flow.inputs if not filled else ():
        flow.graph.pin(
            signal.ids, f"{flow.name} {reason}{_why_not_filled(signal) if len(flow.inputs) == 1 and known else ''}"
        )
    results = []
    for number, shape in enumerate(flow.output_shapes):
        axis = flow.default_axis(len(shape))
        made = flow.graph.make(flow.name, (shape[axis] or 0) if shape else 0, str(number or ""))
        flow.graph.pin(made, f"{flow.name} {reason}")
        results.append((made, axis))
    return Routed(results, mode="strict", padded=filled, followed=False)


def merged(flow: Flow) -> Routed:
    """Elementwise merge: equal channel axes are tied index by index; broadcasting over space changes nothing.

    Merging layers take operands of fewer axes, which lack those behind the batch axis. An operand whose channels lie along
    another axis keeps all of them; along the result's channel axis it has an entry for each channel, or one for all.
    """
    signals = _aligned(flow)
    rank = max(signal.rank for signal in signals)
    if any(signal.rank != rank for signal in signals):
        return fresh(flow, "merges operands with different numbers of axes")
    if isinstance(flow.operation, keras.Layer) and len(tree.flatten((flow.args, flow.kwargs))) > len(signals):
        if len(signals) > 1:
            return fresh(flow, "merges an array")
        return replace(together(flow, "merges an array"), zero=False)
    axes = {signal.axis for signal in signals}
    widest = max(signals, key=lambda signal: len(signal.ids))
    if len(axes) > 1:  # those of an operand that is not pinned anyway, nor broadcast
        result, default = flow.output_shapes[0], flow.default_axis(rank)

        def suits(signal: Signal) -> tuple[Any, ...]:
            pinned, whole = flow.graph.is_pinned(signal.ids), tuple(signal.shape[1:]) == tuple(result[1:])
            return not pinned, whole, signal.axis == default, len(signal.ids)

        axis = max(signals, key=suits).axis
    else:
        axis = widest.axis
    widest = max((signal for signal in signals if signal.axis == axis), key=lambda signal: len(signal.ids))
    astray = [signal for signal in signals if signal.axis != axis]
    if any(signal.masked or signal.shape[axis] not in (1, len(widest.ids)) for signal in astray):
        return fresh(flow, "merges operands whose channels lie along different axes")
    takes = []
    for signal in signals:
        takes.append(axis if signal.axis != axis and signal.shape[axis] != 1 else -1)
        if signal.axis != axis:
            flow.graph.pin(signal.ids, f"{flow.name} merges channels along different axes")
        elif len(signal.ids) == len(widest.ids):
            flow.graph.tie(widest.ids, signal.ids)
        else:
            flow.graph.pin(signal.ids, f"{flow.name} broadcasts it over channels")
    if len(axes) > 1:
        return Routed([(widest.ids, axis)], mode="strict", takes=tuple(takes))
    return Routed([(widest.ids, axis)])


def _aligned(flow: Flow) -> list[Signal]:
    """The operands of a merging layer as it lines them up: axes that are missing are put behind the batch axis."""
    rank = max(signal.rank for signal in flow.inputs)
    if not isinstance(flow.operation, keras.Layer):
        return flow.inputs
    return [
        replace(
            signal,
            axis=signal.axis + rank - signal.rank,
            shape=(signal.shape[0], *[1] * (rank - signal.rank), *signal.shape[1:]),
        )
        if signal.axis > 0
        else signal
        for signal in flow.inputs
    ]


def joined(flow: Flow) -> Routed:
    first = flow.inputs[0]
    if any(np.ndim(x) for x in tree.flatten((flow.args, flow.kwargs)) if not isinstance(x, keras.KerasTensor)):
        return fresh(flow, "joins an array")
    if any(signal.axis != first.axis for signal in flow.inputs):
        return fresh(flow, "joins operands whose channels lie along different axes")
    if flow.operation.axis % first.rank == first.axis:
        return Routed([(np.concatenate([signal.ids for signal in flow.inputs]), first.axis)])
    together = replace(merged(flow), mode="strict")
    if flow.operation.axis % first.rank:
        return together
    rows = [signal.rows for signal in flow.inputs]  # along the batch axis
    return replace(together, rows=sum(rows) / max(rows))


def follow_reshape(
    axis: int, before: tuple[Any, ...], after: tuple[Any, ...], preferred: int
) -> tuple[np.ndarray, int] | None:
    """Where the channel axis is after a row-major reshape, or None where it was torn apart.

    An element's place in memory says all: channel `(place // inner) % width`, with `inner` elements behind the channel
    axis. A new axis of `size` with `behind` elements behind it carries the channels if each of its positions stands for
    one channel: `behind` divides `inner`, and `size * behind` is a multiple of `width * inner`. What becomes of the
    other axes, the batch axis included, does not matter.

    Args:
        axis: channel axis before, batch axis included.
        before, after: static shapes, batch included.
        preferred: the channel axis after, where several would do (axes of length 1).

    Returns:
        The channel at each position of the new channel axis, and that axis.
    """
    width, inner = before[axis], _product(before[axis + 1 :])
    if width is None or inner is None:
        same = axis == len(before) - 1 and before[-1] == after[-1]
        return (np.arange(width or 0), len(after) - 1) if same else None
    found = []
    for new in range(1, len(after)):
        size, behind = after[new], _product(after[new + 1 :])
        if size is None or behind is None or inner % behind or (size * behind) % (width * inner):
            continue
        found.append((size == width and behind == inner, new == preferred, new, behind))
    if not found:
        return None
    *_, new, behind = max(found)
    return np.arange(after[new]) * behind // inner % width, new


def _product(sizes: tuple[Any, ...]) -> int | None:
    return None if None in sizes else math.prod(sizes)


def reshaped(flow: Flow) -> Routed:
    signal, after = flow.inputs[0], flow.output_shapes[0]
    preferred = flow.default_axis(len(after))
    moved = follow_reshape(signal.axis, signal.shape, after, preferred)
    one, other = _product(signal.shape[1:]), _product(after[1:])
    known = tuple(signal.shape[1:]).count(None) == tuple(after[1:]).count(None) == 1
    rows = one / other if one and other else 1.0 if known else math.nan
    if moved is not None:
        order, axis = moved
        ids = signal.ids if np.array_equal(order, np.arange(len(signal.ids))) else signal.ids[order]
        return Routed([(ids, axis)], moves=(order,), rows=rows)
    split = _split_by_reshape(flow, signal, after, preferred)
    # Constants of a channel axis that is split differ from place to place.
    return Routed([split], mode="strict", rows=rows) if split else fresh(flow, "tears the channel axis apart")


def _split_by_reshape(flow: Flow, signal: Signal, after: tuple[Any, ...], preferred: int) -> tuple[Ids, int] | None:
    """A channel axis that is split in several, such as C -> (r, r, C / r^2): one of them stays the channel axis.

    It is the axis along which the model's channels lie, or else the longest. Channels that lie at the same place of it
    are tied, so that the others keep their lengths. An axis of `size` with `behind` elements behind it will do if the
    channel alone says the place: `inner` divides `behind`, and `size * behind` divides `width * inner`.
    """
    width, inner = len(signal.ids), _product(signal.shape[signal.axis + 1 :])
    fitting = []
    for axis in range(1, len(after)):
        size, behind = after[axis], _product(after[axis + 1 :])
        if width and inner and size and behind and not behind % inner and not width * inner % (size * behind):
            fitting.append((axis == preferred, size, axis, behind // inner))
    if not fitting:
        return None
    _, size, axis, step = max(fitting)
    place = np.arange(width) // step % size
    _, first = np.unique(place, return_index=True)
    flow.graph.tie(signal.ids[first][place], signal.ids)
    return signal.ids[first], axis


# Activations that are zero at zero.
ZERO_AT_ZERO = frozenset(
    """celu elu gelu hard_shrink hard_silu hard_tanh leaky_relu linear mish relu relu6 selu silu soft_shrink softsign
    tanh tanh_shrink""".split()  # noqa: SIM905
)


def zero_at_zero(operation: Any) -> bool:
    """Whether an operation's activation is zero at zero, as that of a layer without one is."""
    activation = getattr(operation, "activation", None)
    name = getattr(activation, "__name__", "")
    return activation is None or (name in ZERO_AT_ZERO and getattr(keras.activations, name, None) is activation)


def rests_at_activation(operation: Any, rule: Rule | None) -> bool:
    """Whether a layer with zero weights gives its activation of zero at every position, as Conv and Dense do."""
    return (
        rule is not None
        and bool(rule.multiplies)
        and rule.zero is zero_at_zero
        and not isinstance(operation, keras.layers.RNN)
    )


TABLE: dict[type, Rule] = {}
MODES = ("make", "uniform", "merge", "join", "strict")
SIDES = ("outputs", "inputs", "first")


def at_side(where: str, operands: Sequence[Any], results: Sequence[Any]) -> Any:
    """The operand or result that `Rule.multiplies` means by one of SIDES."""
    if where == "outputs":
        return results[0]
    return operands[0] if where == "first" else operands[-1]


def variable(operation: Any, name: str) -> Any:
    """A layer's variable by the name that its row gives it, such as `kernel` or `cell.kernel`; None if there is none."""
    for part in name.split("."):
        operation = getattr(operation, part, None)
    return operation


def row_of(operation: Any) -> Rule | None:
    """The row of an operation's exact class for this instance, whether or not its weights are as the row says."""
    rule = TABLE.get(type(operation))
    return None if rule is None else rule.of(operation)


def rule_for(operation: Any) -> Rule | None:
    """The row by which an operation is followed; None where we have none, and where `why_not_followed` says why."""
    return None if why_not_followed(operation) else row_of(operation)


def why_not_followed(operation: Any) -> str | None:
    """Why an operation is not followed by the row of its class: it holds more than the row can narrow. None if it is."""
    row = row_of(operation)
    if row is None or not isinstance(operation, keras.Layer):
        return None
    parts = parts_of(operation)
    if any(getattr(part, "lora_enabled", False) for part in parts):
        return "has LoRA"
    if any(getattr(part, "quantization_mode", None) for part in parts):
        return "is quantized"
    named = {id(variable(operation, name)) for name in row.weights}
    # Keras builds a layer that is an activation when it is called with numbers.
    makes_more = any(not part.built and builds_weights(part) for part in parts[1:])
    if named and (makes_more or any(id(own) not in named for part in parts for own in own_variables(part))):
        return "has weights that its row does not name"
    return None


def register_rule(layer_class: type, rule: Rule | None = None, *, like: type | None = None) -> None:
    """Add a row for a layer class of your own, so that it can be narrowed.

    Args:
        layer_class: the class; it is matched exactly, subclasses need rows of their own.
        rule: a row in full, or
        like: a class whose row it shares: the same weights under the same names, the same config field for the width. What
            it makes of zeros is not taken for granted.

    Raises:
        KerasMorphError: if neither or both are given, `like` has no row, or the rule makes no sense.

    Example:
        >>> class MyConv(keras.layers.Conv2D):
        ...     pass
        >>> km.register_rule(MyConv, like=keras.layers.Conv2D)
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
    TABLE[layer_class] = rule or _likened(TABLE[like])  # type: ignore[index]


def _likened(rule: Rule) -> Rule:
    variant = rule.variant and (lambda operation: (found := rule.variant(operation)) and replace(found, zero=never))  # type: ignore[misc]
    return replace(rule, zero=never, variant=variant)


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
            f"{', '.join(map(repr, SIDES))}."
        )
