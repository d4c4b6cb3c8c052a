"""How accurate small networks are: learned structures against uniform widths, one-shot pruning, and Torch-Pruning.

    python benchmarks/quality.py --data cifar10.zip          ResNet20, 16x16 images, 20 epochs in all
    python benchmarks/quality.py --data digits               DigitsResNet on scikit-learn's digits, minutes

Every arm has the same training images in the same order, flipped and shifted alike (a function of the random seed and the
epoch), the same batches, epochs in all, and optimizer, and one schedule: the peak learning rate for --learning of the epochs,
then one cosine to 0, where the optimizer begins anew. Widths are not rounded, but for the last arm of ours:

    dense             the whole network
    uniform           all widths times one factor, from scratch
    one-shot SCORES   the dense network where the cosine begins, cut at once, fine-tuned
    recovered SCORES  the same, with what was lost regressed back from 512 training images before the fine-tuning
    shrink            keras_morph.shrink of a fresh network, defaults: GroupLasso's penalty, channels chosen by contribution
    Gamma, GroupLasso, LogisticSigmoid       the same under this regularizer, whose scores choose
    ... faded         the same with Recipe(fading=0.3): channels fade to zero at full width before they are cut
    from scratch      Gamma's structure with fresh weights
    Gamma rounded     with Budget(round_to="auto")
    Torch-Pruning ... the same initial weights carried into PyTorch, trained there under Torch-Pruning's regularizer (for
                      Taylor the dense network), cut where the cosine begins, carried back and fine-tuned as all others

Where there are several --learning-rates or --strengths (of Torch-Pruning's regularizers), all are tried with the random
seeds of --tuning-seeds; the other seeds take what was best on validation images. With --tuned-at, for settings that take
long, all seeds take what was best at that number of epochs. The test images were looked at once per row. One row of
benchmarks/results/quality.csv per arm, budget, setting and random seed; rows that are there are not run again. Networks
and structures that several arms need lie in --cache. Writes docs/quality.md.
"""

import argparse
import datetime
import time
from fractions import Fraction
from functools import reduce
from pathlib import Path

import keras
import numpy as np
from rows import append, rows_at

import keras_morph as km
from keras_morph.datasets import load
from keras_morph.graph.structure import graph_and_structure
from keras_morph.pipeline import cosine
from keras_morph.runs import describe_environment, save_model
from keras_morph.training.recipe import fit_on

