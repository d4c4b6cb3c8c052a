"""Runs that are ended in the middle go on as if nothing had happened; trainings that are lost end; a full disk ends none."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km
from keras_morph import runs
from keras_morph.cli import main
from keras_morph.status import is_running, now_running, running
from keras_morph.training.batches import Batches
from keras_morph.training.checkpoints import Checkpoint, Saved, fit_resumably
from keras_morph.training.recipe import cosine

TORCH = keras.backend.backend() == "torch"
EXACT = keras.backend.backend() != "tensorflow"  # whose kernels differ from run to run, by where arrays lie in memory


def costly(test):
    """A test whose trainings take seconds to compile but on PyTorch: there it runs, elsewhere in `make test-all`."""
    return pytest.mark.usefixtures("uncompiled")(test if TORCH else pytest.mark.slow(test))


RECIPE = km.Recipe(epochs=6, learning_rate=0.01, batch_size=16, fading=0.3, distillation=0.3)
X = np.random.default_rng(0).normal(size=(48, 6, 6, 1)).astype("float32")
Y = (X.mean((1, 2, 3)) > 0).astype(int)


def tiny():
    """image(1) -- dropout -- conv(6) -- bn -- relu -- mean -- dense(2); a bias in front of bn would be moved by noise alone."""
    image = keras.Input((6, 6, 1))
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(layers.Dropout(0.2)(image))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.BatchNormalization(momentum=0.9, name="bn")(x)))
    return keras.Model(image, layers.Dense(2, activation="softmax", name="head")(x), name="tiny")


def shrink(run, seed=0, **options):
    keras.utils.set_random_seed(0)
    model = tiny()
    keras.utils.set_random_seed(seed)
    options = {"recipe": RECIPE, "regularizer": km.LogisticSigmoid(), "verbose": 0, **options}
    return km.shrink(model, "60%", (X, Y), validation_data=(X[:16], Y[:16]), run=run, **options)


def perturbed(model):
    model.set_weights([weight + 1 for weight in model.get_weights()])
    return model


@pytest.mark.once
def test_a_run_whose_status_cannot_be_written_is_over(tmp_path, monkeypatch):
    def fails(*_):
        raise KilledError

    monkeypatch.setattr("keras_morph.status.write_json", fails)
    with pytest.raises(KilledError), running(tmp_path):
        pass
    assert now_running() is None


class KilledError(BaseException):
    pass


@pytest.fixture
def replacing(monkeypatch):
    """Calls `seen` before each file is renamed to its name; what that raises is what a kill at this moment leaves."""
    real, seen = os.replace, []

    def replace(source, target, **options):
        for each in seen:
            each(Path(source))
        real(source, target, **options)

    monkeypatch.setattr(os, "replace", replace)
    return seen


class KillEvery:
    def __init__(self, count):
        self.left = self.count = count

    def __call__(self, path):
        self.left -= 1
        if not self.left:
            self.left = self.count
            raise KilledError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, once_uncompiled):
    folder = tmp_path_factory.mktemp("undisturbed")
    with once_uncompiled():
        return shrink(folder), folder


def assert_equal_runs(one, folder, other, other_folder):
    """Equal structures, histories and weights, to the bit where the backend can."""
    tolerance = {} if EXACT else {"rtol": 1e-3, "atol": 1e-4}
    same = np.testing.assert_array_equal if EXACT else np.testing.assert_allclose
    assert one.structure == other.structure
    texts = [(each / "history.csv").read_text() for each in (folder, other_folder)]
    if EXACT:
        assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == len(texts[1].splitlines()) == 1 + len(one.history)
    assert [row.keys() for row in one.history] == [row.keys() for row in other.history]
    assert [(row["phase"], row["epoch"]) for row in one.history] == [
        (row["phase"], row["epoch"]) for row in other.history
    ]
    same([row["loss"] for row in one.history], [row["loss"] for row in other.history], **tolerance)
    for received, expected in (
        (one.small.get_weights(), other.small.get_weights()),
        (one.seed.get_weights(), other.seed.get_weights()),
        (one.rebuilt_weights, other.rebuilt_weights),
        (one.reestimated_weights, other.reestimated_weights),
    ):
        for a, b in zip(received, expected, strict=True):
            same(a, b, **tolerance)


def status(folder):
    return json.loads((folder / "status.json").read_text())


def every_file_opens(folder):
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = list(csv.reader(path.open(newline="")))
            assert {len(row) for row in rows} == {11}
        elif path.suffix == ".npz":
            assert Saved.load(path).state["format"] == 1
        elif path.suffix == ".keras":
            assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.usefixtures("uncompiled")
def test_a_run_that_is_killed_again_and_again_is_an_undisturbed_one(undisturbed, replacing, tmp_path):
    replacing += [lambda path: every_file_opens(tmp_path), KillEvery(9)]
    for attempt in range(9):
        try:
            result = shrink(tmp_path, seed=attempt)
            break
        except KilledError:
            assert status(tmp_path)["state"] == "failed"
    assert attempt > 2
    assert status(tmp_path)["state"] == "done"
    assert_equal_runs(result, tmp_path, *undisturbed)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and path.name != ".lock"]


@costly
def test_a_finished_run_returns_its_result(undisturbed, capsys):
    result, folder = undisturbed
    mine = folder / "structure.json"
    before = mine.stat().st_mtime_ns
    again = shrink(folder, verbose=2)
    assert capsys.readouterr().out == f"{folder} is finished: its result is returned\n"
    assert_equal_runs(again, folder, result, folder)
    assert mine.stat().st_mtime_ns == before  # what a finished run has written is the user's


@costly
def test_a_run_of_other_arguments_is_not_gone_on_with(undisturbed, monkeypatch):
    _, folder = undisturbed
    with pytest.raises(km.KerasMorphError, match=r"holds a run with epochs=6.*Received: epochs=7"):
        shrink(folder, epochs=7)
    with pytest.raises(km.KerasMorphError, match=r"with class_weight=None.*Received: class_weight=\{'0': 2\.0"):
        shrink(folder, recipe=replace(RECIPE, class_weight={0: 2.0, 1: 1.0}))
    with pytest.raises(km.KerasMorphError, match="holds a run with calibration="):
        shrink(folder, recipe=replace(RECIPE, calibration=X[:8]))
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="sum")
    with pytest.raises(km.KerasMorphError, match="holds a run with loss="):
        shrink(folder, recipe=replace(RECIPE, loss=loss))
    with pytest.raises(km.KerasMorphError, match="holds a run with loss_weights="):
        shrink(folder, recipe=replace(RECIPE, loss_weights=[2.0]))
    with pytest.raises(km.KerasMorphError, match="holds a run with optimizer="):
        shrink(folder, recipe=replace(RECIPE, optimizer=keras.optimizers.SGD(0.1, momentum=0.5)))

    def frozen(model=tiny):
        made = model()
        made.get_layer("conv").trainable = False
        return made

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "tiny", frozen)
        with pytest.raises(km.KerasMorphError, match=r"holds a run with frozen=\[.*Received: frozen="):
            shrink(folder)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "X", X + 1)
        with pytest.raises(km.KerasMorphError, match="holds a run with data="):
            shrink(folder)
        patch.setitem(globals(), "X", X)
        patch.setitem(globals(), "tiny", lambda model=tiny: km.trace(model(), grouped="equal"))
        with pytest.raises(km.KerasMorphError, match=r"holds a run with wiring=.*'whole'.*Received: wiring=.*'equal'"):
            shrink(folder)
    monkeypatch.setitem(globals(), "tiny", lambda model=tiny: perturbed(model()))
    with pytest.raises(km.KerasMorphError, match="holds a run with teacher="):
        shrink(folder)


class Ending(keras.callbacks.Callback):
    """Sends this process a signal in the second step of three of an epoch, the n-th that begins."""

    def __init__(self, number, epoch):
        super().__init__()
        self.number, self.left = number, epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.left -= 1

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1 and self.left == 0:
            os.kill(os.getpid(), self.number)


@costly
def test_signals_end_a_run_after_the_step(undisturbed, tmp_path):
    with pytest.raises(SystemExit) as caught:
        shrink(tmp_path, callbacks=[Ending(signal.SIGTERM, 2)])
    assert caught.value.code == 143
    assert status(tmp_path)["why"] == "interrupted by SIGTERM in learn, epoch 2"
    with pytest.raises(KeyboardInterrupt, match="interrupted by SIGINT in fade, epoch 1"):
        shrink(tmp_path, callbacks=[Ending(signal.SIGINT, 2)])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(SystemExit):  # in the last epoch before the cut, whose statistics are of all data
        shrink(tmp_path, callbacks=[Ending(signal.SIGTERM, 2)])
    assert status(tmp_path)["why"] == "interrupted by SIGTERM in fade, epoch 2"
    result = shrink(tmp_path, callbacks=[Ending(signal.SIGTERM, 99)])
    assert_equal_runs(result, tmp_path, *undisturbed)


@pytest.mark.only_on("torch")  # whose import is the quickest
def test_a_process_that_is_killed_goes_on(undisturbed, tmp_path):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_resuming
        ending = test_resuming.Ending(signal.SIGKILL, 4)
        test_resuming.shrink(test_resuming.Path({str(tmp_path)!r}), callbacks=[ending])
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=170)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert status(tmp_path)["state"] == "running"
    assert not is_running(tmp_path)
    leftover = tmp_path / f"{runs.TEMPORARY}0123.small.keras"
    leftover.write_bytes(b"half")
    result = shrink(tmp_path, callbacks=[Ending(signal.SIGKILL, 99)])
    assert not leftover.exists()
    assert_equal_runs(result, tmp_path, *undisturbed)


@pytest.mark.once
def test_one_process_runs_in_a_folder(tmp_path):
    with running(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", f"import fcntl; fcntl.flock(open({str(tmp_path / 'checkpoint' / '.lock')!r}), 6)"],
            capture_output=True,
            check=False,
        )
        assert other.returncode == 1
        assert is_running(tmp_path)
    assert not is_running(tmp_path)


# The order of examples


@pytest.mark.once
def test_batches_hold_every_example_once_in_an_order_of_seed_and_epoch():
    data = Batches((np.arange(10), {"y": np.arange(10.0)}), 4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        found = [data[i] for i in range(len(data))]
        assert [len(x) for x, _ in found] == [4, 4, 2]
        for x, labels in found:
            np.testing.assert_array_equal(x, labels["y"])
            assert labels["y"].dtype == "float32"
        orders.append(np.concatenate([x for x, _ in found]))
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(10))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])


class Recorded(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return 1

    def __getitem__(self, number):
        return X, Y


@costly
def test_data_of_ones_own_are_told_the_epoch(tmp_path):
    data = Recorded()
    km.shrink(tiny(), "60%", data, epochs=4, verbose=0, run=tmp_path)
    # The labels of the first batch are looked at before; choosing and cutting look at the order of the epoch that comes next.
    assert data.epochs == [0, 0, 1, 2, 2, 2, 3]


# Learning rates


def test_an_optimizer_that_begins_in_the_middle_of_a_schedule_takes_no_larger_steps():
    whole, rest = cosine(0.1, 100), cosine(0.1, 100, done=60)
    for step in (0, 20, 39):
        np.testing.assert_allclose(float(rest(step)), float(whole(60 + step)), rtol=1e-6)
    weight = keras.Variable(np.zeros(3, "float32"))
    optimizer = keras.optimizers.Adam(rest)
    optimizer.build([weight])
    optimizer.apply([ops.ones(3)])
    np.testing.assert_allclose(ops.convert_to_numpy(weight), -float(whole(60)), rtol=1e-4)


@costly
def test_a_run_of_a_version_that_did_not_keep_an_argument_is_taken_for_one_of_these(tmp_path):
    first = shrink(tmp_path, regularizer=km.GroupLasso())
    with pytest.raises(km.KerasMorphError, match=r"holds a run with regularizer given=True.*Received: .*=False"):
        shrink(tmp_path, regularizer=None)
    path = tmp_path / "checkpoint" / "last.npz"
    saved = Saved.load(path)
    del saved.state["asked"]["regularizer given"]
    saved.save(path)
    again = shrink(tmp_path, regularizer=km.GroupLasso())
    for one, other in zip(again.small.get_weights(), first.small.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# Trainings that are lost


class Poison(keras.callbacks.Callback):
    """From an epoch on a weight is NaN."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            weight = self.model.trainable_variables[0]
            weight.assign(np.full(weight.shape, np.nan))


