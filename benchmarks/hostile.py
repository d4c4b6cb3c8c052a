"""Files and options that are wrong in random ways, by the thousand; tests/test_hostile_files.py tries some of them.

    KERAS_BACKEND=torch python benchmarks/hostile.py --structures 1200 --models 600 --pictures 600 --options --random-seed 0

Each has to end in an error of ours, in one line, or in a right result (tests/hostile.py says what that is), within 20 seconds,
with nothing written but into its own folder. Ends with an error and what failed, by place, with the number of the first case;
appends a row for each kind to benchmarks/results/hostile.csv.
"""

import argparse
import collections
import datetime
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import keras

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import hostile
from rows import append
from test_cli import for_digits

import keras_morph as km
from keras_morph.runs import describe_environment

RESULTS = ROOT / "benchmarks" / "results" / "hostile.csv"


def place_of(error):
    """Where an error was raised, in our files or the tests."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "keras_morph" in frame.filename or "tests" in frame.filename]
    return f"{type(error).__name__} {str(error)[:200]} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def options(folder, report):
    """All options and arguments of all commands, each at all nonsense values."""
    km.fit_budget(for_digits(), "50%").save(Path(folder) / "structure.json")
    found, slowest = {hostile.REFUSED: 0, hostile.RIGHT: 0}, 0.0
    for arguments in hostile.option_cases():
        start = time.perf_counter()
        try:
            found[hostile.judge_command(arguments, folder)] += 1
        except (Exception, hostile.Hangs) as error:
            report([argument[:40] for argument in arguments], error)
        slowest = max(slowest, time.perf_counter() - start)
    print(f"slowest: {slowest:.1f} s")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in hostile.KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--options", action="store_true")
    parser.add_argument("--random-seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    for kind in (*hostile.KINDS, "options"):
        count = getattr(arguments, kind)
        if not count:
            continue
        faults, first = collections.Counter(), {}

        def report(case, error, faults=faults, first=first):
            place = place_of(error)
            faults[place] += 1
            first.setdefault(place, case)

        start, before = time.perf_counter(), hostile.largest_memory()
        with tempfile.TemporaryDirectory() as folder:
            if kind == "options":
                found = options(folder, report)
            else:
                found = hostile.tried(kind, folder, count, arguments.random_seed, report=report)
        environment = describe_environment()
        row = {
            "date": f"{datetime.date.today()}",
            "what": kind,
            "cases": sum(found.values()) + faults.total(),
            **found,
            "faults": faults.total(),
            "seconds": f"{time.perf_counter() - start:.0f}",
            "memory": f"{before / 1e9:.2f} to {hostile.largest_memory() / 1e9:.2f} GB",
            "random_seed": arguments.random_seed,
            **{name: environment[name] for name in ("backend", "backend_version", "keras")},
            "command": f"KERAS_BACKEND={keras.backend.backend()} python benchmarks/hostile.py {' '.join(sys.argv[1:])}",
        }
        append(RESULTS, row)
        print(row, flush=True)
        for place, number in faults.most_common():
            print(f"{number}x, first in case {first[place]}: {place}")
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
