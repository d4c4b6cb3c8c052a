"""Regularizers of one's own, a gate in one file, and scores that are no numbers."""

import keras
import models
import numpy as np
import pytest
from exactness import assert_equal_outputs
from keras import ops

import keras_morph as km
from keras_morph.training.gates import Gates, attach_gates

pytestmark = pytest.mark.usefixtures("quick_initializers")

MODE = {"run_eagerly": keras.backend.backend() == "tensorflow"}


class MeanSquare:
    """All that a regularizer has to have."""

    threshold = 1e-3

    def sources(self, graph):
        return km.GroupLasso().sources(graph)

    def score(self, weight, axes, xp):
        return xp.mean(xp.square(weight), axis=axes)


class HardGate:
    """A gate of one's own, all of it: max(0, min(1, logit)), and the way in which the seed is wired."""

    threshold = 0.25

    def attach(self, graph):
        return attach_gates(graph, lambda groups: HardGates(groups, self, start=0.9))

    def score(self, weight, axes, xp):
        return xp.clip(weight, 0.0, 1.0)


class HardGates(Gates):
    def gate(self, training):
        open_ = ops.clip(self.logits, 0.0, 1.0)
        return open_ if training else ops.where(open_ > self.threshold, open_, ops.zeros_like(open_))


OWN = {"MeanSquare": MeanSquare, "HardGate": HardGate}


def learner_of(regularizer, name="residual_identity", **wiring):
    seed = models.randomize(models.BUILDERS[name](), seed=1)
    graph = km.trace(seed, **wiring)
    learner = km.StructureLearner(graph, regularizer=regularizer, strength=1e3 / km.FLOPs()(seed))
    learner.compile(keras.optimizers.SGD(0.01), "mse", **MODE)
    return learner


def fit(learner):
    x = models.examples(learner.seed, 4)
    return learner.fit(x, np.zeros((4, 3)), verbose=0).history


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_a_regularizer_of_ones_own_learns_chooses_and_rebuilds(kind):
    learner = learner_of(kind())
    before = learner.scores()
    history = fit(learner)
    assert np.isfinite(history["loss"]).all()
    free = ~learner.graph.pinned_mask
    assert free.any()
    assert np.all(learner.scores()[free] <= before[free] + 1e-7)
    assert learner.scores()[free].sum() < before[free].sum() - 1e-4
    structure = km.fit_budget(learner, "60%")
    assert km.FLOPs()(learner.seed, structure) <= 0.6 * km.FLOPs()(learner.seed)
    inputs = models.examples(learner.seed)
    rebuilt, masked = (models.outputs(make(learner, structure), inputs) for make in (km.rebuild, km.masked))
    assert_equal_outputs(rebuilt, masked)


def test_a_gate_of_ones_own_is_what_the_network_computes():
    learner = learner_of(HardGate())
    values = np.where(np.arange(*learner.gates.logits.shape) % 2, 0.7, 0.2)
    learner.gates.logits.assign(values)
    structure, inputs = learner.structure(), models.examples(learner.seed)
    assert sum(structure.widths.values()) < sum(learner.graph.widths.values())
    assert_equal_outputs(models.outputs(learner, inputs), models.outputs(km.rebuild(learner, structure), inputs))
    learner.stop_sampling()  # nothing to stop
    with pytest.raises(km.KerasMorphError, match=r"whose gates have a temperature.*HardGate"):
        learner.temperature = 0.5


def spoil(learner, layers, value):
    """One weight of each of these layers is no number."""
    for name in layers:
        weight = learner.seed.get_layer(name).weights[0]
        values = ops.convert_to_numpy(weight).copy()
        values[..., 0] = value
        weight.assign(values)


REGULARIZERS = {
    "GroupLasso": km.GroupLasso(l1_fraction=0.5),
    "Gamma": km.Gamma(),
    "LogisticSigmoid": km.LogisticSigmoid(),
}


@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS)
def test_a_weight_that_is_nan_has_the_score_nan(regularizer):
    weight = np.array([[np.nan, 0.0, 3.0, -2.0]], np.float32)
    axes, weight = ((0,), weight) if isinstance(regularizer, km.GroupLasso) else ((), weight[0])
    for scores in (
        regularizer.score(weight, axes, np),
        ops.convert_to_numpy(regularizer.score(ops.convert_to_tensor(weight), axes, ops)),
    ):
        np.testing.assert_array_equal(np.isnan(scores), [True, False, False, False])


CHOOSING = {
    "structure": lambda learner: learner.structure(),
    "fit_budget of a learner": lambda learner: km.fit_budget(learner, "50%"),
    "fit_budget of a model": lambda learner: km.fit_budget(learner.seed, "50%"),
    "prune": lambda learner: km.prune(learner.seed, "50%"),
}


@pytest.mark.parametrize("choose", CHOOSING.values(), ids=CHOOSING)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_an_error_that_names_the_layer(value, choose):
    learner = learner_of(km.GroupLasso(), "plain")
    spoil(learner, ["conv2"], value)
    with pytest.raises(km.KerasMorphError, match=r"NaN or infinity for 1 of \d+ groups of plain, first in conv2\. "):
        choose(learner)


@pytest.mark.once
def test_the_first_three_layers_are_named():
    learner = learner_of(km.GroupLasso(), "residual_projection")
    spoil(learner, ["stem", "a1", "a2", "b1", "b2"], np.nan)
    with pytest.raises(km.KerasMorphError, match=r"first in stem, a1, a0\. |first in stem, a1, a2\. "):
        learner.structure()


@pytest.mark.once
def test_what_is_pinned_may_be_anything():
    learner = learner_of(km.GroupLasso(), "plain", protect=["conv2"])
    spoil(learner, ["conv2"], np.nan)
    assert learner.structure().widths["conv2"] == 4


def test_nan_is_not_dead_in_the_cost_that_is_logged():
    learner = learner_of(km.GroupLasso(), "plain")
    learner.compile(keras.optimizers.SGD(0.0), "mse", **MODE)
    spoil(learner, ["conv1", "conv2"], np.nan)
    np.testing.assert_allclose(fit(learner)["cost"], [km.FLOPs()(learner.seed)], rtol=1e-6)


@pytest.mark.once
def test_a_training_that_diverges_says_so():
    learner = learner_of(km.GroupLasso(), "plain")
    spoil(learner, ["conv1"], np.nan)
    x = models.examples(learner.seed, 4)
    with pytest.raises(km.KerasMorphError, match="Where a training has diverged"):
        learner.fit(x, np.zeros((4, 3)), verbose=0, callbacks=[km.StopWithin("50%")])
