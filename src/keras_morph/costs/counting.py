"""Multiply-adds of layers whose channels are not followed: a fixed cost where they can be counted, else a name.

A quantized or LoRA layer, what is inside a wrapper, a layer whose `call` runs on Keras tensors: all of them are counted at
the sizes that they have, which no structure changes.
"""

import math
import weakref
from typing import Any

import keras
from keras import layers, tree

from keras_morph.channels import Call, ChannelGraph, Layer
from keras_morph.graph.composites import recorded_or_none
from keras_morph.keras_internals import graph_in, nodes_of
from keras_morph.layers.rules import at_side, row_of, variable

__all__ = ["fixed_multiply_adds", "uncounted"]

PRODUCTS = {"Matmul", "Einsum", "Conv", "DepthwiseConv", "ConvTranspose", "SeparableConv", "Dot", "Tensordot", "Inner"}
"""Operations of `keras.ops` that multiply and add; the others go element by element."""

_COUNTED: Any = weakref.WeakKeyDictionary()  # operation -> {shapes of a call: multiply-adds for one row of its batch}


def fixed_multiply_adds(graph: ChannelGraph) -> list[tuple[int, int]]:
    """Multiply-adds for one example of the calls of layers that have no row, or whose row does not follow the call.

    Returns:
        Rows of (multiply-adds, call); without those that multiply nothing or cannot be counted.
    """
    rows = []
    for number, call, layer in _unfollowed(graph):
        count = _of_call(graph, call, layer)
        if count:
            rows.append((count, number))
    return rows


def uncounted(graph: ChannelGraph) -> tuple[str, ...]:
    """Layers whose multiply-adds cannot be counted, such as `mix (Lambda)`: no cost of computing includes them."""
    left_out = [(n, layer) for n, call, layer in _unfollowed(graph) if _of_call(graph, call, layer) is None]
    left_out += [
        (number, graph.layers[call.layer])  # how many channels it multiplies depends on the structure
        for number, call in enumerate(graph.calls)
        if graph.layers[call.layer].rule is not None
        and _multiplies_by_constants(call, graph.layers[call.layer].operation)
    ]
    names = (f"{layer.name} ({layer.kind})" for _, layer in sorted(left_out, key=lambda each: each[0]))
    return tuple(dict.fromkeys(names))


def _unfollowed(graph: ChannelGraph) -> list[tuple[int, Call, Layer]]:
    numbered = ((number, call, graph.layers[call.layer]) for number, call in enumerate(graph.calls))
    return [(n, call, layer) for n, call, layer in numbered if layer.rule is None and call.mode != "input"]


def _of_call(graph: ChannelGraph, call: Call, layer: Layer) -> int | None:
    """Multiply-adds for one example; None where nobody can tell."""
    results = [graph.tensors[number].shape for number in call.outputs]
    count = _of_row_of_batch(call, layer, results)
    if not count:
        return count
    rows = graph.tensors[call.outputs[0]].rows
    return round(count * rows) if math.isfinite(rows) else None


def _of_row_of_batch(call: Call, layer: Layer, made: list[tuple[Any, ...]]) -> int | None:
    """Multiply-adds for one row of the batch; None where nobody can tell."""
    operation = layer.operation
    if not isinstance(operation, keras.Layer):
        return 0 if call.arguments is None else _of_operation(operation, call.arguments, made[0])
    known = _COUNTED.setdefault(operation, {})
    tensors = call.arguments.keras_tensors
    key = repr([(tuple(x.shape), x.dtype) for x in tensors]), repr(sorted(map(repr, call.arguments.kwargs)))
    if key not in known:
        shapes = [tuple(x.shape) for x in tensors]
        results = _output_shapes(operation, call)
        counted = None if results is None else _counted(operation, shapes, results, call)
        known[key] = counted
    return known[key]


def _output_shapes(operation: Any, call: Call) -> list[tuple[Any, ...]] | None:
    try:
        specs = operation.compute_output_spec(*call.arguments.args, **call.arguments.kwargs)
    except Exception:  # whatever a user's layer raises
        return None
    return [tuple(spec.shape) for spec in tree.flatten(specs)]


