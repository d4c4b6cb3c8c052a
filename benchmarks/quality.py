"""How accurate small networks are: learned structures against uniform widths, one-shot pruning and training from scratch.

    python benchmarks/quality.py --data cifar10.zip          ResNet20, 16x16 images, 20 epochs in all, 3 random seeds
    python benchmarks/quality.py --data digits               DigitsResNet on scikit-learn's digits, minutes

Every arm gets the same training images and the same number of epochs in all, trains on images that are flipped and
shifted at random, starts from the same learning rate, which falls along a cosine (`shrink` keeps it constant while it
learns), and ends within the budget of FLOPs:

    dense        the whole network
    uniform      all widths times one factor, from scratch
    one-shot     the dense network trained for half of the epochs, cut by GroupLasso's scores at once, fine-tuned
    Gamma, GroupLasso, LogisticSigmoid       keras_morph.shrink of a fresh network under this regularizer
    from scratch Gamma's structure with fresh weights

The test images are looked at once per row, at the end; settings were chosen on validation images. One row of
benchmarks/results/quality.csv per arm, budget and random seed; rows that are there are not run again. Writes docs/quality.md.
"""

import argparse
import datetime
import time
from pathlib import Path

import keras
import numpy as np
from rows import append, rows_at

import keras_morph as km
from keras_morph.datasets import load
from keras_morph.graph.structure import graph_and_structure
from keras_morph.pipeline import cosine
from keras_morph.runs import describe_environment

RESULTS = Path(__file__).parent / "results" / "quality.csv"
TABLE = Path(__file__).parents[1] / "docs" / "quality.md"
LEARNED = {"Gamma": km.Gamma, "GroupLasso": km.GroupLasso, "LogisticSigmoid": km.LogisticSigmoid}
ARMS = ("dense", "uniform", "one-shot", *LEARNED, "from scratch")
FLOPS = km.FLOPs()
INTRODUCTION = """\
# How accurate the small networks are

Written by `python benchmarks/quality.py`, not by hand; every row, with its command, is in `benchmarks/results/quality.csv`.
All arms but the dense one keep to the budget of FLOPs; all have equal epochs in all, the same training images and the same
peak learning rate, which falls along a cosine. `shrink` keeps it constant while it learns, and that helps by itself: with
its schedule dense ResNet20 reached 62.3 instead of 60.3, and uniform widths at 25 % 55.3 instead of 53.8 (one random
seed). So its rows are to be read against each other, and not as better than dense. Settings were chosen on
validation images, and the test images were looked at once per row. Means and standard deviations over random seeds, in
percent.

- **dense**: the whole network. **uniform**: all widths times one factor, from scratch.
- **one-shot**: the dense network trained for half of the epochs, cut at once by GroupLasso's scores, and fine-tuned.
- **Gamma**, **GroupLasso**, **LogisticSigmoid**: `keras_morph.shrink` of a fresh network, defaults but for the regularizer.
- **from scratch**: Gamma's structure with fresh weights.
- *before the cut*: validation accuracy of the learner, whose dead channels are zero; *after it, statistics anew*: of the rebuilt
  network, BatchNormalization's statistics estimated again, before any fine-tuning.
"""
KEY = ("arm", "budget", "random_seed", "network", "data", "image_size", "training_images", "epochs", "learning_rate")


class Augmented(keras.utils.PyDataset):
    """Batches of images, each shifted by up to an eighth of its size and, where that makes sense, flipped."""

    def __init__(self, x, y, batch_size, random_seed, flip):
        super().__init__()
        self.x, self.y, self.batch_size, self.flip = x, y, batch_size, flip
        self.random = np.random.default_rng(random_seed)
        self.order = self.random.permutation(len(x))

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.x))

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        n, size = len(chosen), self.x.shape[1]
        most = size // 8
        padded = np.pad(self.x[chosen], ((0, 0), (most, most), (most, most), (0, 0)), mode="reflect")
        rows, columns = self.random.integers(0, 2 * most + 1, (2, n, 1)) + np.arange(size)
        if self.flip:
            columns = np.where(self.random.random((n, 1)) < 0.5, columns[:, ::-1], columns)
        return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]], self.y[chosen]


