"""The alive channels that meet a budget: those of the highest scores."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.budget import Limit, budget_from, group_prices, multiples
from keras_morph.costs.costs import Cost, FLOPs
from keras_morph.errors import BudgetError, KerasMorphError
from keras_morph.graph.closure import Closed, close
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of
from keras_morph.training.regularizers import GroupLasso, check_finite, group_scores, pin_sourceless

__all__ = [
    "Reach",
    "choose",
    "fit_budget",
    "reach",
]

FULL_ENOUGH = 0.98


def fit_budget(model: Any, budget: Any, *, scores: Any = None, cost: Cost | None = None) -> Structure:
    """The structure of the highest scores that costs no more than a budget.

    Where a cost that is no formula is higher with a narrower layer, it is also tried with such layers whole, and what keeps more
    of the scores is taken.

    Args:
        model: a StructureLearner, whose regularizer and cost are the defaults; a Keras model as it is; or its ChannelGraph.
        budget: a Budget, or what one is made of: `"50%"`, `"2MB"`, `"50% FLOPs, 2MB"`, a number, or `{cost: amount}`.
        scores: one number per group, `(num_groups,)`, the higher the stronger; or a regularizer that reads weights;
            GroupLasso() by default.
        cost: what the budget is for where it does not say; FLOPs() by default.

    Returns:
        A closed structure, never above the budget. Either 98 % of the budget is used, or no dead group (no `round_to` of
        them) could be revived within it.

    Raises:
        BudgetError: if the budget cannot be read or reached; the message names the reachable minimum.
        KerasMorphError: if the score of a group that may be removed is NaN or infinite; the message names the first layers.

    Example:
        >>> structure = km.fit_budget(model, km.Budget("50%", round_to=2))
        >>> km.FLOPs()(model, structure) <= 0.5 * km.FLOPs()(model)
        True
    """
    budget = budget_from(budget, cost)
    graph, values, cost = scored(model, scores, budget.cost)
    check_finite(graph, values)
    limits = budget.limits(graph, cost)
    kept, options = values, {"round_to": budget.round_to, "floor": budget.floor}
    if budget.per_cost:
        values = values / group_prices(graph, limits) ** budget.per_cost
    alive = choose(graph, values, limits, **options)
    if stays := _dearer_when_narrow(graph, limits):
        with suppress(BudgetError):  # out of reach with all of them
            wide = choose(graph.pinned_with(stays), values, limits, **options)
            alive = wide if kept[wide].sum() > kept[alive].sum() else alive
    return Structure.closed(graph, alive, values)


def _dearer_when_narrow(graph: ChannelGraph, limits: Sequence[Limit]) -> dict[int, str]:
    """Groups that lie in places whose whole width costs less than a narrower one, and why they stay.

    A stream in front of LayerNormalization is one: what is narrowed there is filled up again. Formulas never say so.
    """
    tables = [limit.cost.table(graph) for limit in limits if limit.cost.monomials(graph) is None]
    if not tables:
        return {}

    def costs(alive: np.ndarray) -> np.ndarray:
        closed = close(graph, alive)
        return np.array([(table.costs(closed.counts) * closed.present).sum() for table in tables])

    whole = np.ones(graph.num_groups, bool)
    most, kinds = costs(whole) * (1 + 1e-9), same_places(graph)
    found: dict[int, str] = {}
    for kind in np.unique(kinds[~graph.pinned_mask]):
        groups = np.flatnonzero((kinds == kind) & ~graph.pinned_mask)
        narrow = whole.copy()
        narrow[groups[: len(groups) // 8]] = False
        if np.any(costs(narrow) > most):
            found |= dict.fromkeys(groups.tolist(), "it costs more when it is narrower")
    return found


def scored(model: Any, scores: Any = None, cost: Cost | None = None) -> tuple[ChannelGraph, np.ndarray, Cost]:
    """Graph, comparable score of each group, and cost, of whatever stands for a model; arguments as in `fit_budget`."""
    graph = graph_of(model)
    cost = cost or getattr(model, "target_cost", None) or FLOPs()
    own = getattr(model, "regularizer", None)
    if scores is not None and not hasattr(scores, "score"):
        return graph, _checked(graph, scores), cost
    if own is not None and scores in (None, own):
        return graph, model.scores(comparable=True), cost
    regularizer = scores or GroupLasso()
    graph = pin_sourceless(graph, regularizer)
    return graph, group_scores(graph, regularizer, comparable=True), cost


def _checked(graph: ChannelGraph, scores: Any) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.shape != (graph.num_groups,):
        raise KerasMorphError(
            f"Expected scores of shape ({graph.num_groups},), one per group of {graph.model.name}, or a regularizer. "
            f"Received: an array of shape {values.shape}."
        )
    check_finite(graph, values)
    return np.where(np.isfinite(values), values, 0.0)


@dataclass(frozen=True)
class Reach:
    """What of a cost can be reached.

    Attributes:
        cost: which cost.
        seed: that of the whole seed, in its unit.
        minimum: that of the cheapest structure.
        holding: layers that hold the minimum up, the most expensive first: (layer, cost, why it cannot be smaller).

    Example:
        >>> km.reach(model, km.ModelSize()).minimum < km.ModelSize()(model)
        True
    """

    cost: Cost
    seed: float
    minimum: float
    holding: tuple[tuple[str, float, str], ...]

    def __str__(self) -> str:
        held = ", ".join(f"{layer} {value / self.minimum:.0%} ({reason})" for layer, value, reason in self.holding[:3])
        return (
            f"{self.cost.name}: {self.seed:,.6g} {self.cost.unit}, at least {_rounded_up(self.minimum):,.6g} "
            f"({self.minimum / self.seed:.2%})" + (f", held up by {held}" if held else "")
        )


def reach(model: Any, cost: Cost | None = None, *, scores: Any = None) -> Reach:
    """How far a cost can fall, before any training.

    Args:
        model: as in `fit_budget`.
        cost: FLOPs() by default, or the learner's.
        scores: as in `fit_budget`; what a regularizer cannot score stays.

    Example:
        >>> print(km.reach(model))
        FLOPs: 34,032 FLOPs, at least 2,238 (6.58%), held up by conv 87% (model input), ...
    """
    graph, values, cost = scored(model, scores, cost)
    return _reach(graph, cost, close(graph, graph.pinned_mask, values))


def _reach(graph: ChannelGraph, cost: Cost, smallest: Closed) -> Reach:
    values = cost.per_layer(graph, smallest)
    order = np.argsort(-values, kind="stable")
    holding = tuple((graph.layers[n].name, float(values[n]), _why_it_stays(graph, n)) for n in order if values[n] > 0)
    return Reach(cost, cost(graph), float(values.sum()), holding)


def _why_it_stays(graph: ChannelGraph, number: int) -> str:
    """Why a layer cannot be smaller: the reason of the first pinned group among its weights' channels."""
    vectors = [v for weight in graph.layers[number].weights for v in reversed(weight.vectors) if v >= 0]
    for vector in vectors:
        for group in graph.groups_of(vector).tolist():
            if group in graph.pinned:
                return graph.pinned[group]
    return "the only path through it"


