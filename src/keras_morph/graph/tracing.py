"""From a Keras model to its ChannelGraph."""

import difflib
import functools
import inspect
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_morph.channels import Call, ChannelGraph, GraphBuilder, Layer, Scope, Tensor, Weight, Wiring
from keras_morph.errors import KerasMorphError, UnknownLayerWarning
from keras_morph.graph.composites import local_names, recordings_in
from keras_morph.keras_internals import functional_in, graph_in, mask_of, nodes_of, numeric, operations_of, parts_of
from keras_morph.layers.rules import (
    Flow,
    Routed,
    Rule,
    Signal,
    always,
    fresh,
    rests_at_activation,
    rule_for,
    same,
    variable,
)

__all__ = ["graph_of", "known_graph", "trace"]


def trace(
    model: Any,
    *,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> ChannelGraph:
    """Follow every channel of a model: who makes it, what ties it, who reads it.

    What is given here, the wiring, belongs to the graph and to every structure that is made of it: hand on the graph.

    Args:
        model: a functional or Sequential model that is built. A ChannelGraph is handed back as it is, and so is the graph of
            a StructureLearner.
        protect: regular expressions; layers whose whole name matches one keep all their channels.
        tie: lists of layer names; the layers of one list keep the same channels, index by index.
        grouped: how grouped convolutions are narrowed: "whole" conv groups, or "equal" counts in every conv group.

    Returns:
        The ChannelGraph. `print(graph)` shows it.

    Warns:
        UnknownLayerWarning: once for all layers that we do not know, whose channels are pinned.

    Raises:
        UnsupportedModelError: if the model has no graph (a subclassed model, or one that is not built).
        KerasMorphError: if `protect` or `tie` name layers that are not there, `grouped` is neither, or a graph or learner
            is given that was made with another wiring.

    Example:
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(),
        ...                           keras.layers.Dense(2)])
        >>> km.trace(model).num_groups
        9
    """
    if grouped not in ("whole", "equal"):
        raise KerasMorphError(f'Expected grouped="whole" or grouped="equal". Received: grouped={grouped!r}.')
    wiring = Wiring(_texts("protect", protect), tuple(_texts("tie", names) for names in tie), grouped)
    known = known_graph(model)
    if known is not None:
        if wiring not in (Wiring(), known.wiring):
            raise KerasMorphError(
                f"{known.model.name} was traced before, and its graph keeps its wiring. Expected: protect, tie and grouped "
                f"where the model is traced first. Received: {wiring}, and a graph with {known.wiring}."
            )
        return known
    function = functional_in(model)
    tracer = _Tracer(function, grouped)
    tracer.run(function)
    _protect(tracer.graph, wiring.protect)
    _tie(tracer.graph, wiring.tie)
    graph = tracer.finish(model, wiring)
    _warn_of_unknown(graph)
    return graph


def _texts(option: str, values: Any) -> tuple[str, ...]:
    """Strings; a single one is not taken for a list of letters."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        example = 'protect=["head.*"]' if option == "protect" else 'tie=[["left", "right"]]'
        raise KerasMorphError(f"Expected a list of strings, such as {example}. Received: {option}={values!r}.")
    return tuple(values)


def graph_of(model: Any) -> ChannelGraph:
    """The graph of whatever stands for a model: a ChannelGraph, a StructureLearner, or a Keras model, which is traced."""
    return trace(model)


def known_graph(model: Any) -> ChannelGraph | None:
    """The graph that is or comes with what stands for a model; None for a Keras model."""
    if isinstance(model, ChannelGraph):
        return model
    graph = getattr(model, "graph", None)
    return graph if isinstance(graph, ChannelGraph) else None


class _Tracer:
    """One pass over the calls of a graph, and of the models nested in it, in the order in which they run."""

    def __init__(self, function: Any, grouped: str) -> None:
        self.function, self.grouped = function, grouped
        self.graph = GraphBuilder()
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.specs: dict[int, Any] = {}
        self.layers: dict[str, Layer] = {}
        self.layer_numbers: dict[str, int] = {}
        self.sides: dict[str, dict] = {}
        self.calls: list[Call] = []
        self.scopes: list[Scope] = []
        self.names: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        first = any(getattr(op, "data_format", None) == "channels_first" for op in operations_of(function))
        self.default_axis = (lambda rank: min(1, rank - 1)) if first else (lambda rank: rank - 1)

    def run(self, function: Any, prefix: str = "", *, owner: Any = None, recorded: bool = False) -> None:
        """Follow all calls of a graph; in what is recorded of a layer, the owner, names are local."""
        nodes = nodes_of(function)
        names = local_names(function, owner) if recorded else {}
        recordings = recordings_in(nodes)
        users: dict[int, list[Any]] = {}
        for node in nodes:
            for source in node.arguments.keras_tensors:
                users.setdefault(id(source), []).append(node)
        for output in function.outputs:
            users.setdefault(id(output), []).append(None)
        chains = _mask_joins(nodes)  # node -> the chain that it ends, or None inside of one
        for node in nodes:
            if node.is_input and prefix:
                continue  # a nested model's input is the tensor that it is called on
            name = prefix + names.get(id(node.operation), node.operation.name)
            nested = None if node.is_input else _nested_in(node)
            stepped = None if node.is_input else self.stepped_in(node)
            recording = self.recording(node, recordings)
            if nested is not None or recording is not None:
                self.nest(node, nested or recording, name, recorded=recorded or nested is None)
            elif stepped is not None:
                self.step(node, stepped, name, recorded=recorded)
            else:
                if type(node.operation).__name__ == "Reshape" and id(node) not in chains:
                    chains.update(self.follow_shuffle(node, users))
                chain = chains.get(id(node))
                if chain is not None or id(node) not in chains:
                    self.call(node, name, chain)

    def recording(self, node: Any, recordings: dict[int, Any]) -> Any:
        """The graph of a layer that is made of layers, or None; why it is not followed is kept."""
        found = recordings.get(id(node.operation))
        if found is None:
            return None
        if any(tuple(self.spec(x).shape[1:]) != tuple(x.shape[1:]) for x in node.arguments.keras_tensors):
            found = "is called on other sizes than it was made for"
        if isinstance(found, str):
            self.refused[id(node.operation)] = found
            return None
        return found

    def nest(self, node: Any, function: Any, name: str, *, recorded: bool) -> None:
        """The calls of a nested model, with the tensors of this call for its inputs."""
        for outer, inner in zip(node.arguments.keras_tensors, function.inputs, strict=True):
            self.numbers[id(inner)], self.specs[id(inner)] = self.numbers[id(outer)], self.spec(outer)
        start = len(self.calls)
        owner = None if graph_in(node.operation) is not None else node.operation
        self.run(function, f"{name}/", owner=owner, recorded=recorded)
        for inner, outer in zip(function.outputs, node.outputs, strict=True):
            self.numbers[id(outer)], self.specs[id(outer)] = self.numbers[id(inner)], self.spec(inner)
        given, results = (
            tuple(self.numbers[id(source)] for source in sources) for sources in (function.inputs, function.outputs)
        )
        self.scopes.append(
            Scope(name, node.operation, function, node.arguments, start, len(self.calls), given, results)
        )

    def stepped_in(self, node: Any) -> Any:
        """The graph of the model that a TimeDistributed calls at every step, or None where it cannot be followed."""
        operation, given = node.operation, node.arguments.keras_tensors
        if type(operation) is not keras.layers.TimeDistributed or len(given) != 1:
            return None
        function, tensor = graph_in(operation.layer), self.tensors[self.numbers[id(given[0])]]
        if function is None or len(function.inputs) != 1 or len(function.outputs) != 1:
            return None
        fits = len(function.inputs[0].shape) + 1 == len(tensor.shape) and function.inputs[0].dtype == given[0].dtype
        return function if fits and tensor.axis > 1 and tensor.shape[1] is not None else None

    def step(self, node: Any, function: Any, name: str, *, recorded: bool) -> None:
        """The calls of a model that a TimeDistributed calls at every step.

        They stand between one call that takes the axis of time into the batch and one that brings it back.
        """
        (outer,), (result,) = node.arguments.keras_tensors, node.outputs
        operation, start = Steps(name), len(self.calls)
        source, target = self.tensors[self.numbers[id(outer)]], function.inputs[0]
        steps = int(source.shape[1] or 1)
        shape = source.shape[:1] + source.shape[2:]
        inside = replace(source, axis=source.axis - 1, shape=shape, rows=source.rows * steps)
        self.turn(operation, self.numbers[id(outer)], inside, outer, target, keras.KerasTensor(shape, target.dtype))
        self.run(function, f"{name}/", recorded=recorded)
        (end,) = function.outputs
        source = self.tensors[self.numbers[id(end)]]
        shape = (source.shape[0], steps, *source.shape[1:])
        outside = replace(source, axis=source.axis + 1, shape=shape, rows=source.rows / steps)
        self.turn(operation, self.numbers[id(end)], outside, end, result, keras.KerasTensor(shape, end.dtype))
        given, results = (self.numbers[id(outer)],), (self.numbers[id(result)],)
        self.scopes.append(
            Scope(name, node.operation, function, node.arguments, start, len(self.calls), given, results, stepped=True)
        )

    def turn(self, operation: "Steps", number: int, tensor: Tensor, source: Any, target: Any, spec: Any) -> None:
        """A call that moves the axis of time: the same channels in another place."""
        name = operation.name
        if name not in self.layers:
            self.layers[name] = Layer(name, "TimeDistributed", operation, STEPS, (), None)
            self.layer_numbers[name] = len(self.layer_numbers)
        self.numbers[id(target)], self.specs[id(target)] = len(self.tensors), spec
        self.tensors.append(tensor)
        self.calls.append(
            Call(self.layer_numbers[name], "strict", (number,), (self.numbers[id(target)],), sources=(source,))
        )

    def call(self, node: Any, name: str, chain: "_Chain | None" = None) -> None:
        """One call: its channels by its row, and what else is known of its results."""
        operation = node.operation
        name = self.names.setdefault(id(operation), name)  # a layer of two nested models has the name of its first call
        rule = None if node.is_input else CHAIN if chain else rule_for(operation)
        given = [("", x) for x in chain.sources] if chain else _arguments(node)
        masks = [x for argument, x in given if rule and argument in rule.masks]
        operands = [(argument, x) for argument, x in given if not rule or argument not in rule.masks]
        specs = self.output_specs(node)
        inputs = tuple(self.numbers[id(source)] for _, source in operands)
        flow = Flow(
            name,
            operation,
            [self.signal(number) for number in inputs],
            [tuple(spec.shape) for spec in specs],
            self.graph,
            self.default_axis,
            node.arguments.args,
            node.arguments.kwargs,
            self.grouped,
            tuple(argument for argument, _ in operands),
            bool(masks),
        )
        self.graph.call = len(self.calls)
        routed = _enter(flow) if node.is_input else self.routed(flow, rule, chain)
        self.graph.call = -1
        rule = rule if routed.followed else None
        if _is_own(getattr(operation, "activity_regularizer", None)):
            for ids, _ in routed.results:
                self.graph.pin(ids, f"{name} gives them to a regularizer that we do not know")
        for mask in masks:
            self.graph.pin(self.signal(self.numbers[id(mask)]).ids, f"{name} is given it as a mask")
        if name in self.layers:
            self.share(name, routed)
        else:
            weights = _weights(operation, rule, routed, flow.inputs, self.graph) if rule else ()
            made = self.graph.made.get(name)
            self.layers[name] = Layer(name, type(operation).__name__, operation, rule, weights, made)
            self.sides[name] = dict(routed.sides)
        mode = routed.mode or (rule.mode if rule else "strict")
        if mode in ("merge", "join") and self.needs_masks(node, inputs):
            mode = "strict"
        facts = self.facts(node, rule, routed, inputs, mode)
        outputs = tuple(
            self.tensor(*result, source, spec, **facts, masked=self.is_masked(node, source, inputs))
            for result, source, spec in zip(routed.results, node.outputs, specs, strict=True)
        )
        if routed.hidden is not None:
            inputs += (self.hidden(routed.hidden),)
        self.calls.append(
            Call(
                self.layer_numbers.setdefault(name, len(self.layer_numbers)),
                mode,
                inputs,
                outputs,
                node.arguments,
                tuple(source for _, source in operands),
                routed.gathers,
                tuple(self.numbers[id(mask)] for mask in masks),
                tuple(masks),
                routed.moves,
                chain.compute if chain else None,
                routed.takes,
                routed.padded,
            )
        )

    def routed(self, flow: Flow, rule: Rule | None, chain: "_Chain | None") -> Routed:
        """What a row says of a call, or what is said of a layer that has none."""
        if chain:
            return chain.routed(flow)
        if rule is None:
            return self.unknown(flow)
        masks = [name for name in flow.names if name == "mask" or name.endswith("_mask")]
        if masks:
            return fresh(flow, f"is given a {masks[0]}", known=False)
        routed = rule.flow(flow)
        if flow.masked and (routed.mode or rule.mode) not in ("make", "strict"):
            return replace(routed, mode="strict")
        return routed

    def facts(self, node: Any, rule: Rule | None, routed: Routed, inputs: tuple[int, ...], mode: str) -> dict:
        """`rows`, `zeroed` and `steady` of a call's results."""
        given = [self.as_seen(routed, mode, inputs, number) for number in inputs]
        zeroed = self.is_zeroed(node, rule, routed, given)
        # What maps a constant to a constant does so for every channel that is one, unless channels meet in it.
        alone = rule is not None and not rule.mixes and mode in ("uniform", "merge", "join")
        plain = not any(tensor.masked for tensor in given) and all(tensor.steady for tensor in given)
        return {
            "rows": max((tensor.rows for tensor in given), default=1.0) * routed.rows,
            "zeroed": zeroed,
            "steady": zeroed or (alone and plain) or rests_at_activation(node.operation, rule),
        }

    def as_seen(self, routed: Routed, mode: str, inputs: tuple[int, ...], number: int) -> Tensor:
        """One of several operands as the result's dead channels see it: if its channels are others, it is not dead there."""
        tensor, (result, _) = self.tensors[number], routed.results[0]
        ids = self.graph.vectors[tensor.vector]
        if (
            len(set(inputs)) == 1
            or mode == "join"
            or ids is result
            or self.graph.are_tied(len(self.calls), ids, result)
        ):
            return tensor
        return replace(tensor, zeroed=False, steady=False)

    def is_zeroed(self, node: Any, rule: Rule | None, routed: Routed, given: list[Tensor]) -> bool:
        """Whether dead channels of a call's results are exactly zero."""
        if rule is None or node.is_input:
            return True  # all pinned: nothing dies
        if routed.zero is not None:
            return routed.zero
        if rule.multiplies or rule.width:  # what else than the first operand it is given are states and sequences
            return rule.zero(node.operation) and all(tensor.zeroed for tensor in given[1:])
        # A Multiply takes what a mask leaves out for ones.
        masked = isinstance(node.operation, keras.Layer) and any(tensor.masked for tensor in given)
        every = any if isinstance(node.operation, PRODUCTS) and not masked else all
        shifts = isinstance(node.operation, SHIFTS) and len(given) == 1  # by a number or an array
        return every(tensor.zeroed for tensor in given) and rule.zero(node.operation) and not shifts

    def is_masked(self, node: Any, source: Any, inputs: tuple[int, ...]) -> bool:
        """Whether a result carries a mask; what a nested model hands out may carry one that its caller does not see."""
        if mask_of(source) is not None:
            return True
        if not isinstance(node.operation, keras.Layer) or not node.operation.supports_masking or not inputs:
            return False
        every = any if isinstance(node.operation, keras.layers.Concatenate) else all
        return every(self.tensors[number].masked for number in inputs)

    def needs_masks(self, node: Any, inputs: tuple[int, ...]) -> bool:
        """Whether the masks of a merge's operands say what it computes, or which mask its result carries.

        Then it needs all of its operands. It does not where all carry the same mask, which any of them hands on.
        """
        operation, operands = node.operation, node.arguments.keras_tensors
        if not isinstance(operation, keras.Layer) or not any(self.tensors[number].masked for number in inputs):
            return False
        if isinstance(operation, (keras.layers.Maximum, keras.layers.Minimum, keras.layers.Multiply)):
            return True  # in the steps that a mask leaves out they take the other operand alone
        masks = {id(mask_of(x)) for x in operands}
        handed_on = len(masks) == 1 and id(None) not in masks and operands[0].dtype == "float32"
        return self.is_masked(node, node.outputs[0], inputs) and not handed_on

    def unknown(self, flow: Flow) -> Routed:
        """A layer without a row, and where it might have been followed, why it was not."""
        reason = self.refused.get(id(flow.operation))
        more, kind = f"; it {reason}" if reason else "", type(flow.operation)
        known = kind.__module__.startswith("keras.") and kind is not keras.layers.Lambda
        return fresh(flow, f"is a layer that we do not know ({type(flow.operation).__name__}{more})", known=known)

    def follow_shuffle(self, node: Any, users: dict[int, list[Any]]) -> dict[int, "_Chain | None"]:
        """The channel shuffle that begins at a reshape: its nodes, of which the last one stands for all; or nothing.

        The chain is run on the numbers of the elements: if it ends in the shape that it began with, and every
        position holds the channels that it held before in one and the same order, then it is a gather of channels.
        """
        source = node.arguments.keras_tensors[0]
        tensor, shape = self.tensors[self.numbers[id(source)]], tuple(source.shape[1:])
        if len(node.outputs[0].shape) <= len(source.shape) or None in shape or math.prod(shape) > LARGEST_SHUFFLE:
            return {}
        start = values = np.arange(math.prod(shape), dtype=np.int32).reshape(1, *shape)
        chain: dict[int, _Chain | None] = {}
        while node is not None and type(node.operation).__name__ in ("Reshape", "Permute", "Transpose", "Swapaxes"):
            sizes = tuple(node.outputs[0].shape[1:])
            if None in sizes or math.prod(sizes) != math.prod(shape):
                return {}  # it moves an axis into the batch
            values = keras.ops.convert_to_numpy(node.operation(keras.ops.convert_to_tensor(values)))
            chain[id(node)] = None
            if values.shape == start.shape:
                before, after = (
                    np.moveaxis(x, tensor.axis, -1).reshape(-1, x.shape[tensor.axis]) for x in (start, values)
                )
                order = np.searchsorted(before[0], after[0]) % len(before[0])
                if np.array_equal(before[:, order], after):
                    return chain | {id(node): _shuffle(source, order, tensor.axis)}
            following = users.get(id(node.outputs[0]), [])
            node = following[0] if len(following) == 1 else None
        return {}

    def share(self, name: str, routed: Routed) -> None:
        """A layer that is called again has the same weights and config, hence the same channels along their axes."""
        rule = self.layers[name].rule
        if rule is not None and not (rule.weights or rule.narrow or rule.width):
            return  # one Dropout or ReLU for many tensors
        for token in {*self.sides[name], *routed.sides}:
            ids, again = self.sides[name].get(token), routed.sides.get(token)
            if ids is not None and again is not None and len(ids) == len(again):
                self.graph.tie(ids, again)
            else:
                for known in (ids, again):
                    if known is not None:
                        self.graph.pin(known, f"{name} is called in two ways that do not agree")

    def signal(self, number: int) -> Signal:
        tensor = self.tensors[number]
        return Signal(
            self.graph.vectors[tensor.vector], tensor.axis, tensor.shape, tensor.zeroed, tensor.masked, tensor.steady
        )

    def tensor(self, ids: np.ndarray, axis: int, source: Any, spec: Any, **facts: Any) -> int:
        number = self.numbers[id(source)] = len(self.tensors)
        self.specs[id(source)] = spec
        self.tensors.append(Tensor(self.graph.vector(ids), axis, tuple(spec.shape), **facts))
        return number

    def hidden(self, ids: np.ndarray) -> int:
        self.tensors.append(Tensor(self.graph.vector(ids), 1, (None, len(ids))))
        return len(self.tensors) - 1

    def spec(self, source: Any) -> Any:
        return self.specs.get(id(source), source)

    def output_specs(self, node: Any) -> list[Any]:
        """Results of a call; inside a nested model their sizes follow from the tensors that it is called on."""
        inputs = node.arguments.keras_tensors
        if all(tuple(self.spec(source).shape) == tuple(source.shape) for source in inputs):
            return list(node.outputs)
        args, kwargs = node.arguments.convert(lambda x: self.spec(x) if isinstance(x, keras.KerasTensor) else x)
        return tree.flatten(node.operation.compute_output_spec(*args, **kwargs))

    def ends(self, sources: Iterable[Any], reason: str) -> tuple[int, ...]:
        """Numbers of the model's own inputs or outputs, whose channels are pinned."""
        numbers = tuple(self.numbers[id(source)] for source in sources)
        for number in numbers:
            self.graph.pin(self.graph.vectors[self.tensors[number].vector], reason)
        return numbers

    def pin_what_unknown_layers_hold(self) -> None:
        """A layer that we know, and that one that we do not know holds too, stays as it is for both."""
        for holder in self.layers.values():
            if holder.rule is not None or not isinstance(holder.operation, keras.Layer):
                continue
            held = {id(layer) for layer in parts_of(holder.operation, itself=False)}
            for layer in self.layers.values():
                if id(layer.operation) in held:
                    vectors = [vector for weight in layer.weights for vector in weight.vectors if vector >= 0]
                    for vector in vectors:
                        self.graph.pin(self.graph.vectors[vector], f"{holder.name} uses {layer.name} too")

    def pin_what_no_structure_names(self) -> None:
        """A structure names the channels that layers make, and others only through those that they are tied to."""
        group_of, _ = self.graph.groups()
        named = np.zeros(self.graph.num_channels, bool)
        for name, made in self.graph.made.items():
            named[made] = self.layers[name].rule is not None
        members = np.bincount(group_of, weights=named)
        for (name, part), made in self.graph.parts.items():
            if part:
                lonely = made[members[group_of[made]] == 0]
                self.graph.pin(lonely, f"{name} makes them, and no structure says how many")

    def finish(self, model: Any, wiring: Wiring) -> ChannelGraph:
        inputs = self.ends(self.function.inputs, "model input")
        outputs = self.ends(self.function.outputs, "model output")
        self.pin_what_unknown_layers_hold()
        self.pin_what_no_structure_names()
        group_of, pinned = self.graph.groups()
        owner = np.zeros(self.graph.num_channels, np.int64)
        for (name, _), made in self.graph.parts.items():
            owner[made] = self.layer_numbers[name]
        return ChannelGraph(
            model=model,
            layers=tuple(self.layers.values()),
            calls=tuple(self.calls),
            tensors=tuple(self.tensors),
            vectors=tuple(self.graph.vectors),
            inputs=inputs,
            outputs=outputs,
            group_of=group_of,
            pinned=pinned,
            owner=owner,
            scopes=tuple(self.scopes),
            ties=self.graph.ties(),
            pinned_channels=self.graph.pinned_channels(),
            wiring=wiring,
        )


def _nested_in(node: Any) -> Any:
    """The graph of a nested model that can be followed through, or None."""
    operation = node.operation
    function = graph_in(operation)
    if function is None or rule_for(operation) is not None:
        return None
    given, taken = node.arguments.keras_tensors, function.inputs
    fits = len(given) == len(taken) and all(
        len(a.shape) == len(b.shape) and a.dtype == b.dtype for a, b in zip(given, taken, strict=False)
    )
    return function if fits and len(function.outputs) == len(node.outputs) else None


CHAIN = Rule(same, "strict", zero=always)
STEPS = Rule(same, "strict", zero=always)
PRODUCTS = (keras.layers.Multiply, numeric.Multiply, numeric.Matmul, numeric.Einsum)  # zero where any operand is
SHIFTS = (numeric.Add, numeric.Subtract, numeric.Maximum, numeric.Minimum)

LARGEST_SHUFFLE = 1 << 22  # elements of a tensor whose shuffle is followed


@dataclass(frozen=True)
class Steps:
    """Stands in a graph for a TimeDistributed around a model, whose layers stand there themselves."""

    name: str


@dataclass(frozen=True)
class _Chain:
    """Several calls that are followed as one: what they read, what becomes of the channels, and what they compute."""

    sources: tuple[Any, ...]
    routed: Callable[[Flow], Routed]
    compute: Callable[..., Any]


def _shuffle(source: Any, order: np.ndarray, axis: int) -> _Chain:
    """A chain of reshapes and transpositions that ends in a permutation of channels."""

    def routed(flow: Flow) -> Routed:
        return Routed([(flow.inputs[0].ids[order], axis)], mode="uniform", gathers=(order,))

    return _Chain((source,), routed, lambda x: keras.ops.take(x, order, axis=axis))


def _mask_joins(nodes: Sequence[Any]) -> dict[int, _Chain | None]:
    """The calls by which Concatenate computes the mask of its result, of which the last one stands for all.

    Keras spreads each operand's mask over its channels, joins them, and asks for each step whether any channel counts:
    along the channel axis this is the OR of the masks, whatever the channels are; an operand without mask always counts.
    """
    makers = {id(output): node for node in nodes for output in node.outputs}
    chains: dict[int, _Chain | None] = {}
    for node in nodes:
        mask = mask_of(node.outputs[0])
        last = makers.get(id(mask))
        if not isinstance(node.operation, keras.layers.Concatenate) or last is None:
            continue
        operands = node.arguments.keras_tensors
        masks = [mask_of(x) for x in operands]
        rank = len(operands[0].shape)
        known = [x for x in masks if x is not None]
        inner = makers.get(id(last.arguments.keras_tensors[0]))
        flat = all(len(x.shape) < rank for x in known)
        if (
            type(last.operation).__name__ != "Any"
            or inner is None
            or not flat
            or node.operation.axis % rank != rank - 1
        ):
            continue
        below = [makers.get(id(x)) for x in inner.arguments.keras_tensors]
        within = [makers.get(id(x)) for part in below if part is not None for x in part.arguments.keras_tensors]
        spread = [n for n in within if n is not None and type(n.operation).__name__ in ("ExpandDims", "ZerosLike")]
        chains |= dict.fromkeys(map(id, [inner, *filter(None, below), *spread]))
        every = len(known) < len(masks)
        chains[id(last)] = _Chain(tuple(known), _joined_masks, functools.partial(_any_counts, every=every))
    return chains


def _joined_masks(flow: Flow) -> Routed:
    for signal in flow.inputs:
        flow.graph.pin(signal.ids, f"{flow.name} joins masks")
    return Routed([(flow.inputs[0].ids, flow.inputs[0].axis)], mode="strict")


def _any_counts(*masks: Any, every: bool) -> Any:
    """Whether a step counts in any operand of a Concatenate; in an operand without a mask all of them do."""
    return keras.ops.ones_like(masks[0]) if every else functools.reduce(keras.ops.logical_or, masks)


def _arguments(node: Any) -> list[tuple[str, Any]]:
    """The Keras tensors that a call is given, in the order of its parameters, each with the name of its argument."""
    arguments = node.arguments
    try:
        given = inspect.signature(node.operation.call).bind(*arguments.args, **arguments.kwargs).arguments
    except (TypeError, ValueError):  # no signature, or one that hides its arguments
        return [("", x) for x in arguments.keras_tensors]
    named = [(name, x) for name, value in given.items() for x in tree.flatten(value) if _is_symbolic(x)]
    return named if len(named) == len(arguments.keras_tensors) else [("", x) for x in arguments.keras_tensors]


def _is_own(regularizer: Any) -> bool:
    """Whether a regularizer is a user's own, which may need all channels; Keras's take each number alone."""
    return regularizer is not None and not type(regularizer).__module__.startswith("keras.")


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor)