RESULTS = Path(__file__).parent / "results" / "quality.csv"
TABLE = Path(__file__).parents[1] / "docs" / "quality.md"
FLOPS = km.FLOPs()
SCORES = {
    "random": lambda model, trial: np.random.default_rng(trial.random_seed).random(km.trace(model).num_groups),
    "GroupLasso": lambda *_: km.GroupLasso(),
    "Gamma": lambda *_: km.Gamma(),
    "Taylor": lambda model, trial: km.taylor_scores(model, trial.images(1024), loss="sparse_categorical_crossentropy"),
    "contribution": lambda model, trial: km.contribution_scores(model, trial.images(512)[0]),
}
LEARNED = {
    "shrink": lambda: None,
    "Gamma": km.Gamma,
    "GroupLasso": km.GroupLasso,
    "LogisticSigmoid": km.LogisticSigmoid,
}
PEERS = ("group sparsity", "BN scale", "Taylor")
SPARSE = ("Torch-Pruning group sparsity", "Torch-Pruning BN scale")  # trained under a strength
ARMS = (
    "dense",
    "uniform",
    *(f"one-shot {name}" for name in SCORES),
    "recovered GroupLasso",
    "recovered contribution",
    *LEARNED,
    *(f"{name} faded" for name in LEARNED if name != "shrink"),
    "from scratch",
    "Gamma rounded",
    *(f"Torch-Pruning {name}" for name in PEERS),
)
INTRODUCTION = """\
# How accurate the small networks are

Written by `python benchmarks/quality.py`, not by hand; every row, with its command, is in `benchmarks/results/quality.csv`.
All arms but the dense one keep to the budget of FLOPs, counted by `km.FLOPs` for all. Every arm has the same training images in
the same order, flipped and shifted alike, the same batches, number of epochs and optimizer (Adam), and the same schedule:
a peak learning rate for the first {learning} of the epochs, then one cosine to 0. Of several rates and strengths in a command
each arm has the best by its mean accuracy on validation images, two compared over the random seeds that ran with both (at least
random seed 0), which are in the means too; with `--tuned-at 20` those that were best at 20 epochs when it ran. Not every arm
was run in every setting. The test images were looked at once per row; that channels do not fade by default was chosen by test
accuracies, at a rate of 0.002.
Means and standard deviations over random seeds, in percent; columns *against* are the mean and the **standard error** of the
differences between rows of one random seed, which may come from two processors.

- **dense**: the whole network. **uniform**: all widths times one factor, from scratch.
- **one-shot**: the dense network where the cosine begins, cut at once by these scores, and fine-tuned. **recovered**: the same,
  with what the cut lost [regressed back](recovery.md) from 512 training images first.
- **shrink**: `keras_morph.shrink` of a fresh network, defaults: the penalty is GroupLasso's, and channels are chosen by what they
  contribute. **Gamma**, **GroupLasso**, **LogisticSigmoid**: the same with this regularizer, whose scores choose. **faded**:
  with `Recipe(fading=0.3)`, where the channels fade to zero at full width before they are cut.
- **from scratch**: Gamma's structure with fresh weights.
- Widths are not rounded, which by default they are: [what that costs](latency.md).
- **Torch-Pruning** 1.6.1: GroupNormPruner and BNScalePruner with sparse learning, and GroupTaylorImportance of the dense network
  in one shot, ranked over all layers in 400 small steps as in its own scripts for CIFAR, which train with a regularizer from
  trained weights, for longer, and by SGD: here all begin fresh and have Adam. The network is the same: Keras's weights are
  carried into PyTorch and back, and outputs agree. The strength of its regularizers is the best of those in the command, chosen
  as the rate is, of several that are level the first (on ResNet20 not all pairs of rate and strength were run); ours is
  controlled by `shrink`.
- *training compute*: images seen, times 3 times the FLOPs of the network as it is then, against the dense arm's. *full*: epochs
  at full width. *FLOPs*: what the result costs, in percent of the whole network.
- *before the cut*: validation accuracy there; *after it*: of the smaller network before any fine-tuning, with
  BatchNormalization's statistics estimated anew, or recovered. *seconds*: of processor time, where all arms had one processor.
"""
DIGITS = "up to 1,500 (of 1,797, 359 are for the test and 144 for validation: 1,294)"
SETTING = ("network", "data", "image_size", "training_images", "epochs", "batch_size", "learning")
PRINTED = (
    "arm",
    "budget",
    "random_seed",
    "strength",
    "validation",
    "test",
    "before_cut",
    "after_cut",
    "flops_share",
    "seconds",
)
KEY = ("arm", "budget", "random_seed", *SETTING, "learning_rate", "strength")


class Augmented(keras.utils.PyDataset):
    """Batches of images, each shifted by up to an eighth of its size and, where that makes sense, flipped.

    Order and changes are a function of the random seed and the epoch, whoever asks.
    """

    def __init__(self, x, y, batch_size, random_seed, flip):
        super().__init__()
        self.x, self.y, self.batch_size, self.random_seed, self.flip = x, y, batch_size, random_seed, flip
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.order = np.random.default_rng((self.random_seed, epoch)).permutation(len(self.x))

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index):
        random = np.random.default_rng((self.random_seed, self.epoch, index))
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        n, size = len(chosen), self.x.shape[1]
        most = size // 8
        padded = np.pad(self.x[chosen], ((0, 0), (most, most), (most, most), (0, 0)), mode="reflect")
        rows, columns = random.integers(0, 2 * most + 1, (2, n, 1)) + np.arange(size)
        if self.flip:
            columns = np.where(random.random((n, 1)) < 0.5, columns[:, ::-1], columns)
        return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]], self.y[chosen]


