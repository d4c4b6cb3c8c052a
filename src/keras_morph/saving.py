"""Parts of a learner that Keras saves with it: objects that are made anew from the arguments of their class."""

import inspect
from typing import Any, Self

import keras

from keras_morph.errors import KerasMorphError

__all__ = ["Configured", "serialized"]


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
