"""Widen a structure uniformly until a budget is used: the second half of MorphNet's shrink and expand."""

from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.budget import budget_from, multiples
from keras_morph.costs.costs import Cost
from keras_morph.errors import BudgetError, KerasMorphError
from keras_morph.graph.closure import close
from keras_morph.graph.structure import Structure, graph_and_structure
from keras_morph.search.selection import same_places

__all__ = ["check_expandable", "expand"]

FINEST = 1e-4  # of the width multiplier


def expand(model: Any, structure: Any, cost: Cost | None = None, budget: Any = "100%") -> Structure:
    """The structure with all its widths multiplied by one factor, the largest that a budget allows.

    Args:
        model: the seed that the structure belongs to, its ChannelGraph, or a StructureLearner.
        structure: as in `rebuild`.
        cost: what the budget is for where it does not say; FLOPs() by default.
        budget: as in `fit_budget`; "100%" is the cost of the seed. Widths of groups that lie in the same places become
            multiples of its `round_to`, or stay what they are.

    Returns:
        An expanded structure, for `rebuild(model, expanded, weights=False)`. It repeats channels of the seed; pinned
        channels (inputs, outputs) stay as they are, and grouped convolutions widen by whole groups.

    Raises:
        BudgetError: if the structure alone costs more than the budget.
        KerasMorphError: if it was traced with `grouped="equal"`.

    References:
        Gordon et al., MorphNet, https://arxiv.org/abs/1711.06798, section 3.2

    Example:
        >>> structure = km.fit_budget(model, "50%")
        >>> wide = km.rebuild(model, km.expand(model, structure), weights=False)
        >>> km.FLOPs()(wide) <= km.FLOPs()(model)
        True
    """
    graph, structure = graph_and_structure(model, structure)
    check_expandable(graph)
    budget = budget_from(budget, cost or getattr(model, "target_cost", None))
    limits = budget.limits(graph)
    alive = close(graph, structure.groups(graph)).alive
    kinds = np.where(graph.pinned_mask, -1, same_places(graph))
    members = np.flatnonzero(alive & (kinds >= 0))
    members = members[np.argsort(kinds[members], kind="stable")]
    of_kind, start, count = np.unique(kinds[members], return_index=True, return_counts=True)
    place = np.arange(len(members)) - np.repeat(start, count)
    round_to = multiples(budget.round_to, count, [limit.cost for limit in limits])

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
            f"Expected: a budget that leaves room to expand. Received: {budget.amount!r}."
        )
    low, high = 1.0, 2.0
    while share(high) <= 1 and high < 2**20 and len(of_kind):
        low, high = high, 2 * high
    while high - low > FINEST:
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= 1 else (low, middle)
    return Structure.closed(graph, copies(low))


def check_expandable(graph: ChannelGraph) -> None:
    """Channels are repeated by whole conv groups.

    Raises:
        KerasMorphError: if the graph was traced with `grouped="equal"`.
    """
    if graph.wiring.grouped != "whole":
        raise KerasMorphError(
            'expand, and several rounds of shrink, expect a graph with grouped="whole". '
            f"Received: grouped={graph.wiring.grouped!r}."
        )
