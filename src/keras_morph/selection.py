"""Budgets: read them, and choose the alive channels that meet one."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.closure import Closed, close
from keras_morph.costs import CONSTANT, Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.errors import BudgetError
from keras_morph.learning import StructureLearner
from keras_morph.regularizers import GroupLasso, Regularizer, group_scores, pin_sourceless
from keras_morph.structure import Structure
from keras_morph.tracing import trace

__all__ = [
    "Limit",
    "Reach",
    "choose",
    "fit_budget",
    "group_prices",
    "limits_of",
    "parse_budget",
    "reach",
    "split_budget",
]

SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
FULL_ENOUGH = 0.98
FLOOR = 0.5
NAMED = {cost.__name__: cost for cost in (FLOPs, ModelSize, Activations, Latency)}


def parse_budget(budget: str | float, cost: Cost, seed_cost: float, *, bytes_per_parameter: int = 4) -> float:
    """A budget as a number in the cost's own unit.

    Args:
        budget: `"50%"` of the seed, `"300M"`, `"2MB"` (parameters, at `bytes_per_parameter`), `"5ms"` (seconds), or a
            number.
        cost: what is budgeted.
        seed_cost: cost of the seed, in the cost's unit.
        bytes_per_parameter: bytes of one saved parameter.

    Raises:
        BudgetError: if it cannot be read, or its unit is not the cost's.
    """
    expected = f'Expected a budget for {cost.name} in {cost.unit}, such as "50%", {_examples(cost)} or a number'
    number: float | None
    if isinstance(budget, str):
        number = _parse_text(budget.strip(), cost, seed_cost, bytes_per_parameter)
    else:
        number = float(budget) if isinstance(budget, Real) and not isinstance(budget, bool) else None
    if number is None or not (math.isfinite(number) and number > 0):
        raise BudgetError(f"{expected}. Received: budget={budget!r}.")
    return number


def _examples(cost: Cost) -> str:
    return {"seconds": '"5ms"', "parameters": '"1.2M", "2MB"'}.get(cost.unit, '"300M"')


def _parse_text(text: str, cost: Cost, seed_cost: float, bytes_per_parameter: int) -> float | None:
    match = re.fullmatch(r"([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(\S*)", text)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        return None
    unit = match[2] if match else ""
    if unit == "%":
        return value / 100 * seed_cost
    if cost.unit == "seconds":
        return value * SECONDS[unit] if unit in SECONDS else (value if not unit else None)
    if cost.unit == "parameters" and unit in BYTES:
        return value * BYTES[unit] / bytes_per_parameter
    return value * SCALES[unit.upper()] if unit.upper() in SCALES else None


def fit_budget(
    model: Any,
    budget: str | float | Mapping[Cost, str | float],
    *,
    regularizer: Regularizer | None = None,
    cost: Cost | None = None,
    per_cost: float = 0.0,
    round_to: int = 1,
    floor: float = FLOOR,
    bytes_per_parameter: int = 4,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> Structure:
    """The structure of the highest scores that costs no more than a budget.

    Args:
        model: a StructureLearner, whose regularizer and cost are the defaults, or a Keras model as it is.
        budget: what `limits_of` reads: `"50%"`, `"2MB"`, `"50% FLOPs, 2MB"`, a number, or `{cost: budget}`.
        regularizer: gives the scores; GroupLasso() by default.
        cost: what the budget is for where it does not say; FLOPs() by default.
        per_cost: scores are divided by price ** per_cost: at 0 the strongest channels live, at 1 those that are the
            strongest for what they cost.
        round_to: channels that lie in the same places live in multiples of this, or all of them.
        floor: layers that every path goes through keep at least this share of the width that they had if all layers were
            narrowed alike (times the root of the budget as a share of the seed), so that none becomes a bottleneck of a
            channel or two; 0 to 1. Half as much, and so on, where that is above the budget.
        bytes_per_parameter: bytes of one saved parameter, for budgets such as "2MB".
        protect: as in `trace`; a learner has its own.
        tie: as in `trace`; a learner has its own.
        grouped: as in `trace`; a learner has its own.

    Returns:
        A closed structure, never above the budget. Either 98 % of the budget is used, or no dead group (no `round_to` of
        them) could be revived within it.

    Raises:
        BudgetError: if the budget cannot be read or reached; the message names the reachable minimum.
    """
    graph, scores, cost = scored(model, regularizer=regularizer, cost=cost, protect=protect, tie=tie, grouped=grouped)
    limits = limits_of(graph, budget, cost, bytes_per_parameter=bytes_per_parameter)
    worth = scores / group_prices(graph, limits) ** per_cost if per_cost else scores
    return Structure.closed(graph, choose(graph, worth, limits, round_to=round_to, floor=floor), worth)


def scored(
    model: Any,
    *,
    regularizer: Regularizer | None = None,
    cost: Cost | None = None,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> tuple[ChannelGraph, np.ndarray, Cost]:
    """Graph, comparable score of each group and cost of a learner, or of a Keras model as it is."""
    if isinstance(model, StructureLearner):
        cost = cost or model.target_cost
        if regularizer is None or regularizer is model.regularizer:
            return model.graph, model.scores(comparable=True), cost
        graph = model.graph
    else:
        graph = trace(model, protect=protect, tie=tie, grouped=grouped)
    regularizer = regularizer or GroupLasso()
    graph = pin_sourceless(graph, regularizer)
    return graph, group_scores(graph, regularizer, comparable=True), cost or FLOPs()


def share_of_budget(learner: StructureLearner, budget: str | float | Mapping[Cost, str | float]) -> float:
    """Cost of the channels above the threshold as a share of the budget, of the tightest one."""
    limits, structure = limits_of(learner.graph, budget, learner.target_cost), learner.structure()
    return max(limit.cost(learner.graph, structure) / limit.limit for limit in limits)


@dataclass(frozen=True)
class Limit:
    """What one cost may be, in its own unit."""

    cost: Cost
    limit: float


def limits_of(
    graph: ChannelGraph,
    budget: str | float | Mapping[Cost, str | float],
    cost: Cost,
    *,
    bytes_per_parameter: int = 4,
) -> list[Limit]:
    """A budget as limits.

    Args:
        graph: the traced seed.
        budget: what `parse_budget` reads, for `cost` or for the cost that its unit or a name behind it says ("2MB" is
            ModelSize); several of them with commas or "and" between ("50% FLOPs, 2MB"); or `{cost: budget}`.
        cost: what the budget is for where it does not say.
        bytes_per_parameter: bytes of one saved parameter.

    Raises:
        BudgetError: if it cannot be read.
    """
    return [
        Limit(one, parse_budget(text, one, one(graph), bytes_per_parameter=bytes_per_parameter))
        for one, text in split_budget(budget, cost)
    ]


def split_budget(budget: str | float | Mapping[Cost, str | float], cost: Cost) -> list[tuple[Cost, str | float]]:
    """A budget as one (cost, budget) for each cost; see `limits_of`."""
    if isinstance(budget, Mapping):
        budgets = list(budget.items())
    elif isinstance(budget, str):
        budgets = [_named(part, cost) for part in re.split(r",\s+|\s+and\s+", budget.strip())]
    else:
        budgets = [(cost, budget)]
    if not budgets:
        raise BudgetError(
            f'Expected a budget for at least one cost, such as {{km.FLOPs(): "50%"}}. Received: {budget}.'
        )
    return budgets


def _named(text: str, cost: Cost) -> tuple[Cost, str]:
    """The cost that a part of a budget is for, and the budget without the cost's name."""
    amount, _, name = text.strip().rpartition(" ")
    if amount and name in NAMED:
        return (cost if cost.name == name else NAMED[name]()), amount
    unit = text.strip().lstrip("0123456789.eE+- ")
    if unit in BYTES and unit != "B" and cost.unit != "parameters":
        return ModelSize(), text
    if unit in SECONDS and cost.unit != "seconds":
        raise BudgetError(f"A budget in seconds needs the hardware. Expected cost=Latency(...). Received: {text!r}.")
    return cost, text