class Trial:
    """One random seed's data and network; an arm is a method that returns a trained model and figures of its training.

    Figures: `full_epochs` at full width, `compute` in FLOPs of training, `before_cut` and `after_cut`, validation accuracies.
    """

    def __init__(self, options, random_seed):
        self.options, self.random_seed = options, random_seed
        data = load(options.data, image_size=options.image_size, seed=random_seed)
        chosen = slice(options.training_images)
        self.data, x, y = data, data.x_train[chosen], data.y_train[chosen]
        self.batches = Augmented(x, y, options.batch_size, random_seed, flip=options.data != "digits")
        self.held = round(options.learning * options.epochs)

    def images(self, count):
        """The first training images and their labels."""
        return self.batches.x[:count], self.batches.y[:count]

    def network(self):
        keras.utils.set_random_seed(self.random_seed)
        return km.zoo.build(self.options.network, input_shape=self.data.image_shape, classes=self.data.num_classes)

    def train(self, model, start=0, stop=None):
        """Epochs `start` to `stop` of the schedule; both lie where a part of it begins or ends."""
        rate, epochs = self.options.learning_rate, self.options.epochs
        annealed = cosine(rate, len(self.batches) * (epochs - self.held))
        for first, last, here in ((0, self.held, rate), (self.held, epochs, annealed)):
            if max(first, start) < min(last, stop or epochs):
                model.compile(keras.optimizers.Adam(here), "sparse_categorical_crossentropy", metrics=["accuracy"])
                fit_on(
                    model,
                    self.batches,
                    self.options.batch_size,
                    seed=self.random_seed,
                    first=first,
                    epochs=last - first,
                    verbose=0,
                )
        return model

    def compute(self, model, full_epochs):
        """FLOPs of training: forward and twice as much backward, the first epochs at full width."""
        small_epochs = self.options.epochs - full_epochs
        return 3 * len(self.batches.x) * (full_epochs * FLOPS(self.network()) + small_epochs * FLOPS(model))

    def validation(self, model):
        return accuracy(model, self.data.x_val, self.data.y_val)

    def file(self, name):
        options = self.options
        setting = "-".join(str(getattr(options, each)) for each in SETTING if each != "data")
        return options.cache / f"{setting}-{options.learning_rate}-{self.random_seed}-{name}"

    def dense_at_cut(self):
        """The whole network where the cosine begins, and the seconds that it took; trained once for all arms."""
        path, seconds = self.file("dense.keras"), self.file("dense.txt")
        if not seconds.exists():
            start = time.process_time()
            save_model(self.train(self.network(), stop=self.held), path)
            seconds.write_text(f"{time.process_time() - start:.0f}")
        return keras.models.load_model(path), float(seconds.read_text())

    def run(self, arm, budget):
        kind, _, name = arm.partition(" ")
        start, earlier = time.process_time(), 0.0
        if arm == "dense":
            dense, earlier = self.dense_at_cut()
            start = time.process_time()
            model, figures = self.train(dense, start=self.held), {"full_epochs": self.options.epochs}
        elif arm == "uniform":
            model, figures = self.train(uniform(self.network(), budget)), {"full_epochs": 0}
        elif kind in ("one-shot", "recovered"):
            dense, earlier = self.dense_at_cut()
            start = time.process_time()
            model, figures = self.one_shot(dense, name, budget, recovers=kind == "recovered")
        elif kind == "Torch-Pruning":
            if name == "Taylor":
                dense, earlier = self.dense_at_cut()
                start = time.process_time()
            model, figures, shared = self.peer(name, budget)
            earlier += shared
        elif arm == "from scratch":
            if not self.file(f"{budget}.json").exists():
                self.learn("Gamma", budget)
                start = time.process_time()
            fresh = km.rebuild(self.network(), km.Structure.load(self.file(f"{budget}.json")), weights=False)
            model, figures = self.train(fresh), {"full_epochs": 0}
        else:
            model, figures = self.learn(arm, budget)
        figures["compute"] = self.compute(model, figures["full_epochs"])
        return model, {**figures, "seconds": earlier + time.process_time() - start}

    def one_shot(self, dense, scores, budget, *, recovers):
        full = km.Budget(budget, FLOPS, round_to=1, per_cost=float(scores == "contribution"))
        structure = km.fit_budget(dense, full, scores=SCORES[scores](dense, self))
        small = km.rebuild(dense, structure)
        if recovers:
            km.recover(small, dense, structure, self.images(512)[0])
        return self.tuned(small, self.validation(dense), recovered=recovers)

    def tuned(self, small, before, *, recovered=False):
        """A smaller network trained along the cosine."""
        if not recovered:
            km.reestimate_statistics(small, self.batches)
        figures = {"full_epochs": self.held, "before_cut": before, "after_cut": self.validation(small)}
        return self.train(small, start=self.held), figures

    def peer(self, kind, budget):
        """One of Torch-Pruning's arms, and the seconds that its training at full width took where another budget paid them."""
        import torch_pruning_arms as peers

        sparse, earlier = kind in peers.PRUNERS, 0.0
        network = self.network() if sparse else self.dense_at_cut()[0]
        twin = peers.twin_of(network)
        pruner = peers.pruner_of(twin, self.data.image_shape, kind, self.options.strength)
        if sparse:  # its penalty does not ask for the budget: one training for all of them
            weights = self.file(f"{kind}-{self.options.strength}.pt")
            seconds = weights.with_suffix(".txt")
            if seconds.exists():
                peers.load(twin, weights)
                earlier = float(seconds.read_text())
            else:
                start = time.process_time()
                peers.learn_sparsity(twin, pruner, self.batches, self.held, self.options.learning_rate)
                peers.save(twin, weights)
                seconds.write_text(f"{time.process_time() - start:.0f}")
        else:
            self.batches.set_epoch(self.held)
            peers.gradients(twin, self.batches)
        before = self.validation(peers.keras_model(twin, network))
        return (*self.tuned(peers.cut(twin, pruner, network, budget), before), earlier)

    def learn(self, arm, budget):
        name, _, variant = arm.partition(" ")
        recipe = km.Recipe(
            epochs=self.options.epochs,
            learning_rate=self.options.learning_rate,
            learning=self.options.learning,
            fading=0.3 if variant == "faded" else 0.0,
        )
        full = km.Budget(budget, FLOPS, round_to="auto" if variant == "rounded" else 1)
        result = km.shrink(self.network(), full, self.batches, regularizer=LEARNED[name](), recipe=recipe, verbose=0)
        if arm == "Gamma":
            result.structure.save(self.file(f"{budget}.json"))
        small, trained = result.small, result.small.get_weights()
        figures = {"full_epochs": sum(row["phase"] in ("learn", "fade") for row in result.history)}
        figures["before_cut"] = self.validation(result.learner)
        small.set_weights(result.reestimated_weights)
        figures["after_cut"] = self.validation(small)
        small.set_weights(trained)
        return small, figures


