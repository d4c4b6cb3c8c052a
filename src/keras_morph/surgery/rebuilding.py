"""Make the smaller model of a structure: replay the traced calls with narrower layers.

A tensor of the rebuilt model is a Keras tensor with the alive channels only; or nothing, where no channel is alive; or
a constant, where nothing alive makes it. Constants are computed with the seed's own layers and folded where they meet
what is alive, at a merge.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import layers, ops, tree

from keras_morph.channels import Call, ChannelGraph, Layer, Scope, Weight
from keras_morph.errors import KerasMorphError, UnknownLayerWarning, UnsupportedModelError
from keras_morph.graph.closure import CONSTANT, LIVE, Closed, close
from keras_morph.graph.structure import graph_and_structure, repeated
from keras_morph.graph.tracing import trace
from keras_morph.keras_internals import graph_in, remade, structs
from keras_morph.layers.rules import Rewriting, variable
from keras_morph.surgery.copying import cloned, transfer
from keras_morph.surgery.folding import Constants, DeadValues, fold

__all__ = ["masked", "rebuild"]


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
    return _Replay(graph, closed, weights, _gates(model)).model()


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
    for layer in graph.layers:
        for weight in layer.weights if layer.cuts else ():
            if own[layer.name] is layer.operation:
                raise _without_config(layer)
            target = variable(own[layer.name], weight.name)
            values = _values(graph, layer, weight, gates).copy()
            for axis, vector in enumerate(weight.vectors):
                if vector >= 0:
                    dead = closed.channels[graph.vectors[vector]] == 0
                    values[(slice(None),) * axis + (dead,)] = 0
            target.assign(values)
    return copy


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
    if gates is None or weight.reads is None or layer.made is None or weight.vectors[weight.reads] < 0:
        return values
    factors = gates[graph.group_of[graph.vectors[weight.vectors[weight.reads]]]]
    shape = [-1 if axis == weight.reads else 1 for axis in range(values.ndim)]
    return values * factors.reshape(shape).astype(values.dtype)


class _Replay:
    """One pass over the calls that are present, from the inputs to the outputs."""

    def __init__(self, graph: ChannelGraph, closed: Closed, weights: bool, gates: np.ndarray | None = None) -> None:
        self.graph, self.closed, self.weights, self.gates = graph, closed, weights, gates
        self.tensors: dict[int, Any] = {}
        self.copies: dict[tuple[int, str], Any] = {}
        self.nested: dict[tuple, tuple[Any, tuple]] = {}
        self.taken: dict[str, dict[str, str]] = {}
        self.wholes: list[tuple[Any, Any]] = []
        self.prefix = ""
        self.constants, self.dead = Constants(graph), DeadValues(graph)

    def model(self) -> keras.Model:
        self.run(0, len(self.graph.calls), self.graph.scopes)
        inputs, outputs = structs(self.graph.model)
        model = keras.Model(
            tree.pack_sequence_as(inputs, [self.tensors[t] for t in self.graph.inputs]),
            tree.pack_sequence_as(outputs, [self.tensors[t] for t in self.graph.outputs]),
            name=self.graph.model.name,
        )
        if self.weights:
            for (number, _), copy in self.copies.items():
                self.carry(self.graph.layers[number], copy)
            for source, target in self.wholes:
                transfer(source, target)
        return model

    def run(self, start: int, stop: int, scopes: Sequence[Scope]) -> None:
        """Replay calls; nested models that survive as a whole stay nested."""
        number = start
        while number < stop:
            scope = next((s for s in reversed(scopes) if s.start == number and s.stop <= stop and self.stays(s)), None)
            if scope is not None:
                self.nest(
                    scope, [s for s in scopes if s is not scope and scope.start <= s.start and s.stop <= scope.stop]
                )
                number = scope.stop
                continue
            if self.closed.present[number]:
                call = self.graph.calls[number]
                self.tensors.update(zip(call.outputs, self.replay(call), strict=True))
            number += 1

    def stays(self, scope: Scope) -> bool:
        """Whether everything that goes in and out of a nested model is alive, so that it can be called as one.

        What a TimeDistributed calls stays: closing keeps its ends alive.
        """
        if scope.stepped:
            return bool(self.closed.present[scope.start])
        made = {t for call, p in zip(self.graph.calls, self.closed.present, strict=False) if p for t in call.outputs}
        ends = {*scope.inputs, *scope.outputs}
        whole = all(self.closed.states[t] == LIVE and t in made for t in ends)
        known = self.nested.get(self.key(scope))
        agrees = known is None or known[1] == self.pattern(scope)
        return whole and agrees and scope.start < scope.stop and len(set(scope.inputs)) == len(scope.inputs)

    def key(self, scope: Scope) -> tuple:
        """What a nested model does; a layer that is made of layers may do several things."""
        return id(scope.model), id(scope.function), self.pattern(scope) if scope.stepped else None

    def pattern(self, scope: Scope) -> tuple:
        """What is made of a nested model: which of its calls are present, what is alive in them, and what fills them up."""
        pattern: list[Any] = []
        for number in range(scope.start, scope.stop):
            call, present = self.graph.calls[number], bool(self.closed.present[number])
            vectors = [self.graph.tensors[t].vector for t in (*call.inputs, *call.outputs)] if present else []
            filled = [self.filling(t).tobytes() for t in call.operands] if present and call.padded else []
            pattern += [present, *(self.kept(vector).tobytes() for vector in vectors), *filled]
        return tuple(pattern)

    def nest(self, scope: Scope, inner: Sequence[Scope]) -> None:
        """Rebuild a nested model once, and call it."""
        given = [self.tensors[t] for t in scope.inputs]
        ins, outs = structs(scope.function)
        if self.key(scope) not in self.nested:
            copy = self.unchanged(scope)
            if copy is not None:
                self.wholes.append((scope.model, copy))
            else:
                copy = self.renewed(scope, inner, ins, outs)
                self.tensors.update(zip(scope.inputs, given, strict=True))
            self.nested[self.key(scope)] = copy, self.pattern(scope)
        model, _ = self.nested[self.key(scope)]
        args, kwargs = (given[0] if scope.stepped else tree.pack_sequence_as(ins, given),), {}
        if any(copy is model for _, copy in self.wholes):  # its call takes what the seed's takes
            tensors = iter(given)
            args, kwargs = scope.arguments.convert(lambda x: next(tensors) if isinstance(x, keras.KerasTensor) else x)
        self.tensors.update(zip(scope.outputs, tree.flatten(model(*args, **kwargs)), strict=True))

    def renewed(self, scope: Scope, inner: Sequence[Scope], ins: Any, outs: Any) -> keras.Model:
        """A nested model of what is alive inside."""
        sources, results, start, stop = scope.inputs, scope.outputs, scope.start, scope.stop
        if scope.stepped:  # the calls between those that move the axis of time
            sources, results = self.graph.calls[start].outputs, self.graph.calls[stop - 1].inputs
            self.tensors[sources[0]] = self.tensors[scope.inputs[0]]
            start, stop = start + 1, stop - 1
        for number, source in zip(sources, scope.function.inputs, strict=True):
            tensor, axis = self.tensors[number], self.graph.tensors[number].axis
            # Its own sizes: it may be called on images of several.
            shape = list(source.shape)
            shape[axis] = self.closed.counts[self.graph.tensors[number].vector] or shape[axis]
            self.tensors[number] = keras.Input(batch_shape=shape, dtype=tensor.dtype)
        inputs = [self.tensors[t] for t in sources]
        again = sum(model == id(scope.model) for model, *_ in self.nested)
        name, outer = self.local(f"{scope.name}_{again}" if again else scope.name), self.prefix
        self.prefix = f"{scope.name}/"
        self.run(start, stop, inner)
        self.prefix = outer
        outputs = [self.tensors[t] for t in results]
        inside = scope.function.name if scope.stepped else name
        model = keras.Model(tree.pack_sequence_as(ins, inputs), tree.pack_sequence_as(outs, outputs), name=inside)
        return layers.TimeDistributed(model, name=name) if scope.stepped else model

    def local(self, name: str) -> str:
        """A name in the model that is being made; what is inside a nested one that was taken apart keeps both names."""
        if not self.taken:
            self.taken[""] = {layer.name: layer.name for layer in self.graph.layers if "/" not in layer.name}
        taken = self.taken.setdefault(self.prefix, {})
        short = unique = name.removeprefix(self.prefix).replace("/", "_")
        number = 0
        while taken.setdefault(unique, name) != name:
            number += 1
            unique = f"{short}_{number}"
        return unique

    def unchanged(self, scope: Scope) -> Any:
        """A nested model whose widths stay, made anew from its own config, so that it stays of its class; or None."""
        graph = self.graph
        if graph_in(scope.model) is None:
            return None  # a layer made of layers, whose config need not tell all that it does
        inside = {t for call in graph.calls[scope.start : scope.stop] for t in (*call.inputs, *call.outputs)}
        vectors = {graph.tensors[t].vector for t in (*inside, *scope.inputs)}
        if any(self.closed.counts[vector] != len(graph.vectors[vector]) for vector in vectors):
            return None
        own = {number for s in graph.scopes if s.model is scope.model for number in range(s.start, s.stop)}
        called = {number for call in graph.calls[scope.start : scope.stop] for number in graph.layer_calls[call.layer]}
        if not called <= own:
            return None  # what it shares with the rest of the network it would have for itself
        alike = {self.pattern(s) for s in graph.scopes if s.model is scope.model}
        if len(alike) > 1:
            return None  # what is made of another call would have layers of its own
        copy = remade(scope.model)
        return None if copy is scope.model else copy

    def kept(self, vector: int) -> np.ndarray:
        """Positions of a vector that are alive."""
        return self.alive(self.graph.vectors[vector])

    def alive(self, ids: np.ndarray) -> np.ndarray:
        return repeated(self.closed.channels[ids])

    def replay(self, call: Call) -> list[Any]:
        states = self.closed.states
        if call.mode == "input":
            return [self.copy(call).output]
        live = [self.tensors[t] for t in call.operands if states[t] == LIVE]
        if call.gathers:
            return self.unmasked(call, self.gather(call))
        if call.compute:
            return [call.compute(*live)]
        if call.mode == "merge" and any(states[t] == CONSTANT for t in call.inputs):
            return self.unmasked(call, [self.fold(call, live)])
        if call.mode in ("merge", "join") and len(live) == 1 < len(call.inputs):
            return self.unmasked(call, live)
        if len(live) < len(call.operands):
            return tree.flatten(self.copy(call)(live))
        sources = (*zip(call.operands, call.sources, strict=True), *zip(call.masks, call.mask_sources, strict=True))
        values = {id(source): self.tensors[t] for t, source in sources}
        for source, axis in zip(call.sources, call.takes, strict=False):
            if axis >= 0:
                values[id(source)] = self.taken_alive(values[id(source)], call.outputs[0], axis)
        if not call.padded:
            return self.apply(call, values)
        (source,), (operand,) = call.sources, call.operands
        values[id(source)] = self.filled_up(values[id(source)], operand)
        results = zip(call.outputs, self.apply(call, values), strict=True)
        return [self.taken_alive(x, output, self.graph.tensors[output].axis) for output, x in results]

    def taken_alive(self, x: Any, number: int, axis: int) -> Any:
        """The entries along an axis that are alive in a tensor of the seed."""
        tensor = self.graph.tensors[number]
        kept = self.kept(tensor.vector)
        whole = np.array_equal(kept, np.arange(len(self.graph.vectors[tensor.vector])))
        return x if whole else ops.take(x, kept, axis=axis)

    def filled_up(self, x: Any, number: int) -> Any:
        """A tensor with as many channels as in the seed, with the values of the masked seed for those that are dead."""
        tensor = self.graph.tensors[number]
        kept, width = self.kept(tensor.vector), len(self.graph.vectors[tensor.vector])
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
        return ops.add(filled, values.reshape(shape).astype(x.dtype))

    def filling(self, number: int) -> np.ndarray:
        """What fills a tensor up: for each channel that is dead its value in the masked seed, else 0."""
        ids = self.graph.vectors[self.graph.tensors[number].vector]
        dead = self.closed.channels[ids] == 0
        return np.where(dead, self.dead[number], 0.0) if self.weights and dead.any() else np.zeros(len(ids))

    def unmasked(self, call: Call, results: list[Any]) -> list[Any]:
        """Results without the mask that what is left of a call may hand on, where the call itself hands on none."""
        tensors = self.graph.tensors
        if not any(tensors[t].masked for t in call.inputs):
            return results
        return [x if tensors[t].masked else ops.copy(x) for t, x in zip(call.outputs, results, strict=True)]

    def apply(self, call: Call, values: dict[int, Any]) -> list[Any]:
        """Call the copy with its arguments rewritten and with these values for the seed's tensors."""
        args, kwargs = call.arguments.args, call.arguments.kwargs
        rule = self.graph.layers[call.layer].rule
        if rule and rule.rewrite:
            operand, result = self.graph.tensors[call.inputs[0]], self.graph.tensors[call.outputs[0]]
            rewriting = Rewriting(operand, result, self.kept(operand.vector), self.kept(result.vector))
            args, kwargs = rule.rewrite(args, kwargs, rewriting)
        args, kwargs = tree.map_structure(
            lambda x: values[id(x)] if isinstance(x, keras.KerasTensor) else x, (args, kwargs), none_is_leaf=True
        )
        return tree.flatten(self.copy(call)(*args, **kwargs))

    def gather(self, call: Call) -> list[Any]:
        """Pick channels by index: slices, splits and shuffles of what is left of a channel axis."""
        operand = self.graph.tensors[call.inputs[0]]
        x, axis = self.tensors[call.inputs[0]], operand.axis
        rule = self.graph.layers[call.layer].rule
        if rule and rule.rewrite:  # the part of the call that picks no channels
            axis = self.graph.tensors[call.outputs[0]].axis
            (x,) = self.apply(call, {id(call.sources[0]): x})
        kept = self.kept(operand.vector)
        results = []
        for number, positions in zip(call.outputs, call.gathers, strict=True):
            wanted = self.kept(self.graph.tensors[number].vector)
            copy = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)  # which of the copies
            chosen = np.searchsorted(kept, positions[wanted]) + copy
            whole = np.array_equal(chosen, np.arange(len(kept)))
            results.append(x if whole or not len(chosen) else ops.take(x, chosen, axis=axis))
        return results

    def fold(self, call: Call, live: list[Any]) -> Any:
        """A merge with operands that are constant."""
        result, operation = self.graph.tensors[call.outputs[0]], self.graph.layers[call.layer].operation
        if not self.weights and (len(live) == 1 or isinstance(operation, layers.Layer)):
            # With fresh weights the constants are not known yet: they are left out.
            return live[0] if len(live) == 1 else self.copy(call)(live)
        shape = (-1, *[1] * (len(result.shape) - result.axis - 1))
        operands = {}
        for t, source in zip(call.inputs, call.sources, strict=True):
            if self.closed.states[t] == LIVE:
                operands[id(source)] = self.tensors[t]
            else:
                constants = self.constants[t] if self.weights else np.zeros_like(self.constants[t])
                operands[id(source)] = constants[self.kept(result.vector)].reshape(shape)
        if isinstance(operation, layers.Layer):
            return fold(operation, [operands[id(source)] for source in call.sources], lambda: self.copy(call)(live))
        return self.apply(call, operands)[0]

    def copy(self, call: Call) -> Any:
        """The narrower copy of a call's layer; of one without weights a copy for each of its configurations."""
        layer = self.graph.layers[call.layer]
        rule = layer.rule
        narrows = rule is not None and (layer.weights or rule.narrow or rule.width)
        config = self.config(layer, call) if narrows else None
        key = call.layer, "" if layer.weights or config is None else repr(config)
        if key not in self.copies:
            again = sum(number == call.layer for number, _ in self.copies)
            self.copies[key] = self.narrowed(layer, config, again)
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
        name = self.local(f"{layer.name}_{again}" if again else layer.name)
        if config is None:
            return remade(layer.operation, name, lenient=True)
        try:
            copy = type(layer.operation).from_config({**config, "name": name})
        except (NotImplementedError, TypeError) as error:
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
            variable(copy, weight.name).assign(self.sliced(weight, values))

    def sliced(self, weight: Weight, values: np.ndarray) -> np.ndarray:
        """A weight's entries for the channels that are alive."""
        for axis, vector in enumerate(weight.vectors):
            if vector >= 0 and not weight.whole:
                values = np.take(values, self.kept(vector), axis=axis)
        return values
