"""LogisticSigmoid's gates: what the learner computes, what the masked seed computes and what the rebuilt model computes."""

import keras
import models
import numpy as np
import pytest
from exactness import assert_equal_outputs
from keras import ops

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

COSTS = [km.FLOPs(), km.ModelSize(), km.Activations(), km.Latency("P100")]


def fresh(name):
    """A tiny network of its own: learners train their seed."""
    return models.randomize(models.BUILDERS[name](), seed=1)


def gated(name, **options):
    """A learner with random logits, about half of them below the threshold."""
    learner = km.StructureLearner(fresh(name), regularizer=km.LogisticSigmoid(**options))
    random = np.random.default_rng(0)
    learner.gates.logits.assign(random.normal(-0.2, 0.3, learner.gates.logits.shape))
    return learner


@pytest.mark.parametrize("name", models.PARAMETERS)
def test_learner_masked_seed_and_rebuilt_model_agree(name):
    learner = gated(name)
    alive = learner.scores() > learner.regularizer.threshold
    structure = learner.structure()
    inputs = models.examples(learner.seed)
    masked = models.outputs(km.masked(learner, structure), inputs)
    rebuilt = models.outputs(km.rebuild(learner, structure), inputs)
    assert_equal_outputs(rebuilt, masked)
    if np.all(structure.groups(learner.graph) <= (alive | learner.graph.pinned_mask)):  # no path had to be kept
        assert_equal_outputs(models.outputs(learner, inputs), masked)


def test_channels_that_are_read_inside_a_TimeDistributed_have_no_gate():
    layers = keras.layers
    frame = keras.Sequential(
        [keras.Input((6, 6, 3)), layers.Conv2D(4, 3), layers.ReLU(), layers.Conv2D(5, 3), layers.GlobalMaxPooling2D()]
    )
    film = keras.Input((3, 6, 6, 3))
    x = layers.TimeDistributed(frame, name="frames")(film)
    seed = keras.Model(film, layers.Dense(2)(layers.Dense(4, name="hidden")(layers.GlobalAveragePooling1D()(x))))
    learner = km.StructureLearner(models.randomize(seed, seed=1), regularizer=km.LogisticSigmoid())
    assert learner.gates.logits.shape == (5 + 4,)  # what frames makes for the head, and hidden
    learner.gates.logits.assign(np.linspace(-0.5, 0.5, 9))
    inputs = np.random.default_rng(0).normal(size=(2, *film.shape[1:])).astype("float32")
    masked = km.masked(learner, learner.structure())
    assert_equal_outputs([learner.predict(inputs, verbose=0)], [masked.predict(inputs, verbose=0)])
    assert_equal_outputs(
        [km.rebuild(learner, learner.structure()).predict(inputs, verbose=0)], [masked.predict(inputs, verbose=0)]
    )


def test_gates_of_one_leave_the_network_as_it_is():
    learner = gated("residual_projection")
    inputs = models.examples(learner.seed)
    learner.gates.logits.assign(np.full(learner.gates.logits.shape, 10.0))
    assert_equal_outputs(models.outputs(learner, inputs), models.outputs(learner.seed, inputs))


def test_the_learner_holds_the_seeds_weights_once_and_one_logit_per_free_group():
    learner = gated("residual_identity")
    free = learner.graph.num_groups - len(learner.graph.pinned)
    assert learner.gates.logits.shape == (free,)
    assert len(learner.trainable_variables) == len(learner.seed.trainable_variables) + 1


def test_tied_channels_share_a_sample_and_samples_differ_from_step_to_step():
    learner = gated("residual_identity")
    one, other = (ops.convert_to_numpy(learner.gates(np.zeros(1), training=True)) for _ in range(2))
    assert one.shape == (len(learner.gates.gated_groups) + 1,)
    assert np.all((one > 0) & (one <= 1))
    assert one[-1] == 1
    assert not np.allclose(one, other)


def test_samples_that_are_straight_through_are_zero_or_one():
    gates = gated("plain", straight_through=True).gates
    sample = ops.convert_to_numpy(gates(np.zeros(1), training=True))
    np.testing.assert_allclose(sample, np.round(sample), atol=1e-6)


def test_samples_have_the_mean_of_their_probabilities():
    gates = gated("plain", temperature=0.05).gates
    samples = np.mean([ops.convert_to_numpy(gates(np.zeros(1), training=True)) for _ in range(400)], axis=0)
    expected = gates.score(ops.convert_to_numpy(gates.logits).astype(float), (), np)
    np.testing.assert_allclose(samples[:-1], expected, atol=5 * 0.5 / np.sqrt(400))


