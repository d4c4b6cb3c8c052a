"""At the same time, which network is more accurate: one cut to a budget of FLOPs, or one cut to a budget of measured latency?

    KERAS_BACKEND=tensorflow python benchmarks/latency_or_flops.py --data cifar10.zip --networks FOLDER [--runtime onnxruntime]
    KERAS_BACKEND=tensorflow python benchmarks/latency_or_flops.py --data cifar10.zip --network EfficientNetLite0
    KERAS_BACKEND=tensorflow python benchmarks/latency_or_flops.py --data cifar10.zip --networks FOLDER --network ViT
    KERAS_BACKEND=tensorflow python benchmarks/latency_or_flops.py --data cifar10.zip --networks FOLDER --network VGG9
    KERAS_BACKEND=tensorflow python benchmarks/latency_or_flops.py --data cifar10.zip --networks FOLDER --network ViT --times 60

Takes the trained networks that benchmarks/recovery.py keeps, those that benchmarks/efficientnet_lite0.py has fine-tuned, or the
vision transformer of benchmarks/latency.py or a small VGG, which are trained for twelve epochs where FOLDER does not hold them
(--train: only that, on whichever backend). Each is cut to
shares of its FLOPs and recovered from images without labels; then to the share of the latency that the result was measured to
take, or to all of it where that is more than the whole network takes. With --tune both are `km.shrink`, which fine-tunes them for
so many epochs. All are timed in the runtime, in turn. With --times it goes the other way: the network is cut to shares of its
latency, and to the largest share of its FLOPs, in steps of 5 %, whose network takes no longer; rows of
benchmarks/results/same_time.csv.
Appends a row per pair to benchmarks/results/latency_or_flops.csv, and writes the table of docs/latency.md; networks whose rows
are there are left out, and --cache keeps the latency, so that a run that was ended goes on.
"""

import argparse
import datetime
import os
import shlex
import sys
import tempfile
import time
from operator import itemgetter
from pathlib import Path

import efficientnet_lite0 as lite
import keras
import numpy as np
from keras import layers
from latency import vit
from quality import Augmented, Trial, accuracy
from rows import append, rows_at, write_section

import keras_morph as km
from keras_morph.datasets import load
from keras_morph.exporting import write_unchecked
from keras_morph.formats import FORMATS
from keras_morph.machine import cpu_name
from keras_morph.runs import save_model
from keras_morph.timing import time_files_apart
from keras_morph.training.recipe import cosine, fit_on

ROOT = Path(__file__).parents[1]
EPOCHS, RATE = 12, 1e-3  # of those that are trained here; the peak learning rate, of fine-tuning too
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "latency_or_flops.csv", ROOT / "docs" / "latency.md"
SAME_TIME = RESULTS.with_name("same_time.csv")
STEPS = range(95, 0, -5)  # percent of the FLOPs that are tried


def seconds_of(models, form, seconds):
    """Shortest times of models, timed in turn."""
    name, row = form
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}{row.suffix}" for number in range(len(models))]
        write_unchecked(models, paths, name)
        return time_files_apart(paths, seconds=seconds).least


def vgg9():
    """A small VGG at 32 px: six convolutions of 3x3, and two wide Dense layers, which have 96 % of its parameters."""
    x = image = keras.Input((32, 32, 3))
    for stage, filters in enumerate((32, 64, 128), 1):
        for number in (1, 2):
            name = f"conv{stage}_{number}"
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
            x = layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(name=f"{name}_bn")(x))
        x = layers.MaxPooling2D(name=f"pool{stage}")(x)
    x = layers.Flatten(name="flatten")(x)
    for number in (1, 2):
        x = layers.Dense(2048, activation="relu", name=f"fc{number}")(x)
        x = layers.Dropout(0.5, name=f"dropout{number}")(x)
    return keras.Model(image, layers.Dense(10, activation="softmax", name="head")(x), name="VGG9")


TRAINED_HERE = {"ViT": (vit, 64), "VGG9": (vgg9, 32)}  # and pixels of a side


