"""How much faster networks are that were cut to a share of their FLOPs, in the runtimes that serve them.

    KERAS_BACKEND=tensorflow python benchmarks/speed.py MobileNetV2 ResNet50 [--size 224] [--shares 75 50 25] [--threads 1 2]
        [--runtimes onnxruntime litert openvino] [--round-to auto] [--folder FOLDER]

Each network gets random weights and is cut by GroupLasso's scores; seed and small ones are exported and timed in turn, in
several processes. A row holds the ratio of the shortest times, and the quartiles of the ratios of the samples. Files are
kept in --folder, so that a run that was ended goes on. Appends rows to benchmarks/results/speed.csv.
"""

import argparse
import datetime
import shlex
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from rows import append

import keras_morph as km
from keras_morph.exporting import write_unchecked
from keras_morph.formats import FORMATS
from keras_morph.timing import time_files_apart

RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--shares", type=int, nargs="+", default=[75, 50, 25])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "litert", "openvino"])
    parser.add_argument("--round-to", default="auto", type=lambda text: int(text) if text.isdecimal() else text)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    forms = {row.runtime: name for name, row in FORMATS.items()}
    for name in options.networks:
        keras.utils.set_random_seed(0)
        seed = km.zoo.build(name, input_shape=(options.size, options.size, 3), classes=1000)
        graph = km.trace(seed)
        flops = {100: 1.0}
        for share in [100, *options.shares]:
            stem = folder / f"{name}-{options.size}-{options.round_to}-{share}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            small = seed
            if share < 100:
                small = km.prune(graph, km.Budget(f"{share}%", round_to=options.round_to))
                flops[share] = km.FLOPs()(small) / km.FLOPs()(seed)
            for runtime in options.runtimes:
                path = stem.with_name(stem.name + FORMATS[forms[runtime]].suffix)
                if not path.exists():
                    write_unchecked([small], [path], forms[runtime])
                    print(path.name, flush=True)
        for runtime in options.runtimes:
            suffix = FORMATS[forms[runtime]].suffix
            paths = [
                folder / f"{name}-{options.size}-{options.round_to}-{share}{suffix}" for share in [100, *options.shares]
            ]
            for threads in options.threads:
                timings = time_files_apart(paths, threads=threads, seconds=options.seconds)
                samples = np.array(timings.seconds)
                for place, share in enumerate(options.shares, 1):
                    quartiles = np.quantile(samples[0] / samples[place], [0.25, 0.5, 0.75])
                    row = {
                        "date": datetime.date.today().isoformat(),
                        "network": name,
                        "size": options.size,
                        "share": share,
                        "flops": round(flops[share], 4),
                        "round_to": options.round_to,
                        "runtime": f"{timings.conditions.runtime} {timings.conditions.version}",
                        "threads": threads,
                        "seed_ms": round(1e3 * timings.least[0], 3),
                        "small_ms": round(1e3 * timings.least[place], 3),
                        "speedup": round(timings.least[0] / timings.least[place], 3),
                        "quartile_1": round(quartiles[0], 3),
                        "median": round(quartiles[1], 3),
                        "quartile_3": round(quartiles[2], 3),
                        "samples": samples.shape[1],
                        "keras": keras.__version__,
                        "cpu": timings.conditions.device,
                        "command": "python benchmarks/speed.py "
                        + shlex.join(a for a in sys.argv[1:] if "/" not in a and a != "--folder"),
                    }
                    print(row["network"], row["runtime"], threads, share, row["speedup"], row["median"], flush=True)
                    append(RESULTS, row)


if __name__ == "__main__":
    main()