class Trial:
    """One random seed's data and network; an arm is a method that returns a trained model and figures of its cut."""

    def __init__(self, options, random_seed):
        self.options, self.random_seed = options, random_seed
        data = load(options.data, image_size=options.image_size, seed=random_seed)
        chosen = slice(options.training_images)
        self.data, x, y = data, data.x_train[chosen], data.y_train[chosen]
        self.batches = lambda: Augmented(x, y, options.batch_size, random_seed, flip=options.data != "digits")
        self.steps = len(self.batches())

    def network(self):
        keras.utils.set_random_seed(self.random_seed)
        return km.zoo.build(self.options.network, input_shape=self.data.image_shape, classes=self.data.num_classes)

    def train(self, model, epochs, *, span=None, done=0):
        """Epochs `done` to `done + epochs` of a cosine over `span` epochs."""
        rate = cosine(self.options.learning_rate, self.steps * (span or epochs), self.steps * done)
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(self.batches(), epochs=epochs, verbose=0)
        return model

    def structure_file(self, budget):
        """Where Gamma's structure lies until `from scratch` needs it."""
        folder = self.options.output.with_suffix("")
        return folder / f"{self.options.network}-{budget.rstrip('%')}-{self.random_seed}.json"

    def validation(self, model):
        return accuracy(model, self.data.x_val, self.data.y_val)

    def run(self, arm, budget):
        if arm == "dense":
            return self.train(self.network(), self.options.epochs), {}
        if arm == "uniform":
            return self.train(uniform(self.network(), budget), self.options.epochs), {}
        if arm == "one-shot":
            return self.one_shot(budget)
        if arm == "from scratch":
            if not self.structure_file(budget).exists():
                self.learn("Gamma", budget)
            fresh = km.rebuild(self.network(), km.Structure.load(self.structure_file(budget)), weights=False)
            return self.train(fresh, self.options.epochs), {}
        return self.learn(arm, budget)

    def one_shot(self, budget):
        half = self.options.epochs // 2
        dense = self.train(self.network(), half, span=self.options.epochs)
        small = km.prune(dense, budget, cost=FLOPS)
        figures = {"before_cut": self.validation(dense), "after_cut": self.validation(small)}
        km.reestimate_statistics(small, self.batches())
        figures["reestimated"] = self.validation(small)
        return self.train(small, self.options.epochs - half, span=self.options.epochs, done=half), figures

    def learn(self, arm, budget):
        result = km.shrink(
            self.network(),
            budget,
            self.batches(),
            regularizer=LEARNED[arm](),
            recipe=km.Recipe(epochs=self.options.epochs, learning_rate=self.options.learning_rate),
        )
        if arm == "Gamma":
            result.structure.save(self.structure_file(budget))
        small, tuned = result.small, result.small.get_weights()
        figures = {"before_cut": self.validation(result.learner)}
        for name, weights in (("after_cut", result.rebuilt_weights), ("reestimated", result.reestimated_weights)):
            small.set_weights(weights)
            figures[name] = self.validation(small)
        small.set_weights(tuned)
        return small, figures


def uniform(seed, budget):
    """The network with all widths times one factor, the largest within a budget; fresh weights."""
    graph = km.trace(seed)
    limit = float(budget.rstrip("%")) / 100 * FLOPS(graph)
    fixed = {
        layer.name
        for layer in graph.layers
        if layer.made is not None and graph.pinned_mask[graph.group_of[layer.made]].all()
    }

    def scaled(factor):
        counts = {layer: max(1, round(factor * n)) for layer, n in graph.widths.items() if layer not in fixed}
        return graph_and_structure(graph, counts)[1]

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if FLOPS(graph, scaled(middle)) <= limit else (low, middle)
    return km.rebuild(seed, scaled(low), weights=False)


def accuracy(model, x, y):
    return float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(-1) == y))


def row_of(options, arm, budget, random_seed):
    values = {name: getattr(options, name, None) for name in KEY}
    return {**values, "arm": arm, "budget": budget, "random_seed": random_seed, "data": Path(options.data).stem}


