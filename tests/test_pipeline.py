"""shrink and prune, by what they promise: a smaller model within the budget, and a seed that is left alone."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km
from keras_morph import pipeline
from keras_morph.channels import Wiring
from keras_morph.runs import save_model
from keras_morph.training import batches, distilling
from keras_morph.training.guards import is_trained
from keras_morph.training.recipe import SCORES, ends_in_softmax

OTHER_BACKEND = "tensorflow" if keras.backend.backend() != "tensorflow" else "jax"
EPOCHS = 6


def residual():
    """image(1) -- stem(6) --+-- conv1(8) -- bn1 -- relu -- conv2(6) -- bn2 --+
    |                                              add -- relu -- mean -- logits(3)
    +----------------------------------------------+
    """
    image = keras.Input((6, 6, 1), name="image")
    stem = layers.Conv2D(6, 3, padding="same", use_bias=False, name="stem")(image)
    stem = layers.ReLU(name="relu0")(layers.BatchNormalization(momentum=0.9, name="bn0")(stem))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(stem)
    x = layers.ReLU(name="relu1")(layers.BatchNormalization(momentum=0.9, name="bn1")(x))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv2")(x)
    x = layers.BatchNormalization(momentum=0.9, name="bn2")(x)
    x = layers.ReLU(name="relu2")(layers.Add(name="add")([stem, x]))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", name="logits")(x), name="residual")


def stripes(count, seed):
    """Noise with horizontal, vertical or no stripes, and which."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, count)
    stripe = np.tile([[1.0, -1.0]], (6, 3))
    patterns = np.stack([stripe, stripe.T, np.zeros((6, 6))])
    return (patterns[y] + random.normal(0, 0.5, (count, 6, 6)))[..., None].astype("float32"), y


@pytest.fixture(scope="module")
def seed():
    keras.utils.set_random_seed(0)
    model = residual()
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*stripes(192, seed=0), batch_size=32, epochs=8, verbose=0)
    return model


@pytest.fixture(scope="module")
def run(seed, tmp_path_factory):
    """One shrink to half the FLOPs: its result, folder, lines, and what the seed was before."""
    before, optimizer = seed.get_weights(), seed.optimizer
    folder = tmp_path_factory.mktemp("run")
    keras.utils.set_random_seed(0)
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        result = km.shrink(
            seed,
            "50%",
            stripes(192, seed=0),
            validation_data=stripes(64, seed=1),
            regularizer=km.Gamma(),
            recipe=km.Recipe(epochs=EPOCHS, learning_rate=0.01, batch_size=32),
            run=folder,
            verbose=2,
        )
    assert seed.optimizer is optimizer
    return result, folder, lines.getvalue().splitlines(), before


def test_the_small_model_is_within_the_budget_and_of_its_structure(seed, run):
    result, *_ = run
    flops = km.FLOPs()
    assert 0 < flops(result.small) <= 0.5 * flops(seed)
    assert flops(seed, result.structure) == flops(result.small)
    graph = km.trace(result.small)
    assert {layer: graph.widths[layer] for layer in graph.widths} == {
        layer: width for layer, width in result.structure.widths.items() if layer in graph.widths
    }


