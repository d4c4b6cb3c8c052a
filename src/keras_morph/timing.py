"""How long networks take in a runtime, timed in turn. Nothing here needs Keras, so that it runs on the target device.

    python -m keras_morph.timing --threads 1 --seconds 20 one.onnx other.onnx
    python -m keras_morph.timing --threads 1 FOLDER

prints a JSON object, or writes FOLDER/timings.json. In a process of its own there are no other framework's threads.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.errors import KerasMorphError
from keras_morph.machine import cpu_name
from keras_morph.runtimes import RUNTIMES, Input, Session, open_exported, runtime_of

__all__ = ["SUFFIXES", "TIMINGS", "Conditions", "Timings", "in_turn", "time_files", "time_files_apart"]

TIMINGS = "timings.json"
SUFFIXES = tuple(runtime.suffix for runtime in RUNTIMES.values() if runtime.suffix not in ("", ".keras"))
SIZE = 32  # of an axis that may have any size
PROCESSES = 5
LEAST = 0.02  # seconds of one sample at least: shorter passes are repeated, until caches hold what they hold in service


@dataclass(frozen=True)
class Conditions:
    """Where and how something was timed."""

    runtime: str
    version: str
    threads: int
    batch_size: int
    device: str

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.runtime} {self.version}, {threads}, batch {self.batch_size}, {self.device}"


@dataclass(frozen=True)
class Timings:
    """Seconds of one pass of each file.

    Attributes:
        conditions: where and how.
        seconds: per file the samples, in the order in which they were taken.
    """

    conditions: Conditions
    seconds: tuple[tuple[float, ...], ...]

    @property
    def least(self) -> np.ndarray:
        """The shortest sample of each file, `(files,)`: what the rest of the machine adds is never negative."""
        return np.array([min(samples) for samples in self.seconds])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def parsed(cls, text: str) -> "Timings":
        """From what `save` writes.

        Raises:
            KerasMorphError: if it is something else.
        """
        try:
            found = json.loads(text)
            return cls(Conditions(**found["conditions"]), tuple(map(tuple, found["seconds"])))
        except (ValueError, TypeError, KeyError) as error:
            raise KerasMorphError(f"Expected timings that keras-morph has written. Received: {text[:60]!r}.") from error


def in_turn(runs: Sequence[Callable[[], Any]], seconds: float, *, rounds: int | None = None) -> list[list[float]]:
    """Time functions in turn, so that a noisy machine is equally unfair to all.

    Each sample begins with a run that is not timed, and goes on for a while: those between have emptied the caches, by which
    networks of 14 MB seemed to take up to 30 % longer, and small ones no longer.

    Args:
        runs: what is timed. Each runs twice before, to warm up and to find how often it has to run for one sample.
        seconds: when to stop, after the round under way; at least three rounds are run.
        rounds: how many rounds at most.

    Returns:
        For each function the seconds of one run, a number for each round.
    """
    repeats = []
    for run in runs:
        run()
        repeats.append(max(1, round(LEAST / max(_mean(run, 1), 1e-9))))
    samples: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    number = 0
    while number < 3 or (time.perf_counter() < end and (rounds is None or number < rounds)):
        for run, times, found in zip(runs, repeats, samples, strict=True):
            run()
            found.append(_mean(run, times))
        number += 1
    return samples


def _mean(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def time_files(
    paths: Sequence[Path], *, threads: int = 1, batch_size: int = 1, seconds: float = 10.0, rounds: int | None = None
) -> Timings:
    """Time files of one runtime in turn, in this process, on random inputs.

    Args:
        paths: as `open_exported` takes them.
        threads: that the runtime may use.
        batch_size: examples of one pass.
        seconds: as in `in_turn`.
        rounds: as in `in_turn`.
    """
    sessions = [open_exported(path, threads=threads) for path in paths]
    runs = [_run(session, batch_size) for session in sessions]
    runtime = sessions[0].runtime
    conditions = Conditions(runtime, RUNTIMES[runtime].version, threads, batch_size, cpu_name())
    return Timings(conditions, tuple(map(tuple, in_turn(runs, seconds, rounds=rounds))))


def time_files_apart(
    paths: Sequence[Path],
    *,
    threads: int = 1,
    batch_size: int = 1,
    seconds: float = 10.0,
    rounds: int | None = None,
    processes: int = PROCESSES,
) -> Timings:
    """`time_files` in processes of their own, one after the other, which share the seconds.

    Where a runtime's memory happens to lie makes a network up to 30 % slower, for as long as the process lives.

    Raises:
        KerasMorphError: if the runtime fails; its last line is shown.
    """
    options = {"threads": threads, "batch-size": batch_size, "seconds": seconds / processes, "rounds": rounds}
    given = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "keras_morph.timing", *given, *map(str, paths)]
    # Keras's backends read how many threads they may use when they start.
    limits = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "NPROC"), str(threads))
    environment = {**os.environ, **limits, "TF_NUM_INTEROP_THREADS": "1"}
    found = []
    for _ in range(processes):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise KerasMorphError(f"{runtime_of(paths[0])} could not time {len(paths)} files: {last[0]}")
        found.append(Timings.parsed(done.stdout.splitlines()[-1]))  # a backend may print notes of its own before
    seconds_of_all = tuple(sum(samples, ()) for samples in zip(*(each.seconds for each in found), strict=True))
    return Timings(found[0].conditions, seconds_of_all)


def _run(session: Session, batch_size: int) -> Callable[[], Any]:
    random = np.random.default_rng(0)
    arrays = [_example(each, batch_size, random) for each in session.inputs]
    return lambda: session.run(arrays)


def _example(given: Input, batch_size: int, random: np.random.Generator) -> np.ndarray:
    shape = (batch_size, *(SIZE if size is None else size for size in given.shape[1:]))
    if given.dtype.kind == "f":
        return random.random(shape).astype(given.dtype)
    return np.zeros(shape, given.dtype)  # a number that every vocabulary has


def main() -> None:
    """What `python -m keras_morph.timing` does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="files of one runtime, or a folder of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int)
    options = vars(parser.parse_args())
    paths = options.pop("paths")
    if len(paths) > 1 or not paths[0].is_dir() or (paths[0] / "saved_model.pb").exists():
        print(json.dumps(asdict(time_files(paths, **options))))  # noqa: T201
        return
    files = [path for path in sorted(paths[0].iterdir()) if path.suffix in SUFFIXES]
    if not files:
        raise SystemExit(f"Expected a folder with files that end in {', '.join(SUFFIXES)}. Received: {paths[0]}.")
    timings = time_files_apart(files, **options)
    timings.save(paths[0] / TIMINGS)
    print(f"{paths[0] / TIMINGS}: {len(files)} files, {timings.conditions}")  # noqa: T201


if __name__ == "__main__":
    main()
