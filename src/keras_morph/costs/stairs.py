"""A cost with steps: what a runtime pays that computes channels in blocks."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import Cost, FLOPs, Table
from keras_morph.errors import KerasMorphError

__all__ = ["Staircase"]


@keras.saving.register_keras_serializable("keras_morph")
class Staircase(Cost):
    """Another cost at counts that are rounded up to whole blocks: odd widths are not paid for, they are wasted.

    Inference runtimes compute channels in blocks of 4, 8 or 16 and fill the last one up.

    Args:
        cost: what a whole block costs; FLOPs() by default.
        block: channels of a block, at least 1.

    Example:
        >>> km.Staircase(km.FLOPs(), block=8)(model) >= km.FLOPs()(model)
        True
    """

    def __init__(self, cost: Cost | None = None, *, block: int = 8) -> None:
        if type(block) is not int or block < 1:
            raise KerasMorphError(f"Expected a block of at least 1 channel. Received: block={block}.")
        self.cost, self.block = cost or FLOPs(), block
        self.unit = self.cost.unit

    def table(self, graph: ChannelGraph) -> Table:
        return _Rounded(self.cost.table(graph), self.block)

    def uncounted(self, graph: ChannelGraph) -> tuple[str, ...]:
        return self.cost.uncounted(graph)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Staircase":
        return cls(keras.saving.deserialize_keras_object(config["cost"]), block=config["block"])

    def __repr__(self) -> str:
        return f"Staircase({self.cost!r}, block={self.block})"


@dataclass(frozen=True)
class _Rounded:
    table: Table
    block: int

    def costs(self, counts: np.ndarray) -> np.ndarray:
        return self.table.costs(self._rounded(counts))

    def prices(self, counts: np.ndarray) -> np.ndarray:
        """The slope from this step to the next one."""
        return self.table.prices(self._rounded(counts))

    def _rounded(self, counts: np.ndarray) -> np.ndarray:
        return -(-counts // self.block) * self.block
