"""A run's folder: files that are never half written, models that open on every backend, and where a run took place.

Keras is imported where a model is at hand: who only looks at runs, or starts them, need not wait for it.
"""

__all__ = [
    "TEMPORARY",
    "check_run_folder",
    "describe_environment",
    "going_on",
    "new_run_folder",
    "plain",
    "read_regular",
    "remove_leftovers",
    "save_model",
    "uncompiled",
    "write_atomically",
    "write_json",
    "write_somewhere",
    "write_text",
]

import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_morph.errors import KerasMorphError, UnwrittenWarning
from keras_morph.machine import cpu_name

if TYPE_CHECKING:
    import keras

TEMPORARY = ".keras-morph-"  # what a file is called, with a number behind it, that is not whole yet
OF_A_RUN = ("status.json", "checkpoint/last.npz")  # one of these tells a run's folder; config.json may be anybody's
RESULTS = (
    "seed.keras",
    "small.keras",
    "structure.json",
    "history.csv",
)  # what a run writes, by names that others use, too
_SAID: set[str] = set()  # files that a warning has named


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Write a file such that whoever looks at any moment finds the old content or the new one, never a part.

    Args:
        path: The file; missing folders above it are made.
        write: Called with the path of a temporary file beside it, with the same endings, which it has to write. If it
            raises, the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # the user's name for it
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str], busy: Collection[Path] = ()) -> None:
    """Remove temporary files and folders that a killed process left in a folder, but not where others are at work."""
    for path in sorted(Path(folder).rglob(f"{TEMPORARY}*")):
        if not any(path.is_relative_to(place) for place in busy):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def check_run_folder(run: str | os.PathLike[str]) -> Path:
    """A folder that a run can be in: a new one, or one that holds a run, or nothing that a run would overwrite.

    Raises:
        KerasMorphError: if it is none.
    """
    folder = Path(run)
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        fine = bool(str(run)) and nearest.is_dir() and os.access(nearest, os.W_OK)
        fine = fine and not nearest.resolve().is_relative_to("/proc")
    except (OSError, ValueError):  # too long, or with a zero byte
        fine = False
    if not fine:
        raise KerasMorphError(f"run: expected a folder that can be written. Received: {str(run)!r}.")
    mine = any((folder / name).exists() for name in OF_A_RUN)
    theirs = [name for name in RESULTS if (folder / name).exists()]
    if theirs and not mine:
        raise KerasMorphError(
            f"run: expected a new folder, or that of a run. Received: {folder}, which holds {', '.join(theirs)} and no run; one "
            "would overwrite that. Give another folder."
        )
    return folder


@contextlib.contextmanager
def going_on(path: str | os.PathLike[str], consequence: str = "") -> Iterator[None]:
    """Inside, a disk that is full or gone ends nothing: the first time that a file cannot be written, a warning says so.

    Args:
        path: the file, as the warning names it.
        consequence: what follows from it, for the warning.
    """
    try:
        yield
    except OSError as error:
        if str(path) not in _SAID:
            _SAID.add(str(path))
            reason = error.strerror or str(error)
            warnings.warn(
                f"{path} cannot be written ({reason}); {consequence or 'the run goes on'}.", UnwrittenWarning, 3
            )


