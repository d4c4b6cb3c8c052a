"""Budgets: what a network may cost, as a value; read, and turned into limits in the costs' own units."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.costs.sizing import FileSizeOf
from keras_morph.errors import BudgetError

__all__ = ["Budget", "Limit", "budget_from", "group_prices", "parse_budget", "split_budget"]

SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
LEAST_BLOCKS = 4  # that a width is divided into, whatever the runtime likes
FLOOR = 0.5  # chosen on digits: below it a layer of one channel can cut the network
COUNTED = ("FLOPs", "parameters", "elements")  # a cost of one's own may well be below 1 in its unit
FILE = re.compile(rf"(.*\d\s*(?:{'|'.join(BYTES)}))\s+(onnx|litert|openvino)(?:\s+(int8|float32))?")
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
    return {"seconds": '"5ms"', "bytes": '"2MB"', "parameters": '"1.2M", "2MB"'}.get(cost.unit, '"300M"')


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
    if cost.unit == "bytes":
        return value * BYTES[unit or "B"] if (unit or "B") in BYTES else None
    if cost.unit == "parameters" and unit in BYTES:
        return value * BYTES[unit] / bytes_per_parameter
    return value * SCALES[unit.upper()] if unit.upper() in SCALES else None


@dataclass(frozen=True)
class Limit:
    """What one cost may be, in its own unit."""

    cost: Cost
    limit: float


@dataclass(frozen=True)
class Budget:
    """What a network may cost, and how it is kept.

    Args:
        amount: `"50%"` of the seed, `"300M"`, `"2MB"` (parameters, at `bytes_per_parameter`; with a FileSize, bytes of the
            file), `"2MB litert int8"` (bytes of the file in a format, float32 where it does not say int8), `"5ms"`, or a
            number in the cost's own unit (FLOPs, parameters, elements, seconds, bytes); for the cost that its unit or a name
            behind it says; several of them with commas or "and" between (`"50% FLOPs, 2MB"`); or `{cost: amount}`.
        cost: what an amount is for where it does not say; by default the learner's cost, or FLOPs().
        round_to: channels that lie in the same places live in multiples of this, or all of them. "auto" takes the block that
            the cost's runtime computes at once, 8 where none was measured; a quarter of the width at most, as a power of 2;
            and 1 where the budget is out of reach otherwise.
        floor: layers that every path goes through keep at least this share of the width that they had if all layers were
            narrowed alike (times the root of the budget as a share of the seed), so that none becomes a bottleneck of a
            channel or two; 0 to 1. It is halved until the budget is met.
        per_cost: scores are divided by price ** per_cost: at 0 the strongest channels live, at 1 those that are the
            strongest for what they cost; by default 1 where `shrink` and `prune` choose by `contribution_scores`, else 0.
        bytes_per_parameter: bytes of one saved parameter, for amounts such as "2MB".

    Raises:
        BudgetError: if it cannot be read.

    Example:
        >>> km.Budget("50% FLOPs, 2MB", round_to=8).amounts()
        [(FLOPs(), '50%'), (ModelSize(), '2MB')]
    """

    amount: str | float | Mapping[Cost, str | float]
    cost: Cost | None = None
    _: KW_ONLY
    round_to: int | str = "auto"
    floor: float = FLOOR
    per_cost: float | None = None
    bytes_per_parameter: int = 4

    def __post_init__(self) -> None:
        if self.round_to != "auto" and (type(self.round_to) is not int or self.round_to < 1):
            raise BudgetError(
                f'Expected round_to="auto", or a whole number of at least 1. Received: round_to={self.round_to!r}.'
            )
        if not 0 <= self.floor <= 1:
            raise BudgetError(f"Expected a floor from 0 to 1. Received: floor={self.floor}.")
        if self.per_cost is not None and not 0 <= self.per_cost < math.inf:
            raise BudgetError(f"Expected a finite per_cost of at least 0. Received: per_cost={self.per_cost}.")
        if not self.bytes_per_parameter > 0:
            raise BudgetError(
                f"Expected bytes_per_parameter above 0. Received: bytes_per_parameter={self.bytes_per_parameter}."
            )

    def amounts(self, cost: Cost | None = None) -> list[tuple[Cost, str | float]]:
        """One (cost, amount) for each cost.

        Args:
            cost: what an amount is for where neither it nor the budget says; FLOPs() by default.
        """
        return split_budget(self.amount, self.cost or cost or FLOPs())

    def limits(self, graph: ChannelGraph, cost: Cost | None = None) -> list[Limit]:
        """The amounts in the units of their costs, for a graph; cost as in `amounts`.

        Raises:
            BudgetError: if one cannot be read.
        """
        return [
            Limit(
                one,
                (1 - one.margin) * parse_budget(amount, one, one(graph), bytes_per_parameter=self.bytes_per_parameter),
            )
            for one, amount in self.amounts(cost)
        ]

    def per_unit_of_cost(self) -> "Budget":
        """The same, at `per_cost` 1 where it says none."""
        return self if self.per_cost is not None else replace(self, per_cost=1.0)

    def within(self, limits: Sequence[Limit]) -> "Budget":
        """The same with these limits, which have their margins already; they mean the same for every graph."""
        amounts: dict[Cost, float] = {}
        for one in limits:  # of two for one cost the smaller
            amounts[one.cost] = min(amounts.get(one.cost, math.inf), one.limit / (1 - one.cost.margin))
        return replace(self, amount=amounts)


def multiples(round_to: int | str, sizes: np.ndarray, costs: Sequence[Cost]) -> np.ndarray:
    """What widths are rounded to, `(n,)`.

    Args:
        round_to: as in Budget.
        sizes: the widths in the seed, `(n,)`.
        costs: of the budget.
    """
    if isinstance(round_to, int):
        return np.full(len(sizes), round_to)
    quarter = 2 ** np.floor(np.log2(np.maximum(sizes / LEAST_BLOCKS, 1))).astype(np.int64)
    return np.minimum(quarter, max(cost.block for cost in costs))


def budget_from(budget: Any, cost: Cost | None = None) -> Budget:
    """A Budget, from one or from an amount; an amount that does not say what for is for this cost."""
    if not isinstance(budget, Budget):
        return Budget(budget, cost)
    return budget if budget.cost is not None or cost is None else replace(budget, cost=cost)


def split_budget(budget: str | float | Mapping[Cost, str | float], cost: Cost) -> list[tuple[Cost, str | float]]:
    """An amount as one (cost, amount) for each cost; see `Budget`."""
    if isinstance(budget, Mapping):
        budgets = list(budget.items())
    elif isinstance(budget, str):
        budgets = [_named(part, cost) for part in re.split(r",\s+|(?<=[%A-Za-z]),|\s+and\s+", budget.strip())]
    else:
        budgets = [(cost, budget)]
    if not budgets:
        raise BudgetError(
            f'Expected a budget for at least one cost, such as {{km.FLOPs(): "50%"}}. Received: {budget}.'
        )
    return budgets


def _named(text: str, cost: Cost) -> tuple[Cost, str]:
    """The cost that a part of a budget is for, and the budget without the cost's name."""
    if found := FILE.fullmatch(text.strip()):
        return FileSizeOf(found[2], found[3] == "int8"), found[1]
    amount, _, name = text.strip().rpartition(" ")
    if amount and (name == cost.name or (name == "Latency" and cost.unit == "seconds")):
        return cost, amount
    if amount and name in NAMED:
        return NAMED[name](), amount
    if amount and (meant := _meant(name)):
        raise BudgetError(
            f"Expected the name of a cost: {', '.join(NAMED)}. Received: budget={text!r}; "
            f'did you mean "{amount} {meant}"?'
        )
    unit = text.strip().lstrip("0123456789.eE+- ")
    if unit in BYTES and unit != "B" and cost.unit not in ("parameters", "bytes"):
        return ModelSize(), text
    if unit in SECONDS and cost.unit != "seconds":
        raise BudgetError(
            "A budget in seconds needs the hardware. Expected a cost such as Latency(...) or MeasuredLatency(...); on the "
            f"command line --cost Latency, or --latency. Received: {text!r}."
        )
    return cost, text


def _meant(name: str) -> str | None:
    """The cost whose name was written in another case, or nearly."""
    lower = {known.lower(): known for known in NAMED}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[close[0]] if close else None


def group_prices(graph: ChannelGraph, limits: Sequence[Limit]) -> np.ndarray:
    """What each group costs in the whole seed, as a share of the limits, float64, `(num_groups,)`, above 0."""
    counts = graph.counts(np.ones(graph.num_groups, bool))
    vector, group, count = graph.pairs
    prices = np.zeros(graph.num_groups)
    for limit in limits:
        by_vector = limit.cost.table(graph).prices(counts)
        prices += np.bincount(group, weights=by_vector[vector] * count, minlength=graph.num_groups) / limit.limit
    free = prices[prices > 0]
    return np.maximum(prices, free.min() if len(free) else 1.0)
