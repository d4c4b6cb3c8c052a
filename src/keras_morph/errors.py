"""Every error of ours names the layer, file or option, and says what was expected, what was received, what to do."""

__all__ = [
    "BudgetError",
    "DataError",
    "KerasMorphError",
    "StructureMismatchError",
    "UncountedLayerWarning",
    "UnknownLayerWarning",
    "UnsupportedModelError",
]


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


class UnknownLayerWarning(UserWarning):
    """A model has layers that we do not know or cannot follow: they stay as they are, and their channels cannot be removed."""


class UncountedLayerWarning(UserWarning):
    """A cost leaves out layers, since nobody can tell what they compute."""
