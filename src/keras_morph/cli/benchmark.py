"""`keras-morph benchmark MODEL...`: models side by side in the runtimes that serve them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import (
    DATA,
    PIXELS,
    RUNTIMES,
    Classes,
    ImageSize,
    among,
    check_name,
    check_number,
    check_output,
)
from keras_morph.errors import KerasMorphError

__all__ = ["benchmark"]


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            help=".keras files, zoo names, package.module:function, or exported files; the first is compared with"
        ),
    ],
    runtimes: Annotated[
        str, typer.Option(help=f"separated by commas: {', '.join(RUNTIMES)}")
    ] = "onnxruntime,litert,openvino,keras",
    threads: Annotated[int, typer.Option(help="how many a runtime may use")] = 1,
    batch_size: Annotated[int, typer.Option(help="examples per pass")] = 1,
    data: Annotated[
        str | None, typer.Option(help="measure the accuracy on its test examples, too", **among(DATA, show=False))
    ] = None,
    pixels: Annotated[
        str,
        typer.Option(
            help="range of pixels that the models take; auto: as the first says, 0-1 if it is an exported file",
            **among(("auto", *PIXELS)),
        ),
    ] = "auto",
    seconds: Annotated[float, typer.Option(help="how long each model is timed in each runtime")] = 3.0,
    output: Annotated[Path | None, typer.Option(help="write all figures as JSON to this file, too")] = None,
    image_size: ImageSize = 32,
    classes: Classes = 10,
) -> None:
    """Compare models where they run: file size, agreement with Keras, accuracy, latency."""
    chosen = list(dict.fromkeys(name.strip() for name in runtimes.split(",")))
    if unknown := [name for name in chosen if name not in RUNTIMES]:
        raise KerasMorphError(
            f"--runtimes expects some of {', '.join(RUNTIMES)}. Received: {unknown[0] or runtimes!r}."
        )
    check_number("--threads", threads, 1)
    check_number("--batch-size", batch_size, 1)
    check_number("--seconds", seconds, 0, above=True)
    check_name("--pixels", pixels, ("auto", *PIXELS))
    if output is not None:
        check_output("--output", output, models)

    from keras_morph.benchmarking import benchmark as compare
    from keras_morph.cli.choices import images_for, load_model
    from keras_morph.runs import write_text
    from keras_morph.runtimes import is_exported

    shape = (image_size, image_size, 3)
    found = {
        _name(text, models): Path(text) if is_exported(text) else load_model(text, input_shape=shape, classes=classes)
        for text in models
    }
    images = None if data is None else images_for(next(iter(found.values())), data, pixels)
    result = compare(
        found,
        runtimes=chosen,
        threads=threads,
        batch_size=batch_size,
        data=None if images is None else (images.x_test, images.y_test),
        seconds=seconds,
        progress=lambda line: print(line, file=sys.stderr),
    )
    if not result.rows:
        reasons = "; ".join(f"{runtime}: {reason}" for runtime, reason in result.failures.items())
        raise KerasMorphError(f"MODELS: expected some that can be timed. Received: {', '.join(models)}; {reasons}")
    print(result.markdown())
    if output is not None:
        write_text(output, result.json() + "\n")


def _name(text: str, models: list[str]) -> str:
    """A file's name without its folder, where no other is called like it."""
    names = [Path(each).name for each in models]
    return Path(text).name if names.count(Path(text).name) == 1 else text
