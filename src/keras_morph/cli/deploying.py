"""How fast a small network is beside its seed, once it is trained: in the runtimes that serve it, else in Keras."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_morph.benchmarking import Benchmark, BenchmarkRow, benchmark
from keras_morph.cli.options import SUFFIXES, formats_of
from keras_morph.cli.shrink import Shrink
from keras_morph.costs.budget import Budget, parse_budget
from keras_morph.costs.costs import Cost
from keras_morph.costs.measured import Measured, measure
from keras_morph.costs.sizing import FileSizeOf
from keras_morph.datasets import Dataset
from keras_morph.errors import KerasMorphError
from keras_morph.exporting import Exported, export_all, written_here
from keras_morph.formats import FORMATS, PREFERENCE, can
from keras_morph.machine import cpu_name
from keras_morph.measuring import MeasuredLatency
from keras_morph.quantizing import CALIBRATED
from keras_morph.runs import going_on, write_text
from keras_morph.runtimes import RUNTIMES, first_line

__all__ = ["Compared", "compare_speed", "cost_of_time"]

ORDER = ("litert", "onnx", "openvino")  # formats that are timed unasked: the lightest runtime first
SECONDS = 1.0  # for each network, where nobody asked for it


@dataclass(frozen=True)
class Compared:
    """A small network beside its seed.

    Attributes:
        headline: where, how long each takes, how many times as fast the small one is.
        rows: lines of the report's table, name -> {column: value}; "seed" and "fine-tuned" are always there.
        benchmark: what it was read off; None where only Keras was there.
        notes: lines for below the table.
        failure: why the files that --export names are not there.
    """

    headline: str
    rows: dict[str, dict[str, str]]
    benchmark: Benchmark | None = None
    notes: tuple[str, ...] = ()
    failure: KerasMorphError | None = None


def compare_speed(
    options: Shrink, budgets: Sequence[Budget], seed: keras.Model, smalls: Mapping[Path, keras.Model], dataset: Dataset
) -> dict[Path, Compared]:
    """For each run's folder its small network beside the seed.

    In the runtimes that --export and --latency name, else in one that is installed, else in Keras. Writes the files that
    --export names, and benchmark.json. Where a file cannot be written, that is kept to be raised when all else is written.
    """
    asked: dict[Path, Benchmark | None] = {}
    failures: dict[Path, KerasMorphError] = {}
    for (place, small), budget in zip(smalls.items(), budgets, strict=True):
        try:
            asked[place] = _deployed(options, budget, seed, small, dataset, place)
        except KerasMorphError as error:  # what was trained comes first
            asked[place], failures[place] = None, error
    found = {place: each for place, each in asked.items() if each is not None}
    reason = ""
    if len(found) < len(smalls):
        unasked = {place: small for place, small in smalls.items() if place not in found}
        more, reason = _timed_unasked(seed, unasked, options.threads)
        found |= more
    for place, benchmark_ in found.items():
        with going_on(place / "benchmark.json"):
            write_text(place / "benchmark.json", benchmark_.json() + "\n")
    without = [place for place in smalls if place not in found or not found[place].rows]
    in_keras = (
        measure({"seed": seed, **{str(place): smalls[place] for place in without}}, batch_size=256) if without else {}
    )
    compared = {}
    for (place, small), budget in zip(smalls.items(), budgets, strict=True):
        each = found.get(place)
        notes = [] if each is None else [f"{runtime}: {why}" for runtime, why in each.failures.items()]
        if each is None or place in without:
            notes += [reason] if reason else []
            in_keras_ = _in_keras(in_keras["seed"], in_keras[str(place)], notes)
            compared[place] = replace(in_keras_, failure=failures.get(place))
            continue
        lines = _lines(each, budget, seed, small)
        if asked[place] is not None:
            notes = [*(f"{line}; {_files(*pair)}" for line, pair in zip(lines, each.pairs(), strict=True)), *notes]
        rounds = f"shortest of {each.rows[0].rounds:,} rounds in alternation"
        headline = f"{_of_first_runtime(lines, each)} ({rounds})"
        compared[place] = Compared(headline, _rows(each), each, tuple(notes), failures.get(place))
    return compared


def cost_of_time(budget: Budget) -> Cost | None:
    """The cost in seconds that a budget is for, if there is one."""
    return next((part for part, _ in budget.amounts() if part.unit == "seconds"), None)


# In the runtimes that the options name.


def _deployed(
    options: Shrink, budget: Budget, seed: keras.Model, small: keras.Model, dataset: Dataset, folder: Path
) -> Benchmark | None:
    """Write the files that --export names into a run's folder, and compare, if there is a runtime to compare in."""
    formats = [] if options.export is None else formats_of("--export", options.export)
    timed = [part.conditions for part, _ in budget.amounts() if isinstance(part, MeasuredLatency)]
    runtimes = [FORMATS[name].runtime for name in formats]
    runtimes += [each.runtime for each in timed if each.device == cpu_name()]
    models: dict[str, Any] = {"seed": seed, "small": small}
    for exported in _exported(options, formats, small, dataset, folder) if formats else []:
        print(exported)
        for part, amount in budget.amounts():
            if isinstance(part, FileSizeOf) and (part.format, part.precision) == (exported.format, exported.precision):
                allowed = parse_budget(amount, part, 0.0)
                kept = "kept" if exported.bytes <= allowed else "NOT kept"
                print(f"{exported.path}: the budget of {allowed:,.0f} bytes is {kept}")
        if options.int8:
            models[exported.path.name] = exported.path
    if not runtimes:
        return None
    return benchmark(
        models,
        runtimes=list(dict.fromkeys(runtimes)),
        threads=timed[0].threads if timed else options.threads,
        data=(dataset.x_test, dataset.y_test),
        progress=print,
    )


