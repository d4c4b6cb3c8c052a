"""Kill `train` and `shrink` at random moments, go on, and compare with an undisturbed run.

    KERAS_BACKEND=torch OMP_NUM_THREADS=1 python benchmarks/kill_runs.py            20 moments of each, minutes

A run is a process of its own, forked from this one so that it starts at once. It is killed by SIGKILL after a random time, and
goes on by `--resume`. Meanwhile every file of its folder is opened again and again. One row of
benchmarks/results/kill_runs.csv per kill: where it came, and whether history.csv, structure.json and the weights of small.keras
are those of the undisturbed run, to the bit. A moment before anything is written or after the end is drawn again. Rows of
SIGTERM say how long the process took to end. Rows that are there are not run again.
"""

import argparse
import csv
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import keras
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
import sklearn.datasets
import tensorboardX.summary
from keras import layers
from rows import append, rows_at

from keras_morph.cli import main as keras_morph
from keras_morph.runs import describe_environment
from keras_morph.status import read_status

PRELOADED = (matplotlib, sklearn, tensorboardX)  # by this process, so that the forked ones need not
RESULTS = Path(__file__).parent / "results" / "kill_runs.csv"
COMMANDS = {
    "train": "train --base-model-name kill_runs:body --dataset digits --limit 100 --num-epochs 5 --batch-size 16 "
    "--morphnet-regularizer-algorithm Gamma",
    "shrink": "shrink kill_runs:network --data digits --limit 100 --seed-epochs 1 --epochs 6 --batch-size 16 --distillation 0.2",
}


def body(input_shape):
    """Two convolutions with BatchNormalization, and dropout, whose random state has to go on too."""
    image = x = keras.Input(input_shape)
    for number, width in ((1, 12), (2, 16)):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(layers.BatchNormalization(name=f"bn{number}")(x))
        x = layers.Dropout(0.1, name=f"dropout{number}")(x)
    return keras.Model(image, x, name="body")


def network(input_shape, classes):
    inner = body(input_shape)
    x = layers.GlobalAveragePooling2D(name="mean")(inner.output)
    return keras.Model(inner.input, layers.Dense(classes, activation="softmax", name="logits")(x), name="network")


def started(arguments):
    """A process that runs `keras-morph ARGUMENTS`."""
    process = os.fork()
    if process:
        return process
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            keras_morph(arguments)
    except SystemExit as error:
        os._exit(error.code or 0)
    finally:
        os._exit(99)


class Watched:
    """The folder of a run, read again and again."""

    def __init__(self, log_dir):
        self.log_dir, self.read, self.damaged, self.place = log_dir, 0, [], {}

    @property
    def folder(self):
        return next(iter(self.log_dir.iterdir()), None) if self.log_dir.exists() else None

    def look(self):
        """Open every file that is there under its own name."""
        for path in self.log_dir.rglob("*"):
            if path.name.startswith(".") or not path.is_file():
                continue
            try:
                opens(path)
            except FileNotFoundError:  # moved since it was listed
                continue
            except Exception as error:
                self.damaged.append(f"{path.name}: {type(error).__name__} {error}")
            self.read += 1
        if self.folder is not None:
            self.place = read_status(self.folder) or self.place


def opens(path):
    if path.suffix == ".json" or path.name.startswith("alive_"):
        json.loads(path.read_text())
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1
    elif path.suffix == ".npz":
        with np.load(path) as found:
            assert all(found[name] is not None for name in found.files)
    elif path.suffix == ".keras":
        assert zipfile.ZipFile(path).testzip() is None


def ended(process, watched, seconds=None, number=None):
    """Wait for a process, after some seconds with a signal; gives its exit status and how long it ran."""
    start = time.monotonic()
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        if seconds is not None and time.monotonic() - start >= seconds:
            os.kill(process, number)
            sent = time.monotonic()
            _, status = os.waitpid(process, 0)
            return os.waitstatus_to_exitcode(status), time.monotonic() - sent
        watched.look()
        time.sleep(0.03)


def results_of(folder):
    """What has to be equal, to the bit."""
    model = keras.models.load_model(folder / "small.keras")
    return (
        (folder / "history.csv").read_text(),
        (folder / "structure.json").read_text(),
        b"".join(np.asarray(keras.ops.convert_to_numpy(weight)).tobytes() for weight in model.weights),
    )


def trial(name, number, random, undisturbed, longest, scratch):
    """One kill, and what came of it: a row; or how long the run took that was over before, None if there was nothing yet."""
    watched = Watched(scratch)
    seconds = random.uniform(0, longest)
    code, took = ended(started([*COMMANDS[name].split(), "--log-dir", str(scratch)]), watched, seconds, number)
    if code == 0:  # before the signal, or just as it came
        return max(took, seconds)
    if watched.folder is None or not (watched.folder / "config.json").exists():
        return None
    watched.look()
    place = watched.place
    resumed, _ = ended(started([name, "--resume", str(watched.folder)]), watched)
    same = [one == other for one, other in zip(results_of(watched.folder), undisturbed, strict=True)]
    return {
        "seconds": f"{seconds:.2f}",
        "place": place.get("place") or f"{place.get('phase')}, {place.get('epoch')} epochs done",
        "exit": code,
        "seconds_to_end": f"{took:.3f}",
        "resumed_exit": resumed,
        **dict(zip(("same_history", "same_structure", "same_weights"), same, strict=True)),
        "files_read": watched.read,
        "files_damaged": len(watched.damaged),
        "first_damage": watched.damaged[0] if watched.damaged else "",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=4, help="moments of SIGTERM")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    environment = {
        k: v for k, v in describe_environment().items() if k in ("backend", "backend_version", "keras", "cpu", "cores")
    }
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as scratch:
            watched = Watched(Path(scratch) / "undisturbed")
            code, longest = ended(started([*COMMANDS[name].split(), "--log-dir", str(watched.log_dir)]), watched)
            assert code == 0, code
            undisturbed = results_of(watched.folder)
            for kind, count in (("SIGKILL", options.kills), ("SIGTERM", options.terms)):
                for number in range(count):
                    key = {"command": name, "signal": kind, "number": str(number), "backend": environment["backend"]}
                    if any(all(row[k] == v for k, v in key.items()) for row in rows_at(options.output)):
                        continue
                    random = np.random.default_rng([number, len(kind), len(name)])
                    row, attempt = None, 0
                    while not isinstance(row, dict):
                        attempt += 1
                        folder = Path(scratch) / f"{kind}-{number}-{attempt}"
                        row = trial(name, getattr(signal, kind), random, undisturbed, longest, folder)
                        longest = row if isinstance(row, float) else longest  # other processes come and go
                    environment["date"] = f"{datetime.date.today()}"
                    append(options.output, {**key, **row, **environment, "arguments": COMMANDS[name]})
                    print({**key, **row}, flush=True)


if __name__ == "__main__":
    main()