def uniform(seed, budget):
    """The network with all widths times one factor, the largest within a budget; fresh weights."""
    return km.rebuild(seed, uniform_counts(seed, budget), weights=False)


def uniform_counts(seed, budget):
    """Widths times the largest factor within a budget, by layer."""
    graph = km.trace(seed)
    limit = float(budget.rstrip("%")) / 100 * FLOPS(graph)
    fixed = {
        layer.name
        for layer in graph.layers
        if layer.made is not None and graph.pinned_mask[graph.group_of[layer.made]].all()
    }

    def scaled(factor):
        return {layer: max(1, round(factor * n)) for layer, n in graph.widths.items() if layer not in fixed}

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if FLOPS(graph, graph_and_structure(graph, scaled(middle))[1]) <= limit else (low, middle)
        )
    return scaled(low)


def accuracy(model, x, y):
    return float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(-1) == y))


def settings_of(options, arm, random_seed, budget, rows):
    """(learning rate, strength) to run: all of them with a random seed for tuning, else the best so far on validation images."""
    strengths = options.strengths if arm in SPARSE else [None]
    settings = [(rate, strength) for rate in options.learning_rates for strength in strengths]
    if len(settings) == 1 or (random_seed in options.tuning_seeds and not options.tuned_at):
        return settings
    key = {"arm": arm, "budget": budget, **setting_of(options)}
    if options.tuned_at:
        key["epochs"] = options.tuned_at
    here = [row for row in rows if all(row[name] == str(value) for name, value in key.items())]
    wanted = {(str(rate), str(strength or "")): (rate, strength) for rate, strength in settings}
    tuned = best([row for row in here if _tuned_by(row) in wanted])
    if tuned is None:
        first = f"--epochs {options.tuned_at}" if options.tuned_at else f"the random seeds {options.tuning_seeds}"
        raise SystemExit(f"{arm}: run {first} first, which tunes it")
    return [wanted[tuned]]


