"""Law 5: a budget is never exceeded, and either 98 % of it is used or no dead group could be revived within it."""

import functools
import re

import models
import numpy as np
import pytest

import keras_morph as km
from keras_morph import zoo
from keras_morph.costs.budget import Limit, parse_budget
from keras_morph.graph.closure import close
from keras_morph.search.selection import choose
from keras_morph.training.regularizers import group_scores, pin_sourceless

NARROW = km.Hardware("narrow", 20e9, 4e9)
COSTS = {
    "FLOPs": km.FLOPs(),
    "ModelSize": km.ModelSize(),
    "Activations": km.Activations(),
    "Latency": km.Latency(NARROW),
}
SHARES = ("75%", "50%", "25%")
LASSO, GAMMA = km.GroupLasso(), km.Gamma()
WITH_GAMMA = ("plain", "residual_projection", "preactivation", "concatenating", "inverted_residual")


def limit_of(cost, model, budget):
    return parse_budget(budget, cost, cost(model))


def smallest(model, regularizer, cost):
    """Cost of what is left when everything that may go is gone."""
    graph = pin_sourceless(km.trace(model), regularizer)
    return cost.total(graph, close(graph, graph.pinned_mask, group_scores(graph, regularizer, comparable=True)))


def places(graph, group):
    """Where the channels of a group lie; groups of the same places cost the same."""
    vectors, groups, counts = graph.pairs
    return tuple(zip(vectors[groups == group].tolist(), counts[groups == group].tolist(), strict=True))


def affordable_revivals(model, structure, regularizer, limits):
    """Dead groups that could live as well, with all that has to live with them, without exceeding any limit."""
    graph = pin_sourceless(km.trace(model), regularizer)
    scores, alive = group_scores(graph, regularizer, comparable=True), structure.groups(graph)
    dead = np.flatnonzero(~alive)
    if len(dead) > 500:
        dead = {places(graph, group): int(group) for group in dead}.values()
    found = []
    for group in dead:
        closed = close(graph, alive | (np.arange(graph.num_groups) == group), scores)
        if closed.alive[group] and all(cost.total(graph, closed) <= limit for cost, limit in limits.items()):
            found.append(int(group))
    return found


def assert_kept(model, structure, limits, regularizer=LASSO):
    """No cost is above its limit, of the structure and of the rebuilt model; and no limit leaves anything unused."""
    small = km.rebuild(model, structure)
    used = []
    for cost, limit in limits.items():
        for received in (cost(model, structure), cost(small)):
            assert received <= limit
        used.append(cost(model, structure) / limit)
    if max(used) < 0.98:
        assert affordable_revivals(model, structure, regularizer, limits) == []


CASES = [
    *(pytest.param(name, LASSO, id=name) for name in models.NAMES),
    *(pytest.param(name, GAMMA, id=f"{name}, Gamma") for name in WITH_GAMMA),
]


@pytest.mark.once
@pytest.mark.one_of(3)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("name", "regularizer"), CASES, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_a_budget_is_kept_and_used_or_is_below_the_reachable_minimum(name, regularizer, cost, share):
    model, cost = models.build(name), COSTS[cost]
    limit, minimum = limit_of(cost, model, share), smallest(model, regularizer, cost)
    if minimum > limit:
        with pytest.raises(km.BudgetError, match="reachable minimum"):
            km.fit_budget(model, share, scores=regularizer, cost=cost)
    else:
        structure = km.fit_budget(model, share, scores=regularizer, cost=cost)
        assert_kept(model, structure, {cost: limit}, regularizer)


@pytest.mark.once
@pytest.mark.parametrize("levels", [3, 2**31], ids=["many ties", "no ties"])
@pytest.mark.parametrize("name", models.NAMES)
def test_a_budget_is_kept_and_used_whatever_the_scores(name, levels):
    graph = km.trace(models.build(name))
    random = np.random.default_rng(levels)
    for cost in COSTS.values():
        for share in (0.9, 0.6, 0.3):
            scores = random.integers(0, levels, graph.num_groups).astype(float)
            least = cost.total(graph, close(graph, graph.pinned_mask, scores))
            limit = max(share * cost(graph), least)
            closed = close(graph, choose(graph, scores, [Limit(cost, limit)]), scores)
            assert cost.total(graph, closed) <= limit
            if cost.total(graph, closed) < 0.98 * limit:
                for group in np.flatnonzero(~closed.alive):
                    wider = close(graph, closed.alive | (np.arange(graph.num_groups) == group), scores)
                    assert not wider.alive[group] or cost.total(graph, wider) > limit


