"""The whole algorithm, phase by phase: learn, choose, fade out if asked to, cut and recover, fine-tune; every step is public.

A phase is a function from a Progress to a Progress; one of your own goes into `Recipe(phases=...)`. A run that was ended in
the middle goes on: `Progress.saved` and `Progress.at` are the way into a checkpoint and back.
"""

import contextlib
import random
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_morph.channels import ChannelGraph, Wiring
from keras_morph.costs.budget import Budget, budget_from
from keras_morph.costs.costs import Cost
from keras_morph.errors import KerasMorphError
from keras_morph.graph.examples import image_batches, lasting
from keras_morph.graph.identities import fingerprint
from keras_morph.graph.structure import Structure
from keras_morph.graph.tracing import graph_of, trace_as
from keras_morph.keras_internals import batches_seen, seed_shared
from keras_morph.runs import check_run_folder, save_model, write_somewhere
from keras_morph.search.expansion import check_expandable, expand
from keras_morph.search.keeping import fit_measured
from keras_morph.search.scores import PER_COST, check_trainable, contribution_scores, scores_named
from keras_morph.search.selection import fit_budget
from keras_morph.status import read_status, running
from keras_morph.surgery.copying import cloned
from keras_morph.surgery.rebuilding import rebuild
from keras_morph.surgery.recovery import loses, recover
from keras_morph.training.callbacks import EpochLog, FadeOut, StopWithin, StrengthController, StructureLog
from keras_morph.training.checkpoints import Saved, fill, fit_resumably
from keras_morph.training.distilling import Distiller, share_by_default
from keras_morph.training.guards import is_trained, judged
from keras_morph.training.learner import StructureLearner
from keras_morph.training.recipe import (
    Recipe,
    answers_classes,
    check_callbacks,
    check_labelled,
    check_labels,
    check_repeatable,
    check_teacher,
    cosine,
)
from keras_morph.training.regularizers import GroupLasso, Regularizer
from keras_morph.training.statistics import reestimate_statistics
from keras_morph.training.steps import Trainee, compile_plainly, has_own_steps, training_as

