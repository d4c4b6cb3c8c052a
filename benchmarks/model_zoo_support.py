"""Which network of the Model Zoo works with which regularizer and cost: builds, trains, exports and rebuilds them all.

    python benchmarks/model_zoo_support.py [--networks ResNet50,NASNetLarge]

For each network, at the smallest images that it takes: random weights, of which three channels of ten are weak; then for
each combination one training step under the penalty, the structure's counts as the Model Zoo writes them, and the
rebuilt model, whose outputs before the softmax are compared with the masked seed's. Appends a row per combination to
benchmarks/results/model_zoo_support.csv, leaves out those that are there, and writes docs/support.md and the README's
short form of it.
"""

import argparse
import csv
import datetime
import itertools
import json
import time
from pathlib import Path

import keras
import numpy as np

import keras_morph as km
from keras_morph.runs import describe_environment, write_text
from keras_morph.zoo.morphnet_model import regularizer_of

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "model_zoo_support.csv", ROOT / "docs" / "support.md"
README, BEGIN, END = ROOT / "README.md", "<!-- model_zoo_support.py -->\n", "<!-- end -->\n"
MARKS = {"works": "✓", "no gamma": "no gamma"}
COSTS = {
    "FLOPs": km.FLOPs(),
    "Latency V100": km.Latency("V100"),
    "Latency P100": km.Latency("P100"),
    "Latency Others": km.Latency(km.Hardware("Others", 1e12, 1e11)),
    "ModelSize": km.ModelSize(),
}
ALGORITHMS = ("GroupLasso", "Gamma")
TOLERANCE = 1e-4  # of the largest output


def randomize(model, x):
    """Weights under which nothing is trivial: three channels of ten of each layer are weak, and no offset is 0.

    BatchNormalization gets the statistics of x: else a deep network's outputs would not depend on its inputs.
    """
    random = np.random.default_rng(0)
    normalizations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for weight in model.weights:
        weak = np.where(random.random(weight.shape[-1:]) < 0.3, 1e-2, 1.0)
        if weight.name in ("kernel", "pointwise_kernel"):
            weight.assign(1.7 * keras.ops.convert_to_numpy(weight) * weak)  # VGG has nothing that keeps the scale
        elif weight.name == "gamma":
            weight.assign(random.uniform(0.5, 1.5, weight.shape) * np.where(weak < 1, 1e-3, 1.0))
        elif weight.name in ("beta", "bias"):
            weight.assign(random.normal(size=weight.shape) * 0.1)
    momenta = [layer.momentum for layer in normalizations]
    for layer in normalizations:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in zip(normalizations, momenta, strict=True):
        layer.momentum = momentum


def prepared(name):
    """A network in that state, and a batch for it."""
    size = km.zoo.minimum_size(name)
    seed = km.zoo.build(name, input_shape=(size, size, 3))
    random = np.random.default_rng(1)
    x, y = random.random((8, size, size, 3), np.float32), random.integers(0, 10, 8)
    randomize(seed, x)
    return seed, x, y


def logits(model, x):
    """Outputs before the softmax."""
    last = model.get_layer("logits")
    before, last.activation = last.activation, keras.activations.linear
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    last.activation = before
    return outputs


