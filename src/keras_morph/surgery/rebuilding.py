"""Make the smaller model of a structure: replay the traced calls with narrower layers, as planned (planning.py).

A tensor of the rebuilt model is a Keras tensor with the alive channels only; or nothing, where no channel is alive; or
a constant, where nothing alive makes it. Constants are computed with the seed's own layers and folded where they meet
what is alive, at a merge.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras import layers, ops, tree

from keras_morph.channels import Call, ChannelGraph, Layer, Weight, on_axis
from keras_morph.errors import KerasMorphError, UnknownLayerWarning, UnsupportedModelError
from keras_morph.graph.closure import LIVE, Closed, close
from keras_morph.graph.replaying import called, filled, model_like, replay
from keras_morph.graph.structure import Structure, graph_and_structure, repeated
from keras_morph.graph.tracing import graph_of, trace, trace_as
from keras_morph.keras_internals import (
    functional_in,
    made_from,
    maker_of,
    parts_of,
    recorded_arguments,
    remade,
    structs,
    taken_by,
)
from keras_morph.layers.rules import Rewriting, variable
from keras_morph.surgery.copying import Held, cloned, transfer
from keras_morph.surgery.folding import Constants, DeadValues, fold
from keras_morph.surgery.planning import Nested, Step, plan

__all__ = ["as_computed", "masked", "rebuild"]


def rebuild(model: Any, structure: Any, *, weights: bool = True) -> keras.Model:
    """The model of a structure: narrower layers, dead layers and branches gone.

    Args:
        model: the seed that the structure belongs to, its ChannelGraph, or a StructureLearner.
        structure: a Structure, `{layer: count}`, or a path to either's JSON; counts keep the first channels.
        weights: whether the result gets the seed's weights, so that it computes what the masked seed computes, or
            fresh ones.

    Returns:
        A functional model of stock Keras layers and operations, with the seed's name, layer names, inputs and outputs.
        Layers that we do not know stay as they are; one that cannot be made anew from its config (a Lambda, a layer
        without `get_config`) is shared with the seed.

    Raises:
        StructureMismatchError: if the structure is not one of this seed.

    Example:
        >>> structure = km.fit_budget(model, "50%")
        >>> small = km.rebuild(model, structure)
        >>> small.count_params() == km.ModelSize()(model, structure)
        True
    """
    graph, closed = _closed(model, structure)
    if weights:
        _check_not_expanded(closed)
    return _Rebuilding(graph, closed, weights, _gates(model)).model()


def masked(model: Any, structure: Any) -> keras.Model:
    """The seed with every dead channel cut off: what makes it and the rows by which it is read are zero.

    Args:
        model: as in `rebuild`.
        structure: as in `rebuild`.

    Returns:
        A copy of the seed, of its full size.

    Example:
        >>> structure = km.fit_budget(model, "50%")
        >>> one, other = (each(model, structure).predict(x, verbose=0) for each in (km.rebuild, km.masked))
        >>> np.allclose(one, other, atol=1e-5)
        True
    """
    graph, closed = _closed(model, structure)
    gates = _gates(model)
    _check_not_expanded(closed)
    copy = cloned(graph.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLayerWarning)
        own = {layer.name: layer.operation for layer in trace(copy).layers}
    for layer, weight, dead in graph.dead_entries(closed.channels):
        if own[layer.name] is layer.operation:
            raise _without_config(layer)
        variable(own[layer.name], weight.name).assign(np.where(dead, 0, _values(graph, layer, weight, gates)))
    return copy


def as_computed(model: Any) -> ChannelGraph:
    """The graph of what a model computes: of a learner whose gates stand in front of its kernels, that of kernels with gates."""
    graph = graph_of(model)
    if _gates(model) is None:
        return graph
    whole = Structure.closed(graph, np.ones(graph.num_groups, bool))
    return trace_as(rebuild(model, whole), graph.wiring)


def _without_config(layer: Layer) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{layer.name} has a rule, so it is to be narrowed, but it cannot be made anew from its config. Expected a "
        f"get_config that holds all arguments of {layer.kind}. Received: none, or one that {layer.kind}.from_config "
        "refuses."
    )


def _closed(model: Any, structure: Any) -> tuple[ChannelGraph, Closed]:
    graph, structure = graph_and_structure(model, structure)
    return graph, close(graph, structure.copies(graph))


def _check_not_expanded(closed: Closed) -> None:
    if closed.channels.max(initial=0) > 1:
        raise KerasMorphError(
            "An expanded structure is wider than its seed, whose weights do not fill it. Expected: weights=False."
        )


def _gates(model: Any) -> np.ndarray | None:
    return model.gate_values() if getattr(model, "gates", None) is not None else None


def _values(graph: ChannelGraph, layer: Layer, weight: Weight, gates: np.ndarray | None) -> np.ndarray:
    """The seed's weight; what reads channels is multiplied by their gates."""
    values = ops.convert_to_numpy(variable(layer.operation, weight.name))
    if gates is None or weight.reads is None or layer.made is None:
        return values
    factors = graph.along(weight, gates[graph.group_of]).get(weight.reads, np.ones(1))
    return values * on_axis(factors, weight.reads, values.ndim).astype(values.dtype)


