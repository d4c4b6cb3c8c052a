"""The options of `keras-morph shrink MODEL --budget 50%`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import (
    ALGORITHMS,
    COSTS,
    DATA,
    DEVICES,
    EXPORTS,
    OPTIMIZERS,
    PIXELS,
    RUNTIMES_THAT_MEASURE,
    SCORES,
    Grouped,
    Name,
    PixelRange,
    Protect,
    Resume,
    Streamed,
    Tie,
    among,
    check_folder,
    check_name,
    check_number,
    check_run_name,
    formats_of,
)
from keras_morph.errors import KerasMorphError

__all__ = ["Shrink"]


def _canonical(budget: str) -> str:
    """The same text for `50%`, `50 %` and `50.0%`."""
    return re.sub(r"\s+|(?<=\d)\.0+(?=\D|$)", "", budget)


@dataclass(frozen=True)
class Shrink:
    """Learn which channels a model needs, rebuild it within a budget, fine-tune it, and report."""

    model: Annotated[str, typer.Argument(help="a zoo name, a .keras file, or package.module:function")] = ""
    budget: Annotated[str, typer.Option(help='"50%" of the seed, "300M", "2MB", "5ms", or a number')] = "50%"
    budgets: Annotated[
        str | None, typer.Option(metavar="BUDGET,BUDGET", help="several, from one learning: 75%,50%,25%")
    ] = None
    data: Annotated[
        str,
        typer.Option(help=f"{', '.join(DATA)}, an image folder or zip, an .npz, tfds:NAME", **among(DATA, show=False)),
    ] = "digits"
    cost: Annotated[str, typer.Option(help="what the budget is for", **among(COSTS))] = "FLOPs"
    hardware: Annotated[
        str, typer.Option(help="for Latency: V100, P100, T4, ..., or Others", **among(DEVICES, show=False))
    ] = "V100"
    peak_flops: Annotated[float | None, typer.Option(help="for Others: FLOP/s")] = None
    bandwidth: Annotated[float | None, typer.Option(help="for Others: bytes/s")] = None
    latency: Annotated[
        str | None,
        typer.Option(
            help=f"the budget is for the latency in {', '.join(RUNTIMES_THAT_MEASURE)}, which is measured first (minutes), "
            "or a file that `keras-morph measure` wrote",
            **among(RUNTIMES_THAT_MEASURE, show=False),
        ),
    ] = None
    threads: Annotated[int, typer.Option(help="that the runtime of --latency may use")] = 1
    regularizer: Annotated[
        str | None,
        typer.Option(
            help="gives the penalty and the scores that choose; by default GroupLasso's penalty for a fresh network, and "
            "images choose",
            **among(ALGORITHMS),
        ),
    ] = None
    scores: Annotated[
        str | None,
        typer.Option(
            help="choose the channels; by default contributions, or what --regularizer has learned", **among(SCORES)
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            help="a channel is alive when its score is above; by default the regularizer's; alone it asks for GroupLasso"
        ),
    ] = None
    strength: Annotated[float | None, typer.Option(help="factor of the penalty; by default it is controlled")] = None
    per_cost: Annotated[
        float | None,
        typer.Option(
            help="0: the strongest channels live, 1: the strongest for what they cost; by default 1 where images choose, else 0"
        ),
    ] = None
    round_to: Annotated[
        str, typer.Option(help='widths become multiples of this, or stay whole; "auto": what runtimes like, up to 8')
    ] = "auto"
    rounds: Annotated[int, typer.Option(help="shrink, expand to the cost of the seed, and shrink again")] = 1
    protect: Protect = None
    tie: Tie = None
    grouped: Grouped = "whole"
    distillation: Annotated[
        float | None,
        typer.Option(
            help="share of the seed's answers in the loss of fine-tuning; by default that in which a trained one is right, up to "
            "0.9"
        ),
    ] = None
    seed_epochs: Annotated[
        int | None, typer.Option(help="epochs to train the seed first; default 15, 0 for a .keras file")
    ] = None
    epochs: Annotated[int, typer.Option(help="epochs to learn and fine-tune, together")] = 30
    learning: Annotated[
        float | None,
        typer.Option(
            help="share of the epochs under a penalty; by default 0 for a trained network, 0.4 for a fresh one"
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 64
    learning_rate: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3
    optimizer: Annotated[str, typer.Option(help="optimizer of all phases", **among(OPTIMIZERS))] = "adam"
    export: Annotated[
        str | None, typer.Option(help=f"write small.keras in these formats, too, with commas: {', '.join(EXPORTS)}")
    ] = None
    int8: Annotated[bool, typer.Option("--int8", help="--export in eight bits, calibrated by training images")] = False
    image_size: Annotated[int | None, typer.Option(help="resize the images to this height and width")] = None
    pixels: PixelRange = "auto"
    stream: Streamed = None
    limit: Annotated[int | None, typer.Option(help="use up to this many training images")] = None
    log_dir: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs")
    name: Name = None
    random_seed: Annotated[int, typer.Option(help="for weights, data order and everything else")] = 0
    resume: Resume = None

    @property
    def amounts(self) -> list[str]:
        """The budgets, or the one."""
        return [self.budget] if self.budgets is None else [text.strip() for text in self.budgets.split(",")]

    def check(self) -> None:
        """What is wrong whatever the model, the data and the machine are, before Keras is imported."""
        if not self.model:
            raise KerasMorphError("Missing argument 'MODEL'. See keras-morph shrink --help.")
        for option, value, low, high in (
            ("--rounds", self.rounds, 1, 10**9),
            ("--epochs", self.epochs, 3 * self.rounds, 10**9),
            ("--per-cost", self.per_cost, 0, float("inf")),
            ("--distillation", self.distillation, 0, 1),
            ("--learning", self.learning, 0, 1),
            ("--batch-size", self.batch_size, 1, 10**9),
            ("--seed-epochs", self.seed_epochs, 0, 10**9),
            ("--strength", self.strength, 0, float("inf")),
            ("--threads", self.threads, 1, 10**9),
            ("--random-seed", self.random_seed, 0, 2**32 - 1),
        ):
            check_number(option, value, low, high)
        if self.round_to != "auto" and not (self.round_to.isdecimal() and int(self.round_to) >= 1):
            raise KerasMorphError(
                f"--round-to expects auto, or a whole number of at least 1. Received: {self.round_to}."
            )
        if self.latency is not None and not (self.measures or Path(self.latency).is_file()):
            raise KerasMorphError(
                f"--latency expects {', '.join(RUNTIMES_THAT_MEASURE)}, or a file that keras-morph measure wrote. "
                f"Received: {self.latency}."
            )
        self._check_of_cost()
        if self.int8 and not self.export:
            raise KerasMorphError("--int8 needs --export FORMATS. Received: --int8 alone.")
        if self.export is not None:
            formats_of("--export", self.export)
        if self.budgets is not None:
            if self.budget != type(self).budget or self.rounds > 1:
                raise KerasMorphError(
                    f"--budgets expects no --budget, and one round. Received: --budget {self.budget} --rounds {self.rounds}."
                )
            if not all(self.amounts) or len(set(map(_canonical, self.amounts))) < len(self.amounts):
                raise KerasMorphError(
                    f"--budgets expects different budgets, such as 75%,50%. Received: {self.budgets}."
                )
        check_run_name(self.name)
        check_name("--pixels", self.pixels, ("auto", *PIXELS))
        if self.scores is not None:
            check_name("--scores", self.scores, SCORES)
        check_number("--learning-rate", self.learning_rate, 0, above=True)
        if self.resume is None:
            check_folder("--log-dir", self.log_dir)

    def _check_of_cost(self) -> None:
        """Options of one kind of cost are not given for another."""
        default = type(self)
        if self.latency is not None and self.cost != default.cost:
            raise KerasMorphError(
                f"--latency and --cost both say what the budget is for. Expected: one of them. "
                f"Received: --latency {self.latency} --cost {self.cost}."
            )
        if self.hardware != default.hardware and (self.cost != "Latency" or self.latency is not None):
            raise KerasMorphError(
                f"--hardware is for --cost Latency. Expected: both, or none. Received: --hardware {self.hardware} alone."
            )

    @property
    def measures(self) -> bool:
        """Whether --latency names a runtime, not a file."""
        return self.latency in RUNTIMES_THAT_MEASURE
