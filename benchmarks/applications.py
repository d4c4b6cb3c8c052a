"""Every network of keras.applications: is what we rebuild exact, and how long do tracing, choosing and rebuilding take?

    python benchmarks/applications.py [--resume] [ResNet50 NASNetLarge ...]

For each network, at the smallest images that it takes, with random weights (`prepare` of tests/architectures.py): four
structures are rebuilt, of which one is the network as it is, compared with the network itself; the others lose half of
their channels, nine of ten, or a third of their layers and nine channels of ten in the others, and are compared with the
masked seed: as they are, and where they differ by more than 1e-5, with all weights and numbers in float64 too, where only
what is wrong differs. Every rebuilt network is saved, and opened by a process that never imports keras_morph. Appends a
row per network to benchmarks/results/applications.csv, and writes docs/applications.md.
"""

import argparse
import datetime
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_morph as km
from keras_morph.runs import describe_environment, save_model, write_text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures
import models
import structures
from rows import append, rows_at

RESULTS, TABLE = ROOT / "benchmarks" / "results" / "applications.csv", ROOT / "docs" / "applications.md"
LAW, TOLERANCE = 1e-5, 1e-4  # of the largest output; what is off by more than the first is tried in float64 too
TOLERANCE_64 = 1e-9  # in float64: there rounding is some 1e-9 of what it is in float32
VARIES = 1e-2  # what hardly depends on its input is rebuilt exactly by anything
SEEDS = (1, 2, 3)
BUDGET = "70%"
TRACES, CUTS = 7, 3
KINDS = ("half", "tenth", "dead_layers")

LOADER = """
import sys
import keras, numpy as np
for line in sys.stdin:
    path = line.strip()
    model = keras.models.load_model(path + ".keras")
    outputs = model(np.load(path + ".inputs.npy"), training=False)
    np.save(path + ".outputs.npy", keras.ops.convert_to_numpy(outputs))
    keras.backend.clear_session()
    assert "keras_morph" not in sys.modules
    print("predicted", flush=True)
"""


class Elsewhere:
    """A process that opens models and predicts, and has never heard of keras_morph."""

    def __init__(self, folder):
        self.path = str(Path(folder) / "small")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def predict(self, model, inputs):
        save_model(model, Path(f"{self.path}.keras"))
        np.save(f"{self.path}.inputs.npy", inputs)
        print(self.path, file=self.process.stdin, flush=True)
        if self.process.stdout.readline() != "predicted\n":
            raise RuntimeError("the process that loads models has stopped")
        return np.load(f"{self.path}.outputs.npy")


def difference(received, expected):
    """The largest difference, relative to the largest output."""
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def conformance(model, elsewhere):
    """Laws 1 and 2, and what another process makes of the saved file, at the worst of all structures."""
    inputs = architectures.images(model)
    differences, doubles, variations, reloaded, gone, agree = [], [], [], [], [], True
    for kind in (structures.whole, *KINDS):
        draw = kind if callable(kind) else lambda graph, _, kind=kind: structures.draw(graph, kind, 1)
        for seed in SEEDS:  # until there are weights with which the outputs depend on the input
            graph, structure = architectures.prepare(model, draw, inputs, seed)
            reference = model if kind is structures.whole else km.masked(model, structure)
            expected = models.outputs(reference, inputs)[0]
            if np.ptp(expected, axis=0).max() > VARIES * np.abs(expected).max():
                break
        small = km.rebuild(model, structure)
        received = models.outputs(small, inputs)[0]
        differences.append(difference(received, expected))
        doubles.append(difference_in_float64(model, structure, inputs) if differences[-1] > LAW else 0.0)
        variations.append(np.ptp(expected, axis=0).max() / np.abs(expected).max())
        reloaded.append(difference(elsewhere.predict(small, inputs), received))
        gone.append(sum(width == 0 for width in structure.widths.values()))
        agree &= km.ModelSize()(graph, structure) == small.count_params()
        agree &= km.FLOPs()(graph, structure) == km.FLOPs()(small)
    # np.max and np.min hand NaN on.
    holds = np.max(doubles) <= TOLERANCE_64 and np.max(reloaded) <= TOLERANCE and np.min(variations) > VARIES and agree
    return {
        "result": "exact" if holds else "FAILS",
        "structures": len(KINDS) + 1,
        "exact_to": f"{np.max(differences):.1e}",
        "exact_in_float64_to": f"{np.max(doubles):.1e}" if np.max(differences) > LAW else "",
        "variation": f"{np.min(variations):.1e}",
        "costs_agree": agree,
        "reloaded_to": f"{np.max(reloaded):.1e}",
        "layers_gone": max(gone),
    }


def difference_in_float64(model, structure, inputs):
    """The difference between the rebuilt network and the masked seed where all weights and numbers are float64."""

    def doubled(config):
        if isinstance(config, dict):
            return {key: doubled(value) for key, value in config.items()}
        if isinstance(config, (list, tuple)):
            return type(config)(doubled(value) for value in config)
        return "float64" if config == "float32" else config

    keras.config.set_floatx("float64")
    try:
        copy = keras.Model.from_config(doubled(model.get_config()))
        copy.set_weights([weight.astype("float64") for weight in model.get_weights()])
        both = km.rebuild(copy, structure), km.masked(copy, structure)
        return difference(*(models.outputs(each, inputs.astype("float64"))[0] for each in both))
    finally:
        keras.config.set_floatx("float32")