@dataclass(frozen=True)
class Reach:
    """What of a cost can be reached.

    Attributes:
        cost: which cost.
        seed: that of the whole seed, in its unit.
        minimum: that of the cheapest structure.
        holding: layers that hold the minimum up, the most expensive first: (layer, cost, why it cannot be smaller).
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


def reach(
    model: Any,
    cost: Cost | None = None,
    *,
    regularizer: Regularizer | None = None,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> Reach:
    """How far a cost can fall, before any training.

    Args:
        model: a StructureLearner or a Keras model.
        cost: FLOPs() by default, or the learner's.
        regularizer: as in `fit_budget`; what it cannot score stays.
        protect: as in `trace`; a learner has its own.
        tie: as in `trace`; a learner has its own.
        grouped: as in `trace`; a learner has its own.
    """
    graph, scores, cost = scored(model, regularizer=regularizer, cost=cost, protect=protect, tie=tie, grouped=grouped)
    return _reach(graph, cost, close(graph, graph.pinned_mask, scores))


def _reach(graph: ChannelGraph, cost: Cost, smallest: Closed) -> Reach:
    values = cost.per_layer(graph, smallest)
    order = np.argsort(-values, kind="stable")
    holding = tuple((graph.layers[n].name, float(values[n]), _why_it_stays(graph, n)) for n in order if values[n] > 0)
    return Reach(cost, cost(graph), float(values.sum()), holding)


def _why_it_stays(graph: ChannelGraph, number: int) -> str:
    """Why a layer cannot be smaller: the reason of the first pinned group among its weights' channels."""
    vectors = [v for weight in graph.layers[number].weights for v in reversed(weight.vectors) if v >= 0]
    for vector in vectors:
        for group in graph.group_of[graph.vectors[vector]].tolist():
            if group in graph.pinned:
                return graph.pinned[group]
    return "the only path through it"


