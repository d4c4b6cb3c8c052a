"""What one adds to `fit` of a learner: logs of the structure, stopping within a budget, and fading out what will be cut."""

import csv
import json

import keras
import models
import numpy as np
import pytest
from exactness import assert_equal_outputs
from keras import layers, ops

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

# Compiling would take most of the time on TensorFlow; JAX has nothing else. Fading needs a compiled step to go wrong.
QUICK = {"run_eagerly": keras.backend.backend() == "tensorflow"}
COMPILED = {"jit_compile": keras.backend.backend() == "jax"}


def learner_of(model, optimizer=None, mode=QUICK, **options):
    learner = km.StructureLearner(model, **options)
    learner.compile(optimizer or keras.optimizers.SGD(0.0), loss="mse", **mode)
    return learner


def fit(model, callbacks, epochs=2, steps=3, **options):
    """Steps of two examples each."""
    network = getattr(model, "seed", model)
    x = models.examples(network, count=2 * steps, seed=3)
    y = np.random.default_rng(4).normal(0, 1, (2 * steps, *network.output_shape[1:])).astype("float32")
    return model.fit(x, y, batch_size=2, epochs=epochs, verbose=0, callbacks=callbacks, **options)


def fresh(name, seed=1):
    return models.randomize(models.BUILDERS[name](), seed=seed)


def structure_with(model, **alive):
    """The structure in which of these layers only these channels are alive."""
    graph = km.trace(model)
    groups = np.ones(graph.num_groups, bool)
    for layer in graph.layers:
        if layer.name in alive:
            groups[graph.group_of[np.delete(layer.made, alive[layer.name])]] = False
    return km.Structure.closed(graph, groups)


# The log of the structure


def test_the_structure_is_written_before_the_first_epoch_and_after_each(tmp_path):
    learner = learner_of(fresh("plain"))
    fit(learner, [km.StructureLog(tmp_path / "learned_structure")], epochs=2, steps=3)
    assert sorted(path.name for path in (tmp_path / "learned_structure").iterdir()) == ["alive_0", "alive_3", "alive_6"]
    for step in (0, 3, 6):
        assert (
            json.loads((tmp_path / "learned_structure" / f"alive_{step}").read_text()) == learner.structure().counts()
        )


def test_the_counts_in_the_log_are_sorted_by_name(tmp_path):
    fit(learner_of(fresh("residual_identity")), [km.StructureLog(tmp_path)], epochs=1)
    text = (tmp_path / "alive_3").read_text()
    assert text == '{\n  "conv1/Conv2D": 5,\n  "conv2/Conv2D": 4,\n  "stem/Conv2D": 4\n}\n'


