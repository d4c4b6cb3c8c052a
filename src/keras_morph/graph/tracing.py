"""From a Keras model to its ChannelGraph."""

import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.channels import Call, ChannelGraph, GraphBuilder, Layer, Scope, Tensor, Weight, Wiring
from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.graph.chains import Chain, chained
from keras_morph.graph.composites import local_names, recordings_in
from keras_morph.graph.dead_values import is_masked, is_steady, is_zeroed, needs_masks
from keras_morph.graph.replaying import filled
from keras_morph.graph.unknown_layers import held_by_unknown, unknown, warn_of_unknown
from keras_morph.graph.wiring import wire, wiring_of
from keras_morph.keras_internals import functional_in, graph_in, nodes_of, operations_of, taken_by
from keras_morph.layers.rules import (
    Flow,
    Routed,
    Rule,
    Signal,
    always,
    fresh,
    rule_for,
    same,
    variable,
)

__all__ = ["graph_of", "known_graph", "trace", "trace_as"]


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
    if isinstance(model, (str, os.PathLike)):
        raise UnsupportedModelError(
            f"Expected a Keras model. Received: {str(model)!r}; open it with keras.models.load_model, or take one of "
            "km.zoo.build."
        )
    wiring = wiring_of(protect, tie, grouped)
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
    wire(tracer.graph, wiring)
    graph = tracer.finish(model, wiring)
    warn_of_unknown(graph)
    return graph