def check(seed, algorithm, cost, x, y):
    """One training step, export, rebuild; what is worth telling, or the reason why it cannot be."""
    try:
        learner = km.StructureLearner(seed, regularizer=regularizer_of(algorithm, 1e-2), cost=cost)
    except km.UnsupportedModelError as error:
        return {"result": "no gamma", "note": str(error)}
    graph = learner.graph
    learner.strength = 1 / cost(graph)
    learner.compile(keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy", run_eagerly=True)
    logs = learner.train_on_batch(x, y, return_dict=True)
    structure = learner.structure()
    counts = json.loads(json.dumps(structure.counts()))
    widths = {key.rpartition("/")[0]: count for key, count in counts.items()}
    small = km.rebuild(learner, structure)
    expected, received = logits(km.masked(learner, structure), x), logits(small, x)
    largest, varying = np.abs(expected).max(), np.ptp(expected, axis=0).max()
    difference = float(np.abs(received - expected).max() / largest)
    # What does not depend on its input is rebuilt exactly by anything.
    exact = difference <= TOLERANCE and varying > 1e-3 * largest
    exported = counts and all(structure.widths[layer] == width for layer, width in widths.items())
    trained = np.isfinite([logs["loss"], logs["penalty"]]).all() and logs["penalty"] > 0
    priced = np.isclose(cost(small), cost(graph, structure), rtol=1e-9)
    return {
        "result": "works" if exact and exported and trained and priced else "FAILS",
        "note": "" if exact and exported and trained and priced else f"{exact=} {exported=} {trained=} {priced=}",
        "difference": f"{difference:.1e}",
        "variation": f"{varying / largest:.1e}",
        "cost_share": f"{cost(graph, structure) / cost(graph):.3f}",
        "dead_channels": f"{1 - sum(structure.widths.values()) / sum(structure.seed_widths.values()):.3f}",
    }


FIELDS = (
    *("date", "network", "image_size", "algorithm", "cost", "result", "difference", "variation", "cost_share"),
    *("dead_channels", "flops", "parameters", "seconds", "note"),
    *("backend", "backend_version", "keras", "cpu", "cores", "command"),
)


def rows():
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def append(row):
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def run(name, environment):
    done = {(row["algorithm"], row["cost"]) for row in rows() if row["network"] == name}
    missing = [pair for pair in itertools.product(ALGORITHMS, COSTS) if pair not in done]
    if not missing:
        return
    seed, x, y = prepared(name)
    weights = seed.get_weights()
    flops, parameters = km.FLOPs()(seed), seed.count_params()
    for algorithm, cost in missing:
        start = time.perf_counter()
        seed.set_weights(weights)
        found = check(seed, algorithm, COSTS[cost], x, y)
        row = {
            "date": f"{datetime.date.today()}",
            "network": name,
            "image_size": x.shape[1],
            "algorithm": algorithm,
            "cost": cost,
            "flops": f"{flops:.0f}",
            "parameters": parameters,
            "seconds": f"{time.perf_counter() - start:.1f}",
            "command": f"python benchmarks/model_zoo_support.py --networks {name}",
            **found,
            **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")},
        }
        append(row)
        print(name, algorithm, cost, found, flush=True)


def mark(row):
    return MARKS.get(row["result"], "✗") if row else "?"


def summary(found):
    """README's table: networks of equal results share a line, and costs of equal results a cell."""
    cells = {(row["network"], row["algorithm"], row["cost"]): row for row in found}
    lines = {}
    for name in km.zoo.NAMES:
        by_cost = [{cost: mark(cells.get((name, each, cost))) for cost in COSTS} for each in ALGORITHMS]
        texts = [
            next(iter(marks.values()))
            if len(set(marks.values())) == 1
            else ", ".join(f"{cost} {each}" for cost, each in marks.items())
            for marks in by_cost
        ]
        lines.setdefault(" | ".join(texts), []).append(name)
    return "\n".join(
        [
            f"| networks | {' | '.join(ALGORITHMS)} |",
            "|---|" + ":---:|" * len(ALGORITHMS),
            *(f"| {', '.join(names)} | {texts} |" for texts, names in lines.items()),
            "",
        ]
    )


def with_summary(readme, found):
    """README.md with the table as the results say it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + summary(found) + END + after


def table(found):
    """docs/support.md."""
    cells = {(row["network"], row["algorithm"], row["cost"]): row for row in found}
    versions = sorted({f"Keras {row['keras']} on {row['backend']} {row['backend_version']}" for row in found})
    dead = [float(row["dead_channels"]) for row in found if row["dead_channels"]]
    lines = [
        "# What works with what",
        "",
        "Written by `python benchmarks/model_zoo_support.py`, not by hand: each network of the Model Zoo, at the smallest",
        "images that it takes, is built, trained for one step under the penalty, its structure exported in the Model Zoo's",
        f"format ({min(dead):.0%} to {max(dead):.0%} of the channels are dead) and rebuilt. ✓: all of that works, and the",
        f"rebuilt model returns what the masked seed returns, to {TOLERANCE:g} of the largest output; the last column is the",
        "worst difference of the row.",
        "",
        f"Measured with {', '.join(versions)}; a row per combination is in `benchmarks/results/{RESULTS.name}`.",
        "",
        "| network | images | FLOPs | parameters | "
        + " | ".join(f"{algorithm}, {cost}" for algorithm in ALGORITHMS for cost in COSTS)
        + " | difference |",
        "|---|---:|---:|---:|" + ":---:|" * (len(ALGORITHMS) * len(COSTS)) + "---:|",
    ]
    for name in km.zoo.NAMES:
        mine = [cells.get((name, *pair)) for pair in itertools.product(ALGORITHMS, COSTS)]
        if not any(mine):
            continue
        first = next(row for row in mine if row)
        marks = [mark(row) for row in mine]
        worst = max((float(row["difference"]) for row in mine if row and row["difference"]), default=float("nan"))
        lines.append(
            f"| {name} | {first['image_size']} | {int(first['flops']):,} | {int(first['parameters']):,} | "
            f"{' | '.join(marks)} | {worst:.0e} |"
        )
    lines += [
        "",
        "`no gamma`: VGG has no BatchNormalization, and the BatchNormalization of InceptionV3 and InceptionResNetV2 says",
        "`scale=False`, so that Gamma has nothing to read. `keras-morph train` refuses it in one line, names the first",
        "layers and suggests GroupLasso, before it loads any data. (The original fails there, or silently does nothing.)",
        "",
        "Keras does not build NASNetMobile on PyTorch; there `keras-morph train` says so in one line.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(km.zoo.NAMES))
    environment = describe_environment()
    for name in parser.parse_args().networks.split(","):
        run(name, environment)
        write_text(TABLE, table(rows()))
        write_text(README, with_summary(README.read_text(), rows()))


if __name__ == "__main__":
    main()