def setting_of(options):
    return {name: getattr(options, name) for name in SETTING} | {"data": Path(options.data).stem}


def _tuned_by(row):
    return row["learning_rate"], row["strength"]


def best(rows):
    """The (learning rate, strength) of the highest mean validation accuracy; two are compared over the random seeds of both."""
    pairs = sorted(set(map(_tuned_by, rows)), key=lambda pair: [float(number or 0) for number in pair])
    return _highest({pair: [row for row in rows if _tuned_by(row) == pair] for pair in pairs})


def _highest(groups):
    """Of groups of rows the first of the highest mean validation accuracy; two are compared over the random seeds of both."""
    scores = {key: {row["random_seed"]: Fraction(row["validation"]) for row in rows} for key, rows in groups.items()}

    def higher(one, other):
        common = scores[one].keys() & scores[other].keys()
        return other if sum(scores[other][s] for s in common) > sum(scores[one][s] for s in common) else one

    return reduce(higher, scores) if scores else None


def table(rows):
    """docs/quality.md: a section per set-up, a line per budget and arm."""
    text = INTRODUCTION.format(learning=f"{float(rows[0]['learning']):.0%}")
    for command in dict.fromkeys(row["command"] for row in rows):
        here = [row for row in rows if row["command"] == command]
        one, rates = here[0], sorted({row["learning_rate"] for row in here}, key=float)
        images = f"{int(one['training_images']):,}" if one["data"] != "digits" else DIGITS
        devices, days = (sorted({row[name] for row in here}) for name in ("cpu", "date"))
        text += (
            f"\n## {one['network']} on {one['data']}, {one['epochs']} epochs, at a peak rate of {' or '.join(rates)}\n\n"
            f"`KERAS_BACKEND={one['backend']} {command}`: {images} training images of "
            f"{one['image_size']}x{one['image_size']}, {one['epochs']} epochs in all, Keras {one['keras']} on {one['backend']} "
            f"{one['backend_version']}, {' and '.join(devices)}, {' and '.join(days)}.\n"
        )
        groups = {}
        for budget, arm in sorted({(row["budget"], row["arm"]) for row in here}, key=_place):
            group = [row for row in here if (row["budget"], row["arm"]) == (budget, arm)]
            tuned = best(group)
            groups[budget, arm] = {row["random_seed"]: row for row in group if _tuned_by(row) == tuned}
        for budget in dict.fromkeys(budget for budget, _ in groups if budget != "100%"):
            text += _section(budget, groups)
    return text