def test_a_second_fit_goes_on_with_the_log(tmp_path):
    learner = learner_of(fresh("plain"))
    fit(learner, [km.StructureLog(tmp_path)], epochs=1)
    (tmp_path / "alive_0").write_text("{}")
    fit(learner, [km.StructureLog(tmp_path)], epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive_0", "alive_3", "alive_6"]
    assert (tmp_path / "alive_0").read_text() == "{}"


def test_the_log_follows_channels_that_die_and_rebuilds(tmp_path):
    model = fresh("plain")
    kernel = model.get_layer("conv1").kernel

    class Killing(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            kernel.assign(ops.convert_to_numpy(kernel) * (np.arange(5) > epoch))

    fit(learner_of(model), [Killing(), km.StructureLog(tmp_path)])
    counts = [json.loads((tmp_path / f"alive_{step}").read_text())["conv1/Conv2D"] for step in (0, 3, 6)]
    assert counts == [5, 4, 3]
    np.testing.assert_equal(km.rebuild(model, tmp_path / "alive_6", weights=False).get_layer("conv1").filters, 3)


# The log of the epochs


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_history_csv_has_a_row_per_epoch_with_cost_strength_and_channels(tmp_path):
    model = fresh("plain")
    model.get_layer("conv1").kernel.assign(ops.convert_to_numpy(model.get_layer("conv1").kernel) * [1, 0, 1, 0, 1])
    learner = learner_of(model, strength=1e-7)
    log = km.EpochLog(tmp_path / "history.csv")
    history = fit(learner, [log], validation_split=0.5)
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == (
        "phase,epoch,loss,accuracy,val_accuracy,cost_share,strength,channels,scores_left,channels_after_cut,changed"
    )
    rows = rows_of(tmp_path / "history.csv")
    assert [(row["phase"], row["epoch"], row["channels"], row["accuracy"]) for row in rows] == [
        ("learn", "1", "10", ""),
        ("learn", "2", "10", ""),
    ]
    share = km.FLOPs()(model, learner.structure()) / km.FLOPs()(model)
    assert share < 1
    for number, row in enumerate(rows):
        np.testing.assert_allclose(float(row["cost_share"]), share)
        np.testing.assert_allclose(float(row["strength"]), 1e-7, rtol=1e-6)
        np.testing.assert_allclose(float(row["loss"]), history.history["loss"][number])
    assert [row["cost_share"] for row in log.rows] == [share, share]


def test_rows_that_are_there_already_are_kept(tmp_path):
    learner = learner_of(fresh("plain"))
    for phase in ("learn", "fade"):
        fit(learner, [km.EpochLog(tmp_path / "history.csv", phase=phase)])
    found = [(row["phase"], row["epoch"]) for row in rows_of(tmp_path / "history.csv")]
    assert found == [("learn", "1"), ("learn", "2"), ("fade", "1"), ("fade", "2")]


def test_the_epochs_of_a_plain_model_have_no_cost(tmp_path):
    model = fresh("plain")
    model.compile(keras.optimizers.SGD(0.0), "mse", **QUICK)
    fit(model, [km.EpochLog(tmp_path / "history.csv", phase="fine-tune")], epochs=1)
    (row,) = rows_of(tmp_path / "history.csv")
    assert (row["phase"], row["cost_share"], row["strength"], row["channels"]) == ("fine-tune", "", "", "")


def test_a_line_per_epoch_is_handed_out():
    lines = []
    model = fresh("plain")
    fit(learner_of(model, strength=0.5), [km.EpochLog(line=lines.append, phase="learn")])
    said = [line.split() for line in lines]
    assert [words[:2] + words[4:] for words in said] == [
        ["learn", f"{epoch}/2", "cost", "100.0%", "strength", "0.5", "channels", "12"] for epoch in (1, 2)
    ]
    assert all(words[2] == "loss" and float(words[3]) > 0 for words in said)


def test_the_cost_of_a_structure_that_is_decided_is_logged_instead_of_the_learners_own():
    model = fresh("plain")
    structure = structure_with(model, conv1=[0])
    log = km.EpochLog(structure=structure)
    fit(learner_of(model), [log], epochs=1)
    np.testing.assert_allclose(log.rows[0]["cost_share"], km.FLOPs()(model, structure) / km.FLOPs()(model))
    np.testing.assert_equal(log.rows[0]["channels"], 8)


# Stopping


class KillingOneChannelPerEpoch(keras.callbacks.Callback):
    """conv1 of `plain` has 5, 4, 3, 2, 1 channels."""

    def on_epoch_end(self, epoch, logs=None):
        kernel = self.model.seed.get_layer("conv1").kernel
        kernel.assign(ops.convert_to_numpy(kernel) * (np.arange(5) > epoch))


@pytest.mark.once
@pytest.mark.parametrize(
    ("budget", "epochs"),
    [
        # FLOPs of `plain` are 9,720 n1 / 5 + 5,760 n1 / 5 + 24: they fall by a fifth with each channel of conv1.
        ("100%", 1),
        ("81%", 1),
        ("80%", 2),
        ("45%", 3),
        ({km.FLOPs(): "81%", km.ModelSize(): "50%"}, 3),
        ("1%", 5),
    ],
    ids=str,
)
def test_training_stops_at_the_first_epoch_within_the_budget(budget, epochs):
    learner = learner_of(fresh("plain"))
    history = fit(learner, [KillingOneChannelPerEpoch(), km.StopWithin(budget)], epochs=5, steps=1)
    np.testing.assert_equal(len(history.epoch), epochs)


# Fading


FADED = {
    "plain": {"conv1": [0, 2], "conv2": [1, 2, 3]},
    "residual_identity": {"stem": [1, 2], "conv1": [0, 4]},
    "inverted_residual": {"expand": [0, 3, 5], "stem": [0, 1, 2]},
    "flattening": {"conv2": [0, 2], "dense1": [1, 2]},
    "operations": {"inner/conv2": [0, 1], "conv1": [0, 3]},
}


ON_EVERY_BACKEND = ("residual_identity", "operations")


@pytest.mark.parametrize(
    "name", [name if name in ON_EVERY_BACKEND else pytest.param(name, marks=pytest.mark.once) for name in FADED]
)
def test_after_fading_the_learner_computes_what_the_masked_seed_and_the_rebuilt_model_compute(name, request):
    if name not in ON_EVERY_BACKEND:
        request.getfixturevalue("uncompiled")
    model = fresh(name)
    structure = structure_with(model, **FADED[name])
    learner = learner_of(model, keras.optimizers.Adam(0.01), COMPILED)
    before = model.get_weights()
    fit(learner, [km.FadeOut(structure)], epochs=1)
    assert all(np.any(old != new) for old, new in zip(before, model.get_weights(), strict=True))
    inputs = models.examples(model, seed=9)
    expected = models.outputs(learner, inputs)
    for other in (km.masked(learner, structure), km.rebuild(learner, structure), km.rebuild(model, structure)):
        assert_equal_outputs(models.outputs(other, inputs), expected)
    assert km.rebuild(learner, structure).count_params() < model.count_params()


def test_dead_entries_fade_at_a_constant_rate_and_the_others_are_left_alone():
    model = fresh("plain")
    kernel = model.get_layer("conv1").kernel
    before = ops.convert_to_numpy(kernel).copy()
    seen = []

    class Watching(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(ops.convert_to_numpy(kernel).copy())

    # Nothing is learned, so that only the fading is seen: four steps down to a ten thousandth, a tenth each.
    fit(learner_of(model), [km.FadeOut(structure_with(model, conv1=[0, 2])), Watching()], epochs=4, steps=1)
    for step, values in enumerate(seen, start=1):
        np.testing.assert_allclose(values[..., [1, 3, 4]], 0.1**step * before[..., [1, 3, 4]], rtol=1e-5)
        np.testing.assert_array_equal(values[..., [0, 2]], before[..., [0, 2]])
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel)[..., [1, 3, 4]], 0)
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel)[..., [0, 2]], before[..., [0, 2]])
    reading = ops.convert_to_numpy(model.get_layer("conv2").kernel)
    np.testing.assert_array_equal(reading[:, :, [1, 3, 4]], 0)
    assert np.all(reading[:, :, [0, 2]] != 0)


