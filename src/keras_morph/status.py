"""What state a run is in: `status.json`, one process at a time, and an end that is asked for by a signal."""

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from keras_morph.errors import KerasMorphError
from keras_morph.runs import going_on, remove_leftovers, write_json

__all__ = ["Running", "is_running", "now_running", "read_status", "running"]

TERMINATED = 128 + signal.SIGTERM  # what shells report of a process that SIGTERM ended

_RUNNING: ContextVar["Running | None"] = ContextVar("running", default=None)


class Running:
    """The run that is under way in this process.

    Args:
        folder: the run's.
        within: the run that this one is a part of, or None.

    Attributes:
        place: where it is, such as "learn, epoch 3", for messages.
        waits: whether someone will soon ask `stop_if_asked`, so that a signal may wait for it.
    """

    def __init__(self, folder: Path, within: "Running | None" = None) -> None:
        self.folder, self.within, self.place, self.waits = folder, within, "", False
        self.asked: int | None = None

    def write(self, state: str, why: str = "", **further: Any) -> None:
        """Write `status.json`: "running", "done" or "failed", and why."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        path = self.folder / "status.json"
        with going_on(path):
            write_json(path, {"state": state, "why": why, "process": os.getpid(), "time": now, **further})

    def on_signal(self, number: int, frame: Any) -> None:
        """Stop at the end of the optimizer step; at once, where none is under way or at the second signal."""
        at_once, self.asked = not self.waits or self.asked is not None, number
        if at_once:
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """End the run if a signal has asked for it.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for SIGTERM, with 143.
        """
        if self.asked is None:
            return
        whole = self
        while whole.within is not None:
            whole = whole.within
            whole.asked, whole.place = self.asked, f"{self.folder.name}, {self.place}"
        sys.stderr.write(f"keras-morph: {self.reason}; --resume {whole.folder} goes on\n")
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt(self.reason)
        raise SystemExit(TERMINATED)

    @property
    def reason(self) -> str:
        """Which signal ended the run, and where."""
        name = signal.Signals(self.asked).name if self.asked is not None else "nothing"
        return f"interrupted by {name}" + (f" in {self.place}" if self.place else "")


def now_running() -> Running | None:
    """The run under way, or None."""
    return _RUNNING.get()


@contextlib.contextmanager
def running(folder: Path | None) -> Iterator[Running | None]:
    """Inside, a run is under way in a folder: its status is kept, what a killed process left is removed, and SIGTERM and
    Ctrl-C end it after the optimizer step that is under way.

    Without a folder nothing happens; inside another `running` of the same folder, the other one goes on. Inside one of another
    folder this run is a part of that one, and is the one that signals end.

    Raises:
        KerasMorphError: if another process is running there.
    """
    outer = _RUNNING.get()
    if folder is None or (outer is not None and outer.folder.resolve() == folder.resolve()):
        yield outer
        return
    run = Running(folder, outer)
    with _alone(folder), _signals(run):
        within = {path.parent for path in folder.rglob("status.json")} - {folder}
        remove_leftovers(folder, [each for each in within if is_running(each)])
        token = _RUNNING.set(run)
        try:
            run.write("running")
            yield run
        except BaseException as error:
            why = f"{type(error).__name__}: {error}" if run.asked is None else run.reason
            run.write("failed", " ".join(why.split()), place=run.place)
            raise
        else:
            run.write("done")
        finally:
            _RUNNING.reset(token)


def read_status(folder: Path) -> dict[str, Any]:
    """`status.json` of a run; empty if it has none."""
    try:
        found = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_running(folder: Path) -> bool:
    """Whether a process is running in a folder now."""
    try:
        with _alone(folder):
            return False
    except KerasMorphError:
        return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process runs in a folder; the system forgets a lock whose process was killed."""
    path = folder / "checkpoint" / ".lock"
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = read_status(folder).get("process")
            raise KerasMorphError(
                f"{folder} is in use: process {process} is running there. Expected: one process for each run. Wait for it, "
                "or end it."
            ) from None
        except OSError:  # a full disk, or a file system without locks
            pass
        yield


@contextlib.contextmanager
def _signals(run: Running) -> Iterator[None]:
    """Inside, a run is told of SIGINT and SIGTERM, unless the program has handlers of its own for them."""
    theirs: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        theirs = {}
    if run.within is not None:
        theirs = dict.fromkeys(theirs, run.within.on_signal)
    ours = [number for number, handler in theirs.items() if signal.getsignal(number) == handler]
    for number in ours:
        signal.signal(number, run.on_signal)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, theirs[number])
