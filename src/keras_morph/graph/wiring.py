"""What a user says of channels besides the model: which stay, which go together, how grouped convolutions are narrowed."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from keras_morph.channels import GraphBuilder, Wiring
from keras_morph.errors import KerasMorphError

__all__ = ["wire", "wiring_of"]


def wiring_of(protect: Any, tie: Any, grouped: str) -> Wiring:
    """What `trace` is given, as a value.

    Raises:
        KerasMorphError: if it is nothing that `trace` takes.
    """
    if grouped not in ("whole", "equal"):
        raise KerasMorphError(f'Expected grouped="whole" or grouped="equal". Received: grouped={grouped!r}.')
    return Wiring(_texts("protect", protect), tuple(_texts("tie", names) for names in tie), grouped)


def _texts(option: str, values: Any) -> tuple[str, ...]:
    """Strings; a single one is not taken for a list of letters."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        example = 'protect=["head.*"]' if option == "protect" else 'tie=[["left", "right"]]'
        raise KerasMorphError(f"Expected a list of strings, such as {example}. Received: {option}={values!r}.")
    return tuple(values)


def wire(graph: GraphBuilder, wiring: Wiring) -> None:
    """Pin what is protected, and tie what goes together.

    Raises:
        KerasMorphError: if the layers are not there, or of different widths.
    """
    _protect(graph, wiring.protect)
    _tie(graph, wiring.tie)


def _protect(graph: GraphBuilder, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            names = [name for name in graph.made if re.fullmatch(pattern, name)]
        except re.error as error:
            raise KerasMorphError(
                f"Expected a regular expression for a whole layer name. Received: protect={pattern!r} ({error})."
            ) from error
        if not names:
            raise KerasMorphError(
                f"protect={pattern!r} matches no layer that makes channels. Expected a regular expression for a whole "
                f"layer name{_suggest(pattern, graph)}."
            )
        for name in names:
            graph.pin(graph.made[name], f"protected by {pattern!r}")


def _tie(graph: GraphBuilder, lists: Sequence[Sequence[str]]) -> None:
    for names in lists:
        for name in names:
            if name not in graph.made:
                raise KerasMorphError(
                    f"tie={list(names)} names {name!r}, which makes no channels in this model{_suggest(name, graph)}."
                )
        widths = {name: len(graph.made[name]) for name in names}
        if len(set(widths.values())) > 1:
            raise KerasMorphError(f"tie expects layers of equal width. Received: {widths}.")
        for name in names[1:]:
            graph.tie(graph.made[names[0]], graph.made[name])


def _suggest(name: str, graph: GraphBuilder) -> str:
    close = difflib.get_close_matches(name, graph.made, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