class _Rebuilding:
    """Acts out a plan, from the inputs to the outputs: each step makes the tensors of the smaller model that it stands for."""

    def __init__(self, graph: ChannelGraph, closed: Closed, weights: bool, gates: np.ndarray | None = None) -> None:
        self.graph, self.closed, self.weights, self.gates = graph, closed, weights, gates
        self.tensors: dict[int, Any] = {}
        self.copies: dict[tuple[int, str], Any] = {}
        self.models: dict[tuple, Any] = {}
        self.wholes: dict[tuple, tuple[Any, Any]] = {}
        self.held = Held()
        self.taken: dict[str, dict[str, tuple[str, int]]] = {}  # prefix -> name there -> whose
        self.folds: Counter[str] = Counter()  # of each merge
        self.prefix = ""
        self.constants, self.dead = Constants(graph), DeadValues(graph)
        self.ways: dict[str, Callable[[Call], list[Any]]] = {
            "enter": lambda call: [self.copy(call).output],
            "pick": self.pick,
            "compute": lambda call: called(call, None, lambda number, _: self.tensors[number]),
            "fold": self.fold,
            "hand on": lambda call: self.unmasked(call, self.live(call)),
            "reduce": lambda call: tree.flatten(self.copy(call)(self.live(call))),
            "fill": self.fill,
            "apply": lambda call: self.apply(call, self.values(call)),
        }

    def model(self) -> keras.Model:
        graph = self.graph
        replay(plan(graph, self.closed, self.filling), self.tensors, self.act)
        inputs, outputs = [self.tensors[t] for t in graph.inputs], [self.tensors[t] for t in graph.outputs]
        model = model_like(graph.model, inputs, self.named(outputs), graph.model.name)
        if self.weights:
            for (number, _), copy in self.copies.items():
                self.carry(graph.layers[number], copy)
            for source, target in self.wholes.values():
                transfer(source, target)
        return model

    def named(self, outputs: list[Any]) -> list[Any]:
        """Several outputs under the seed's names, by which losses are given: what made one may be gone."""
        names = functional_in(self.graph.model).output_names
        made = [maker_of(output).name for output in outputs]
        if len(outputs) == 1 or len(set(names)) < len(names):
            return outputs
        for copy in self.copies.values():  # a merge of what is left, behind which a constant is added
            if copy.name in names and copy.name not in made:
                copy.name = self.local(f"{copy.name}_merged")
        return [
            output if name in made else layers.Identity(name=name, dtype=output.dtype)(output)
            for output, name in zip(outputs, names, strict=True)
        ]

    @cached_property
    def held_models(self) -> set[int]:
        """Ids of what layers hold that we do not know."""
        unknown = (layer.operation for layer in self.graph.layers if layer.rule is None)
        return {id(part) for each in unknown if isinstance(each, layers.Layer) for part in parts_of(each, itself=False)}

    def act(self, step: Step | Nested) -> Any:
        return self.nest(step) if isinstance(step, Nested) else self.ways[step.way](step.call)

    def nest(self, step: Nested) -> Any:
        """Call a nested model, which the first call makes."""
        scope, given = step.scope, [self.tensors[t] for t in step.scope.inputs]
        if step.key not in self.models:
            held = id(scope.model) in self.held_models  # by a layer that we do not know, so that all of it stays
            known = self.held.of(scope.model) if held else None
            whole = known or step.copy
            self.models[step.key] = self.narrower(step) if whole is None else whole
            if whole is not None:
                self.wholes[step.key] = scope.model, whole
            elif held:
                self.held.add(scope.model, self.models[step.key])
        model = self.models[step.key]
        if step.key in self.wholes:  # its call takes what the seed's takes
            values = dict(zip(taken_by(scope.model, scope.function, scope.arguments), given, strict=True))
            args, kwargs = filled(scope.arguments, values.get)
            return model(*args, **kwargs)
        return model(given[0] if scope.stepped else tree.pack_sequence_as(structs(scope.function)[0], given))

    def narrower(self, step: Nested) -> Any:
        """A nested model of what is alive inside."""
        scope, first, last = step.scope, self.graph.calls[step.scope.start], self.graph.calls[step.scope.stop - 1]
        # A TimeDistributed's model stands between the calls that move the axis of time.
        sources, results = (first.outputs, last.inputs) if scope.stepped else (scope.inputs, scope.outputs)
        inputs = [self.input_like(*ends) for ends in zip(sources, scope.inputs, scope.function.inputs, strict=True)]
        again = sum(model == id(scope.model) for model, *_ in self.models)
        name, outer = self.local(scope.name, again), (self.tensors, self.prefix)
        self.tensors, self.prefix = dict(zip(sources, inputs, strict=True)), f"{scope.name}/"
        replay(step.steps, self.tensors, self.act)
        outputs = [self.tensors[t] for t in results]
        self.tensors, self.prefix = outer
        model = model_like(scope.function, inputs, outputs, scope.function.name if scope.stepped else name)
        return layers.TimeDistributed(model, name=name) if scope.stepped else model

    def input_like(self, number: int, given: int, source: Any) -> Any:
        """An input of a nested model for one of its tensors, of its own sizes: it may be called on images of several."""
        tensor, shape = self.graph.tensors[number], list(source.shape)
        shape[tensor.axis] = self.closed.counts[tensor.vector] or shape[tensor.axis]
        return keras.Input(batch_shape=shape, dtype=self.tensors[given].dtype)

    def local(self, name: str, again: int = 0) -> str:
        """A name in the model that is being made; what is inside a nested one that was taken apart keeps both names.

        Args:
            name: in the seed, or of something new.
            again: how often it was made before: its first copy has the seed's name, which no other takes.
        """
        if self.prefix not in self.taken:
            inside = (layer.name for layer in self.graph.layers if layer.name.startswith(self.prefix))
            owners = {each.removeprefix(self.prefix): (each, 0) for each in inside}
            self.taken[self.prefix] = {own: owner for own, owner in owners.items() if "/" not in own}
        taken = self.taken[self.prefix]
        unique = short = name.removeprefix(self.prefix).replace("/", "_") + (f"_{again}" if again else "")
        number = 0
        while taken.setdefault(unique, (name, again)) != (name, again):
            number += 1
            unique = f"{short}_{number}"
        return unique

    def kept(self, vector: int) -> np.ndarray:
        """Positions of a vector that are alive."""
        return self.alive(self.graph.channels_of(vector))

    def alive(self, ids: np.ndarray) -> np.ndarray:
        return repeated(self.closed.channels[ids])

    def live(self, call: Call) -> list[Any]:
        return [self.tensors[t] for t in call.operands if self.closed.states[t] == LIVE]

    def values(self, call: Call) -> dict[Any, Any]:
        """What the copy reads for each of Keras's tensors among a call's arguments."""
        values = {source: self.tensors[number] for source, number in call.numbers.items()}
        for source, axis in zip(call.sources, call.takes, strict=False):
            if axis >= 0:
                values[source] = self.taken_alive(values[source], call.outputs[0], axis)
        return values

    def fill(self, call: Call) -> list[Any]:
        """A call at full width, of which the alive channels are taken."""
        values, (source,), (operand,) = self.values(call), call.sources, call.operands
        results = zip(
            call.outputs, self.apply(call, values | {source: self.filled_up(values[source], operand)}), strict=True
        )
        return [self.taken_alive(x, output, self.graph.tensors[output].axis) for output, x in results]

    def taken_alive(self, x: Any, number: int, axis: int) -> Any:
        """The entries along an axis that are alive in a tensor of the seed."""
        tensor = self.graph.tensors[number]
        kept = self.kept(tensor.vector)
        whole = np.array_equal(kept, np.arange(len(self.graph.channels_of(tensor))))
        return x if whole else ops.take(x, kept, axis=axis)

    def filled_up(self, x: Any, number: int) -> Any:
        """A tensor with as many channels as in the seed, with the values of the masked seed for those that are dead."""
        tensor = self.graph.tensors[number]
        kept, width = self.kept(tensor.vector), len(self.graph.channels_of(tensor))
        if len(kept) == width:
            return x
        places = np.full(width, len(kept))
        places[kept] = np.arange(len(kept))
        values = self.filling(number)
        widths = [(0, int(axis == tensor.axis)) for axis in range(len(tensor.shape))]
        filled = ops.take(ops.pad(x, widths), places, axis=tensor.axis)
        if not values.any():
            return filled
        shape = (-1, *[1] * (len(tensor.shape) - tensor.axis - 1))
        # Yes and no cannot be added up on every backend.
        join = ops.logical_or if x.dtype == "bool" else ops.add
        return join(filled, values.reshape(shape).astype(x.dtype))

    def filling(self, number: int) -> np.ndarray:
        """What fills a tensor up: for each channel that is dead its value in the masked seed, else 0."""
        dead = self.closed.channels[self.graph.channels_of(self.graph.tensors[number])] == 0
        return np.where(dead, self.dead[number], 0.0) if self.weights and dead.any() else np.zeros(len(dead))

    def unmasked(self, call: Call, results: list[Any]) -> list[Any]:
        """Results without the mask that what is left of a call may hand on, where the call itself hands on none."""
        tensors = self.graph.tensors
        if not any(tensors[t].masked for t in call.inputs):
            return results
        return [x if tensors[t].masked else ops.copy(x) for t, x in zip(call.outputs, results, strict=True)]

    def apply(self, call: Call, values: dict[Any, Any]) -> list[Any]:
        """Call the copy with its arguments rewritten and with these values for the seed's tensors."""
        rule, arguments = self.graph.layers[call.layer].rule, call.arguments
        if rule and rule.rewrite:
            operand, result = self.graph.tensors[call.inputs[0]], self.graph.tensors[call.outputs[0]]
            rewriting = Rewriting(operand, result, self.kept(operand.vector), self.kept(result.vector))
            args, kwargs = rule.rewrite(arguments.args, arguments.kwargs, rewriting)
            arguments = recorded_arguments(*args, **kwargs)
        args, kwargs = filled(arguments, values.__getitem__)
        return tree.flatten(self.copy(call)(*args, **kwargs))

    def pick(self, call: Call) -> list[Any]:
        """Pick channels by index: slices, splits and shuffles of what is left of a channel axis."""
        operand, x = self.graph.tensors[call.inputs[0]], self.tensors[call.inputs[0]]
        axis, rule = operand.axis, self.graph.layers[call.layer].rule
        if rule and rule.rewrite:  # the part of the call that picks no channels
            axis = self.graph.tensors[call.outputs[0]].axis
            (x,) = self.apply(call, {call.sources[0]: x})
        kept = self.kept(operand.vector)
        results = []
        for number, positions in zip(call.outputs, call.gathers, strict=True):
            wanted = self.kept(self.graph.tensors[number].vector)
            copy = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)  # which of the copies
            chosen = np.searchsorted(kept, positions[wanted]) + copy
            whole = np.array_equal(chosen, np.arange(len(kept)))
            results.append(x if whole or not len(chosen) else ops.take(x, chosen, axis=axis))
        return self.unmasked(call, results)

    def fold(self, call: Call) -> list[Any]:
        """A merge with operands that are constant."""
        operation, live = self.graph.layers[call.layer].operation, self.live(call)
        if not self.weights and (len(live) == 1 or isinstance(operation, layers.Layer)):
            # With fresh weights the constants are not known yet: they are left out.
            return self.unmasked(call, [live[0] if len(live) == 1 else self.copy(call)(live)])
        values = {source: self.live_or_constant(call, number) for source, number in call.numbers.items()}
        if not isinstance(operation, layers.Layer):
            return self.unmasked(call, self.apply(call, values)[:1])
        operands = [values[source] for source in call.sources]
        self.folds[operation.name] += 1
        again = self.folds[operation.name] - 1
        name = self.local(f"{operation.name}_constant", again)
        return self.unmasked(call, [fold(operation, operands, lambda: self.copy(call)(live), name)])

    def live_or_constant(self, call: Call, number: int) -> Any:
        """An operand of a merge: the tensor, or one number for each channel that is alive in the result."""
        if self.closed.states[number] == LIVE:
            return self.tensors[number]
        result = self.graph.tensors[call.outputs[0]]
        constants = self.constants[number] if self.weights else np.zeros_like(self.constants[number])
        return constants[self.kept(result.vector)].reshape(-1, *[1] * (len(result.shape) - result.axis - 1))

    def copy(self, call: Call) -> Any:
        """The narrower copy of a call's layer; of one without weights a copy for each of its configurations."""
        layer = self.graph.layers[call.layer]
        rule = layer.rule
        narrows = rule is not None and (layer.weights or rule.narrow or rule.width)
        config = self.config(layer, call) if narrows else None
        key = call.layer, "" if layer.weights or config is None else repr(config)
        if key not in self.copies:
            again = sum(number == call.layer for number, _ in self.copies)
            known = self.held.of(layer.operation) if layer.weights or rule is None else None
            self.copies[key] = known or self.held.add(layer.operation, self.narrowed(layer, config, again))
        return self.copies[key]

    def config(self, layer: Layer, call: Call) -> dict:
        """The config of a call's layer for the channels that are alive."""
        result = self.graph.tensors[call.outputs[0]]
        made = self.graph.vectors[result.vector] if layer.made is None else layer.made
        if layer.made is not None:
            width = self.closed.counts[result.vector] or result.shape[result.axis]
            result = replace(result, shape=(*result.shape[: result.axis], width, *result.shape[result.axis + 1 :]))
        try:
            config = layer.operation.get_config()
            return config if call.padded else layer.rule.narrowed(config, self.alive(made), result)
        except (NotImplementedError, TypeError) as error:
            raise _without_config(layer) from error

    def narrowed(self, layer: Layer, config: dict | None, again: int) -> Any:
        name = self.local(layer.name, again)
        if config is None:
            return remade(layer.operation, name, lenient=True)
        try:
            copy = made_from(layer.operation, {**config, "name": name})
        except (NotImplementedError, TypeError, ValueError) as error:
            raise _without_config(layer) from error
        for weight in layer.weights:
            initializer = getattr(layer.operation, f"{weight.name}_initializer", None)
            if isinstance(initializer, keras.initializers.Constant) and np.shape(initializer.value) == weight.shape:
                narrowed = keras.initializers.Constant(self.sliced(weight, np.asarray(initializer.value)))
                setattr(copy, f"{weight.name}_initializer", narrowed)
        return copy

    def carry(self, layer: Layer, copy: Any) -> None:
        """Give a copy the seed's weights, sliced along every axis that holds channels."""
        if not layer.weights and isinstance(copy, layers.Layer):
            transfer(layer.operation, copy)
        for weight in layer.weights:
            values = _values(self.graph, layer, weight, self.gates)
            if layer.rule.rescale and weight.sides:
                (vector,) = weight.sides
                factors = layer.rule.rescale(len(self.graph.vectors[vector]), len(self.kept(vector)))
                values = values * np.asarray(factors.get(weight.name, 1.0), values.dtype)
            target = variable(copy, weight.name)
            target.assign(self.sliced(weight, values))
            target.trainable = variable(layer.operation, weight.name).trainable  # frozen one by one, or what holds it

    def sliced(self, weight: Weight, values: np.ndarray) -> np.ndarray:
        """A weight's entries for the channels that are alive."""
        for axis, copies in () if weight.whole else self.graph.along(weight, self.closed.channels).items():
            values = np.take(values, repeated(copies), axis=axis)
        return values
