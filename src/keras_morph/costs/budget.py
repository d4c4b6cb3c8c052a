"""Budgets: what a network may cost, as a value; read, and turned into limits in the costs' own units."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import CONSTANT, Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.errors import BudgetError

__all__ = ["Limit", "group_prices", "limits_of", "parse_budget", "split_budget"]

SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
COUNTED = ("FLOPs", "parameters", "elements")  # a cost of one's own may well be below 1 in its unit
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
    if cost.unit in COUNTED and _is_share(budget):
        share = f"{100 * float(budget):g}%"
        raise BudgetError(f'{expected}. Received: budget={budget!r}; did you mean "{share}" of the seed?')
    return number


def _is_share(budget: str | float) -> bool:
    """A number below 1 without a unit: of what is counted, nobody wants less than one."""
    try:
        return float(budget) < 1
    except ValueError:  # "50%", "2MB"
        return False


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
    if amount and (meant := _meant(name)):
        raise BudgetError(
            f"Expected the name of a cost: {', '.join(NAMED)}. Received: budget={text!r}; "
            f'did you mean "{amount} {meant}"?'
        )
    unit = text.strip().lstrip("0123456789.eE+- ")
    if unit in BYTES and unit != "B" and cost.unit != "parameters":
        return ModelSize(), text
    if unit in SECONDS and cost.unit != "seconds":
        raise BudgetError(f"A budget in seconds needs the hardware. Expected cost=Latency(...). Received: {text!r}.")
    return cost, text


def _meant(name: str) -> str | None:
    """The cost whose name was written in another case, or nearly."""
    lower = {known.lower(): known for known in NAMED}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[close[0]] if close else None


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