def table(rows):
    """docs/quality.md: a section per set-up, a line per budget and arm, means and standard deviations over random seeds."""
    text = INTRODUCTION
    for command in dict.fromkeys(row["command"] for row in rows):
        here = [row for row in rows if row["command"] == command]
        one = here[0]
        text += (
            f"\n## {one['network']} on {one['data']}\n\n`{command}`: {int(one['training_images']):,} training images of "
            f"{one['image_size']}x{one['image_size']}, {one['epochs']} epochs in all, Keras {one['keras']} on {one['backend']} "
            f"{one['backend_version']}, {one['cpu']}, {one['date']}.\n\n"
            "| budget | arm | test accuracy | n | against dense | before the cut | after it, statistics anew | parameters |\n"
            "|---|---|---|---|---|---|---|---|\n"
        )
        dense = {row["random_seed"]: float(row["test"]) for row in here if row["arm"] == "dense"}
        for budget, arm in dict.fromkeys((row["budget"], row["arm"]) for row in sorted(here, key=_place)):
            group = [row for row in here if (row["budget"], row["arm"]) == (budget, arm)]
            against = [float(row["test"]) - dense[row["random_seed"]] for row in group if row["random_seed"] in dense]
            cells = [
                _spread([float(row["test"]) for row in group]),
                str(len(group)),
                "" if arm == "dense" else _spread(against, sign="+"),
                *(_spread([float(r[name]) for r in group if r[name]]) for name in ("before_cut", "reestimated")),
                f"{np.mean([int(row['parameters']) for row in group]):,.0f}",
            ]
            text += f"| {budget} | {arm} | {' | '.join(cells)} |\n"
    return text


def _place(row):
    return -float(row["budget"].rstrip("%")), ARMS.index(row["arm"])


def _spread(values, sign=""):
    """Mean and standard deviation in percent."""
    if not values:
        return ""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.1f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an image zip or folder, or digits")
    parser.add_argument("--network")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--training-images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--budgets", default="50%,25%")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    digits = options.data == "digits"
    for name, small, large in (
        ("network", "DigitsResNet", "ResNet20"),
        ("image_size", 8, 16),
        ("training_images", 1500, 10_000),
        ("epochs", 20, 20),
        ("batch_size", 64, 128),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if digits else large)
    environment = {
        k: v for k, v in describe_environment().items() if k in ("backend", "backend_version", "keras", "cpu", "cores")
    }
    command = f"python benchmarks/quality.py --data {Path(options.data).name} " + " ".join(
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name in ("network", "image_size", "training_images", "epochs", "batch_size", "learning_rate")
    )
    for random_seed in map(int, options.seeds.split(",")):
        trial = Trial(options, random_seed)
        for budget in options.budgets.split(","):
            for arm in options.arms.split(","):
                key = row_of(options, arm, "100%" if arm == "dense" else budget, random_seed)
                done = [r for r in rows_at(options.output) if all(r[name] == str(value) for name, value in key.items())]
                if done:
                    continue
                start = time.perf_counter()
                model, figures = trial.run(arm, budget)
                cuts = {
                    name: f"{figures[name]:.4f}" if name in figures else ""
                    for name in ("before_cut", "after_cut", "reestimated")
                }
                row = {
                    **key,
                    "validation": f"{trial.validation(model):.4f}",
                    "test": f"{accuracy(model, trial.data.x_test, trial.data.y_test):.4f}",
                    **cuts,
                    "flops_share": f"{FLOPS(model) / FLOPS(trial.network()):.4f}",
                    "parameters": model.count_params(),
                    "seconds": f"{time.perf_counter() - start:.0f}",
                    "date": f"{datetime.date.today()}",
                    **environment,
                    "command": command,
                }
                append(options.output, row)
                print(
                    {name: row[name] for name in ("arm", "budget", "random_seed", "validation", "test", "seconds")},
                    flush=True,
                )
                if options.output == RESULTS:
                    TABLE.write_text(table(rows_at(RESULTS)), encoding="utf-8")
                keras.backend.clear_session()


if __name__ == "__main__":
    main()
