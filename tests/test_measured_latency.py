"""MeasuredLatency: the fit, what it foretells, how it is kept, and one measurement from end to end."""

import json
import time
import warnings
from dataclasses import replace

import keras
import models
import numpy as np
import pytest

import keras_morph as km
from keras_morph import measuring, timing
from keras_morph.costs.fitted import Coefficients, FittedTable, Rows, fit, telling
from keras_morph.graph.closure import close
from keras_morph.graph.identities import network_of
from keras_morph.machine import cpu_name
from keras_morph.search.keeping import fit_measured

CONDITIONS = timing.Conditions("onnxruntime", "1.0", 1, 1, "a processor")
KNOWN = Coefficients(
    {
        "Conv2D 9": {"call": 2e-6, "work": 8e-12, "ragged": 9e-12, "write": 4e-10},
        "Conv2D 1": {"call": 1e-6, "work": 1e-11},
        "Dense 1": {"call": 1e-6},
        "Add": {"call": 5e-7},
        "GlobalAveragePooling2D": {},
    },
    reads=1,
    block=8,
    multiple=4,
)


def network():
    """Two blocks of residual convolutions, wide enough for blocks of 8."""
    layers = keras.layers
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(32, 3, padding="same", name="stem")(image)
    for number in range(2):
        y = layers.Conv2D(48, 3, padding="same", activation="relu", name=f"wide{number}")(x)
        y = layers.Conv2D(32, 1, name=f"narrow{number}")(y)
        x = layers.Add(name=f"add{number}")([x, y])
    return keras.Model(
        image, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D(name="pool")(x)), name="network"
    )


def seconds(graph, structure, coefficients=KNOWN):
    closed = close(graph, structure.copies(graph))
    return float((FittedTable.of(graph, coefficients).costs(closed.counts) * closed.present).sum())


@pytest.mark.once
def test_the_fit_finds_what_the_times_were_made_of():
    graph = km.trace(network())
    drawn = measuring.random_structures(graph, 40)
    times = np.array([seconds(graph, each) for each in drawn])
    found = fit(graph, [close(graph, each.copies(graph)) for each in drawn[:28]], times[:28])
    assert (found.block, found.multiple) == (8, 4)
    foretold = np.array([seconds(graph, each, found) for each in drawn[28:]])
    np.testing.assert_allclose(foretold, times[28:], rtol=0.03)
    assert found.error < 0.02
    assert found.within > 0.9
    noisy = times * np.random.default_rng(0).uniform(1.0, 1.2, len(times))
    assert 0.01 < fit(graph, [close(graph, each.copies(graph)) for each in drawn], noisy).error < 0.1


@pytest.mark.once
def test_the_fit_finds_what_depthwise_layers_cost_out_of_the_fast_layout():
    layers = keras.layers
    x = image = keras.Input((16, 16, 3))
    for number in range(3):
        x = layers.Conv2D(48, 1, name=f"wide{number}")(x)
        x = layers.DepthwiseConv2D(3, padding="same", name=f"depthwise{number}")(x)
    graph = km.trace(keras.Model(image, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D(name="pool")(x))))
    known = Coefficients(
        {
            "Conv2D 1": {"call": 1e-6, "work": 1e-11},
            "DepthwiseConv2D 9": {"write": 3e-10, "ragged": 1e-10, "channel": 1e-7},
        },
        block=16,
        depthwise=4,
    )
    drawn = measuring.random_structures(graph, 48)
    times = np.array([seconds(graph, each, known) for each in drawn])
    found = fit(graph, [close(graph, each.copies(graph)) for each in drawn[:32]], times[:32])
    assert (found.block, found.depthwise) == (16, 4)
    foretold = np.array([seconds(graph, each, found) for each in drawn[32:]])
    np.testing.assert_allclose(foretold, times[32:], rtol=0.03)


