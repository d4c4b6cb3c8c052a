"""Law 7 on networks of keras.applications: the same weights give the same scores, prices and structure on every backend.

    python benchmarks/backends_agree.py [--resume] [ResNet50 NASNetLarge ...]

For a network of each family, in the state in which law 1 is checked, and saved to one .keras file: a process per backend
loads it, scores it by GroupLasso, prices FLOPs, chooses the channels for half of them, and predicts with the network
rebuilt for the structure that the weights were made for. Appends a row per network and backend to
benchmarks/results/backends_agree.csv: the largest difference from the first backend, relative to the largest value, and
how much the outputs depend on the inputs. Writes docs/backends.md.
"""

import argparse
import csv
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_morph as km
from keras_morph.runs import describe_environment, save_model
from keras_morph.training.regularizers import group_scores

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures
import models
import structures

RESULTS, TABLE = ROOT / "benchmarks" / "results" / "backends_agree.csv", ROOT / "docs" / "backends.md"
INTRODUCTION = """\
# The same on every backend

Written by `python benchmarks/backends_agree.py`, not by hand. For a network of each family of `keras.applications`: one
`.keras` file, opened by a process per backend, which scores it by GroupLasso, prices FLOPs, chooses the channels for half
of them, and predicts with the network rebuilt for a structure that loses half of its channels. Differences are those from
TensorFlow, relative to the largest value. Keras does not build NASNetMobile on PyTorch.

| network | scores and prices | channels chosen otherwise | outputs on JAX | outputs on PyTorch |
|---|---|---|---|---|
"""
# Keras refuses to build NASNetMobile on PyTorch.
NETWORKS = ["NASNetLarge" if name == "NASNetMobile" else name for name in architectures.FAMILIES]
BACKENDS = ("tensorflow", "jax", "torch")
FIELDS = (
    *("date", "network", "backend", "scores_to", "prices_to", "other_channels", "outputs_to", "variation"),
    *("keras", "cpu", "command"),
)


def values(folder):
    """What has to be the same, into `BACKEND.npz`."""
    model = keras.models.load_model(folder / "seed.keras")
    graph, cost = km.trace(model), km.FLOPs()
    structure = km.fit_budget(graph, "50%")
    table, counts = cost.monomials(graph), graph.counts(structure.groups(graph))
    np.savez(
        folder / f"{keras.backend.backend()}.npz",
        scores=group_scores(graph, km.GroupLasso()),
        prices=np.concatenate(table.prices(counts, len(graph.calls) + len(graph.layers))),
        alive=structure.groups(graph),
        outputs=models.outputs(km.rebuild(model, folder / "structure.json"), np.load(folder / "inputs.npy"))[0],
    )


def difference(received, expected):
    return f"{np.abs(received - expected).max() / np.abs(expected).max():.1e}"


def compare(name, folder):
    """A row per backend."""
    model = architectures.build(name)
    inputs = architectures.images(model)
    _, structure = architectures.prepare(model, lambda graph, _: structures.draw(graph, "half", seed=1), inputs)
    structure.save(folder / "structure.json")
    save_model(model, folder / "seed.keras")
    np.save(folder / "inputs.npy", inputs)
    found = {}
    for backend in BACKENDS:
        command = [sys.executable, __file__, "--values", str(folder)]
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, check=True)
        with np.load(folder / f"{backend}.npz") as arrays:
            found[backend] = dict(arrays)
    first = found[BACKENDS[0]]
    for backend in BACKENDS[1:]:
        yield {
            "network": name,
            "backend": backend,
            **{f"{what}_to": difference(found[backend][what], first[what]) for what in ("scores", "prices", "outputs")},
            "variation": f"{np.ptp(first['outputs'], axis=0).max() / np.abs(first['outputs']).max():.1e}",
            "other_channels": int((found[backend]["alive"] != first["alive"]).sum()),
        }


def table(rows):
    """docs/backends.md."""
    by_network = {}
    for row in rows:
        by_network.setdefault(row["network"], {})[row["backend"]] = row
    lines = []
    for network, by_backend in sorted(by_network.items()):
        own = max(float(row[what]) for row in by_backend.values() for what in ("scores_to", "prices_to"))
        other = max(int(row["other_channels"]) for row in by_backend.values())
        outputs = " | ".join(by_backend[backend]["outputs_to"] for backend in BACKENDS[1:])
        lines.append(f"| {network} | {own:.1e} | {other} | {outputs} |\n")
    return INTRODUCTION + "".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--resume", action="store_true", help="leave out networks that have rows")
    parser.add_argument("--values", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.values:
        values(arguments.values)
        return
    environment = describe_environment()
    new = not RESULTS.exists()
    done = set() if new else {row["network"] for row in csv.DictReader(RESULTS.open(newline=""))}
    for name in arguments.networks:
        if arguments.resume and name in done:
            continue
        keras.backend.clear_session()
        with tempfile.TemporaryDirectory() as folder, RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            new = False
            for row in compare(name, Path(folder)):
                row |= {"date": f"{datetime.date.today()}", "keras": environment["keras"], "cpu": environment["cpu"]}
                writer.writerow({**row, "command": f"python benchmarks/backends_agree.py {name}"})
                print(row, flush=True)
        TABLE.write_text(table(csv.DictReader(RESULTS.open(newline=""))))


if __name__ == "__main__":
    main()
