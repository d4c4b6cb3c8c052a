"""MeasuredLatency: a cost from timings of this very network, in the runtime that will serve it.

Random structures of the network are exported and timed, and the coefficients of `costs/fitted.py` are fitted to the times.
Exporting and fitting need Keras, timing does not, so that it can happen on another device: `export_structures`,
`keras_morph.timing`, `fit_timings`.
"""

import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.budget import Budget
from keras_morph.costs.costs import Clock, Cost, Table
from keras_morph.costs.fitted import Coefficients, FittedTable, fit, telling
from keras_morph.errors import (
    BudgetError,
    ForecastWarning,
    KerasMorphError,
    StructureMismatchError,
    UnsupportedModelError,
)
from keras_morph.exporting import write_unchecked, written_here
from keras_morph.formats import FORMATS, PREFERENCE, can
from keras_morph.graph.closure import close
from keras_morph.graph.identities import network_of
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of
from keras_morph.machine import cpu_name
from keras_morph.runs import write_json, write_text
from keras_morph.runtimes import RUNTIMES, installed
from keras_morph.search.selection import fit_budget
from keras_morph.surgery.rebuilding import rebuild
from keras_morph.timing import SUFFIXES, Conditions, Timings, time_files_apart

__all__ = ["ROUNDS", "MeasuredLatency", "export_structures", "fit_timings", "random_structures", "telling_structures"]

FORMAT = 2  # of the file; what was fitted by 1 knows one side of kernels inside a layer
MARGIN = 1.5  # times the median error
CERTAIN = 0.75  # of the structures within 10 %: 0.9 to 1 on quiet machines
STRUCTURES, LEAST = 32, 12  # that are timed, and that a fit needs
# A busy machine slows the whole network down by more than a small one. So both are timed again, up to so often, where the whole
# takes longer than this many times what it took at its shortest, in the fit or since; and it counts as what that was since.
SESSIONS, QUIET = 3, 1.03
CHOICE = 4  # times as many are drawn
# To which widths are rounded in turn; "auto" leaves narrow layers free.
MULTIPLES: tuple[int | str, ...] = (1, 4, "auto", 16)
SPREAD = 3.0  # of logarithms of scores within a layer; between layers their deviation is 1
ROUNDS = 100  # in each process: enough for the shortest time
CHECK, PROCESSES = 8.0, 10  # seconds of timing for one structure that was chosen, and processes that share them
SHARES = (0.2, 1.0)  # of the FLOPs
NOTE = "structures.txt"  # beside the files: how many there are


