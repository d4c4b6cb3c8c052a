"""The rows of layers over sequences: recurrent layers, attention, and the wrappers TimeDistributed and Bidirectional."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from keras import layers

from keras_morph.channels import Tensor
from keras_morph.keras_internals import takes_a_mask
from keras_morph.layers.keras_layers import mixes_channels, weighted
from keras_morph.layers.rules import TABLE, Flow, Routed, Rule, Signal, always, fresh, rule_for, zero_at_zero

__all__ = ["SEQUENCE_ROWS"]


def _embedded(flow: Flow) -> Routed:
    made = flow.graph.make(flow.name, flow.operation.output_dim)
    flow.graph.pin(flow.inputs[0].ids, f"{flow.name} looks them up as tokens")
    return Routed([(made, len(flow.output_shapes[0]) - 1)], {"out": made})


# Recurrent layers.


def _recurrent(flow: Flow) -> Routed:
    """LSTM, GRU and SimpleRNN: every unit makes one channel, and reads all of them at the next step.

    A unit has a column for each of its gates; it is scored by the strongest.
    """
    operation, signal = flow.operation, flow.inputs[0]
    units = operation.filters if hasattr(operation, "filters") else operation.units
    made = flow.graph.make(flow.name, units)
    if not _given_states(flow, made):
        return fresh(flow, "is given something else than one initial state per unit")
    for part in ("activation", "recurrent_activation"):
        if reason := mixes_channels(getattr(operation, part, None)):
            flow.graph.pin(made, f"{flow.name}: {reason}")
    gates = np.tile(made, operation.cell.kernel.shape[-1] // units)
    results = [(made, len(shape) - 1) for shape in flow.output_shapes]
    return Routed(results, {"in": flow.read(signal.rank - 1), "state": made, "gates": gates})


def _given_states(flow: Flow, made: np.ndarray) -> bool:
    """Tie the states that a recurrent layer begins with to its units; whether they are one per unit."""
    states = flow.inputs[1:]
    if any(state.axis != state.rank - 1 or len(state.ids) != len(made) for state in states):
        return False
    for state in states:
        flow.graph.tie(made, state.ids)
    return True


RECURRENT = Rule(
    _recurrent,
    "strict",
    {"cell.kernel": "in gates", "cell.recurrent_kernel": "state gates", "cell.bias": "gates"},
    {"cell.kernel": "first", "cell.recurrent_kernel": "first"},
    width="units",
    scored={"cell.kernel": "gates", "cell.recurrent_kernel": "gates"},
    masks=("mask",),
    # With zero weights the gates are what they are, but the state stays zero.
    zero=zero_at_zero,
)
RECURRENT_LAYERS = {layers.LSTM, layers.GRU, layers.SimpleRNN}
GRU_OF_TWO_BIASES = replace(RECURRENT, weights={**RECURRENT.weights, "cell.bias": "side gates"})


# Wrappers: their config holds that of the layer inside.


def _inside(prefix: str, names: Any) -> dict[str, Any]:
    """The weights of a layer inside, by the names that they have from outside."""
    return {f"{prefix}.{name}": value for name, value in names.items()}


def _narrow_inside(
    config: dict[str, Any], key: str, narrowed: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The config of a wrapper whose layer under `key` is narrowed; without the shape that it was built for."""
    inside = {part: value for part, value in config[key].items() if part != "build_config"}
    return {**config, key: {**inside, "config": narrowed(inside["config"])}}


WRAPPER = Rule(partial(fresh, reason="wraps a layer that we cannot narrow"), "strict")