def test_fading_may_take_fewer_steps_than_the_training():
    model = fresh("plain")
    kernel = model.get_layer("conv1").kernel
    before = ops.convert_to_numpy(kernel).copy()
    seen = []

    class Watching(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(ops.convert_to_numpy(kernel).copy())

    fade = km.FadeOut(structure_with(model, conv1=[0, 2]), steps=2)
    fit(learner_of(model), [fade, Watching()], epochs=3, steps=1)
    np.testing.assert_allclose(seen[1][..., 1], 1e-4 * before[..., 1], rtol=1e-5)
    np.testing.assert_allclose(seen[2][..., 1], 1e-6 * before[..., 1], rtol=1e-5)


def test_constraints_hold_while_fading_and_are_put_back_afterwards():
    image = keras.Input((6, 6, 3), name="image")
    limit = keras.constraints.MaxNorm(0.5, axis=[0, 1, 2])
    x = layers.Conv2D(4, 3, kernel_constraint=limit, name="conv1")(image)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    model = models.randomize(keras.Model(image, layers.Dense(3, name="dense")(x)), seed=1)
    kernels = [model.get_layer(name).kernel for name in ("conv1", "dense")]
    fit(learner_of(model, keras.optimizers.SGD(0.1)), [km.FadeOut(structure_with(model, conv1=[0, 2]))])
    assert [kernel.constraint for kernel in kernels] == [limit, None]
    norms = np.sqrt((ops.convert_to_numpy(kernels[0]) ** 2).sum(axis=(0, 1, 2)))
    assert np.all(norms[[0, 2]] > 0.4)
    assert np.all(norms <= 0.5 + 1e-5)
    np.testing.assert_array_equal(norms[[1, 3]], 0)


def test_after_fading_dead_channels_can_be_trained_again():
    model = fresh("plain")
    learner = learner_of(model, keras.optimizers.SGD(0.05), COMPILED)
    fit(learner, [km.FadeOut(structure_with(model, conv1=[0, 2], conv2=[0, 1]))])
    bias = model.get_layer("conv2").bias
    dense = model.get_layer("dense").kernel
    dense.assign(np.ones((4, 3)))
    before = ops.convert_to_numpy(bias).copy()
    bias.assign(before + 1.0)
    fit(learner, [])
    assert np.all(ops.convert_to_numpy(bias)[[2, 3]] > 0.2)


def test_the_controller_raises_the_strength_above_the_plan_and_lowers_it_below(monkeypatch):
    learner = learner_of(fresh("plain"))
    # The plan: from 1 to half in 4 epochs: 0.875, 0.75, 0.625, 0.5.
    left = iter([1.0, 0.75, 0.5, 0.5])
    monkeypatch.setattr(km.StrengthController, "left", lambda controller: next(left))
    start = 20 / learner.target_cost(learner.graph)
    strengths = []
    log = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: strengths.append(learner.strength))
    fit(learner, [km.StrengthController("50%", factor=2.0), log], epochs=4)
    strengths.append(learner.strength)
    np.testing.assert_allclose(np.divide(strengths, start), [1, 2, 2, 1, 1], rtol=1e-5)