@keras.saving.register_keras_serializable("keras_morph")
class MeasuredLatency(Cost):
    """Seconds of one forward pass, foretold from timings of random structures of this network in a runtime.

    Making one takes minutes: structures are exported, timed in turn in processes of their own, and what each kind of call
    takes is fitted to the shortest time of each. It is a cost like any other, for budgets such as `"60%"` or `"5ms"`,
    penalties and reports, and knows the steps of the runtime: a width that is no whole block costs what the block costs.

    Args:
        model: a functional or Sequential model, or its ChannelGraph.
        runtime: "onnxruntime", "litert" or "openvino".
        threads: that the runtime may use.
        batch_size: examples of one pass; the result is for all of them.
        cache: a file to read it from, if it is there and was measured for this network under these conditions; else it is
            written. What was measured on another processor is neither: `load` reads it.
        structures: how many are timed; with fewer it is quicker and less certain.
        seconds: when to stop exporting, and then timing; each has half of it. At least 12 of the structures are timed.

    Attributes:
        coefficients: what was fitted; `coefficients.error` is the median relative error for structures that a fit had not seen.
        conditions: where and how it was timed.

    Raises:
        KerasMorphError: if the runtime is not installed, the network cannot be exported to its format, or the cache is of
            another processor.

    Warns:
        ForecastWarning: if less than three quarters of the structures take what is foretold, to 10 %.

    References:
        Zhang et al., nn-Meter: towards accurate latency prediction of deep-learning model inference on diverse edge devices,
        MobiSys 2021.

    Example:
        >>> cost = km.MeasuredLatency(model, runtime="onnxruntime", structures=12, seconds=10)
        >>> small = km.prune(model, "60%", cost=cost)  # which is timed again
        >>> km.FLOPs()(small) < km.FLOPs()(model)
        True
    """

    unit = "seconds"
    conditions: Conditions
    coefficients: Coefficients
    network: str

    def __init__(
        self,
        model: Any,
        *,
        runtime: str = "onnxruntime",
        threads: int = 1,
        batch_size: int = 1,
        cache: str | Path | None = None,
        structures: int = STRUCTURES,
        seconds: float = 300.0,
    ) -> None:
        graph = graph_of(model)
        if cache is not None and Path(cache).exists():
            found, wanted = self.load(cache), (runtime, threads, batch_size)
            there = found.conditions
            if there.device != cpu_name():
                raise KerasMorphError(
                    f"cache: expected a file that was measured here, on {cpu_name()}, or none. Received: {cache}, which was on "
                    f"{there.device}; MeasuredLatency.load(path) takes it as it is, another file is for this processor."
                )
            if (there.runtime, there.threads, there.batch_size) == wanted and found.network == network_of(graph):
                self.conditions, self.coefficients, self.network = found.conditions, found.coefficients, found.network
                _warn_if_uncertain(self, graph.model.name)
                return
        with tempfile.TemporaryDirectory() as folder:
            files = export_structures(graph, folder, runtime=runtime, structures=structures, seconds=seconds / 2)
            timings = time_files_apart(
                files, threads=threads, batch_size=batch_size, seconds=seconds / 2, rounds=ROUNDS
            )
            found = fit_timings(graph, folder, timings)
        self.conditions, self.coefficients, self.network = found.conditions, found.coefficients, found.network
        if cache is not None:
            self.save(cache)

    @classmethod
    def of(cls, conditions: Conditions, coefficients: Coefficients, network: str) -> "MeasuredLatency":
        """From what was measured before.

        Args:
            conditions: where and how.
            coefficients: what was fitted.
            network: fingerprint of the network that was timed, and the shapes of its inputs.
        """
        cost = cls.__new__(cls)
        cost.conditions, cost.coefficients, cost.network = conditions, coefficients, network
        return cost

    @property
    def block(self) -> int:  # type: ignore[override]  # what others have as a number
        return max(self.coefficients.steps[1:])

    @property
    def margin(self) -> float:  # type: ignore[override]
        """Share of a budget that is left, since what is cut to it is what the fit believes to be cheap.

        `prune` and `shrink` time what they chose as well, where it was measured on this processor.
        """
        return MARGIN * self.coefficients.error

    @contextmanager
    def clock(self, graph: ChannelGraph) -> Iterator[Clock | None]:
        """Seconds of a structure and of the whole network, timed in turn; None on another processor, or without exports."""
        runtime = self.conditions.runtime
        if not self._runs_here():
            yield None
            return
        name = _format_of(runtime)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{each}{FORMATS[name].suffix}" for each in ("whole", "small")]
            try:
                write_unchecked([graph.model], paths[:1], name)
            except UnsupportedModelError:  # such as layers that only the script knows: no reason to end a training
                yield None
                return

            options = {"threads": self.conditions.threads, "batch_size": self.conditions.batch_size}

            whole = [self(graph)]  # as foretold, and as it was measured so far

            def measured(structure: Structure) -> tuple[float, float]:
                write_unchecked(
                    [rebuild(graph, structure)], paths[1:], name
                )  # with the constants that its weights make
                small = np.inf
                for _ in range(SESSIONS):
                    found = time_files_apart(paths, **options, seconds=CHECK, processes=PROCESSES).least
                    whole.append(float(found[0]))
                    small = min(small, float(found[1]))
                    if found[0] <= QUIET * min(whole):
                        break
                return small, min(whole[1:])

            yield measured

    def _runs_here(self) -> bool:
        """Whether this is the processor that it was timed on, with the runtime, and with what writes its files."""
        runtime = self.conditions.runtime
        (name,) = (name for name, form in FORMATS.items() if form.runtime == runtime)
        able = find_spec(RUNTIMES[runtime].module) and any(can(backend, name) for backend in PREFERENCE)
        return bool(able) and self.conditions.device == cpu_name()

    def table(self, graph: ChannelGraph) -> Table:
        return FittedTable.of(graph, self.coefficients)

    def uncounted(self, graph: ChannelGraph) -> tuple[str, ...]:
        """Layers of kinds that the network that was timed has not."""
        return FittedTable.of(graph, self.coefficients).unknown(graph)

    def get_config(self) -> dict[str, Any]:
        return {
            "conditions": asdict(self.conditions),
            "coefficients": asdict(self.coefficients),
            "network": self.network,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MeasuredLatency":
        return cls.of(Conditions(**config["conditions"]), Coefficients(**config["coefficients"]), config["network"])

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, which can be carried to and from the target device."""
        write_json(path, {"format": FORMAT, **self.get_config()})

    @classmethod
    def load(cls, path: str | Path) -> "MeasuredLatency":
        """Read it from a file.

        Raises:
            KerasMorphError: if the file is none that `save` has written.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError("of an earlier version, which fitted other terms: measure again")
            cost = cls.from_config({key: found[key] for key in ("conditions", "coefficients", "network")})
            kinds = {"runtime": str, "version": str, "threads": int, "batch_size": int, "device": str}
            wrong = [name for name, kind in kinds.items() if not isinstance(getattr(cost.conditions, name), kind)]
            if wrong or not isinstance(cost.network, str) or cost.conditions.runtime not in RUNTIMES:
                raise ValueError(", ".join(wrong or ["network or runtime"]))
            return cost
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KerasMorphError(
                f"Expected a file that MeasuredLatency.save has written. Received: {path} ({error!r})."
            ) from error

    def __repr__(self) -> str:
        return f"MeasuredLatency({self.conditions})"


def random_structures(graph: ChannelGraph, number: int, *, random_seed: int = 0) -> list[Structure]:
    """Structures of widely different widths, each layer having a share of its own; the last one is the whole network."""
    random = np.random.default_rng(random_seed)
    found: list[Structure] = []
    for place in range(number):
        offsets = np.zeros(graph.num_groups)
        for vector in graph.vectors:
            offsets[np.unique(graph.group_of[vector])] = random.normal()
        scores = np.exp(random.uniform(0, SPREAD, graph.num_groups) + offsets)
        low, high = SHARES
        share = low + (high - low) * (place + 1) / number
        round_to = MULTIPLES[place % len(MULTIPLES)]
        while True:
            try:
                found.append(
                    fit_budget(graph, Budget(f"{100 * share:.2f}%", round_to=round_to, floor=0.0), scores=scores)
                )
                break
            except BudgetError:
                share = min(1.0, share + 0.1)
    return found


def telling_structures(graph: ChannelGraph, number: int) -> list[Structure]:
    """The whole network, and of many random structures those that tell most of what each kind of call takes."""
    drawn = random_structures(graph, CHOICE * number)
    closed = [close(graph, structure.copies(graph)) for structure in drawn]
    return [drawn[place] for place in telling(graph, closed, number, first=len(drawn) - 1)]


def export_structures(
    model: Any,
    folder: str | Path,
    *,
    runtime: str = "onnxruntime",
    structures: int = STRUCTURES,
    seconds: float = math.inf,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write random structures of a network as files of a runtime, each with its structure beside it.

    Args:
        model: a functional or Sequential model, or its ChannelGraph.
        folder: where to.
        runtime: "onnxruntime", "litert" or "openvino".
        structures: how many.
        seconds: when to stop, once 12 are written.
        progress: takes a line after each.

    Returns:
        Paths of the files.
    """
    graph, folder, start, name = graph_of(model), Path(folder), time.perf_counter(), _format_of(runtime)
    folder.mkdir(parents=True, exist_ok=True)
    _make_room(folder, structures)
    drawn = telling_structures(graph, structures)
    at_once = 1 if written_here(name) else LEAST  # another backend's process takes long to start
    paths: list[Path] = []
    while len(paths) < structures and (len(paths) < LEAST or time.perf_counter() - start < seconds):
        chosen = drawn[len(paths) : len(paths) + at_once]
        new = [folder / f"{len(paths) + number:03}{FORMATS[name].suffix}" for number in range(len(chosen))]
        write_unchecked([rebuild(graph, structure) for structure in chosen], new, name)
        for path, structure in zip(new, chosen, strict=True):
            structure.save(path.with_suffix(".json"))
        paths += new
        if progress is not None:
            progress(f"exported {len(paths)}/{structures} structures in {time.perf_counter() - start:.0f} s")
    return paths


def _make_room(folder: Path, structures: int) -> None:
    """Remove what an earlier call has written, as it has noted, and note what this one writes.

    Raises:
        KerasMorphError: if other files are called so.
    """
    note, endings = folder / NOTE, (*SUFFIXES, ".json", ".bin")
    if note.exists():
        for number in range(min(1000, int(note.read_text(encoding="utf-8")))):
            for ending in endings:
                (folder / f"{number:03}{ending}").unlink(missing_ok=True)
    if others := [each for each in sorted(folder.glob("[0-9][0-9][0-9].*")) if each.suffix in endings]:
        raise KerasMorphError(
            f"{folder} is where structures are written, as files 000, 001 and so on. Expected: a new folder, or one that was "
            f"written so. Received: {others[0]}, which is something else."
        )
    write_text(note, f"{structures}\n")


def _format_of(runtime: str) -> str:
    names = {form.runtime: name for name, form in FORMATS.items() if form.suffix}
    if runtime not in names:
        raise KerasMorphError(f"runtime: expected {', '.join(names)}. Received: {runtime!r}.")
    installed(runtime)
    return names[runtime]


def fit_timings(model: Any, folder: str | Path, timings: Timings) -> MeasuredLatency:
    """The cost of timings of the files that `export_structures` wrote to a folder, in their order.

    A ForecastWarning says where they do not follow from the structures.

    Raises:
        StructureMismatchError: if they are not the files of this network, or not as many.
    """
    graph = graph_of(model)
    paths = sorted(Path(folder).glob("[0-9][0-9][0-9].json"))
    if len(paths) != len(timings.seconds):
        raise StructureMismatchError(
            f"Expected one timing for each of {len(paths)} files. Received: {len(timings.seconds)}."
        )
    closed = [close(graph, Structure.load(path).copies(graph)) for path in paths]
    found = MeasuredLatency.of(timings.conditions, fit(graph, closed, timings.least), network_of(graph))
    _warn_if_uncertain(found, graph.model.name)
    return found


def _warn_if_uncertain(cost: MeasuredLatency, network: str) -> None:
    fitted = cost.coefficients
    if fitted.within < CERTAIN:
        warnings.warn(
            f"The latency of {network} ({cost.conditions}) follows badly from its structure. Expected at least {CERTAIN:.0%} of "
            f"the structures foretold to 10 %. Received: {fitted.within:.0%}, median error {fitted.error:.1%}; measure again "
            "while nothing else needs the processor or the memory, or more structures.",
            ForecastWarning,
            stacklevel=3,
        )
