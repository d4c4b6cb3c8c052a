"""`keras-morph report BEFORE AFTER`: what a smaller model saves, layer by layer."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.choices import check_folder, load_model
from keras_morph.report import report as make_report


def report(
    before: Annotated[str, typer.Argument(help="the seed: a .keras file, a zoo name, or package.module:function")],
    after: Annotated[str, typer.Argument(help="the smaller model, likewise")],
    folder: Annotated[Path | None, typer.Option(help="write report.md, .json, .png and .html there")] = None,
    image_size: Annotated[int, typer.Option(help="height and width that a zoo model is built at")] = 32,
    classes: Annotated[int, typer.Option(help="classes that a zoo model is built with")] = 10,
) -> None:
    """Compare a model with its smaller version."""
    if folder is not None:
        check_folder("--folder", folder)
    shape = (image_size, image_size, 3)
    result = make_report(
        load_model(before, input_shape=shape, classes=classes), load_model(after, input_shape=shape, classes=classes)
    )
    if folder is not None:
        result.save(folder)
    print(result.text())