def choose(
    graph: ChannelGraph, scores: np.ndarray, limits: Sequence[Limit], *, round_to: int | str = 1, floor: float = 0.0
) -> np.ndarray:
    """Alive groups, by descending score, within every limit.

    Args:
        graph: the traced model.
        scores: one number per group, `(num_groups,)`.
        limits: what each cost may be.
        round_to, floor: as in `Budget`.

    Returns:
        bool, `(num_groups,)`, closed.
    """
    budget = _Budget(graph, scores, limits, round_to)
    chosen = budget.close(graph.pinned_mask)
    if round_to == "auto" and budget.share(chosen) > 1:  # rather odd widths than none
        return choose(graph, scores, limits, floor=floor)
    budget.check_reachable(chosen)
    chosen = budget.raised(chosen, floor)
    queue = budget.blocks[~budget.full(chosen)]
    while len(queue) and budget.share(chosen) < FULL_ENOUGH:
        chosen, taken = budget.longest_prefix(chosen, queue)
        # The next one does not fit, nor does any that lies in the same places; cheaper ones further down may.
        rest = queue[taken:]
        queue = rest[budget.kind[rest] != budget.kind[rest[0]]] if len(rest) else rest
        queue = queue[~budget.full(chosen)[queue]]
    return chosen.alive


