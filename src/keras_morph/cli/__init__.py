"""`keras-morph COMMAND`: a thin layer over the API, one file per command."""

import logging
import sys

import typer

from keras_morph.cli import inspect, rebuild, report, shrink, train, zoo
from keras_morph.errors import KerasMorphError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Make Keras 3 models smaller and faster: learn which channels a model needs, rebuild it without the others.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (train.train, shrink.shrink, inspect.inspect, rebuild.rebuild, report.report, zoo.zoo):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2."""
    # TensorFlow warns of every model that it compiles anew, which is what we do for a living.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="keras-morph", standalone_mode=False)
    except KerasMorphError as error:
        _stop(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except Exception as error:
        # Typer's usage errors; their class lies in click or in Typer, which differs by version.
        if not hasattr(error, "format_message"):
            raise
        if not arguments and len(sys.argv) < 2:
            print(error.format_message())
            sys.exit(2)
        _stop(f"{error.format_message().rstrip('.')}. See keras-morph --help.", 2)
    sys.exit(code or 0)


def _stop(message: str, code: int) -> None:
    print("keras-morph: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
