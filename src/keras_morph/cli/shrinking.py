"""What `shrink` does: check what its options name, train the seed, shrink it, measure and report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
from rich.table import Table

from keras_morph.cli.choices import (
    accuracy_of,
    check_fits,
    cost_of,
    dataset_of,
    is_named,
    load_model,
    loss_of,
    optimizer_of,
    pixels_of,
    regularizer_of,
    wiring_of,
)
from keras_morph.cli.deploying import compare_speed, cost_of_time
from keras_morph.cli.options import formats_of, plain
from keras_morph.cli.resuming import say_finished, say_unfinished
from keras_morph.cli.shrink import Shrink
from keras_morph.costs.budget import Budget, parse_budget
from keras_morph.costs.costs import Cost, FLOPs, ModelSize
from keras_morph.costs.fitted import Coefficients
from keras_morph.datasets import Dataset
from keras_morph.errors import KerasMorphError
from keras_morph.exporting import check_formats
from keras_morph.families import folder_of, shrink_family
from keras_morph.graph.tracing import trace
from keras_morph.measuring import MeasuredLatency
from keras_morph.pipeline import Shrunk, settled
from keras_morph.pipeline import shrink as shrink_model
from keras_morph.reporting import report
from keras_morph.runs import describe_environment, going_on, new_run_folder, save_model, write_json, write_somewhere
from keras_morph.runtimes import installed
from keras_morph.search.selection import fit_budget, reach
from keras_morph.showing import console
from keras_morph.status import running
from keras_morph.timing import Conditions
from keras_morph.training.callbacks import EpochLog
from keras_morph.training.checkpoints import Saved, fit_resumably
from keras_morph.training.guards import is_trained
from keras_morph.training.learner import StructureLearner
from keras_morph.training.recipe import Recipe, cosine
from keras_morph.training.regularizers import Regularizer
from keras_morph.training.steps import jit_compiles

__all__ = ["run"]

SEED_EPOCHS = 15  # enough for 99 % on digits


@dataclass(frozen=True)
class _Plan:
    """What the options name."""

    budgets: tuple[Budget, ...]
    cost: Cost
    regularizer: Regularizer | None
    optimizer: Callable[..., keras.optimizers.Optimizer]
    wiring: dict[str, Any]


def run(options: Shrink) -> None:
    """Shrink, and write the run's folder. Everything that can be wrong is found before anything is trained or written."""
    if say_finished(options.resume):
        return
    start = time.monotonic()
    plan = _planned(options)
    if options.resume is None:
        say_unfinished("shrink", options)
    dataset = dataset_of(options)
    seed = load_model(options.model, input_shape=dataset.image_shape, classes=dataset.num_classes)
    reaches = [] if options.measures else _reaches(options, plan, seed)
    check_fits(seed, dataset)
    pixels = pixels_of(options.pixels, seed, dataset, named=is_named(options.model))
    dataset = dataset.in_pixels(pixels.pixels)

    folder = options.resume or new_run_folder(options.log_dir, name=options.name)
    screen = console()
    with running(folder):
        if options.resume is None:
            config = {"command": "shrink", "options": plain(options), **describe_environment()}
            write_json(folder / "config.json", config)
        screen.print("\n".join([str(dataset), str(pixels), *reaches, f"run folder: {folder}"]), soft_wrap=True)
        if options.measures:
            plan = _measured(options, plan, seed, folder)
            screen.print("\n".join(_reaches(options, plan, seed)), soft_wrap=True)
        before = _train_seed(options, plan, seed, dataset, folder)
        members = _shrunk(options, plan, seed, dataset, folder)
        if options.rounds == 1:  # later rounds begin with other networks
            write_somewhere(folder / "seed.keras", partial(save_model, seed))
        smalls = {place: result.small for place, result in members.items()}
        speeds = compare_speed(options, plan.budgets, seed, smalls, dataset)
        rows: dict[str, dict[str, str]] = {}
        seeds = accuracy_of(seed, dataset)
        for (place, result), budget in zip(members.items(), plan.budgets, strict=True):
            speed, figures = speeds[place], _figures(plan, budget, seed, result, dataset)
            results = _results(seed, seeds, result, figures["test_accuracy"], dataset, speed.rows)
            rows |= {"seed": results["seed"], str(budget.amount): results["fine-tuned"]}
            with going_on(place / "report.html"):
                report(
                    seed,
                    result.small,
                    history=before + result.history,
                    results=results,
                    cost=cost_of_time(budget),
                    benchmark=speed.benchmark,
                ).save(place)
            # Those of a family learn together, and a run that went on has been at work before.
            seconds = time.monotonic() - start if options.resume is None and len(members) == 1 else None
            with going_on(place / "results.json"):
                write_json(place / "results.json", {**figures, "seconds": seconds})
        if len(members) == 1:
            lines = [f"{dataset.name}, {len(dataset.x_test)} test images; {speed.headline}"]
            table = _table(results)
        else:
            names = (str(budget.amount) for budget in plan.budgets)
            lines = [f"{name}: {each.headline}" for name, each in zip(names, speeds.values(), strict=True)]
            table = _family_table(rows, dataset)
        screen.print("\n".join(lines), soft_wrap=True)
        screen.print(table)
        for line in dict.fromkeys(note for each in speeds.values() for note in each.notes):
            screen.print(line, soft_wrap=True)
        for failure in (each.failure for each in speeds.values()):
            if failure is not None:
                raise failure
    whose = "" if options.budgets is None else f", in {', '.join(place.name for place in members)}"
    screen.print(f"small.keras, structure.json, report.html and more are in {folder}{whose}", soft_wrap=True)