@pytest.mark.once
def test_a_narrowed_stream_costs_what_fills_it_up():
    """As in the rebuilt model, whose layers are counted as they are."""
    layers = keras.layers
    image = keras.Input((64, 24))
    x = layers.Dense(16, name="patches")(image)
    for number in range(2):
        y = layers.LayerNormalization(name=f"norm{number}")(x)
        x = layers.Add(name=f"add{number}")([x, layers.MultiHeadAttention(4, 4, name=f"attention{number}")(y, y)])
    graph = km.trace(keras.Model(image, layers.Dense(10, name="head")(layers.GlobalAveragePooling1D(name="pool")(x))))
    calls = {"Dense 1": {"call": 1e-6}, "MultiHeadAttention 4": {"call": 2e-6, "heads": 5e-6}, "Take": {"call": 1e-5}}
    known = Coefficients(
        {**calls, "Add": {}, "LayerNormalization": {}, "GlobalAveragePooling1D": {}, "Pad": {"write": 1e-8}}
    )
    cost = km.MeasuredLatency.of(CONDITIONS, known, "")
    one_head = {"attention0": 1}
    narrowed = {"patches": 5, "attention0": 4, "attention1": 4}
    whole = 2e-6 + 2 * 7e-6
    np.testing.assert_allclose(cost(graph), whole)
    # For each normalization a Pad, a Take, and a Take of what is alive behind it.
    for counts, expected in ((one_head, whole - 5e-6), (narrowed, whole + 2 * (2e-5 + 64 * 6 * 1e-8))):
        small = km.rebuild(graph, counts, weights=False)
        np.testing.assert_allclose(cost(small), expected)
        np.testing.assert_allclose(cost(graph, counts), expected, rtol=0.03)  # Pad makes one channel more
    # So it stays whole where a budget leaves room: what is strongest for its price alone would be the narrowest.
    chosen = km.fit_budget(graph, km.Budget("80%", cost, per_cost=1.0), scores=np.ones(graph.num_groups))
    assert chosen.widths["patches"] == graph.widths["patches"]
    assert cost(graph, chosen) <= 0.8 * whole


@pytest.mark.once
@pytest.mark.parametrize("name", ["SeparableConv2D", "LSTM", "attention", "grouped", "Dense"])
def test_work_is_the_multiply_adds_of_all_kernels(name):
    """Those inside a layer too: both their sides are narrowed."""
    layers = keras.layers
    image = keras.Input((8, 6))
    x = layers.Dense(16, name="first")(image)
    if name in ("SeparableConv2D", "grouped"):
        x = layers.Reshape((4, 2, 16))(x)
        separable = name == "SeparableConv2D"
        x = layers.SeparableConv2D(8, 2, name="c")(x) if separable else layers.Conv2D(8, 1, groups=4, name="c")(x)
    elif name == "attention":
        x = layers.MultiHeadAttention(4, 6, name="c")(x, x)
    else:
        x = layers.LSTM(8, name="c")(x) if name == "LSTM" else layers.Dense(8, name="c")(x)
    x = x if len(x.shape) == 2 else layers.Reshape((-1,))(x)
    graph = km.trace(keras.Model(image, layers.Dense(3)(x)), grouped="equal")
    work = {kind: {"work": 1.0} for kind in Rows.of(graph).kinds}
    cost = km.MeasuredLatency.of(CONDITIONS, Coefficients(work), "")
    for structure in (None, km.fit_budget(graph, km.Budget("60%", round_to=1))):
        assert cost(graph, structure) == km.FLOPs()(graph, structure) / 2


@pytest.mark.once
def test_structures_are_random_and_spread():
    graph = km.trace(network())
    drawn = measuring.random_structures(graph, 16)
    shares = sorted(km.FLOPs()(graph, each) / km.FLOPs()(graph) for each in drawn)
    assert shares[0] < 0.3
    assert shares[-1] > 0.85
    assert len({tuple(each.widths.values()) for each in drawn}) >= 12
    assert any(width % 4 for each in drawn for width in each.widths.values())


def cost_of(graph):
    return km.MeasuredLatency.of(CONDITIONS, KNOWN, network_of(graph))


@pytest.mark.once
def test_a_width_between_two_blocks_costs_what_the_next_block_costs_and_the_price_is_the_slope():
    graph = km.trace(network())
    cost = cost_of(graph)
    table = cost.table(graph)
    number = next(n for n, call in enumerate(graph.calls) if graph.layers[call.layer].name == "wide0")
    vector = graph.tensors[graph.calls[number].outputs[0]].vector
    counts = graph.counts(np.ones(graph.num_groups, bool))

    def at(width):
        changed = counts.copy()
        changed[vector] = width
        return table.costs(changed)[number]

    assert at(40) < at(41) == at(44) == at(48)
    assert at(48) == pytest.approx(2e-6 + 16 * 16 * (9 * 32 * 48 * 8e-12 + 48 * 4e-10))
    smooth = cost_of(graph).of(CONDITIONS, replace(KNOWN, block=1, multiple=1), "").table(graph)
    for step, price in zip(range(len(counts)), table.prices(counts), strict=True):
        one = np.eye(len(counts), dtype=int)[step]
        assert smooth.costs(counts + one).sum() - smooth.costs(counts).sum() == pytest.approx(price)