__all__ = [
    "Progress",
    "Shrunk",
    "begin",
    "begun",
    "choose",
    "cut",
    "fade",
    "finish",
    "learn",
    "learner_of",
    "phases_of",
    "prune",
    "settle",
    "settled",
    "shrink",
    "through",
    "tune",
    "widen",
]


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

    A fresh model learns for up to 40 % of the epochs which channels are needed, under a penalty whose strength a controller
    moves, until those alive cost no more than the budget. The channels that meet the budget are chosen by what they
    contribute, per unit of cost (`contribution_scores`), or by the scores of a regularizer that is given; the others are
    cut; what that loses is regressed back from training images (`recover`), and the rest of the epochs fine-tunes the
    smaller model. The learning rate is constant while learning and then falls along one cosine.

    A trained model is not made to learn anew: its channels are chosen at once, and all epochs fine-tune, a classifier also by
    the answers of the model as it was. A regularizer, a strength or `Recipe(learning=...)` asks for a learning.

    Args:
        model: a functional or Sequential model, or its ChannelGraph, which says what is protected and tied. It is left
            alone, but for layers that cannot be made anew from their config (a layer with weights and without
            `get_config`, an attention that `quantize` changed inside): these are trained in place.
        budget: as in `fit_budget`. Its first cost prices the channels.
        data: `(x, y)`, or whatever `fit` takes as its first argument (`tf.data.Dataset`, PyDataset, ...).
        validation_data: as in `fit`.
        epochs: of all phases and rounds together; by default the recipe's, which is 30.
        regularizer: gives the penalty, and the scores that choose; by default GroupLasso() gives the penalty, of a fresh network,
            and `contribution_scores` choose.
        recipe: how to train; Recipe() by default.
        run: a run's folder, into which history.csv, learned_structure/, structure.json, seed.keras and small.keras are
            written, and checkpoint/ after each epoch; or None. If an unfinished run is there, with the same arguments, it
            goes on; the result of a finished one is returned.
        verbose: 0: silent. 1: Keras's progress bar and a line per epoch. 2: a line per epoch. "auto": 1 in a terminal, else 2.
        callbacks: further Keras callbacks, for every phase that trains.

    Returns:
        A Shrunk. `small` costs no more than the budget; its structure is one of `seed`.

    Raises:
        BudgetError: before any training, if the budget cannot be read or reached.
        DataError: before any training, for inputs without labels, labels that the loss does not take, or images for the
            calibration that the model does not.
        DivergedError: if the loss is no number any more.
        KerasMorphError: if `run` holds a run of other arguments, or a callback sets learning rates.

    Example:
        >>> result = km.shrink(model, "50%", (x, y), epochs=3, verbose=0)
        >>> km.FLOPs()(result.small) <= 0.5 * km.FLOPs()(model)
        True
    """
    progress = begin(
        model,
        budget,
        data,
        validation_data=validation_data,
        regularizer=regularizer,
        recipe=_with_epochs(recipe, epochs),
        run=run,
        verbose=verbose,
        callbacks=callbacks,
    )
    with running(progress.training.run):
        return finish(progress)


def _with_epochs(recipe: Recipe | None, epochs: int | None) -> Recipe:
    recipe = recipe or Recipe()
    return recipe if epochs is None else replace(recipe, epochs=epochs)


def begin(
    model: Any,
    budget: Any,
    data: Any,
    *,
    validation_data: Any = None,
    regularizer: Regularizer | None = None,
    recipe: Recipe,
    run: str | Path | None = None,
    verbose: int | str = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> "Progress":
    """Where a run begins, or goes on; arguments and errors as in `shrink`."""
    graph, budget = graph_of(model), budget_from(budget)
    for name, given in (("data", data), ("validation_data", validation_data)):
        check_labelled(name, given)
    recipe = replace(recipe, calibration=lasting(graph, recipe.calibration))
    if recipe.calibration is not None:
        image_batches(graph, recipe.calibration)  # raises now if the model does not take them
    check_repeatable("data", data)
    check_repeatable("validation_data", validation_data)
    known, objective = is_trained(graph.model), recipe.objective(graph.model)
    folder = None if run is None else check_run_folder(run)
    for each in (data, validation_data):
        check_labels(each, objective, graph.model)
    if recipe.scores == "taylor":
        check_trainable(graph)
        if objective.get("loss") is None:
            raise KerasMorphError(
                f"scores: taylor expects a loss. Received: {graph.model.name}, which has steps of its own and was compiled with "
                "none; give Recipe(loss=...), or other scores."
            )
    recipe.make_optimizer(recipe.learning_rate)  # raises now if there is no such optimizer
    kind, examples = ("training", data) if validation_data is None else ("validation", validation_data)
    if known and hasattr(examples, "set_epoch"):
        examples.set_epoch(0)
    right = judged(graph.model, examples, kind, recipe.batch_size) if known else None
    named, left_open = regularizer is not None, recipe.distillation is None
    recipe, regularizer = settled(recipe, regularizer, graph, known=known, right=right)
    if recipe.distillation:
        check_teacher(graph.model, objective.get("loss"))
    if recipe.rounds > 1:
        check_expandable(graph)
        budget = budget.within(budget.limits(graph))  # a share of the seed's cost, not of what it is expanded to
    callbacks = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else callbacks
    check_callbacks(callbacks)
    training = Training(data, validation_data, recipe, objective, folder, verbose, callbacks)
    copy = trace_as(cloned(graph.model), graph.wiring)
    learner = learner_of(copy, graph.model, regularizer, budget, recipe)
    fit_budget(learner, budget)  # raises now if it cannot be met
    progress = Progress(training, budget, graph.model, learner, random.getrandbits(32), named, left_open)
    return begun(progress)


def settled(
    recipe: Recipe, regularizer: Regularizer | None, graph: ChannelGraph, *, known: bool, right: float | None = None
) -> tuple[Recipe, Regularizer]:
    """What a caller leaves open: the share of learning, the regularizer, and the seed's part as a teacher.

    Args:
        recipe, regularizer: as in `shrink`.
        graph: of the seed.
        known: whether the seed is trained, so that it is known what its channels are for.
        right: how often its answers are; a new head on a trained network's are by chance, which counts as 0.
    """
    if recipe.learning is None:
        learns = not known or regularizer is not None or recipe.strength is not None or recipe.rounds > 1
        recipe = replace(recipe, learning=LEARNING if learns else 0.0)
    elif not recipe.learning and (regularizer is not None or recipe.strength):
        raise KerasMorphError(
            "A regularizer and a strength are of the learning under a penalty. Expected: none of them where learning is 0, or a "
            f"share of learning. Received: regularizer={regularizer!r}, strength={recipe.strength}, learning=0."
        )
    if recipe.distillation is None:
        teaches = known and not has_own_steps(graph.model)
        teaches = teaches and answers_classes(graph.model, recipe.objective(graph.model)["loss"])
        recipe = replace(recipe, distillation=share_by_default(right) if teaches else 0.0)
    return recipe, regularizer or GroupLasso()


def finish(progress: "Progress") -> Shrunk:
    """The result, after the phases that are not over yet."""
    return through(progress).result()


def through(progress: "Progress") -> "Progress":
    """After the phases that are not over yet."""
    for phase in phases_of(progress.recipe)[progress.over :]:
        progress = replace(phase(progress), over=progress.over + 1)
    return progress


def begun(progress: "Progress") -> "Progress":
    """Where the run was that is in the same folder; the beginning, where there is none."""
    training = progress.training
    saved = None if training.run is None else Saved.load(training.checkpoints / "last.npz")
    if saved is None:
        return progress
    finished = read_status(training.checkpoints.parent).get("state") == "done"
    if missing := {"asked", "over", "history", "order", "phase", "epoch", "steps_per_epoch"} - saved.state.keys():
        raise KerasMorphError(
            f"{training.checkpoints / 'last.npz'} is no checkpoint of shrink: it has no {', '.join(sorted(missing))}. To start "
            f"again remove {training.checkpoints}."
        )
    place = f"{saved.state['phase']}, epoch {saved.state['epoch']} is done"
    training.say(f"{training.run} " + ("is finished: its result is returned" if finished else f"goes on: {place}"))
    return replace(progress.at(saved), finished=finished)


def learner_of(
    graph: ChannelGraph, teacher: keras.Model, regularizer: Regularizer, budget: Budget, recipe: Recipe
) -> StructureLearner:
    """A learner for the first cost of a budget, whose class takes over the steps of the teacher's."""
    cost, kind = budget.amounts()[0][0], training_as(teacher, StructureLearner)
    return kind(graph, regularizer=regularizer, cost=cost, strength=recipe.strength or 0.0)


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
    def checkpoints(self) -> Path:
        """The folder of a run's checkpoints."""
        assert self.run is not None
        return self.run / "checkpoint"

    def say(self, line: str) -> None:
        """Print a line, unless the run is silent."""
        if self.shows:
            sys.stdout.write(f"{line}\n")

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
        steps_per_epoch: optimizer steps in each of them; 0 where there is none yet.
        order: seed of the order in which arrays are seen.
        by_regularizer: whether the regularizer's scores choose after a learning, since it was asked for.
        taught_by_default: whether the caller leaves open how much the seed teaches.
        over: phases that are over.
        earlier: what was chosen in the rounds before, how often each group of each round's network was there.
        under_way: the checkpoint that the phase under way goes on from, or None.
        finished: whether the run was over before; what it wrote then is the caller's.
    """

    training: Training
    budget: Budget
    teacher: keras.Model
    learner: StructureLearner
    order: int = 0
    by_regularizer: bool = False
    taught_by_default: bool = False
    structure: Structure | None = None
    small: keras.Model | None = None
    rebuilt_weights: list[Any] | None = None
    reestimated_weights: list[Any] | None = None
    history: tuple[dict[str, Any], ...] = ()
    steps_per_epoch: int = 0
    over: int = 0
    earlier: tuple[np.ndarray, ...] = ()
    under_way: Saved | None = None
    finished: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.training.recipe

    @property
    def learned(self) -> int:
        """Epochs up to the end of the learning, from which the learning rate falls."""
        return max((number for number, row in enumerate(self.history, 1) if row["phase"] == "learn"), default=0)

    @property
    def models(self) -> dict[str, keras.Model]:
        """What has weights."""
        return {"learner": self.learner} | ({} if self.small is None else {"small": self.small})

    @property
    def asked(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        recipe = self.recipe
        numbers = {name: value for name, value in vars(recipe).items() if isinstance(value, int | float | str | None)}
        class_weight = None if recipe.class_weight is None else {str(k): v for k, v in recipe.class_weight.items()}
        return numbers | {
            "backend": keras.backend.backend(),
            "model": fingerprint(graph_of(self.teacher)),
            "wiring": repr(self.learner.graph.wiring),
            "data": _examples_of(self.training.data),
            "calibration": _examples_of(recipe.calibration),
            "class_weight": class_weight,
            "budget": repr(self.budget),
            "regularizer": _described(self.learner.regularizer),
            "regularizer given": self.by_regularizer,
            "loss": _described(self.training.objective.get("loss")),
            "optimizer": _described(recipe.optimizer),
            "loss_weights": repr(self.training.objective.get("loss_weights")),
            "frozen": [number for number, weight in enumerate(self.teacher.weights) if not weight.trainable],
            "phases": [getattr(phase, "__name__", _described(phase)) for phase in phases_of(recipe)],
            "callbacks": [type(callback).__name__ for callback in self.training.callbacks],
            "teacher": _checksum(self.teacher) if recipe.distillation or not recipe.learning else "",
        }

    def saved(self) -> Saved:
        """All that the models' weights do not hold, at the beginning of a phase."""
        chosen = [] if self.structure is None else [self.structure.copies(self.learner.graph)]
        return Saved(
            {
                "asked": self.asked,
                "over": self.over,
                "history": self.history,
                "steps_per_epoch": self.steps_per_epoch,
                "order": self.order,
            },
            {
                "earlier": list(self.earlier),
                "chosen": chosen,
                "rebuilt": self.rebuilt_weights or [],
                "reestimated": self.reestimated_weights or [],
            },
        )

    def at(self, saved: Saved) -> "Progress":
        """Where a checkpoint was: networks are made as the phases made them, and filled.

        Raises:
            KerasMorphError: if it was made with other arguments.
        """
        state, arrays = saved.state, saved.arrays
        progress = self
        if self.taught_by_default:  # other examples may have been looked at
            share = state["asked"].get("distillation", self.recipe.distillation)
            recipe = replace(self.recipe, distillation=share)
            progress = replace(self, training=replace(self.training, recipe=recipe))
        for name, value in progress.asked.items():
            if state["asked"].get(name, value) != value:  # a version before may not have kept it
                raise KerasMorphError(
                    f"{self.training.run} holds a run with {name}={state['asked'].get(name)!r}. Expected: the same arguments, "
                    f"so that it can go on. Received: {name}={value!r}; give another folder, or remove that one."
                )
        for copies in arrays["earlier"]:
            progress = widen(replace(progress, structure=Structure.closed(progress.learner.graph, copies)))
        learner, small, structure = progress.learner, None, None
        fill(learner.variables, arrays["learner"], learner.seed.name)
        for copies in arrays["chosen"]:
            structure = Structure.closed(learner.graph, copies)
        if "small" in arrays:
            small = rebuild(learner, structure)
            fill(small.variables, arrays["small"], small.name)
        return replace(
            progress,
            structure=structure,
            small=small,
            rebuilt_weights=arrays["rebuilt"],
            reestimated_weights=arrays["reestimated"],
            history=tuple(state["history"]),
            **{name: state[name] for name in ("steps_per_epoch", "order", "over")},
            under_way=saved,
        )

    def result(self) -> Shrunk:
        assert self.structure is not None
        assert self.small is not None
        run = self.training.run
        files: dict[str, Callable[[Path], None]] = {"structure.json": self.structure.save}
        for name, model in (("seed", self.learner.seed), ("small", self.small)):
            files[f"{name}.keras"] = partial(save_model, model)
        if run is not None:
            for name, write in files.items():
                if not (self.finished and (run / name).exists()):
                    write_somewhere(run / name, write)
        return Shrunk(
            self.small,
            self.structure,
            self.learner.seed,
            self.learner,
            self.rebuilt_weights or [],
            self.reestimated_weights or [],
            list(self.history),
        )


