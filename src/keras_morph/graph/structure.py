"""Which channels of each layer are alive: a value that can be printed, saved, compared, and applied to its seed."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph, Wiring
from keras_morph.errors import StructureMismatchError
from keras_morph.graph.closure import close
from keras_morph.graph.identities import connections, fingerprint, fingerprint_of, identities
from keras_morph.graph.tracing import graph_of, known_graph, trace_as
from keras_morph.runs import write_json
from keras_morph.showing import html_table, shortened

__all__ = ["Structure", "graph_and_structure"]

FORMAT = 2
READABLE = (1, 2)  # structures of format 1 know neither their wiring nor what their layers read

# What TensorFlow calls the operation in which a layer makes its channels: the Model Zoo's keys are operation names.
OPERATION_NAMES = {"SeparableConv2D": "separable_conv2d", "Conv2DTranspose": "conv2d_transpose"}


@dataclass(frozen=True)
class Structure:
    """The alive channels of every layer that makes channels.

    Attributes:
        seed: name of the model that it belongs to.
        fingerprint: `fingerprint` of that model's graph.
        alive: layer -> indices of its alive channels, ascending; a channel that is there several times belongs to an
            expanded structure, which is wider.
        seed_widths: layer -> number of channels in the seed.
        kinds: layer -> class name.
        identities: layer -> its name in `identities`; empty in a structure of an earlier version.
        connections: identity -> a hash of what the layer reads, by which an error says what differs.
        wiring: that of the graph; None in a structure of an earlier version.

    Example:
        >>> structure = km.fit_budget(model, "50%")
        >>> structure.save("structure.json")
        >>> km.Structure.load("structure.json") == structure
        True
    """

    seed: str
    fingerprint: str
    alive: Mapping[str, np.ndarray]
    seed_widths: Mapping[str, int]
    kinds: Mapping[str, str]
    identities: Mapping[str, str] = field(default_factory=dict)
    connections: Mapping[str, str] = field(default_factory=dict)
    wiring: Wiring | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Layer -> number of alive channels."""
        return {layer: len(indices) for layer, indices in self.alive.items()}

    def counts(self) -> dict[str, int]:
        """Alive channels of the convolutions under the Model Zoo's keys, `{"conv1_conv/Conv2D": 64, ...}`."""
        return {
            f"{layer}/{OPERATION_NAMES.get(self.kinds[layer], self.kinds[layer])}": width
            for layer, width in self.widths.items()
            if "Conv" in self.kinds[layer]
        }

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Structure)
            and self.fingerprint == other.fingerprint
            and self.alive.keys() == other.alive.keys()
            and all(np.array_equal(indices, other.alive[layer]) for layer, indices in self.alive.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        alive, whole = sum(self.widths.values()), sum(self.seed_widths.values())
        return f"<Structure of {self.seed}: {alive:,} of {whole:,} channels in {len(self.alive):,} layers>"

    def __str__(self) -> str:
        rows = [f"  {layer:<40} {width:>6} of {self.seed_widths[layer]:>6}" for layer, width in self.widths.items()]
        return "\n".join([repr(self)[1:-1], *shortened(rows, "layers")])

    def _repr_html_(self) -> str:
        rows = [(layer, self.kinds[layer], width, self.seed_widths[layer]) for layer, width in self.widths.items()]
        return html_table(repr(self)[1:-1], ("layer", "kind", "alive", "of"), rows)

    def save(self, path: str | Path) -> None:
        """Write `structure.json`, whole or not at all."""
        write_json(
            Path(path),
            {
                "format": FORMAT,
                "seed": {"name": self.seed, "fingerprint": self.fingerprint},
                "wiring": asdict(self.wiring or Wiring()),
                **({"expanded": True} if self.is_expanded else {}),
                "layers": {
                    layer: {
                        "width": self.seed_widths[layer],
                        "alive": indices.tolist(),
                        "kind": self.kinds[layer],
                        **({"identity": self.identities[layer]} if self.identities.get(layer, layer) != layer else {}),
                    }
                    for layer, indices in self.alive.items()
                },
                "connections": dict(self.connections),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> "Structure":
        """Read a `structure.json`.

        Raises:
            StructureMismatchError: if the file is missing, damaged or of another format.
        """
        data = _read_json(path)
        try:
            if data["format"] not in READABLE:
                raise StructureMismatchError(f"{path} has format {data['format']!r}. Expected: one of {READABLE}.")
            layers, expanded = data["layers"], data.get("expanded") is True
            alive = {name: _whole_numbers(layer["alive"], name) for name, layer in layers.items()}
            widths = {name: int(layer["width"]) for name, layer in layers.items()}
            kinds = {name: str(layer.get("kind", "Conv2D")) for name, layer in layers.items()}
            own = {name: str(layer.get("identity", name)) for name, layer in layers.items()}
            connections = {str(name): str(value) for name, value in data.get("connections", {}).items()}
            seed = data["seed"]
            wiring = _wiring_from(data["wiring"]) if data["format"] > 1 else None
            structure = cls(str(seed["name"]), str(seed["fingerprint"]), alive, widths, kinds, own, connections, wiring)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, StructureMismatchError):
                raise
            raise StructureMismatchError(
                f"{path} is not a structure file. Expected the keys format, seed and layers with width and alive. "
                f"Received: {type(error).__name__} {error}; write it with Structure.save."
            ) from error
        for name, indices in alive.items():
            steps = np.diff(indices)
            if np.any(steps < 0 if expanded else steps <= 0) or np.any(indices < 0) or np.any(indices >= widths[name]):
                raise StructureMismatchError(
                    f"{path}: layer {name!r} lists alive channels that are not ascending indices below its width "
                    f"{widths[name]}."
                )
        return structure

    @property
    def is_expanded(self) -> bool:
        """Whether a channel is there more than once."""
        return any(len(np.unique(indices)) < len(indices) for indices in self.alive.values())

    @classmethod
    def closed(cls, graph: ChannelGraph, alive: np.ndarray, scores: np.ndarray | None = None) -> "Structure":
        """The closed structure of alive groups.

        Args:
            graph: the traced seed.
            alive: bool per group, `(num_groups,)`, or how often each is there.
            scores: numbers per group that say which channel is kept where a path would be lost.
        """
        channels = close(graph, alive, scores).channels
        made = {layer.name: layer for layer in graph.layers if layer.name in graph.widths}
        return cls(
            graph.model.name,
            fingerprint(graph),
            {name: repeated(channels[layer.made]) for name, layer in made.items()},
            graph.widths,
            {name: layer.kind for name, layer in made.items()},
            {name: own for name, own in identities(graph).items() if name in made},
            connections(graph),
            graph.wiring,
        )

    def wiring_in(self, graph: ChannelGraph) -> Wiring:
        """The wiring with the layer names of a graph, where Keras has counted on since it was made."""
        wiring = self.wiring or graph.wiring
        here = {identity: name for name, identity in identities(graph).items()}
        names = {layer: here.get(self.identities.get(layer, layer), layer) for layer in self.alive}
        if all(layer == name for layer, name in names.items()):
            return wiring
        matched = [layer for layer in names if any(re.fullmatch(pattern, layer) for pattern in wiring.protect)]
        return replace(
            wiring,
            protect=tuple(re.escape(names[layer]) for layer in matched),
            tie=tuple(tuple(names.get(layer, layer) for layer in layers) for layers in wiring.tie),
        )

    def named_as(self, graph: ChannelGraph) -> "Structure":
        """The same structure with the layer names of a graph, where Keras has counted on since it was made.

        Raises:
            StructureMismatchError: if this is not a structure of that model.
        """
        own = identities(graph)
        if self.fingerprint != fingerprint_of(graph, own):
            # Earlier versions named layers as Keras does.
            if self.fingerprint == fingerprint_of(graph, {name: name for name in own}):
                return self
            raise StructureMismatchError(_mismatch(self, graph))
        names = {identity: name for name, identity in own.items()}
        known = {layer: names.get(self.identities.get(layer, layer), layer) for layer in self.alive}
        if all(layer == name for layer, name in known.items()):
            return self
        return replace(
            self,
            alive={known[layer]: indices for layer, indices in self.alive.items()},
            seed_widths={known[layer]: width for layer, width in self.seed_widths.items()},
            kinds={known[layer]: kind for layer, kind in self.kinds.items()},
            identities=own,
        )

    def groups(self, graph: ChannelGraph) -> np.ndarray:
        """Alive groups of the seed, bool, `(num_groups,)`; groups that no layer here makes are alive.

        Raises:
            StructureMismatchError: if this is not a structure of that model, or it parts channels that are tied.
        """
        return self.copies(graph) > 0

    def copies(self, graph: ChannelGraph) -> np.ndarray:
        """How often each group of the seed is there, int64, `(num_groups,)`.

        Raises:
            StructureMismatchError: as in `groups`.
        """
        own = self.named_as(graph).alive
        channels = np.ones(graph.num_channels, np.int64)
        for layer in graph.layers:
            if layer.made is not None and layer.name in own:
                channels[layer.made] = np.bincount(own[layer.name], minlength=len(layer.made))
        alive = _agreed(graph, channels > 0)
        copies = alive.astype(np.int64)
        np.maximum.at(copies, graph.group_of, np.where(alive[graph.group_of], channels, 0))
        return copies


def repeated(copies: np.ndarray) -> np.ndarray:
    """Positions, each as often as it is there."""
    return np.repeat(np.arange(len(copies)), copies)


def _whole_numbers(values: Any, layer: str) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"alive of {layer} is no list of whole numbers")
    return np.array(values, np.int64)


def _wiring_from(data: Any) -> Wiring:
    protect, tie, grouped = data["protect"], data["tie"], data["grouped"]
    lists = [protect, tie, *tie]
    if not all(isinstance(x, list) for x in lists) or grouped not in ("whole", "equal"):
        raise TypeError(f"wiring is {data!r}")
    return Wiring(tuple(map(str, protect)), tuple(tuple(map(str, names)) for names in tie), grouped)


def graph_and_structure(model: Any, source: Any) -> tuple[ChannelGraph, Structure]:
    """The graph of a model with the wiring of a structure, and the structure in its layer names.

    Args:
        model: a Keras model, a ChannelGraph or a StructureLearner.
        source: a Structure, counts per layer, or the path of either's JSON file.

    Raises:
        StructureMismatchError: if the structure is not one of this model.
    """
    graph = graph_of(model)
    source = _read(source)
    if not isinstance(source, Structure):
        origin, counts = source
        return graph, _from_counts(graph, counts, origin)
    structure = source.named_as(graph)
    wiring = source.wiring_in(graph)
    if wiring != graph.wiring:
        if known_graph(model) not in (None, model):
            raise StructureMismatchError(
                f"The structure was made with another wiring than that of {model.name}. Expected: {graph.wiring}. "
                f"Received: {wiring}."
            )
        graph = trace_as(graph.model, wiring)
    return graph, structure


def _read(source: Any) -> Any:
    """A Structure, or where counts come from and what they are."""
    if isinstance(source, (str, Path)):
        data = _read_json(source)
        return Structure.load(source) if isinstance(data, dict) and "format" in data else (str(source), data)
    if isinstance(source, Mapping):
        return "counts", source
    if isinstance(source, Structure):
        return source
    raise StructureMismatchError(
        f"Expected a Structure, counts per layer, or the path of a file with either. Received: {source!r}."
    )


def _from_counts(graph: ChannelGraph, counts: Any, origin: str) -> Structure:
    """Counts say how many channels, not which: the first ones of each layer are kept."""
    layers = {layer.name: layer for layer in graph.layers if layer.made is not None}
    if not isinstance(counts, Mapping) or not all(isinstance(n, int) and n >= 0 for n in counts.values()):
        raise StructureMismatchError(
            f"{origin} is neither a structure nor counts. Expected an object of whole numbers, such as "
            '{"conv1_conv/Conv2D": 64}.'
        )
    undecided, alive = np.ones(graph.num_groups, bool), np.ones(graph.num_groups, bool)
    for key, count in counts.items():
        name = key.rpartition("/")[0] or key
        layer = layers.get(name) or layers.get(key)
        if layer is None:
            raise StructureMismatchError(f"{origin} names the layer {name!r}, which {graph.model.name} does not have.")
        groups = graph.group_of[layer.made]
        open_ = np.flatnonzero(undecided[groups])
        missing = count - int(np.sum(alive[groups] & ~undecided[groups]))
        if not 0 <= missing <= len(open_):
            tied = "; layers that are tied need equal counts" if count <= len(groups) else ""
            raise StructureMismatchError(
                f"{origin} gives {count} channels to {name}. Expected: at most {len(groups)}, and as many as the "
                f"layers that it is tied to{tied}."
            )
        alive[groups[open_[missing:]]] = False
        undecided[groups] = False
    return Structure.closed(graph, alive)


def _agreed(graph: ChannelGraph, channels: np.ndarray) -> np.ndarray:
    """Alive groups from alive channels, which must agree within each group."""
    named = np.zeros(graph.num_channels, bool)
    for layer in graph.layers:
        if layer.name in graph.widths:
            named[layer.made] = True
    members = np.bincount(graph.group_of, weights=named, minlength=graph.num_groups)
    votes = np.bincount(graph.group_of, weights=named & channels, minlength=graph.num_groups)
    alive = (votes > 0) | (members == 0)
    torn = np.flatnonzero((votes > 0) & (votes < members) & ~graph.pinned_mask)
    if len(torn):
        # A group falls apart where the calls that tie it are gone.
        differs = named & ((close(graph, alive).channels > 0) != channels)
        torn = torn[np.isin(torn, graph.group_of[differs])]
    if len(torn):
        dead, kept = (
            next(
                (layer.name, int(np.flatnonzero(layer.made == channel)[0]))
                for channel in graph.groups[torn[0]]
                if named[channel] and channels[channel] == state
                for layer in graph.layers
                if layer.made is not None and channel in layer.made
            )
            for state in (False, True)
        )
        raise StructureMismatchError(
            f"The structure keeps channel {kept[1]} of {kept[0]} but not channel {dead[1]} of {dead[0]}, "
            "which it is tied to. Expected: both or neither."
        )
    return alive


def _mismatch(structure: Structure, graph: ChannelGraph) -> str:
    own = {identity: name for name, identity in identities(graph).items()}
    for name, width in structure.seed_widths.items():
        here = own.get(structure.identities.get(name, name), name)
        if graph.widths.get(here) != width:
            found = f"{graph.widths[here]} channels" if here in graph.widths else "no such layer"
            return (
                f"The structure belongs to {structure.seed}, not to {graph.model.name}. Expected: layer {name!r} with "
                f"{width} channels. Received: {found}."
            )
    now, then = connections(graph), structure.connections
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)] if then else []
    what = {True: "other layers are read by", False: "there is"}
    said = [
        f"{what[name in then and name in now]} {own.get(name, name)!r}{'' if name in now else ' no more'}"
        for name in differing[:3]
    ]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return (
        f"The structure belongs to another model of the name {structure.seed}: its layers or connections differ. "
        f"Expected: the connections that it was made with. Received: {', '.join(said) + more if said else 'others'}."
    )


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StructureMismatchError(
            f"{path} cannot be read as JSON. Expected a structure.json or an alive_STEP file. "
            f"Received: {type(error).__name__} {error}."
        ) from error
