"""At the same time, which network is more accurate: one cut to a budget of FLOPs, or one cut to a budget of measured latency?

    KERAS_BACKEND=tensorflow python benchmarks/latency_or_flops.py --data cifar10.zip --networks FOLDER [--runtime onnxruntime]

Takes the trained networks that benchmarks/recovery.py keeps. Each is cut to shares of its FLOPs and recovered from images
without labels; then to the latency that the result is foretold to have. Both are timed in the runtime, in turn. Appends a
row per pair to benchmarks/results/latency_or_flops.csv.
"""

import argparse
import datetime
import shlex
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from quality import Trial, accuracy
from rows import append

import keras_morph as km
from keras_morph.exporting import write_unchecked
from keras_morph.formats import FORMATS
from keras_morph.timing import time_files_apart

RESULTS = Path(__file__).parent / "results" / "latency_or_flops.csv"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--network", default="ResNet20")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--training-images", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=int, nargs="+", default=[70, 50, 35])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--cache", type=Path, default=None)
    options = parser.parse_args()
    options.batch_size, options.learning_rate, options.output = 128, 2e-3, RESULTS  # which Trial wants
    form = FORMATS[next(name for name, row in FORMATS.items() if row.runtime == options.runtime)]
    cost = None
    for random_seed in options.random_seeds:
        trial = Trial(options, random_seed)
        network = keras.models.load_model(options.networks / f"{options.network}-{random_seed}.keras", compile=False)
        cost = cost or km.MeasuredLatency(network, runtime=options.runtime, cache=options.cache, seconds=1200)
        images = trial.data.x_train[: options.images]
        pairs = []
        for share in options.shares:
            by_flops = km.prune(network, f"{share}%", calibration=images)
            pairs.append((by_flops, km.prune(network, km.Budget(cost(by_flops), cost), calibration=images)))
        models = [network, *(model for pair in pairs for model in pair)]
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}{form.suffix}" for number in range(len(models))]
            write_unchecked(models, paths, next(name for name, row in FORMATS.items() if row is form))
            least = time_files_apart(paths, seconds=60).least
        right = [accuracy(model, trial.data.x_test, trial.data.y_test) for model in models]
        for number, share in enumerate(options.shares):
            flops, latency = 1 + 2 * number, 2 + 2 * number
            row = {
                "date": datetime.date.today().isoformat(),
                "network": options.network,
                "image_size": options.image_size,
                "random_seed": random_seed,
                "runtime": str(cost.conditions),
                "share": share,
                "seed_accuracy": round(right[0], 4),
                "seed_us": round(1e6 * least[0], 1),
                "flops_accuracy": round(right[flops], 4),
                "flops_us": round(1e6 * least[flops], 1),
                "latency_accuracy": round(right[latency], 4),
                "latency_us": round(1e6 * least[latency], 1),
                "flops_share_of_latency": round(km.FLOPs()(models[latency]) / km.FLOPs()(network), 4),
                "keras": keras.__version__,
                "command": "python benchmarks/latency_or_flops.py "
                + shlex.join(a for a in sys.argv[1:] if "/" not in a and a not in ("--networks", "--data", "--cache")),
            }
            print(row, flush=True)
            append(RESULTS, row)
        print("mean accuracy by FLOPs, by latency", np.mean(right[1::2]), np.mean(right[2::2]), flush=True)


if __name__ == "__main__":
    main()