def _enter(flow: Flow) -> Routed:
    shape = flow.output_shapes[0]
    axis = flow.default_axis(len(shape))
    return Routed([(flow.graph.make(flow.name, shape[axis] or 0 if len(shape) > 1 else 0), axis)], mode="input")


def _weights(
    operation: Any, rule: Rule, routed: Routed, signals: list[Signal], graph: GraphBuilder
) -> tuple[Weight, ...]:
    """The weights that a row names and the layer has, each axis with its vector."""
    weights = []
    for name, axes in rule.weights.items():
        value = variable(operation, name)
        if value is None:
            continue
        shape = tuple(value.shape)
        whole = ["in" if axis + 1 == signals[0].axis else "-" for axis in range(len(shape))]
        tokens = whole if axes == "*" else axes.split()
        if len(tokens) != len(shape):
            raise KerasMorphError(
                f"{operation.name}: the rule of {type(operation).__name__} says {name}={axes!r}. "
                f"Expected one word per axis of that weight. Received: a weight of shape {shape}."
            )
        vectors = tuple(
            graph.vector(ids) if (ids := routed.sides.get(token)) is not None and len(ids) == size else -1
            for token, size in zip(tokens, shape, strict=True)
        )
        multiplies = rule.multiplies.get(name)
        scored = rule.scored.get(name, "out" if multiplies else "")
        scores = tokens.index(scored) if scored in tokens else None
        reads = tokens.index("in") if "in" in tokens else None
        weights.append(Weight(name, shape, vectors, multiplies, scores, reads, whole=routed.padded))
    return tuple(weights)


