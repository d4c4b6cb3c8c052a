"""`keras-morph compare RUN...`: figures of runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import check_output
from keras_morph.errors import KerasMorphError

__all__ = ["compare"]

PICTURES = (".png", ".svg", ".pdf")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of shrink, or of a sweep")],
    mean: Annotated[
        bool, typer.Option("--mean", help="runs that differ in the random seed alone become one line")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="write the figures of each run there")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw accuracy over cost there: .png, .svg or .pdf")] = None,
) -> None:
    """Compare finished runs: what they were given, and what came of it."""
    if picture is not None and picture.suffix not in PICTURES:
        raise KerasMorphError(f"--picture expects a file name that ends in {', '.join(PICTURES)}. Received: {picture}.")
    for option, path in (("--csv", csv), ("--picture", picture)):
        if path is not None:
            check_output(option, path)

    from keras_morph.cli.comparing import grouped, rows_of, save_picture, table, write_csv
    from keras_morph.runs import write_atomically
    from keras_morph.showing import console

    rows = rows_of(runs)
    console().print(table(grouped(rows) if mean else [[row] for row in rows]))
    if csv is not None:
        write_csv(rows, csv)
    if picture is not None:
        write_atomically(picture, lambda path: save_picture(grouped(rows), path))
