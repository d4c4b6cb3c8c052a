"""Several budgets from one learning: what is learned once is chosen from, cut, recovered and fine-tuned for each of them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_morph.channels import ChannelGraph
from keras_morph.costs.budget import Budget, budget_from
from keras_morph.errors import KerasMorphError
from keras_morph.graph.tracing import graph_of, trace_as
from keras_morph.pipeline import (
    SETTLING,
    Progress,
    Shrunk,
    begin,
    begun,
    choose,
    cut,
    fade,
    finish,
    learn,
    learner_of,
    settle,
    through,
    tune,
)
from keras_morph.search.selection import fit_budget
from keras_morph.status import running
from keras_morph.surgery.copying import cloned
from keras_morph.training.checkpoints import fill
from keras_morph.training.recipe import Recipe
from keras_morph.training.regularizers import Regularizer

__all__ = ["folder_of", "shrink_family"]

LEAST, MOST = 0.2, 0.5  # of the epochs that `shrink` has after its learning, for the whole cost and for none of it


def shrink_family(
    model: Any,
    budgets: Sequence[Any],
    data: Any,
    *,
    validation_data: Any = None,
    regularizer: Regularizer | None = None,
    recipe: Recipe | None = None,
    run: str | Path | None = None,
    verbose: int | str = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> list[Shrunk]:
    """Shrink a model to several budgets, of which it learns once what it needs.

    The learning goes as far as the smallest budget asks, and half of the epochs that `shrink` has after it train on at full
    width, without the penalty: what all budgets have in common. From there a copy for each budget is chosen from, cut,
    recovered and fine-tuned, in a part of these epochs: 47 % for a budget of 10 % of the cost, 35 % for 50 %, 23 % for 90 %.

    Args:
        model: as in `shrink`. Every layer must be one that can be made anew from its config.
        budgets: each as in `shrink`; their first costs are the same.
        data: as in `shrink`.
        validation_data: as in `shrink`.
        regularizer: as in `shrink`.
        recipe: as in `shrink`, for a single budget; of one round.
        run: as in `shrink`, for the learning; a folder in it for each budget. Budgets that are finished are not trained
            again, and larger ones than the smallest may be added later.
        verbose: as in `shrink`.
        callbacks: as in `shrink`.

    Returns:
        A Shrunk for each budget, in their order.

    Raises:
        KerasMorphError: as in `shrink`; for no budgets, two that share a folder, different costs, more rounds than one, or
            layers that cannot be made anew.

    Example:
        >>> half, quarter = km.shrink_family(model, ["50%", "25%"], (x, y), recipe=km.Recipe(epochs=3), verbose=0)
        >>> km.FLOPs()(quarter.small) <= 0.25 * km.FLOPs()(model)
        True
    """
    recipe, graph = recipe or Recipe(), graph_of(model)
    members = [budget_from(budget) for budget in budgets]
    smallest = _smallest(members, graph)
    if recipe.rounds > 1 or recipe.phases is not None:
        raise KerasMorphError(
            "A family learns once. Expected: a recipe with rounds=1 and phases=None. Received: others."
        )
    progress = begin(
        graph,
        smallest,
        data,
        validation_data=validation_data,
        regularizer=regularizer,
        recipe=replace(recipe, phases=(learn, settle)),
        run=run,
        verbose=verbose,
        callbacks=callbacks,
    )
    for budget in members:
        fit_budget(progress.learner, budget)  # raises now if it cannot be met
    recipe = progress.recipe
    with running(progress.training.run):
        learned = through(progress)
        results = []
        for budget in members:
            learned.training.say(f"budget {budget.amount}")
            member = _member(learned, budget, recipe)
            with running(member.training.run):
                results.append(finish(member))
        return results


def _smallest(budgets: Sequence[Budget], graph: ChannelGraph) -> Budget:
    """The budget that the learning has to reach."""
    costs = {repr(budget.amounts()[0][0]) for budget in budgets}
    names = {folder_of(budget) for budget in budgets}
    if len(costs) != 1 or len(names) != len(budgets):
        raise KerasMorphError(
            "A family expects one or more different budgets whose first costs are the same. Received: "
            f"{', '.join(repr(budget.amount) for budget in budgets) or 'none'}."
        )
    return min(budgets, key=lambda budget: _share(budget, graph))


def _share(budget: Budget, graph: ChannelGraph) -> float:
    """A budget as a share of the whole cost, of the tightest one."""
    return min(1.0, *(limit.limit / limit.cost(graph) for limit in budget.limits(graph)))


def folder_of(budget: Budget) -> str:
    """The name of a budget's folder in a family's, such as `50pct`."""
    return re.sub(r"[^\w.+-]+", "-", str(budget.amount).replace("%", "pct")).strip("-")


def _member(learned: Progress, budget: Budget, recipe: Recipe) -> Progress:
    """What was learned, on its way to one of the budgets, or where it was."""
    learner, run, done = learned.learner, learned.training.run, len(learned.history)
    copy = cloned(learner.seed)
    if {id(variable) for variable in copy.variables} & {id(variable) for variable in learner.seed.variables}:
        raise KerasMorphError(
            f"{learner.seed.name} has layers with weights that cannot be made anew from their config. Expected: get_config for "
            "each of them, since every budget of a family gets a copy. Received: none; or shrink to one budget at a time."
        )
    share = MOST - (MOST - LEAST) * _share(budget, learner.graph)
    share += 0.0 if learned.learned else SETTLING  # which a trained network is spared
    left = max(1, 3 - done, round(share * (recipe.epochs - learned.learned)))
    fading = min(1.0, recipe.fading * recipe.epochs / max(1, recipe.epochs - learned.learned)) * left / (done + left)
    finishing = replace(recipe, epochs=done + left, fading=fading, phases=(choose, fade, cut, tune))
    training = replace(learned.training, recipe=finishing, run=run and run / folder_of(budget))
    copied = learner_of(trace_as(copy, learner.graph.wiring), learned.teacher, learner.regularizer, budget, finishing)
    fill(copied.variables, [ops.convert_to_numpy(variable) for variable in learner.variables], learner.name)
    return begun(replace(learned, training=training, budget=budget, learner=copied, over=0))