@costly
def test_a_training_that_diverges_ends_and_keeps_what_was_before(tmp_path):
    with pytest.raises(
        km.DivergedError, match=r"in learn, epoch 2, step 1\..*loss\. Received: nan\..*learning rate"
    ) as caught:
        shrink(tmp_path, callbacks=[Poison()], regularizer=km.Gamma())
    assert str(tmp_path / "checkpoint") in str(caught.value)
    assert (status(tmp_path)["state"], status(tmp_path)["why"]) == ("failed", f"DivergedError: {caught.value}")
    saved = Saved.load(tmp_path / "checkpoint" / "last.npz")
    assert saved.state["epoch"] == 1
    assert all(np.isfinite(array).all() for array in saved.arrays["learner"])


@pytest.mark.usefixtures("uncompiled")
def test_a_loss_without_bounds_and_a_weight_that_is_no_number_end_it_too():
    model = tiny()
    model.compile("sgd", "mse")
    guard = km.StopDiverging()
    guard.set_model(model)
    guard.on_epoch_begin(0)
    guard.on_epoch_end(0, {"loss": 2.0, "penalty": 1.5})
    guard.on_epoch_end(1, {"loss": 1e5, "penalty": 1e5})
    with pytest.raises(km.DivergedError, match="finite loss"):
        guard.on_epoch_end(2, {"loss": 2e4})
    with pytest.raises(km.DataError, match="validation_data gives a val_loss of inf in epoch 3"):
        guard.on_epoch_end(2, {"loss": 1.0, "val_loss": np.inf})
    model.get_layer("head").bias.assign([0.0, np.inf])
    with pytest.raises(km.DivergedError, match="head/bias"):
        guard.on_epoch_end(2, {"loss": 1.0})