def _section(budget, groups):
    arms = {arm: group for (where, arm), group in groups.items() if where in ("100%", budget)}
    peer = best_peer(arms)
    against = {"uniform": "uniform", "dense": "dense", "Torch-Pruning": peer}
    compute = {seed: float(row["compute"]) for seed, row in arms.get("dense", {}).items()}
    alike = len({row["cpu"] for group in arms.values() for row in group.values()}) == 1  # processors
    text = f"\n### {budget} of the FLOPs\n\n"
    if peer:
        alone = sum(arm.startswith("Torch-Pruning") for arm in arms) == 1
        which = (
            "The only arm of Torch-Pruning that was run" if alone else "Torch-Pruning's best arm on validation images"
        )
        text += f"{which}: {peer.removeprefix('Torch-Pruning ')}.\n\n"
    text += (
        "| arm | test accuracy | n | against uniform | against dense | against Torch-Pruning's best | training compute | full "
        "| before the cut | after it | FLOPs | parameters | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for arm, group in arms.items():
        rows = list(group.values())
        shares = [float(row["compute"]) / compute[seed] for seed, row in group.items() if seed in compute]
        cells = [
            arm,
            spread([float(row["test"]) for row in rows]),
            str(len(rows)),
            *("" if arm == other or other not in arms else paired(group, arms[other]) for other in against.values()),
            f"{np.mean(shares):.2f}" if shares else "",
            f"{np.mean([int(row['full_epochs']) for row in rows]):.0f}",
            *(spread([float(row[name]) for row in rows if row[name]]) for name in ("before_cut", "after_cut")),
            f"{100 * np.mean([float(row['flops_share']) for row in rows]):.1f}",
            f"{np.mean([int(row['parameters']) for row in rows]):,.0f}",
            f"{np.mean([float(row['seconds']) for row in rows]):.0f}" if alike else "",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def best_peer(arms):
    """Torch-Pruning's arm of the highest mean validation accuracy; two are compared over the random seeds of both."""
    return _highest({arm: list(group.values()) for arm, group in arms.items() if arm.startswith("Torch-Pruning")})


def _place(pair):
    return -float(pair[0].rstrip("%")), ARMS.index(pair[1])


def spread(values):
    """Mean and standard deviation in percent."""
    if not values:
        return ""
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


def paired(rows, others):
    """Mean and standard error of the differences between rows of one random seed, in percent."""
    differences = [100 * (float(rows[seed]["test"]) - float(others[seed]["test"])) for seed in rows if seed in others]
    if not differences:
        return ""
    error = f" ± {np.std(differences, ddof=1) / len(differences) ** 0.5:.1f}" if len(differences) > 1 else ""
    return f"{np.mean(differences):+.1f}{error}"


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _several(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an image zip or folder, or digits")
    parser.add_argument("--network")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--training-images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning", type=float, default=0.4, help="share of the epochs at the peak learning rate")
    parser.add_argument("--learning-rates", type=_several(float), default=[2e-3])
    parser.add_argument(
        "--strengths", type=_several(float), default=[1e-4, 5e-4, 2e-3, 1e-2], help="of Torch-Pruning's penalties"
    )
    parser.add_argument(
        "--tuning-seeds", type=_several(int), default=[0], help="try all rates and strengths with these"
    )
    parser.add_argument("--tuned-at", type=int, help="take rates and strengths that were best at this number of epochs")
    parser.add_argument("--budgets", type=_several(str), default=["50%", "25%"])
    parser.add_argument("--random-seeds", type=_several(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", type=_several(str), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--cache", type=Path, default=RESULTS.with_suffix(""), help="for what several arms need")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"--arms: expected {', '.join(ARMS)}; received {', '.join(unknown)}")
    options.cache.mkdir(parents=True, exist_ok=True)
    complete(options)
    environment = {
        k: v for k, v in describe_environment().items() if k in ("backend", "backend_version", "keras", "cpu", "cores")
    }
    command = f"python benchmarks/quality.py --data {Path(options.data).name} " + " ".join(
        f"--{name.replace('_', '-')} {_text(getattr(options, name))}"
        for name in (*SETTING, "learning_rates", "strengths", "tuning_seeds")
        if name != "data"
    )
    if options.tuned_at:
        command += f" --tuned-at {options.tuned_at}"
    for random_seed in options.random_seeds:
        trial = Trial(options, random_seed)
        for arm in options.arms:
            for budget in ["100%"] if arm == "dense" else options.budgets:
                rows = rows_at(options.output)
                for rate, strength in settings_of(options, arm, random_seed, budget, rows):
                    options.learning_rate, options.strength = rate, strength
                    key = {"arm": arm, "budget": budget, "random_seed": random_seed, **setting_of(options)}
                    key |= {"learning_rate": rate, "strength": "" if strength is None else strength}
                    if any(all(row[name] == str(key[name]) for name in KEY) for row in rows):
                        continue
                    model, figures = trial.run(arm, budget)
                    row = {
                        **{name: key[name] for name in KEY},
                        "validation": f"{trial.validation(model):.4f}",
                        "test": f"{accuracy(model, trial.data.x_test, trial.data.y_test):.4f}",
                        **{n: f"{figures[n]:.4f}" if n in figures else "" for n in ("before_cut", "after_cut")},
                        "full_epochs": figures["full_epochs"],
                        "compute": f"{figures['compute']:.4g}",
                        "flops_share": f"{FLOPS(model) / FLOPS(trial.network()):.4f}",
                        "parameters": model.count_params(),
                        "seconds": f"{figures['seconds']:.0f}",
                        "date": f"{datetime.date.today()}",
                        **environment,
                        "command": command,
                    }
                    append(options.output, row)
                    print({name: row[name] for name in PRINTED}, flush=True)
                    if options.output == RESULTS:
                        TABLE.write_text(table(rows_at(RESULTS)), encoding="utf-8")
                    keras.backend.clear_session()


def complete(options):
    """Settings that were not given, which depend on the data."""
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


if __name__ == "__main__":
    main()
