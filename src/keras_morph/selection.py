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
from keras_morph.costs import Cost, FLOPs
from keras_morph.errors import BudgetError
from keras_morph.learning import StructureLearner
from keras_morph.regularizers import GroupLasso, Regularizer, group_scores, pin_sourceless
from keras_morph.structure import Structure
from keras_morph.tracing import trace

__all__ = ["choose", "fit_budget", "parse_budget"]

SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
FULL_ENOUGH = 0.98


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
    bytes_per_parameter: int = 4,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
    grouped: str = "whole",
) -> Structure:
    """The structure of the highest scores that costs no more than a budget.

    Args:
        model: a StructureLearner, whose regularizer and cost are the defaults, or a Keras model as it is.
        budget: what `parse_budget` reads, or `{cost: budget}` for several at once.
        regularizer: gives the scores; GroupLasso() by default.
        cost: what the budget is for; FLOPs() by default.
        bytes_per_parameter: bytes of one saved parameter, for budgets such as "2MB".
        protect: as in `trace`; a learner has its own.
        tie: as in `trace`; a learner has its own.
        grouped: as in `trace`; a learner has its own.

    Returns:
        A closed structure, never above the budget. Either 98 % of the budget is used, or no dead group could be
        revived within it.

    Raises:
        BudgetError: if the budget cannot be read or reached; the message names the reachable minimum.
    """
    if isinstance(model, StructureLearner):
        graph = model.graph
        regularizer, cost = regularizer or model.regularizer, cost or model.target_cost
    else:
        graph, regularizer = trace(model, protect=protect, tie=tie, grouped=grouped), regularizer or GroupLasso()
    graph = pin_sourceless(graph, regularizer)
    scores = group_scores(graph, regularizer)
    limits = limits_of(graph, budget, cost or FLOPs(), bytes_per_parameter=bytes_per_parameter)
    return Structure.closed(graph, choose(graph, scores, limits), scores)


def is_within(
    learner: StructureLearner, structure: Structure, budget: str | float | Mapping[Cost, str | float]
) -> bool:
    """Whether a structure of a learner's seed costs no more than a budget."""
    limits = limits_of(learner.graph, budget, learner.target_cost)
    return all(limit.cost(learner.graph, structure) <= limit.limit for limit in limits)


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
    """A budget as limits; `cost` is what it is for unless it says so itself."""
    budgets = budget if isinstance(budget, Mapping) else {cost: budget}
    if not budgets:
        raise BudgetError(
            f'Expected a budget for at least one cost, such as {{km.FLOPs(): "50%"}}. Received: {budget}.'
        )
    return [
        Limit(one, parse_budget(text, one, one(graph), bytes_per_parameter=bytes_per_parameter))
        for one, text in budgets.items()
    ]


def choose(graph: ChannelGraph, scores: np.ndarray, limits: Sequence[Limit]) -> np.ndarray:
    """Alive groups, by descending score, within every limit.

    Args:
        graph: the traced model.
        scores: one number per group, `(num_groups,)`.
        limits: what each cost may be.

    Returns:
        bool, `(num_groups,)`, closed.
    """
    budget = _Budget(graph, scores, limits)
    chosen = budget.close(graph.pinned_mask)
    budget.check_reachable(chosen)
    queue = np.flatnonzero(~graph.pinned_mask)
    queue = queue[np.argsort(-scores[queue], kind="stable")]
    kinds = _same_places(graph)
    while len(queue) and budget.share(chosen) < FULL_ENOUGH:
        chosen, taken = budget.longest_prefix(chosen, queue)
        # The next one does not fit, nor does any that lies in the same places; cheaper ones further down may.
        rest = queue[taken:]
        queue = rest[kinds[rest] != kinds[rest[0]]] if len(rest) else rest
        queue = queue[~chosen.alive[queue]]
    return chosen.alive


class _Budget:
    """Limits on costs, and closed structures held against them."""

    def __init__(self, graph: ChannelGraph, scores: np.ndarray, limits: Sequence[Limit]) -> None:
        self.graph, self.scores, self.limits = graph, scores, limits
        self.tables = [limit.cost.monomials(graph) for limit in limits]

    def close(self, alive: np.ndarray) -> Closed:
        return close(self.graph, alive, self.scores)

    def costs(self, closed: Closed) -> list[float]:
        owners = len(closed.present)
        return [float((t.branch_sums(closed.counts, owners).max(axis=1) * closed.present).sum()) for t in self.tables]

    def share(self, closed: Closed) -> float:
        """Cost as a share of the budget, of the tightest one."""
        return max(cost / limit.limit for cost, limit in zip(self.costs(closed), self.limits, strict=True))

    def check_reachable(self, smallest: Closed) -> None:
        for cost, limit in zip(self.costs(smallest), self.limits, strict=True):
            if cost > limit.limit:
                raise BudgetError(
                    f"A budget of {limit.limit:,.6g} {limit.cost.unit} cannot be reached for {self.graph.model.name}: "
                    f"the reachable minimum of {limit.cost.name} is {_rounded_up(cost):,.6g} {limit.cost.unit}. "
                    "Raise the budget, or pin and protect less."
                )

    def longest_prefix(self, chosen: Closed, queue: np.ndarray) -> tuple[Closed, int]:
        """Add as many groups from the front of a queue as fit; how many were added."""
        fits, low, high = chosen, 0, len(queue) + 1
        while high - low > 1:
            middle = (low + high) // 2
            alive = chosen.alive.copy()
            alive[queue[:middle]] = True
            closed = self.close(alive)
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


def _same_places(graph: ChannelGraph) -> np.ndarray:
    """A number per group, equal for groups whose channels lie equally often in the same vectors: they cost the same."""
    vector, group, count = graph.pairs
    random = np.random.default_rng(0).integers(1, 2**62, len(graph.vectors), dtype=np.uint64)
    hashes = np.zeros(graph.num_groups, np.uint64)
    np.add.at(hashes, group, random[vector] * count.astype(np.uint64))
    return np.unique(hashes, return_inverse=True)[1]
