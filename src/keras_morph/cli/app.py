"""The commands and their options; what a command does is imported when it runs."""

from typing import Annotated

import typer

import keras_morph
from keras_morph.cli.benchmark import benchmark
from keras_morph.cli.compare import compare
from keras_morph.cli.expand import expand
from keras_morph.cli.export import export
from keras_morph.cli.finetune import Finetune
from keras_morph.cli.inspect import inspect
from keras_morph.cli.measure import measure
from keras_morph.cli.options import command_of, process_of
from keras_morph.cli.rebuild import rebuild
from keras_morph.cli.report import report
from keras_morph.cli.shrink import Shrink
from keras_morph.cli.sweep import Sweep
from keras_morph.cli.train import Train
from keras_morph.cli.watching import watched
from keras_morph.cli.zoo import zoo

__all__ = ["app"]

app = typer.Typer(
    help="Make Keras 3 models smaller and faster: learn which channels a model needs, rebuild it without the others.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"keras-morph {keras_morph.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@command_of(Train)
def train(options: Train) -> None:
    def run(options: Train) -> None:
        from keras_morph.cli.training import run

        run(options)

    if process_of(options.job_addresses, options.process_id).count > 1:
        watched(run, options)
    else:
        run(options)


@app.command()
@command_of(Shrink)
def shrink(options: Shrink) -> None:
    from keras_morph.cli.shrinking import run

    run(options)


@app.command()
@command_of(Finetune)
def finetune(options: Finetune) -> None:
    from keras_morph.cli.finetuning import run

    run(options)


@app.command()
@command_of(Sweep)
def sweep(options: Sweep) -> None:
    from keras_morph.cli.sweeping import run

    run(options)


for command in (inspect, rebuild, expand, report, compare, export, benchmark, measure, zoo):
    app.command()(command)
