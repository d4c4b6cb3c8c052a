"""What a few hundred images without labels regain of what a cut loses, without any training.

    python benchmarks/recovery.py --networks FOLDER --data cifar10.zip         ResNet20, 16x16 images, 3 random seeds
    python benchmarks/recovery.py --networks FOLDER --data digits              DigitsResNet on scikit-learn's digits

A network is trained as in benchmarks/quality.py, but along a plain cosine, and kept in --networks. Then it is cut by each of
several scores: as it is, with BatchNormalization's statistics estimated anew, and recovered from training images. "regained"
is the share of what `prune(network, budget)` loses in test accuracy that is there again. Settings were chosen on validation
images; the test images were looked at once per row. One row of benchmarks/results/recovery.csv per arm and random seed; rows
that are there are not run again. Writes the tables of docs/recovery.md.
"""

import argparse
import datetime
import time
from pathlib import Path

import keras
from quality import FLOPS, Trial, accuracy, spread
from rows import append, rows_at

import keras_morph as km
from keras_morph.runs import describe_environment, save_model

RESULTS = Path(__file__).parent / "results" / "recovery.csv"
PAGE = Path(__file__).parents[1] / "docs" / "recovery.md"
TABLES = "<!-- tables written by benchmarks/recovery.py -->\n"
KEY = (
    "network",
    "data",
    "image_size",
    "training_images",
    "epochs",
    "random_seed",
    "budget",
    "images",
    "scores",
    "then",
)
REGULARIZERS = {"GroupLasso": km.GroupLasso, "Gamma": km.Gamma}
FROM_IMAGES = {
    "contribution": km.contribution_scores,
    "obs": km.obs_scores,
    "flap": km.flap_scores,
    "minitron": km.minitron_scores,
}
FROM_KERNELS = {"fpgm": km.fpgm_scores, "whc": km.whc_scores}
SCORES = (*REGULARIZERS, *FROM_IMAGES, *FROM_KERNELS, "taylor", "taylor per cost")
PER_COST = ("contribution", "obs", "taylor per cost")
ARMS = [
    ("GroupLasso", "as it is"),  # plain one-shot: first, since the others are held against it
    ("contribution", "as it is"),
    ("GroupLasso", "statistics anew"),
    ("contribution", "statistics anew"),
    *((name, "recovered") for name in SCORES),
]


def trained(trial, options):
    path = options.networks / f"{options.network}-{trial.random_seed}.keras"
    if not path.exists():
        save_model(trial.train(trial.network()), path)
    return keras.models.load_model(path)


def scores_of(network, name, x, y):
    if name in REGULARIZERS:
        return REGULARIZERS[name]()
    if name in FROM_IMAGES:
        return FROM_IMAGES[name](network, x)
    if name in FROM_KERNELS:
        return FROM_KERNELS[name](network)
    return km.taylor_scores(network, (x, y), loss="sparse_categorical_crossentropy")


def run(network, scores, then, options, x, y):
    """A smaller network, and how many seconds scores, cut and recovery took."""
    start = time.perf_counter()
    budget = km.Budget(options.budget, FLOPS, per_cost=float(scores in PER_COST), round_to=options.round_to)
    structure = km.fit_budget(network, budget, scores=scores_of(network, scores, x, y))
    small = km.rebuild(network, structure)
    if then == "statistics anew":
        km.reestimate_statistics(small, (x, None))
    elif then == "recovered":
        km.recover(small, network, structure, x)
    return small, time.perf_counter() - start


def tables(rows):
    """A section per set-up, a line per scores and what is done then, means and standard deviations over random seeds."""
    text = TABLES
    for command in dict.fromkeys(row["command"] for row in rows):
        here = [row for row in rows if row["command"] == command]
        one = here[0]
        dense = {row["random_seed"]: float(row["dense"]) for row in here}
        text += (
            f"\n### {one['network']} on {one['data']}, {one['budget']} of the FLOPs\n\n`KERAS_BACKEND={one['backend']} "
            f"{command}`: {one['images']} images of {one['image_size']}x{one['image_size']}, Keras {one['keras']} on "
            f"{one['backend']} {one['backend_version']}, {one['cpu']}, {one['date']}. "
            f"The whole network: {spread(list(dense.values()))} (n = {len(dense)}).\n\n"
            "| scores | then | test accuracy | regained | seconds | n |\n|---|---|---|---|---|---|\n"
        )
        for scores, then in ARMS:
            group = [row for row in here if (row["scores"], row["then"]) == (scores, then)]
            if group:
                figures = (spread([float(row[name]) for row in group]) for name in ("test", "regained"))
                seconds = max(float(row["seconds"]) for row in group)
                text += f"| {scores} | {then} | {' | '.join(figures)} | {seconds:.0f} | {len(group)} |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an image zip or folder, or digits")
    parser.add_argument("--networks", type=Path, required=True, help="a folder, where trained networks are kept")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--round-to", type=lambda text: text if text == "auto" else int(text), default=1)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scores", default=",".join(SCORES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    small = options.data == "digits"
    settings = ("DigitsResNet", 8, 1500, 64) if small else ("ResNet20", 16, 10_000, 128)
    options.network, options.image_size, options.training_images, options.batch_size = settings
    options.epochs, options.learning_rate, options.learning = 20, 2e-3, 0.0  # a plain cosine
    environment = {
        k: v for k, v in describe_environment().items() if k in ("backend", "backend_version", "keras", "cpu")
    }
    name = Path(options.data).name
    command = (
        f"python benchmarks/recovery.py --networks FOLDER --data {name} --budget {options.budget} --images {options.images} "
        f"--round-to {options.round_to}"
    )
    for random_seed in map(int, options.seeds.split(",")):
        trial = Trial(options, random_seed)
        network, data = trained(trial, options), trial.data
        x, y = data.x_train[: options.images], data.y_train[: options.images]
        dense = accuracy(network, data.x_test, data.y_test)
        plain = None
        for scores, then in ARMS:
            values = {key: getattr(options, key, None) for key in KEY}
            key = {
                **values,
                "data": Path(options.data).stem,
                "random_seed": random_seed,
                "scores": scores,
                "then": then,
            }
            done = [r for r in rows_at(options.output) if all(r[name] == str(value) for name, value in key.items())]
            plain = plain or (float(done[0]["test"]) if done else None)
            if done or scores not in options.scores.split(","):
                continue
            small, seconds = run(network, scores, then, options, x, y)
            test = accuracy(small, data.x_test, data.y_test)
            plain = plain or test
            row = {
                **key,
                "dense": f"{dense:.4f}",
                "plain": f"{plain:.4f}",
                "test": f"{test:.4f}",
                "regained": f"{(test - plain) / (dense - plain):.3f}",
                "seconds": f"{seconds:.1f}",
                "flops_share": f"{FLOPS(small) / FLOPS(network):.4f}",
                "parameters": small.count_params(),
                "date": f"{datetime.date.today()}",
                **environment,
                "command": command,
            }
            append(options.output, row)
            print(
                {name: row[name] for name in ("random_seed", "scores", "then", "test", "regained", "seconds")},
                flush=True,
            )
            if options.output == RESULTS:
                written = PAGE.read_text(encoding="utf-8").partition(TABLES)[0]
                PAGE.write_text(written + tables(rows_at(RESULTS)), encoding="utf-8")
            keras.backend.clear_session()


if __name__ == "__main__":
    main()