def _counted(
    operation: Any, shapes: list[tuple[Any, ...]], results: list[tuple[Any, ...]], call: Call | None
) -> int | None:
    """Multiply-adds of a layer for one row of the batch, given the shapes that it reads and makes."""
    if isinstance(operation, layers.TimeDistributed):
        inside = [shape[:1] + shape[2:] for shape in shapes]
        each = _counted(operation.layer, inside, [shape[:1] + shape[2:] for shape in results], None)
        return None if each is None or shapes[0][1] is None else each * shapes[0][1]
    if isinstance(operation, layers.Bidirectional):
        parts = [_counted(part, shapes, results, None) for part in (operation.forward_layer, operation.backward_layer)]
        return None if None in parts else sum(part for part in parts if part is not None)
    if isinstance(operation, layers.SpectralNormalization):
        return _counted(operation.layer, shapes, results, None)
    if isinstance(operation, layers.RNN) and not hasattr(operation, "units") and not hasattr(operation, "filters"):
        cells = getattr(operation.cell, "cells", [operation.cell])
        if all(type(cell).__module__.startswith("keras.") for cell in cells):
            weights = [weight for cell in cells for weight in cell.weights if "kernel" in weight.name]
            return _times(shapes[0][1:-1], sum(math.prod(weight.shape) for weight in weights))
        return None
    if isinstance(operation, layers.ReversibleEmbedding):
        reverse = call is not None and call.arguments.kwargs.get("reverse", False)
        return _times(results[0][1:], shapes[0][-1]) if reverse else 0
    if type(operation) in (layers.Dense, layers.EinsumDense):
        return _of_dense(operation, shapes[0], results[0])
    row = row_of(operation)
    if row is not None and row.multiplies:
        return _of_row(operation, row, shapes, results)
    function = graph_in(operation) or recorded_or_none(operation, call, shapes)
    if function is not None:
        return _of_graph(function)
    plain = type(operation).__module__.startswith("keras.") and not isinstance(operation, layers.Lambda)
    return 0 if plain and not operation.weights else None


def _of_dense(operation: Any, shape: tuple[Any, ...], result: tuple[Any, ...]) -> int | None:
    """A Dense layer, whatever is stored of its kernel; a LoRA layer adds two narrow ones."""
    if isinstance(operation, layers.Dense):
        count = _times(result[1:], shape[-1])
    else:
        operands, _, output = operation.equation.partition("->")
        left, _, kernel = operands.partition(",")
        if "." in operation.equation:
            return None
        sizes = dict(zip(left, shape, strict=True)) | dict(zip(output, result, strict=True))
        count = _times([sizes.get(letter) for letter in {*left, *output, *kernel} - {left[0]}], 1)
    rank = getattr(operation, "lora_rank", None) if getattr(operation, "lora_enabled", False) else None
    if count is None or rank is None:
        return count
    return count + (_times(shape[1:], rank) or 0) + (_times(result[1:], rank) or 0)


def _of_row(operation: Any, row: Any, shapes: list[tuple[Any, ...]], results: list[tuple[Any, ...]]) -> int | None:
    """A layer whose row names its weights, though it does not follow this call: all of each, at every position."""
    total = 0
    for name, where in row.multiplies.items():
        value = variable(operation, name)
        if value is None:
            continue
        shape = at_side(where, shapes, results)
        first = getattr(operation, "data_format", "channels_last") == "channels_first"
        places = shape[2:] if first else shape[1:-1]
        count = _times(places, math.prod(value.shape))
        if count is None:
            return None
        total += count
    return total


def _of_graph(function: Any) -> int | None:
    """What all layers of a graph multiply, whatever of it is followed."""
    total = 0
    for node in nodes_of(function):
        operation = node.operation
        if node.is_input:
            continue
        shapes = [tuple(x.shape) for x in node.arguments.keras_tensors]
        if isinstance(operation, keras.Layer):
            count = _counted(operation, shapes, [tuple(x.shape) for x in node.outputs], None)
        else:
            count = _of_operation(operation, node.arguments, node.outputs[0].shape)
        if count is None:
            return None
        total += count
    return total


def _operands(arguments: Any) -> tuple[list[Any], list[Any]]:
    """What an operation is given, tensors and arrays, and the arrays and variables among it."""
    operands = [x for x in tree.flatten((arguments.args, arguments.kwargs)) if hasattr(x, "shape")]
    return operands, [x for x in operands if not isinstance(x, keras.KerasTensor)]


def _multiplies_by_constants(call: Call, operation: Any) -> bool:
    return type(operation).__name__ in PRODUCTS and call.arguments is not None and bool(_operands(call.arguments)[1])


def _of_operation(operation: Any, arguments: Any, made: Any) -> int | None:
    """What an operation multiplies by a variable or another constant that it is given; products of two tensors count 0.

    Args:
        operation: of `keras.ops`.
        arguments: of its call.
        made: shape of its result.
    """
    kind = type(operation).__name__
    operands, held = _operands(arguments)
    if not held or kind not in PRODUCTS:
        return 0
    result = tuple(made)[1:]
    if kind == "Matmul":
        return _times(result, operands[0].shape[-1])
    if kind == "Conv":
        return _times(result, math.prod(held[0].shape[:-1]))
    if kind == "DepthwiseConv":
        return _times(result, math.prod(held[0].shape[:-2]))
    if kind == "Einsum" and "." not in operation.subscripts:
        words = operation.subscripts.partition("->")[0].split(",")
        sizes: dict[str, Any] = {}
        batches: set[str] = set()
        for word, x in zip(words, operands, strict=True):
            sizes.update(zip(word, x.shape, strict=True))
            batches |= {word[0]} if isinstance(x, keras.KerasTensor) else set()
        return _times([size for letter, size in sizes.items() if letter not in batches], 1)
    return None


def _times(sizes: Any, each: Any) -> int | None:
    """The product of sizes and a number; None where a size is unknown."""
    sizes = [*sizes, each]
    return None if None in sizes else math.prod(sizes)
