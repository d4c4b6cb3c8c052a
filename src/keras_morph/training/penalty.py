"""The penalty inside the training graph: prices x scores, all layers at once on flat vectors.

    penalty = sum over monomials c n_a n_b of  c n_b * (sum of scores in a) + c n_a * (sum of scores in b)

with the alive counts n constant to the gradient (MorphNet, https://arxiv.org/abs/1711.06798, equation 6). Collected by
group this is a product of two vectors: the group's score and the price of all its entries. A handful of operations,
however deep the network. Where the cost is no formula, prices are constants too, which are renewed as counts change.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import Cost, Monomials
from keras_morph.errors import UnsupportedModelError
from keras_morph.training.regularizers import Regularizer, group_scores

__all__ = ["Penalty"]


class Penalty:
    """Penalty (without the strength) and cost of a model's current weights, in float32 tensors.

    Pinned groups are not penalized: no strength could remove them.

    Args:
        graph: the traced model.
        regularizer: gives the scores.
        cost: gives the prices.
    """

    def __init__(self, graph: ChannelGraph, regularizer: Regularizer, cost: Cost) -> None:
        self.regularizer = regularizer
        self.sources = regularizer.sources(graph)
        if not self.sources:
            raise UnsupportedModelError(
                f"{graph.model.name} has no layer whose channels could be removed. Expected convolutions, Dense or others of "
                f"docs/add-a-layer.md. Received: {', '.join(f'{layer.name} ({layer.kind})' for layer in graph.layers[1:4])}."
            )
        # Groups in the order of first use here: only those that are scored take part.
        entries = np.concatenate([source.groups(graph) for source in self.sources])
        scored, self.entry_group = np.unique(entries, return_inverse=True)
        self.free = (~graph.pinned_mask[scored]).astype(np.float32)
        position = np.full(graph.num_groups, -1)
        position[scored] = np.arange(len(scored))
        self.graph, self.scored, self.table = graph, scored, cost.table(graph)
        self.held: Any = None  # variables with the price of each scored group and with the cost, where it is no formula
        monomials = cost.monomials(graph)
        self.is_formula = monomials is not None
        if monomials is not None:
            self._lay_out(graph, monomials, position)

    def renewed(self) -> tuple[np.ndarray, float]:
        """The price of each scored group at the present counts, float64, `(scored,)`, and the cost."""
        graph = self.graph
        alive = group_scores(graph, self.regularizer) > self.regularizer.threshold
        counts = graph.counts(alive | graph.pinned_mask)
        vector, group, count = graph.pairs
        prices = np.bincount(group, weights=self.table.prices(counts)[vector] * count, minlength=graph.num_groups)
        return prices[self.scored] * self.free, float(self.table.costs(counts).sum())

    def _lay_out(self, graph: ChannelGraph, table: Monomials, position: np.ndarray) -> None:
        """Constant index vectors: which scored groups lie in which vector of the cost."""
        used = np.unique(np.concatenate([table.a, table.b]))
        used = used[used >= 0]
        number = np.zeros(len(graph.vectors) + 1, np.int64)
        number[used] = np.arange(len(used))
        number[-1] = len(used)  # the vector CONSTANT, of count 1
        self.a, self.b = number[table.a], number[table.b]
        self.coefficient = table.coefficient.astype(np.float32)
        _, slot, self.owner_sizes = np.unique(table.owner, return_inverse=True, return_counts=True)
        self.branches = int(table.branch.max(initial=0)) + 1
        self.slot, self.branch, self.owners = slot * self.branches + table.branch, table.branch, len(self.owner_sizes)
        vector, group, count = graph.pairs
        inside = np.isin(vector, used)
        vector, group, count = number[vector[inside]], position[group[inside]], count[inside]
        always = group < 0  # nothing scores it, so it is pinned and always alive
        self.fixed = np.bincount(vector[always], weights=count[always], minlength=len(used)).astype(np.float32)
        self.pair_vector, self.pair_group = vector[~always], group[~always]
        self.pair_count = count[~always].astype(np.float32)

    def scores(self) -> Any:
        """Score of each scored group, float32, differentiable."""
        flat = [
            self.regularizer.score(ops.cast(source.variable, "float32"), source.other_axes, ops)
            for source in self.sources
        ]
        values = ops.concatenate(flat) if len(flat) > 1 else flat[0]
        return ops.segment_max(values, self.entry_group, num_segments=len(self.free))

    def __call__(self) -> tuple[Any, Any]:
        """(penalty, cost): two float32 scalars; the cost is that of the alive counts before closing."""
        scores = self.scores()
        if self.held is not None:
            prices, cost = self.held
            return ops.sum(ops.multiply(prices, scores)), ops.convert_to_tensor(cost)
        held = ops.stop_gradient(scores)
        # A score that is NaN is not dead.
        alive = ops.where(held <= self.regularizer.threshold, 1.0 - self.free, ops.ones_like(held))
        counts = self._sum(ops.multiply(ops.take(alive, self.pair_group), self.pair_count), self.pair_vector)
        counts = ops.concatenate([ops.add(counts[:-1], self.fixed), ops.ones(1)])
        a = ops.multiply(ops.take(counts, self.b), self.coefficient)  # derivative of each monomial by its n_a
        b = ops.multiply(ops.take(counts, self.a), self.coefficient)
        costs = ops.segment_sum(ops.multiply(ops.take(counts, self.a), a), self.slot, self.owners * self.branches)
        costs = ops.reshape(costs, (self.owners, self.branches))
        if self.branches > 1:
            winner = ops.take(ops.argmax(costs, axis=1), self.slot // self.branches)
            decides = ops.cast(ops.equal(winner, self.branch), "float32")
            a, b = a * decides, b * decides
        price = self._sum(a, self.a) + self._sum(b, self.b)
        price = ops.multiply(ops.take(price, self.pair_vector), self.pair_count)
        price = ops.multiply(ops.segment_sum(price, self.pair_group, len(self.free)), self.free)
        return ops.sum(ops.stop_gradient(price) * scores), ops.sum(ops.max(costs, axis=1))

    def _sum(self, values: Any, vectors: np.ndarray) -> Any:
        """Sum by vector; the last place is CONSTANT's."""
        return ops.segment_sum(values, vectors, len(self.fixed) + 1)
