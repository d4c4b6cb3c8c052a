"""From a Keras model to its ChannelGraph. The only file that reads the private attributes of Keras's graph."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_morph.channels import Call, ChannelGraph, GraphBuilder, Layer, Tensor, Weight
from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.layer_rules import Flow, Routed, Rule, Signal, rule_for, unknown

__all__ = ["structs", "trace"]


def trace(
    model: keras.Model | ChannelGraph, *, protect: Sequence[str] = (), tie: Sequence[Sequence[str]] = ()
) -> ChannelGraph:
    """Follow every channel of a model: who makes it, what ties it, who reads it.

    Args:
        model: a functional or Sequential model that is built. A ChannelGraph is handed back as it is.
        protect: regular expressions; layers whose whole name matches one keep all their channels.
        tie: lists of layer names; the layers of one list keep the same channels, index by index.

    Returns:
        The ChannelGraph. `print(graph)` shows it.

    Raises:
        UnsupportedModelError: if the model has no graph (a subclassed model, or one that is not built).
        KerasMorphError: if `protect` or `tie` name layers that are not there.
    """
    if isinstance(model, ChannelGraph):
        return model
    function = _graph_of(model)
    tracer = _Tracer(function)
    tracer.run()
    _protect(tracer.graph, protect)
    _tie(tracer.graph, tie)
    return tracer.finish(model)


def structs(graph: ChannelGraph) -> tuple[Any, Any]:
    """How the traced model's inputs and outputs are nested: a tensor, or lists and dictionaries of them."""
    function = _graph_of(graph.model)
    return function._inputs_struct, function._outputs_struct


def _graph_of(model: Any) -> Any:
    """The functional graph inside a model."""
    if isinstance(model, keras.Sequential):
        if not model.built or getattr(model, "_functional", None) is None:
            raise UnsupportedModelError(
                f"{model.name} is not built, so it has no graph to trace. Expected a model with a known input shape. "
                f"Received: an unbuilt Sequential; add keras.Input(shape) in front or call {model.name}.build(shape)."
            )
        return model._functional
    if hasattr(model, "_nodes_by_depth"):
        return model
    name = getattr(model, "name", repr(model))
    raise UnsupportedModelError(
        f"{name} has no graph to trace. Expected a functional or Sequential model. "
        f"Received: {type(model).__name__}, a subclass whose call() is plain Python; "
        "build it as keras.Model(inputs, outputs), or wrap only its traceable part."
    )


class _Tracer:
    """One pass over the calls of a graph in the order in which they run."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.graph = GraphBuilder()
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.layers: dict[str, Layer] = {}
        self.layer_numbers: dict[str, int] = {}
        self.sides: dict[str, dict] = {}
        self.calls: list[Call] = []
        first = any(getattr(op, "data_format", None) == "channels_first" for op in function._operations)
        self.default_axis = (lambda rank: min(1, rank - 1)) if first else (lambda rank: rank - 1)

    def run(self) -> None:
        for depth in sorted(self.function._nodes_by_depth, reverse=True):
            for node in self.function._nodes_by_depth[depth]:
                self.call(node)

    def call(self, node: Any) -> None:
        operation, name = node.operation, node.operation.name
        sources = tuple(node.arguments.keras_tensors)
        inputs = tuple(self.numbers[id(source)] for source in sources)
        signals = [self.signal(number) for number in inputs]
        shapes = [tuple(output.shape) for output in node.outputs]
        flow = Flow(name, operation, signals, shapes, self.graph, self.default_axis)
        rule = None if node.is_input else rule_for(operation)
        routed = _enter(flow) if node.is_input else (rule.flow if rule else unknown)(flow)
        if name in self.layers:
            self.share(name, routed)
        else:
            weights = _weights(operation, rule, routed, signals, self.graph) if rule else ()
            made = self.graph.made.get(name)
            self.layers[name] = Layer(name, type(operation).__name__, operation, rule, weights, made)
            self.sides[name] = dict(routed.sides)
        outputs = tuple(
            self.tensor(*result, source) for result, source in zip(routed.results, node.outputs, strict=True)
        )
        mode = routed.mode or (rule.mode if rule else "strict")
        layer = self.layer_numbers.setdefault(name, len(self.layer_numbers))
        self.calls.append(Call(layer, mode, inputs, outputs, node.arguments, sources))

    def share(self, name: str, routed: Routed) -> None:
        """A layer that is called again has the same weights, hence the same channels along their axes."""
        for token, ids in self.sides[name].items():
            again = routed.sides.get(token)
            if ids is not None and again is not None:
                self.graph.tie(ids, again)
            elif (known := again if ids is None else ids) is not None:
                self.graph.pin(known, f"{name} is called in two ways that do not agree")

    def signal(self, number: int) -> Signal:
        tensor = self.tensors[number]
        return Signal(self.graph.vectors[tensor.vector], tensor.axis, tensor.shape)

    def tensor(self, ids: np.ndarray, axis: int, source: Any) -> int:
        number = self.numbers[id(source)] = len(self.tensors)
        self.tensors.append(Tensor(self.graph.vector(ids), axis, tuple(source.shape)))
        return number

    def ends(self, sources: Iterable[Any], reason: str) -> tuple[int, ...]:
        """Numbers of the model's own inputs or outputs, whose channels are pinned."""
        numbers = tuple(self.numbers[id(source)] for source in sources)
        for number in numbers:
            self.graph.pin(self.graph.vectors[self.tensors[number].vector], reason)
        return numbers

    def finish(self, model: Any) -> ChannelGraph:
        inputs = self.ends(self.function.inputs, "model input")
        outputs = self.ends(self.function.outputs, "model output")
        group_of, pinned = self.graph.groups()
        layers = tuple(self.layers.values())
        owner = np.zeros(self.graph.num_channels, np.int64)
        for name, made in self.graph.made.items():
            owner[made] = self.layer_numbers[name.split(":")[0]]
        return ChannelGraph(
            model=model,
            layers=layers,
            calls=tuple(self.calls),
            tensors=tuple(self.tensors),
            vectors=tuple(self.graph.vectors),
            inputs=inputs,
            outputs=outputs,
            group_of=group_of,
            pinned=pinned,
            owner=owner,
        )


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
        variable = getattr(operation, name, None)
        if variable is None:
            continue
        shape = tuple(variable.shape)
        if axes == "*":
            tokens = ["in" if axis + 1 == signals[0].axis else "-" for axis in range(len(shape))]
        else:
            tokens = axes.split()
        vectors = tuple(
            graph.vector(ids) if (ids := routed.sides.get(token)) is not None and len(ids) == size else -1
            for token, size in zip(tokens, shape, strict=True)
        )
        multiplies = rule.multiplies.get(name)
        scores = tokens.index("out") if multiplies and "out" in tokens else None
        weights.append(Weight(name, shape, vectors, multiplies, scores))
    return tuple(weights)


def _protect(graph: GraphBuilder, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        names = [name for name in graph.made if re.fullmatch(pattern, name)]
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
