"""A budget that is kept and used as measured: what was chosen is timed, and chosen again where it takes too long or too little.

What is cut to a budget is what the cost believes to be cheap, so that a forecast that is right on average is too low for it.
Where times go in steps, the next structure within less may take much less: then one between the two is tried.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from keras_morph.costs.budget import Limit, budget_from, parse_budget
from keras_morph.costs.costs import Cost
from keras_morph.errors import BudgetError, BudgetWarning
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of
from keras_morph.search.selection import fit_budget

__all__ = ["fit_measured"]

TRIES = 6
NOISE = 0.01  # of the limit is left: what two measurements of one network differ by
USED = 0.97  # of what is allowed is enough: nothing between is tried


def fit_measured(
    model: Any,
    budget: Any,
    *,
    scores: Any = None,
    cost: Cost | None = None,
    say: Callable[[str], None] | None = None,
) -> Structure:
    """`fit_budget`, whose structure also keeps the budget as measured, where the cost has a clock.

    The chosen structure is measured beside the whole network, of which `"60%"` is a share. Where it costs more than the budget
    says, the limit is lowered by as much and it is chosen again; where it leaves more than 3 % unused, the limit is raised by as
    much; where one is over and one leaves some, a limit between is tried; up to 6 measurements. Where nothing can be measured
    (another device, a runtime that is not installed) the budget is kept as computed.

    Args:
        model, budget, scores, cost: as in `fit_budget`.
        say: takes a line after each measurement.

    Returns:
        A closed structure. If none keeps the budget as measured, the nearest one, with a BudgetWarning.
    """
    say = say or (lambda _: None)
    budget = budget_from(budget, cost or getattr(model, "target_cost", None))
    graph = graph_of(model)
    limits = budget.limits(graph)
    with ExitStack() as stack:
        clocks = [stack.enter_context(limit.cost.clock(graph)) for limit in limits]
        for limit, clock in zip(limits, clocks, strict=True):
            if clock is None and limit.cost.margin:
                left = f"{limit.cost.margin:.1%} of it is left"
                say(f"{limit.cost!r} is not measured here: its budget is kept as computed, and {left}")
        if not any(clocks):
            return fit_budget(model, budget, scores=scores)
        limits = [
            Limit(one.cost, one.limit / (1 - one.cost.margin)) if clock else one  # what is measured needs no margin
            for one, clock in zip(limits, clocks, strict=True)
        ]
        structure = fit_budget(model, budget.within(limits), scores=scores)
        measured: list[tuple[list[float], tuple[float, ...], Structure]] = []
        tried: list[_Tried] = []
        while len(tried) < TRIES:
            found, allowed = [], []
            for clock, (part, amount) in zip(clocks, budget.amounts(), strict=True):
                small, whole = clock(structure) if clock else (0.0, 1.0)
                found.append(small)
                allowed.append(parse_budget(amount, part, whole, bytes_per_parameter=budget.bytes_per_parameter))
                if clock:
                    words = [_in_words(value, part.unit) for value in (small, whole, allowed[-1])]
                    say(f"{part!r}: {words[0]} of the whole network's {words[1]} as measured; {words[2]} are allowed")
            measured.append((found, tuple(one.cost(graph, structure) for one in limits), structure))
            # All against what is allowed now: a share of the whole network's time falls with its shortest one.
            tried = [_Tried(max(_over(each, allowed)), costs, one) for each, costs, one in measured]
            over = _over(found, allowed)
            kept, exceeding = _around(tried)
            if kept is None:
                aims = [
                    cost * (1 - NOISE) / more if more > 1 else one.limit
                    for one, cost, more in zip(limits, tried[-1].costs, over, strict=True)
                ]
            elif kept.share >= USED:
                break
            elif exceeding is None:
                aims = [cost * (1 - NOISE) / kept.share for cost in kept.costs]
            else:
                part = min(0.5, (1 - NOISE - kept.share) / (exceeding.share - kept.share))  # half, since times may jump
                aims = [low + part * (high - low) for low, high in zip(kept.costs, exceeding.costs, strict=True)]
            limits = [
                Limit(one.cost, aim) if clock else one for one, clock, aim in zip(limits, clocks, aims, strict=True)
            ]
            try:
                structure = fit_budget(model, budget.within(limits), scores=scores)
            except BudgetError:  # there is nothing smaller
                break
            if any(structure == other.structure for other in tried):
                break
    kept, exceeding = _around(tried)
    if kept is not None:
        return kept.structure
    assert exceeding is not None
    warnings.warn(
        f"{graph.model.name} keeps the budget of {budget.amount} as computed, not as measured: the best that was tried takes "
        f"{exceeding.share * (1 - NOISE):.3f} times as much. Expected at most 1. Give a lower budget.",
        BudgetWarning,
        stacklevel=3,
    )
    return exceeding.structure


def _over(found: list[float], allowed: list[float]) -> list[float]:
    """What was measured as shares of what is allowed, less the noise."""
    return [one / most / (1 - NOISE) for one, most in zip(found, allowed, strict=True)]


@dataclass(frozen=True)
class _Tried:
    """A structure that was measured.

    Attributes:
        share: of what is allowed, as measured, of the tightest limit.
        costs: of each limit, as computed.
    """

    share: float
    costs: tuple[float, ...]
    structure: Structure


def _around(tried: list[_Tried]) -> tuple[_Tried | None, _Tried | None]:
    """What uses most of what is allowed, and what exceeds it by least; None where there is none."""
    by_share = sorted(tried, key=attrgetter("share"))
    kept = [one for one in by_share if one.share <= 1]
    return kept[-1] if kept else None, by_share[len(kept)] if len(kept) < len(by_share) else None


def _in_words(value: float, unit: str) -> str:
    return f"{value * 1e3:.4g} ms" if unit == "seconds" else f"{value:,.0f} {unit}"
