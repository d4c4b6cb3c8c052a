"""The public API, a line for each name; `keras_morph` loads this file when one of them is used."""

from keras_morph import datasets, zoo
from keras_morph.benchmarking import Benchmark, BenchmarkRow, benchmark
from keras_morph.channels import ChannelGraph
from keras_morph.costs.budget import Budget
from keras_morph.costs.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.costs.hardware import HARDWARE, Hardware
from keras_morph.costs.measured import measure
from keras_morph.costs.sizing import FileSize
from keras_morph.costs.stairs import Staircase
from keras_morph.errors import (
    BudgetError,
    BudgetWarning,
    ChanceWarning,
    DataError,
    DivergedError,
    ForecastWarning,
    KerasMorphError,
    LostProcessError,
    MissingBackendError,
    StructureMismatchError,
    UncountedLayerWarning,
    UnknownLayerWarning,
    UnsupportedModelError,
    UnwrittenWarning,
)
from keras_morph.exporting import Exported, export
from keras_morph.families import shrink_family
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import trace
from keras_morph.layers.rules import Rule, register_rule
from keras_morph.measuring import MeasuredLatency
from keras_morph.pipeline import Progress, Shrunk, prune, shrink
from keras_morph.reporting import Report, report
from keras_morph.runtimes import Session, open_exported
from keras_morph.search.expansion import expand
from keras_morph.search.scores import (
    contribution_scores,
    flap_scores,
    fpgm_scores,
    minitron_scores,
    obs_scores,
    taylor_scores,
    whc_scores,
)
from keras_morph.search.selection import Reach, fit_budget, reach
from keras_morph.surgery.rebuilding import masked, rebuild
from keras_morph.surgery.recovery import recover
from keras_morph.tensorboard import TensorBoardLog
from keras_morph.training.callbacks import Anneal, EpochLog, FadeOut, StopWithin, StrengthController, StructureLog
from keras_morph.training.distilling import Distiller
from keras_morph.training.guards import StopDiverging
from keras_morph.training.learner import StructureLearner
from keras_morph.training.logistic_sigmoid import LogisticSigmoid
from keras_morph.training.recipe import Recipe
from keras_morph.training.regularizers import Gamma, GroupLasso
from keras_morph.training.statistics import reestimate_statistics

__all__ = [
    "HARDWARE",
    "Activations",
    "Anneal",
    "Benchmark",
    "BenchmarkRow",
    "Budget",
    "BudgetError",
    "BudgetWarning",
    "ChanceWarning",
    "ChannelGraph",
    "Cost",
    "DataError",
    "Distiller",
    "DivergedError",
    "EpochLog",
    "Exported",
    "FLOPs",
    "FadeOut",
    "FileSize",
    "ForecastWarning",
    "Gamma",
    "GroupLasso",
    "Hardware",
    "KerasMorphError",
    "Latency",
    "LogisticSigmoid",
    "LostProcessError",
    "MeasuredLatency",
    "MissingBackendError",
    "ModelSize",
    "Progress",
    "Reach",
    "Recipe",
    "Report",
    "Rule",
    "Session",
    "Shrunk",
    "Staircase",
    "StopDiverging",
    "StopWithin",
    "StrengthController",
    "Structure",
    "StructureLearner",
    "StructureLog",
    "StructureMismatchError",
    "TensorBoardLog",
    "UncountedLayerWarning",
    "UnknownLayerWarning",
    "UnsupportedModelError",
    "UnwrittenWarning",
    "benchmark",
    "contribution_scores",
    "datasets",
    "expand",
    "export",
    "fit_budget",
    "flap_scores",
    "fpgm_scores",
    "masked",
    "measure",
    "minitron_scores",
    "obs_scores",
    "open_exported",
    "prune",
    "reach",
    "rebuild",
    "recover",
    "reestimate_statistics",
    "register_rule",
    "report",
    "shrink",
    "shrink_family",
    "taylor_scores",
    "trace",
    "whc_scores",
    "zoo",
]
