"""keras-morph makes Keras 3 models smaller and faster: give it a model and a budget."""

import os

# Hides TensorFlow's start-up notes, not its warnings; whoever has set the variable keeps what they set.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

from keras_morph import zoo
from keras_morph.callbacks import EpochLog, FadeOut, StopWithin, StructureLog
from keras_morph.channels import ChannelGraph
from keras_morph.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.errors import (
    BudgetError,
    DataError,
    KerasMorphError,
    StructureMismatchError,
    UnknownLayerWarning,
    UnsupportedModelError,
)
from keras_morph.hardware import HARDWARE, Hardware
from keras_morph.layer_rules import Rule, register_rule
from keras_morph.learning import StructureLearner
from keras_morph.measuring import measure
from keras_morph.pipeline import Shrunk, prune, shrink
from keras_morph.rebuilding import masked, rebuild
from keras_morph.regularizers import Gamma, GroupLasso
from keras_morph.report import Report, report
from keras_morph.selection import fit_budget
from keras_morph.structure import Structure
from keras_morph.tensorboard import TensorBoardLog
from keras_morph.tracing import trace

__all__ = [
    "HARDWARE",
    "Activations",
    "BudgetError",
    "ChannelGraph",
    "Cost",
    "DataError",
    "EpochLog",
    "FLOPs",
    "FadeOut",
    "Gamma",
    "GroupLasso",
    "Hardware",
    "KerasMorphError",
    "Latency",
    "ModelSize",
    "Report",
    "Rule",
    "Shrunk",
    "StopWithin",
    "Structure",
    "StructureLearner",
    "StructureLog",
    "StructureMismatchError",
    "TensorBoardLog",
    "UnknownLayerWarning",
    "UnsupportedModelError",
    "fit_budget",
    "masked",
    "measure",
    "prune",
    "rebuild",
    "register_rule",
    "report",
    "shrink",
    "trace",
    "zoo",
]

__version__ = "0.1.0"