def chance_warnings(seed, labels):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        km.shrink(seed, "60%", (X, Y), validation_data=(X, labels), epochs=3, verbose=0)
    return [str(each.message) for each in caught if each.category is km.ChanceWarning]


@costly
def test_a_trained_seed_at_chance_is_warned_of():
    seed = tiny()
    seed.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy")
    assert not chance_warnings(seed, 1 - Y)  # nobody says that it is trained
    seed.fit(X, Y, epochs=15, verbose=0)
    right = np.argmax(seed.predict(X, verbose=0), -1)
    assert not chance_warnings(seed, right)
    (said,) = chance_warnings(seed, 1 - right)
    assert "right on 0.0% of the validation data" in said


# Disks


@costly
def test_a_full_disk_ends_nothing_and_is_said_once(undisturbed, replacing, tmp_path, monkeypatch):
    full = True

    def fill_up(path):
        if full and tmp_path / "run" in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runs._spare_folder.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    replacing.append(fill_up)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = shrink(tmp_path / "run")
    said = [str(each.message) for each in caught if each.category is km.UnwrittenWarning]
    assert len(said) == len(set(said))
    (spare,) = tmp_path.glob("keras-morph-*")
    elsewhere = spare / "run-checkpoint-last.npz"
    assert any(f"No space left on device); the run goes on, and keeps it in {elsewhere}" in line for line in said)
    assert Saved.load(elsewhere).state["phase"] == "fine-tune"
    small = keras.models.load_model(next(spare.glob("*small.keras")))
    np.testing.assert_array_equal(small.get_weights()[0], result.small.get_weights()[0])
    assert not list((tmp_path / "run").glob("*.*"))
    full = False
    runs._spare_folder.cache_clear()
    assert_equal_runs(shrink(tmp_path / "run"), tmp_path / "run", *undisturbed)


