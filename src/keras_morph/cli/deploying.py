"""What `shrink` does after training: write the small network for its runtimes, and compare it there with the seed."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_morph.benchmarking import Benchmark, benchmark
from keras_morph.cli.options import SUFFIXES, formats_of
from keras_morph.cli.shrink import Shrink
from keras_morph.costs.budget import Budget, parse_budget
from keras_morph.costs.sizing import FileSizeOf
from keras_morph.datasets import Dataset
from keras_morph.exporting import Exported, export_all
from keras_morph.formats import FORMATS
from keras_morph.machine import cpu_name
from keras_morph.measuring import MeasuredLatency
from keras_morph.quantizing import CALIBRATED
from keras_morph.runs import write_text

__all__ = ["deployed", "headlines", "rows_of"]


def deployed(
    options: Shrink, budget: Budget, seed: keras.Model, small: keras.Model, dataset: Dataset, folder: Path
) -> Benchmark | None:
    """Write the files that --export names into a run's folder, and benchmark.json, if there is a runtime to compare in."""
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
    found = benchmark(
        models,
        runtimes=list(dict.fromkeys(runtimes)),
        threads=timed[0].threads if timed else options.threads,
        data=(dataset.x_test, dataset.y_test),
        progress=print,
    )
    write_text(folder / "benchmark.json", found.json() + "\n")
    return found


def _exported(
    options: Shrink, formats: list[str], small: keras.Model, dataset: Dataset, folder: Path
) -> list[Exported]:
    stem = "small_int8" if options.int8 else "small"
    calibration = np.asarray(dataset.x_train[:CALIBRATED]) if options.int8 else None
    return export_all(small, [folder / f"{stem}{SUFFIXES[name]}" for name in formats], int8=calibration)


def headlines(found: Benchmark) -> list[str]:
    """A line for each runtime, the seed and what became of it in the end, and one for each failure."""
    first = {row.runtime: row for row in reversed(found.rows)}
    last = {row.runtime: row for row in found.rows}
    threads = "1 thread" if found.conditions["threads"] == 1 else f"{found.conditions['threads']} threads"
    lines = []
    for runtime, seed in first.items():
        small = last[runtime]
        lines.append(
            f"{runtime}, {threads}: {seed.median * 1e3:.3g} -> {small.median * 1e3:.3g} ms, {small.speedup:.2f}x as fast; "
            f"{seed.bytes:,} -> {small.bytes:,} bytes; accuracy {seed.accuracy:.2%} -> {small.accuracy:.2%} ({small.model})"
        )
    return [*lines, *(f"{runtime}: {reason}" for runtime, reason in found.failures.items())]


def rows_of(found: Benchmark) -> dict[str, dict[str, str]]:
    """What was found, as lines of the report's table."""
    lines: dict[str, dict[str, str]] = {}
    for row in found.rows:
        name = {"small": "fine-tuned"}.get(row.model, row.model)
        lines.setdefault(name, {})[f"ms, {row.runtime}"] = f"{row.median * 1e3:.3g}"
        if name not in ("seed", "fine-tuned"):
            lines[name]["test accuracy"] = f"{row.accuracy:.2%}"
    return lines
