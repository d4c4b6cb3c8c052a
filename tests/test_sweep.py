"""Sweeps: every combination is run once, whatever happens to its process; `compare` puts figures side by side."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_tensorboard import events

import keras_morph as km
from keras_morph import sweep
from keras_morph.cli import main
from keras_morph.cli.comparing import front, goodness, grouped, rows_of
from keras_morph.cli.shrink import Shrink
from keras_morph.cli.sweep import arguments_of
from keras_morph.status import running

pytestmark = pytest.mark.once

PRETENDED = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pretended_run; pretended_run.main()"
)


REAL = sweep.PROGRAM


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Runs are pretended, in the folder where we are."""
    monkeypatch.setattr(sweep, "PROGRAM", PRETENDED)
    monkeypatch.setattr(sweep, "SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    return caught.value.code


def calls(name="s"):
    path = Path("runs") / name / "calls.txt"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_every_combination_is_run_once_and_compared(pretended, capsys):
    given = [
        "--budgets",
        "50%,75%",
        "--learning-rates",
        "0.01,0.02",
        "--random-seeds",
        "0,1",
        "--epochs",
        9,
        "--jobs",
        2,
    ]
    assert command("sweep", "steady", *given, "--name", "s") == 0
    names = [f"{b}pct_learning-rate={rate}_seed={n}" for b in (50, 75) for rate in (0.01, 0.02) for n in (0, 1)]
    assert calls() == sorted(f"{name} begins" for name in names)
    options = json.loads(Path("runs/s", names[-1], "config.json").read_text())["options"]
    assert options["epochs"] == "9"
    assert (options["budget"], options["learning_rate"], options["random_seed"]) == ("75%", "0.02", "1")
    printed = capsys.readouterr().out
    # The higher rate is better by 1 %; the mean of two seeds is 0.1 % below the first, their deviation 0.14 %.
    (line,) = [line for line in printed.splitlines() if "│ 75%" in line and "0.02" in line]
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["2", "75%", "0.02", "74.0 ± 0.0", "75.9 ± 0.1", "75.9 ± 0.1", "10", "1 ± 0", "*"]
    assert "keras-morph shrink steady --budget 75% --epochs 9 --learning-rate 0.02" in printed
    rows = list(csv.DictReader(Path("runs/s/sweep.csv").read_text().splitlines()))
    assert sorted(row["run"] for row in rows) == sorted(names)
    assert {float(row["val_accuracy"]) for row in rows if row["run"] == names[-1]} == {0.74 + 0.02 - 1 / 500}
    assert Path("runs/s/front.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(Path("runs/s").glob("*/events*"))) == 8
    logged = {tag: value for tag, _, value in events(Path("runs/s", names[-1]))}
    assert logged["val_accuracy"].simple_value == pytest.approx(0.74 + 0.02 - 1 / 500)
    told = logged["_hparams_/session_start_info"].metadata.plugin_data
    assert told.plugin_name == "hparams"
    assert b"learning_rate" in told.content

    assert command("sweep", "--resume", "runs/s") == 0
    assert len(calls()) == 8
    capsys.readouterr()
    assert command("compare", "runs/s", "--mean", "--csv", "all.csv", "--picture", "all.svg") == 0
    assert capsys.readouterr().out.count("│ 2 ") == 4
    assert Path("all.csv").read_text() == Path("runs/s/sweep.csv").read_text()
    assert "svg" in Path("all.svg").read_text()[:200]


def test_a_run_that_is_killed_goes_on(pretended):
    assert command("sweep", "killed", "--random-seeds", "0,1", "--name", "s") == 0
    assert calls() == [f"50pct_seed={n} {how}" for n in (0, 1) for how in ("begins", "goes on")]


def test_a_run_that_fails_ends_no_other_and_is_tried_again(pretended, capsys):
    Path("runs/s").mkdir(parents=True)
    assert command("sweep", "failing", "--random-seeds", "0,1,2", "--name", "s") == 2  # the folder is there
    Path("runs/s").rmdir()
    with running(Path("runs/t")):
        pass
    Path("runs/t/failing").touch()
    options = {"model": "failing", "random_seeds": "0,1,2", "name": "t"}
    Path("runs/t/config.json").write_text(json.dumps({"command": "sweep", "options": options}))
    assert command("sweep", "--resume", "runs/t") == 2
    error = capsys.readouterr().err
    assert "1 runs failed" in error
    assert "50pct_seed=1: keras-morph: it cannot be done" in error
    assert json.loads(Path("runs/t/status.json").read_text())["state"] == "failed"
    Path("runs/t/failing").unlink()
    assert command("sweep", "--resume", "runs/t") == 0
    assert calls("t") == ["50pct_seed=0 begins", "50pct_seed=1 begins", "50pct_seed=1 goes on", "50pct_seed=2 begins"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_sweep_that_is_interrupted_ends_its_runs_and_goes_on(pretended, number, code):
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/slow").touch()
    options = {"model": "slow", "random_seeds": "0,1,2,3", "jobs": 2}
    Path("runs/s/config.json").write_text(json.dumps({"command": "sweep", "options": options}))
    program = f"from keras_morph import sweep; sweep.SECONDS = 0.05; sweep.PROGRAM = {PRETENDED!r}; {REAL}"
    # On the backend that is imported the quickest.
    process = subprocess.Popen(
        [sys.executable, "-c", program, "sweep", "--resume", "runs/s"],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 60
    while not {f"50pct_seed={n} begins" for n in (1, 2)} <= set(calls()):
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)  # the second of them has written that it is running, and waits
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code
    assert "--resume runs/s goes on" in error
    states = {path.parent.name: json.loads(path.read_text())["state"] for path in Path("runs/s").glob("*/status.json")}
    assert [states[f"50pct_seed={n}"] for n in (1, 2)] == ["failed", "failed"]
    Path("runs/s/slow").unlink()
    done = {name for name, state in states.items() if state == "done"}
    before = calls()
    assert command("sweep", "--resume", "runs/s") == 0
    again = calls()
    for name in done:
        assert again.count(f"{name} begins") == before.count(f"{name} begins") == 1
        assert f"{name} goes on" not in again
    assert len(list(Path("runs/s").glob("*/results.json"))) == 4


def test_a_run_waits_for_a_process_that_outlived_its_sweep(pretended):
    folder = Path("runs/s/50pct")
    with running(folder):
        (folder / "config.json").write_text('{"command": "shrink", "options": {"model": "steady"}}')
        run = sweep.Run.here(folder, ["shrink", "steady"])
        waiting = threading.Thread(target=sweep.carry_out, args=[run])
        waiting.start()
        time.sleep(0.3)
        assert not calls()
    waiting.join(60)
    # It ended well, but without results: so it is asked for again.
    assert calls() == ["50pct goes on"]
    assert sweep.is_done(folder)


def test_a_search_asks_for_what_is_missing_in_each_study(tmp_path):
    stopping, seen = threading.Event(), []

    def value(study, point, hopeless, ends=5):
        seen.append((study, point["rate"], point["kind"]))
        if len(seen) == ends:
            raise KeyboardInterrupt
        return None if len(seen) == 2 else -abs(point["rate"] - 0.01)

    axes = {"rate": sweep.Range(1e-3, 1e-1), "kind": ["a", "b"]}
    options = {"trials": 4, "jobs": 1, "stopping": stopping}
    with pytest.raises(KeyboardInterrupt):
        sweep.search(tmp_path, ["50%", "25%"], axes, value, **options)
    assert stopping.is_set()
    first = list(seen)
    assert all(1e-3 <= rate <= 1e-1 for _, rate, _ in first)
    assert len({rate for _, rate, _ in first}) == 5
    sweep.search(tmp_path, ["50%", "25%"], axes, value, **options | {"stopping": threading.Event()})
    again = seen[5:]
    # Three of the first study were done; the failed one, and the one under way in the second, come first and unchanged.
    assert [study for study, _, _ in again] == ["50%", *4 * ["25%"]]
    assert again[0] == first[1]
    assert again[1] == first[4]
    sweep.search(tmp_path, ["50%", "25%"], axes, value, **options | {"stopping": threading.Event()})
    assert len(seen) == 10


def test_the_front_holds_what_no_other_beats(tmp_path):
    places = {"a": (0.2, 0.5), "b": (0.4, 0.5), "c": (0.6, 0.9), "d": (0.6, 0.8), "e": (0.9, 0.9)}
    for name, (share, accuracy) in places.items():
        (tmp_path / name).mkdir()
        figures = {"cost_share": share, "FLOPs": 1, "parameters": 1, "seconds": None, "budget": name, "cost": "FLOPs"}
        figures |= {"val_accuracy": accuracy, "test_accuracy": 0.0}
        (tmp_path / name / "results.json").write_text(json.dumps(figures))
    rows = rows_of([tmp_path])
    assert [group[0].name for group in front(grouped(rows))] == ["a", "c"]
    assert [goodness(row) for row in rows] == [accuracy for _, accuracy in places.values()]
    (tmp_path / "f").mkdir()  # of another command
    for name, text in (("results.json", "{}"), ("config.json", '{"command": "finetune", "options": {}}')):
        (tmp_path / "f" / name).write_text(text)
    assert len(rows_of([tmp_path])) == 5
    with pytest.raises(km.KerasMorphError, match="another command's"):
        rows_of([tmp_path / "f"])
    (tmp_path / "a" / "results.json").write_text('{"cost_share": "much"}')
    with pytest.raises(km.KerasMorphError, match="cannot be read"):
        rows_of([tmp_path])


def test_a_command_line_gives_the_options_that_it_is_made_of(monkeypatch):
    given = Shrink("m", "40%", protect=["a", "b"], stream=False, strength=0.0, log_dir=Path("x"), latency=None)
    seen = []
    monkeypatch.setattr("keras_morph.cli.shrinking.run", seen.append)
    assert command(*arguments_of(given)) == 0
    assert seen == [given]


@pytest.mark.parametrize(("package", "arguments"), [("optuna", []), ("ray", ["--engine", "ray"])])
def test_what_is_not_installed_is_one_line(pretended, monkeypatch, capsys, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    assert command("sweep", "steady", *arguments) == 2
    assert f"needs {package.capitalize()}" in capsys.readouterr().err


def test_runs_that_are_below_others_at_half_time_are_left(pretended, capsys):
    given = ["--learning-rates", "0.04,0.03,0.05", "--epochs", 10, "--prune", "--name", "s"]
    assert command("sweep", "learning", *given) == 0
    assert "50pct_learning-rate=0.03 is left" in capsys.readouterr().out
    assert [row.options["learning_rate"] for row in rows_of([Path("runs/s")])] == ["0.04", "0.05"]
    before = calls()
    assert command("sweep", "--resume", "runs/s") == 0
    assert calls() == before


@pytest.mark.slow
@pytest.mark.needs("ray")
def test_ray_gives_the_same_table(pretended, monkeypatch, capsys):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    given = ["--budgets", "50%,75%", "--random-seeds", "0,1"]
    tables = []
    for name, further in (("here", []), ("there", ["--engine", "ray", "--jobs", "2"])):
        assert command("sweep", "killed", *given, "--name", name, *further) == 0
        tables.append((Path("runs") / name / "sweep.csv").read_text())
        assert len(calls(name)) == 8
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_sweep_of_real_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    given = ["--limit", "60", "--epochs", "3", "--seed-epochs", "0", "--budgets", "60%,50%", "--name", "s"]
    assert command("sweep", "test_cli:for_digits", *given) == 0
    rows = rows_of([Path("runs/s")])
    assert [row.figures["budget"] for row in rows] == ["50%", "60%"]
    for row, share in zip(rows, (0.5, 0.6), strict=True):
        assert 0 < row.figures["cost_share"] <= share
        assert km.Structure.load(row.folder / "structure.json")
