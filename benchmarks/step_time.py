"""What the penalty costs: time of a training step with it against without it, in alternation in one process.

    python benchmarks/step_time.py [--networks ResNet50,MobileNetV2] [--rounds 15] [--batch-size 32]

Also the time to trace the network, to close a random structure and to rebuild it. Appends rows to
benchmarks/results/step_time.csv: the ratio of the medians, the quartiles of the ratios of neighbouring rounds, n.
"""

import argparse
import csv
import datetime
import time
from pathlib import Path

import keras
import numpy as np

import keras_morph as km
from keras_morph.graph.closure import close
from keras_morph.runs import describe_environment

RESULTS = Path(__file__).parent / "results" / "step_time.csv"


def step_seconds(model, x, y, steps):
    """Seconds per training step."""
    start = time.perf_counter()
    for _ in range(steps):
        model.train_on_batch(x, y)
    return (time.perf_counter() - start) / steps


def compile_(model):
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def ratios(name, regularizer, arguments):
    """Times of plain steps and of steps with the penalty, `(rounds,)` each, in seconds."""
    rng = np.random.default_rng(0)
    size = max(32, km.zoo.minimum_size(name))
    x = rng.random((arguments.batch_size, size, size, 3), np.float32)
    y = rng.integers(0, 10, arguments.batch_size)
    plain = compile_(km.zoo.build(name, input_shape=(size, size, 3)))
    seed = km.zoo.build(name, input_shape=(size, size, 3))
    cost = km.FLOPs()
    learner = compile_(km.StructureLearner(seed, regularizer=regularizer, cost=cost, strength=1 / cost(seed)))
    for model in (plain, learner):
        step_seconds(model, x, y, 2)
    pairs = [
        (step_seconds(plain, x, y, arguments.steps), step_seconds(learner, x, y, arguments.steps))
        for _ in range(arguments.rounds)
    ]
    return np.array(pairs).T


def surgery_seconds(name):
    """Seconds to trace, to close a random structure, and to rebuild it (building its layers included)."""
    size = max(32, km.zoo.minimum_size(name))
    seed = km.zoo.build(name, input_shape=(size, size, 3))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        graph = km.trace(seed)
        traced = time.perf_counter()
        alive = close(graph, np.random.default_rng(0).random(graph.num_groups) < 0.7).alive
        closed = time.perf_counter()
        km.rebuild(seed, km.Structure.closed(graph, alive))
        times.append((traced - start, closed - traced, time.perf_counter() - closed))
    start = time.perf_counter()
    keras.models.clone_model(seed)
    return (*np.median(times, axis=0), time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="ResNet50,MobileNetV2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    environment = describe_environment()
    rows = []
    for name in arguments.networks.split(","):
        trace_s, close_s, rebuild_s, clone_s = surgery_seconds(name)
        for regularizer in (km.GroupLasso(), km.Gamma()):
            plain, learner = ratios(name, regularizer, arguments)
            low, middle, high = np.quantile(learner / plain, [0.25, 0.5, 0.75])
            rows.append(
                {
                    "date": f"{datetime.date.today()}",
                    "network": name,
                    "regularizer": type(regularizer).__name__,
                    "ratio_of_medians": f"{np.median(learner) / np.median(plain):.3f}",
                    "ratio_quartiles": f"{low:.3f} {middle:.3f} {high:.3f}",
                    "plain_ms": f"{np.median(plain) * 1e3:.1f}",
                    "penalty_ms": f"{np.median(learner) * 1e3:.1f}",
                    "n": arguments.rounds,
                    "batch": arguments.batch_size,
                    "trace_s": f"{trace_s:.3f}",
                    "close_s": f"{close_s:.4f}",
                    "rebuild_s": f"{rebuild_s:.2f}",
                    "clone_model_s": f"{clone_s:.2f}",
                    **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")},
                    "command": f"python benchmarks/step_time.py --networks {arguments.networks} "
                    f"--rounds {arguments.rounds} --steps {arguments.steps} --batch-size {arguments.batch_size}",
                }
            )
            print(rows[-1])
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