def group_prices(graph: ChannelGraph, limits: Sequence[Limit]) -> np.ndarray:
    """What each group costs in the whole seed, as a share of the limits, float64, `(num_groups,)`, above 0."""
    counts = graph.counts(np.ones(graph.num_groups, bool))
    owners = len(graph.calls) + len(graph.layers)
    vector, group, count = graph.pairs
    prices = np.zeros(graph.num_groups)
    for limit in limits:
        table = limit.cost.monomials(graph)
        by_vector = np.zeros(len(graph.vectors) + 1)  # the last one is CONSTANT's
        for side, price in zip((table.a, table.b), table.prices(counts, owners), strict=True):
            np.add.at(by_vector, np.where(side == CONSTANT, len(graph.vectors), side), price)
        prices += np.bincount(group, weights=by_vector[vector] * count, minlength=graph.num_groups) / limit.limit
    free = prices[prices > 0]
    return np.maximum(prices, free.min() if len(free) else 1.0)


def choose(
    graph: ChannelGraph, scores: np.ndarray, limits: Sequence[Limit], *, round_to: int = 1, floor: float = 0.0
) -> np.ndarray:
    """Alive groups, by descending score, within every limit.

    Args:
        graph: the traced model.
        scores: one number per group, `(num_groups,)`.
        limits: what each cost may be.
        round_to: groups that lie in the same places live in multiples of this, or all of them.
        floor: as in `fit_budget`.

    Returns:
        bool, `(num_groups,)`, closed.
    """
    if type(round_to) is not int or round_to < 1:
        raise BudgetError(f"Expected a whole number round_to of at least 1. Received: round_to={round_to}.")
    if not 0 <= floor <= 1:
        raise BudgetError(f"Expected a floor from 0 to 1. Received: floor={floor}.")
    budget = _Budget(graph, scores, limits, round_to)
    chosen = budget.close(graph.pinned_mask)
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

    def __init__(self, graph: ChannelGraph, scores: np.ndarray, limits: Sequence[Limit], round_to: int) -> None:
        self.graph, self.scores, self.limits, self.round_to = graph, scores, limits, round_to
        self.tables = [limit.cost.monomials(graph) for limit in limits]
        free = np.flatnonzero(~graph.pinned_mask)
        kinds = same_places(graph)
        held = np.bincount(kinds[graph.pinned_mask], minlength=len(kinds))
        by_kind = free[np.lexsort((-scores[free], kinds[free]))]
        place = np.arange(len(by_kind)) - np.searchsorted(kinds[by_kind], kinds[by_kind])
        keys = kinds[by_kind] * (len(kinds) + 1) + (place + held[kinds[by_kind]]) // round_to
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
            if self.round_to == 1:
                return closed
            touched = np.append(np.zeros(len(self.blocks), bool), True)
            touched[self.block_of[closed.alive & ~self.graph.pinned_mask]] = True
            rounded = touched[self.block_of] & ~self.graph.pinned_mask | closed.alive
            if np.array_equal(rounded, closed.alive):
                return closed
            alive = rounded

    def full(self, closed: Closed) -> np.ndarray:
        """Whether all groups of each block are alive, bool, `(blocks,)`."""
        free = ~self.graph.pinned_mask
        missing = np.bincount(self.block_of[free & ~closed.alive], minlength=len(self.blocks))
        return missing == 0

    def costs(self, closed: Closed) -> list[float]:
        owners = len(closed.present)
        return [float((t.branch_sums(closed.counts, owners).max(axis=1) * closed.present).sum()) for t in self.tables]

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
        needed = [np.unique(self.graph.group_of[self.graph.vectors[v]]) for v in np.flatnonzero(smallest.counts)]
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
