"""A process of several runs in a child of one that watches it: a backend that loses another process may abort before Python can
say a word.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from os import _exit as end_at_once
from pathlib import Path
from typing import Any, NoReturn

from keras_morph.errors import LostProcessError

__all__ = ["watched"]


def watched(run: Callable[[Any], None], options: Any) -> None:
    """Run a command in a child, so that its end is told whatever ends it. Keras may not have been imported yet.

    Raises:
        LostProcessError: if the child was ended by a signal from within, as by an abort.
    """
    if not hasattr(os, "fork"):  # Windows
        run(options)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        threading.Thread(target=_end_with_parent, args=[read], daemon=True).start()
        run(options)
        return
    os.close(read)  # the child reads the end of this process, which alone can write
    _watch(child, options)


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)
    end_at_once(1)


def _watch(child: int, options: Any) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        end_at_once(code)  # the child has said everything
    why = f"the process was ended by {signal.Signals(-code).name}"
    folder = _failed(child, options, why)
    raise LostProcessError(
        f"{why}; where another process was lost, its backend aborts. Expected: all processes of the training alive. "
        + (f"To go on start each of them again with --resume and its run folder, here {folder}." if folder else "")
    )


def _failed(child: int, options: Any, why: str) -> Path | None:
    """Write into the status of the child's run that it failed, as it could not."""
    from keras_morph.runs import write_json

    folders = [options.resume] if options.resume is not None else sorted(options.log_dir.glob("*/"))
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
            if status.get("process") == child and status.get("state") == "running":
                write_json(folder / "status.json", status | {"state": "failed", "why": why})
                return folder
    return None