def test_the_seed_is_left_alone(seed, run):
    result, _, _, before = run
    for one, other in zip(seed.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert result.learner.seed is not seed


def test_nothing_is_lost_in_the_cut(run):
    """Right after the rebuild, the small model returns what the trained network returns that it was cut from, masked."""
    result, *_ = run
    small = keras.models.clone_model(result.small)
    small.set_weights(result.rebuilt_weights)
    x, _ = stripes(64, seed=2)
    seed = km.masked(result.seed, result.structure)
    expected, received = (ops.convert_to_numpy(model(x, training=False)) for model in (seed, small))
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.01


def test_fine_tuning_goes_on_from_there(run):
    result, *_ = run
    changed = [
        np.abs(one - other).max() for one, other in zip(result.small.get_weights(), result.rebuilt_weights, strict=True)
    ]
    assert max(changed) > 0


def test_the_small_model_still_tells_the_classes_apart(run):
    result, *_ = run
    x, y = stripes(256, seed=3)
    accuracy = np.mean(ops.convert_to_numpy(result.small(x, training=False)).argmax(axis=1) == y)
    assert accuracy > 0.8  # by chance: 0.33


def test_the_run_is_logged(run):
    result, folder, lines, _ = run
    assert len(result.history) == len(lines) <= EPOCHS
    phases = [row["phase"] for row in result.history]
    assert phases[0] == "learn"
    assert phases[-1] == "fine-tune"
    for row in result.history:
        assert 0 <= row["val_accuracy"] <= 1
    assert len((folder / "history.csv").read_text().splitlines()) == 1 + len(lines)
    counts = [json.loads(path.read_text()) for path in (folder / "learned_structure").iterdir()]
    assert {"stem/Conv2D": 6, "conv1/Conv2D": 8, "conv2/Conv2D": 6} in counts  # before the first epoch


class Rates(keras.callbacks.Callback):
    """The learning rates of each phase: at its beginning, and after each epoch."""

    def __init__(self):
        super().__init__()
        self.phases = []

    def _rate(self):
        return float(ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_train_begin(self, logs=None):
        self.phases.append([self._rate()])

    def on_epoch_end(self, epoch, logs=None):
        self.phases[-1].append(self._rate())


def test_a_trained_seed_is_cut_by_what_its_channels_contribute_and_fine_tuned(seed):
    rates = Rates()
    result = km.shrink(
        seed,
        km.Budget("50%", round_to=1),
        stripes(192, seed=0),
        recipe=km.Recipe(epochs=3, learning_rate=0.01, batch_size=32),
        callbacks=[rates],
        verbose=0,
    )
    assert km.FLOPs()(result.small) <= 0.5 * km.FLOPs()(seed)
    assert [row["phase"] for row in result.history] == ["fine-tune"] * 3
    assert rates.phases == [pytest.approx([0.01, 0.0075, 0.0025, 0.0])]  # one cosine, as long as the training
    x, y = stripes(256, seed=3)
    result.small.set_weights(result.reestimated_weights)  # before any training
    assert np.mean(ops.convert_to_numpy(result.small(x, training=False)).argmax(axis=1) == y) > 0.6  # by chance: 0.33


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("named", [None, km.GroupLasso(), km.Gamma()], ids=repr)
def test_a_regularizer_that_is_asked_for_also_chooses_else_contributions_do(named):
    model, (x, y) = residual(), stripes(64, seed=0)
    budget, recipe = km.Budget("50%", round_to=1), km.Recipe(epochs=3, batch_size=32, calibration=x)
    progress = pipeline.begin(model, budget, (x, y), regularizer=named, recipe=recipe, verbose=0)
    progress = pipeline.choose(pipeline.learn(progress))
    assert repr(progress.learner.regularizer) == repr(named or km.GroupLasso())
    by_scores = km.fit_budget(progress.learner, budget)
    assert km.fit_budget(progress.learner, replace(budget, per_cost=0.0)) == by_scores
    per_cost = budget.per_unit_of_cost()
    assert (per_cost.per_cost, replace(budget, per_cost=0.0).per_unit_of_cost().per_cost) == (1.0, 0.0)
    by_images = km.fit_budget(progress.learner, per_cost, scores=km.contribution_scores(progress.learner, x))
    assert by_scores != by_images
    assert progress.structure == (by_scores if named else by_images)


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", SCORES)
def test_scores_that_are_named_choose_whatever_gives_the_penalty(name):
    model, (x, y) = residual(), stripes(64, seed=0)
    budget = km.Budget("50%", round_to=1)
    recipe = km.Recipe(epochs=3, batch_size=32, calibration=x, scores=name)
    progress = pipeline.begin(model, budget, (x, y), regularizer=km.Gamma(), recipe=recipe, verbose=0)
    progress = pipeline.choose(pipeline.learn(progress))
    given = {"taylor": ((x, y),), "fpgm": (), "whc": ()}.get(name, (x,))
    scores = getattr(km, f"{name}_scores")(progress.learner, *given)
    wanted = budget.per_unit_of_cost() if name in ("contribution", "obs", "taylor") else budget
    assert progress.structure == km.fit_budget(progress.learner, wanted, scores=scores)
    assert progress.structure != km.fit_budget(progress.learner, budget)


def test_scores_are_known_by_name():
    with pytest.raises(
        km.KerasMorphError, match=r"Expected scores of contribution, obs, .*Received: scores='magnitude'"
    ):
        km.Recipe(scores="magnitude")


@pytest.fixture(scope="module")
def pruned(seed):
    """The weights of the seed that is cut in half and recovered by 128 images."""
    x, _ = stripes(128, seed=0)
    return km.prune(seed, km.Budget("50%", round_to=1), calibration=x).get_weights()


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_images_to_calibrate_by_are_those_by_which_channels_are_chosen_and_recovered(seed, pruned):
    """Training data that say nothing of the network: the cut is that of `prune`, whatever they are."""
    x, y = stripes(128, seed=0)
    budget, recipe = km.Budget("50%", round_to=1), km.Recipe(epochs=3, batch_size=64, calibration=x)
    result = km.shrink(seed, budget, (np.zeros_like(x), y), recipe=recipe, verbose=0)
    for one, other in zip(result.reestimated_weights, pruned, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(km.DataError, match="Expected an array for each input"):
        km.shrink(seed, budget, (x, y), recipe=replace(recipe, calibration=[x, x]), verbose=0)


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("pairs", [False, True])
def test_images_to_calibrate_by_may_come_from_what_can_be_read_once(seed, pruned, pairs):
    """Choosing reads them, and so does recovering."""
    x, y = stripes(128, seed=0)
    budget = km.Budget("50%", round_to=1)

    def batches():
        return ((x[i : i + 64], y[i : i + 64]) if pairs else x[i : i + 64] for i in (0, 64))

    recipe = km.Recipe(epochs=3, batch_size=64, calibration=batches())
    found = km.shrink(seed, budget, (x, y), recipe=recipe, verbose=0).reestimated_weights
    for result in (found, km.prune(seed, budget, calibration=batches()).get_weights()):
        for one, other in zip(result, pruned, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_the_cosine_begins_where_the_learning_ends_also_without_a_fade():
    found = Rates()
    recipe = km.Recipe(epochs=6, learning_rate=0.01, learning=0.5, batch_size=32)
    result = km.shrink(residual(), "50%", stripes(64, seed=0), recipe=recipe, callbacks=[found], verbose=0)
    phases = [row["phase"] for row in result.history]
    assert phases[-1] == "fine-tune"
    assert set(phases) == {"learn", "fine-tune"}
    assert [rates[0] for rates in found.phases] == pytest.approx([0.01, 0.01])


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_a_trained_network_is_known_with_and_without_its_optimizer():
    convolutional = residual()
    assert not is_trained(convolutional)
    image = keras.Input((4, 3))
    recurrent = keras.Model(image, layers.Dense(2)(layers.LSTM(3)(image)))
    assert not is_trained(recurrent)
    for model in (convolutional, recurrent):
        copy = keras.models.clone_model(model)
        copy.compile("sgd", "mse")
        assert not is_trained(copy)
        shape = [8, *copy.input_shape[1:]]
        copy.fit(np.random.default_rng(0).random(shape, np.float32), np.ones((8, copy.output_shape[-1])), verbose=0)
        assert is_trained(copy)
        stored = keras.models.clone_model(copy)
        stored.set_weights(copy.get_weights())
        assert is_trained(stored)


def classifier(*, activation=None, outputs=1):
    image = keras.Input((4,))
    x = layers.Dense(5, activation="relu")(image)
    heads = [layers.Dense(3, activation=activation, name=f"head{number}")(x) for number in range(outputs)]
    return keras.Model(image, heads if outputs > 1 else heads[0])


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy


@pytest.mark.once
@pytest.mark.parametrize(
    ("model", "loss", "known", "asked", "expected"),
    [
        pytest.param({"activation": "softmax"}, None, True, None, distilling.SHARE, id="a trained classifier"),
        pytest.param({}, CROSS_ENTROPY(from_logits=True), True, None, distilling.SHARE, id="of logits"),
        pytest.param({"activation": "softmax"}, None, True, 0.0, 0.0, id="not wanted"),
        pytest.param({"activation": "softmax"}, None, False, None, 0.0, id="fresh"),
        pytest.param({}, "mse", True, None, 0.0, id="a regression"),
        pytest.param({}, keras.losses.BinaryCrossentropy(from_logits=True), True, None, 0.0, id="of several labels"),
        pytest.param({"outputs": 2}, CROSS_ENTROPY(from_logits=True), True, None, 0.0, id="two outputs"),
    ],
)
def test_a_trained_classifier_is_its_own_teacher(model, loss, known, asked, expected):
    recipe = km.Recipe(loss=loss, distillation=asked)
    recipe, _ = pipeline.settled(recipe, None, km.trace(classifier(**model)), known=known)
    assert recipe.distillation == expected


@pytest.mark.once
@pytest.mark.parametrize(("right", "share"), [(None, 0.5), (0.0, 0.0), (0.553, 0.55), (0.98, 0.9)])
def test_the_more_often_it_is_right_the_more_it_teaches(right, share):
    graph = km.trace(classifier(activation="softmax"))
    assert pipeline.settled(km.Recipe(), None, graph, known=True, right=right)[0].distillation == share


def nested(activation):
    image = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation=activation)])
    return keras.Model(image, inner(layers.Rescaling(1 / 255)(image)))


def by_operation():
    image = keras.Input((4,))
    return keras.Model(image, ops.softmax(layers.Dense(3)(image)))


@pytest.mark.once
@pytest.mark.parametrize(
    ("model", "expected"),
    [(nested("softmax"), True), (nested(None), False), (by_operation(), True), (classifier(outputs=2), False)],
)
def test_a_softmax_is_found_wherever_it_is(model, expected):
    assert ends_in_softmax(model) == expected


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse", "distillation": 0.5}, "distillation=...) expects a classifier of one output"),
        ({"optimizer": "adamm"}, "optimizer: expected the name of one of Keras's"),
        ({"calibration": np.zeros((8, 5), "float32")}, "of shape (n, 4). Received: (8, 5)"),
        ({"optimizer": "without decay"}, "exclude_from_weight_decay(var_names=[...]). Received: one with"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_training(changes, message):
    model, x = classifier(), np.zeros((8, 4), "float32")
    if changes.get("optimizer") == "without decay":
        changes = {"optimizer": keras.optimizers.AdamW()}
        changes["optimizer"].exclude_from_weight_decay(var_list=model.trainable_variables[:1])
    recipe = km.Recipe(**{"epochs": 3, "loss": "mse", **changes})
    with pytest.raises(km.KerasMorphError, match=re.escape(message)):
        km.shrink(model, "60%", (x, np.zeros((8, 3))), recipe=recipe, verbose=0)


@pytest.mark.once
@pytest.mark.parametrize(
    "callback", [keras.callbacks.ReduceLROnPlateau(), keras.callbacks.LearningRateScheduler(lambda _: 0.1)]
)
def test_callbacks_that_set_the_learning_rate_are_refused(callback):
    data = np.zeros((8, 4), "float32"), np.zeros((8, 3))
    with pytest.raises(km.KerasMorphError, match=f"Received: {type(callback).__name__}, which sets it"):
        km.shrink(classifier(), "60%", data, recipe=km.Recipe(epochs=3, loss="mse"), callbacks=[callback], verbose=0)


def test_an_optimizer_that_adds_up_gradients_follows_the_whole_cosine():
    """Its iterations are fewer than the batches that its schedule counts."""
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            rates.append(float(ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    recipe = km.Recipe(
        epochs=5, learning_rate=0.01, learning=0.2, optimizer=keras.optimizers.SGD(gradient_accumulation_steps=4)
    )
    km.shrink(residual(), "60%", stripes(256, seed=0), recipe=recipe, callbacks=[Rates()], verbose=0)
    np.testing.assert_allclose(
        rates, [0.01, *(0.01 * (1 + np.cos(np.pi * np.arange(1, 5) / 4)) / 2)], rtol=1e-4, atol=1e-8
    )


def test_an_optimizer_keeps_what_it_leaves_out_of_its_decay():
    optimizer = keras.optimizers.AdamW(weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["gamma"])
    for given in (optimizer, keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)):
        made = km.Recipe(optimizer=given).make_optimizer(0.3)
        inner = getattr(made, "inner_optimizer", made)
        assert type(made) is type(given)
        np.testing.assert_allclose(float(ops.convert_to_numpy(inner.learning_rate)), 0.3, rtol=1e-6)
        gamma, kernel = keras.Variable(np.ones(2), name="gamma"), keras.Variable(np.ones(2), name="kernel")
        assert (inner._use_weight_decay(gamma), inner._use_weight_decay(kernel)) == (False, True)


def test_labels_of_every_step_are_class_numbers():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Dense(9, activation="relu", name="hidden")(layers.Embedding(10, 8, name="embedding")(tokens))
    model = keras.Model(tokens, layers.Dense(4, activation="softmax", name="tags")(x))
    model.compile("adam", "sparse_categorical_crossentropy")
    random = np.random.default_rng(0)
    data = random.integers(0, 10, (32, 7)), random.integers(0, 4, (32, 7))
    result = km.shrink(model, "70%", data, epochs=3, verbose=0)
    assert result.small.predict(data[0], verbose=0).shape == (32, 7, 4)


class Confidence(keras.metrics.Mean):
    """A user's metric, which Keras cannot make from its config."""

    def __init__(self, name="confidence"):
        super().__init__(name=name)

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(ops.max(y_pred, axis=-1))


def test_a_metric_of_a_users_own_is_taken_as_it_is():
    model = residual()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=[Confidence()])
    seen = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append("confidence" in logs))
    km.shrink(model, "70%", stripes(64, seed=0), epochs=3, callbacks=[callback], verbose=0)
    assert seen == [True] * 3