def test_the_controller_begins_and_goes_on_as_the_regularizer_says():
    learner = learner_of(fresh("plain"), regularizer=km.LogisticSigmoid())
    fit(learner, [km.StrengthController("10%")], epochs=2)
    assert learner.strength * learner.target_cost(learner.graph) == pytest.approx(1.0, rel=1e-5)
    learner = learner_of(fresh("plain"), regularizer=km.LogisticSigmoid())
    fit(learner, [km.StrengthController("10%", factor=2.0)], epochs=2)
    assert learner.strength * learner.target_cost(learner.graph) > 1.5


def test_what_is_left_of_the_scores_is_weighted_by_prices():
    learner = learner_of(km.trace(fresh("plain"), protect=["conv2"]))
    controller = km.StrengthController("50%")
    controller.set_model(learner)
    controller.set_params({"epochs": 1})
    controller.on_train_begin()
    assert controller.left() == 1
    kernel = learner.seed.get_layer("conv1").kernel
    kernel.assign(0.5 * ops.convert_to_numpy(kernel))
    assert controller.left() == pytest.approx(0.5)  # conv1 makes the only channels that may go
    kernel.assign(4 * ops.convert_to_numpy(kernel))
    assert controller.left() == 1  # growing makes up for nothing


def test_the_controller_goes_on_from_the_strength_that_is_there():
    learner = learner_of(fresh("plain"), strength=3e-4)
    fit(learner, [km.StrengthController("1%", factor=10.0)], epochs=2)
    assert learner.strength == pytest.approx(3e-2, rel=1e-5)


def test_the_temperature_falls_geometrically():
    learner = learner_of(fresh("plain"), regularizer=km.LogisticSigmoid(temperature=1.0))
    temperatures = []
    log = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: temperatures.append(learner.temperature))
    fit(learner, [km.Anneal(0.01), log], epochs=3)
    np.testing.assert_allclose(temperatures, [1.0, 0.1, 0.01], rtol=1e-4)


def test_fading_stops_the_sampling_of_gates():
    learner = learner_of(fresh("residual_identity"), regularizer=km.LogisticSigmoid())
    structure = km.fit_budget(learner, "70%")
    fit(learner, [km.FadeOut(structure)], epochs=2)
    assert float(ops.convert_to_numpy(learner.gates.sampling)) == 0
    inputs = models.examples(learner.seed)
    rebuilt, masked = (models.outputs(make(learner, structure), inputs) for make in (km.rebuild, km.masked))
    assert_equal_outputs(rebuilt, masked)
    assert_equal_outputs(models.outputs(learner, inputs), masked)


@pytest.mark.parametrize(
    "make",
    [lambda: km.Anneal(0), lambda: km.StrengthController("50%", factor=1.0)],
    ids=["Anneal", "StrengthController"],
)
def test_options_of_callbacks_out_of_range_are_refused(make):
    with pytest.raises(km.KerasMorphError, match="Received"):
        make()
