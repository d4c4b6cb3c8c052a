"""Many runs: which points are asked for, and the processes that carry them out.

Optuna asks for the points, of a grid or of a search, in one study for each budget and cost. Each run is a process of its own,
on this machine or on Ray's workers: what ends one ends no other. A run's folder is its checkpoint: one that was killed goes on by
`--resume`, wherever it is started again. Only those processes import Keras.
"""

import contextlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_morph.errors import KerasMorphError
from keras_morph.status import TERMINATED, is_running, read_status

__all__ = ["Range", "Run", "carry_out", "is_done", "local", "on_ray", "search"]

ATTEMPTS = 3  # of a run whose process is killed, or whose worker is lost
SECONDS = 0.5  # between two looks at a process
PROGRAM = "from keras_morph.cli import main; main()"
ENDED = (TERMINATED, 128 + signal.SIGINT)  # exit codes of a run that a signal has ended
PASSED_ON = ("KERAS_BACKEND", "PYTHONPATH")  # to workers on other machines


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, on a logarithmic scale."""

    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """A run that is to be there.

    Attributes:
        folder: its own, absolute; on Ray one that all machines share.
        arguments: of `keras-morph`, to begin it.
        directory: where it is begun.
        environment: variables that a worker on another machine lacks.
        program: that takes the arguments; Python.
    """

    folder: Path
    arguments: tuple[str, ...]
    directory: Path
    environment: Mapping[str, str]
    program: str

    @classmethod
    def here(cls, folder: Path, arguments: Sequence[str]) -> "Run":
        """A run under this directory and these variables."""
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return cls(folder.absolute(), tuple(arguments), Path.cwd(), passed, PROGRAM)


def is_done(folder: Path) -> bool:
    """Whether a run has ended well, and its figures are there."""
    return (folder / "results.json").exists() and read_status(folder).get("state") == "done"


def carry_out(run: Run, stopped: Callable[[], bool] = lambda: False) -> str:
    """Begin a run, or go on with it, until it is done; again, if its process is killed.

    Args:
        run: what is to be done.
        stopped: whether it should save its state and end.

    Returns:
        Why it failed: the last line that it wrote; nothing if it is done, or was stopped.
    """
    why = ""
    for _ in range(ATTEMPTS):
        while run.folder.exists() and is_running(run.folder) and not stopped():  # by a process that outlived its sweep
            time.sleep(SECONDS)
        if is_done(run.folder) or stopped():
            return ""
        code = _ended(run, stopped)
        if code == 0 or stopped():
            return ""
        why = _last_line(_log_of(run)) or f"exit code {code}"
        if code > 0 and code not in ENDED:
            break
    return why


def _ended(run: Run, stopped: Callable[[], bool]) -> int:
    """The exit code of one process."""
    arguments: Sequence[str] = ("shrink", "--resume", str(run.folder))
    if not (run.folder / "config.json").exists():
        shutil.rmtree(run.folder, ignore_errors=True)  # killed before anything was trained
        arguments = run.arguments
    _log_of(run).parent.mkdir(parents=True, exist_ok=True)
    with _log_of(run).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", run.program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.directory,
            env={**os.environ, **run.environment},
            start_new_session=True,  # Ctrl-C is for the sweep, which hands it on once
        )
        try:
            asked = False
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(SECONDS)
                if stopped() and not asked:
                    process.terminate()
                    asked = True
        except BaseException:  # a worker whose task is cancelled
            process.terminate()
            process.wait()
            raise


def _log_of(run: Run) -> Path:
    return run.folder.parent / "logs" / f"{run.folder.name}.txt"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


Engine = Callable[[Run, Callable[[], bool]], str]
"""Carries out a run, or ends it early where the second argument says so; gives why it failed."""


@contextlib.contextmanager
def local(stopping: threading.Event, jobs: int | None) -> Iterator[tuple[Engine, int]]:
    """Processes on this machine; one at once by default."""

    def engine(run: Run, hopeless: Callable[[], bool]) -> str:
        return carry_out(run, lambda: stopping.is_set() or hopeless())

    yield engine, jobs or 1


@contextlib.contextmanager
def on_ray(
    stopping: threading.Event, jobs: int | None, address: str | None, gpus: float
) -> Iterator[tuple[Engine, int]]:
    """Processes of Ray's workers; a run whose worker is lost is carried out by another one.

    Args:
        stopping: set when the sweep ends.
        jobs: at once; by default as many as the cluster has processors.
        address: of the cluster; by default one on this machine, for as long as the sweep lasts.
        gpus: of each run.

    Raises:
        KerasMorphError: if Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise _missing("Ray", "ray") from None
    alone: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **alone)
    except (ConnectionError, ValueError) as error:
        raise KerasMorphError(
            f"--address expects a Ray cluster that runs. Received: {address} ({' '.join(str(error).split())})."
        ) from error
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=ATTEMPTS)(carry_out)

    def engine(run: Run, hopeless: Callable[[], bool]) -> str:
        going = task.remote(run)
        while not ray.wait([going], timeout=SECONDS)[0]:
            if stopping.is_set() or hopeless():
                ray.cancel(going)
                ray.wait([going], timeout=60)  # until it has saved its state
                return ""
        try:
            return str(ray.get(going))
        except ray.exceptions.RayError as error:
            return " ".join(str(error).split())

    try:
        resources: Any = ray.cluster_resources
        yield engine, jobs or max(1, int(resources().get("CPU", 1)))
    finally:
        ray.shutdown()


