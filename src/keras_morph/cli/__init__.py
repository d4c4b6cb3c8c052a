"""`keras-morph COMMAND`: a thin layer over the API, one file per command.

Keras is imported by what a command does, not by its options: help, version, completion and mistakes in writing come first.
"""

import codecs
import io
import logging
import os
import sys
from typing import Any, NoReturn

from keras_morph.errors import DivergedError, KerasMorphError, LostProcessError, backend_needed, is_of_users
from keras_morph.processes import leave

__all__ = ["main"]

_PLAINLY = "keras-morph"  # what our way of writing unknown characters is called
LONGEST = 2000  # characters of a line
INTERRUPTED = 130  # what shells report of a process that Ctrl-C ended
REQUIRED = {"PIL": "pillow"} | {
    name: name for name in ("keras", "numpy", "typer", "rich", "matplotlib", "tensorboardX")
}
"""What is installed with us, and what pip calls it."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command; a user's mistake is one line on standard error and exit code 2, a training that diverged 1."""
    try:
        _main(arguments)
    except BaseException as error:
        leave(error)
        raise


def _main(arguments: list[str] | None) -> NoReturn:
    # TensorFlow warns of every model that it compiles anew, which is what we do for a living.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows few characters, or a file name that is no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAINLY)
    try:
        with backend_needed():
            code = _run(arguments)
    except KerasMorphError as error:
        _stop(str(error), 1 if isinstance(error, (DivergedError, LostProcessError)) else 2)
    except KeyboardInterrupt as error:
        _stop(str(error) or "interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED or is_of_users(error):
            raise
        _stop(f"{error.name} is not installed. Run pip install {REQUIRED[error.name]}.", 2)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        if is_of_users(error):
            raise
        _stop(_of_the_machine(error), 1)
    sys.exit(code or 0)


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """For a terminal that does not know a character: lines of tables as in a typewriter, all else by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    drawn = ["-" if c in "─━═" else "|" if c in "│┃║" else "+" if "\u2500" <= c <= "\u257f" else c for c in text]
    return "".join(c if c.isascii() else c.encode("ascii", "backslashreplace").decode() for c in drawn), error.end


codecs.register_error(_PLAINLY, _plainly)


def _run(arguments: list[str] | None) -> Any:
    import typer  # here, so that an interruption or its absence is one line too

    from keras_morph.cli.app import app

    try:
        code = typer.main.get_command(app).main(arguments, prog_name="keras-morph", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Typer's usage errors; their class lies in click or in Typer, which differs by version.
        if not hasattr(error, "format_message"):
            raise
        if not arguments and len(sys.argv) < 2:
            print(error.format_message())
            sys.exit(2)
        raise KerasMorphError(f"{error.format_message().rstrip('.')}. See keras-morph COMMAND --help.") from error
    if code == INTERRUPTED:  # newer versions of Typer return it, older ones raise Abort
        raise KeyboardInterrupt
    return code


def _of_the_machine(error: Exception) -> str:
    """A full disk, a folder that cannot be written, or too little memory."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return "there is not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"


def _stop(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    # Names of files may hold what a terminal takes for commands.
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
    print(f"keras-morph: {shown if len(shown) <= LONGEST else f'{shown[:LONGEST]}...'}", file=sys.stderr)
    sys.exit(code)