def _exported(
    options: Shrink, formats: list[str], small: keras.Model, dataset: Dataset, folder: Path
) -> list[Exported]:
    stem = "small_int8" if options.int8 else "small"
    calibration = np.asarray(dataset.x_train[:CALIBRATED]) if options.int8 else None
    return export_all(small, [folder / f"{stem}{SUFFIXES[name]}" for name in formats], int8=calibration)


# In a runtime that happens to be there.


def _timed_unasked(
    seed: keras.Model, smalls: Mapping[Path, keras.Model], threads: int
) -> tuple[dict[Path, Benchmark], str]:
    """Each network beside the seed in a runtime whose files this process writes; or nothing, and why."""
    present = [name for name in ORDER if find_spec(RUNTIMES[FORMATS[name].runtime].module)]
    usable = [name for name in present if any(can(each, name) for each in PREFERENCE) and written_here(name)]
    if not usable:
        return {}, _what_to_install()
    runtime = FORMATS[usable[0]].runtime
    names = ["small"] if len(smalls) == 1 else [place.name for place in smalls]
    models = {"seed": seed, **dict(zip(names, smalls.values(), strict=True))}
    try:
        found = benchmark(models, runtimes=[runtime], threads=threads, seconds=SECONDS, progress=print)
        reason = found.failures.get(runtime)
    except Exception as error:  # whatever exporters and runtimes raise: what was trained comes first
        reason = first_line(error)
    if reason is not None:
        return {}, f"timed in Keras, since {runtime} failed: {reason}"
    first, *others = found.rows
    rows = {place: (first, replace(row, model="small")) for place, row in zip(smalls, others, strict=True)}
    return {place: replace(found, rows=pair) for place, pair in rows.items()}, ""


def _what_to_install() -> str:
    backend = keras.backend.backend()
    present = [name for name in ORDER if find_spec(RUNTIMES[FORMATS[name].runtime].module)]
    if present and backend != "tensorflow" and find_spec("tensorflow"):
        return f"timed in Keras; in a runtime that serves networks with --export {present[0]}, which TensorFlow writes"
    if backend == "tensorflow":
        return "timed in Keras; for a runtime that serves networks: pip install 'keras-morph[litert]'"
    if backend == "torch" and not find_spec("tensorflow"):
        return "timed in Keras; for a runtime that serves networks: pip install 'keras-morph[onnx]'"
    return (
        "timed in Keras; for a runtime that serves networks: --export litert, "
        "with pip install 'keras-morph[litert,tensorflow]'"
    )


def _in_keras(before: Measured, after: Measured, notes: Sequence[str]) -> Compared:
    how = f"median (10 % to 90 %) of {before.rounds} rounds in alternation"
    headline = f"{before.median / after.median:.2f}x as fast in Keras, {how}"
    rows = {
        name: {f"ms / {time.batch_size} images": str(time).replace(" ms", "")}
        for name, time in (("seed", before), ("fine-tuned", after))
    }
    return Compared(headline, rows, None, tuple(notes))


# What is said of it.


def _lines(found: Benchmark, budget: Budget, seed: keras.Model, small: keras.Model) -> list[str]:
    """A line for each pair: measured and, where a cost foretold it, predicted."""
    cost = cost_of_time(budget)
    foretold = cost.conditions.runtime if isinstance(cost, MeasuredLatency) else None
    threads = "1 thread" if found.conditions["threads"] == 1 else f"{found.conditions['threads']} threads"
    lines = []
    for before, after in found.pairs():
        predicted = ""
        if cost is not None and (after.runtime, after.model) == (foretold, "small"):
            predicted = f"predicted {cost(seed) * 1e3:.3g} -> {cost(small) * 1e3:.3g} ms, measured "
        lines.append(
            f"{before.runtime}, {threads}: {predicted}{before.min * 1e3:.3g} -> {after.min * 1e3:.3g} ms, "
            f"{before.min / after.min:.2f}x as fast"
        )
    return lines


def _of_first_runtime(lines: Sequence[str], found: Benchmark) -> str:
    """The line of what became of the network in the end, such as a file in eight bits."""
    runtime = found.rows[0].runtime
    return [line for line, (_, after) in zip(lines, found.pairs(), strict=True) if after.runtime == runtime][-1]


def _files(before: BenchmarkRow, after: BenchmarkRow) -> str:
    accuracies = f"accuracy {before.accuracy:.2%} -> {after.accuracy:.2%}"
    return f"{before.bytes:,} -> {after.bytes:,} bytes; {accuracies} ({after.model})"


def _rows(found: Benchmark) -> dict[str, dict[str, str]]:
    """What was found, as lines of the report's table."""
    lines: dict[str, dict[str, str]] = {}
    for row in found.rows:
        name = {"small": "fine-tuned"}.get(row.model, row.model)
        lines.setdefault(name, {})[f"ms, {row.runtime}"] = f"{row.min * 1e3:.3g}"
        if name not in ("seed", "fine-tuned"):
            lines[name]["test accuracy"] = f"{row.accuracy:.2%}"
    return lines