Hopeless = Callable[[int, float], bool]


def search(
    folder: Path,
    studies: Sequence[str],
    axes: Mapping[str, Sequence[Any] | Range],
    value: Callable[[str, dict[str, Any], Hopeless], float | None],
    *,
    trials: int | None,
    jobs: int,
    stopping: threading.Event,
    rung: int | None = None,
) -> None:
    """Ask for the value of points, the higher the better, until each study has all of them.

    Args:
        folder: where Optuna's journal is kept; points that were under way when a search was ended are asked for again.
        studies: names; each is a search of its own.
        axes: by name, values or a range.
        value: from a study and a point to the point's value; None if it has failed. Its third argument says, of an epoch
            and the value so far, whether the point is hopeless, and may be left.
        trials: points of each study; by default all of the grid.
        jobs: points that are under way at once.
        stopping: set here when the search ends early, so that `value` can end too.
        rung: the epoch at which the lower half of a study's points so far is hopeless, as successive halving (ASHA) has
            it; by default none is.

    Raises:
        KerasMorphError: if Optuna is not installed.
    """
    try:
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution
        from optuna.storages.journal import JournalFileBackend, JournalStorage
        from optuna.trial import TrialState
    except ModuleNotFoundError:
        raise _missing("Optuna", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    distributions = {
        name: FloatDistribution(axis.low, axis.high, log=True)
        if isinstance(axis, Range)
        else CategoricalDistribution(tuple(axis))
        for name, axis in axes.items()
    }

    def missing(study: Any) -> int:
        """Points that the study lacks; those that must be asked for are put in its queue."""
        found: dict[Any, list[dict[str, Any]]] = {state: [] for state in TrialState}
        for trial in study.get_trials(deepcopy=False):
            found[trial.state].append(trial.params or trial.system_attrs.get("fixed_params", {}))
            if trial.state is TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
        done = [*found[TrialState.COMPLETE], *found[TrialState.PRUNED]]
        if trials is None:
            wanted = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]  # type: ignore[arg-type]
            count = sum(point not in done for point in wanted)
        else:
            wanted = [*found[TrialState.RUNNING], *found[TrialState.FAIL]]
            count = max(0, trials - len(done))
        for number, point in enumerate(wanted):
            if point not in done and point not in found[TrialState.WAITING] and point not in wanted[:number]:
                study.enqueue_trial(point)
        return count

    def one(study: Any) -> None:
        if stopping.is_set():
            return
        trial = study.ask(distributions)
        left = threading.Event()

        def hopeless(epoch: int, reached: float) -> bool:
            trial.report(reached, epoch)
            if trial.should_prune():
                left.set()
            return left.is_set()

        try:
            reached = value(study.study_name, trial.params, hopeless)
        except BaseException:
            stopping.set()
            raise
        if not stopping.is_set():
            lost = TrialState.PRUNED if left.is_set() else TrialState.FAIL
            study.tell(trial, reached, state=lost if reached is None else None)

    asked: list[Any] = []
    for name in studies:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        # Another seed when it goes on: the same one would draw its first points again.
        number = len(asked) + len(study.get_trials(deepcopy=False))
        if rung is not None:
            study.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rung, reduction_factor=2)
        else:
            study.pruner = optuna.pruners.NopPruner()
        study.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=jobs > 1)
        asked += [study] * missing(study)
    with ThreadPoolExecutor(jobs) as pool:
        going = [pool.submit(one, study) for study in asked]
        try:
            for each in going:
                each.result()
        except BaseException:
            stopping.set()
            for each in going:
                each.cancel()
            raise


def _missing(package: str, extra: str) -> KerasMorphError:
    return KerasMorphError(
        f"A sweep needs {package}. Received: it is not installed. Run pip install 'keras-morph[{extra}]'."
    )
