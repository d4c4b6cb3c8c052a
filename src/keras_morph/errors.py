"""Every error of ours names the layer, file or option, and says what was expected, what was received, what to do."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BudgetError",
    "ChanceWarning",
    "DataError",
    "DivergedError",
    "ForecastWarning",
    "KerasMorphError",
    "LostProcessError",
    "MissingBackendError",
    "StructureMismatchError",
    "UncountedLayerWarning",
    "UnknownLayerWarning",
    "UnsupportedModelError",
    "UnwrittenWarning",
    "backend_needed",
    "is_of_users",
    "of_users",
]

BACKENDS = ("tensorflow", "jax", "torch")


class KerasMorphError(ValueError):
    """A user's mistake that one clear line explains. The command line prints it and exits 2.

    Example:
        >>> try:
        ...     km.zoo.build("ResNet51")
        ... except km.KerasMorphError as error:
        ...     print(error)
        model: expected the name of an architecture, received 'ResNet51'; did you mean ResNet56 or ...
    """


class UnsupportedModelError(KerasMorphError):
    """The model cannot be traced, or the regularizer finds nothing to hold on to in it.

    Example:
        >>> seed = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
        >>> km.fit_budget(seed, "50%", scores=km.Gamma())
        Traceback (most recent call last):
            ...
        keras_morph.errors.UnsupportedModelError: ...GroupLasso...
    """


class StructureMismatchError(KerasMorphError):
    """A structure does not belong to the model that it is used with, or its file is damaged.

    Example:
        >>> structure = km.fit_budget(km.zoo.digits_resnet(), "50%")
        >>> km.rebuild(km.zoo.resnet20(), structure)
        Traceback (most recent call last):
            ...
        keras_morph.errors.StructureMismatchError: ...DigitsResNet...
    """


class BudgetError(KerasMorphError):
    """A budget cannot be read or cannot be reached; in the second case the message names the reachable minimum.

    Example:
        >>> km.fit_budget(km.zoo.digits_resnet(), "half")
        Traceback (most recent call last):
            ...
        keras_morph.errors.BudgetError: Expected a budget for FLOPs in FLOPs, such as "50%", ... Received: budget='half'.
    """


class DataError(KerasMorphError):
    """Training data is missing, unreadable or of another form than expected.

    Example:
        >>> km.datasets.load("digit")
        Traceback (most recent call last):
            ...
        keras_morph.errors.DataError: ... received 'digit'; did you mean digits?
    """


class DivergedError(KerasMorphError):
    """A training has diverged: its loss, or a weight, is no number any more. The command line exits 1.

    Example:
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> history = learner.fit(np.full_like(x, np.nan), y, verbose=0, callbacks=[km.StopDiverging()])
        Traceback (most recent call last):
            ...
        keras_morph.errors.DivergedError: The training diverged in epoch 1, step 1. Expected: a finite loss. Received: nan...
    """


class LostProcessError(KerasMorphError):
    """A training in several processes has lost one of them, or they did not meet. The command line exits 1.

    Example:
        >>> raise km.LostProcessError("process 0 of 2 lost another one.")
        Traceback (most recent call last):
            ...
        keras_morph.errors.LostProcessError: process 0 of 2 lost another one.
    """


class MissingBackendError(KerasMorphError, ImportError):
    """Keras has nothing to compute with: the backend that it is told to use is not installed.

    Example:
        >>> issubclass(km.MissingBackendError, ImportError)
        True
    """


class UnknownLayerWarning(UserWarning):
    """A model has layers that we do not know or cannot follow: they stay as they are, and their channels cannot be removed.

    Example:
        >>> class Twice(keras.layers.Layer):
        ...     def build(self, shape):
        ...         self.scale = self.add_weight(shape=(shape[-1],))
        ...     def call(self, inputs):
        ...         return self.scale * inputs
        >>> seed = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), Twice(name="twice")])
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     graph = km.trace(seed)
        >>> "UnknownLayerWarning" in [each.category.__name__ for each in caught]
        True
    """


class ChanceWarning(UserWarning):
    """A model that seems to be trained answers no better than the most frequent class: its inputs may be in another range.

    Example:
        >>> seed = keras.models.clone_model(model)
        >>> seed.compile("adam", "sparse_categorical_crossentropy")
        >>> _ = seed.fit(x, y, verbose=0)  # on noise
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = km.shrink(seed, "50%", (x, y), validation_data=(x, 0 * y), epochs=3, verbose=0)
        >>> "ChanceWarning" in [each.category.__name__ for each in caught]
        True
    """


class BudgetWarning(UserWarning):
    """A budget is kept as computed, but not as measured.

    Example:
        >>> class Slow(km.FLOPs):
        ...     def clock(self, graph):  # whatever is measured takes as long as the whole network
        ...         return contextlib.nullcontext(lambda structure: (1.0, 1.0))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     small = km.prune(model, "50%", cost=Slow())
        >>> "BudgetWarning" in [each.category.__name__ for each in caught]
        True
    """


class ForecastWarning(UserWarning):
    """A latency was measured, but structures take other times than it foretells: the machine was busy, or short of memory.

    Example:
        >>> issubclass(km.ForecastWarning, UserWarning)
        True
    """


class UnwrittenWarning(UserWarning):
    """A file of a run cannot be written, since the disk is full, say; the run goes on.

    Example:
        >>> Path("file").touch()
        >>> learner = km.StructureLearner(model)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = learner.fit(x, y, verbose=0, callbacks=[km.StructureLog("file/learned_structure")])
        >>> "UnwrittenWarning" in [each.category.__name__ for each in caught]
        True
    """


class UncountedLayerWarning(UserWarning):
    """A cost leaves out layers, since nobody can tell what they compute.

    Example:
        >>> class Opaque(keras.layers.Layer):
        ...     def call(self, inputs):
        ...         return keras.ops.convert_to_tensor(np.sort(keras.ops.convert_to_numpy(inputs), axis=1))
        ...     def compute_output_shape(self, shape):
        ...         return shape
        >>> seed = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), Opaque()])
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     flops = km.FLOPs()(seed)
        >>> "UncountedLayerWarning" in [each.category.__name__ for each in caught]
        True
    """


@contextmanager
def backend_needed() -> Iterator[None]:
    """Around the first import of Keras: without its backend, an error that names our extras instead of a traceback.

    Raises:
        MissingBackendError: if Keras is told to use a backend that is not installed, or one that it does not know.
    """
    try:
        yield
    except (ModuleNotFoundError, ValueError) as error:
        missing = _missing_backend(error)
        if missing is None or "keras" in sys.modules:  # there only once it has found its backend
            raise
        extras = " or ".join(f"'keras-morph[{backend}]'" for backend in BACKENDS)
        there = [backend for backend in BACKENDS if backend != missing and importlib.util.find_spec(backend)]
        advice = f"Set KERAS_BACKEND={there[0]}, which is installed" if there else "For jax and torch set KERAS_BACKEND"
        raise MissingBackendError(
            f"Keras expects a backend. Received: {missing}, which is not installed. Run pip install {extras}. {advice}."
        ) from None


def _missing_backend(error: Exception) -> str | None:
    """The backend that an error says Keras has not found."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return package if package in (*BACKENDS, "openvino") else None
    _, _, unknown = str(error).partition("Unable to import backend : ")
    return unknown or None


OF_USERS = "keras-morph: this was raised by code of yours, "


@contextmanager
def of_users(name: str) -> Iterator[None]:
    """Around a call of the user's code: what it raises says so, and is shown with its traceback.

    Args:
        name: what the code is called on the command line.
    """
    try:
        yield
    except KerasMorphError:
        raise
    except Exception as error:
        error.add_note(f"{OF_USERS}{name}")
        raise


def is_of_users(error: BaseException) -> bool:
    """Whether an error was raised by the user's code."""
    return any(note.startswith(OF_USERS) for note in getattr(error, "__notes__", ()))