@pytest.mark.once
def test_data_that_can_be_read_once_are_refused():
    pairs = ((np.zeros((8, 4), "float32"), np.zeros((8, 3))) for _ in range(3))
    with pytest.raises(km.DataError, match="a generator, which can be read once"):
        km.shrink(classifier(), "60%", pairs, recipe=km.Recipe(epochs=3, loss="mse"), verbose=0)


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_a_new_head_on_a_trained_network_teaches_nothing(seed):
    """It is right by chance, which a warning says, by the training data where there are no others."""
    x, y = stripes(96, seed=0)
    with pytest.warns(km.ChanceWarning, match="of the training data"):
        progress = pipeline.begin(seed, "50%", (x, (y + 1) % 3), recipe=km.Recipe(epochs=3))
    assert progress.recipe.distillation == 0
    progress = pipeline.begin(seed, "50%", (x, y), recipe=km.Recipe(epochs=3))
    assert progress.recipe.distillation == distilling.LARGEST_SHARE
    with pytest.warns(km.ChanceWarning, match="of the training data"):
        progress = pipeline.begin(seed, "50%", batches.Batches((x, (y + 1) % 3), 32, 0), recipe=km.Recipe(epochs=3))
    assert progress.recipe.distillation == 0


@pytest.mark.once
def test_shares_of_several_costs_are_those_of_the_seed_in_every_round():
    seed = residual()
    recipe = km.Recipe(epochs=6, rounds=2, loss="mse")
    progress = pipeline.begin(seed, "50% FLOPs, 80% ModelSize", (np.zeros((8, 1)), np.zeros(8)), recipe=recipe)
    kept = {repr(limit.cost): limit.limit for limit in progress.budget.limits(progress.learner.graph)}
    assert kept == {"FLOPs()": 0.5 * km.FLOPs()(seed), "ModelSize()": 0.8 * km.ModelSize()(seed)}
    wider = pipeline.widen(replace(progress, structure=km.fit_budget(progress.learner, "20%")))
    assert {repr(one.cost): one.limit for one in wider.budget.limits(wider.learner.graph)} == kept