def test_sampling_stops():
    learner = gated("plain")
    learner.stop_sampling()
    sample = ops.convert_to_numpy(learner.gates(np.zeros(1), training=True))
    expected = learner.gates.score(ops.convert_to_numpy(learner.gates.logits).astype(float), (), np)
    np.testing.assert_allclose(sample[:-1], expected, rtol=1e-5)


def test_a_group_that_is_revived_below_the_threshold_keeps_its_probability():
    learner = gated("plain")
    learner.gates.logits.assign(np.full(learner.gates.logits.shape, -1.0))  # p = 4.5e-5 each
    structure = learner.structure()
    assert min(structure.widths.values()) >= 1
    inputs = models.examples(learner.seed)
    rebuilt, masked = (models.outputs(make(learner, structure), inputs) for make in (km.rebuild, km.masked))
    assert_equal_outputs(rebuilt, masked)


@pytest.mark.parametrize(
    "regularizer", [km.LogisticSigmoid(), km.GroupLasso(), km.Gamma()], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.name)
@pytest.mark.one_of(3)
@pytest.mark.usefixtures("uncompiled")
def test_every_regularizer_trains_under_every_cost(regularizer, cost):
    seed = fresh("residual_identity")
    learner = km.StructureLearner(seed, regularizer=regularizer, cost=cost, strength=1e3 / cost(seed))
    learner.compile(keras.optimizers.Adam(0.02), "mse")
    x = models.examples(seed, 8)
    before = learner.scores()
    history = learner.fit(x, np.zeros((8, 3)), epochs=2, verbose=0).history
    free = ~learner.graph.pinned_mask
    assert np.isfinite(history["loss"]).all()
    assert learner.scores()[free].sum() < before[free].sum()
    assert history["cost"][0] == pytest.approx(cost(seed), rel=1e-4)


def test_a_model_without_a_learner_has_no_logits():
    with pytest.raises(km.KerasMorphError, match="Expected a StructureLearner"):
        km.fit_budget(models.build("plain"), "50%", scores=km.LogisticSigmoid())


@pytest.mark.parametrize(
    "options",
    [{"initial": 1.0}, {"temperature": 0}, {"speed": -1}, {"threshold": -0.1}, {"threshold": float("nan")}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(km.KerasMorphError, match=f"Received: {next(iter(options))}="):
        km.LogisticSigmoid(**options)


def test_only_gates_that_are_sampled_have_a_temperature():
    learner = km.StructureLearner(fresh("plain"))
    with pytest.raises(km.KerasMorphError, match="such as LogisticSigmoid"):
        learner.temperature = 0.5
    learner = gated("plain")
    with pytest.raises(km.KerasMorphError, match="temperature=0"):
        learner.temperature = 0
    learner.temperature = 0.25
    assert learner.temperature == 0.25


def test_a_model_whose_first_input_is_read_late_has_gates():
    first, image = keras.Input((5,)), keras.Input((6, 6, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, activation="relu")(image))
    x = keras.layers.Concatenate()([keras.layers.Dense(4)(x), first])
    model = models.randomize(keras.Model([first, image], keras.layers.Dense(2)(x)), seed=1)
    learner = km.StructureLearner(model, regularizer=km.LogisticSigmoid())
    learner.gates.logits.assign(np.full(learner.gates.logits.shape, 10.0))
    inputs = models.examples(model)
    assert_equal_outputs(models.outputs(learner, inputs), models.outputs(model, inputs))


def test_losses_and_labels_go_by_the_names_of_the_outputs():
    features = keras.Input((6,), name="features")
    x = keras.layers.Dense(8, activation="relu", name="hidden")(features)
    model = keras.Model(features, [keras.layers.Dense(3, name="a")(x), keras.layers.Dense(2, name="b")(x)])
    model.compile("adam", {"a": "mse", "b": "mae"}, metrics={"a": ["mae"]})
    learner = km.StructureLearner(model, regularizer=km.LogisticSigmoid())
    learner.compile("adam", {"a": "mse", "b": "mae"}, metrics={"a": ["mae"]})
    inputs, labels = np.ones((8, 6), "float32"), {"a": np.ones((8, 3)), "b": np.ones((8, 2))}
    assert {"a_loss", "b_loss", "a_mae"} <= learner.fit(inputs, labels, verbose=0).history.keys()
