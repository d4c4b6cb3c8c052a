"""`keras-morph shrink MODEL --budget 50%`: from a model and a budget to a smaller model, in one run folder."""

import sys
from pathlib import Path
from typing import Annotated

import keras
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from keras_morph.cli.choices import (
    Grouped,
    Protect,
    Tie,
    check_folder,
    check_number,
    cost_of,
    load_model,
    optimizer_of,
    regularizer_of,
    wiring_of,
)
from keras_morph.costs.budget import Budget, parse_budget
from keras_morph.costs.costs import FLOPs, ModelSize
from keras_morph.costs.measured import Measured, measure
from keras_morph.datasets import Dataset, load
from keras_morph.errors import KerasMorphError
from keras_morph.graph.tracing import trace
from keras_morph.pipeline import Shrunk
from keras_morph.pipeline import shrink as shrink_model
from keras_morph.report import report
from keras_morph.runs import describe_environment, new_run_folder, save_model, write_json
from keras_morph.search.selection import fit_budget, reach
from keras_morph.training.callbacks import EpochLog
from keras_morph.training.learner import StructureLearner
from keras_morph.training.recipe import Recipe, cosine


def shrink(
    model: Annotated[str, typer.Argument(help="a zoo name, a .keras file, or package.module:function")],
    budget: Annotated[str, typer.Option(help='"50%" of the seed, "300M", "2MB", "5ms", or a number')] = "50%",
    data: Annotated[
        str, typer.Option(help="digits, mnist, cifar10, ..., an image folder or zip, an .npz, tfds:NAME")
    ] = "digits",
    cost: Annotated[str, typer.Option(help="FLOPs, ModelSize, Activations or Latency")] = "FLOPs",
    hardware: Annotated[str, typer.Option(help="for Latency: V100, P100, T4, ..., or Others")] = "V100",
    peak_flops: Annotated[float | None, typer.Option(help="for Others: FLOP/s")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="for Others: bytes/s")] = None,
    regularizer: Annotated[str, typer.Option(help="GroupLasso, Gamma or LogisticSigmoid")] = "Gamma",
    threshold: Annotated[
        float | None, typer.Option(help="a channel is alive when its score is above; by default the regularizer's")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="factor of the penalty; by default it is controlled")] = None,
    per_cost: Annotated[
        float, typer.Option(help="0: the strongest channels live, 1: the strongest for what they cost")
    ] = 0.0,
    round_to: Annotated[int, typer.Option(help="widths become multiples of this, or stay whole")] = 1,
    rounds: Annotated[int, typer.Option(help="shrink, expand to the cost of the seed, and shrink again")] = 1,
    protect: Protect = None,
    tie: Tie = None,
    grouped: Grouped = "whole",
    distillation: Annotated[float, typer.Option(help="share of the seed's answers in the loss of fine-tuning")] = 0.0,
    seed_epochs: Annotated[
        int | None, typer.Option(help="epochs to train the seed first; default 15, 0 for a .keras file")
    ] = None,
    epochs: Annotated[int, typer.Option(help="epochs to learn, fade and fine-tune, together")] = 30,
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 64,
    learning_rate: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw or rmsprop")] = "adam",
    image_size: Annotated[int | None, typer.Option(help="resize the images to this height and width")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many training images")] = None,
    log_dir: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs"),
    random_seed: Annotated[int, typer.Option(help="for weights, data order and everything else")] = 0,
) -> None:
    """Learn which channels a model needs, rebuild it within a budget, fine-tune it, and report."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    # Everything that can be wrong is found before anything is trained or written.
    target = cost_of(cost, hardware, peak_flops, bandwidth, arguments=("--cost", "--hardware"))
    scorer = regularizer_of(regularizer, threshold, argument="--regularizer")
    make_optimizer = optimizer_of(optimizer)
    wiring = wiring_of(protect, tie, grouped)
    for option, value, low, high in (
        ("--rounds", rounds, 1, 10**9),
        ("--epochs", epochs, 3 * rounds, 10**9),
        ("--round-to", round_to, 1, 10**9),
        ("--per-cost", per_cost, 0, float("inf")),
        ("--distillation", distillation, 0, 1),
        ("--batch-size", batch_size, 1, 10**9),
        ("--seed-epochs", seed_epochs, 0, 10**9),
        ("--strength", strength, 0, float("inf")),
        ("--random-seed", random_seed, 0, 2**32 - 1),
    ):
        check_number(option, value, low, high)
    check_number("--learning-rate", learning_rate, 0, above=True)
    check_folder("--log-dir", log_dir)
    allowed = Budget(budget, target, round_to=round_to, per_cost=per_cost)
    for part, text in allowed.amounts():
        parse_budget(text, part, 1.0)
    keras.utils.set_random_seed(random_seed)
    dataset = load(data, image_size=image_size, limit=limit, seed=random_seed)
    seed = load_model(model, input_shape=dataset.image_shape, classes=dataset.num_classes)
    graph = trace(seed, **wiring)
    untrained = StructureLearner(graph, regularizer=scorer, cost=target)
    fit_budget(untrained, allowed)
    reaches = [reach(untrained, part) for part, _ in allowed.amounts()]
    _check_fits(seed, dataset)
    folder = new_run_folder(log_dir)
    write_json(folder / "config.json", {"command": "shrink", "options": options, **describe_environment()})
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print("\n".join([str(dataset), *map(str, reaches), f"run folder: {folder}"]), highlight=False)

    pair, held_out = (dataset.x_train, dataset.y_train), (dataset.x_val, dataset.y_val) if len(dataset.x_val) else None
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not _ends_in_softmax(seed))
    trainings = (0 if model.endswith(".keras") else 15) if seed_epochs is None else seed_epochs
    before = EpochLog(folder / "history.csv", phase="seed", line=print)
    if trainings:
        steps = -(-len(dataset.x_train) // batch_size)
        seed.compile(make_optimizer(cosine(learning_rate, steps * trainings)), loss, metrics=["accuracy"])
        seed.fit(
            *pair, batch_size=batch_size, epochs=trainings, validation_data=held_out, verbose=0, callbacks=[before]
        )
    save_model(seed, folder / "seed.keras")
    recipe = Recipe(
        epochs=epochs,
        learning_rate=learning_rate,
        optimizer=make_optimizer,
        loss=loss,
        metrics=["accuracy"],
        batch_size=batch_size,
        rounds=rounds,
        strength=strength,
        distillation=distillation,
    )
    result = shrink_model(
        graph, allowed, pair, validation_data=held_out, regularizer=scorer, recipe=recipe, run=folder, verbose=2
    )
    if rounds == 1:  # later rounds begin with other networks
        save_model(seed, folder / "seed.keras")
    times = measure({"seed": seed, "small": result.small}, batch_size=256)
    table = _results(seed, result, dataset, times)
    report(seed, result.small, history=before.rows + result.history, results=table).save(folder)
    console.print(_table(table, times, dataset))
    console.print(f"small.keras, structure.json, report.html and more are in {folder}", highlight=False)


def _check_fits(seed: keras.Model, dataset: Dataset) -> None:
    """The model takes these images and tells these classes apart."""
    wanted, given = seed.input_shape, (None, *dataset.image_shape)
    if len(wanted) != 4 or any(w is not None and g is not None and w != g for w, g in zip(wanted, given, strict=True)):
        raise KerasMorphError(
            f"{seed.name} expects inputs of shape {wanted}. Received: images of {dataset.image_shape}; "
            "give --image-size, or build the model for these images."
        )
    if len(seed.outputs) != 1 or seed.output_shape[-1] != dataset.num_classes:
        raise KerasMorphError(
            f"{seed.name} gives outputs of shape {seed.output_shape}. Expected: one score for each of the "
            f"{dataset.num_classes} classes of {dataset.name}."
        )


def _ends_in_softmax(model: keras.Model) -> bool:
    last = model.layers[-1]
    return isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax


def _accuracy(model: keras.Model, dataset: Dataset) -> float:
    predictions = model.predict(dataset.x_test, batch_size=256, verbose=0)
    return float(np.mean(np.argmax(predictions, axis=-1) == dataset.y_test))


def _results(
    seed: keras.Model, result: Shrunk, dataset: Dataset, times: dict[str, Measured]
) -> dict[str, dict[str, str]]:
    small = result.small
    tuned = _accuracy(small, dataset)
    tuned_weights = small.get_weights()
    small.set_weights(result.rebuilt_weights)
    rebuilt = _accuracy(small, dataset)
    small.set_weights(tuned_weights)

    def row(accuracy: float, model: keras.Model, time: str) -> dict[str, str]:
        return {
            "test accuracy": f"{accuracy:.2%}",
            "FLOPs": f"{FLOPs()(model):,.0f}",
            "parameters": f"{ModelSize()(model):,.0f}",
            f"ms / {times[time].batch_size} images": str(times[time]).replace(" ms", ""),
        }

    return {
        "seed": row(_accuracy(seed, dataset), seed, "seed"),
        "trained, before the cut": row(_accuracy(result.learner, dataset), result.learner.seed, "seed"),
        "rebuilt, right after it": row(rebuilt, small, "small"),
        "fine-tuned": row(tuned, small, "small"),
    }


def _table(results: dict[str, dict[str, str]], times: dict[str, Measured], dataset: Dataset) -> Table:
    ratio = times["seed"].median / times["small"].median
    table = Table(
        title=f"{dataset.name}, {len(dataset.x_test)} test images; {ratio:.2f}x as fast, "
        f"median (10 % to 90 %) of {times['seed'].rounds} rounds in alternation",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in next(iter(results.values())):
        table.add_column(column, justify="right", no_wrap=True)
    for name, values in results.items():
        table.add_row(name, *values.values())
    return table
