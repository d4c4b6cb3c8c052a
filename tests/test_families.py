"""Several budgets from one learning: each as `shrink` would hand it back; a family that is ended goes on."""

import json
import signal
from dataclasses import replace

import keras
import numpy as np
import pytest
from test_resuming import RECIPE as FADING
from test_resuming import TORCH, Ending, KilledError, X, Y, costly, tiny

import keras_morph as km
from keras_morph.pipeline import LEARNING

RECIPE = replace(FADING, fading=0.0)
BUDGETS = ("80%", "60%", "50%")
FLOPS = km.FLOPs()


def family(run=None, budgets=BUDGETS, **options):
    keras.utils.set_random_seed(0)
    options = {"recipe": RECIPE, "verbose": 0, **options}
    return km.shrink_family(tiny(), budgets, (X, Y), validation_data=(X[:16], Y[:16]), run=run, **options)


class DyingIn(keras.callbacks.Callback):
    """Ends the program at the beginning of the n-th epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.left = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.left -= 1
        if not self.left:
            raise KilledError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return family(folder, callbacks=[DyingIn(-1)]), folder


@costly
def test_each_budget_is_kept_after_one_learning(undisturbed):
    results, folder = undisturbed
    learned = [row for row in results[0].history if row["phase"] in ("learn", "settle")]
    assert 1 <= sum(row["phase"] == "learn" for row in learned) <= round(LEARNING * RECIPE.epochs)
    assert learned[-1]["phase"] == "settle"
    for result, budget, share in zip(results, BUDGETS, (0.8, 0.6, 0.5), strict=True):
        seed = FLOPS(result.seed)
        assert 0 < FLOPS(result.small) <= share * seed
        left = [row["phase"] for row in result.history[len(learned) :]]
        assert left == ["fine-tune"] * len(left)
        assert result.history[: len(learned)] == learned
        # It computes what the network that it was cut out of computes with its dead channels masked.
        tuned = result.small.get_weights()
        result.small.set_weights(result.rebuilt_weights)
        masked = km.masked(result.seed, result.structure)
        expected, received = (each.predict(X, verbose=0) for each in (masked, result.small))
        np.testing.assert_allclose(received, expected, atol=1e-5)
        result.small.set_weights(tuned)
        loaded = keras.models.load_model(folder / f"{budget[:-1]}pct" / "small.keras")
        np.testing.assert_array_equal(loaded.count_params(), result.small.count_params())


@costly
@pytest.mark.parametrize("epoch", [2, 4, 5, 6])  # of learning; of settling; of the first budget's; of the second's
def test_a_family_that_is_ended_goes_on(undisturbed, tmp_path, epoch):
    with pytest.raises(KilledError):
        family(tmp_path, callbacks=[DyingIn(epoch)])
    began = DyingIn(-1)
    results = family(tmp_path, callbacks=[began])
    whole = (
        sum(len(result.history) for result in results) - (len(results) - 1) * 4
    )  # 2 epochs of learning and of settling, once
    assert -1 - began.left == whole - (epoch - 1)
    for result, other in zip(results, undisturbed[0], strict=True):
        assert result.structure == other.structure
        same = np.testing.assert_array_equal if TORCH else np.testing.assert_allclose
        for one, another in zip(result.small.get_weights(), other.small.get_weights(), strict=True):
            same(one, another, **({} if TORCH else {"rtol": 1e-3, "atol": 1e-4}))


@costly
def test_signals_end_a_family_after_the_step(undisturbed, tmp_path):
    with pytest.raises(SystemExit):
        family(tmp_path, callbacks=[Ending(signal.SIGTERM, 5)])
    whole, part = (json.loads((tmp_path / name / "status.json").read_text())["why"] for name in ("", "80pct"))
    assert whole == "interrupted by SIGTERM in 80pct, fine-tune, epoch 1"
    assert part == "interrupted by SIGTERM in fine-tune, epoch 1"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    results = family(tmp_path, callbacks=[Ending(signal.SIGTERM, 99)])
    for result, other in zip(results, undisturbed[0], strict=True):
        for one, another in zip(result.small.get_weights(), other.small.get_weights(), strict=True):
            np.testing.assert_allclose(one, another, rtol=1e-3, atol=1e-4)


@costly
def test_what_is_finished_is_not_trained_again_and_a_budget_may_be_added(undisturbed):
    _, folder = undisturbed
    began = DyingIn(-1)
    results = family(folder, [*BUDGETS, "70%"], callbacks=[began])
    assert -1 - began.left == 1
    assert FLOPS(results[3].small) <= 0.7 * FLOPS(results[3].seed)
    assert {json.loads(path.read_text())["state"] for path in folder.rglob("status.json")} == {"done"}


@costly
@pytest.mark.parametrize(("epochs", "fading"), [(6, 0.1), (12, 0.5)])
def test_a_fade_leaves_an_epoch_to_fine_tune(epochs, fading):
    recipe = km.Recipe(epochs=epochs, fading=fading, batch_size=16)
    for result in family(budgets=("90%", "50%"), recipe=recipe):
        assert [row["phase"] for row in result.history][-1] == "fine-tune"


@costly
@pytest.mark.parametrize(("learning", "regularizer"), [(0.0, None), (1.0, km.LogisticSigmoid())])
def test_gates_and_shares_at_their_ends(learning, regularizer):
    recipe = km.Recipe(epochs=3, learning=learning, fading=1 - learning, batch_size=16)
    for result, share in zip(
        family(budgets=("70%", "50%"), regularizer=regularizer, recipe=recipe), (0.7, 0.5), strict=True
    ):
        assert FLOPS(result.small) <= share * FLOPS(result.seed)
        assert [row["phase"] for row in result.history][-1] == "fine-tune"


@pytest.mark.parametrize(
    ("budgets", "options", "message"),
    [
        ([], {}, "Received: none"),
        (["50%", "50%"], {}, "different budgets"),
        (["50%", km.Budget("50%", km.ModelSize())], {}, "whose first costs are the same"),
        (["50%", "60"], {}, "cannot|at least|Expected"),
        (["50%"], {"recipe": km.Recipe(epochs=6, rounds=2)}, "learns once"),
    ],
)
def test_what_is_no_family_is_refused_before_any_training(budgets, options, message):
    with pytest.raises(km.KerasMorphError, match=message):
        family(budgets=budgets, callbacks=[DyingIn(1)], **options)


class Unknown(keras.layers.Layer):
    """A layer with a weight, whose argument no config can hold."""

    def __init__(self, size):
        super().__init__(name="unknown")
        self.size = size

    def build(self, shape):
        self.scale = self.add_weight(shape=(self.size(),), initializer="ones")

    def call(self, x):
        return x * self.scale


@costly
@pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning")
def test_layers_that_cannot_be_copied_are_named():
    image = keras.Input((6, 6, 1))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(6, 3)(image))
    x = Unknown(lambda: 6)(keras.layers.Conv2D(6, 3)(keras.layers.ReLU()(x)))
    x = keras.layers.Dense(2, activation="softmax")(keras.layers.GlobalAveragePooling2D()(x))
    with pytest.raises(km.KerasMorphError, match="cannot be made anew"):
        km.shrink_family(keras.Model(image, x), ["90%"], (X, Y), recipe=km.Recipe(epochs=3), verbose=0)
