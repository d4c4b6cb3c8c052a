"""Several budgets from one learning, against a run of its own for each: time, and the area under accuracy over cost.

    KERAS_BACKEND=torch OMP_NUM_THREADS=1 python benchmarks/families.py --data digits          DigitsResNet, ten budgets
    KERAS_BACKEND=torch OMP_NUM_THREADS=1 python benchmarks/families.py --data cifar10.zip     ResNet20, 16x16 images, three

Both arms begin with the same fresh network and see the same images; on CIFAR-10 these are flipped and shifted at random.
One row of benchmarks/results/families.csv per arm, budget and random seed; rows that are there are not run again. The times of
a family are those of all of it, divided by the number of its budgets; `cpu_seconds` are the process's, which other processes
disturb less. At the end, for each random seed: the family's time as a share of that of all runs, and its hypervolume, the area of
(share of the FLOPs, test accuracy) that its networks dominate, up to the whole cost and down to chance, as a share of theirs.
"""

import argparse
import datetime
import time
from pathlib import Path

import keras
from quality import Augmented, accuracy
from rows import append, rows_at

import keras_morph as km
from keras_morph.datasets import load
from keras_morph.runs import describe_environment

RESULTS = Path(__file__).parent / "results" / "families.csv"
FLOPS = km.FLOPs()
TEN = "90%,80%,70%,60%,50%,40%,30%,20%,15%,10%"
KEY = (
    "arm",
    "budget",
    "random_seed",
    "network",
    "data",
    "image_size",
    "training_images",
    "epochs",
    "batch_size",
    "backend",
)


def networks(options, arm, budgets, data, random_seed):
    """The smaller networks of some budgets, and how long they took."""
    keras.utils.set_random_seed(random_seed)
    seed = km.zoo.build(options.network, input_shape=data.image_shape, classes=data.num_classes)
    x, y = data.x_train[: options.training_images], data.y_train[: options.training_images]
    batches = (x, y) if options.data == "digits" else Augmented(x, y, options.batch_size, random_seed, flip=True)
    recipe = km.Recipe(epochs=options.epochs, batch_size=options.batch_size)
    how = {"validation_data": (data.x_val, data.y_val), "recipe": recipe, "verbose": 0}
    start = time.perf_counter(), time.process_time()
    if arm == "family":
        found = km.shrink_family(seed, budgets, batches, **how)
    else:
        found = [km.shrink(seed, budget, batches, **how) for budget in budgets]
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return seed, [each.small for each in found], [each / len(budgets) for each in seconds]


def hypervolume(points, chance):
    """The area that (cost, accuracy) dominate between the costs 0 and 1 and above chance, as a share of all of it."""
    area, best, before = 0.0, chance, 0.0
    for cost, reached in sorted(points):
        area += (cost - before) * (best - chance)
        best, before = max(best, reached), cost
    return (area + (1 - before) * (best - chance)) / (1 - chance)


def compared(rows, budgets, classes):
    """A line for each random seed that both arms have."""
    for random_seed in sorted({row["random_seed"] for row in rows}):
        arms = {
            arm: [r for r in rows if r["arm"] == arm and r["random_seed"] == random_seed and r["budget"] in budgets]
            for arm in ("family", "separate")
        }
        if any(len(found) < len(budgets) for found in arms.values()):
            continue
        area = {
            arm: hypervolume([(float(r["flops_share"]), float(r["test"])) for r in found], 1 / classes)
            for arm, found in arms.items()
        }
        total = {
            name: sum(float(r[name]) for r in arms["family"]) / sum(float(r[name]) for r in arms["separate"])
            for name in ("seconds", "cpu_seconds")
        }
        print(
            f"random seed {random_seed}, {len(budgets)} budgets: hypervolume {area['family']:.4f} of the family, "
            f"{area['separate']:.4f} of separate runs, {area['family'] / area['separate']:.1%}; "
            f"time {total['seconds']:.1%}, of the processor {total['cpu_seconds']:.1%}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an image zip or folder, or digits")
    parser.add_argument("--network")
    parser.add_argument("--budgets")
    parser.add_argument("--training-images", type=int)
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    digits = options.data == "digits"
    for name, small, large in (
        ("network", "DigitsResNet", "ResNet20"),
        ("budgets", TEN, "75%,50%,25%"),
        ("training_images", 1500, 10_000),
        ("batch_size", 64, 128),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if digits else large)
    budgets = options.budgets.split(",")
    environment = {k: v for k, v in describe_environment().items() if k in ("backend_version", "keras", "cpu", "cores")}
    shown = ("network", "budgets", "training_images", "image_size", "epochs", "batch_size")
    command = f"python benchmarks/families.py --data {Path(options.data).name} " + " ".join(
        f"--{name.replace('_', '-')} {getattr(options, name)}" for name in shown
    )
    same = {name: getattr(options, name) for name in KEY[3:-1]}
    same |= {"data": Path(options.data).stem, "backend": keras.backend.backend()}

    def done(**key):
        key = same | key
        return [row for row in rows_at(options.output) if all(row[name] == str(value) for name, value in key.items())]

    for random_seed in map(int, options.seeds.split(",")):
        data = load(options.data, image_size=options.image_size, seed=random_seed)
        for arm, together in (("family", [budgets]), ("separate", [[budget] for budget in budgets])):
            for chosen in together:
                if all(done(arm=arm, random_seed=random_seed, budget=budget) for budget in chosen):
                    continue
                seed, smalls, seconds = networks(options, arm, chosen, data, random_seed)
                for budget, small in zip(chosen, smalls, strict=True):
                    key = {"arm": arm, "budget": budget, "random_seed": random_seed}
                    row = {name: (same | key)[name] for name in KEY} | {
                        "validation": f"{accuracy(small, data.x_val, data.y_val):.4f}",
                        "test": f"{accuracy(small, data.x_test, data.y_test):.4f}",
                        "flops_share": f"{FLOPS(small) / FLOPS(seed):.4f}",
                        "parameters": small.count_params(),
                        "seconds": f"{seconds[0]:.2f}",
                        "cpu_seconds": f"{seconds[1]:.2f}",
                        "date": f"{datetime.date.today()}",
                        **environment,
                        "command": command,
                    }
                    append(options.output, row)
                    print({name: row[name] for name in ("arm", "budget", "random_seed", "test", "seconds")}, flush=True)
                keras.backend.clear_session()
        compared(done(), budgets, data.num_classes)


if __name__ == "__main__":
    main()
