"""Every error of ours names the layer, file or option, and says what was expected, what was received, what to do."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BudgetError",
    "DataError",
    "KerasMorphError",
    "MissingBackendError",
    "StructureMismatchError",
    "UncountedLayerWarning",
    "UnknownLayerWarning",
    "UnsupportedModelError",
    "backend_needed",
]

BACKENDS = ("tensorflow", "jax", "torch")


class KerasMorphError(ValueError):
    """A user's mistake that one clear line explains. The command line prints it and exits 2."""


class UnsupportedModelError(KerasMorphError):
    """The model cannot be traced, or the regularizer finds nothing to hold on to in it."""


class StructureMismatchError(KerasMorphError):
    """A structure does not belong to the model that it is used with, or its file is damaged."""


class BudgetError(KerasMorphError):
    """A budget cannot be read or cannot be reached; in the second case the message names the reachable minimum."""


class DataError(KerasMorphError):
    """Training data is missing, unreadable or of another form than expected."""


class MissingBackendError(KerasMorphError, ImportError):
    """Keras has nothing to compute with: the backend that it is told to use is not installed."""


class UnknownLayerWarning(UserWarning):
    """A model has layers that we do not know or cannot follow: they stay as they are, and their channels cannot be removed."""


class UncountedLayerWarning(UserWarning):
    """A cost leaves out layers, since nobody can tell what they compute."""


@contextmanager
def backend_needed() -> Iterator[None]:
    """Around the first import of Keras: without its backend, an error that names our extras instead of a traceback.

    Raises:
        MissingBackendError: if TensorFlow, JAX or PyTorch is asked for and not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in BACKENDS:
            raise
        extras = " or ".join(f"'keras-morph[{backend}]'" for backend in BACKENDS)
        there = [backend for backend in BACKENDS if importlib.util.find_spec(backend)]
        advice = f"Set KERAS_BACKEND={there[0]}, which is installed" if there else "For jax and torch set KERAS_BACKEND"
        raise MissingBackendError(
            f"Keras expects a backend. Received: {error.name}, which is not installed. Run pip install {extras}. {advice}."
        ) from None
