"""The options of `keras-morph sweep MODEL --budgets 75%,50% --random-seeds 0,1,2`."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_morph.cli.options import among, check_name, check_number
from keras_morph.cli.shrink import Shrink
from keras_morph.errors import KerasMorphError

__all__ = ["AXES", "Sweep", "arguments_of", "numbers_in"]

AXES = {
    "regularizers": "regularizer",
    "strengths": "strength",
    "learning_rates": "learning_rate",
}
"""Options of a sweep that hold several values of one of `shrink`; budgets, costs and random seeds besides."""
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Sweep(Shrink):
    """Shrink a model in many ways, each in a process and folder of its own, and compare them.

    Options are those of shrink; each in the plural holds several values, and all combinations are run, or --trials of them.
    """

    budgets: Annotated[
        str | None, typer.Option(metavar="BUDGET,BUDGET", help="each with a learning of its own: 75%,50%,25%")
    ] = None
    costs: Annotated[str | None, typer.Option(metavar="COST,COST", help="what the budgets are for")] = None
    regularizers: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="what scores the channels")] = None
    strengths: Annotated[
        str | None, typer.Option(metavar="NUMBER,NUMBER", help="factors of the penalty; LOW..HIGH with --trials")
    ] = None
    learning_rates: Annotated[
        str | None, typer.Option(metavar="NUMBER,NUMBER", help="peak learning rates; LOW..HIGH with --trials")
    ] = None
    random_seeds: Annotated[
        str | None, typer.Option(metavar="NUMBER,NUMBER", help="of each combination; means are compared")
    ] = None
    trials: Annotated[
        int | None, typer.Option(help="combinations that Optuna searches for each budget and cost; default: all")
    ] = None
    prune: Annotated[
        bool, typer.Option("--prune", help="after half of the epochs end runs that are below half of those so far")
    ] = False
    jobs: Annotated[int | None, typer.Option(help="runs at once; default 1, or as many as Ray has processors")] = None
    engine: Annotated[str, typer.Option(help="where the runs are", **among(ENGINES))] = "local"
    address: Annotated[
        str | None, typer.Option(help="of a Ray cluster whose machines share the folder; default: one on this machine")
    ] = None
    gpus: Annotated[float, typer.Option(help="of each run on Ray")] = 0.0

    @property
    def seeds(self) -> list[int]:
        """The random seeds of each combination."""
        texts = _parts("--random-seeds", self.random_seeds) if self.random_seeds else [str(self.random_seed)]
        if not all(text.isdecimal() for text in texts) or len(set(map(int, texts))) < len(texts):
            raise KerasMorphError(
                f"--random-seeds expects different whole numbers, such as 0,1,2. Received: {self.random_seeds}."
            )
        return [int(text) for text in texts]

    @property
    def studies(self) -> list[dict[str, str]]:
        """Budget and cost of each study."""
        costs = _parts("--costs", self.costs) if self.costs else [self.cost]
        return [{"budget": budget, "cost": cost} for cost in costs for budget in self.amounts]

    def shrink(self, **values: Any) -> Shrink:
        """The options of one of the runs."""
        single = {field.name: getattr(self, field.name) for field in dataclasses.fields(Shrink)}
        return Shrink(**single | {"budgets": None, "name": None, "resume": None} | values)

    def check(self) -> None:
        """What is wrong with any of the runs, before one is begun and before Keras is imported."""
        super().check()
        check_number("--trials", self.trials, 1, 10**6)
        check_number("--jobs", self.jobs, 1, 10**4)
        check_number("--gpus", self.gpus, 0)
        check_name("--engine", self.engine, ENGINES)
        if self.engine == "local" and (self.address is not None or self.gpus):
            raise KerasMorphError("--address and --gpus are for Ray. Expected: --engine ray. Received: --engine local.")
        if self.prune and len(self.seeds) > 1:
            raise KerasMorphError(f"--prune expects one random seed. Received: --random-seeds {self.random_seeds}.")
        for plural, single in (("costs", "cost"), *AXES.items(), ("random_seeds", "random_seed")):
            given, default = getattr(self, single), getattr(Shrink, single)
            if getattr(self, plural) is not None and given != default:
                names = plural.replace("_", "-"), single.replace("_", "-")
                raise KerasMorphError(f"--{names[0]} expects no --{names[1]}. Received: both.")
        if self.model.endswith(".keras") and not Path(self.model).is_file():
            raise KerasMorphError(
                f"MODEL: {self.model} does not exist. Expected a .keras file, a zoo name or package.module:function."
            )
        for budget in self.amounts:
            if not re.match(r"\s*[0-9.]", budget):
                raise KerasMorphError(f'--budgets expects amounts such as 50%, 300M or 2MB. Received: "{budget}".')
        for study in self.studies:
            for seed in self.seeds:
                self.shrink(**study, random_seed=seed, log_dir=Path()).check()
        for plural, single in AXES.items():
            for value in self._values(plural):
                self.shrink(**{single: value}, log_dir=Path()).check()

    def _values(self, plural: str) -> Sequence[Any]:
        """The values of an axis; the ends of a range."""
        text = getattr(self, plural)
        if text is None:
            return ()
        if plural == "regularizers":
            return _parts("--regularizers", text)
        values, is_range = numbers_in(f"--{plural.replace('_', '-')}", text)
        if is_range and self.trials is None:
            raise KerasMorphError(f"A range is searched in, by --trials N. Received: {text}, and no --trials.")
        return values


def numbers_in(option: str, text: str) -> tuple[list[float], bool]:
    """Numbers with commas between, or the ends of a range `LOW..HIGH`; and whether it is one."""
    is_range = ".." in text
    texts = re.split(r"\.\.", text) if is_range else _parts(option, text)
    try:
        values = [float(each) for each in texts]
    except ValueError:
        values = []
    if (
        not values
        or len(set(values)) < len(texts)
        or (is_range and not (len(values) == 2 and 0 < values[0] < values[1]))
    ):
        raise KerasMorphError(
            f"{option} expects different numbers, such as 1e-3,2e-3, or a range 1e-4..1e-2. Received: {text}."
        )
    return values, is_range


def _parts(option: str, text: str) -> list[str]:
    """What stands between commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise KerasMorphError(f"{option} expects different values with commas between. Received: {text}.")
    return parts


def arguments_of(options: Shrink) -> list[str]:
    """The command line of `shrink` that gives these options, without `keras-morph`."""
    arguments = ["shrink", options.model]
    for field in dataclasses.fields(Shrink):
        value, option = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "model" or value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(option if value else "--in-memory")  # the only one that can be switched off
        else:
            each = value if isinstance(value, list) else [value]
            arguments += [part for one in each for part in (option, str(one))]
    return arguments