class _Budget:
    """Limits on costs, and closed structures held against them.

    Groups are taken in blocks of `round_to` that lie in the same places; blocks are numbered by descending score.
    """

    def __init__(self, graph: ChannelGraph, scores: np.ndarray, limits: Sequence[Limit], round_to: int | str) -> None:
        self.graph, self.scores, self.limits = graph, scores, limits
        self.tables = [limit.cost.table(graph) for limit in limits]
        free = np.flatnonzero(~graph.pinned_mask)
        kinds = same_places(graph)
        held = np.bincount(kinds[graph.pinned_mask], minlength=len(kinds))
        by_kind = free[np.lexsort((-scores[free], kinds[free]))]
        place = np.arange(len(by_kind)) - np.searchsorted(kinds[by_kind], kinds[by_kind])
        step = multiples(round_to, np.bincount(kinds, minlength=len(kinds)), [limit.cost for limit in limits])
        self.rounds = bool(np.any(step[kinds[free]] > 1))
        keys = kinds[by_kind] * (len(kinds) + 1) + (place + held[kinds[by_kind]]) // step[kinds[by_kind]]
        _, block = np.unique(keys, return_inverse=True)
        worth = np.bincount(block, weights=scores[by_kind]) / np.bincount(block)
        number = np.empty(len(worth), np.int64)
        number[np.argsort(-worth, kind="stable")] = np.arange(len(worth))
        self.block_of = np.full(graph.num_groups, -1)  # -1: pinned
        self.block_of[by_kind] = number[block]
        self.blocks = np.arange(len(worth))
        self.kind = np.empty(len(worth), np.int64)
        self.kind[self.block_of[free]] = kinds[free]

    def close(self, alive: np.ndarray) -> Closed:
        """The closed structure; blocks of which it keeps something are kept whole."""
        while True:
            closed = close(self.graph, alive, self.scores)
            if not self.rounds:
                return closed
            touched = np.append(np.zeros(len(self.blocks), bool), True)
            touched[self.block_of[closed.alive & ~self.graph.pinned_mask]] = True
            rounded = touched[self.block_of] & ~self.graph.pinned_mask | closed.alive
            # What closing takes away again, since nobody reads it, is not asked for twice.
            if np.array_equal(rounded, closed.alive) or not np.any(rounded & ~alive):
                return closed
            alive = alive | rounded

    def full(self, closed: Closed) -> np.ndarray:
        """Whether all groups of each block are alive, bool, `(blocks,)`."""
        free = ~self.graph.pinned_mask
        missing = np.bincount(self.block_of[free & ~closed.alive], minlength=len(self.blocks))
        return missing == 0

    def costs(self, closed: Closed) -> list[float]:
        return [float((table.costs(closed.counts) * closed.present).sum()) for table in self.tables]

    def share(self, closed: Closed) -> float:
        """Cost as a share of the budget, of the tightest one."""
        return max(cost / limit.limit for cost, limit in zip(self.costs(closed), self.limits, strict=True))

    def check_reachable(self, smallest: Closed) -> None:
        for cost, limit in zip(self.costs(smallest), self.limits, strict=True):
            if cost > limit.limit:
                unit, name = limit.cost.unit, limit.cost.name
                holding = _reach(self.graph, limit.cost, smallest).holding[:3]
                held = ", ".join(f"{layer} ({reason})" for layer, _, reason in holding)
                raise BudgetError(
                    f"A budget of {limit.limit:,.6g} {unit} cannot be reached for {self.graph.model.name}: "
                    f"the reachable minimum of {name} is {_rounded_up(cost):,.6g} {unit}, held up by {held}. "
                    "Raise the budget, or pin and protect less."
                )

    def raised(self, smallest: Closed, floor: float) -> Closed:
        """The best channels of what no structure is without, `floor` of a uniform width of them or as many as fit."""
        alike = math.sqrt(min(1.0, *(limit.limit / limit.cost(self.graph) for limit in self.limits)))
        needed = [np.unique(self.graph.groups_of(v)) for v in np.flatnonzero(smallest.counts).tolist()]
        needed = [groups[np.argsort(-self.scores[groups], kind="stable")] for groups in needed]
        while floor > 0.01:
            alive = smallest.alive.copy()
            for groups in needed:
                alive[groups[: math.ceil(floor * alike * len(groups))]] = True
            closed = self.close(alive)
            if self.share(closed) <= 1:
                return closed
            floor /= 2
        return smallest

    def longest_prefix(self, chosen: Closed, queue: np.ndarray) -> tuple[Closed, int]:
        """Add as many blocks from the front of a queue as fit; how many were added."""
        place = np.full(len(self.blocks) + 1, len(queue))  # the last one stands for pinned groups
        place[queue] = np.arange(len(queue))
        when = place[self.block_of]
        fits, low, high = chosen, 0, len(queue) + 1
        while high - low > 1:
            middle = (low + high) // 2
            closed = self.close(chosen.alive | (when < middle))
            if self.share(closed) <= 1:
                low, fits = middle, closed
            else:
                high = middle
        return fits, low


def _rounded_up(value: float) -> float:
    """The next number of six digits, so that it is in reach as it is printed."""
    scale = 10.0 ** (5 - math.floor(math.log10(value))) if value else 1.0
    rounded = math.ceil(value * scale) / scale
    return rounded if float(f"{rounded:.6g}") >= value else (math.ceil(value * scale) + 1) / scale


def same_places(graph: ChannelGraph) -> np.ndarray:
    """A number per group, equal for groups whose channels lie equally often in the same vectors: they cost the same."""
    vector, group, count = graph.pairs
    random = np.random.default_rng(0).integers(1, 2**62, len(graph.vectors), dtype=np.uint64)
    hashes = np.zeros(graph.num_groups, np.uint64)
    np.add.at(hashes, group, random[vector] * count.astype(np.uint64))
    return np.unique(hashes, return_inverse=True)[1]