def trace_as(model: Any, wiring: Wiring) -> ChannelGraph:
    """Trace a model with the wiring of another graph."""
    return trace(model, protect=wiring.protect, tie=wiring.tie, grouped=wiring.grouped)


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
        self.numbers: dict[Any, int] = {}
        self.specs: dict[Any, Any] = {}
        self.layers: dict[str, Layer] = {}
        self.layer_numbers: dict[str, int] = {}
        self.sides: dict[str, dict] = {}
        self.calls: list[Call] = []
        self.scopes: list[Scope] = []
        self.names: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self.held: dict[int, tuple[str, Weight]] = {}  # variables, by their addresses
        first = any(getattr(op, "data_format", None) == "channels_first" for op in operations_of(function))
        self.default_axis = (lambda rank: min(1, rank - 1)) if first else (lambda rank: rank - 1)

    def run(self, function: Any, prefix: str = "", *, owner: Any = None, recorded: bool = False) -> None:
        """Follow all calls of a graph; in what is recorded of a layer, the owner, names are local."""
        names = local_names(function, owner) if recorded else {}
        recordings = recordings_in(nodes_of(function))
        for node, chain in chained(function, lambda source: self.tensors[self.numbers[source]].axis):
            if node.is_input and prefix:
                continue  # a nested model's input is the tensor that it is called on
            name = prefix + names.get(id(node.operation), node.operation.name)
            inside = None if node.is_input else self.inside(node, recordings)
            if inside is None:
                self.call(node, name, chain)
            elif inside.stepped:
                self.step(node, inside.function, name, recorded=recorded)
            else:
                self.nest(node, inside.function, name, recorded=recorded or inside.recorded)

    def inside(self, node: Any, recordings: dict[int, Any]) -> "_Inside | None":
        """What a call consists of, or None if it is not to be followed inside."""
        function = _nested_in(node)
        if function is not None:
            return _Inside(function)
        function = self.recording(node, recordings)
        if function is not None:
            return _Inside(function, recorded=True)
        function = self.stepped_in(node)
        return None if function is None else _Inside(function, stepped=True)

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
        for outer, inner in zip(taken_by(node.operation, function, node.arguments), function.inputs, strict=True):
            self.numbers[inner], self.specs[inner] = self.numbers[outer], self.spec(outer)
        start = len(self.calls)
        owner = None if graph_in(node.operation) is not None else node.operation
        self.run(function, f"{name}/", owner=owner, recorded=recorded)
        for inner, outer in zip(function.outputs, node.outputs, strict=True):
            self.numbers[outer], self.specs[outer] = self.numbers[inner], self.spec(inner)
        given, results = (
            tuple(self.numbers[source] for source in sources) for sources in (function.inputs, function.outputs)
        )
        self.scopes.append(
            Scope(name, node.operation, function, node.arguments, start, len(self.calls), given, results)
        )

    def stepped_in(self, node: Any) -> Any:
        """The graph of the model that a TimeDistributed calls at every step, or None where it cannot be followed."""
        operation, given = node.operation, node.arguments.keras_tensors
        if type(operation) is not keras.layers.TimeDistributed or len(given) != 1:
            return None
        function, tensor = graph_in(operation.layer), self.tensors[self.numbers[given[0]]]
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
        source, target = self.tensors[self.numbers[outer]], function.inputs[0]
        steps = int(source.shape[1] or 1)
        shape = source.shape[:1] + source.shape[2:]
        inside = replace(source, axis=source.axis - 1, shape=shape, rows=source.rows * steps)
        spec = keras.KerasTensor(shape, target.dtype)
        self.turn(operation, self.numbers[outer], inside, outer, target, spec, _steps_into_batch)
        self.run(function, f"{name}/", recorded=recorded)
        (end,) = function.outputs
        source = self.tensors[self.numbers[end]]
        shape = (source.shape[0], steps, *source.shape[1:])
        outside = replace(source, axis=source.axis + 1, shape=shape, rows=source.rows / steps)
        spec = keras.KerasTensor(shape, end.dtype)
        self.turn(operation, self.numbers[end], outside, end, result, spec, partial(_steps_out_of_batch, steps=steps))
        given, results = (self.numbers[outer],), (self.numbers[result],)
        self.scopes.append(
            Scope(name, node.operation, function, node.arguments, start, len(self.calls), given, results, stepped=True)
        )

    def turn(
        self, operation: "Steps", number: int, tensor: Tensor, source: Any, target: Any, spec: Any, compute: Any
    ) -> None:
        """A call that moves the axis of time: the same channels in another place."""
        name = operation.name
        if name not in self.layers:
            self.layers[name] = Layer(name, "TimeDistributed", operation, STEPS, (), None)
            self.layer_numbers[name] = len(self.layer_numbers)
        output = self.place(target, spec, tensor)
        every = np.arange(len(self.graph.vectors[tensor.vector]))
        self.calls.append(
            Call(
                self.layer_numbers[name],
                "strict",
                (number,),
                (output,),
                sources=(source,),
                moves=(every,),
                compute=compute,
            )
        )

    def call(self, node: Any, name: str, chain: Chain | None = None) -> None:
        """One call: its channels by its row, and what else is known of its results."""
        name = self.names.setdefault(
            id(node.operation), name
        )  # a layer of two nested models has the name of its first call
        given, specs = _Given.of(node, chain), self.output_specs(node)
        flow = self.flow(node, name, given, specs)
        self.graph.call = len(self.calls)
        routed = self.routed(flow, given.rule)
        self.graph.call = -1
        rule = given.rule if routed.followed else None
        self.pin_what_is_used_otherwise(node, flow, routed, given.masks)
        if name in self.layers:
            self.share(name, routed, flow)
        else:
            weights = _weights(node.operation, rule, routed, flow.inputs, self.graph) if rule else ()
            made = self.graph.made.get(name)
            self.layers[name] = Layer(name, type(node.operation).__name__, node.operation, rule, weights, made)
            self.sides[name] = dict(routed.sides)
            self.tie_weights_of_others(name, self.layers[name])
        inputs = tuple(self.numbers[source] for source in given.sources)
        mode = self.mode(node, rule, routed, inputs)
        outputs = self.results(node, rule, routed, inputs, mode, specs)
        hidden = () if routed.hidden is None else (self.hidden(routed.hidden),)
        self.calls.append(
            Call(
                self.layer_numbers.setdefault(name, len(self.layer_numbers)),
                mode,
                inputs + hidden,
                outputs,
                node.arguments,
                given.sources,
                routed.gathers,
                tuple(self.numbers[mask] for mask in given.masks),
                given.masks,
                routed.moves,
                chain.compute if chain else None,
                routed.takes,
                routed.padded,
            )
        )

    def flow(self, node: Any, name: str, given: "_Given", specs: list[Any]) -> Flow:
        """A call as its row receives it."""
        return Flow(
            name,
            node.operation,
            [self.signal(self.numbers[source]) for source in given.sources],
            [tuple(spec.shape) for spec in specs],
            self.graph,
            self.default_axis,
            node.arguments.args,
            node.arguments.kwargs,
            self.grouped,
            given.names,
            bool(given.masks),
        )

    def routed(self, flow: Flow, rule: Rule | None) -> Routed:
        """What a row says of a call, or what is said of a layer that has none."""
        if rule is None:
            return unknown(flow, self.refused.get(id(flow.operation)))
        masks = [name for name in flow.names if name == "mask" or name.endswith("_mask")]
        if masks:
            return fresh(flow, f"is given a {masks[0]}", known=False)
        routed = rule.flow(flow)
        if flow.masked and (routed.mode or rule.mode) not in ("make", "strict"):
            return replace(routed, mode="strict")
        return routed

    def pin_what_is_used_otherwise(self, node: Any, flow: Flow, routed: Routed, masks: Sequence[Any]) -> None:
        """Pin what a user's own regularizer is given, and what masks are computed from."""
        if _is_own(getattr(node.operation, "activity_regularizer", None)):
            for ids, _ in routed.results:
                self.graph.pin(ids, f"{flow.name} gives them to a regularizer that we do not know")
        for mask in masks:
            self.graph.pin(self.signal(self.numbers[mask]).ids, f"{flow.name} is given it as a mask")

    def mode(self, node: Any, rule: Rule | None, routed: Routed, inputs: tuple[int, ...]) -> str:
        """How a call treats constant and missing operands."""
        mode = routed.mode or (rule.mode if rule else "strict")
        needs_all = mode in ("merge", "join") and needs_masks(node, [self.tensors[number] for number in inputs])
        return "strict" if needs_all else mode

    def results(
        self, node: Any, rule: Rule | None, routed: Routed, inputs: tuple[int, ...], mode: str, specs: list[Any]
    ) -> tuple[int, ...]:
        """The tensors that a call makes, with all that is known of them; their numbers."""
        operands = [self.tensors[number] for number in inputs]
        seen = operands if mode == "join" or len(set(inputs)) == 1 else [self.as_seen(t, routed) for t in operands]
        zeroed = is_zeroed(node.operation, rule, routed, seen)
        steady = is_steady(node.operation, rule, mode, seen)
        rows = max((tensor.rows for tensor in operands), default=1.0) * routed.rows
        numbers = []
        for (ids, axis), source, spec, zero in zip(routed.results, node.outputs, specs, zeroed, strict=True):
            masked = is_masked(node, source, operands)
            tensor = Tensor(self.graph.vector(ids), axis, tuple(spec.shape), rows, masked, zero, zero or steady)
            numbers.append(self.place(source, spec, tensor))
        return tuple(numbers)

    def as_seen(self, tensor: Tensor, routed: Routed) -> Tensor:
        """One of several operands as the result's dead channels see it: if its channels are others, it is not dead there."""
        ids, (result, _) = self.graph.vectors[tensor.vector], routed.results[0]
        if ids is result or self.graph.are_tied(len(self.calls), ids, result):
            return tensor
        return replace(tensor, zeroed=False, steady=False)

    def share(self, name: str, routed: Routed, flow: Flow) -> None:
        """A layer that is called again has the same weights and config, hence the same channels along their axes."""
        rule, weights = self.layers[name].rule, self.layers[name].weights
        unlike = bool(weights) and any(weight.whole for weight in weights) != routed.padded
        if unlike or (rule is None and routed.followed):
            earlier = [ids for ids in self.sides[name].values() if ids is not None]
            for ids in (*earlier, *(signal.ids for signal in flow.inputs), *(ids for ids, _ in routed.results)):
                self.graph.pin(ids, f"{name} is called in two ways that do not agree")
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

    def tie_weights_of_others(self, name: str, layer: Layer) -> None:
        """Of weights that another layer holds too, as two TimeDistributed around one layer, the same channels stay."""
        for weight in layer.weights:
            other, known = self.held.setdefault(id(variable(layer.operation, weight.name)), (name, weight))
            if known is weight:
                continue
            for one, two in zip(weight.vectors, known.vectors, strict=True):
                sides = [self.graph.vectors[vector] for vector in (one, two) if vector >= 0]
                if len(sides) == 2 and weight.whole == known.whole:
                    self.graph.tie(*sides)
                else:
                    for ids in sides:
                        self.graph.pin(ids, f"{name} and {other} use one weight in two ways that do not agree")

    def signal(self, number: int) -> Signal:
        tensor = self.tensors[number]
        ids = self.graph.vectors[tensor.vector]
        return Signal(ids, tensor.axis, tensor.shape, tensor.zeroed, tensor.masked, tensor.steady, tensor.rows)

    def place(self, source: Any, spec: Any, tensor: Tensor) -> int:
        """Add a tensor, which one of Keras's own stands for; its number."""
        number = self.numbers[source] = len(self.tensors)
        self.specs[source] = spec
        self.tensors.append(tensor)
        return number

    def hidden(self, ids: np.ndarray) -> int:
        self.tensors.append(Tensor(self.graph.vector(ids), 1, (None, len(ids))))
        return len(self.tensors) - 1

    def spec(self, source: Any) -> Any:
        return self.specs.get(source, source)

    def output_specs(self, node: Any) -> list[Any]:
        """Results of a call; inside a nested model their sizes follow from the tensors that it is called on."""
        inputs = node.arguments.keras_tensors
        if all(tuple(self.spec(source).shape) == tuple(source.shape) for source in inputs):
            return list(node.outputs)
        args, kwargs = filled(node.arguments, self.spec)
        return tree.flatten(node.operation.compute_output_spec(*args, **kwargs))

    def ends(self, sources: Iterable[Any], reason: str) -> tuple[int, ...]:
        """Numbers of the model's own inputs or outputs, whose channels are pinned."""
        numbers = tuple(self.numbers[source] for source in sources)
        for number in numbers:
            self.graph.pin(self.graph.vectors[self.tensors[number].vector], reason)
        return numbers

    def pin_what_unknown_layers_hold(self) -> None:
        """A layer that we know, and that one that we do not know holds too, stays as it is for both."""
        for holder, layer in held_by_unknown(self.layers.values()):
            for vector in {vector for weight in layer.weights for vector in weight.vectors if vector >= 0}:
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
    given, taken = taken_by(operation, function, node.arguments), function.inputs
    fits = len(given) == len(taken) and all(
        len(a.shape) == len(b.shape) and a.dtype == b.dtype for a, b in zip(given, taken, strict=False)
    )
    return function if fits and len(function.outputs) == len(node.outputs) else None