LEARNING = 0.4  # of the epochs
SETTLING = 0.5  # of the epochs after the learning, of a family
Phase = Callable[[Progress], Progress]


def phases_of(recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of a run, in order."""
    if recipe.phases is not None:
        return tuple(recipe.phases)
    return (*(learn, choose, widen) * (recipe.rounds - 1), learn, choose, fade, cut, tune)


def learn(progress: Progress) -> Progress:
    """Train under the penalty, until the channels above the threshold meet the budget or the share of epochs is over."""
    recipe, budget = progress.recipe, progress.budget
    if not recipe.learning:
        return progress
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
    """The channels that meet the budget, as measured where its cost can be.

    They are chosen by the recipe's scores; where it names none by contributions per unit of cost, or by the scores of a
    regularizer that was asked for.
    """
    budget, scores, name = progress.budget, None, progress.recipe.scores
    if name is None and not (progress.by_regularizer and progress.learned):
        name = "contribution"
    if name is not None:
        images, how = _calibration(progress), progress.training
        scores = scores_named(name, progress.learner, images, how.data, how.objective, progress.recipe.class_weight)
        budget = budget.per_unit_of_cost() if name in PER_COST else budget
    structure = fit_measured(progress.learner, budget, scores=scores, say=progress.training.say)
    return replace(progress, structure=structure)


def widen(progress: Progress) -> Progress:
    """The chosen structure expanded to the cost of the seed, with fresh weights: the next round learns from there."""
    learner, recipe = progress.learner, progress.recipe
    assert progress.structure is not None
    earlier = (*progress.earlier, progress.structure.copies(learner.graph))
    cost: Cost = learner.target_cost
    full = replace(progress.budget, amount=cost(progress.teacher), cost=cost)
    wider = rebuild(learner.graph, expand(learner.graph, progress.structure, cost, full), weights=False)
    graph = trace_as(wider, _left(learner.graph.wiring, graph_of(wider)))
    learner = learner_of(graph, progress.teacher, learner.regularizer, progress.budget, recipe)
    return replace(progress, learner=learner, structure=None, earlier=earlier)


def _left(wiring: Wiring, graph: ChannelGraph) -> Wiring:
    """What a wiring says of the layers that are still there."""
    protect = tuple(each for each in wiring.protect if any(re.fullmatch(each, layer) for layer in graph.widths))
    ties = [tuple(layer for layer in layers if layer in graph.widths) for layers in wiring.tie]
    return replace(wiring, protect=protect, tie=tuple(layers for layers in ties if len(layers) > 1))


def settle(progress: Progress) -> Progress:
    """Train what has learned without the penalty, at full width: what all budgets of a family have in common."""
    if not progress.learned:
        return progress
    progress.learner.strength = 0.0
    epochs = max(1, round(SETTLING * (progress.recipe.epochs - progress.learned)))
    return _trained(progress, progress.learner, "settle", epochs, _schedule(progress), [])


def fade(progress: Progress) -> Progress:
    """What is not chosen fades to zero, while the rest learns to do without it."""
    recipe, remaining = progress.recipe, _remaining(progress)
    if not recipe.fading:
        return progress
    assert progress.structure is not None
    progress.learner.strength = 0.0
    done = len(progress.history) - progress.learned  # a family has settled
    epochs = min(max(1, round(recipe.fading * recipe.epochs)), remaining - done - 1)
    if epochs < 1:
        return progress
    callbacks = [FadeOut(progress.structure)]
    return _trained(
        progress, progress.learner, "fade", epochs, _schedule(progress, done), callbacks, structure=progress.structure
    )


def cut(progress: Progress) -> Progress:
    """The smaller model: what was cut is regressed back, or, if all had faded, BatchNormalization's statistics estimated anew."""
    small = rebuild(progress.learner, progress.structure)
    rebuilt = small.get_weights()
    if loses(progress.learner, progress.structure):
        recover(small, progress.learner, progress.structure, _calibration(progress))
    else:
        reestimate_statistics(small, _seen(progress), batch_size=progress.recipe.batch_size)
    return replace(progress, small=small, rebuilt_weights=rebuilt, reestimated_weights=small.get_weights())


def _calibration(progress: Progress) -> Any:
    """Images to choose and recover by."""
    given = progress.recipe.calibration
    return _seen(progress) if given is None else given


def _seen(progress: Progress) -> Any:
    """The training data, in an order and with dropout that do not depend on where a run was ended."""
    data = progress.training.data
    seed_shared(progress.order, len(progress.history))
    if hasattr(data, "set_epoch"):
        data.set_epoch(len(progress.history))
    return data


def tune(progress: Progress) -> Progress:
    """Fine-tune the smaller model for the epochs that are left."""
    recipe, model, teacher = progress.recipe, progress.small, progress.teacher
    done = len(progress.history) - progress.learned
    if recipe.distillation:
        from_logits = getattr(progress.training.objective.get("loss"), "from_logits", False)
        kind = training_as(teacher, Distiller)
        model = kind(model, teacher, weight=recipe.distillation, from_logits=from_logits)
    elif has_own_steps(teacher):
        model = training_as(teacher, Trainee)(model)
    return _trained(progress, model, "fine-tune", _remaining(progress) - done, _schedule(progress, done), [])


def _examples_of(data: Any) -> str:
    """Which arrays they are, by their shapes and some of the examples; of other data nobody can tell without reading all."""
    arrays = [each for each in keras.tree.flatten(data) if isinstance(each, np.ndarray) and each.ndim]
    found = 0
    for array in arrays:
        some = array[:: max(1, len(array) // 256)] if array.dtype != object else np.array([])
        found = zlib.crc32(np.ascontiguousarray(some).tobytes(), found)
    return f"{', '.join(str(array.shape) for array in arrays)}, checksum {found:08x}" if arrays else ""


def _described(value: Any) -> str:
    """What a value is, the same in every program."""
    if isinstance(value, keras.losses.Loss | keras.optimizers.Optimizer):
        with contextlib.suppress(Exception):  # one of the user's own need not have a config
            config = {key: part for key, part in value.get_config().items() if key != "name"}  # Keras counts them
            return f"{type(value).__name__} {config}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _checksum(model: keras.Model) -> str:
    """Of the weights."""
    found = 0
    for weight in model.weights:
        found = zlib.crc32(np.ascontiguousarray(ops.convert_to_numpy(weight)).tobytes(), found)
    return f"weights {found:08x}"


def _remaining(progress: Progress) -> int:
    """Epochs from the beginning of the cosine to the end; a fade and a fine-tuning take one each at least."""
    return max(2, progress.recipe.epochs - progress.learned)


def _schedule(progress: Progress, done: int = 0) -> Any:
    """The cosine of learning rates, after `done` of its epochs."""
    steps = progress.steps_per_epoch or _batches(progress.training)
    return cosine(progress.recipe.learning_rate, steps * _remaining(progress), steps * done)


def _batches(training: Training) -> int:
    """Steps of an epoch, before there was one."""
    data = training.data
    if isinstance(data, tuple):
        return -(-len(keras.tree.flatten(data[0])[0]) // training.recipe.batch_size)
    try:
        return len(data)
    except TypeError:  # such as a tf.data.Dataset that does not know how much it filters
        return sum(1 for _ in data)


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
) -> Progress:
    """Train for some epochs, or for what is left of them where a checkpoint was."""
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
        round_ = len(progress.earlier) + 1
        name = "learned_structure" if round_ == 1 else f"learned_structure_{round_}"
        callbacks = [*callbacks, StructureLog(training.run / name)]
    compile_plainly(model, optimizer=recipe.make_optimizer(rate), **training.objective)
    fit_resumably(
        model,
        training.data,
        recipe.batch_size,
        phase=phase,
        epochs=epochs,
        folder=None if training.run is None else training.checkpoints,
        models=progress.models,
        further=progress.saved(),
        saved=progress.under_way,
        callbacks=[log, *callbacks, *training.callbacks],
        seed=progress.order,
        first=len(progress.history),
        validation_data=training.validation_data,
        class_weight=recipe.class_weight,
        verbose=int(training.shows == 1),
    )
    steps = batches_seen(model.optimizer) // len(log.rows)
    return replace(progress, history=(*progress.history, *log.rows), steps_per_epoch=steps, under_way=None)


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
        return rebuild(model, fit_measured(model, budget, scores=scores, cost=cost))
    calibration = lasting(graph_of(model), calibration)
    if scores is None and getattr(model, "regularizer", None) is None:
        scores = contribution_scores(model, calibration)
        budget = budget_from(budget, cost).per_unit_of_cost()
    structure = fit_measured(model, budget, scores=scores, cost=cost)
    small = rebuild(model, structure)
    recover(small, model, structure, calibration)
    return small
