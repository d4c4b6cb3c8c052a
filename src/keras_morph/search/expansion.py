"""Widen a structure uniformly until a budget is used: the second half of MorphNet's shrink and expand."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_morph.costs.budget import limits_of
from keras_morph.costs.costs import Cost, FLOPs
from keras_morph.errors import BudgetError
from keras_morph.graph.closure import close
from keras_morph.graph.structure import Structure, structure_from
from keras_morph.graph.tracing import trace
from keras_morph.search.selection import same_places

__all__ = ["expand"]

FINEST = 1e-4  # of the width multiplier


def expand(
    seed: Any,
    structure: Any,
    cost: Cost | None = None,
    budget: str | float | Mapping[Cost, str | float] = "100%",
    *,
    round_to: int = 1,
    bytes_per_parameter: int = 4,
    protect: Sequence[str] = (),
    tie: Sequence[Sequence[str]] = (),
) -> Structure:
    """The structure with all its widths multiplied by one factor, the largest that a budget allows.

    Args:
        seed: the model that the structure belongs to.
        structure: as in `rebuild`.
        cost: what the budget is for; FLOPs() by default.
        budget: as in `fit_budget`; "100%" is the cost of the seed.
        round_to: widths of groups that lie in the same places become multiples of this, or stay what they are.
        bytes_per_parameter: as in `fit_budget`.
        protect: as in `trace`.
        tie: as in `trace`.

    Returns:
        An expanded structure, for `rebuild(seed, expanded, weights=False)`. It repeats channels of the seed; pinned
        channels (inputs, outputs) stay as they are, and grouped convolutions widen by whole groups.

    Raises:
        BudgetError: if the structure alone costs more than the budget.

    References:
        Gordon et al., MorphNet, https://arxiv.org/abs/1711.06798, section 3.2
    """
    graph = trace(seed, protect=protect, tie=tie)
    limits = limits_of(graph, budget, cost or FLOPs(), bytes_per_parameter=bytes_per_parameter)
    alive = close(graph, structure_from(structure, graph).groups(graph)).alive
    kinds = np.where(graph.pinned_mask, -1, same_places(graph))
    members = np.flatnonzero(alive & (kinds >= 0))
    members = members[np.argsort(kinds[members], kind="stable")]
    of_kind, start, count = np.unique(kinds[members], return_index=True, return_counts=True)
    place = np.arange(len(members)) - np.repeat(start, count)

    def copies(factor: float) -> np.ndarray:
        wider = np.floor(count * factor).astype(np.int64) // round_to * round_to
        wider = np.repeat(np.maximum(wider, count), count)
        result = alive.astype(np.int64)
        own = np.repeat(count, count)
        result[members] = wider // own + (place < wider % own)
        return result

    def share(factor: float) -> float:
        closed = close(graph, copies(factor))
        return max(limit.cost.total(graph, closed) / limit.limit for limit in limits)

    if share(1.0) > 1:
        raise BudgetError(
            f"The structure of {graph.model.name} costs {share(1.0):.2f} times the budget as it is. "
            f"Expected: a budget that leaves room to expand. Received: {budget!r}."
        )
    low, high = 1.0, 2.0
    while share(high) <= 1 and high < 2**20 and len(of_kind):
        low, high = high, 2 * high
    while high - low > FINEST:
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= 1 else (low, middle)
    return Structure.closed(graph, copies(low))
