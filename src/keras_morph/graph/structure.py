"""Which channels of each layer are alive: a value that can be printed, saved, compared, and applied to its seed."""

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
from keras_morph.graph.structure_files import FORMAT, fields_of, read_json
from keras_morph.graph.tracing import graph_of, known_graph, trace_as
from keras_morph.runs import write_json
from keras_morph.showing import html_table, shortened

__all__ = ["Structure", "graph_and_structure"]

EXAMPLE = '{"conv1_conv/Conv2D": 64}'

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
        return cls(**fields_of(read_json(path), path))

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
                self._check_layers(graph, {layer: layer for layer in self.alive})
                return self
            raise StructureMismatchError(_mismatch(self, graph))
        names = {identity: name for name, identity in own.items()}
        known = {layer: names.get(self.identities.get(layer, layer), layer) for layer in self.alive}
        self._check_layers(graph, known)
        if all(layer == name for layer, name in known.items()):
            return self
        return replace(
            self,
            alive={known[layer]: indices for layer, indices in self.alive.items()},
            seed_widths={known[layer]: width for layer, width in self.seed_widths.items()},
            kinds={known[layer]: kind for layer, kind in self.kinds.items()},
            identities=own,
        )

    def _check_layers(self, graph: ChannelGraph, names: Mapping[str, str]) -> None:
        """Refuse a structure that was edited such that its layers are not those of its model.

        Args:
            graph: the model's, whose fingerprint is that of the structure.
            names: layer -> its name there.
        """
        here = {names[layer]: width for layer, width in self.seed_widths.items()}
        if len(here) == len(names) and here == graph.widths:
            return
        missing = [name for name in graph.widths if name not in here]
        unknown = [layer for layer, name in names.items() if name not in graph.widths]
        other = [f"{name!r} with {here[name]} channels" for name in here if here[name] != graph.widths.get(name)]
        received = (
            f"no {missing[0]!r}" if missing else f"{unknown[0]!r}" if unknown else (other or ["one of them twice"])[0]
        )
        raise StructureMismatchError(
            f"The structure's layers are not those of {graph.model.name}. Expected: each layer that makes channels, once, with "
            f"its width. Received: {received}."
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
        _check_kept(graph, alive, channels)
        copies = alive.astype(np.int64)
        np.maximum.at(copies, graph.group_of, np.where(alive[graph.group_of], channels, 0))
        return copies


def repeated(copies: np.ndarray) -> np.ndarray:
    """Positions, each as often as it is there."""
    return np.repeat(np.arange(len(copies)), copies)


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
        data = read_json(source)
        is_structure = isinstance(data, dict) and "format" in data
        return Structure(**fields_of(data, source)) if is_structure else (str(source), data)
    if isinstance(source, Mapping):
        return "counts", source
    if isinstance(source, Structure):
        return source
    raise StructureMismatchError(
        f"Expected a Structure, counts per layer, or the path of a file with either. Received: {source!r}."
    )


def _from_counts(graph: ChannelGraph, counts: Any, origin: str) -> Structure:
    """Counts say how many channels, not which: the first ones of each layer are kept."""
    layers = {layer.name: layer for layer in graph.layers if layer.name in graph.widths}
    if not isinstance(counts, Mapping) or not all(_is_count(count) for count in counts.values()):
        raise StructureMismatchError(
            f"{origin} is neither a structure nor counts. Expected an object of whole numbers, such as {EXAMPLE}."
        )
    if not counts:
        raise StructureMismatchError(f"{origin} names no layer. Expected: counts, such as {EXAMPLE}. Received: none.")
    undecided, alive = np.ones(graph.num_groups, bool), np.ones(graph.num_groups, bool)
    asked = {}
    for key, count in counts.items():
        name = key.rpartition("/")[0] or key
        layer = layers.get(name) or layers.get(key)
        if layer is None:
            there = any(name == layer.name for layer in graph.layers)
            reason = "that is not narrowed" if there else f"which {graph.model.name} does not have"
            raise StructureMismatchError(f"{origin} names the layer {name!r}, {reason}.")
        groups = graph.group_of[layer.made]
        open_ = np.flatnonzero(undecided[groups])
        missing = count - int(np.sum(alive[groups] & ~undecided[groups]))
        if not 0 <= missing <= len(open_):
            tied = "; layers that are tied need equal counts" if count <= len(groups) else ""
            raise StructureMismatchError(
                f"{origin} gives {count} channels to {name}. Expected: at most {len(groups)}, and as many as the "
                f"layers that it is tied to{tied}."
            )
        stay = open_[graph.pinned_mask[groups[open_]]]
        free = groups[np.setdiff1d(open_, stay)]
        chosen = _first_of(free, max(0, missing - len(stay)))
        if chosen is None:
            raise StructureMismatchError(
                f"{origin} gives {count} channels to {name}. Expected: as many as go together there: with channel 0 "
                f"{np.count_nonzero(groups == groups[0])} of its {len(groups)}."
            )
        alive[np.setdiff1d(free, chosen)] = False
        undecided[groups] = False
        asked[name if name in layers else key] = count
    structure = Structure.closed(graph, alive)
    for name, count in asked.items():
        if structure.widths[name] > count:
            pins = [graph.pinned[g] for g in graph.group_of[layers[name].made].tolist() if g in graph.pinned]
            raise StructureMismatchError(
                f"{origin} gives {count} channels to {name}. Expected: at least {structure.widths[name]}, which cannot be "
                f"removed ({f'pinned: {pins[0]}' if pins else 'the only path to an output'})."
            )
    return structure


def _first_of(groups: np.ndarray, count: int) -> np.ndarray | None:
    """The first of the groups, in the order of their first channels, that have `count` channels together; None if none have.

    Args:
        groups: of each channel.
        count: channels that stay.
    """
    _, firsts, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = np.argsort(firsts)
    firsts, sizes = firsts[order], sizes[order].tolist()
    sums = [1]  # bit i: some of the last groups have i channels together
    for size in reversed(sizes):
        sums.append(sums[-1] | sums[-1] << size)
    if not sums.pop() >> count & 1:
        return None
    chosen = []
    for first, size in zip(firsts, sizes, strict=True):
        behind = sums.pop()
        if size <= count and behind >> (count - size) & 1:
            chosen.append(groups[first])
            count -= size
    return np.array(chosen, groups.dtype)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _check_kept(graph: ChannelGraph, alive: np.ndarray, channels: np.ndarray) -> None:
    """Refuse to keep what a structure does not list: what is pinned, and what the last path to an output needs."""
    kept = (close(graph, alive).channels > 0) & (channels == 0)
    for layer in graph.layers:
        if layer.made is not None and layer.name in graph.widths and kept[layer.made].any():
            index = int(np.flatnonzero(kept[layer.made])[0])
            group = int(graph.group_of[layer.made[index]])
            why = f"pinned: {graph.pinned[group]}" if group in graph.pinned else "the only path to an output"
            raise StructureMismatchError(
                f"The structure does not keep channel {index} of {layer.name}, which cannot be removed ({why}). "
                "Expected: it among those alive."
            )


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
