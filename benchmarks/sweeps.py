"""A sweep of eight runs on digits: against a plain loop of the same commands, with a run killed, interrupted, and on Ray.

    KERAS_BACKEND=torch OMP_NUM_THREADS=1 python benchmarks/sweeps.py
    KERAS_BACKEND=torch OMP_NUM_THREADS=1 python benchmarks/sweeps.py --arms loop,sweep --rounds 3

Arms, each in a fresh folder, in alternation where there are several rounds; one row of benchmarks/results/sweeps.csv each, what
was run on the same day is not run again:

    loop           the eight commands, one after the other
    sweep          keras-morph sweep, one run at once
    killed         two at once; SIGKILL for a run that trains
    interrupted    two at once; SIGINT when two runs are done, then --resume
    ray            --engine ray on a cluster of this machine, two at once
    ray killed     the same; SIGKILL for a worker and its run

`seconds` are by the clock, `cpu_seconds` of all processes together, `own_cpu_seconds` of the sweep's own process, which is what a
loop does without. `same` is whether all figures but the seconds are those of the loop; `done_before` and `done_again`
count runs that were done when the sweep was interrupted, and those of them that were touched afterwards.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rows import append, rows_at

from keras_morph.runs import describe_environment
from keras_morph.status import read_status

RESULTS = Path(__file__).parent / "results" / "sweeps.csv"
PROGRAM = [sys.executable, "-c", "from keras_morph.cli import main; main()"]
BUDGETS, SEEDS = ("75%", "50%"), (0, 1, 2, 3)
ONE = ["DigitsResNet", "--seed-epochs", "3", "--epochs", "12"]
SWEEP = ["sweep", *ONE, "--budgets", ",".join(BUDGETS), "--random-seeds", ",".join(map(str, SEEDS)), "--name", "sweep"]
ARMS = {
    "loop": [],
    "sweep": ["--jobs", "1"],
    "killed": ["--jobs", "2"],
    "interrupted": ["--jobs", "2"],
    "ray": ["--jobs", "2", "--engine", "ray"],
    "ray killed": ["--jobs", "2", "--engine", "ray"],
}


def name_of(budget, seed):
    return f"{budget.replace('%', 'pct')}_seed={seed}"


def figures(folder):
    """What came of each run, without how long it took."""
    found = {}
    for path in sorted(folder.rglob("results.json")):
        found[path.parent.name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
    return found


def own_seconds(process):
    """Processor seconds of a process alone, so far."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def loop(folder):
    start, own = time.perf_counter(), 0.0
    for budget in BUDGETS:
        for seed in SEEDS:
            where = ["--log-dir", str(folder / "sweep"), "--name", name_of(budget, seed)]
            command = ["shrink", *ONE, "--budget", budget, "--random-seed", str(seed), *where]
            subprocess.run([*PROGRAM, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start, own, 0


def sweep(folder, arguments, disturb=None):
    """Seconds, its own processor seconds, and the exit code of a sweep; `disturb` looks at it until it returns True."""
    start, own = time.perf_counter(), 0.0
    with (folder / "output.txt").open("a") as output:
        # Shells let what they start in the background ignore SIGINT.
        heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen([*PROGRAM, *arguments], cwd=folder, stdout=output, stderr=output, preexec_fn=heeding)
        while process.poll() is None:
            own = max(own, own_seconds(process))
            if disturb is not None and disturb(process):
                disturb = None
            time.sleep(0.05)
    assert disturb is None or "--resume" in arguments, "nothing was disturbed"
    return time.perf_counter() - start, own, process.returncode


def training(folder):
    """Processes of runs that train."""
    states = [read_status(path.parent) for path in (folder / "sweep").glob("*/status.json")]
    return [each["process"] for each in states if each.get("state") == "running" and each.get("phase") == "fine-tune"]


def kill_a_run(folder):
    def disturb(process):
        for run in training(folder)[:1]:
            os.kill(run, signal.SIGKILL)
            return True
        return False

    return disturb


def kill_a_worker(folder):
    def disturb(process):
        for run in training(folder)[:1]:
            worker = int(Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[1])
            assert b"ray::" in Path(f"/proc/{worker}/cmdline").read_bytes()
            os.kill(worker, signal.SIGKILL)
            os.kill(run, signal.SIGKILL)
            return True
        return False

    return disturb


def interrupt(folder, done):
    def disturb(process):
        done.update({name: changed(folder, name) for name in figures(folder)})
        if len(done) >= 2:
            process.send_signal(signal.SIGINT)
        return len(done) >= 2

    return disturb


def changed(folder, name):
    """When a run's network was last written."""
    return (folder / "sweep" / name / "small.keras").stat().st_mtime_ns


def trial(arm, folder):
    """What a row holds of an arm, and the figures of its runs."""
    done = {}
    disturb = {
        "killed": kill_a_run(folder),
        "ray killed": kill_a_worker(folder),
        "interrupted": interrupt(folder, done),
    }
    before = sum(os.times()[2:4])
    if arm == "loop":
        seconds, own, code = loop(folder)
    else:
        arguments = [*SWEEP, "--log-dir", str(folder), *ARMS[arm]]
        seconds, own, code = sweep(folder, arguments, disturb.get(arm))
    first = code
    if arm == "interrupted":
        assert code == 128 + signal.SIGINT, code
        more, also, code = sweep(folder, ["sweep", "--resume", str(folder / "sweep")])
        seconds, own = seconds + more, own + also
    row = {
        "seconds": f"{seconds:.1f}",
        "cpu_seconds": f"{sum(os.times()[2:4]) - before:.1f}",
        "own_cpu_seconds": f"{own:.2f}",
        "first_exit": first,
        "exit": code,
        "runs": len(figures(folder)),
        "done_before": len(done),
        "done_again": sum(changed(folder, name) != time for name, time in done.items()),
    }
    return row, figures(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    environment = {
        k: v for k, v in describe_environment().items() if k in ("backend", "backend_version", "keras", "cpu", "cores")
    }
    kept = options.output.with_suffix(".json")  # the loop's figures, for arms that run another day
    today = {"date": f"{datetime.date.today()}", "backend": environment["backend"]}
    for number, arm in itertools.product(range(options.rounds), options.arms.split(",")):
        if sum({"arm": arm, **today}.items() <= row.items() for row in rows_at(options.output)) > number:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            row, found = trial(arm, Path(scratch))
            if arm == "loop":
                kept.write_text(json.dumps(found, indent=2) + "\n")
            same = found == json.loads(kept.read_text())
            row = {"arm": arm, **row, "same": same, **today, **environment}
            append(options.output, {**row, "command": " ".join(["keras-morph", *SWEEP, *ARMS[arm]])})
            print(row, flush=True)
            if row["exit"] or not same:
                print((Path(scratch) / "output.txt").read_text()[-3000:])


if __name__ == "__main__":
    main()
