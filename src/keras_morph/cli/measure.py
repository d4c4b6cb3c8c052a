"""`keras-morph measure MODEL`: a latency from timings, on this machine or, with files that are carried there, on another one."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import (
    RUNTIMES_THAT_MEASURE,
    Classes,
    ImageSize,
    among,
    check_folder,
    check_number,
    check_output,
)
from keras_morph.errors import KerasMorphError

__all__ = ["measure"]


def measure(
    model: Annotated[
        str,
        typer.Argument(help="a .keras file, a zoo name, or package.module:function"),
    ],
    runtime: Annotated[str, typer.Option(help="that will serve it", **among(RUNTIMES_THAT_MEASURE))] = "onnxruntime",
    output: Annotated[Path, typer.Option(help="the file that shrink --latency reads")] = Path("latency.json"),
    on: Annotated[
        str | None,
        typer.Option(help="another device, by a name of yours: write the files to time there, or fit what was timed"),
    ] = None,
    threads: Annotated[int, typer.Option(help="that the runtime may use")] = 1,
    batch_size: Annotated[int, typer.Option(help="examples of one pass")] = 1,
    structures: Annotated[int, typer.Option(help="random structures to time; at least 12")] = 32,
    seconds: Annotated[float, typer.Option(help="when to stop, half of it for exporting")] = 300.0,
    image_size: ImageSize = 32,
    classes: Classes = 10,
) -> None:
    """Time random structures of a network in a runtime: a latency that budgets can be given in.

    On another device, in three steps: `measure MODEL --on phone` here writes the files into a folder, phone/. Carry it
    there, where `python -m keras_morph.timing phone` needs the runtime alone, and back. The first command again then
    writes latency.json.
    """
    for option, value, low in (
        ("--threads", threads, 1),
        ("--batch-size", batch_size, 1),
        ("--structures", structures, 12),
        ("--seconds", seconds, 0),
    ):
        check_number(option, value, low)
    if runtime not in RUNTIMES_THAT_MEASURE:
        raise KerasMorphError(f"--runtime expects {', '.join(RUNTIMES_THAT_MEASURE)}. Received: {runtime!r}.")
    check_output("--output", output, [model])

    from keras_morph import measuring
    from keras_morph.cli.choices import load_model
    from keras_morph.graph.tracing import graph_of
    from keras_morph.timing import TIMINGS, Timings, time_files_apart

    graph = graph_of(load_model(model, input_shape=(image_size, image_size, 3), classes=classes))
    folder = Path(on) if on else output.with_name(f"{output.stem}_structures")
    check_folder("--on", folder)
    if on and (folder / TIMINGS).exists():
        timings = Timings.parsed((folder / TIMINGS).read_text(encoding="utf-8"))
        if timings.conditions.runtime != runtime:
            raise KerasMorphError(
                f"--runtime {runtime} expects files that were timed in it. Received: {folder / TIMINGS}, of "
                f"{timings.conditions.runtime}; give that, or another --on."
            )
        for option, asked, found in (
            ("--threads", threads, timings.conditions.threads),
            ("--batch-size", batch_size, timings.conditions.batch_size),
        ):
            if asked not in (found, 1):
                raise KerasMorphError(
                    f"{option} {asked} expects files that were timed so. Received: {folder / TIMINGS}, with {found}; leave it "
                    "out, or time them again."
                )
    else:
        files = measuring.export_structures(
            graph, folder, runtime=runtime, structures=structures, seconds=seconds / 2, progress=print
        )
        if on:
            print(
                f"Carry the folder {folder} to {on}, run there: python -m keras_morph.timing --threads {threads} "
                f"--batch-size {batch_size} {folder}, carry it back, and run this command again."
            )
            return
        timings = time_files_apart(
            files, threads=threads, batch_size=batch_size, seconds=seconds / 2, rounds=measuring.ROUNDS
        )
    cost = measuring.fit_timings(graph, folder, timings)
    cost.save(output)
    fitted = cost.coefficients
    print(
        f"{output}: {cost(graph) * 1e3:.3g} ms for the whole network ({cost.conditions}). "
        f"{len(timings.seconds)} structures, each foretold from the others: median error {fitted.error:.1%}, "
        f"{fitted.within:.0%} within 10 %. Channels are computed by {cost.block}."
    )