@costly
def test_rows_that_could_not_be_written_are_there_later(replacing, tmp_path):
    failing = [True]

    def fill_up(path):
        if failing:
            failing.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replacing.append(fill_up)
    model = tiny()
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.warns(km.UnwrittenWarning, match=r"history\.csv cannot be written"):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[km.EpochLog(tmp_path / "history.csv")])
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3


@costly
def test_events_on_a_full_disk_hang_nothing(tmp_path, monkeypatch):
    from tensorboardX.record_writer import RecordWriter

    written = []

    def write(self, data):
        written.append(data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", write)
    learner = km.StructureLearner(tiny())
    learner.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.warns(km.UnwrittenWarning, match="events") as caught:
        learner.fit(X, Y, batch_size=8, epochs=12, verbose=0, callbacks=[km.TensorBoardLog(tmp_path)])
    assert [each.category for each in caught].count(km.UnwrittenWarning) == 1
    assert len(written) > 50


# Files, callbacks and the command line


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    saved = Saved({"phase": "learn"}, {"weights": [np.arange(3.0)], "none": []})
    saved.save(tmp_path / "last.npz")
    again = Saved.load(tmp_path / "last.npz")
    assert (again.state["phase"], again.arrays["none"]) == ("learn", [])
    np.testing.assert_array_equal(again.arrays["weights"][0], np.arange(3.0))
    whole = (tmp_path / "last.npz").read_bytes()
    for content in (b"", b"{}", whole[:99], whole[:-30]):
        (tmp_path / "last.npz").write_bytes(content)
        with pytest.raises(km.KerasMorphError, match=r"last\.npz cannot be read as a checkpoint"):
            Saved.load(tmp_path / "last.npz")
    assert Saved.load(tmp_path / "nowhere.npz") is None


@costly
def test_callbacks_of_keras_and_the_best_epoch_go_on_too(tmp_path):
    def fit(epochs, saved=None, logs=()):
        keras.utils.set_random_seed(0)
        model = tiny()
        model.compile("sgd", "sparse_categorical_crossentropy")
        stopping = keras.callbacks.EarlyStopping("loss", patience=3, min_delta=9.0)
        checkpoint = Checkpoint(tmp_path, "seed", {"seed": model}, callbacks=[stopping], saved=saved)
        model.fit(
            X,
            Y,
            epochs=epochs,
            initial_epoch=checkpoint.initial_epoch(epochs),
            verbose=0,
            callbacks=[stopping, checkpoint],
        )
        return model.history.epoch, Saved.load(tmp_path / "last.npz")

    done, saved = fit(2)
    assert (done, saved.state["stopped"]) == ([0, 1], False)
    done, saved = fit(9, saved)
    assert (done, saved.state["stopped"]) == ([2, 3], True)
    assert fit(9, saved)[0] == []
    losses = saved.state["best"]
    assert Saved.load(tmp_path / "best.npz").state["best"] == losses


@pytest.mark.only_on("tensorflow")
@pytest.mark.usefixtures("uncompiled")
def test_a_dataset_of_tensorflow_skips_in_its_own_way(tmp_path):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    result = km.shrink(tiny(), "60%", data, recipe=km.Recipe(epochs=3), run=tmp_path, verbose=0)
    assert len(result.history) == 3
    with pytest.raises(km.DataError, match=r"a tf\.data\.Dataset without an end"):
        km.shrink(tiny(), "60%", data.repeat(), recipe=km.Recipe(epochs=3), verbose=0)


class Nameless(km.GroupLasso):
    """A regularizer of a user's own, which prints as what it is and where it lies."""

    __repr__ = object.__repr__


@costly
def test_a_run_goes_on_with_objects_that_lie_elsewhere(tmp_path):
    options = {"regularizer": Nameless(), "recipe": km.Recipe(epochs=3, optimizer=keras.optimizers.Adam())}
    first = shrink(tmp_path, **options)
    options = {"regularizer": Nameless(), "recipe": km.Recipe(epochs=3, optimizer=keras.optimizers.Adam())}
    second = shrink(tmp_path, **options)
    for one, other in zip(first.small.get_weights(), second.small.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    options["recipe"] = km.Recipe(epochs=3, optimizer=keras.optimizers.SGD())
    with pytest.raises(km.KerasMorphError, match="with optimizer="):
        shrink(tmp_path, **options)


def test_the_best_weights_are_gone_back_to_after_a_resumption_too(tmp_path):
    """EarlyStopping keeps them in memory; by its measure here the first epoch is the best."""
    firsts = []

    def fit(epochs, saved=None):
        keras.utils.set_random_seed(0)
        model = tiny()
        model.compile("sgd", "sparse_categorical_crossentropy")
        stopping = keras.callbacks.EarlyStopping("loss", patience=2, min_delta=9.0, restore_best_weights=True)
        checkpoint = Checkpoint(tmp_path, "seed", {"seed": model}, callbacks=[stopping], saved=saved)
        first = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: firsts.append(model.get_weights()))
        start = checkpoint.initial_epoch(epochs)
        model.fit(X, Y, epochs=epochs, initial_epoch=start, verbose=0, callbacks=[first, stopping, checkpoint])
        return model.get_weights(), Saved.load(tmp_path / "last.npz")

    _, killed = fit(2)
    (tmp_path / "last.npz").unlink()
    resumed, finished = fit(9, killed)
    again, _ = fit(9, finished)
    assert not np.array_equal(firsts[0][0], firsts[1][0])
    for weights in (resumed, again):
        for one, best in zip(weights, firsts[0], strict=True):
            np.testing.assert_array_equal(one, best)


def command(*arguments):
    """Exit code of `keras-morph ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


SHRINK = "shrink test_cli:for_digits --limit 60 --epochs 3 --seed-epochs 2 --budget 60% --log-dir"
TRAIN = "train --base-model-name two_devices:tiny --dataset digits --limit 60 --num-epochs 3 --batch-size 16 --log-dir"


@pytest.mark.only_on("torch")
@pytest.mark.parametrize(("line", "kills"), [(SHRINK, 16), (TRAIN, 8)])
def test_commands_go_on(line, kills, replacing, tmp_path, capsys):
    assert command(*line.split(), tmp_path / "undisturbed") == 0
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    kill = KillEvery(kills)
    replacing.append(kill)
    with pytest.raises(KilledError):
        main([*line.split(), str(tmp_path / "killed")])
    (folder,) = (tmp_path / "killed").iterdir()
    name = line.split()[0]
    kill.left = 999
    for _ in range(2):
        assert command(name, "--resume", folder) == 0
    assert f"{folder} is finished" in capsys.readouterr().out
    assert (folder / "history.csv").read_text() == (undisturbed / "history.csv").read_text()
    assert km.Structure.load(folder / "structure.json") == km.Structure.load(undisturbed / "structure.json")
    kill.left = kills
    with pytest.raises(KilledError):
        main([*line.split(), str(tmp_path / "killed")])
    capsys.readouterr()
    unfinished = sorted((tmp_path / "killed").iterdir())[-1]
    kill.left = 1
    with pytest.raises(KilledError):
        main([*line.split(), str(tmp_path / "killed")])
    assert f"keras-morph {name} --resume {unfinished}" in capsys.readouterr().out


@pytest.mark.once
@costly
def test_a_command_that_diverges_exits_1(tmp_path, capsys):
    assert command(*TRAIN.split(), tmp_path, "--learning-rate", "1e30") == 1
    assert "The training diverged in learn, epoch 1" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert status(folder)["state"] == "failed"


def test_averages_of_one_phase_are_not_swapped_into_the_next():
    """At the end of an epoch SwapEMAWeights leaves the averages in the model; the next optimizer has none but zeros."""
    model, swap = tiny(), keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    for phase in ("learn", "fine-tune"):
        model.compile(keras.optimizers.SGD(1e-3, use_ema=True), "sparse_categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
        fit_resumably(model, (X, Y), 8, phase=phase, epochs=1, folder=None, callbacks=[swap], seed=0, verbose=0)
        assert all(np.any(weight) for weight in model.get_weights() if weight.ndim > 1)
