"""The whole algorithm, phase by phase: learn, choose, fade out, cut, fine-tune; every step is public.

A phase is a function from a Progress to a Progress; one of your own goes into `Recipe(phases=...)`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_morph.costs.budget import Budget, budget_from
from keras_morph.costs.costs import Cost
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of, trace_as
from keras_morph.runs import save_model
from keras_morph.search.expansion import check_expandable, expand
from keras_morph.search.scores import contribution_scores
from keras_morph.search.selection import fit_budget
from keras_morph.surgery.copying import cloned
from keras_morph.surgery.rebuilding import rebuild
from keras_morph.surgery.recovery import recover
from keras_morph.training.callbacks import EpochLog, FadeOut, StopWithin, StrengthController, StructureLog
from keras_morph.training.distilling import Distiller
from keras_morph.training.learner import StructureLearner
from keras_morph.training.recipe import Recipe, check_labelled, check_labels, cosine, fit_on
from keras_morph.training.regularizers import Gamma, Regularizer
from keras_morph.training.statistics import reestimate_statistics

__all__ = ["Progress", "Shrunk", "choose", "cut", "fade", "learn", "phases_of", "prune", "shrink", "tune", "widen"]


@dataclass(frozen=True, repr=False)
class Shrunk:
    """What `shrink` gives back.

    Attributes:
        small: the rebuilt and fine-tuned model.
        structure: its structure, of `seed`.
        seed: what the structure belongs to: the network that was trained and cut, of full size; its dead channels are
            zero. After several rounds it is the last expanded network.
        learner: the StructureLearner around it.
        rebuilt_weights: `small.get_weights()` right after the rebuild.
        reestimated_weights: the same with BatchNormalization's statistics estimated anew, before the fine-tuning.
        history: one dictionary per epoch.

    Example:
        >>> result = km.shrink(model, "50%", (x, y), epochs=3, verbose=0)
        >>> result.small.count_params() < result.seed.count_params()
        True
    """

    small: keras.Model
    structure: Structure
    seed: keras.Model
    learner: StructureLearner
    rebuilt_weights: list[Any] = field(repr=False)
    reestimated_weights: list[Any] = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)

    def __repr__(self) -> str:
        cost = self.learner.target_cost
        share = cost(self.small) / cost(self.seed)
        return f"<Shrunk {self.small.name}: {share:.1%} of the {cost.name} after {len(self.history)} epochs>"

    def _repr_html_(self) -> str:
        return self.structure._repr_html_()


def shrink(
    model: Any,
    budget: Any,
    data: Any,
    *,
    validation_data: Any = None,
    epochs: int | None = None,
    regularizer: Regularizer | None = None,
    recipe: Recipe | None = None,
    run: str | Path | None = None,
    verbose: int | str = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Shrunk:
    """Shrink a model, trained or fresh, to a budget.

    Up to 40 % of the epochs learn which channels are needed, under a penalty whose strength a controller moves, until
    those alive cost no more than the budget; the channels that meet the budget are chosen; 30 % of the epochs let the
    others fade to zero; the smaller model is rebuilt, BatchNormalization's statistics are estimated anew, and the rest of
    the epochs fine-tunes it. The learning rate is constant while learning and then falls along one cosine.

    Args:
        model: a functional or Sequential model, or its ChannelGraph, which says what is protected and tied. It is left
            alone, but for layers that cannot be made anew from their config (a layer with weights and without
            `get_config`): these are trained in place.
        budget: as in `fit_budget`. Its first cost prices the channels.
        data: `(x, y)`, or whatever `fit` takes as its first argument (`tf.data.Dataset`, PyDataset, ...).
        validation_data: as in `fit`.
        epochs: of all phases and rounds together; by default the recipe's, which is 30.
        regularizer: gives the scores; Gamma() by default.
        recipe: how to train; Recipe() by default.
        run: a run's folder, into which history.csv, learned_structure/, structure.json, seed.keras and small.keras are
            written; or None.
        verbose: 0: silent. 1: Keras's progress bar and a line per epoch. 2: a line per epoch. "auto": 1 in a terminal, else 2.
        callbacks: further Keras callbacks, for every phase that trains.

    Returns:
        A Shrunk. `small` costs no more than the budget; its structure is one of `seed`.

    Raises:
        BudgetError: before any training, if the budget cannot be read or reached.
        DataError: before any training, for inputs without labels or labels that the loss does not take.

    Example:
        >>> result = km.shrink(model, "50%", (x, y), epochs=3, verbose=0)
        >>> km.FLOPs()(result.small) <= 0.5 * km.FLOPs()(model)
        True
    """
    recipe = recipe or Recipe()
    recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
    graph, budget = graph_of(model), budget_from(budget)
    if recipe.rounds > 1:
        check_expandable(graph)
    for name, given in (("data", data), ("validation_data", validation_data)):
        check_labelled(name, given)
    objective = recipe.objective(graph.model)
    check_labels(data, objective)
    training = Training(
        data, validation_data, recipe, objective, None if run is None else Path(run), verbose, callbacks
    )
    copy = trace_as(cloned(graph.model), graph.wiring)
    learner = _learner(copy, regularizer or Gamma(), budget, recipe)
    fit_budget(learner, budget)  # raises now if it cannot be met
    progress = Progress(training, budget, graph.model, learner)
    for phase in phases_of(recipe):
        progress = phase(progress)
    return progress.result()


def _learner(model: Any, regularizer: Regularizer, budget: Budget, recipe: Recipe) -> StructureLearner:
    cost = budget.amounts()[0][0]
    return StructureLearner(model, regularizer=regularizer, cost=cost, strength=recipe.strength or 0.0)


@dataclass(frozen=True)
class Training:
    """What all phases that train have in common."""

    data: Any
    validation_data: Any
    recipe: Recipe
    objective: dict[str, Any]
    run: Path | None
    verbose: int | str
    callbacks: Sequence[keras.callbacks.Callback]

    @property
    def shows(self) -> int:
        return (1 if sys.stdout.isatty() else 2) if self.verbose == "auto" else int(self.verbose)


@dataclass(frozen=True, repr=False)
class Progress:
    """Where a run is.

    Attributes:
        training: data, recipe, and where to write.
        budget: what the result may cost.
        teacher: the model that was given.
        learner: learns which channels are needed.
        structure: what was chosen, or None so far.
        small: the rebuilt model, or None so far.
        rebuilt_weights, reestimated_weights: as in Shrunk.
        history: one dictionary per epoch so far.
        steps_per_epoch: optimizer steps in each of them.
        annealed_from: epochs after which the learning rate began to fall.
    """

    training: Training
    budget: Budget
    teacher: keras.Model
    learner: StructureLearner
    structure: Structure | None = None
    small: keras.Model | None = None
    rebuilt_weights: list[Any] | None = None
    reestimated_weights: list[Any] | None = None
    history: tuple[dict[str, Any], ...] = ()
    steps_per_epoch: int = 1
    annealed_from: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.training.recipe

    def result(self) -> Shrunk:
        assert self.structure is not None
        assert self.small is not None
        run = self.training.run
        if run is not None:
            self.structure.save(run / "structure.json")
            save_model(self.learner.seed, run / "seed.keras")
            save_model(self.small, run / "small.keras")
        return Shrunk(
            self.small,
            self.structure,
            self.learner.seed,
            self.learner,
            self.rebuilt_weights or [],
            self.reestimated_weights or [],
            list(self.history),
        )


Phase = Callable[[Progress], Progress]


def phases_of(recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of a run, in order."""
    if recipe.phases is not None:
        return tuple(recipe.phases)
    return (*(learn, choose, widen) * (recipe.rounds - 1), learn, choose, fade, cut, tune)


