"""How well MeasuredLatency foretells what was not timed, and whether budgets in it are kept, as measured.

    KERAS_BACKEND=tensorflow python benchmarks/latency.py --network ResNet20 --runtime onnxruntime [--folder FOLDER]

Fits the cost to 32 structures, and compares what it says of random others that were timed in turn with them. Then structures
of random scores are cut to 60 % of the latency as `prune` does it, which measures each; later the seed and all of them are
timed in turn.
Files are kept in --folder, so that a run that was
ended goes on. Appends a row to benchmarks/results/latency.csv, and writes the table of docs/latency.md.
"""

import argparse
import datetime
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from rows import append, rows_at, write_section

import keras_morph as km
from keras_morph.exporting import write_unchecked
from keras_morph.formats import FORMATS
from keras_morph.graph.closure import close
from keras_morph.graph.structure import Structure
from keras_morph.measuring import fit_timings, random_structures, telling_structures
from keras_morph.runs import describe_environment
from keras_morph.search.keeping import fit_measured
from keras_morph.timing import Timings, time_files_apart

RESULTS = ROOT / "benchmarks" / "results" / "latency.csv"
TABLE = ROOT / "docs" / "latency.md"
SHARE = 0.6
KEPT = 1.02  # of the budget: what two timings of one file differ by