_WARNED: Any = weakref.WeakSet()  # models whose unknown layers were named


def _warn_of_unknown(graph: ChannelGraph) -> None:
    if graph.model in _WARNED:
        return
    calls = [call for call in graph.calls if call.mode != "input" and _is_unknown(graph.layers[call.layer])]
    if not calls:
        return
    _WARNED.add(graph.model)
    layers = dict.fromkeys(f"{graph.layers[call.layer].name} ({graph.layers[call.layer].kind})" for call in calls)
    touched = {graph.tensors[tensor].vector for call in calls for tensor in (*call.inputs, *call.outputs)}
    pinned = graph.group_of[np.concatenate([graph.vectors[vector] for vector in touched])]
    own = any(not type(graph.layers[call.layer].operation).__module__.startswith("keras.") for call in calls)
    advice = " keras_morph.register_rule tells us of a layer of yours." if own else ""
    warnings.warn(
        f"{graph.model.name} has layers that we cannot follow: {', '.join(layers)}. What they read and make cannot be "
        f"removed, {np.isin(graph.group_of, pinned).sum():,} of {graph.num_channels:,} channels; everything else can."
        f"{advice}",
        UnknownLayerWarning,
        stacklevel=1,
    )


def _is_unknown(layer: Layer) -> bool:
    """Whether a layer has no row, or wraps one that has none; a row may also say that a call cannot be followed, and why."""
    wraps = isinstance(layer.operation, keras.layers.Wrapper)
    return layer.rule is None and (wraps or rule_for(layer.operation) is None)


def _protect(graph: GraphBuilder, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            names = [name for name in graph.made if re.fullmatch(pattern, name)]
        except re.error as error:
            raise KerasMorphError(
                f"Expected a regular expression for a whole layer name. Received: protect={pattern!r} ({error})."
            ) from error
        if not names:
            raise KerasMorphError(
                f"protect={pattern!r} matches no layer that makes channels. Expected a regular expression for a whole "
                f"layer name{_suggest(pattern, graph)}."
            )
        for name in names:
            graph.pin(graph.made[name], f"protected by {pattern!r}")


def _tie(graph: GraphBuilder, lists: Sequence[Sequence[str]]) -> None:
    for names in lists:
        for name in names:
            if name not in graph.made:
                raise KerasMorphError(
                    f"tie={list(names)} names {name!r}, which makes no channels in this model{_suggest(name, graph)}."
                )
        widths = {name: len(graph.made[name]) for name in names}
        if len(set(widths.values())) > 1:
            raise KerasMorphError(f"tie expects layers of equal width. Received: {widths}.")
        for name in names[1:]:
            graph.tie(graph.made[names[0]], graph.made[name])


def _suggest(name: str, graph: GraphBuilder) -> str:
    close = difflib.get_close_matches(name, graph.made, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
