"""KerasHub's image classifiers: what can be narrowed in them, and is what we rebuild exact?

    python benchmarks/kerashub.py

Needs `pip install keras-morph[hub]`. Each network of tests/hub_networks.py, tiny and with weights by `prepare` of
tests/architectures.py, is rebuilt at four structures: as it is, half of its channels, a tenth of them, and with a third of its
layers dead and a tenth of the channels of the others; each is compared with the masked seed, saved and loaded. Writes
benchmarks/results/keras_hub.csv and docs/keras-hub.md.
"""

import csv
import datetime
import io
import sys
import tempfile
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_morph as km
from keras_morph.runs import describe_environment, save_model, write_text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures
import hub_networks
import models
import structures

RESULTS, TABLE = ROOT / "benchmarks" / "results" / "keras_hub.csv", ROOT / "docs" / "keras-hub.md"
KINDS = ("half", "tenth", "dead_layers")
TOLERANCE = 1e-4  # of the largest output


def difference(received, expected):
    """The largest difference, relative to the largest output."""
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def drawn(kind):
    return lambda graph, _: structures.draw(graph, kind, seed=1)


def reloaded(model):
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "small.keras")
        return keras.models.load_model(Path(folder) / "small.keras")


def at_half(model):
    """The share of the seed's FLOPs that a budget of half of them leaves, or nothing where it cannot be reached."""
    cost = km.FLOPs()
    try:
        small = km.prune(model, "50%", cost=cost)
    except km.BudgetError:
        return ""
    return f"{cost(small) / cost(model):.4f}"


def measure(name):
    keras.backend.clear_session()
    model = hub_networks.build(name)
    inputs = models.examples(model, count=16)
    rebuilt, loaded, variations = [], [], []
    for draw in (structures.whole, *map(drawn, KINDS)):
        graph, structure = architectures.prepare(model, draw, inputs)
        small = km.rebuild(model, structure)
        (expected,), (received,) = (models.outputs(each, inputs) for each in (km.masked(model, structure), small))
        rebuilt.append(difference(received, expected))
        loaded.append(difference(models.outputs(reloaded(small), inputs)[0], received))
        variations.append(np.ptp(expected, axis=0).max() / np.abs(expected).max())
    unknown = {
        type(layer.operation).__name__ for layer in graph.layers if layer.rule is None and layer.kind != "InputLayer"
    }
    return {
        "network": name,
        "calls": len(graph.calls),
        "channels": graph.num_channels,
        "groups": graph.num_groups,
        "pinned_share": f"{graph.pinned_mask[graph.group_of].mean():.4f}",
        "parameters": model.count_params(),
        "unknown_layers": " ".join(sorted(unknown)),
        "result": "exact" if np.max([*rebuilt, *loaded]) <= TOLERANCE and np.min(variations) > 1e-2 else "FAILS",
        "exact_to": f"{np.max(rebuilt):.1e}",
        "reloaded_to": f"{np.max(loaded):.1e}",
        "variation": f"{np.min(variations):.1e}",
        "flops_at_half": at_half(model),
    }


def table(rows, environment):
    """docs/keras-hub.md."""
    exact = [row for row in rows if row["result"] == "exact"]
    lines = [
        "# KerasHub's image classifiers",
        "",
        "Written by `python benchmarks/kerashub.py`, not by hand. Classifiers around KerasHub's backbones, at tiny sizes",
        "and with random weights, are rebuilt at four structures. *Exact to* is the worst difference from the masked seed,",
        "relative to the largest output. *FLOPs at half* is what a budget of 50 % leaves; it is empty where the layers that make",
        "the FLOPs are KerasHub's own: they are unknown to us, keep their channels, and count no FLOPs. Every rebuilt",
        f"network is saved, loaded and predicts the same. That holds for {len(exact)} of {len(rows)} networks, with KerasHub",
        f"{keras_hub.__version__} and Keras {environment['keras']} on {environment['backend']} "
        f"{environment['backend_version']}.",
        "",
        "| network | layers | channels | groups | pinned | exact to | FLOPs at half | layers that we do not know |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        exactness = row["exact_to"] if row["result"] == "exact" else f"**{row['exact_to']}: {row['result']}**"
        half = f"{float(row['flops_at_half']):.1%}" if row["flops_at_half"] else ""
        lines.append(
            f"| {row['network']} | {row['calls']} | {row['channels']:,} | {row['groups']:,} | "
            f"{float(row['pinned_share']):.1%} | {exactness} | {half} | {row['unknown_layers'].replace(' ', ', ')} |"
        )
    return "\n".join([*lines, ""])


def main():
    environment = describe_environment()
    versions = {key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")}
    rows = []
    for name in hub_networks.BACKBONES:
        rows.append(measure(name))
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    text = io.StringIO()
    stamp = {"date": f"{datetime.date.today()}", "keras_hub": keras_hub.__version__, **versions}
    writer = csv.DictWriter(text, [*rows[0], *stamp], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **stamp} for row in rows)
    write_text(RESULTS, text.getvalue())
    write_text(TABLE, table(rows, environment))


if __name__ == "__main__":
    main()
