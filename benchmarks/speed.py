"""How much faster networks are that were cut to a share of their FLOPs, in the runtimes that serve them.

    KERAS_BACKEND=tensorflow python benchmarks/speed.py ResNet50 MobileNetV2 VGG16 EfficientNetB0 --folder FOLDER
        [--size 224] [--shares 75 50 25] [--threads 1 2] [--runtimes onnxruntime litert openvino] [--round-to auto]

Each network gets random weights and is cut by GroupLasso's scores; seed and small ones are exported and timed in turn, in
several processes. A row holds the ratio of the shortest times, and the quartiles of the ratios of the samples. Files are
kept in --folder, and rows that are there are not measured again, so that a run that was ended goes on. Appends rows to
benchmarks/results/speed.csv, and writes the table of docs/latency.md.
"""

import argparse
import datetime
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from rows import append, rows_at, write_section

import keras_morph as km
from keras_morph.exporting import write_unchecked
from keras_morph.formats import FORMATS
from keras_morph.timing import time_files_apart

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "speed.csv", ROOT / "docs" / "latency.md"


def written(name, options, folder):
    """Paths of the files, runtime -> one for the seed and one for each share; and the share of the FLOPs that each has."""
    forms = {row.runtime: name for name, row in FORMATS.items()}
    paths = {
        runtime: [
            folder / f"{name}-{options.size}-{options.round_to}-{share}{FORMATS[forms[runtime]].suffix}"
            for share in (100, *options.shares)
        ]
        for runtime in options.runtimes
    }
    keras.utils.set_random_seed(0)
    seed = km.zoo.build(name, input_shape=(options.size, options.size, 3), classes=1000)
    models = [seed, *(km.prune(seed, km.Budget(f"{share}%", round_to=options.round_to)) for share in options.shares)]
    for runtime in options.runtimes:
        for model, path in zip(models, paths[runtime], strict=True):
            if not path.exists():
                start = time.perf_counter()
                write_unchecked([model], [path], forms[runtime])
                print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return paths, [km.FLOPs()(model) / km.FLOPs()(seed) for model in models]


def key_of(row):
    return row["network"], row["size"], row["share"], row["round_to"], row["runtime"].split()[0], row["threads"]


def table():
    """Times as fast, a line for each network and share."""
    rows = {key_of(row): row for row in rows_at(RESULTS) if row["round_to"] == "auto" and row["size"] == "224"}
    kinds = sorted({(runtime, threads) for *_, runtime, threads in rows})
    heads = [f"{runtime}, {threads} thread{'s' * (threads != '1')}" for runtime, threads in kinds]
    lines = [
        f"| network | FLOPs | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(kinds)}",
    ]
    for network, size, share, round_to in dict.fromkeys(key[:4] for key in rows):
        found = [rows.get((network, size, share, round_to, *kind)) for kind in kinds]
        cells = ["" if row is None else f"{float(row['speedup']):.2f}" for row in found]
        lines.append(f"| {network} | {share}% | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        done = {key_of(row) for row in rows_at(RESULTS)}
        wanted = [
            (runtime, threads)
            for runtime in options.runtimes
            for threads in options.threads
            if any(
                (name, str(options.size), str(share), str(options.round_to), runtime, str(threads)) not in done
                for share in options.shares
            )
        ]
        if not wanted:
            continue
        paths, flops = written(name, options, folder)
        for runtime, threads in wanted:
            start, load = time.perf_counter(), os.getloadavg()[0]
            timings = time_files_apart(paths[runtime], threads=threads, seconds=options.seconds)
            samples = np.array(timings.seconds)
            for place, share in enumerate(options.shares, 1):
                quartiles = np.quantile(samples[0] / samples[place], [0.25, 0.5, 0.75])
                row = {
                    "date": datetime.date.today().isoformat(),
                    "network": name,
                    "size": options.size,
                    "share": share,
                    "flops": round(flops[place], 4),
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
                    "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
                    "keras": keras.__version__,
                    "cpu": timings.conditions.device,
                    "command": "python benchmarks/speed.py "
                    + shlex.join(a for a in sys.argv[1:] if "/" not in a and a != "--folder"),
                }
                print(name, row["runtime"], threads, share, row["speedup"], row["median"], flush=True)
                append(RESULTS, row)
            print(f"{name} in {runtime}, {threads} threads: {time.perf_counter() - start:.0f} s", flush=True)
        write_section(PAGE, "speed.py", table())


if __name__ == "__main__":
    main()