OPEN = """
import sys, keras, numpy as np
model = keras.models.load_model(sys.argv[1])
assert not any(name.startswith("keras_morph") for name in sys.modules)
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
print(keras.backend.backend())
"""


@pytest.mark.slow  # laws/test_rebuild_is_exact.py has it do so for a rebuilt network
def test_the_saved_model_opens_on_another_backend_where_keras_morph_was_never_imported(run, tmp_path):
    result, *_ = run
    x, _ = stripes(16, seed=4)
    save_model(result.small, tmp_path / "small.keras")
    np.save(tmp_path / "x.npy", x)
    arguments = [tmp_path / name for name in ("small.keras", "x.npy", "outputs.npy")]
    finished = subprocess.run(
        [sys.executable, "-c", OPEN, *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": OTHER_BACKEND},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.split() == [OTHER_BACKEND]
    expected = ops.convert_to_numpy(result.small(x, training=False))
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=0, atol=1e-5)


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.x, self.y = stripes(64, seed=0)

    def __len__(self):
        return 2

    def __getitem__(self, number):
        part = slice(32 * number, 32 * number + 32)
        return self.x[part], self.y[part]


@pytest.mark.usefixtures("uncompiled")
def test_batches_another_cost_and_another_regularizer():
    """A model without BatchNormalization, of logits, whose parameters are to be no more than 200."""
    image = keras.Input((6, 6, 1))
    x = layers.Conv2D(8, 3, activation="relu", name="conv1")(image)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3, activation="relu", name="conv2")(x))
    seed = keras.Model(image, layers.Dense(3, name="logits")(x))
    result = km.shrink(
        km.trace(seed, protect=["conv2"]),
        km.Budget(200, km.ModelSize()),
        Batches(),
        epochs=3,
        regularizer=km.GroupLasso(),
        recipe=km.Recipe(
            strength=1e-4,
            optimizer=keras.optimizers.SGD,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ),
    )
    assert result.small.count_params() <= 200 < seed.count_params()
    assert result.structure.widths["conv2"] == 6


