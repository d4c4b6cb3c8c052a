"""Whether compiling a training with XLA pays on this device: seconds to the first step, and seconds per step, in alternation.

    KERAS_BACKEND=tensorflow python benchmarks/jit_compile.py [--networks DigitsResNet,ResNet20,MobileNetV2] [--rounds 7]

A StructureLearner with GroupLasso at 32x32. One row of benchmarks/results/jit_compile.csv per network.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np
from rows import append

import keras_morph as km
from keras_morph.runs import describe_environment

RESULTS = Path(__file__).parent / "results" / "jit_compile.csv"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="DigitsResNet,ResNet20,MobileNetV2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    environment = describe_environment()
    for name in options.networks.split(","):
        random = np.random.default_rng(0)
        x = random.random((options.batch_size, 32, 32, 3), np.float32)
        y = random.integers(0, 10, options.batch_size)
        learners, first, seconds = {}, {}, {True: [], False: []}
        for jit in (False, True):
            seed = km.zoo.build(name, input_shape=(32, 32, 3))
            learners[jit] = km.StructureLearner(seed, regularizer=km.GroupLasso(), strength=1e-9)
            learners[jit].compile("adam", "sparse_categorical_crossentropy", jit_compile=jit)
            first[jit] = timed(learners[jit], x, y)
        for _ in range(options.rounds):
            for jit, learner in learners.items():
                seconds[jit].append(timed(learner, x, y))
        without, with_xla = (np.array(seconds[jit]) * 1e3 for jit in (False, True))
        low, high = np.quantile(with_xla / without, [0.25, 0.75])
        row = {
            "date": f"{datetime.date.today()}",
            "network": name,
            "batch": options.batch_size,
            "n": options.rounds,
            "compile_s": f"{first[False]:.1f}",
            "compile_xla_s": f"{first[True]:.1f}",
            "step_ms": f"{np.median(without):.1f}",
            "step_xla_ms": f"{np.median(with_xla):.1f}",
            "ratio": f"{np.median(with_xla) / np.median(without):.2f}",
            "ratio_quartiles": f"{low:.2f} {high:.2f}",
            **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")},
            "command": f"python benchmarks/jit_compile.py --networks {options.networks} --rounds {options.rounds}",
        }
        append(RESULTS, row)
        print(row)


def timed(model, x, y):
    start = time.perf_counter()
    model.train_on_batch(x, y)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