def test_it_is_a_cost_like_any_other(tmp_path):
    seed = network()
    graph = km.trace(seed)
    cost = cost_of(graph)
    small = km.prune(seed, "60%", cost=cost)
    assert cost(small) <= 0.6 * cost(seed)
    wide = km.fit_budget(seed, "60%", cost=cost).widths
    assert all(width % 8 == 0 for name, width in wide.items() if name != "head")  # the runtime's block, by default
    assert cost(km.rebuild(seed, km.fit_budget(seed, "0.02ms", cost=cost))) <= 2e-5
    learner = km.StructureLearner(seed, cost=cost, strength=1.0)
    assert float(learner.penalty()) > 0
    back = km.StructureLearner.from_config(learner.get_config())
    assert back.target_cost(seed) == cost(seed)
    cost.save(tmp_path / "latency.json")
    assert km.MeasuredLatency.load(tmp_path / "latency.json")(seed) == cost(seed)
    with pytest.raises(km.KerasMorphError, match=r"measured here, on .* Received: .*, which was on a processor"):
        km.MeasuredLatency(seed, cache=tmp_path / "latency.json")
    here = km.MeasuredLatency.of(replace(CONDITIONS, device=cpu_name()), KNOWN, network_of(graph))
    here.save(tmp_path / "latency.json")
    found = km.MeasuredLatency(seed, cache=tmp_path / "latency.json")  # nothing is timed
    assert repr(found) == f"MeasuredLatency(onnxruntime 1.0, 1 thread, batch 1, {cpu_name()})"


@pytest.mark.once
def test_times_that_do_not_follow_from_the_structures_are_told(tmp_path):
    """As when memory runs out while structures are timed; again when such a file is read."""
    seed = network()
    graph = km.trace(seed)
    drawn = measuring.random_structures(graph, 16)
    for number, structure in enumerate(drawn):
        structure.save(tmp_path / f"{number:03}.json")
    noise = np.exp(np.random.default_rng(0).normal(0, 0.5, len(drawn)))

    def fitted(factors):
        each = [(seconds(graph, structure) * factor,) for structure, factor in zip(drawn, factors, strict=True)]
        return measuring.fit_timings(graph, tmp_path, timing.Timings(CONDITIONS, tuple(each)))

    with warnings.catch_warnings():
        warnings.simplefilter("error", km.ForecastWarning)
        fitted(np.ones(len(drawn)))
    with pytest.warns(km.ForecastWarning, match=r"Expected at least 75% .* Received: \d+%, median error"):
        found = fitted(noise)
    found = km.MeasuredLatency.of(replace(CONDITIONS, device=cpu_name()), found.coefficients, found.network)
    found.save(tmp_path / "latency.json")
    with pytest.warns(km.ForecastWarning):
        km.MeasuredLatency(seed, cache=tmp_path / "latency.json")


@pytest.mark.once
def test_layers_that_were_not_timed_are_named():
    graph = km.trace(models.build("separable"))
    with pytest.warns(km.UncountedLayerWarning, match="SeparableConv2D"):
        cost_of(graph)(graph)


@pytest.mark.once
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"conditions": {}, "coefficients": {}, "network": ""}'])
def test_a_file_of_something_else_is_an_error(tmp_path, text):
    (tmp_path / "latency.json").write_text(text)
    with pytest.raises(km.KerasMorphError, match=r"Expected a file that MeasuredLatency\.save"):
        km.MeasuredLatency.load(tmp_path / "latency.json")
    with pytest.raises(km.KerasMorphError, match="Expected timings"):
        timing.Timings.parsed(text)
    with pytest.raises(km.KerasMorphError, match="runtime: expected onnxruntime, litert, openvino"):
        km.MeasuredLatency(network(), runtime="abacus")


@pytest.mark.once
def test_a_busy_machine_is_timed_again(monkeypatch):
    """A whole network that takes longer than when the cost was fitted; the shortest time of each file counts."""
    graph = km.trace(network())
    here = km.MeasuredLatency.of(replace(CONDITIONS, device=cpu_name()), KNOWN, "")
    whole = here(graph)
    sessions = [(1.2 * whole, 0.6 * whole), (1.1 * whole, 0.5 * whole), (1.01 * whole, 0.55 * whole), (whole, whole)]
    left = iter(sessions)
    monkeypatch.setattr(measuring.MeasuredLatency, "_runs_here", lambda _: True)
    monkeypatch.setattr(measuring, "write_unchecked", lambda *_: None)
    monkeypatch.setattr(
        measuring, "time_files_apart", lambda *_, **__: timing.Timings(CONDITIONS, [(each,) for each in next(left)])
    )
    with here.clock(graph) as measured:
        assert measured(km.fit_budget(graph, "50%")) == (0.5 * whole, 1.01 * whole)
    assert next(left) == sessions[-1]


