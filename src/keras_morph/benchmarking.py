"""Models side by side where they run: file size, agreement with Keras, accuracy, latency."""

import datetime
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from keras_morph.errors import DataError, KerasMorphError
from keras_morph.exporting import bytes_of, export
from keras_morph.formats import FORMATS
from keras_morph.runs import describe_environment, save_model
from keras_morph.runtimes import RUNTIMES, Session, installed, open_exported, runtime_of
from keras_morph.showing import html_table
from keras_morph.timing import time_files_apart

__all__ = ["Benchmark", "BenchmarkRow", "accuracy", "benchmark"]

EVALUATED = 32  # examples at a time
# Where a runtime's memory happens to lie makes a network up to 30 % slower for as long as the process lives: so there are
# several, but for those that take seconds to start.
SEVERAL = 3
PROCESSES = {"keras": 1, "tensorflow": 1}


@dataclass(frozen=True)
class BenchmarkRow:
    """One model in one runtime.

    Attributes:
        model: its name.
        runtime: name of the runtime.
        bytes: size of the file, weights included.
        difference: largest difference to the outputs of the Keras model, relative to the largest one; None for a file that
            was there already.
        accuracy: share of the examples whose class is the largest output; None without data.
        min, median, low, high: seconds of a pass: the least, median, 10th and 90th percentile over the rounds.
        speedup: how many times as fast as the first model in this runtime: median over rounds, each against its neighbour.
        rounds: how often it was timed.

    Example:
        >>> km.BenchmarkRow("small", "litert", 2860, 1.4e-7, None, 1.1e-4, 1.2e-4, 1.1e-4, 1.5e-4, 2.0, 300).speedup
        2.0
    """

    model: str
    runtime: str
    bytes: int
    difference: float | None
    accuracy: float | None
    min: float
    median: float
    low: float
    high: float
    speedup: float
    rounds: int


