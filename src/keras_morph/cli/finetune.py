"""The options of `keras-morph finetune MODEL --data DATA`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import (
    DATA,
    OPTIMIZERS,
    PIXELS,
    Name,
    PixelRange,
    Resume,
    Streamed,
    among,
    check_folder,
    check_name,
    check_number,
    check_run_name,
)
from keras_morph.errors import KerasMorphError

__all__ = ["Finetune"]


@dataclass(frozen=True)
class Finetune:
    """Train a model, such as one that was rebuilt, by labels and by the answers of another one."""

    model: Annotated[str, typer.Argument(help="a .keras file, a zoo name, or package.module:function")] = ""
    data: Annotated[
        str,
        typer.Option(help=f"{', '.join(DATA)}, an image folder or zip, an .npz, tfds:NAME", **among(DATA, show=False)),
    ] = "digits"
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a trained model of the same classes, such as the seed")
    ] = None
    distillation: Annotated[
        float | None,
        typer.Option(
            help="share of the teacher's answers in the loss; by default that in which it is right, up to 0.9"
        ),
    ] = None
    epochs: Annotated[int, typer.Option(help="epochs, along one cosine")] = 10
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 64
    learning_rate: Annotated[float, typer.Option(help="learning rate of the first step")] = 1e-3
    optimizer: Annotated[str, typer.Option(help="optimizer", **among(OPTIMIZERS))] = "adam"
    image_size: Annotated[int | None, typer.Option(help="resize the images to this height and width")] = None
    pixels: PixelRange = "auto"
    stream: Streamed = None
    limit: Annotated[int | None, typer.Option(help="use up to this many training images")] = None
    log_dir: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs")
    name: Name = None
    random_seed: Annotated[int, typer.Option(help="for weights, data order and everything else")] = 0
    resume: Resume = None

    def check(self) -> None:
        """What is wrong whatever the model, the data and the machine are, before Keras is imported."""
        if not self.model:
            raise KerasMorphError("Missing argument 'MODEL'. See keras-morph finetune --help.")
        for option, value, low, high in (
            ("--epochs", self.epochs, 1, 10**9),
            ("--distillation", self.distillation, 0, 1),
            ("--batch-size", self.batch_size, 1, 10**9),
            ("--random-seed", self.random_seed, 0, 2**32 - 1),
        ):
            check_number(option, value, low, high)
        check_number("--learning-rate", self.learning_rate, 0, above=True)
        if self.distillation is not None and self.teacher is None:
            raise KerasMorphError(
                f"--distillation is the share of a teacher. Expected: --teacher MODEL too. Received: --distillation "
                f"{self.distillation} alone."
            )
        check_run_name(self.name)
        check_name("--pixels", self.pixels, ("auto", *PIXELS))
        if self.resume is None:
            check_folder("--log-dir", self.log_dir)
