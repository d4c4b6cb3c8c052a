"""What structure.json may hold: each part of the file is checked before anything is made of it."""

import itertools
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.channels import Wiring
from keras_morph.errors import StructureMismatchError
from keras_morph.runs import read_regular

__all__ = ["FORMAT", "fields_of", "read_json"]

FORMAT = 2
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
LIMIT = 2**28  # bytes of a file: the largest networks have structures of some hundred thousand
READABLE = (1, 2)  # structures of format 1 know neither their wiring nor what their layers read


def read_json(path: str | Path) -> Any:
    """What a file holds.

    Raises:
        StructureMismatchError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_regular(path, LIMIT).decode(), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise StructureMismatchError(
            f"{path} cannot be read as JSON. Expected a structure.json or an alive_STEP file. "
            f"Received: {type(error).__name__} {error}."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose keys is there twice: Python would take the last and drop the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {_shortened(twice)} is there more than once")
    return found


def fields_of(data: Any, path: str | Path) -> dict[str, Any]:
    """The fields of a Structure that a file holds, each of which has to be of its kind.

    Args:
        data: what `read_json` has found.
        path: where, for errors.

    Raises:
        StructureMismatchError: if one is not.
    """
    file = _File(path)
    file.part(data, dict, "format, seed and layers with width and alive")
    if type(data.get("format")) is not int or data["format"] not in READABLE:
        raise StructureMismatchError(
            f"{path} has format {_shortened(data.get('format'))}. Expected: one of {READABLE}."
        )
    seed, layers = file.part(data.get("seed"), dict, "seed"), file.part(data.get("layers"), dict, "layers")
    expanded = file.part(data.get("expanded", False), bool, "expanded")
    connections = file.part(data.get("connections", {}), dict, "connections")
    if not layers:
        raise StructureMismatchError(
            f"{path} has no layers. Expected: all that make channels; write it with Structure.save."
        )
    for name, layer in layers.items():
        file.part(layer, dict, f"layer {name!r}")
    widths = {name: file.part(layer.get("width"), int, f"width of {name!r}") for name, layer in layers.items()}
    return {
        "seed": file.part(seed.get("name"), str, "name of the seed"),
        "fingerprint": file.part(seed.get("fingerprint"), str, "fingerprint of the seed"),
        "alive": {name: file.alive(name, layer, widths[name], expanded) for name, layer in layers.items()},
        "seed_widths": widths,
        "kinds": {n: file.part(layer.get("kind", "Conv2D"), str, f"kind of {n!r}") for n, layer in layers.items()},
        "identities": {
            n: file.part(layer.get("identity", n), str, f"identity of {n!r}") for n, layer in layers.items()
        },
        "connections": {n: file.part(value, str, f"connections of {n!r}") for n, value in connections.items()},
        "wiring": file.wiring(data.get("wiring")) if data["format"] > 1 else None,
    }


class _File:
    """The parts of one file, and errors that name it."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def part(self, value: Any, kind: type, what: str) -> Any:
        """The value, if it is of its kind."""
        if type(value) is not kind:  # True is an int to isinstance
            raise StructureMismatchError(
                f"{self.path} is not a structure file. Expected: {what}, {KINDS[kind]}. Received: {_shortened(value)}; "
                "write it with Structure.save."
            )
        return value

    def texts(self, value: Any, what: str) -> tuple[str, ...]:
        return tuple(self.part(text, str, f"texts in {what}") for text in self.part(value, list, what))

    def alive(self, name: str, layer: dict[str, Any], width: int, expanded: bool) -> np.ndarray:
        """Indices of alive channels, ascending; where a structure is expanded, each as often as it is there."""
        indices = self.part(layer.get("alive"), list, f"alive of {name!r}")
        for index in indices:
            self.part(index, int, f"alive of {name!r}")
        ascending = all(low <= high if expanded else low < high for low, high in itertools.pairwise(indices))
        if not ascending or width < 1 or (indices and not 0 <= indices[0] <= indices[-1] < width):
            raise StructureMismatchError(
                f"{self.path}: layer {name!r} lists alive channels that are not ascending indices below its width {width}."
            )
        return np.array(indices, np.int64)

    def wiring(self, given: Any) -> Wiring:
        self.part(given, dict, "wiring")
        ties = tuple(self.texts(names, "each tie") for names in self.part(given.get("tie"), list, "tie"))
        wiring = Wiring(
            self.texts(given.get("protect"), "protect"), ties, self.part(given.get("grouped"), str, "grouped")
        )
        if wrong := _wrong_in(wiring):
            raise StructureMismatchError(
                f"{self.path} has a wiring that cannot be. Expected: protect with names or patterns, tie with two or more "
                f"names, grouped whole or equal. Received: {wrong}."
            )
        return wiring


def _wrong_in(wiring: Wiring) -> str:
    """What of a wiring cannot be; nothing if all can."""
    for pattern in wiring.protect:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"protect {_shortened(pattern)} ({error})"
    if any(len(names) < 2 for names in wiring.tie):
        return "a tie of fewer than two layers"
    return "" if wiring.grouped in ("whole", "equal") else f"grouped {wiring.grouped!r}"


def _shortened(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder="...")