@functools.cache
def large(name):
    """A network of the zoo, and its graph."""
    model = zoo.build(name, input_shape=(32, 32, 3))
    return model, km.trace(model)


LARGER = ("ResNet50", "DenseNet121", "VGG16", "EfficientNetB0")


@pytest.mark.once
@pytest.mark.one_of(4)
@pytest.mark.parametrize("share", [*SHARES, "10%"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "name", ["ResNet20", "MobileNetV2", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)]
)
def test_a_large_network_keeps_and_uses_its_budget(name, cost, share):
    _model, graph = large(name)
    cost = COSTS[cost]
    structure, limit = km.fit_budget(graph, share, cost=cost), limit_of(cost, graph, share)
    assert cost(graph, structure) <= limit
    if cost(graph, structure) < 0.98 * limit:
        assert affordable_revivals(graph, structure, LASSO, {cost: limit}) == []


@pytest.mark.once
@pytest.mark.one_of(2)
@pytest.mark.parametrize("round_to", [2, 3, 8])
@pytest.mark.parametrize("name", ["ResNet20", "MobileNetV2"])
def test_widths_are_rounded_within_the_budget_and_nothing_more_fits(name, round_to):
    _model, graph = large(name)
    for cost, share in ((COSTS["FLOPs"], "50%"), (COSTS["ModelSize"], "30%")):
        structure = km.fit_budget(graph, km.Budget(share, cost, round_to=round_to))
        for layer, width in structure.widths.items():
            assert width % round_to == 0 or width == structure.seed_widths[layer]
        limit = limit_of(cost, graph, share)
        assert 0.9 * limit <= cost(graph, structure) <= limit
        alive, scored = structure.groups(graph), group_scores(graph, LASSO, comparable=True)
        for kind in {places(graph, group): group for group in np.flatnonzero(~alive)}:
            dead = [g for g in np.flatnonzero(~alive) if places(graph, g) == kind]
            block = sorted(dead, key=lambda g: -scored[g])[:round_to]
            wider = close(graph, alive | np.isin(np.arange(graph.num_groups), block), scored)
            assert cost.total(graph, wider) > limit or cost(graph, structure) >= 0.98 * limit


@pytest.mark.once
def test_group_lasso_chooses_by_norms_and_gamma_by_what_it_reads():
    # Channels of conv1 read 27 entries each, those of conv2 45: by root mean squares all of conv1 would be the stronger.
    model = models.build("plain")
    for name, norms in (("conv1", [1.0, 1.1, 1.2, 1.3, 1.4]), ("conv2", [1.25, 1.27, 1.5, 1.6])):
        kernel = model.get_layer(name).kernel
        kernel.assign(np.ones(kernel.shape) * norms / np.sqrt(np.prod(kernel.shape[:-1])))
    graph = km.trace(model)
    scores, comparable = (group_scores(graph, LASSO, comparable=each) for each in (False, True))
    of = {layer.name: graph.group_of[layer.made] for layer in graph.layers if layer.made is not None}
    np.testing.assert_allclose(comparable[of["conv1"]], [1.0, 1.1, 1.2, 1.3, 1.4], rtol=1e-6)
    np.testing.assert_allclose(scores[of["conv1"]], np.divide([1.0, 1.1, 1.2, 1.3, 1.4], np.sqrt(27)), rtol=1e-6)
    assert max(scores[of["conv2"]]) < max(scores[of["conv1"]])
    structure = km.fit_budget(model, "40%")
    assert structure.alive["conv1"].tolist() == [3, 4]
    assert structure.alive["conv2"].tolist() == [1, 2, 3]
    learner = km.StructureLearner(model, regularizer=LASSO)
    np.testing.assert_array_equal(
        learner.scores(comparable=True)[~learner.graph.pinned_mask], comparable[~graph.pinned_mask]
    )
    np.testing.assert_array_equal(group_scores(graph, km.Gamma(), comparable=True), group_scores(graph, km.Gamma()))


