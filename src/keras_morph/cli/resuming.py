"""What the command line says of runs that were ended in the middle, and of finished ones."""

import shlex
from pathlib import Path
from typing import Any

from keras_morph.cli.options import OF_THE_PLACE, config_of, plain
from keras_morph.status import is_running, read_status

__all__ = ["say_finished", "say_unfinished"]


def say_finished(folder: Path | None) -> bool:
    """Whether the run that `--resume` names is finished, in which case that is said."""
    if folder is None or read_status(folder).get("state") != "done":
        return False
    print(f"{folder} is finished: its results are there")
    return True


def say_unfinished(command: str, options: Any) -> None:
    """Say how a run of the same options that was not finished goes on."""
    asked = {name: value for name, value in plain(options).items() if value is not None and name not in OF_THE_PLACE}
    for folder in sorted(options.log_dir.glob("*/"), reverse=True):
        config = config_of(folder)
        same = config.get("command") == command and all(config["options"].get(name) == asked[name] for name in asked)
        if same and read_status(folder).get("state") in ("running", "failed") and not is_running(folder):
            print(
                f"{folder} was not finished; to go on with it: keras-morph {command} --resume {shlex.quote(str(folder))}"
            )
            return
