"""From a Keras model to its ChannelGraph."""

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_morph import layer_rows, operation_rows, sequence_rows  # noqa: F401 -- they fill the table
from keras_morph.channels import Call, ChannelGraph, GraphBuilder, Layer, Scope, Tensor, Weight
from keras_morph.composites import local_names, recordings_in
from keras_morph.errors import KerasMorphError, UnknownLayerWarning
from keras_morph.keras_graph import graph_in, graph_of, nodes_of, operations_of
from keras_morph.layer_rules import Flow, Routed, Rule, Signal, fresh, rule_for, variable

__all__ = ["trace"]


def trace(
    model: keras.Model | ChannelGraph,
    *,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> ChannelGraph:
    """Follow every channel of a model: who makes it, what ties it, who reads it.

    Args:
        model: a functional or Sequential model that is built. A ChannelGraph is handed back as it is.
        protect: regular expressions; layers whose whole name matches one keep all their channels.
        tie: lists of layer names; the layers of one list keep the same channels, index by index.
        grouped: how grouped convolutions are narrowed: "whole" conv groups, or "equal" counts in every conv group.

    Returns:
        The ChannelGraph. `print(graph)` shows it.

    Warns:
        UnknownLayerWarning: once for all layers that we do not know, whose channels are pinned.

    Raises:
        UnsupportedModelError: if the model has no graph (a subclassed model, or one that is not built).
        KerasMorphError: if `protect` or `tie` name layers that are not there, or `grouped` is neither.
    """
    if isinstance(model, ChannelGraph):
        return model
    if grouped not in ("whole", "equal"):
        raise KerasMorphError(f'Expected grouped="whole" or grouped="equal". Received: grouped={grouped!r}.')
    function = graph_of(model)
    tracer = _Tracer(function, grouped)
    tracer.run(function)
    _protect(tracer.graph, protect)
    _tie(tracer.graph, tie)
    graph = tracer.finish(model)
    _warn_of_unknown(graph)
    return graph


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
        shuffles: dict[int, _Shuffle | None] = {}  # node -> the shuffle that it ends, or None inside of one
        for node in nodes:
            if node.is_input and prefix:
                continue  # a nested model's input is the tensor that it is called on
            name = prefix + names.get(id(node.operation), node.operation.name)
            nested = None if node.is_input else _nested_in(node)
            recording = self.recording(node, recordings)
            if nested is not None or recording is not None:
                self.nest(node, nested or recording, name, recorded=recorded or nested is None)
                continue
            if type(node.operation).__name__ == "Reshape" and id(node) not in shuffles:
                shuffles.update(self.follow_shuffle(node, users))
            shuffle = shuffles.get(id(node))
            if shuffle is not None or id(node) not in shuffles:
                self.call(node, name, shuffle)

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
        ends = [
            tuple(self.numbers[id(source)] for source in sources) for sources in (function.inputs, function.outputs)
        ]
        self.scopes.append(Scope(name, node.operation, function, node.arguments, start, len(self.calls), *ends))

    def call(self, node: Any, name: str, shuffle: "_Shuffle | None" = None) -> None:
        operation = node.operation
        name = self.names.setdefault(id(operation), name)  # a layer of two nested models has the name of its first call
        sources = (shuffle.source,) if shuffle else tuple(node.arguments.keras_tensors)
        inputs = tuple(self.numbers[id(source)] for source in sources)
        signals = [self.signal(number) for number in inputs]
        specs = self.output_specs(node)
        flow = Flow(
            name,
            operation,
            signals,
            [tuple(spec.shape) for spec in specs],
            self.graph,
            self.default_axis,
            node.arguments.args,
            node.arguments.kwargs,
            self.grouped,
        )
        rule = None if node.is_input else rule_for(operation)
        if shuffle:
            routed = Routed(
                [(signals[0].ids[shuffle.order], signals[0].axis)], mode="uniform", gathers=(shuffle.order,)
            )
        else:
            routed = _enter(flow) if node.is_input else rule.flow(flow) if rule else self.unknown(flow)
        rule = rule if routed.followed else None
        if name in self.layers:
            self.share(name, routed)
        else:
            weights = _weights(operation, rule, routed, signals, self.graph) if rule else ()
            made = self.graph.made.get(name)
            self.layers[name] = Layer(name, type(operation).__name__, operation, rule, weights, made)
            self.sides[name] = dict(routed.sides)
        outputs = tuple(
            self.tensor(*result, source, spec)
            for result, source, spec in zip(routed.results, node.outputs, specs, strict=True)
        )
        if routed.hidden is not None:
            inputs += (self.hidden(routed.hidden),)
        mode = routed.mode or (rule.mode if rule else "strict")
        layer = self.layer_numbers.setdefault(name, len(self.layer_numbers))
        self.calls.append(Call(layer, mode, inputs, outputs, node.arguments, sources, routed.gathers))

    def unknown(self, flow: Flow) -> Routed:
        """A layer without a row, and where it might have been followed, why it was not."""
        reason = self.refused.get(id(flow.operation))
        return fresh(
            flow,
            f"is a layer that we do not know ({type(flow.operation).__name__}{f'; it {reason}' if reason else ''})",
        )

    def follow_shuffle(self, node: Any, users: dict[int, list[Any]]) -> dict[int, "_Shuffle | None"]:
        """The channel shuffle that begins at a reshape: its nodes, of which the last one stands for all; or nothing.

        The chain is run on the numbers of the elements: if it ends in the shape that it began with, and every
        position holds the channels that it held before in one and the same order, then it is a gather of channels.
        """
        source = node.arguments.keras_tensors[0]
        tensor, shape = self.tensors[self.numbers[id(source)]], tuple(source.shape[1:])
        if len(node.outputs[0].shape) <= len(source.shape) or None in shape or math.prod(shape) > LARGEST_SHUFFLE:
            return {}
        start = values = np.arange(math.prod(shape), dtype=np.int32).reshape(1, *shape)
        chain: dict[int, _Shuffle | None] = {}
        while node is not None and type(node.operation).__name__ in ("Reshape", "Permute", "Transpose", "Swapaxes"):
            values = keras.ops.convert_to_numpy(node.operation(keras.ops.convert_to_tensor(values)))
            chain[id(node)] = None
            if values.shape == start.shape:
                before, after = (
                    np.moveaxis(x, tensor.axis, -1).reshape(-1, x.shape[tensor.axis]) for x in (start, values)
                )
                order = np.searchsorted(before[0], after[0]) % len(before[0])
                if np.array_equal(before[:, order], after):
                    return chain | {id(node): _Shuffle(source, order)}
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
        return Signal(self.graph.vectors[tensor.vector], tensor.axis, tensor.shape)

    def tensor(self, ids: np.ndarray, axis: int, source: Any, spec: Any) -> int:
        number = self.numbers[id(source)] = len(self.tensors)
        self.specs[id(source)] = spec
        self.tensors.append(Tensor(self.graph.vector(ids), axis, tuple(spec.shape)))
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
            held = {id(layer) for layer in holder.operation._flatten_layers(include_self=False)}
            for layer in self.layers.values():
                if id(layer.operation) in held:
                    vectors = [vector for weight in layer.weights for vector in weight.vectors if vector >= 0]
                    for vector in vectors:
                        self.graph.pin(self.graph.vectors[vector], f"{holder.name} uses {layer.name} too")

    def finish(self, model: Any) -> ChannelGraph:
        inputs = self.ends(self.function.inputs, "model input")
        outputs = self.ends(self.function.outputs, "model output")
        self.pin_what_unknown_layers_hold()
        group_of, pinned = self.graph.groups()
        owner = np.zeros(self.graph.num_channels, np.int64)
        for name, made in self.graph.made.items():
            owner[made] = self.layer_numbers[name.split(":")[0]]
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


LARGEST_SHUFFLE = 1 << 22  # elements of a tensor whose shuffle is followed


@dataclass(frozen=True)
class _Shuffle:
    """A chain of reshapes and transpositions that ends in a permutation of channels."""

    source: Any
    order: np.ndarray


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
        weights.append(Weight(name, shape, vectors, multiplies, scores, reads))
    return tuple(weights)


def _warn_of_unknown(graph: ChannelGraph) -> None:
    calls = [call for call in graph.calls if graph.layers[call.layer].rule is None and call.mode != "input"]
    if not calls:
        return
    layers = dict.fromkeys(f"{graph.layers[call.layer].name} ({graph.layers[call.layer].kind})" for call in calls)
    touched = {graph.tensors[tensor].vector for call in calls for tensor in (*call.inputs, *call.outputs)}
    pinned = graph.group_of[np.concatenate([graph.vectors[vector] for vector in touched])]
    warnings.warn(
        f"{graph.model.name} has layers that we cannot follow: {', '.join(layers)}. What they read and make cannot be "
        f"removed, {np.isin(graph.group_of, pinned).sum():,} of {graph.num_channels:,} channels; everything else can. "
        "keras_morph.register_rule tells us of a layer of yours.",
        UnknownLayerWarning,
        stacklevel=1,  # one place for all callers, so that Python shows it once however often the model is traced
    )


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