@pytest.mark.once
def test_no_layer_that_every_path_goes_through_becomes_a_bottleneck():
    _model, graph = large("MobileNetV2")
    scores = np.ones(graph.num_groups)
    trunk = {layer.name: graph.group_of[layer.made] for layer in graph.layers if layer.made is not None}
    last = ["block_10_project", "block_13_project", "block_16_project", "Conv_1"]
    for name in last:
        scores[trunk[name]] = np.linspace(0.1, 0.2, len(trunk[name]))
    limits = [Limit(km.FLOPs(), 0.36 * km.FLOPs()(graph))]
    bare, floored = (choose(graph, scores, limits, floor=floor) for floor in (0.0, 0.5))
    assert min(bare[trunk[name]].sum() for name in last) == 1
    for name in last:
        kept, width = np.flatnonzero(floored[trunk[name]]), len(trunk[name])
        assert len(kept) >= 0.3 * width  # half of the root of 0.36
        assert kept.tolist() == list(range(width - len(kept), width))  # the best of them
    assert 0.98 * limits[0].limit <= km.FLOPs()(graph, km.Structure.closed(graph, floored)) <= limits[0].limit


@pytest.mark.once
@pytest.mark.parametrize("name", models.NAMES)
def test_a_floor_gives_way_to_a_small_budget(name):
    graph = km.trace(models.build(name))
    least = km.FLOPs().total(graph, close(graph, graph.pinned_mask, np.ones(graph.num_groups)))
    for limit in (least, 1.2 * least):
        chosen = choose(graph, np.ones(graph.num_groups), [Limit(km.FLOPs(), limit)], floor=1.0)
        assert km.FLOPs().total(graph, close(graph, chosen)) <= limit


@pytest.mark.once
@pytest.mark.parametrize("floor", [-0.1, 1.5, float("nan")])
def test_what_is_no_floor_is_refused(floor):
    with pytest.raises(km.BudgetError, match=f"floor={floor}"):
        km.Budget("50%", floor=floor)


@pytest.mark.once
def test_a_flops_budget_and_a_size_budget_cut_in_different_places():
    # At equal scores per channel, what costs most goes first: early layers cost FLOPs, late ones parameters.
    _model, graph = large("ResNet20")
    kept = {}
    for name in ("FLOPs", "ModelSize"):
        widths = km.fit_budget(graph, km.Budget("50%", COSTS[name], per_cost=1.0)).widths
        kept[name] = [
            sum(w for layer, w in widths.items() if re.match(rf"stage{n}.*conv[12]", layer)) for n in (1, 2, 3)
        ]
    whole = [6 * 16, 6 * 32, 6 * 64]
    flops, size = (np.divide(kept[name], whole) for name in ("FLOPs", "ModelSize"))
    assert flops[0] < flops[2]
    assert size[0] > size[2]
    assert flops[0] < size[0]


@pytest.mark.once
@pytest.mark.parametrize("text", ["60% FLOPs, 80% ModelSize", "60% and 80% ModelSize", "80% ModelSize and 60%"])
def test_several_budgets_are_read_from_one_text(text):
    model = models.build("residual_projection")
    expected = km.fit_budget(model, {COSTS["FLOPs"]: "60%", COSTS["ModelSize"]: "80%"})
    assert km.fit_budget(model, text) == expected


@pytest.mark.once
def test_a_unit_says_which_cost_is_meant():
    model = models.build("plain")
    assert km.fit_budget(model, "800B ModelSize") == km.fit_budget(model, "800B", cost=COSTS["ModelSize"])
    assert km.fit_budget(model, "0.8KB") == km.fit_budget(model, "800B", cost=COSTS["ModelSize"])
    latency = COSTS["Latency"]
    half = 0.5 * latency(model)
    assert km.fit_budget(model, f"{half} Latency, 90% FLOPs", cost=latency) == km.fit_budget(
        model, {latency: half, COSTS["FLOPs"]: "90%"}
    )
    with pytest.raises(km.BudgetError, match="needs the hardware"):
        km.fit_budget(model, "5ms")