def _planned(options: Shrink) -> _Plan:
    """Everything that can be wrong without the data and the model is found here."""
    arguments = ("--cost", "--hardware")
    cost: Cost = cost_of(options.cost, options.hardware, options.peak_flops, options.bandwidth, arguments=arguments)
    if options.measures:
        assert options.latency is not None
        installed(options.latency)
        cost = MeasuredLatency.of(Conditions(options.latency, "", options.threads, 1, ""), Coefficients({}), "")
    elif options.latency is not None:
        cost = MeasuredLatency.load(options.latency)
        if options.threads not in (1, cost.conditions.threads):
            raise KerasMorphError(
                f"--threads {options.threads} expects a latency that was measured so. Received: {options.latency}, with "
                f"{cost.conditions.threads}; leave it out, or measure again."
            )
    if options.export is not None:
        check_formats(formats_of("--export", options.export), int8=options.int8)
    round_to = int(options.round_to) if options.round_to.isdecimal() else options.round_to
    plan = _Plan(
        tuple(Budget(text, cost, round_to=round_to, per_cost=options.per_cost) for text in options.amounts),
        cost,
        _regularizer_of(options),
        optimizer_of(options.optimizer),
        wiring_of(options.protect, options.tie, options.grouped),
    )
    for budget in plan.budgets:
        for part, text in budget.amounts():
            parse_budget(text, part, 1.0)
    return plan


def _regularizer_of(options: Shrink) -> Regularizer | None:
    if options.regularizer is None and options.threshold is None:
        return None
    return regularizer_of(options.regularizer or "GroupLasso", options.threshold, argument="--regularizer")


def _measured(options: Shrink, plan: _Plan, seed: keras.Model, folder: Path) -> _Plan:
    """The same with the latency of this very network, which is measured unless the run's folder has it already."""
    assert options.latency is not None
    graph, cache = trace(seed, **plan.wiring), folder / "latency.json"
    if cache.exists():  # a run that goes on keeps to what it began with, also on another processor
        cost = MeasuredLatency.load(cache)
    else:
        print(f"exporting and timing random structures in {options.latency}: some minutes")
        cost = MeasuredLatency(graph, runtime=options.latency, threads=options.threads, cache=cache)
    error = f"median error of the forecast {cost.coefficients.error:.1%}"
    print(f"{cost!r}: {cost(seed) * 1e3:.3g} ms for the seed, {error}")
    budgets = tuple(replace(budget, cost=cost) for budget in plan.budgets)
    return replace(plan, budgets=budgets, cost=cost)


def _reaches(options: Shrink, plan: _Plan, seed: keras.Model) -> list[str]:
    """What can be reached of each part of the budget.

    Raises:
        BudgetError: if it is less than what is asked for.
    """
    graph, known = trace(seed, **plan.wiring), bool(_seed_epochs(options)) or is_trained(seed)
    _, regularizer = settled(_recipe(options, plan, seed), plan.regularizer, graph, known=known)
    untrained = StructureLearner(graph, regularizer=regularizer, cost=plan.cost)
    for budget in plan.budgets:
        fit_budget(untrained, budget)
    parts = {repr(part): part for budget in plan.budgets for part, _ in budget.amounts()}
    return [str(reach(untrained, part)) for part in parts.values()]


def _seed_epochs(options: Shrink) -> int:
    default = 0 if options.model.endswith(".keras") else SEED_EPOCHS
    return default if options.seed_epochs is None else options.seed_epochs


