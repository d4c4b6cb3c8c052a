"""What `sweep` does: its runs, each in a process of its own, and what came of them. No Keras."""

import csv
import dataclasses
import os
import re
import shlex
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_morph.cli.comparing import (
    front,
    goodness,
    grouped,
    log_hyperparameters,
    rows_of,
    save_picture,
    table,
    write_csv,
)
from keras_morph.cli.options import ALGORITHMS, COSTS, check_name, plain
from keras_morph.cli.resuming import say_unfinished
from keras_morph.cli.shrink import Shrink
from keras_morph.cli.sweep import AXES, Sweep, arguments_of, numbers_in
from keras_morph.errors import KerasMorphError
from keras_morph.runs import going_on, new_run_folder, write_atomically, write_json
from keras_morph.showing import console
from keras_morph.status import running
from keras_morph.sweep import Engine, Hopeless, Range, Run, is_done, local, on_ray, search

__all__ = ["run"]


def run(options: Sweep) -> None:
    """Carry out what is missing, and show all of it."""
    for study in options.studies:
        check_name("--costs", study["cost"], COSTS)
    axes = _axes(options)
    for name in axes.get("regularizer", [options.regularizer] if options.regularizer else []):  # type: ignore[union-attr]
        check_name("--regularizers", name, ALGORITHMS)
    if options.resume is None:
        say_unfinished("sweep", options)
    folder = options.resume or new_run_folder(options.log_dir, name=options.name)
    with running(folder):
        if options.resume is None:
            write_json(folder / "config.json", {"command": "sweep", "options": plain(options)})
        print(f"sweep folder: {folder}", flush=True)
        stopping = threading.Event()
        with _engine(options, stopping) as (engine, jobs):
            sweep = _Sweep(options, folder, engine, threading.Semaphore(jobs), stopping)
            search(
                folder,
                list(sweep.studies),
                axes,
                sweep.value,
                trials=options.trials,
                jobs=jobs,
                stopping=stopping,
                rung=max(1, options.epochs // 2) if options.prune else None,
            )
        if any(folder.rglob("results.json")):
            _show(folder)
        if sweep.failed:
            name, why = next(iter(sweep.failed.items()))
            raise KerasMorphError(
                f"{len(sweep.failed)} runs failed; keras-morph sweep --resume {folder} tries them again, and logs/ says more. "
                f"{name}: {why}"
            )


def _axes(options: Sweep) -> dict[str, Sequence[Any] | Range]:
    """What is varied within a study, by the name of shrink's option."""
    axes: dict[str, Sequence[Any] | Range] = {}
    for plural, single in AXES.items():
        text = getattr(options, plural)
        if text is None:
            continue
        if single == "regularizer":
            axes[single] = [part.strip() for part in text.split(",")]
        else:
            numbers, is_range = numbers_in(f"--{plural.replace('_', '-')}", text)
            axes[single] = Range(*numbers) if is_range else numbers
    return axes


def _engine(options: Sweep, stopping: threading.Event) -> AbstractContextManager[tuple[Engine, int]]:
    """Where the runs are, and how many at once."""
    if options.engine == "ray":
        return on_ray(stopping, options.jobs, options.address, options.gpus)
    if options.jobs is not None and options.jobs > 1:
        for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):  # of each run, which would take all cores
            os.environ.setdefault(threads, str(max(1, (os.cpu_count() or 1) // options.jobs)))
    return local(stopping, options.jobs)


@dataclass
class _Watch:
    """Whether a run is hopeless, by the epochs that it has written."""

    history: Path
    hopeless: Hopeless
    seen: int = 0
    answer: bool = False

    def __call__(self) -> bool:
        if self.answer or not self.history.exists():
            return self.answer
        with self.history.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["phase"] != "seed" and row["val_accuracy"]]
        for epoch, row in enumerate(rows[self.seen :], self.seen + 1):
            self.answer = self.answer or self.hopeless(epoch, float(row["val_accuracy"]))
        self.seen = len(rows)
        return self.answer


def _never(epoch: int, reached: float) -> bool:
    return False


@dataclass
class _Sweep:
    """The runs of a sweep: `value` is called by several threads.

    Attributes:
        failed: why runs did not come to an end, by name.
    """

    options: Sweep
    folder: Path
    engine: Engine
    slots: threading.Semaphore
    stopping: threading.Event
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def studies(self) -> dict[str, dict[str, str]]:
        return {f"{study['budget']} {study['cost']}": study for study in self.options.studies}

    def value(self, study: str, point: dict[str, Any], hopeless: Hopeless) -> float | None:
        """Mean over random seeds; None if a run failed, or was hopeless."""
        searched = {single for plural, single in AXES.items() if ".." in (getattr(self.options, plural) or "")}
        point = {name: float(f"{each:.4g}") if name in searched else each for name, each in point.items()}
        runs = [self._run(self.studies[study], point, seed) for seed in self.options.seeds]
        with ThreadPoolExecutor(len(runs)) as pool:
            done = list(pool.map(lambda run: self._carry_out(run, hopeless), runs))
        if self.stopping.is_set() or not all(done):
            return None
        rows = rows_of([each.folder for each in runs])
        return sum(map(goodness, rows)) / len(rows)

    def _run(self, study: dict[str, str], point: dict[str, Any], seed: int) -> Run:
        varied = {"cost": study["cost"]} if self.options.costs else {}
        varied |= point | ({"seed": seed} if self.options.random_seeds else {})
        parts = [
            study["budget"].replace("%", "pct"),
            *(f"{name.replace('_', '-')}={each}" for name, each in varied.items()),
        ]
        name = re.sub(r"[^\w.+=-]+", "-", "_".join(parts))
        options = self.options.shrink(**study, **point, random_seed=seed, log_dir=self.folder.absolute(), name=name)
        return Run.here(self.folder / name, arguments_of(options))

    def _carry_out(self, run: Run, hopeless: Hopeless) -> bool:
        if is_done(run.folder):
            return True
        watch = _Watch(run.folder / "history.csv", hopeless if self.options.prune else _never)
        with self.slots:
            why = "" if self.stopping.is_set() else self.engine(run, watch)
        if self.stopping.is_set():
            return False
        if not is_done(run.folder) and watch():
            print(f"{run.folder.name} is left: others are better after as many epochs", flush=True)
            return False
        if not is_done(run.folder):
            self.failed[run.folder.name] = why or "it ended without results"
            print(f"{run.folder.name} failed: {self.failed[run.folder.name]}", flush=True)
            return False
        (row,) = rows_of([run.folder])
        print(f"{row.name}  accuracy {goodness(row):.3f}  cost {row.figures['cost_share']:.1%}", flush=True)
        return True


def _show(folder: Path) -> None:
    """Table, sweep.csv, front.png, TensorBoard's HParams, and how to get the networks of the front."""
    rows = rows_of([folder])
    groups = grouped(rows)
    console().print(table(groups, f"{len(rows)} runs"))
    with going_on(folder / "sweep.csv"):
        write_csv(rows, folder / "sweep.csv")
    with going_on(folder / "front.png"):
        write_atomically(folder / "front.png", lambda path: save_picture(groups, path))
    log_hyperparameters(rows)
    print("On the front, each the best of its random seeds; to train it anew:")
    for group in front(groups):
        best = max(group, key=goodness)
        print(f"{best.folder / 'small.keras'}\n    keras-morph {shlex.join(_anew(best.options))}")
    print(f"sweep.csv, front.png, and the runs are in {folder}")


def _anew(options: dict[str, Any]) -> list[str]:
    """The command that gives a run of these options."""
    known = {each.name: options[each.name] for each in dataclasses.fields(Shrink) if each.name in options}
    return arguments_of(Shrink(**known | {"log_dir": Shrink.log_dir, "name": None}))