@pytest.mark.once
@pytest.mark.one_of(2)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", models.NAMES)
def test_reach_is_what_can_be_reached_and_names_what_holds_it_up(name, cost):
    model, cost = models.build(name), COSTS[cost]
    found = km.reach(model, cost)
    assert found.seed == cost(model)
    assert found.minimum == pytest.approx(smallest(model, LASSO, cost))
    assert sum(value for _, value, _ in found.holding) == pytest.approx(found.minimum)
    assert str(found).startswith(f"{cost.name}: ")
    with pytest.raises(km.BudgetError, match=f"held up by {re.escape(found.holding[0][0])} "):
        km.fit_budget(model, found.minimum * 0.99, cost=cost)


@pytest.mark.once
@pytest.mark.parametrize("round_to", [0, 1.5, True, "8", "Auto"])
def test_what_cannot_be_rounded_to_is_refused(round_to):
    with pytest.raises(km.BudgetError, match="round_to"):
        km.fit_budget(models.build("plain"), km.Budget("50%", round_to=round_to))


@pytest.mark.once
@pytest.mark.parametrize(
    "budget",
    [
        {"FLOPs": "60%", "ModelSize": "80%"},
        {"FLOPs": "80%", "ModelSize": "60%"},
        {"FLOPs": "70%", "ModelSize": "70%", "Activations": "70%", "Latency": "70%"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["plain", "residual_projection", "concatenating", "merges", "u_net"])
def test_several_budgets_are_kept_at_once(name, budget):
    model = models.build(name)
    budget = {COSTS[cost]: share for cost, share in budget.items()}
    structure = km.fit_budget(model, budget)
    assert_kept(model, structure, {cost: limit_of(cost, model, share) for cost, share in budget.items()})


@pytest.mark.once
def test_a_learner_brings_its_own_cost_and_regularizer_to_a_budget():
    model = models.build("residual_projection")
    learner = km.StructureLearner(model, regularizer=GAMMA, cost=COSTS["ModelSize"])
    assert km.fit_budget(learner, "70%") == km.fit_budget(model, "70%", scores=GAMMA, cost=COSTS["ModelSize"])
    assert km.fit_budget(learner, "70%") != km.fit_budget(model, "70%")


@pytest.mark.once
def test_protected_and_tied_layers_count_towards_the_budget():
    model = models.build("plain")
    structure = km.fit_budget(km.trace(model, protect=["conv1"]), "80%")
    np.testing.assert_array_equal(structure.alive["conv1"], np.arange(5))
    assert structure.widths["conv2"] < 4
    assert km.FLOPs()(model, structure) <= 0.8 * km.FLOPs()(model)


@pytest.mark.once
def test_the_whole_model_fits_into_its_own_cost():
    for name in models.NAMES:
        model = models.build(name)
        for cost in COSTS.values():
            for budget in (cost(model), "100%"):
                structure = km.fit_budget(model, budget, cost=cost)
                np.testing.assert_allclose(cost(model, structure) / cost(model), 1, atol=0.02)


def named_minimum(error):
    """The number in a message such as "the reachable minimum of FLOPs is 1,234 FLOPs."."""
    found = re.search(r"the reachable minimum of \w+ is ([-+.,0-9e]+) ", str(error.value))
    return float(found[1].replace(",", ""))


@pytest.mark.once
@pytest.mark.one_of(2)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", models.NAMES)
def test_the_minimum_that_an_unreachable_budget_names_is_reachable(name, cost):
    model, cost = models.build(name), COSTS[cost]
    with pytest.raises(km.BudgetError, match="cannot be reached") as error:
        km.fit_budget(model, "0.0001%", cost=cost)
    minimum = named_minimum(error)
    structure = km.fit_budget(model, minimum, cost=cost)
    np.testing.assert_allclose(cost(model, structure), minimum, rtol=1e-5)


@pytest.mark.once
@pytest.mark.one_of(4)
@pytest.mark.parametrize("cost", ["FLOPs", "ModelSize", "Activations", "Latency"])
@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV2"])
def test_the_minimum_that_an_unreachable_budget_of_a_large_network_names_is_reachable(name, cost):
    model, cost = large(name)[1], COSTS[cost]
    with pytest.raises(km.BudgetError, match="cannot be reached") as error:
        km.fit_budget(model, "0.0001%", cost=cost)
    structure = km.fit_budget(model, named_minimum(error), cost=cost)
    assert cost(model, structure) <= named_minimum(error)


@pytest.mark.once
def test_of_several_budgets_the_unreachable_one_is_named():
    with pytest.raises(km.BudgetError, match="reachable minimum of ModelSize is"):
        km.fit_budget(models.build("plain"), {COSTS["FLOPs"]: "90%", COSTS["ModelSize"]: "1%"})


@pytest.mark.once
@pytest.mark.parametrize(
    ("budget", "cost", "expected"),
    [
        # of a seed that costs 2e6
        ("50%", "FLOPs", 1e6),
        ("12.5 %", "ModelSize", 0.25e6),
        (" 50% ", "Latency", 1e6),
        ("300M", "FLOPs", 300e6),
        ("1.2M", "ModelSize", 1.2e6),
        ("1.2 m", "ModelSize", 1.2e6),
        ("64k", "Activations", 64e3),
        ("2G", "FLOPs", 2e9),
        ("2B", "FLOPs", 2e9),
        ("1T", "FLOPs", 1e12),
        ("1e6", "FLOPs", 1e6),
        ("2.5e+3", "FLOPs", 2500.0),
        ("1000", "FLOPs", 1000.0),
        (1e6, "FLOPs", 1e6),
        (5, "Activations", 5.0),
        (np.float32(0.5), "Latency", 0.5),
        (np.int64(7), "FLOPs", 7.0),
        # bytes, at 4 for a parameter
        ("2MB", "ModelSize", 0.5e6),
        ("2 MB", "ModelSize", 0.5e6),
        ("400B", "ModelSize", 100.0),
        ("8KB", "ModelSize", 2000.0),
        ("8KiB", "ModelSize", 2048.0),
        ("4MiB", "ModelSize", 2**20),
        ("1GB", "ModelSize", 0.25e9),
        # seconds
        ("5ms", "Latency", 5e-3),
        ("0.5 s", "Latency", 0.5),
        ("200us", "Latency", 200e-6),
        ("200µs", "Latency", 200e-6),
        ("30ns", "Latency", 30e-9),
        ("0.01", "Latency", 0.01),
    ],
)
def test_a_budget_is_read(budget, cost, expected):
    np.testing.assert_allclose(parse_budget(budget, COSTS[cost], 2e6), expected, rtol=1e-12)


@pytest.mark.once
def test_bytes_are_counted_at_the_size_of_a_parameter():
    np.testing.assert_allclose(parse_budget("2MB", COSTS["ModelSize"], 1.0, bytes_per_parameter=2), 1e6)
    model = models.build("plain")
    half, full = (
        km.fit_budget(model, km.Budget("800B", COSTS["ModelSize"], bytes_per_parameter=size)) for size in (4, 2)
    )
    assert COSTS["ModelSize"](model, half) <= 200 < COSTS["ModelSize"](model, full) <= 400


@pytest.mark.once
@pytest.mark.parametrize(
    ("budget", "cost"),
    [
        ("", "FLOPs"),
        ("half", "FLOPs"),
        ("%", "FLOPs"),
        ("50 percent", "FLOPs"),
        ("1.2.3M", "FLOPs"),
        ("-50%", "FLOPs"),
        ("0%", "FLOPs"),
        ("0", "FLOPs"),
        ("nan", "FLOPs"),
        ("inf", "FLOPs"),
        ("1e400", "FLOPs"),
        ("5ms", "FLOPs"),
        ("2MB", "FLOPs"),
        ("2MB", "Activations"),
        ("5ms", "ModelSize"),
        ("300M", "Latency"),
        ("2MB", "Latency"),
        ("50%%", "FLOPs"),
        (0, "FLOPs"),
        (-1.0, "FLOPs"),
        (float("nan"), "FLOPs"),
        (float("inf"), "FLOPs"),
        (True, "FLOPs"),
        (None, "FLOPs"),
        ([1], "FLOPs"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line_that_shows_it(budget, cost):
    with pytest.raises(km.BudgetError) as error:
        parse_budget(budget, COSTS[cost], 2e6)
    message = str(error.value)
    assert "\n" not in message
    assert repr(budget) in message
    assert COSTS[cost].name in message
    assert COSTS[cost].unit in message


@pytest.mark.once
def test_no_budget_at_all_is_refused():
    with pytest.raises(km.BudgetError):
        km.fit_budget(models.build("plain"), {})
