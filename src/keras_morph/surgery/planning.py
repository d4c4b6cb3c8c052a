"""What a rebuild will do, decided before it makes a layer: which calls it makes once more, and in which way.

A call is left out, or replayed in one of these ways, by what is left of its operands and masks:

    enter    it is an input
    pick     it picks channels by index
    compute  it stands for several calls of the model, whose computation is known
    fold     it is a merge, and some operands are constant
    hand on  it merges or joins, and one operand is left
    reduce   it merges or joins, and several operands are left, but not all
    fill     its operand is filled up to its full width, and what is alive of the result is taken
    apply    as the seed makes it, with narrower layers

and a nested model stays one where all that goes in and out of it is alive; else its calls stand where it was called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_morph.channels import Call, ChannelGraph, Scope
from keras_morph.graph.closure import CONSTANT, LIVE, Closed
from keras_morph.keras_internals import graph_in, remade

__all__ = ["Nested", "Step", "plan"]


@dataclass(frozen=True)
class Step:
    """A call that is made once more, and the way."""

    call: Call
    way: str

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.call.outputs


@dataclass(frozen=True)
class Nested:
    """A nested model that stays one.

    Attributes:
        scope: its call.
        key: what the model does; calls of one key are calls of one rebuilt model.
        copy: the model made anew from its config, where nothing in it is narrowed, so that it stays of its class; or None.
        steps: what the rebuilt model consists of otherwise; empty from the second call on.
    """

    scope: Scope
    key: tuple
    copy: Any
    steps: "tuple[Step | Nested, ...]"

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.scope.outputs


def plan(graph: ChannelGraph, closed: Closed, filling: Callable[[int], np.ndarray]) -> "tuple[Step | Nested, ...]":
    """What is left of a model's calls, in their order.

    Args:
        graph: the traced model.
        closed: what remains of it.
        filling: what fills a tensor up to its full width, a number for each of its channels.
    """
    return _Planner(graph, closed, filling).steps(0, len(graph.calls), graph.scopes)


class _Planner:
    """Plans calls in the order in which they run; the first call of a nested model decides for the others."""

    def __init__(self, graph: ChannelGraph, closed: Closed, filling: Callable[[int], np.ndarray]) -> None:
        self.graph, self.closed, self.filling = graph, closed, filling
        present = zip(graph.calls, closed.present.tolist(), strict=False)
        self.made = {tensor for call, runs in present if runs for tensor in call.outputs}
        self.patterns: dict[tuple, tuple] = {}  # of the calls that decided
        self.known: dict[tuple[int, int], tuple] = {}

    def steps(self, start: int, stop: int, scopes: Sequence[Scope]) -> "tuple[Step | Nested, ...]":
        """Steps of some calls, among which there are these nested models, inner ones first."""
        steps: list[Step | Nested] = []
        number = start
        while number < stop:
            around = (s for s in reversed(scopes) if s.start == number and s.stop <= stop and self.stays(s))
            scope = next(around, None)
            if scope is not None:
                steps.append(self.nested(scope, scopes))
            elif self.closed.present[number]:
                steps.append(Step(self.graph.calls[number], self.way(self.graph.calls[number])))
            number = number + 1 if scope is None else scope.stop
        return tuple(steps)

    def way(self, call: Call) -> str:
        """The first of the ways that suits a call."""
        states = self.closed.states
        live = sum(states[t] == LIVE for t in call.operands)
        merges = call.mode in ("merge", "join")
        ways = {
            "enter": call.mode == "input",
            "pick": bool(call.gathers),
            "compute": call.compute is not None,
            "fold": call.mode == "merge" and any(states[t] == CONSTANT for t in call.inputs),
            "hand on": merges and live == 1 < len(call.inputs),
            "reduce": live < len(call.operands),
            "fill": call.padded,
        }
        return next((way for way, suits in ways.items() if suits), "apply")

    def stays(self, scope: Scope) -> bool:
        """Whether everything that goes in and out of a nested model is alive, so that it can be called as one.

        What a TimeDistributed calls stays: closing keeps its ends alive.
        """
        if scope.stepped:
            return bool(self.closed.present[scope.start])
        ends = {*scope.inputs, *scope.outputs}
        whole = ends <= self.made and all(self.closed.states[t] == LIVE for t in ends)
        agrees = self.pattern(scope) == self.patterns.get(self.key(scope), self.pattern(scope))
        return whole and agrees and scope.start < scope.stop and len(set(scope.inputs)) == len(scope.inputs)

    def key(self, scope: Scope) -> tuple:
        """What a nested model does; a layer that is made of layers may do several things."""
        return id(scope.model), id(scope.function), self.pattern(scope) if scope.stepped else None

    def pattern(self, scope: Scope) -> tuple:
        """What is made of a nested model: which of its calls are present, what is alive in them, and what fills them up."""
        place = scope.start, scope.stop
        if place not in self.known:
            self.known[place] = self.new_pattern(scope)
        return self.known[place]

    def new_pattern(self, scope: Scope) -> tuple:
        pattern: list[Any] = []
        for number in range(scope.start, scope.stop):
            call, present = self.graph.calls[number], bool(self.closed.present[number])
            vectors = [self.graph.tensors[t].vector for t in (*call.inputs, *call.outputs)] if present else []
            filled = [self.filling(t).tobytes() for t in call.operands] if present and call.padded else []
            alive = (self.closed.channels[self.graph.channels_of(vector)].tobytes() for vector in vectors)
            pattern += [present, *alive, *filled]
        return tuple(pattern)

    def nested(self, scope: Scope, scopes: Sequence[Scope]) -> Nested:
        key = self.key(scope)
        if key in self.patterns:
            return Nested(scope, key, None, ())
        copy = remade(scope.model) if self.is_unchanged(scope) else scope.model
        made_anew = copy is not scope.model
        steps = () if made_anew else self.inside(scope, scopes)
        self.patterns[key] = self.pattern(scope)
        return Nested(scope, key, copy if made_anew else None, steps)

    def inside(self, scope: Scope, scopes: Sequence[Scope]) -> "tuple[Step | Nested, ...]":
        inner = [s for s in scopes if s is not scope and scope.start <= s.start and s.stop <= scope.stop]
        ends = int(scope.stepped)  # the calls that move the axis of time
        return self.steps(scope.start + ends, scope.stop - ends, inner)

    def is_unchanged(self, scope: Scope) -> bool:
        """Whether a nested model may be made anew from its own config: all widths stay, and no layer serves others too.

        The config of a layer made of layers need not tell all that it does.
        """
        if graph_in(scope.model) is None or not self.keeps_widths(scope) or not self.owns_layers(scope):
            return False
        # What is made of another call, of other widths, would have layers of its own.
        return len({self.pattern(s) for s in self.graph.scopes if s.model is scope.model}) == 1

    def keeps_widths(self, scope: Scope) -> bool:
        calls = self.graph.calls[scope.start : scope.stop]
        tensors = {*scope.inputs, *(t for call in calls for t in (*call.inputs, *call.outputs))}
        vectors = {self.graph.tensors[t].vector for t in tensors}
        return all(self.closed.counts[vector] == len(self.graph.vectors[vector]) for vector in vectors)

    def owns_layers(self, scope: Scope) -> bool:
        graph = self.graph
        own = {number for s in graph.scopes if s.model is scope.model for number in range(s.start, s.stop)}
        layers = {call.layer for call in graph.calls[scope.start : scope.stop]}
        inside, outside = (
            {graph.holders[n] for n in layers},
            {h for n, h in enumerate(graph.holders) if n not in layers},
        )
        return inside.isdisjoint(outside) and own.issuperset(n for layer in layers for n in graph.layer_calls[layer])