class Trained:
    """A network of TRAINED_HERE and a random seed's images; trained once and kept."""

    def __init__(self, options, random_seed):
        self.path, self.random_seed = options.networks / f"{options.network}-{random_seed}.keras", random_seed
        self.build, size = TRAINED_HERE[options.network]
        self.data = load(options.data, image_size=size, limit=options.images_here, seed=random_seed)
        self.batches = Augmented(self.data.x_train, self.data.y_train, 64, random_seed, flip=True)

    def trained(self):
        if not self.path.exists():
            keras.utils.set_random_seed(self.random_seed)
            model, rate = self.build(), cosine(RATE, EPOCHS * len(self.batches))
            model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", jit_compile=False)
            fit_on(model, self.batches, 0, seed=self.random_seed, epochs=EPOCHS, verbose=2)
            save_model(model, self.path)
        return keras.models.load_model(self.path, compile=False)


class Subject:
    """A trained network of one random seed, images to recover by, and its accuracy on test images."""

    def __init__(self, options, random_seed):
        if options.network == "EfficientNetLite0":
            trial = lite.Trial(lite.options_of(["--data", options.data, "--learning", "0.4"]), random_seed)
            self.network, self.images = trial.fine_tuned(), trial.images(options.images)[0]
            self.size, self.accuracy = lite.SIZE, lite.accuracy
        elif options.network in TRAINED_HERE:
            trial = Trained(options, random_seed)
            self.network, self.images = trial.trained(), trial.data.x_train[: options.images]
            self.size, self.accuracy = TRAINED_HERE[options.network][1], accuracy
        else:
            trial = Trial(options, random_seed)
            path = options.networks / f"{options.network}-{random_seed}.keras"
            self.network = keras.models.load_model(path, compile=False)
            self.images, self.size, self.accuracy = trial.images(options.images)[0], options.image_size, accuracy
        chosen = slice(None if options.network == "ResNet20" else options.test_images)
        self.test = trial.data.x_test[chosen], trial.data.y_test[chosen]
        self.batches, self.epochs, self.random_seed = trial.batches, options.tune, random_seed

    def cut(self, budget):
        """A smaller network within a budget, recovered, and fine-tuned where that is asked for."""
        if not self.epochs:
            return km.prune(self.network, budget, calibration=self.images)
        keras.utils.set_random_seed(self.random_seed)
        recipe = km.Recipe(epochs=self.epochs, learning_rate=RATE, calibration=self.images)
        return km.shrink(self.network, budget, self.batches, recipe=recipe, verbose=0).small

    def cut_to_times(self, times, form):
        """For each time, in seconds, the network of the largest share of the FLOPs that takes no longer; None if none does."""
        scores = km.contribution_scores(self.network, self.images)
        budgets = [km.Budget(f"{share}%", per_cost=1) for share in STEPS]
        structures = [km.fit_budget(self.network, budget, scores=scores) for budget in budgets]
        models = [km.rebuild(self.network, each) for each in structures]
        for small, structure in zip(models, structures, strict=True):
            km.recover(small, self.network, structure, self.images)  # before they are timed: it adds constants
        least = seconds_of(models, form, 60)
        places = (next((place for place, each in enumerate(least) if each <= seconds), None) for seconds in times)
        return [(None, None) if place is None else (models[place], STEPS[place]) for place in places]

    def right(self, model):
        return self.accuracy(model, *self.test)