@pytest.mark.once
def test_what_is_timed_is_what_is_handed_out(monkeypatch):
    """With the seed's weights: constants that a cut leaves are operations of their own, unless they are zero."""
    seed = models.randomize(network(), seed=1)
    graph, written = km.trace(seed), []
    here = km.MeasuredLatency.of(replace(CONDITIONS, device=cpu_name()), KNOWN, "")
    monkeypatch.setattr(measuring.MeasuredLatency, "_runs_here", lambda _: True)
    monkeypatch.setattr(measuring, "write_unchecked", lambda found, *_: written.extend(found))
    monkeypatch.setattr(measuring, "time_files_apart", lambda *_, **__: timing.Timings(CONDITIONS, [(1.0,), (0.5,)]))
    structure = km.fit_budget(graph, "50%")
    with here.clock(graph) as measured:
        measured(structure)
    for ours, theirs in zip(written[-1].get_weights(), km.rebuild(graph, structure).get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.once
def test_those_are_timed_that_tell_the_most():
    """Any first ones of them foretell others better than as many random ones, where times are noisy."""
    graph = km.trace(network())
    closed = [close(graph, each.copies(graph)) for each in measuring.random_structures(graph, 96)]
    times = np.array([(FittedTable.of(graph, KNOWN).costs(each.counts) * each.present).sum() for each in closed])
    noisy = times * np.random.default_rng(0).uniform(0.97, 1.03, len(times))
    order = telling(graph, closed, 24, first=95)
    assert order[0] == 95
    assert len(set(order)) == 24
    others = np.setdiff1d(np.arange(96), order)

    def error(places):
        found = fit(graph, [closed[place] for place in places], noisy[places])
        table = FittedTable.of(graph, found)
        foretold = np.array([(table.costs(closed[i].counts) * closed[i].present).sum() for i in others])
        return np.sqrt(np.mean((foretold / times[others] - 1) ** 2))

    random = [
        error(np.random.default_rng(seed).permutation(np.delete(np.arange(96), others))[:14]) for seed in range(4)
    ]
    assert error(order[:14]) < np.mean(random)
    assert error(order) < 0.05


@pytest.mark.once
def test_functions_take_turns():
    order = []
    samples = timing.in_turn([lambda: order.append("a"), lambda: order.append("b")], seconds=0, rounds=3)
    assert [len(each) for each in samples] == [3, 3]
    assert order[:4] == ["a", "a", "b", "b"]  # warm up


@pytest.mark.once
def test_what_is_timed_has_run_just_before():
    """Else the caches are full of what ran between."""
    order = []

    def slow(name):
        order.append(name)
        time.sleep(2 * timing.LEAST)  # so that one run is a sample

    timing.in_turn([lambda: slow("a"), lambda: slow("b")], seconds=0, rounds=3)
    assert "".join(order) == "aabb" + "aabb" * 3


@pytest.mark.once
def test_what_an_earlier_call_wrote_is_gone(tmp_path, monkeypatch):
    """Else there would be more structures in the folder than timings."""
    monkeypatch.setattr(measuring, "write_unchecked", lambda models, paths, name: [path.touch() for path in paths])
    for number in (13, 12):
        measuring.export_structures(network(), tmp_path, structures=number)
        assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.onnx"))) == number
    (tmp_path / "777.json").write_text("mine")
    with pytest.raises(km.KerasMorphError, match=r"Received: .*777\.json, which is something else"):
        measuring.export_structures(network(), tmp_path, structures=12)
    assert (tmp_path / "777.json").read_text() == "mine"


@pytest.mark.once
def test_nothing_is_timed_on_another_processor_or_where_nothing_can_be_exported(monkeypatch):
    graph = km.trace(network())
    elsewhere = cost_of(graph)
    with elsewhere.clock(graph) as clock:
        assert clock is None
    said = []
    fit_measured(graph, "60%", cost=elsewhere, say=said.append)
    assert said[0].startswith("MeasuredLatency(onnxruntime 1.0, 1 thread, batch 1, a processor) is not measured here")

    def fails(*_):
        raise km.UnsupportedModelError("no exporter")

    monkeypatch.setattr(measuring, "write_unchecked", fails)
    here = km.MeasuredLatency.of(replace(CONDITIONS, device=cpu_name()), KNOWN, "")
    with here.clock(graph) as clock:
        assert clock is None


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
def test_a_measurement_from_end_to_end(runtime, tmp_path):
    seed = network()
    cost = km.MeasuredLatency(seed, runtime=runtime, structures=12, seconds=10, cache=tmp_path / "latency.json")
    assert json.loads((tmp_path / "latency.json").read_text())["conditions"]["runtime"] == runtime
    assert 1e-6 < cost(km.prune(seed, "50%", cost=cost)) <= 0.5 * cost(seed) < 1e-1
    graph = km.trace(seed)
    with cost.clock(graph) as clock:
        small, whole = clock(km.fit_budget(graph, "30%"))
    assert 1e-6 < small < whole < 1e-1