@pytest.mark.once
def test_a_budget_out_of_reach_is_refused_before_anything_is_trained_or_written(tmp_path):
    seed = residual()
    before = seed.get_weights()
    with pytest.raises(km.BudgetError):
        km.shrink(seed, "0.5%", stripes(8, seed=0), epochs=3, run=tmp_path / "run")
    for one, other in zip(seed.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["residual_projection", "concatenating"])
def test_prune_is_the_rebuilt_structure_of_the_budget(name):
    model = models.build(name)
    before = model.get_weights()
    small = km.prune(model, "50%", scores=km.GroupLasso(), cost=km.ModelSize())
    assert small.count_params() <= 0.5 * model.count_params()
    structure = km.fit_budget(model, "50%", scores=km.GroupLasso(), cost=km.ModelSize())
    inputs = models.examples(model)
    for one, other in zip(
        models.outputs(small, inputs), models.outputs(km.masked(model, structure), inputs), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_prune_keeps_what_is_protected_and_ties_what_is_tied():
    small = km.prune(km.trace(models.build("residual_projection"), protect=["a1"], tie=[["a1", "b1"]]), "60%")
    assert small.get_layer("a1").filters == small.get_layer("b1").filters == 4


def branches():
    """image(1) -- stem(4) --+-- left1(3) -- left2(4) --+
    |                         +-- right1(3) - right2(4) -+-- add -- mean -- head(2)
    +------------------------------------------------------+
    """
    image = keras.Input((6, 6, 1))
    stem = layers.Conv2D(4, 3, padding="same", name="stem")(image)
    ways = [stem]
    for name in ("left", "right"):
        x = layers.Conv2D(3, 3, padding="same", activation="relu", name=f"{name}1")(stem)
        ways.append(layers.Conv2D(4, 3, padding="same", use_bias=False, name=f"{name}2")(x))
    x = layers.GlobalAveragePooling2D()(layers.Add()(ways))
    return keras.Model(image, layers.Dense(2, activation="softmax", name="head")(x), name="branches")


@pytest.mark.once
@pytest.mark.parametrize(
    ("dead", "wiring", "left"),
    [
        (["right1"], {"tie": [["left1", "right1"]]}, Wiring()),
        (
            ["right1"],
            {"tie": [["stem", "left2", "right2"]], "protect": ["r.*2", "stem"]},
            Wiring(("stem",), (("stem", "left2"),)),
        ),
        ([], {"tie": [["left1", "right1"]], "protect": ["left1"]}, Wiring(("left1",), (("left1", "right1"),))),
    ],
)
def test_the_next_round_knows_what_is_said_of_layers_that_are_left(dead, wiring, left):
    seed = branches()
    graph = km.trace(seed, **wiring)
    alive = np.ones(graph.num_groups, bool)
    for layer in graph.layers:
        if layer.name in dead:
            alive[graph.group_of[layer.made]] = False
    learner = km.StructureLearner(graph, regularizer=km.GroupLasso())
    training = SimpleNamespace(recipe=km.Recipe(epochs=6, rounds=2))
    structure = km.Structure.closed(learner.graph, alive)
    progress = km.Progress(training, km.Budget("50%"), seed, learner, structure=structure)
    assert pipeline.widen(progress).learner.graph.wiring == left


@pytest.mark.once
def test_outputs_keep_the_names_by_which_losses_are_given():
    """The one that is added dies, and hands on what is left of the sum."""
    x = keras.Input((6,))
    p, q = layers.Dense(4, name="p")(layers.Dense(3, name="hidden")(x)), layers.Dense(4, name="q")(x)
    model = keras.Model(x, [layers.Add(name="out")([p, q]), layers.Dense(2, name="o2")(q)])
    small = km.rebuild(model, {"hidden": 0})
    assert "p" not in [layer.name for layer in small.layers]
    assert small.output_names == model.output_names
    small.compile("sgd", {"out": "mse", "o2": "mse"})


@pytest.mark.once
def test_an_output_to_which_a_constant_is_added_keeps_its_name_and_type():
    x = keras.Input((6,))
    gone = layers.Dense(3, activation="sigmoid", name="gone")(layers.Dense(3, name="hidden")(x))
    out = layers.Add(name="out", dtype="float64")([layers.Dense(3)(x), layers.Dense(3)(x), gone])
    model = models.randomize(keras.Model(x, [out, layers.Dense(2, name="o2")(x)]), seed=0)
    small = km.rebuild(model, {"hidden": 0})
    assert (small.output_names, small.outputs[0].dtype) == (model.output_names, model.outputs[0].dtype)
    features = np.ones((2, 6), "float32")
    for one, other in zip(small(features), km.masked(model, {"hidden": 0})(features), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(one), ops.convert_to_numpy(other), rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_accuracy_is_that_of_classifiers():
    x = keras.Input((4,))
    recipe, two = km.Recipe(loss="mse"), keras.Model(x, [layers.Dense(2)(x), layers.Dense(2)(x)])
    assert "metrics" not in recipe.objective(two)
    assert "metrics" not in recipe.objective(keras.Model(x, layers.Dense(1)(x)))
    assert recipe.objective(keras.Model(x, layers.Dense(2, activation="softmax")(x)))["metrics"] == ["accuracy"]
