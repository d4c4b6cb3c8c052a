"""What it costs to round widths: accuracy and FLOPs of networks that are cut with `round_to=1` and with the default.

    KERAS_BACKEND=torch python benchmarks/rounding.py --data cifar10-jpeg.zip --networks FOLDER [--network ResNet20]
        [--image-size 16]

Takes the trained networks that benchmarks/recovery.py keeps, FOLDER/ResNet20-0.keras and so on; each is cut by
`km.prune(network, budget, calibration=images)` and not trained again. Appends a row per network, share and rounding to
benchmarks/results/rounding.csv, and writes the table in docs/latency.md; rows that are there are not measured again.
"""

import argparse
import datetime
import sys
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from rows import append, rows_at, write_section

import keras_morph as km
from keras_morph.runs import describe_environment

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "rounding.csv", ROOT / "docs" / "latency.md"


def table():
    """Means and standard deviations over random seeds."""
    rows = rows_at(RESULTS)
    lines = [
        "| network | data | share of the FLOPs | round_to | n | accuracy | FLOPs used | parameters |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys((row["network"], row["data"], row["share"], row["round_to"]) for row in rows):
        here = [row for row in rows if (row["network"], row["data"], row["share"], row["round_to"]) == key]
        right, used, parameters = (
            [float(row[name]) for row in here] for name in ("accuracy", "flops_share", "parameters")
        )
        spread = f" ± {100 * np.std(right, ddof=1):.1f}" if len(right) > 1 else ""
        network, data, share, round_to = key
        lines.append(
            f"| {network} | {data} | {share}% | {round_to} | {len(here)} | {100 * np.mean(right):.1f}{spread} | "
            f"{np.mean(used):.1%} | {np.mean(parameters):,.0f} |"
        )
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--network", default="ResNet20")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=int, nargs="+", default=[50, 25])
    options = parser.parse_args()
    data, environment = Path(options.data).stem, describe_environment()
    done = {
        (row["network"], row["data"], row["random_seed"], row["share"], row["round_to"]) for row in rows_at(RESULTS)
    }
    for random_seed in options.random_seeds:
        images = km.datasets.load(options.data, image_size=options.image_size, seed=random_seed)
        network = keras.models.load_model(options.networks / f"{options.network}-{random_seed}.keras", compile=False)
        for share in options.shares:
            for round_to in (1, "auto"):
                if (options.network, data, str(random_seed), str(share), str(round_to)) in done:
                    continue
                budget = km.Budget(f"{share}%", round_to=round_to)
                small = km.prune(network, budget, calibration=images.x_train[: options.images])
                chosen = small.predict(images.x_test, batch_size=256, verbose=0).argmax(-1)
                row = {
                    "date": f"{datetime.date.today()}",
                    "network": options.network,
                    "data": data,
                    "image_size": options.image_size,
                    "random_seed": random_seed,
                    "share": share,
                    "round_to": round_to,
                    "images": options.images,
                    "accuracy": f"{np.mean(chosen == images.y_test):.4f}",
                    "test_images": len(images.y_test),
                    "flops_share": f"{km.FLOPs()(small) / km.FLOPs()(network):.4f}",
                    "parameters": small.count_params(),
                    **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu")},
                    "command": f"python benchmarks/rounding.py --data {Path(options.data).name} --network {options.network} "
                    f"--image-size {options.image_size}",
                }
                print(*(f"{key}={row[key]}" for key in tuple(row)[1:12]), flush=True)
                append(RESULTS, row)
    write_section(PAGE, "rounding.py", table())


if __name__ == "__main__":
    main()
