"""What eight bits cost after shrinking: accuracy on digits and CIFAR-10, and file sizes of a larger network.

    python benchmarks/eight_bits.py [--random-seeds 0 1 2] [--large MobileNetV2]
    python benchmarks/eight_bits.py --data cifar10.zip --networks FOLDER --large       trained networks of benchmarks/recovery.py

A ResNet20 is trained on digits at 16 px for 8 epochs, pruned to half of its FLOPs, fine-tuned for 4 epochs, and exported in
float32 and in eight bits, calibrated by 200 training images; the accuracy is that of the files in their runtimes, on the 359
test images. With --networks ResNet20s that were trained on 10,000 images of CIFAR-10 at 16 px are pruned to half of their FLOPs,
recovered from 512 training images, calibrated by 200, and tested on 10,000 images. File sizes are those of --large with random
weights at 96 px, half of its FLOPs. Appends rows to benchmarks/results/eight_bits.csv, and writes the table in docs/export.md.
"""

import argparse
import datetime
import sys
import tempfile
from functools import partial
from pathlib import Path

import keras
import numpy as np

import keras_morph as km
from keras_morph.benchmarking import accuracy
from keras_morph.formats import FORMATS
from keras_morph.runs import describe_environment, write_text
from keras_morph.runtimes import RUNTIMES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from rows import append, rows_at

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "eight_bits.csv", ROOT / "docs" / "export.md"
BEGIN, END = "<!-- eight_bits.py -->\n", "<!-- end -->\n"
KINDS = ("onnx", "litert", "openvino")


def of_digits(random_seed):
    """A trained, pruned, fine-tuned network, images that calibrate it, and the test images with their labels."""
    keras.utils.set_random_seed(random_seed)
    images = km.datasets.load("digits", image_size=16, seed=random_seed)
    data = images.x_train, images.y_train
    seed = km.zoo.build("ResNet20", input_shape=(16, 16, 1), classes=10)
    seed.compile("adam", "sparse_categorical_crossentropy")
    seed.fit(*data, epochs=8, batch_size=64, verbose=0)
    small = km.prune(seed, "50%", calibration=images.x_train[:200])
    small.compile(keras.optimizers.Adam(3e-4), "sparse_categorical_crossentropy")
    small.fit(*data, epochs=4, batch_size=64, verbose=0)
    return small, images.x_train[:200], (images.x_test, images.y_test)


def of_cifar(data, networks, random_seed):
    """The same for a trained network of benchmarks/recovery.py, which is recovered instead of fine-tuned."""
    images = km.datasets.load(data, image_size=16, seed=random_seed)
    seed = keras.models.load_model(networks / f"ResNet20-{random_seed}.keras", compile=False)
    small = km.prune(seed, "50%", calibration=images.x_train[:512])
    return small, images.x_train[:200], (images.x_test, images.y_test)


def large(name):
    model = km.zoo.build(name, input_shape=(96, 96, 3), classes=10)
    return km.prune(model, "50%"), np.random.default_rng(0).random((16, 96, 96, 3), np.float32), None


def measure(network, model, images, test, kind, random_seed, environment):
    runtime = RUNTIMES[FORMATS[kind].runtime]
    with tempfile.TemporaryDirectory() as folder:
        name = f"small{runtime.suffix}"
        before = km.export(model, Path(folder) / "before" / name)
        after = km.export(model, Path(folder) / name, int8=images)
        right = ["" if test is None else accuracy(km.open_exported(each.path), *test) for each in (before, after)]
    return {
        "date": f"{datetime.date.today()}",
        "network": network,
        "random_seed": random_seed,
        "parameters": model.count_params(),
        "format": kind,
        "float32_bytes": before.bytes,
        "int8_bytes": after.bytes,
        "float32_accuracy": right[0] if test is None else f"{right[0]:.4f}",
        "int8_accuracy": right[1] if test is None else f"{right[1]:.4f}",
        "test_images": 0 if test is None else len(test[1]),
        "runtime": f"{runtime.package} {runtime.version}",
        **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")},
        "command": "python benchmarks/eight_bits.py"
        + (" --data cifar10.zip --networks FOLDER" if "cifar" in network else ""),
    }


def table():
    found = {(row["network"], row["random_seed"], row["format"]): row for row in rows_at(RESULTS)}
    lines = [
        "| network | random seed | parameters | format | bytes, float32 | int8 | share | accuracy, float32 | int8 |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in found.values():
        before, after = int(row["float32_bytes"]), int(row["int8_bytes"])
        right = [f"{float(row[key]):.2%}" if row[key] else "" for key in ("float32_accuracy", "int8_accuracy")]
        lines.append(
            f"| {row['network']} | {row['random_seed']} | {int(row['parameters']):,} | {row['format']} | {before:,} | "
            f"{after:,} | {after / before:.1%} | {' | '.join(right)} |"
        )
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random-seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--large", nargs="*", default=["MobileNetV2"])
    parser.add_argument("--data", help="CIFAR-10 as an image zip")
    parser.add_argument("--networks", type=Path, help="folder of trained networks, for --data")
    arguments = parser.parse_args()
    environment = describe_environment()
    tasks = [(f"{name}, random weights", "", lambda name=name: large(name)) for name in arguments.large]
    for number in arguments.random_seeds:
        if arguments.data is None:
            tasks.append(("ResNet20, digits", number, lambda number=number: of_digits(number)))
        else:
            made = partial(of_cifar, arguments.data, arguments.networks, number)
            tasks.append((f"ResNet20, {Path(arguments.data).stem}", number, made))
    for network, number, make in tasks:
        model, images, test = make()
        for kind in KINDS:
            row = measure(network, model, images, test, kind, number, environment)
            append(RESULTS, row)
            print(*(f"{key}={row[key]}" for key in tuple(row)[1:10]), flush=True)
        before, _, rest = PAGE.read_text().partition(BEGIN)
        write_text(PAGE, before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