def seconds(function, count):
    """Seconds of some calls, of this process's own computing and on the clock, `(count,)` each.

    The first say what a call costs, whatever else the machine does; on an idle machine a call takes at most that long.
    """
    times = []
    for _ in range(count):
        wall, own = time.perf_counter(), time.process_time()
        function()
        times.append((time.process_time() - own, time.perf_counter() - wall))
    return np.array(times).T


def speed(model):
    """Seconds to trace, to choose the channels for 70 % of the FLOPs, and to rebuild them with their weights."""
    graph = km.trace(model)
    structure = km.fit_budget(graph, BUDGET)
    found = {}
    for name, function, count in (
        ("trace", lambda: km.trace(model), TRACES),
        ("choose", lambda: km.fit_budget(graph, BUDGET), CUTS),
        ("rebuild", lambda: km.rebuild(model, structure), CUTS),
    ):
        own, wall = seconds(function, count)
        found[f"{name}_s"] = f"{np.median(own):.3f}"
        found[f"{name}_s_min_max"] = f"{own.min():.3f} {own.max():.3f}"
        found[f"{name}_wall_s"] = f"{np.median(wall):.3f}"
        found[f"n_{name}"] = count
    return found


FIELDS = (
    *("date", "network", "image_size", "calls", "channels", "groups", "pinned_share"),
    *(
        "result",
        "structures",
        "exact_to",
        "exact_in_float64_to",
        "variation",
        "costs_agree",
        "reloaded_to",
        "layers_gone",
    ),
    *(f"{what}{of}" for what in ("trace", "choose", "rebuild") for of in ("_s", "_s_min_max", "_wall_s")),
    *("n_trace", "n_choose", "n_rebuild", "build_s"),
    *("backend", "backend_version", "keras", "cpu", "cores", "command"),
)


def rows():
    """The last row of each network."""
    return {row["network"]: row for row in rows_at(RESULTS)}


def measure(name, elsewhere, environment):
    keras.backend.clear_session()
    gc.collect()
    start = time.perf_counter()
    model = architectures.build(name)
    built = time.perf_counter() - start
    graph = km.trace(model)
    return {
        "date": f"{datetime.date.today()}",
        "network": name,
        "image_size": model.input_shape[1],
        "calls": len(graph.calls),
        "channels": graph.num_channels,
        "groups": graph.num_groups,
        "pinned_share": f"{graph.pinned_mask[graph.group_of].mean():.4f}",
        **speed(model),
        "build_s": f"{built:.2f}",
        **conformance(model, elsewhere),
        **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")},
        "command": f"python benchmarks/applications.py {name}",
    }


def table(found):
    """docs/applications.md."""
    versions = sorted({f"Keras {row['keras']} on {row['backend']} {row['backend_version']}" for row in found.values()})
    devices = sorted({f"{row['cores']} cores of {row['cpu']}" for row in found.values()})
    exact = [row for row in found.values() if row["result"] != "FAILS"]
    rates = [1e6 * float(row["trace_s"]) / int(row["calls"]) for row in found.values()]
    lines = [
        "# All networks of `keras.applications`",
        "",
        "Written by `python benchmarks/applications.py`, not by hand. Each network is built with random weights at the smallest",
        "images that it takes, and rebuilt at four structures: as it is, half of its channels, a tenth of them, and with a third",
        "of its layers dead and a tenth of the channels of the others. *Exact to* is the worst difference between the rebuilt",
        "network and the masked seed (at the first structure, the network itself), relative to the largest output. In float32",
        "sums over fewer channels are rounded otherwise, and deep networks amplify that: where it is above",
        f"{LAW}, both were compared with weights and numbers in float64 too, where it has to be below {TOLERANCE_64}. FLOPs and",
        "parameters of every rebuilt network are those foretold, and its `.keras` file predicts the same in a process that",
        f"never imports keras_morph. That holds for {len(exact)} of {len(found)} networks.",
        "",
        f"*Trace* is the median of {TRACES} runs, *choose* (which channels stay within 70 % of the FLOPs, by GroupLasso's",
        f"scores) and *rebuild* (the smaller network, with weights) of {CUTS}, in seconds of computing by the process itself,",
        f"so that other programs do not count, on {'; '.join(devices)}, with",
        f"{', '.join(versions)}. Tracing takes {min(rates):.0f} to {max(rates):.0f} microseconds per call of a layer, median "
        f"{np.median(rates):.0f}: it",
        f"grows linearly. Smallest and largest times, and those on the clock, are in `benchmarks/results/{RESULTS.name}`.",
        "",
        "| network | images | layers | channels | groups | pinned | exact to | in float64 | trace | choose | rebuild |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in architectures.NAMES:
        if name not in found:
            continue
        row = found[name]
        exactness = row["exact_to"]
        if row["result"] != "exact":
            exactness = f"**{exactness}: {row['result']}**"
        lines.append(
            f"| {name} | {row['image_size']} | {row['calls']} | {int(row['channels']):,} | {int(row['groups']):,} | "
            f"{float(row['pinned_share']):.1%} | {exactness} | {row['exact_in_float64_to']} | "
            f"{float(row['trace_s']):.2f} | {float(row['choose_s']):.2f} | {float(row['rebuild_s']):.1f} |"
        )
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=architectures.NAMES)
    parser.add_argument("--resume", action="store_true", help="leave out networks that have a row")
    arguments = parser.parse_args()
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Elsewhere(folder)
        for name in arguments.networks:
            if arguments.resume and name in rows():
                continue
            row = measure(name, elsewhere, environment)
            append(RESULTS, row)
            print(*(f"{key}={row[key]}" for key in FIELDS[1:24]), flush=True)
            write_text(TABLE, table(rows()))
        elsewhere.process.communicate()


if __name__ == "__main__":
    main()
