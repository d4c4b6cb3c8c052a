"""Budgets that are kept and used as measured: by costs that say what their clock would show."""

import contextlib

import models
import numpy as np
import pytest

import keras_morph as km
from keras_morph.search.keeping import NOISE, TRIES, fit_measured

pytestmark = pytest.mark.once


class Clocked(km.FLOPs):
    """FLOPs, measured as `slow(share of the whole)` times what they are."""

    def __init__(self, slow, scale=1.0):
        self.slow, self.scale, self.seen = slow, scale, []

    @contextlib.contextmanager
    def clock(self, graph):
        def measured(structure):
            self.seen.append(structure)
            whole, found = self(graph), self(graph, structure)
            return self.scale * found * self.slow(found / whole), self.scale * whole

        yield measured


@pytest.fixture(scope="module")
def graph():
    return km.trace(models.build("residual_projection"))


@pytest.mark.parametrize(
    ("slow", "measurements"),
    [
        pytest.param(lambda share: 0.98, 1, id="as foretold"),
        pytest.param(lambda share: 1.1, 2, id="a tenth slower"),
        pytest.param(lambda share: 1 + 0.3 * share, 2, id="the wider the slower"),
    ],
)
@pytest.mark.parametrize("budget", ["60%", km.Budget("60%", round_to=1, floor=0.2)])
def test_it_is_chosen_again_until_the_clock_agrees(graph, slow, measurements, budget):
    cost, said = Clocked(slow), []
    structure = fit_measured(graph, budget, cost=cost, say=said.append)
    with cost.clock(graph) as clock:
        found, whole = clock(structure)
    assert found <= 0.6 * (1 - NOISE) * whole
    assert cost(graph, structure) <= 0.6 * cost(graph)
    assert len(said) == len(cost.seen) - 1 <= measurements
    assert f"{found:,.0f} FLOPs of the whole network's {whole:,.0f} FLOPs as measured" in said[-1]


@pytest.mark.parametrize("fast", [0.9, 0.5])
def test_a_budget_is_used_as_measured(graph, fast):
    """The smaller one is faster than foretold, so that more fits than was thought."""
    cost = Clocked(lambda share: fast if share < 0.999 else 1.0)
    structure = fit_measured(graph, km.Budget("40%", round_to=1), cost=cost)
    assert 0.9 * 0.4 <= fast * cost(graph, structure) / cost(graph) <= (1 - NOISE) * 0.4
    assert len(cost.seen) <= TRIES


def test_what_was_kept_is_held_against_the_whole_network_as_it_is_found_later(graph):
    """The whole network is disturbed at first, so that too much seems allowed."""
    cost, wholes = Clocked(lambda share: 1.0), []

    @contextlib.contextmanager
    def clock(graph):
        def measured(structure):
            wholes.append(cost(graph) * (1.1 if not wholes else 0.8))
            return 0.9 * cost(graph, structure), wholes[-1]

        yield measured

    cost.clock = clock
    structure = fit_measured(graph, km.Budget("60%", round_to=1), cost=cost)
    assert len(wholes) > 1
    assert 0.9 * cost(graph, structure) <= (1 - NOISE) * 0.6 * wholes[-1]


def test_what_is_counted_beside_it_is_never_exceeded(graph):
    cost, size = Clocked(lambda share: 0.5), km.ModelSize()
    structure = fit_measured(graph, km.Budget({cost: "60%", size: "60%"}, round_to=1))
    assert size(graph, structure) <= 0.6 * size(graph)
    assert len(cost.seen) == 2  # where it binds, more of the time changes nothing


def test_a_share_is_of_the_network_as_measured_and_an_amount_is_not(graph):
    """The clock shows twice of everything: a share is kept, half of a number of FLOPs is left."""
    share, amount = (Clocked(lambda share: 0.98, scale=2.0) for _ in range(2))
    whole = share(graph)
    assert len(fit_measured(graph, "60%", cost=share).widths) > 0
    assert len(share.seen) == 1
    structure = fit_measured(graph, 0.9 * whole, cost=amount)
    assert len(amount.seen) > 1
    assert 0.2 * whole < amount(graph, structure) <= 0.45 * whole


def test_the_nearest_one_is_returned_with_a_warning_where_none_is_kept(graph):
    cost = Clocked(lambda share: 1 / share)  # takes as long, however narrow
    with pytest.warns(
        km.BudgetWarning, match=r"residual_projection keeps the budget of 60% as computed, not as measured"
    ):
        structure = fit_measured(graph, "60%", cost=cost)
    assert 1 <= len(cost.seen) <= TRIES
    assert structure in cost.seen


def test_what_cannot_be_measured_is_kept_as_computed(graph):
    cost, said = km.FileSize(), []
    budget = km.Budget({cost: "60%", km.FLOPs(): "70%"})
    structure = fit_measured(graph, budget, say=said.append)
    np.testing.assert_array_equal(structure.groups(graph), km.fit_budget(graph, budget).groups(graph))
    assert said == ["FileSize() is not measured here: its budget is kept as computed, and 2.0% of it is left"]
    fit_measured(graph, "60%", say=said.append)
    assert len(said) == 1  # nothing to say of what is counted


def test_one_of_several_costs_is_measured(graph):
    cost = Clocked(lambda share: 1.2)
    budget = km.Budget({cost: "60%", km.ModelSize(): "90%"})
    structure = fit_measured(graph, budget)
    assert cost(graph, structure) * 1.2 <= 0.6 * cost(graph)
    assert km.ModelSize()(graph, structure) <= 0.9 * km.ModelSize()(graph)


def test_prune_measures(graph):
    cost = Clocked(lambda share: 1.15)
    small = km.prune(graph, "60%", cost=cost)
    assert cost(small) * 1.15 <= 0.6 * cost(graph)
    assert len(cost.seen) == 2


def test_what_leaves_much_unused_is_followed_by_something_between(graph):
    """Times that jump: where 52 % is left they are a third lower."""
    cost = Clocked(lambda share: 1.2 if share > 0.52 else 0.8)
    structure = fit_measured(graph, km.Budget("60%", round_to=1), cost=cost)
    shares = [cost(graph, one) / cost(graph) for one in cost.seen]
    kept = [share for share in shares if share * cost.slow(share) <= 0.6 * (1 - NOISE)]
    assert structure == cost.seen[shares.index(max(kept))]
    assert len(kept) > 1
    assert len(shares) <= TRIES