def learn(progress: Progress) -> Progress:
    """Train under the penalty, until the channels above the threshold meet the budget or the share of epochs is over."""
    recipe, budget = progress.recipe, progress.budget
    epochs = max(1, round(recipe.learning * recipe.epochs / recipe.rounds))
    control = [StrengthController(budget)] if recipe.strength is None else []
    return _trained(
        progress,
        progress.learner,
        "learn",
        epochs,
        recipe.learning_rate,
        [*control, StopWithin(budget)],
        choice=lambda learner: fit_budget(learner, budget),
    )


def choose(progress: Progress) -> Progress:
    """The channels that meet the budget."""
    return replace(progress, structure=fit_budget(progress.learner, progress.budget))


def widen(progress: Progress) -> Progress:
    """The chosen structure expanded to the cost of the seed, with fresh weights: the next round learns from there."""
    learner, recipe = progress.learner, progress.recipe
    cost: Cost = learner.target_cost
    full = replace(progress.budget, amount=cost(progress.teacher), cost=cost)
    wider = rebuild(learner.graph, expand(learner.graph, progress.structure, cost, full), weights=False)
    graph = trace_as(wider, learner.graph.wiring)
    return replace(progress, learner=_learner(graph, learner.regularizer, progress.budget, recipe), structure=None)