def write_somewhere(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Write a file where it should be or, where its disk is full or gone, among the system's temporary files, and say so.

    Args:
        path: the file.
        write: called with the path to write to, perhaps a second time.
    """
    path = Path(path)
    try:
        write(path)
    except OSError as error:
        with going_on(path, "the run goes on without it"):
            elsewhere = _spare_folder() / "-".join(path.absolute().parts[-3:])
            write(elsewhere)
            with going_on(path, f"the run goes on, and keeps it in {elsewhere}"):
                raise error


@functools.cache
def _spare_folder() -> Path:
    """A folder among the system's temporary files, one for each process."""
    return Path(tempfile.mkdtemp(prefix="keras-morph-"))


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a file from outside: what is no regular file would be waited for without end, or have no end.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        OSError: If it cannot be read, is no regular file, or is larger.
        ValueError: If the path cannot be one.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            msg = "no regular file"
            raise OSError(msg)
        content = file.read(limit + 1)
    if len(content) > limit:
        msg = f"more than {limit:,} bytes"
        raise OSError(msg)
    return content


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def write_json(path: str | os.PathLike[str], data: object) -> None:
    """Write a JSON file atomically, indented by 2; NumPy's numbers and arrays become plain ones."""
    write_text(path, json.dumps(data, indent=2, default=plain) + "\n")


def save_model(model: "keras.Model", path: str | os.PathLike[str]) -> None:
    """Save a model to a `.keras` file atomically, as if it had never been compiled.

    A file that was compiled on PyTorch names PyTorch's optimizer and opens only where PyTorch is; and the state of an
    optimizer makes a file up to three times as large. The model itself stays compiled.

    Raises:
        KerasMorphError: If the file's name does not end in `.keras`.
    """
    path = Path(path)
    if path.suffix != ".keras":
        msg = f"path: expected a file name that ends in .keras, received {str(path)!r}"
        raise KerasMorphError(msg)
    with uncompiled(model):
        write_atomically(path, model.save)


def new_run_folder(
    log_dir: str | os.PathLike[str], *, name: str | None = None, now: datetime.datetime | None = None
) -> Path:
    """Make the folder of a new run, `LOG_DIR/YYYYMMDD-HHMMSS`; `-1`, `-2`, ... is appended where it is taken.

    Args:
        log_dir: Where the runs are; it is made if it does not exist.
        name: Of the folder, instead of the time.
        now: The time that the folder is named after; the present, in local time, if not given.

    Returns:
        The path of the folder, which exists and is empty.

    Raises:
        KerasMorphError: If the folder cannot be made, or there is one of that name.
    """
    log_dir = Path(log_dir)
    stamp = f"{now or datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        if name is not None:
            if (log_dir / name).exists():
                raise KerasMorphError(
                    f"{log_dir / name} is there already. Expected: the name of a new run; --resume goes on with an "
                    "unfinished one."
                )
            (log_dir / name).mkdir()
            return log_dir / name
        for number in itertools.count():
            folder = log_dir / (f"{stamp}-{number}" if number else stamp)
            # Making a folder is atomic: two runs that start in the same second never share one.
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    except OSError as error:
        msg = (
            f"log_dir: expected a folder that can be written, received {str(log_dir)!r} "
            f"({error.strerror or error}); choose another one"
        )
        raise KerasMorphError(msg) from error
    return folder


def describe_environment() -> dict[str, Any]:
    """Describe where a run takes place: versions, backend, platform, processor and the cores that may be used."""
    import keras

    backend = keras.backend.backend()
    return {
        "python": platform.python_version(),
        "keras_morph": _own_version(),
        "keras": keras.__version__,
        "numpy": np.__version__,
        "backend": backend,
        # Keras has imported its backend; to ask the module spares us an import of a framework of our own.
        "backend_version": getattr(sys.modules.get(backend), "__version__", "unknown"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


@contextlib.contextmanager
def uncompiled(model: "keras.Model") -> Iterator[None]:
    """Inside, a model and those that it holds look as if they had never been compiled."""
    import keras

    from keras_morph.keras_internals import parts_of

    # A model may hold further models, each with an optimizer of its own. `vars` goes past Keras's attribute tracking,
    # so that afterwards nothing at all has changed.
    compiled = {"compiled": False, "optimizer": None}
    models = [layer for layer in parts_of(model) if isinstance(layer, keras.Model)]
    kept = [{key: vars(each)[key] for key in compiled if key in vars(each)} for each in models]
    try:
        for each, attributes in zip(models, kept, strict=True):
            vars(each).update({key: compiled[key] for key in attributes})
        yield
    finally:
        for each, attributes in zip(models, kept, strict=True):
            vars(each).update(attributes)


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def plain(value: object) -> object:
    """NumPy's numbers and arrays as Python's, for `json.dumps(default=...)`."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    msg = f"{type(value).__name__} cannot be written as JSON: {value!r}"
    raise TypeError(msg)


def _own_version() -> str:
    try:
        return importlib.metadata.version("keras-morph")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
