"""Training on a folder of images: read from disk, or from memory; speed and memory.

    KERAS_BACKEND=torch python benchmarks/streaming.py FOLDER [--network ResNet20] [--images 5000] [--rounds 7]
    KERAS_BACKEND=torch python benchmarks/streaming.py FOLDER --peak [--network ResNet20]
    python benchmarks/streaming.py FOLDER --decode [--image-size 224]

The first trains on the same images from memory and from disk in alternation, and gives the ratio of images per second in each
pair: median and quartiles; on a machine that others use, the processor time per image is what can be relied on. The second
trains for one epoch on all images and gives the peak of resident memory above that of the process with the model built and
a first step done. The third decodes without training, in 1, 2, 4 ... threads. Appends to benchmarks/results/streaming.csv.
"""

import argparse
import datetime
import itertools
import os
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).parents[1]
from rows import append

import keras_morph as km
from keras_morph.datasets import streams
from keras_morph.runs import describe_environment
from keras_morph.training.recipe import fit_on

RESULTS = ROOT / "benchmarks" / "results" / "streaming.csv"


def resident():
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """The largest resident memory between start and stop, looked at a hundred times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.over = 0, False

    def run(self):
        while not self.over:
            self.largest = max(self.largest, resident())
            time.sleep(0.01)

    def stop(self):
        self.over = True
        self.join()
        return self.largest


def network_for(name, data):
    model = km.zoo.build(name, input_shape=data.image_shape, classes=data.num_classes)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def timed(action):
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(arguments):
    """Ratio of the speeds, disk to memory, in each pair of trainings."""
    data = km.datasets.load(arguments.folder, stream=True, image_size=arguments.image_size, validation_split=0)
    print(data)
    count = arguments.images
    disk, labels = data.x_train[:count], data.y_train[:count]
    memory = np.asarray(disk)
    model = network_for(arguments.network, data)
    batches = {
        name: streams.Batches(images, labels, arguments.batch_size, seed=0)
        for name, images in (("memory", memory), ("disk", disk))
    }
    for each in batches.values():
        model.fit(each, shuffle=False, epochs=1, verbose=0, steps_per_epoch=3)
    pairs = []
    for number in range(arguments.rounds):
        order = sorted(batches, reverse=number % 2)
        pairs.append({name: timed(lambda: model.fit(batches[name], shuffle=False, verbose=0)) for name in order})  # noqa: B023
        print(
            {name: f"{count / wall:.0f}/s, {cpu / count * 1e3:.3f} CPU ms" for name, (wall, cpu) in pairs[-1].items()}
        )
    ratios = [pair["memory"][0] / pair["disk"][0] for pair in pairs]
    costs = [pair["memory"][1] / pair["disk"][1] for pair in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "what": f"speed from disk / from memory, {count} images of {data.image_shape}, batches of {arguments.batch_size}",
        "network": arguments.network,
        "value": f"{middle:.3f}",
        "spread": f"{low:.3f} to {high:.3f}",
        "n": len(ratios),
        "memory": f"{count / statistics.median(pair['memory'][0] for pair in pairs):.0f} images/s",
        "note": f"processor time {statistics.median(costs):.3f} of it",
    }


def peak(arguments):
    """Peak of resident memory above the model."""
    data = km.datasets.load(arguments.folder, stream=arguments.stream, image_size=arguments.image_size, limit=100)
    model = network_for(arguments.network, data)
    first = np.asarray(data.x_train[: arguments.batch_size]), data.y_train[: arguments.batch_size]
    model.fit(*first, batch_size=arguments.batch_size, verbose=0)
    before, watch = resident(), Peak()
    watch.start()
    start = time.perf_counter()
    data = km.datasets.load(arguments.folder, stream=arguments.stream, image_size=arguments.image_size)
    print(data, f"\nloaded in {time.perf_counter() - start:.1f} s", flush=True)
    fit_on(
        model,
        data.training(arguments.batch_size, 0),
        arguments.batch_size,
        seed=0,
        validation_data=data.validation(arguments.batch_size),
        verbose=0,
    )
    seconds = time.perf_counter() - start
    return {
        "what": f"peak memory above the model, {len(data.x_train)} images of {data.image_shape}, one epoch",
        "network": arguments.network,
        "value": f"{(watch.stop() - before) / 1e9:.3f} GB",
        "spread": "",
        "n": 1,
        "memory": f"{before / 1e9:.2f} GB before",
        "note": f"{'from disk' if data.streamed else 'in memory'}, {seconds:.0f} s",
    }


def decode(arguments):
    """Images per second without training."""
    data = km.datasets.load(
        arguments.folder, stream=True, image_size=arguments.image_size, validation_split=0, limit=arguments.images
    )
    images, rates = data.x_train, []
    parts = np.array_split(np.arange(len(images)), max(1, len(images) // 64))
    cores = len(os.sched_getaffinity(0))
    for number in itertools.takewhile(lambda n: n <= max(2, 2 * cores), (2**k for k in itertools.count())):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(number) as pool:
            wall, cpu = timed(lambda: list(pool.map(images.__getitem__, parts)))
        rates.append(f"{number} threads {len(images) / wall:.0f}/s ({cpu / len(images) * 1e3:.3f} CPU ms)")
        print(rates[-1], flush=True)
    return {
        "what": f"decode rate, {len(images)} images, to {data.image_shape}",
        "network": "",
        "value": "; ".join(rates),
        "spread": "",
        "n": 1,
        "memory": "",
        "note": f"{cores} cores",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--network", default="ResNet20")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--peak", action="store_true")
    parser.add_argument("--in-memory", action="store_false", dest="stream")
    parser.add_argument("--decode", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    row = (peak if arguments.peak else decode if arguments.decode else speed)(arguments)
    environment = describe_environment()
    row |= {name: environment[name] for name in ("backend", "backend_version", "keras", "cpu", "cores")}
    row |= {
        "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
        "date": f"{datetime.date.today()}",
        "command": f"KERAS_BACKEND={keras.backend.backend()} python benchmarks/streaming.py "
        + " ".join(["FOLDER", *sys.argv[2:]]),
    }
    append(RESULTS, row)
    print(row)


if __name__ == "__main__":
    main()