def fade(progress: Progress) -> Progress:
    """What is not chosen fades to zero, while the rest learns to do without it."""
    progress = replace(progress, annealed_from=len(progress.history))
    assert progress.structure is not None
    progress.learner.strength = 0.0
    recipe, remaining = progress.recipe, _remaining(progress)
    epochs = min(max(1, round(recipe.fading * recipe.epochs)), remaining - 1)
    callbacks = [FadeOut(progress.structure)]
    return _trained(
        progress, progress.learner, "fade", epochs, _schedule(progress), callbacks, structure=progress.structure
    )


def cut(progress: Progress) -> Progress:
    """The smaller model, with BatchNormalization's statistics estimated anew."""
    training = progress.training
    small = rebuild(progress.learner, progress.structure)
    rebuilt = small.get_weights()
    reestimate_statistics(small, training.data, batch_size=training.recipe.batch_size)
    return replace(progress, small=small, rebuilt_weights=rebuilt, reestimated_weights=small.get_weights())


def tune(progress: Progress) -> Progress:
    """Fine-tune the smaller model for the epochs that are left."""
    recipe, model = progress.recipe, progress.small
    done = len(progress.history) - progress.annealed_from
    if recipe.distillation:
        from_logits = getattr(progress.training.objective["loss"], "from_logits", False)
        model = Distiller(model, progress.teacher, weight=recipe.distillation, from_logits=from_logits)
    return _trained(progress, model, "fine-tune", _remaining(progress) - done, _schedule(progress), [], done=done)


def _remaining(progress: Progress) -> int:
    """Epochs from the beginning of the cosine to the end; a fade and a fine-tuning take one each at least."""
    return max(2, progress.recipe.epochs - progress.annealed_from)


def _schedule(progress: Progress) -> Any:
    return cosine(progress.recipe.learning_rate, progress.steps_per_epoch * _remaining(progress))


def _trained(
    progress: Progress,
    model: Any,
    phase: str,
    epochs: int,
    rate: Any,
    callbacks: list[Any],
    *,
    structure: Structure | None = None,
    choice: Callable[[StructureLearner], Structure] | None = None,
    done: int = 0,
) -> Progress:
    """Train for some epochs; `done` of those that the schedule of learning rates spans are over."""
    training, recipe = progress.training, progress.recipe
    log = EpochLog(
        training.run and training.run / "history.csv",
        phase=phase,
        line=print if training.shows else None,
        structure=structure,
        choice=choice,
        left=max(0, recipe.epochs - len(progress.history)),
    )
    if training.run is not None and phase == "learn":
        callbacks = [*callbacks, StructureLog(training.run / "learned_structure")]
    model.compile(optimizer=recipe.make_optimizer(rate), **training.objective)
    start = done * progress.steps_per_epoch
    model.optimizer.iterations.assign(start)
    fit_on(
        model,
        training.data,
        recipe.batch_size,
        epochs=epochs,
        validation_data=training.validation_data,
        class_weight=recipe.class_weight,
        verbose=int(training.shows == 1),
        callbacks=[log, *callbacks, *training.callbacks],
    )
    steps = (int(ops.convert_to_numpy(model.optimizer.iterations)) - start) // len(log.rows)
    return replace(progress, history=(*progress.history, *log.rows), steps_per_epoch=steps)


def prune(
    model: Any, budget: Any, *, scores: Any = None, cost: Cost | None = None, calibration: Any = None
) -> keras.Model:
    """Cut a trained model to a budget in one shot, and regress back from images what the cut lost, without training.

    Args:
        model: a functional or Sequential model, its ChannelGraph, or a StructureLearner; it is left alone.
        budget: as in `fit_budget`.
        scores: as in `fit_budget`. With `calibration`, a Keras model's channels are chosen by `contribution_scores` per unit
            of cost by default.
        cost: as in `fit_budget`.
        calibration: a few hundred images without labels, as in `recover`; without them the result is to be fine-tuned.

    Returns:
        The rebuilt model.

    Example:
        >>> small = km.prune(model, "50%", calibration=images)
        >>> km.FLOPs()(small) <= 0.5 * km.FLOPs()(model)
        True
    """
    if calibration is None:
        return rebuild(model, fit_budget(model, budget, scores=scores, cost=cost))
    if scores is None and getattr(model, "regularizer", None) is None:
        scores, budget = contribution_scores(model, calibration), budget_from(budget, cost)
        budget = replace(budget, per_cost=budget.per_cost or 1.0)
    structure = fit_budget(model, budget, scores=scores, cost=cost)
    small = rebuild(model, structure)
    recover(small, model, structure, calibration)
    return small
