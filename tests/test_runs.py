"""A run's folder: no file is ever half written, and models are saved as if never compiled."""

import datetime
import errno
import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

from keras_morph import runs
from keras_morph.errors import KerasMorphError

NOON = datetime.datetime(2026, 11, 24, 12, 0, 1)


class DiskFullError(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writing_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "learned_structure" / "alive_0"
    runs.write_text(path, "één")
    runs.write_text(path, "två")
    assert path.read_bytes() == "två".encode()
    assert names(path.parent) == ["alive_0"]


def test_the_temporary_file_has_the_same_endings_and_folder(tmp_path):
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_bytes(b"1")

    runs.write_atomically(tmp_path / "model.weights.h5", write)
    assert seen[0].parent == tmp_path
    assert seen[0].name.endswith(".model.weights.h5")
    assert names(tmp_path) == ["model.weights.h5"]


def test_of_hidden_files_only_those_of_ours_are_removed(tmp_path):
    (tmp_path / "busy").mkdir()
    for name in (".d41d8cd98f00b204e9800998ecf8427e.cache", f"{runs.TEMPORARY}0123.a.npz", f"busy/{runs.TEMPORARY}4.b"):
        (tmp_path / name).write_text("x")
    (tmp_path / f"{runs.TEMPORARY}5").mkdir()  # an export's
    (tmp_path / f"{runs.TEMPORARY}5" / "small.tflite").write_text("x")
    runs.remove_leftovers(tmp_path, [tmp_path / "busy"])
    assert names(tmp_path) == [".d41d8cd98f00b204e9800998ecf8427e.cache", "busy"]
    assert names(tmp_path / "busy") == [f"{runs.TEMPORARY}4.b"]


def test_an_error_names_the_users_file(tmp_path):
    def write(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*report\.md"):
        runs.write_atomically(tmp_path / "report.md", write)


def test_a_run_is_begun_where_it_overwrites_nothing(tmp_path):
    assert runs.check_run_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "notes.txt").write_text("mine")
    runs.check_run_folder(tmp_path)
    for name in ("seed.keras", "config.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(KerasMorphError, match=r"new folder, or that of a run\. Received: .* seed\.keras"):
        runs.check_run_folder(tmp_path)
    (tmp_path / "status.json").write_text("{}")
    runs.check_run_folder(tmp_path)
    for bad in ("", tmp_path / "notes.txt", "/proc/x", "x" * 5000):
        with pytest.raises(KerasMorphError, match="a folder that can be written"):
            runs.check_run_folder(bad)


@pytest.mark.parametrize("error", [DiskFullError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "report.md"
    runs.write_text(path, "old")

    def write(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(error):
        runs.write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.md"]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"cost": np.int64(3), "speed": np.float32(0.5), "alive": np.arange(2), "name": "x"})
    assert path.read_text() == (
        '{\n  "cost": 3,\n  "speed": 0.5,\n  "alive": [\n    0,\n    1\n  ],\n  "name": "x"\n}\n'
    )
    with pytest.raises(TypeError, match="object"):
        runs.write_json(path, {"what": object()})
    assert json.loads(path.read_text())["cost"] == 3


def trained_model():
    """A compiled model inside a compiled model, both with optimizer state."""
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="inner")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    for each, width in ((inner, 3), (model, 2)):
        each.compile("adam", "mse", metrics=["mae"])
        each.fit(np.ones((8, 4)), np.ones((8, width)), verbose=0)
    return model


@pytest.mark.usefixtures("uncompiled")
def test_a_saved_model_carries_no_compilation(tmp_path):
    model = trained_model()
    x = np.random.default_rng(0).random((5, 4))
    expected = model.predict(x, verbose=0)
    runs.save_model(model, tmp_path / "small.keras")

    with zipfile.ZipFile(tmp_path / "small.keras") as archive:
        config, weights = archive.read("config.json").decode(), archive.read("model.weights.h5")
    for word in ("adam", "mse", "mae"):
        assert word not in config.lower()
    entries = []
    h5py.File(io.BytesIO(weights)).visit(entries.append)
    assert any("dense/vars/0" in entry for entry in entries)
    assert not any("optimizer" in entry for entry in entries)

    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert not loaded.compiled
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-6)
    assert names(tmp_path) == ["small.keras"]


@pytest.mark.usefixtures("uncompiled")
def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = trained_model()
    optimizer, step = model.optimizer, int(model.optimizer.iterations)
    attributes = dict(vars(model))
    runs.save_model(model, str(tmp_path / "seed.keras"))
    assert vars(model) == attributes
    assert model.compiled
    assert model.get_layer("inner").compiled
    assert model.optimizer is optimizer
    model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    np.testing.assert_equal(int(model.optimizer.iterations), step + 1)


@pytest.mark.usefixtures("uncompiled")
def test_a_model_stays_compiled_when_saving_fails(tmp_path, monkeypatch):
    model = trained_model()
    monkeypatch.setattr(model, "save", lambda path: path.joinpath("no", "folder").write_text(""))
    with pytest.raises(FileNotFoundError):
        runs.save_model(model, tmp_path / "seed.keras")
    assert model.compiled
    assert model.optimizer is not None
    assert names(tmp_path) == []


def test_a_model_that_was_never_compiled_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    runs.save_model(model, tmp_path / "a.keras")
    assert not keras.models.load_model(tmp_path / "a.keras").compiled
    with pytest.raises(KerasMorphError, match=r"\.keras"):
        runs.save_model(model, tmp_path / "a.h5")


def test_run_folders_never_collide(tmp_path):
    folders = [runs.new_run_folder(tmp_path / "logs", now=NOON) for _ in range(3)]
    assert [folder.name for folder in folders] == ["20261124-120001", "20261124-120001-1", "20261124-120001-2"]
    assert names(tmp_path / "logs") == [folder.name for folder in folders]
    assert len(runs.new_run_folder(str(tmp_path)).name) == len("20261124-120001")


def test_a_log_dir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for log_dir in (tmp_path / "file", tmp_path / "file" / "logs"):
        with pytest.raises(KerasMorphError, match="log_dir: expected a folder that can be written") as caught:
            runs.new_run_folder(log_dir, now=NOON)
        assert str(log_dir) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_environment():
    environment = runs.describe_environment()
    assert environment["keras"] == keras.__version__
    assert environment["backend"] == keras.backend.backend()
    assert environment["backend_version"][0].isdigit()
    assert environment["cores"] >= 1
    assert set(environment) == {
        "python", "keras_morph", "keras", "numpy", "backend", "backend_version", "platform", "cpu", "cores"
    }  # fmt: skip
    json.dumps(environment)