def _time_distributed(operation: Any) -> Rule | None:
    """TimeDistributed(layer): the row of the layer inside, with one more axis."""
    inner = rule_for(operation.layer)
    if inner is None or "*" in inner.weights.values():
        return None

    def flow(flow: Flow) -> Routed:
        signal = flow.inputs[0]
        if signal.axis == 1 or len(flow.inputs) > 1:
            return fresh(flow, "works on one step after the other, not on the axis that its channels lie along")
        step = Signal(signal.ids, signal.axis - 1, _step(signal.shape))
        shapes = [_step(shape) for shape in flow.output_shapes]
        routed = inner.flow(replace(flow, operation=operation.layer, inputs=[step], output_shapes=shapes))
        return replace(routed, results=[(ids, axis + 1) for ids, axis in routed.results])

    def narrow(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
        step = Tensor(result.vector, result.axis - 1, _step(result.shape))
        return _narrow_inside(config, "layer", lambda inside: inner.narrowed(inside, kept, step))

    return Rule(
        flow,
        inner.mode,
        _inside("layer", inner.weights),
        _inside("layer", inner.multiplies),
        scored=_inside("layer", inner.scored),
        scale=inner.scale and f"layer.{inner.scale}",
        narrow=narrow,
        masks=() if takes_a_mask(operation.layer) else ("mask",),
        zero=lambda wrapper: inner.zero(wrapper.layer),
    )


def _step(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return shape[:1] + shape[2:]


def _bidirectional(operation: Any) -> Rule | None:
    """Bidirectional(recurrent layer): the k-th units of both directions are one channel, so that they stay as many."""
    parts = operation.forward_layer, operation.backward_layer
    kinds = {type(part) for part in parts}
    if len(kinds) > 1 or not kinds <= RECURRENT_LAYERS or parts[0].units != parts[1].units:
        return None

    def flow(flow: Flow) -> Routed:
        made = flow.graph.make(flow.name, parts[0].units)
        if not _given_states(flow, made):
            return fresh(flow, "is given something else than one initial state per unit")
        routed = [_recurrent(replace(flow, operation=part, inputs=flow.inputs[:1])) for part in parts]
        both = np.tile(made, 2)
        results = [(both if shape[-1] == len(both) else made, len(shape) - 1) for shape in flow.output_shapes]
        return replace(routed[0], results=results)

    def narrow(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
        for key in ("layer", "backward_layer"):
            config = _narrow_inside(config, key, lambda inside: {**inside, "units": len(kept)})
        return config

    forward, backward = (SEQUENCE_ROWS[type(part)].of(part) for part in parts)

    def both(name: str) -> dict[str, Any]:
        return _inside("forward_layer", getattr(forward, name)) | _inside("backward_layer", getattr(backward, name))

    return Rule(
        flow,
        "strict",
        both("weights"),
        both("multiplies"),
        narrow=narrow,
        scored=both("scored"),
        masks=("mask",),
        zero=lambda wrapper: zero_at_zero(wrapper.forward_layer) and zero_at_zero(wrapper.backward_layer),
    )


def _spectral(operation: Any) -> Rule | None:
    """SpectralNormalization(layer): the row of the layer inside, whose kernel is divided by a number while training."""
    inner = rule_for(operation.layer)
    if inner is None or inner.width is None or type(operation.layer).__name__.endswith("Transpose"):
        return None

    def flow(flow: Flow) -> Routed:
        return inner.flow(replace(flow, operation=operation.layer))

    def narrow(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
        return _narrow_inside(config, "layer", lambda inside: inner.narrowed(inside, kept, result))

    return Rule(
        flow,
        inner.mode,
        {**_inside("layer", inner.weights), "vector_u": "one out"},
        _inside("layer", inner.multiplies),
        scored=_inside("layer", inner.scored),
        narrow=narrow,
        zero=lambda wrapper: inner.zero(wrapper.layer),
    )


# Convolutional recurrent layers.


def _convolutional_lstm(operation: Any) -> Rule | None:
    """ConvLSTM whose results are as large as its inputs, so that all of its convolutions work at the same positions."""
    space = {4: "kh", 5: "kh kw", 6: "kd kh kw"}.get(len(operation.cell.kernel.shape) + 1)
    plain = operation.cell.padding == "same" and set(operation.cell.strides) == {1} and space
    if not plain or not str(operation.cell.data_format).endswith("last"):
        return None
    kernels = {"cell.kernel": f"{space} in gates", "cell.recurrent_kernel": f"{space} state gates"}
    return replace(RECURRENT, weights={**kernels, "cell.bias": "gates"}, width="filters")


# Attention.


def _attended(flow: Flow) -> Routed:
    """MultiHeadAttention: a channel is a head, with its queries, keys and values.

    Heads are added up, each with its own softmax, so that one whose rows of the output kernel are zero can go; the values'
    kernel scores it. The channels of the result are others, which a structure names by what they are tied to.
    """
    return _attended_by(flow, flow.operation.num_heads)


def _attended_in_groups(flow: Flow) -> Routed:
    """GroupedQueryAttention: a channel is a head of keys and values, with all the queries that share it."""
    routed = _attended_by(flow, flow.operation.num_key_value_heads, flow.operation.num_repeats)
    if routed.followed:
        flow.graph.pin(routed.results[0][0], f"{flow.name} adds up its heads in it")
        for signal in flow.inputs:
            flow.graph.pin(signal.ids, f"{flow.name} makes its result as wide as them")
    return routed


def _attended_by(flow: Flow, number: int, repeats: int = 1) -> Routed:
    """Attention of a number of heads, each with some queries."""
    operands = _attention_operands(flow)
    if operands is None:
        return fresh(flow, "is called with something else than sequences as query, value and key")
    result = flow.graph.make(flow.name, flow.output_shapes[0][-1] or 0, "result")
    heads = flow.graph.make(flow.name, number)
    queries = np.repeat(heads, repeats) if repeats > 1 else heads
    sides = {name: signal.ids for name, signal in operands.items()}
    sides |= {"out": heads, "keys": heads, "queries": queries, "result": result}
    # The weights of positions, if it is asked for them: one axis of heads, behind that of examples.
    weights = [(queries, 1)] * (len(flow.output_shapes) - 1)
    axis = len(flow.output_shapes[0]) - 1
    # A dead head attends to all positions alike, or as a mask lets it.
    return Routed([(result, axis), *weights], sides, zero=(True, *[False] * len(weights)), hidden=heads)


def _attention_operands(flow: Flow) -> dict[str, Signal] | None:
    """Query, value and key, which is the value where it is not given; None if they are no sequences of vectors."""
    rank = len(flow.output_shapes[0])
    operands = dict(zip(flow.names, flow.inputs, strict=True))
    named = len(operands) == len(flow.inputs) and operands.keys() | {"key"} == {"query", "value", "key"}
    if not named or any((signal.axis, signal.rank) != (rank - 1, rank) for signal in flow.inputs):
        return None
    return {"key": operands["value"], **operands}


def _narrow_heads(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    return {**config, "output_shape": (result.shape[-1],)}


def _narrow_queries(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    repeats = config["num_query_heads"] // config["num_key_value_heads"]
    return {**config, "num_query_heads": repeats * len(kept)}


ATTENTION = Rule(
    _attended,
    "strict",
    {
        "_query_dense.kernel": "query queries size",
        "_query_dense.bias": "queries size",
        "_key_dense.kernel": "key keys size",
        "_key_dense.bias": "keys size",
        "_value_dense.kernel": "value out size",
        "_value_dense.bias": "out size",
        "_gate_dense.kernel": "query queries size",
        "_gate_dense.bias": "queries size",
        "_output_dense.kernel": "queries size result",
        "_output_dense.bias": "result",
    },
    multiplies={
        "_query_dense.kernel": "outputs",
        "_key_dense.kernel": "inputs",
        "_value_dense.kernel": "inputs",
        "_gate_dense.kernel": "outputs",
        "_output_dense.kernel": "outputs",
    },
    scored={"_value_dense.kernel": "out", "_output_dense.kernel": "result"},
    width="num_heads",
    narrow=_narrow_heads,
    masks=("query_mask", "value_mask", "key_mask", "attention_mask"),
)


def _weighed(flow: Flow) -> Routed:
    """Attention and AdditiveAttention: queries and keys weigh positions with all their channels, values pass."""
    if not 2 <= len(flow.inputs) <= 3 or any(s.axis != 2 for s in flow.inputs):
        return fresh(flow, "attends to something else than a sequence of vectors")
    query, value, key = flow.inputs if len(flow.inputs) == 3 else [*flow.inputs, flow.inputs[1]]
    # A product of queries and keys is a sum over channels: one that is zero in either can go from both.
    product = type(flow.operation) is layers.Attention and flow.operation.score_mode == "dot"
    if product and (query.zeroed or key.zeroed) and len(query.ids) == len(key.ids):
        flow.graph.tie(query.ids, key.ids)
    else:
        for signal in (query, key):
            flow.graph.pin(signal.ids, f"{flow.name} weighs positions with all of them")
    results = [(value.ids, 2)]
    for shape in flow.output_shapes[1:]:  # the weights of positions
        made = flow.graph.make(flow.name, shape[-1] or 0, "weights")
        flow.graph.pin(made, f"{flow.name} gives each position of the values one")
        results.append((made, 2))
    return Routed(results, zero=value.zeroed)


# Dense layers as einsums.


def _einsum_dense(operation: Any) -> Rule | None:
    """EinsumDense where it is a Dense layer, `ab,bc->ac`: the last axis is contracted, and a new one takes its place."""
    left, _, result = operation.equation.partition("->")
    operand, _, kernel = left.partition(",")
    dense = sorted(kernel) == sorted(operand[-1] + result[-1]) and operand[:-1] == result[:-1]
    if (
        not dense
        or len({*operand, result[-1]}) != len({*operand}) + 1
        or len(getattr(operation.bias, "shape", "c")) > 1
    ):
        return None
    axes = "in out" if kernel[0] == operand[-1] else "out in"
    weights = {"kernel": axes, "bias": "out"}
    return Rule(weighted, "make", weights, {"kernel": "outputs"}, narrow=_narrow_last, zero=zero_at_zero)


def _narrow_last(config: dict[str, Any], kept: np.ndarray, result: Tensor) -> dict[str, Any]:
    return {**config, "output_shape": (*config["output_shape"][:-1], len(kept))}


SEQUENCE_ROWS: dict[type, Rule] = {
    layers.Embedding: Rule(
        _embedded, "strict", {"embeddings": "token out"}, width="output_dim", scored={"embeddings": "out"}, zero=always
    ),
    layers.LSTM: RECURRENT,
    layers.GRU: replace(RECURRENT, variant=lambda gru: GRU_OF_TWO_BIASES if gru.reset_after else None),
    layers.SimpleRNN: RECURRENT,
    **dict.fromkeys(
        [layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D],
        Rule(
            partial(fresh, reason="is a ConvLSTM with strides or without padding"),
            "strict",
            variant=_convolutional_lstm,
        ),
    ),
    layers.SpectralNormalization: replace(WRAPPER, variant=_spectral),
    layers.TimeDistributed: replace(WRAPPER, variant=_time_distributed),
    layers.Bidirectional: replace(WRAPPER, variant=_bidirectional),
    layers.EinsumDense: Rule(
        partial(fresh, reason="is an einsum other than a Dense layer"), "strict", variant=_einsum_dense
    ),
    layers.MultiHeadAttention: ATTENTION,
    layers.GroupQueryAttention: replace(
        ATTENTION, flow=_attended_in_groups, width="num_key_value_heads", narrow=_narrow_queries
    ),
    layers.Attention: Rule(_weighed, "strict", masks=("mask",)),
    layers.AdditiveAttention: Rule(_weighed, "strict", masks=("mask",)),
}

TABLE.update(SEQUENCE_ROWS)