def vit():
    """A small vision transformer at 64 px: 8 x 8 patches, 4 blocks of width 96 with 4 heads."""
    image = keras.Input((64, 64, 3))
    x = layers.Reshape((64, 96))(layers.Conv2D(96, 8, strides=8, name="patches")(image))
    for number in range(4):
        y = layers.LayerNormalization(name=f"norm{number}a")(x)
        x = layers.Add(name=f"add{number}a")([x, layers.MultiHeadAttention(4, 24, name=f"attention{number}")(y, y)])
        y = layers.LayerNormalization(name=f"norm{number}b")(x)
        y = ops.gelu(layers.Dense(384, name=f"wide{number}")(y))
        x = layers.Add(name=f"add{number}b")([x, layers.Dense(96, name=f"narrow{number}")(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(name="norm")(x))
    return keras.Model(image, layers.Dense(10, activation="softmax", name="head")(x), name="ViT")


def with_random_weights(model):
    """A model as if it were trained: where weights are zero, as biases are at first, constants that a cut leaves are too."""
    random = np.random.default_rng(3)
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        noise = random.normal(0, 0.02, value.shape).astype(value.dtype)
        weight.assign(value + (np.abs(noise) if "variance" in weight.name else noise))
    return model


NETWORKS = {
    "ResNet20": lambda: km.zoo.build("ResNet20", input_shape=(32, 32, 3), classes=10),
    "MobileNetV2": lambda: km.zoo.build("MobileNetV2", input_shape=(96, 96, 3), classes=10),
    "ViT": vit,
}


def written(graph, structures, folder, form):
    """Files of structures, those that are there already left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}{FORMATS[form].suffix}" for number in range(len(structures))]
    for number, (path, structure) in enumerate(zip(paths, structures, strict=True)):
        if not path.with_suffix(".json").exists():
            write_unchecked([km.rebuild(graph, structure)], [path], form)
            structure.save(path.with_suffix(".json"))
            print(f"{folder.name} {number + 1}/{len(paths)}", flush=True)
    return paths


def timed(paths, options, seconds, timings):
    if not timings.exists():
        time_files_apart(paths, threads=options.threads, seconds=seconds).save(timings)
    return Timings.parsed(timings.read_text())


def budgeted(graph, cost, number, folder):
    """Structures of random scores, cut to a share of the latency; how often each was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    found, tries = [], []
    for place in range(number):
        offsets = np.zeros(graph.num_groups)
        for vector in graph.vectors:
            offsets[np.unique(graph.group_of[vector])] = random.normal(0, 0.5)
        scores = np.exp(offsets) * random.uniform(0.5, 1.5, graph.num_groups)
        path, lines = folder / f"{place:03}.json", folder / f"{place:03}.txt"
        if not path.exists():
            said = []
            structure = fit_measured(graph, f"{SHARE:.0%}", scores=scores, cost=cost, say=said.append)
            lines.write_text("\n".join(said))
            structure.save(path)
            print(f"budget {place + 1}/{number}: {' | '.join(said)}", flush=True)
        found.append(Structure.load(path))
        tries.append(len(lines.read_text().splitlines()))
    return found, tries


def write_table():
    """The last row of each network and runtime, in docs/latency.md."""
    last = {(row["network"], row["conditions"]): row for row in rows_at(RESULTS)}
    columns = ("network", "conditions", "timed to fit", "not timed before", "median error", "within 10 %", "largest")
    columns += ("budgets kept", "measured, times", "load")
    lines = [
        f"Written by `python benchmarks/latency.py`. Budgets kept: of structures that `prune` cut to {SHARE:.0%} of the latency,",
        f"those within {SHARE:.0%} of the seed's when all are measured anew; in brackets, within {KEPT * SHARE:.1%}, since two",
        "measurements of one file differ. Measured, times: how often `prune` measured until a budget was kept, on average. Load:",
        "of 2 cores, that others used at the same time, at the beginning and at the end.",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|---|{'---:|' * 7}---|",
    ]
    for row in last.values():
        shares = [f"{float(row[name]):.1%}" for name in ("median_error", "within_10_percent", "largest_error")]
        cells = (
            row["network"],
            row["conditions"],
            row["fitted"],
            row["tested"],
            *shares,
            f"{row['kept']} of {row['budgets']} ({row['nearly_kept']})",
            row["tries"],
            row["load"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    write_section(TABLE, "latency.py", "\n".join([*lines, ""]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=NETWORKS, default="ResNet20")
    parser.add_argument("--runtime", choices=("onnxruntime", "litert", "openvino"), default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fit", type=int, default=32)
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    form = next(name for name, row in FORMATS.items() if row.runtime == options.runtime)
    graph = km.trace(with_random_weights(NETWORKS[options.network]()))

    start, load = time.perf_counter(), os.getloadavg()[0]
    drawn = telling_structures(graph, options.fit)
    paths = written(graph, drawn, folder / "fit", form)
    seconds = time.perf_counter() - start
    tests = random_structures(graph, options.test, random_seed=1)
    paths += written(graph, tests, folder / "test", form)
    timings = timed(paths, options, 180, folder / "timings.json")
    cost = fit_timings(graph, folder / "fit", replace(timings, seconds=timings.seconds[: len(drawn)]))
    measured = timings.least[len(drawn) :]
    table = cost.table(graph)
    closed = [close(graph, structure.copies(graph)) for structure in tests]
    foretold = np.array([float((table.costs(each.counts) * each.present).sum()) for each in closed])
    errors = np.abs(foretold / measured - 1)

    everything = Structure.closed(graph, np.ones(graph.num_groups, bool), np.ones(graph.num_groups))
    found, tries = budgeted(graph, cost, options.budgets, folder / "chosen")
    cuts = [everything, *found]
    least = timed(written(graph, cuts, folder / "budget", form), options, 60, folder / "budgets.json").least
    shares = least[1:] / least[0]

    row = {
        "date": datetime.date.today().isoformat(),
        "network": options.network,
        "conditions": str(cost.conditions),
        "fitted": len(drawn),
        "export_seconds": round(seconds),
        "block": cost.coefficients.block,
        "multiple": cost.coefficients.multiple,
        "tested": len(tests),
        "median_error": round(float(np.median(errors)), 4),
        "within_10_percent": round(float(np.mean(errors <= 0.1)), 4),
        "largest_error": round(float(errors.max()), 4),
        "budgets": options.budgets,
        "kept": int((shares <= SHARE).sum()),
        "nearly_kept": int((shares <= SHARE * KEPT).sum()),
        "tries": round(float(np.mean(tries)), 2),
        "share_min": round(float(shares.min()), 4),
        "share_median": round(float(np.median(shares)), 4),
        "share_max": round(float(shares.max()), 4),
        "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
        "keras": keras.__version__,
        "cpu": describe_environment()["cpu"],
        "command": "python benchmarks/latency.py "
        + shlex.join(a for a in sys.argv[1:] if "/" not in a and a != "--folder"),
    }
    print(row)
    append(RESULTS, row)
    write_table()


if __name__ == "__main__":
    main()