def table():
    """Means and standard deviations over random seeds, and of the differences."""
    rows = rows_at(RESULTS)
    lines = [
        "| network | runtime | epochs | share of the FLOPs | n | cut to FLOPs: time, accuracy "
        "| to latency: time, FLOPs, accuracy | difference |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    kind_of = itemgetter("network", "runtime", "tuned", "share")
    for key in dict.fromkeys(map(kind_of, rows)):
        here = [row for row in rows if kind_of(row) == key]
        cells = []
        for kind in ("flops", "latency"):
            times = [float(row[f"{kind}_us"]) / float(row["seed_us"]) for row in here]
            flops = np.mean([float(row["flops_share_of_latency"]) for row in here])
            cells.append(f"{np.mean(times):.1%}, " + (f"{flops:.0%}, " if kind == "latency" else ""))
            cells[-1] += spread([float(row[f"{kind}_accuracy"]) for row in here])
        differences = [float(row["latency_accuracy"]) - float(row["flops_accuracy"]) for row in here]
        start = f"| {key[0]} | {key[1]} | {key[2] or 0} | {key[3]}% | {len(here)} | "
        lines.append(f"{start}{' | '.join(cells)} | {spread(differences)} |")
    return "\n".join([*lines, ""])


def same_time(subject, cost, form, options, asked_for):
    """A row for each of some times: cut to this share of the latency, and to the FLOPs whose network takes no longer."""
    network = subject.network
    by_latency = [subject.cut(km.Budget(f"{share}%", cost)) for share in asked_for]
    _, *times = seconds_of([network, *by_latency], form, 30)
    by_flops = subject.cut_to_times([1.02 * each for each in times], form)  # what two timings of one file differ by
    models = [network, *by_latency, *(b for b, _ in by_flops if b is not None)]
    least = dict(zip(map(id, models), seconds_of(models, form, 60), strict=True))
    for asked, a, (b, share) in zip(asked_for, by_latency, by_flops, strict=True):
        row = {
            "date": datetime.date.today().isoformat(),
            "network": options.network,
            "random_seed": subject.random_seed,
            "runtime": str(cost.conditions),
            "time_asked": asked,
            "flops_asked": share or "",  # nothing, where none of STEPS is as fast
            "seed_accuracy": round(subject.right(network), 4),
            "seed_us": round(1e6 * least[id(network)], 1),
            "latency_accuracy": round(subject.right(a), 4),
            "latency_us": round(1e6 * least[id(a)], 1),
            "latency_flops_share": round(km.FLOPs()(a) / km.FLOPs()(network), 4),
            "flops_accuracy": "" if b is None else round(subject.right(b), 4),
            "flops_us": "" if b is None else round(1e6 * least[id(b)], 1),
            "flops_share": "" if b is None else round(km.FLOPs()(b) / km.FLOPs()(network), 4),
            "test_images": len(subject.test[0]),
            "keras": keras.__version__,
            "command": command(),
        }
        print(row, flush=True)
        append(SAME_TIME, row)


def table_of_same_time():
    """Means and standard deviations over random seeds; of the paired differences the standard error."""
    lines = [
        "| network | runtime | latency asked | n | whole: accuracy | cut to latency: time, FLOPs, accuracy "
        "| cut to FLOPs: time, FLOPs, accuracy | difference |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    kind_of = itemgetter("network", "runtime", "time_asked")
    rows = rows_at(SAME_TIME)
    for key in dict.fromkeys(map(kind_of, rows)):
        here = [row for row in rows if kind_of(row) == key]
        cells = [spread([float(row["seed_accuracy"]) for row in here])]
        pairs = [row for row in here if row["flops_us"]]
        for kind, flops, rows_of_kind in (("latency", "latency_flops_share", here), ("flops", "flops_share", pairs)):
            times = [float(row[f"{kind}_us"]) / float(row["seed_us"]) for row in rows_of_kind]
            shares = [float(row[flops]) for row in rows_of_kind]
            right = [float(row[f"{kind}_accuracy"]) for row in rows_of_kind]
            cells.append(f"{np.mean(times):.1%}, {np.mean(shares):.0%}, {spread(right)}" if right else "")
        if missing := len(here) - len(pairs):
            cells[-1] += f" (of {missing}, none is as fast)"
        gains = [100 * (float(row["latency_accuracy"]) - float(row["flops_accuracy"])) for row in pairs]
        error = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
        gain = f"{np.mean(gains):+.1f}{error}" if gains else ""
        lines.append(f"| {key[0]} | {key[1]} | {key[2]}% | {len(here)} | {' | '.join(cells)} | {gain} |")
    return "\n".join([*lines, ""])


def command():
    words = [word for word in sys.argv[1:] if "/" not in word and word not in ("--networks", "--data", "--cache")]
    return "python benchmarks/latency_or_flops.py --data DATA --networks FOLDER " + shlex.join(words)


def spread(values):
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--network", default="ResNet20")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--training-images", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--test-images", type=int, default=2000, help="but for ResNet20: all")
    parser.add_argument(
        "--images-here", type=int, default=6000, help="of networks that are trained here, a tenth for validation"
    )
    parser.add_argument("--train", action="store_true", help="only train the network, where it is not kept yet")
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--times", type=int, nargs="+", default=None, help="percent of the latency, instead of --shares"
    )
    parser.add_argument("--shares", type=int, nargs="+", default=[70, 50, 35])
    parser.add_argument(
        "--tune", type=int, default=0, help="epochs of fine-tuning by `shrink`, at least 3; by default none"
    )
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--cache", type=Path, default=None)
    options = parser.parse_args()
    if options.networks is None and options.network != "EfficientNetLite0":
        parser.error(f"--networks: expected the folder of trained networks for {options.network}; received none")
    options.batch_size, options.epochs, options.learning = 128, 20, 0.0  # which Trial wants
    if options.train:
        if options.network not in TRAINED_HERE:
            parser.error(f"--train: expected --network {' or '.join(TRAINED_HERE)}; received {options.network}")
        for random_seed in options.random_seeds:
            Trained(options, random_seed).trained()
        return
    form = next((name, row) for name, row in FORMATS.items() if row.runtime == options.runtime)
    cost = None
    for random_seed in options.random_seeds:
        start, load = time.perf_counter(), os.getloadavg()[0]
        if options.times:
            known = {int(r["time_asked"]) for r in rows_at(SAME_TIME) if is_of(r, options, random_seed)}
            times = [each for each in options.times if each not in known]
            if not times:
                continue
            subject = Subject(options, random_seed)
            cost = cost or km.MeasuredLatency(subject.network, runtime=options.runtime, cache=options.cache)
            same_time(subject, cost, form, options, times)
            write_section(PAGE, "same_time", table_of_same_time())
            continue
        done = {row["share"] for row in rows_at(RESULTS) if is_of(row, options, random_seed)}
        shares = [share for share in options.shares if str(share) not in done]
        if not shares:
            continue
        subject = Subject(options, random_seed)
        network = subject.network
        cost = cost or km.MeasuredLatency(network, runtime=options.runtime, cache=options.cache)
        print(f"{cost!r}: after {time.perf_counter() - start:.0f} s", flush=True)
        pairs = []
        for share in shares:
            by_flops = subject.cut(f"{share}%")
            whole, small = seconds_of([network, by_flops], form, 10)
            budget = km.Budget(f"{100 * min(1.0, small / whole):.2f}%", cost)
            pairs.append((by_flops, subject.cut(budget)))
            print(f"{share}% of the FLOPs: {budget.amount} of the time", flush=True)
        models = [network, *(model for pair in pairs for model in pair)]
        least = seconds_of(models, form, 60)
        right = [subject.right(model) for model in models]
        for number, share in enumerate(shares):
            flops, latency = 1 + 2 * number, 2 + 2 * number
            row = {
                "date": datetime.date.today().isoformat(),
                "network": options.network,
                "image_size": subject.size,
                "random_seed": random_seed,
                "runtime": str(cost.conditions),
                "share": share,
                "tuned": options.tune,
                "seed_accuracy": round(right[0], 4),
                "seed_us": round(1e6 * least[0], 1),
                "flops_accuracy": round(right[flops], 4),
                "flops_us": round(1e6 * least[flops], 1),
                "latency_accuracy": round(right[latency], 4),
                "latency_us": round(1e6 * least[latency], 1),
                "flops_share_of_latency": round(km.FLOPs()(models[latency]) / km.FLOPs()(network), 4),
                "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
                "keras": keras.__version__,
                "command": command(),
            }
            print(row, flush=True)
            append(RESULTS, row)
        print(f"random seed {random_seed}: {time.perf_counter() - start:.0f} s", flush=True)
        write_section(PAGE, "latency_or_flops.py", table())


def is_of(row, options, random_seed):
    """Whether a row is of this network, in this runtime, on this processor."""
    here = row["runtime"].startswith(f"{options.runtime} ") and row["runtime"].endswith(f", {cpu_name()}")
    mine = options.network, str(random_seed), options.tune
    return here and (row["network"], row["random_seed"], int(row.get("tuned") or 0)) == mine


if __name__ == "__main__":
    main()