STEPS = Rule(same, "strict", zero=always)


@dataclass(frozen=True)
class Steps:
    """Stands in a graph for a TimeDistributed around a model, whose layers stand there themselves."""

    name: str


def _steps_into_batch(x: Any) -> Any:
    return ops.reshape(x, (-1, *x.shape[2:]))


def _steps_out_of_batch(x: Any, *, steps: int) -> Any:
    return ops.reshape(x, (-1, steps, *x.shape[1:]))


@dataclass(frozen=True)
class _Inside:
    """What a call consists of: the graph of a nested model, what is recorded of a layer, or a model called at every step."""

    function: Any
    recorded: bool = False
    stepped: bool = False


@dataclass(frozen=True)
class _Given:
    """What a call is given, and the row by which it is followed.

    Attributes:
        rule: the row, or None.
        names: the argument that each operand is, or is part of.
        sources: the operands, Keras's own tensors.
        masks: those that are masks.
    """

    rule: Rule | None
    names: tuple[str, ...]
    sources: tuple[Any, ...]
    masks: tuple[Any, ...]

    @classmethod
    def of(cls, node: Any, chain: Chain | None) -> "_Given":
        if chain is not None:
            return cls(chain.rule, ("",) * len(chain.sources), chain.sources, ())
        rule = ENTER if node.is_input else rule_for(node.operation)
        given, for_masks = _arguments(node), rule.masks if rule else ()
        operands = [(name, x) for name, x in given if name not in for_masks]
        masks = tuple(x for name, x in given if name in for_masks)
        return cls(rule, tuple(name for name, _ in operands), tuple(x for _, x in operands), masks)


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
    made = flow.graph.make(flow.name, shape[axis] or 0 if len(shape) > 1 else 0)
    return Routed([(made, axis)], mode="input", followed=False)