def _train_seed(
    options: Shrink, plan: _Plan, seed: keras.Model, dataset: Dataset, folder: Path
) -> list[dict[str, Any]]:
    """Train the seed, if that is asked for; gives the rows of its history."""
    epochs = _seed_epochs(options)
    if not epochs:
        return []
    log = EpochLog(folder / "history.csv", phase="seed", line=print)
    steps = -(-len(dataset.x_train) // options.batch_size)
    optimizer = plan.optimizer(cosine(options.learning_rate, steps * epochs))
    seed.compile(optimizer, loss_of(seed), metrics=["accuracy"], jit_compile=jit_compiles())
    checkpoints = folder / "checkpoint" / "seed"
    fit_resumably(
        seed,
        dataset.training(options.batch_size, options.random_seed),
        options.batch_size,
        phase="seed",
        epochs=epochs,
        folder=checkpoints,
        saved=Saved.load(checkpoints / "last.npz"),
        callbacks=[log],
        seed=options.random_seed,
        validation_data=dataset.validation(options.batch_size),
        verbose=0,
    )
    return log.rows


def _shrunk(options: Shrink, plan: _Plan, seed: keras.Model, dataset: Dataset, folder: Path) -> dict[Path, Shrunk]:
    """The one call of `shrink`, or of `shrink_family`: a result for each budget's folder."""
    graph, data = trace(seed, **plan.wiring), dataset.training(options.batch_size, options.random_seed)
    how: dict[str, Any] = {
        "validation_data": dataset.validation(options.batch_size),
        "regularizer": plan.regularizer,
        "recipe": _recipe(options, plan, seed),
        "run": folder,
        "verbose": 2,
    }
    if options.budgets is None:
        return {folder: shrink_model(graph, plan.budgets[0], data, **how)}
    results = shrink_family(graph, plan.budgets, data, **how)
    return {folder / folder_of(budget): result for budget, result in zip(plan.budgets, results, strict=True)}


def _recipe(options: Shrink, plan: _Plan, seed: keras.Model) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        optimizer=plan.optimizer,
        loss=loss_of(seed),
        metrics=["accuracy"],
        batch_size=options.batch_size,
        rounds=options.rounds,
        strength=options.strength,
        scores=options.scores,
        distillation=options.distillation,
        learning=options.learning,
    )


def _results(
    seed: keras.Model, seeds: float, result: Shrunk, tuned: float, dataset: Dataset, times: dict[str, dict[str, str]]
) -> dict[str, dict[str, str]]:
    """The lines of the report; `seeds` and `tuned` are accuracies of the seed and of the smaller model, `times` more columns."""
    small = result.small
    faded = any(line["phase"] == "fade" for line in result.history)
    tuned_weights = small.get_weights()
    small.set_weights(result.rebuilt_weights if faded else result.reestimated_weights)
    rebuilt = accuracy_of(small, dataset)
    small.set_weights(tuned_weights)

    def row(accuracy: float, model: keras.Model, timed: str) -> dict[str, str]:
        return {
            "test accuracy": f"{accuracy:.2%}",
            "FLOPs": f"{FLOPs()(model):,.0f}",
            "parameters": f"{ModelSize()(model):,.0f}",
            **times[timed],
        }

    lines = {"seed": row(seeds, seed, "seed")}
    if len(result.history) > sum(line["phase"] == "fine-tune" for line in result.history):  # else it is the seed
        lines["trained, before the cut"] = row(accuracy_of(result.learner, dataset), result.learner.seed, "seed")
    lines |= {
        "rebuilt, right after it" if faded else "cut and recovered": row(rebuilt, small, "fine-tuned"),
        "fine-tuned": row(tuned, small, "fine-tuned"),
    }
    return {**lines, **{name: times[name] for name in times if name not in lines}}  # such as a file in eight bits


def _figures(plan: _Plan, budget: Budget, seed: keras.Model, result: Shrunk, dataset: Dataset) -> dict[str, Any]:
    """What `compare` and `sweep` read: numbers of the smaller model."""
    return {
        "budget": budget.amount,
        "cost": plan.cost.name,
        "cost_share": plan.cost(result.small) / plan.cost(seed),
        "FLOPs": FLOPs()(result.small),
        "parameters": ModelSize()(result.small),
        "val_accuracy": result.history[-1]["val_accuracy"],
        "test_accuracy": accuracy_of(result.small, dataset),
    }


def _family_table(rows: dict[str, dict[str, str]], dataset: Dataset) -> Table:
    table = _table(rows, "budget")
    table.title, table.title_justify = f"{dataset.name}, {len(dataset.x_test)} test images, one learning", "left"
    return table


def _table(results: dict[str, dict[str, str]], head: str = "") -> Table:
    table = Table()
    table.add_column(head, no_wrap=True)
    columns = list(dict.fromkeys(column for values in results.values() for column in values))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, values in results.items():
        table.add_row(name, *(values.get(column, "") for column in columns))
    return table
