"""`keras-morph export MODEL --to onnx,litert`: files for other runtimes, compared with the Keras model."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import DATA, EXPORTS, SUFFIXES, Classes, ImageSize, among, check_folder, formats_of
from keras_morph.errors import KerasMorphError

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="a .keras file, a zoo name, or package.module:function")],
    to: Annotated[str, typer.Option(help=f"formats, separated by commas: {', '.join(EXPORTS)}")] = "onnx",
    output: Annotated[
        Path | None, typer.Option(help="where the files go, without a suffix; by default beside the .keras file")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="in eight bits; needs --calibrate")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="data whose training images calibrate --int8, and whose test images measure it",
            **among(DATA, show=False),
        ),
    ] = None,
    image_size: ImageSize = 32,
    classes: Classes = 10,
) -> None:
    """Write a model for ONNX Runtime, LiteRT, OpenVINO or TensorFlow, run it there, and compare with Keras."""
    formats = formats_of("--to", to)
    if int8 != (calibrate is not None):
        missing, given = ("--calibrate DATA", "--int8") if int8 else ("--int8", "--calibrate")
        raise KerasMorphError(f"{given} needs {missing}. Received: {given} alone.")
    stem = output or Path(model.removesuffix(".keras") if model.endswith(".keras") else model.rpartition(":")[2])
    if not stem.name:
        raise KerasMorphError(f"--output expects a file name without a suffix. Received: {str(output or '')!r}.")
    check_folder("the folder of --output", stem.parent)

    from keras_morph.cli.choices import load_model
    from keras_morph.cli.exporting import written

    found = load_model(model, input_shape=(image_size, image_size, 3), classes=classes)
    paths = {name: stem.with_name(stem.name + SUFFIXES[name]) for name in formats}
    for line in written(found, paths, calibrate):
        print(line)
