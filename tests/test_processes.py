"""One training in several processes: who takes part, whose part of a batch is whose, that two compute what one does, and that a
lost one ends the others and not the run."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_morph import devices, processes
from keras_morph.cli import main
from keras_morph.cli.options import process_of
from keras_morph.datasets import Batches as Streamed
from keras_morph.errors import KerasMorphError, LostProcessError
from keras_morph.processes import Process, of_tf_config
from keras_morph.training.batches import Batches
from keras_morph.training.checkpoints import Saved

TWO = ("10.0.0.1:5000", "10.0.0.2:5001")


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process one of two, as far as data are concerned."""

    def become(number):
        monkeypatch.setattr(processes, "_here", Process(number, TWO))

    return become


# Who takes part ----------------------------------------------------------------------------------------------------


def config(cluster, kind="worker", index=0):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (config({"worker": list(TWO)}), Process(0, TWO)),
        (config({"worker": list(TWO)}, index=1), Process(1, TWO)),
        (config({"chief": [TWO[0]], "worker": [TWO[1]]}, "chief"), Process(0, TWO)),
        (config({"chief": [TWO[0]], "worker": [TWO[1]]}, "worker"), Process(1, TWO)),
        (config({"worker": [TWO[0]]}), Process(0, TWO[:1])),
    ],
)
def test_tf_config_says_who_takes_part(text, expected, monkeypatch):
    assert of_tf_config(text) == expected
    monkeypatch.setenv("TF_CONFIG", text)
    assert process_of(None, None) == expected
    assert process_of("a:1,b:2", 1) == Process(1, ("a:1", "b:2"))  # what is asked for goes first


@pytest.mark.once
@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", config({"worker": list(TWO)}, index=2), config({"ps": ["a:1"], "worker": list(TWO)}),
     config({"worker": list(TWO)}, "evaluator"), config({"worker": list(TWO)}, index=-1), config({"worker": 3})],
)  # fmt: skip
def test_another_tf_config_is_one_line(text):
    with pytest.raises(KerasMorphError, match="TF_CONFIG expects"):
        of_tf_config(text)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--process-id", "0"], "--process-id expects --job-addresses too"),
        (["--job-addresses", "a:1,b:2"], "--job-addresses expects --process-id too: 0 to 1"),
        (["--job-addresses", "a:1,b:2", "--process-id", "2"], "--process-id expects a number of at least 0, up to 1"),
        (["--job-addresses", "a,b:2", "--process-id", "0"], "HOST:PORT for each process. Received: a."),
        (["--job-addresses", "a:1,a:1", "--process-id", "0"], "a different HOST:PORT"),
        (["--job-addresses", "", "--process-id", "0"], "HOST:PORT for each process"),
        (["--job-addresses", "a:1,b:2", "--process-id", "0", "--num-cuda-device", "1"], "no choice of devices"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.only_on("torch")
def test_pytorch_has_no_engine():
    with pytest.raises(KerasMorphError, match="no engine for several processes on torch"):
        processes.join(Process(0, TWO))


def test_devices_are_not_chosen_in_several_processes(as_process):
    as_process(0)
    with pytest.raises(KerasMorphError, match="CUDA_VISIBLE_DEVICES"):
        devices.choose(1)


# Whose part of a batch is whose ------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_the_parts_of_a_batch_are_the_batch(streamed, as_process):
    x, y = np.arange(40, dtype=np.float32).reshape(10, 2, 2, 1), np.arange(10)
    batches = Streamed(x, y, 4, seed=3) if streamed else Batches((x, y), 4, 3)
    whole = [batches[number] for number in range(3)]
    parts = []
    for number in (0, 1):
        as_process(number)
        parts.append([batches[number] for number in range(3)])
    for both, *halves in zip(whole, *parts, strict=True):
        assert len(halves[0][0]) == len(halves[1][0])
        for array, first, second in zip(both, *halves, strict=True):
            np.testing.assert_array_equal(np.concatenate([first, second]), array)


def test_what_fills_a_batch_counts_nothing(as_process):
    batches = Streamed(np.ones((7, 2, 2, 1), np.float32), np.arange(7), 4, devices=2)
    for number, weights in enumerate(([1, 1], [1, 0])):
        as_process(number)
        np.testing.assert_array_equal(batches[1][2], weights)


def test_the_end_of_another_process_is_one_clear_error(as_process):
    with pytest.raises(ValueError, match="Gloo") as caught, processes.watching_others():
        raise ValueError("Gloo AllGather failed")
    assert not isinstance(caught.value, KerasMorphError)  # there is no other
    as_process(1)
    lost = r"process 1 of 2 lost another one.*Gloo AllGather failed.*--resume"
    with pytest.raises(LostProcessError, match=lost), processes.watching_others():
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(ZeroDivisionError), processes.watching_others():
        raise ZeroDivisionError


# Two processes -----------------------------------------------------------------------------------------------------


class Pair:
    """Two processes of one training on this machine, each with a log folder of its own."""

    def __init__(self, folder, epochs):
        self.logs = [folder / "0", folder / "1"]
        self.options = [
            "--base-model-name",
            "two_processes:tiny",
            "--dataset",
            "digits",
            "--limit",
            "300",
            "--batch-size",
            "32",
        ]
        self.options += [
            "--optimizer",
            "sgd",
            "--momentum",
            "0",
            "--learning-rate",
            "0.02",
            "--morphnet-regularization-multiplier",
            "1",
        ]
        self.options += ["--morphnet-regularizer-threshold", "0.04", "--num-epochs", str(epochs)]

    def start(self, *resume):
        with contextlib.ExitStack() as stack:  # both at once, so that the ports differ
            sockets = [stack.enter_context(socket.socket()) for _ in self.logs]
            for each in sockets:
                each.bind(("localhost", 0))
            addresses = ",".join(f"localhost:{each.getsockname()[1]}" for each in sockets)
        for number, log in enumerate(self.logs):
            options = ["--resume", resume[number]] if resume else [*self.options, "--log-dir", log]
            yield command(*options, "--job-addresses", addresses, "--process-id", number)

    @property
    def folders(self):
        return [next(log.iterdir()) for log in self.logs]


def command(*options):
    environment = os.environ | {
        "KERAS_BACKEND": keras.backend.backend(),
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    program = [sys.executable, "-c", "from keras_morph.cli import main; main()", "train", *map(str, options)]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=500)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("keras-morph: ")]