ENTER = Rule(_enter, "input")


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
        tokens = _tokens(operation, name, axes, shape, signals)
        along = (routed.sides.get(token) for token in tokens)
        vectors = (
            graph.vector(ids) if ids is not None and len(ids) == size else -1
            for ids, size in zip(along, shape, strict=True)
        )
        multiplies = rule.multiplies.get(name)
        scores, reads = _place(rule.scored.get(name, "out" if multiplies else ""), tokens), _place("in", tokens)
        weights.append(Weight(name, shape, tuple(vectors), multiplies, scores, reads, whole=routed.padded))
    return tuple(weights)


def _tokens(operation: Any, name: str, axes: str, shape: tuple[int, ...], signals: list[Signal]) -> list[str]:
    """The token of each axis of a weight."""
    if axes == "*":
        return ["in" if axis + 1 == signals[0].axis else "-" for axis in range(len(shape))]
    tokens = axes.split()
    if len(tokens) != len(shape):
        raise KerasMorphError(
            f"{operation.name}: the rule of {type(operation).__name__} says {name}={axes!r}. "
            f"Expected one word per axis of that weight. Received: a weight of shape {shape}."
        )
    return tokens


def _place(token: str, tokens: list[str]) -> int | None:
    return tokens.index(token) if token in tokens else None