@dataclass(frozen=True)
class Benchmark:
    """Models side by side in several runtimes; prints as a Markdown table.

    Attributes:
        rows: a BenchmarkRow for each model and runtime.
        failures: runtime -> why a model could not be run in it.
        conditions: threads, batch size, versions, processor.

    Example:
        >>> conditions = {"batch_size": 1, "threads": 2, "cpu": "AMD EPYC", "cores": 2, "versions": {"litert": "2.3.0"}}
        >>> print(km.Benchmark((), {}, conditions).markdown())
        | runtime | model | ms at least | ms, median | times as fast | bytes | accuracy | differs from Keras by |
        | ------- | ----- | ----------- | ---------- | ------------- | ----- | -------- | --------------------- |
        <BLANKLINE>
        Batch 1, 2 threads, in turn, 10th to 90th percentile in brackets; AMD EPYC, 2 cores; litert 2.3.0.
    """

    rows: tuple[BenchmarkRow, ...]
    failures: dict[str, str]
    conditions: dict[str, Any]

    def __repr__(self) -> str:
        return self.markdown()

    def pairs(self) -> list[tuple[BenchmarkRow, BenchmarkRow]]:
        """Each row but those of the first model, behind the row of the first model in the same runtime."""
        first = {row.runtime: row for row in reversed(self.rows)}
        return [(first[row.runtime], row) for row in self.rows if row is not first[row.runtime]]

    def markdown(self) -> str:
        """A table, with the conditions below it."""
        cells = [HEAD, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [_line([f"{text:<{width}}" for text, width in zip(row, widths, strict=True)]) for row in cells]
        lines.insert(1, _line(["-" * width for width in widths]))
        return "\n".join([*lines, "", *self._notes()])

    def json(self) -> str:
        """All figures and conditions."""
        found = {"conditions": self.conditions, "failures": self.failures, "rows": [asdict(row) for row in self.rows]}
        return json.dumps(found, indent=2)

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return html_table("Benchmark", HEAD, map(_cells, self.rows)) + notes

    def _notes(self) -> list[str]:
        known = self.conditions
        versions = ", ".join(f"{runtime} {number}" for runtime, number in known["versions"].items())
        return [
            f"Batch {known['batch_size']}, {known['threads']} thread{'s' if known['threads'] > 1 else ''}, in turn, "
            f"10th to 90th percentile in brackets; {known['cpu']}, {known['cores']} cores; {versions}.",
            *(f"{runtime}: {reason}" for runtime, reason in self.failures.items()),
        ]


HEAD = ("runtime", "model", "ms at least", "ms, median", "times as fast", "bytes", "accuracy", "differs from Keras by")


def benchmark(
    models: Mapping[str, Any],
    *,
    runtimes: Sequence[str] = ("onnxruntime", "litert", "openvino", "keras"),
    threads: int = 1,
    batch_size: int = 1,
    data: Any = None,
    seconds: float = 3.0,
    progress: Callable[[str], None] | None = None,
) -> Benchmark:
    """Compare models in the runtimes that serve them: file size, agreement with Keras, accuracy, latency.

    Each runtime has processes of its own, in which the models take turns after a warm-up.

    Args:
        models: name -> model, or the path of an exported file, which is run in its own runtime alone. The first is what the
            others are compared with.
        runtimes: of "onnxruntime", "litert", "openvino", "tensorflow" (a SavedModel) and "keras" (its compiled
            `predict_on_batch`, on the present backend).
        threads: how many a runtime may use.
        batch_size: examples per pass.
        data: test examples and integer labels `(x, y)`, for the accuracy.
        seconds: how long each model is timed in each runtime.
        progress: called with a line at each step.

    Raises:
        KerasMorphError: if a runtime is unknown or not installed, or an option is out of range.

    Example:
        >>> found = km.benchmark({"seed": model, "small": km.prune(model, "50%")}, runtimes=["onnxruntime"], seconds=0.1)
        >>> [row.model for row in found.rows], found.rows[0].speedup, found.rows[1].difference < 1e-4
        (['seed', 'small'], 1.0, True)
    """
    _check(models, runtimes, threads, batch_size, seconds, data)
    say = progress or (lambda _: None)
    rows: list[BenchmarkRow] = []
    failures: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        for runtime in runtimes:
            try:
                files = _files(models, runtime, Path(folder), say)
                if not files:
                    continue
                say(f"{runtime}: timing {', '.join(files)}")
                timings = time_files_apart(
                    [path for path, _ in files.values()],
                    threads=threads,
                    batch_size=batch_size,
                    seconds=seconds * len(files),
                    processes=PROCESSES.get(runtime, SEVERAL),
                )
                rows += _rows(files, timings.seconds, runtime, data)
            except KerasMorphError as error:
                failures[runtime] = str(error).replace(f"{folder}/", "")
    return Benchmark(tuple(rows), failures, _conditions(threads, batch_size, runtimes))


def _check(
    models: Mapping[str, Any], runtimes: Sequence[str], threads: int, batch_size: int, seconds: float, data: Any
) -> None:
    for option, value in (("threads", threads), ("batch_size", batch_size)):
        if value < 1:
            raise KerasMorphError(f"{option}: expected a number of at least 1. Received: {value}.")
    if not seconds > 0:
        raise KerasMorphError(f"seconds: expected a number above 0. Received: {seconds}.")
    if not models:
        raise KerasMorphError("models: expected a dictionary from names to models. Received: none.")
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise KerasMorphError(f"runtimes: expected some of {', '.join(RUNTIMES)}. Received: {runtime!r}.")
        installed(runtime)
    for name, model in models.items():
        if isinstance(model, (str, os.PathLike)) and runtime_of(model) not in runtimes:
            raise KerasMorphError(
                f"runtimes: expected {runtime_of(model)} among them, which serves {name}. Received: {', '.join(runtimes)}."
            )
        if isinstance(model, (str, os.PathLike)) and not Path(model).exists():
            raise KerasMorphError(f"models: expected a network's file. Received: {model}, which does not exist.")
    if data is not None and not (isinstance(data, (tuple, list)) and len(data) == 2 and len(data[0]) == len(data[1])):
        raise DataError("data: expected examples and as many labels, (x, y). Received: something else.")


def _files(
    models: Mapping[str, Any], runtime: str, folder: Path, say: Callable[[str], None]
) -> dict[str, tuple[Path, float | None]]:
    """For each model, its file for a runtime, and how far that is from the Keras model."""
    found: dict[str, tuple[Path, float | None]] = {}
    for number, (name, model) in enumerate(models.items()):
        if isinstance(model, (str, os.PathLike)):
            if runtime_of(model) == runtime:
                found[name] = Path(model), None
            continue
        path = folder / f"{number}{RUNTIMES[runtime].suffix}"
        if runtime == "keras":
            save_model(model, path)
            found[name] = path, 0.0
        else:
            (kind,) = [each for each, row in FORMATS.items() if row.runtime == runtime]
            say(f"{runtime}: exporting {name}")
            found[name] = path, export(model, path, format=kind).difference
    return found


def _rows(
    files: dict[str, tuple[Path, float | None]], samples: Sequence[Sequence[float]], runtime: str, data: Any
) -> list[BenchmarkRow]:
    rows = []
    for (name, (path, difference)), seconds in zip(files.items(), samples, strict=True):
        right = None if data is None else accuracy(open_exported(path), *data)
        least, median, low, high = np.quantile(seconds, [0, 0.5, 0.1, 0.9]).tolist()
        speedup = float(np.median(np.divide(samples[0], seconds)))
        figures = (bytes_of(path), difference, right, least, median, low, high, speedup, len(seconds))
        rows.append(BenchmarkRow(name, runtime, *figures))
    return rows


def accuracy(session: Session, x: Any, y: Any) -> float:
    """Share of the examples whose class is the largest output; of one output, above a half."""
    (taken,) = session.inputs
    y = np.asarray(y)
    batches = (np.asarray(x[start : start + EVALUATED]).astype(taken.dtype) for start in range(0, len(x), EVALUATED))
    outputs = np.concatenate([session.run([batch])[0] for batch in batches])
    labels = y.argmax(-1) if y.ndim == outputs.ndim and y.shape[-1] > 1 else y.reshape(outputs.shape[:-1])
    chosen = outputs.argmax(-1) if outputs.shape[-1] > 1 else outputs[..., 0] > 0.5
    return float(np.mean(chosen == labels))


def _conditions(threads: int, batch_size: int, runtimes: Sequence[str]) -> dict[str, Any]:
    environment = describe_environment()
    versions = {runtime: RUNTIMES[runtime].version for runtime in runtimes}
    if "keras" in versions:
        versions["keras"] += f" on {environment['backend']} {environment['backend_version']}"
    return {
        "date": f"{datetime.date.today()}",
        "threads": threads,
        "batch_size": batch_size,
        "versions": versions,
        **{key: environment[key] for key in ("cpu", "cores", "platform", "python", "keras_morph")},
    }


def _cells(row: BenchmarkRow) -> tuple[str, ...]:
    return (
        row.runtime,
        row.model,
        f"{row.min * 1e3:.3g}",
        f"{row.median * 1e3:.3g} ({row.low * 1e3:.3g} to {row.high * 1e3:.3g})",
        f"{row.speedup:.2f}",
        f"{row.bytes:,}",
        "-" if row.accuracy is None else f"{row.accuracy:.2%}",
        "-" if row.difference is None else f"{row.difference:.1e}",
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