def undisturbed(pair, folder):
    """The run folder of the same training in one process."""
    code, _, said = ended(command(*pair.options, "--log-dir", folder))
    assert code == 0, said
    return next(folder.iterdir())


def assert_same_run(one, other):
    first, second = (json.loads((folder / "structure.json").read_text())["layers"] for folder in (one, other))
    assert first == second
    assert any(0 < len(layer["alive"]) < layer["width"] for layer in first.values())
    weights = [Saved.load(folder / "checkpoint" / "last.npz").arrays["model"] for folder in (one, other)]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1e-4)
    rows = [list(csv.DictReader((folder / "history.csv").open())) for folder in (one, other)]
    assert len(rows[0]) == len(rows[1])
    for a, b in zip(*rows, strict=True):
        np.testing.assert_allclose(float(a["loss"]), float(b["loss"]), rtol=1e-4)
        assert a["val_accuracy"] == b["val_accuracy"]


@pytest.mark.slow
@pytest.mark.only_on("jax", "tensorflow")
def test_two_processes_compute_what_one_does(tmp_path):
    pair = Pair(tmp_path, epochs=2)
    (code, out, _), (other_code, other_out, other_said) = [ended(process) for process in list(pair.start())]
    assert (code, other_code) == (0, 0), other_said
    assert "training data-parallel on 2 devices of 2 processes" in out
    assert "waits for the others" in other_out
    assert "learn" not in other_out  # process 0 alone tells the rest
    assert "val_accuracy" in out
    assert "run folder" in other_said[0]
    one = undisturbed(pair, tmp_path / "one")
    for folder in pair.folders:
        assert_same_run(folder, one)
        assert json.loads((folder / "status.json").read_text())["state"] == "done"
        keras.models.load_model(folder / "small.keras")


@pytest.mark.slow
@pytest.mark.only_on("jax", "tensorflow")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_both_go_on(victim, tmp_path):
    pair = Pair(tmp_path, epochs=20)
    both = list(pair.start())
    while not any(len(path.read_text().splitlines()) > 3 for path in pair.logs[victim].glob("*/history.csv")):
        assert all(process.poll() is None for process in both), [ended(process) for process in both]
        time.sleep(0.05)
    both[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, _, said = ended(both[1 - victim])
    assert code == 1
    assert time.monotonic() - killed < 60
    assert ("lost another one" in said[-1]) or ("another process was lost" in said[-1])
    assert "--resume" in said[-1]
    ended(both[victim])
    status = json.loads((pair.folders[1 - victim] / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["why"]
    # The disk of the killed one is lost, up to what it was asked for: it gets the checkpoint of the other.
    (pair.folders[victim] / "checkpoint" / "last.npz").unlink()
    for code, _, said in [ended(process) for process in list(pair.start(*pair.folders))]:
        assert code == 0, said
    one = undisturbed(pair, tmp_path / "one")
    assert_same_run(pair.folders[1 - victim], one)
    assert_same_run(pair.folders[victim], one)


@pytest.mark.slow
@pytest.mark.only_on("jax", "tensorflow")
def test_processes_that_were_asked_for_different_things(tmp_path):
    pair = Pair(tmp_path, epochs=2)
    first = pair.start()
    both = [next(first)]
    pair.options += ["--random-seed", "1"]
    both += list(first)
    results = [ended(process) for process in both]
    assert all(code in (1, 2) for code, _, _ in results)
    assert any("expect the same options" in line for _, _, said in results for line in said)
