"""Parts of a learner that Keras saves with it, made anew from the arguments of their class; and files from outside."""

import inspect
import json
import math
import textwrap
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Self

import keras

from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import without_values
from keras_morph.machine import free_memory

__all__ = ["Configured", "open_model", "serialized"]

CONFIG_LIMIT = 2**26  # bytes of a config.json; that of the largest network in keras.applications has half a million


class Configured:
    """Saved as the arguments of its class, each of which is an attribute of the same name."""

    def get_config(self) -> dict[str, Any]:
        names = inspect.signature(type(self)).parameters
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise _cannot_be_saved(self, f"arguments that are no attributes: {', '.join(missing)}")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)


def serialized(part: Any) -> Any:
    """An object as Keras writes it down.

    Raises:
        KerasMorphError: if it cannot be made anew.
    """
    missing = [name for name in ("get_config", "from_config") if not hasattr(part, name)]
    if missing:
        raise _cannot_be_saved(part, f"no {' and no '.join(missing)}")
    return keras.saving.serialize_keras_object(part)


def _cannot_be_saved(part: Any, received: str) -> KerasMorphError:
    return KerasMorphError(
        f"{type(part).__name__} cannot be saved. Expected: get_config, which returns the arguments of the class as a "
        "dictionary, the classmethod from_config, which takes it, and @keras.saving.register_keras_serializable() above the "
        f"class. Received: {received}. Weights alone are saved without: learner.save_weights."
    )


def open_model(path: str) -> keras.Model:
    """Open a `.keras` file of anybody's: without running code that it brings, or making weights that it does not hold.

    Raises:
        KerasMorphError: if there is none, or it cannot be opened.
    """
    try:
        there = Path(path).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        there = False
    if not there:
        raise KerasMorphError(
            f"MODEL: {_shortened(path)} does not exist. Expected a .keras file, a zoo name or package.module:function."
        )
    try:
        _check_file(path)
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # whatever Keras, a layer or a damaged file raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise KerasMorphError(
            f"MODEL: {path} cannot be loaded by Keras: {_shortened(lines[0] if lines else type(error).__name__)}"
        ) from error
    if not isinstance(model, keras.Model):
        raise KerasMorphError(f"MODEL: {path} holds a {type(model).__name__}. Expected a keras.Model.")
    return model


def _check_file(path: str) -> None:
    """Refuse an archive that is no model, or whose model has more parameters than it brings bytes for them.

    Raises:
        ValueError: for these.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member.file_size for member in archive.infolist()}
        odd = [name for name in members if name.startswith("/") or ".." in PurePosixPath(name).parts]
        if odd:
            raise ValueError(f"it holds a file outside its folder, {odd[0]!r}")
        if sum(members.values()) > free_memory():
            raise ValueError(f"it would fill the memory: {sum(members.values()) / 1e9:.3g} GB when unpacked")
        for name in ("config.json", "model.weights.h5"):
            if name not in members:
                raise ValueError(f"it holds no {name}")
        if members["config.json"] > CONFIG_LIMIT:
            raise ValueError(f"its config.json has {members['config.json']:,} bytes")
        config = json.loads(archive.read("config.json"))
    try:
        with without_values():
            model = keras.saving.deserialize_keras_object(config)
            parameters = sum(math.prod(weight.shape) for weight in model.weights)
    except Exception:  # a layer that cannot be made so; what is wrong otherwise, Keras says when it opens the file
        return
    if parameters > 2 * members["model.weights.h5"]:  # of half a byte at least
        raise ValueError(
            f"it says {parameters:,} parameters, and holds {members['model.weights.h5']:,} bytes of weights"
        )


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder="...")
