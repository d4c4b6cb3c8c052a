"""`keras-morph report BEFORE AFTER`: what a smaller model saves, layer by layer."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import Classes, ImageSize, check_folder

__all__ = ["report"]


def report(
    before: Annotated[str, typer.Argument(help="the seed: a .keras file, a zoo name, or package.module:function")],
    after: Annotated[str, typer.Argument(help="the smaller model, likewise")],
    folder: Annotated[Path | None, typer.Option(help="write report.md, .json, .png and .html there")] = None,
    image_size: ImageSize = 32,
    classes: Classes = 10,
    latency: Annotated[
        Path | None, typer.Option(help="a latency.json of `measure` or `shrink`, for milliseconds of each layer")
    ] = None,
) -> None:
    """Compare a model with its smaller version."""
    if folder is not None:
        check_folder("--folder", folder)

    from keras_morph.cli.choices import load_model
    from keras_morph.measuring import MeasuredLatency
    from keras_morph.reporting import report as compare

    cost = None if latency is None else MeasuredLatency.load(latency)
    shape = (image_size, image_size, 3)
    seed, small = (load_model(text, input_shape=shape, classes=classes) for text in (before, after))
    result = compare(seed, small, cost=cost)
    if folder is not None:
        result.save(folder)
    print(result.text())
