"""Laws 1 and 2 on many random networks, by hand: tests run some dozens of them, this runs as many as time allows.

    KERAS_BACKEND=torch python benchmarks/random_graphs.py --graphs 10000 [--structures 3] [--random-seed 0] [--float64]

The networks are those of tests/networks.py: one to seven blocks out of the whole table of layer rules. Each is rebuilt for
several random structures, and held against the masked seed (law 1) and the costs foretold (law 2). Where they differ it is
tried with other weights too: a rebuild that is wrong is wrong with any weights, one whose outputs are what is left of larger
numbers is not, and is counted as ill-conditioned, as is one that is undefined for both. Ends with an error and the smallest
network that it finds at the first difference. Appends a row to benchmarks/results/random_graphs.csv.
"""

import argparse
import datetime
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "laws")]

import models
import networks
import structures
from exactness import assert_exact
from rows import append
from test_costs_agree import assert_costs_agree

import keras_morph as km
from keras_morph.runs import describe_environment

RESULTS = ROOT / "benchmarks" / "results" / "random_graphs.csv"


def exact(model, structure, tolerance):
    """Whether law 1 holds with the weights that the model has; an error where it does not with others either."""
    try:
        assert_exact(model, structure, tolerance)
    except AssertionError:
        if alike_where_undefined(model, structure, tolerance):
            return False
        print(f"\ntried with other weights: {model.name}", flush=True)
        assert_exact(models.randomize(model, seed=2), structure, tolerance)
        assert_exact(models.randomize(model, seed=3), structure, tolerance)
        return False
    return True


def alike_where_undefined(model, structure, tolerance):
    """Whether the masked seed gives NaN (a mean over steps that are all masked), and the rebuilt model at the same places."""
    inputs = models.examples(model)
    one, other = (models.outputs(each(model, structure), inputs) for each in (km.rebuild, km.masked))
    if all(np.isfinite(x).all() for x in other):
        return False
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.nanmax(np.abs(b), initial=0))  # NaN equals NaN
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--structures", type=int, default=3)
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], help="draw these kinds of blocks only, and convolutions")
    parser.add_argument("--float64", action="store_true", help="weights and numbers in float64, equal to 1e-9")
    arguments = parser.parse_args()
    if arguments.float64:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
    if arguments.kinds:
        networks.KINDS = {kind: networks.KINDS[kind] for kind in ("conv", *arguments.kinds)}
    tolerance = 1e-9 if arguments.float64 else 1e-5
    count, n = {"graphs": 0, "structures": 0, "ill_conditioned": 0}, arguments.structures

    @seed(arguments.random_seed)
    @settings(
        deadline=None,
        max_examples=arguments.graphs,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks.recipes(), st.lists(networks.kills, min_size=n, max_size=n, unique=True), networks.grouped_modes)
    def check(recipe, kills, grouped):
        model = networks.build(recipe)
        graph = km.trace(model, grouped=grouped)
        count["graphs"] += 1
        for kill in kills:
            structure = structures.mixed(graph, *kill)
            count["ill_conditioned"] += not exact(model, structure, tolerance)
            assert_costs_agree(graph, structure)
            count["structures"] += 1
        if count["graphs"] % 500 == 0:
            print(count, flush=True)

    start, failure = time.perf_counter(), ""
    try:
        check()
    except Exception as error:
        failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise
    finally:
        environment = describe_environment()
        row = {
            "date": f"{datetime.date.today()}",
            **count,
            "failure": failure,
            "seconds": f"{time.perf_counter() - start:.0f}",
            **{name: environment[name] for name in ("backend", "backend_version", "keras", "cpu")},
            "command": f"KERAS_BACKEND={keras.backend.backend()} python benchmarks/random_graphs.py --graphs "
            f"{arguments.graphs} --structures {n} --random-seed {arguments.random_seed}{' --float64' * arguments.float64}"
            f"{' --kinds ' * bool(arguments.kinds)}{' '.join(arguments.kinds)}",
        }
        append(RESULTS, row)
        print(row)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
