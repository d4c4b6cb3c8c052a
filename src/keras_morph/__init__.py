"""keras-morph makes Keras 3 models smaller and faster: give it a model and a budget."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from keras_morph.errors import backend_needed

if TYPE_CHECKING:
    from keras_morph.api import *  # noqa: F403
    from keras_morph.api import __all__ as __all__

__version__ = "0.1.0"

# Hides TensorFlow's start-up notes, not its warnings; whoever has set the variable keeps what they set.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")


def __getattr__(name: str) -> Any:
    """Load the public API, and Keras with it, when a name of it is first used: the command line asks for help sooner."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with backend_needed():
        api = import_module("keras_morph.api")
    names: dict[str, Any] = {each: getattr(api, each) for each in ("__all__", *api.__all__)}
    globals().update(names)
    if name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return names[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


# Where Keras is there already nothing is won by waiting, and `load_model` has to know a saved learner's class.
if "keras" in sys.modules:
    __getattr__("__all__")
