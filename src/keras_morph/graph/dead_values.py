"""What is known of a call's results besides their channels: what dead channels are in the masked seed, and Keras masks.

A dead channel is exactly zero (`Tensor.zeroed`), or one number at every position (`Tensor.steady`), or anything.
"""

from collections.abc import Sequence
from typing import Any

import keras

from keras_morph.channels import Tensor
from keras_morph.keras_internals import mask_of
from keras_morph.layers.rules import Routed, Rule, rests_at_activation

__all__ = ["is_masked", "is_steady", "is_zeroed", "needs_masks"]


def is_zeroed(operation: Any, rule: Rule | None, routed: Routed, operands: Sequence[Tensor]) -> tuple[bool, ...]:
    """Whether dead channels of each of a call's results are exactly zero."""
    if isinstance(routed.zero, tuple) and rule is not None:
        return routed.zero
    if rule is None:
        zeroed = True  # all pinned: nothing dies
    elif routed.zero is not None:
        zeroed = bool(routed.zero)
    else:
        zeroed = rule.zero(operation) and _are_zeroed(operation, rule, operands)
    return (zeroed,) * len(routed.results)


def _are_zeroed(operation: Any, rule: Rule, operands: Sequence[Tensor]) -> bool:
    """Whether enough operands are zero where they are dead."""
    zeroed = [tensor.zeroed for tensor in operands]
    if rule.multiplies or rule.width:  # what else than the first operand it is given are states and sequences
        return all(zeroed[1:])
    if rule.shifts and len(operands) == 1:
        return False
    # A layer that multiplies takes what a mask leaves out for ones.
    masked = isinstance(operation, keras.Layer) and any(tensor.masked for tensor in operands)
    return any(zeroed) if rule.absorbs and not masked else all(zeroed)


def is_steady(operation: Any, rule: Rule | None, mode: str, operands: Sequence[Tensor]) -> bool:
    """Whether dead channels of a call's results are constants, given that they are not zero.

    What maps a constant to a constant does so for every channel that is one, unless channels meet in it.
    """
    if rests_at_activation(operation, rule):
        return True
    alone = rule is not None and not rule.mixes and mode in ("uniform", "merge", "join")
    return alone and all(tensor.steady and not tensor.masked for tensor in operands)


def is_masked(node: Any, result: Any, operands: Sequence[Tensor]) -> bool:
    """Whether a result carries a mask; what a nested model hands out may carry one that its caller does not see."""
    if mask_of(result) is not None:
        return True
    if not isinstance(node.operation, keras.Layer) or not node.operation.supports_masking or not operands:
        return False
    every = any if isinstance(node.operation, keras.layers.Concatenate) else all
    return every(tensor.masked for tensor in operands)


def needs_masks(node: Any, operands: Sequence[Tensor]) -> bool:
    """Whether the masks of a merge's operands say what it computes, or which mask its result carries.

    Then it needs all of its operands. It does not where all carry the same mask, which any of them hands on.
    """
    operation, sources = node.operation, node.arguments.keras_tensors
    if not isinstance(operation, keras.Layer) or not any(tensor.masked for tensor in operands):
        return False
    if isinstance(operation, (keras.layers.Maximum, keras.layers.Minimum, keras.layers.Multiply)):
        return True  # in the steps that a mask leaves out they take the other operand alone
    masks = {id(mask_of(x)) for x in sources}
    handed_on = len(masks) == 1 and id(None) not in masks and sources[0].dtype == "float32"
    return is_masked(node, node.outputs[0], operands) and not handed_on
