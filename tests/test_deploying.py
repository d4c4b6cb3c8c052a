"""How fast a small network is beside its seed, after `shrink`: in a runtime that is there, else in Keras; never an error."""

import json
import re
from functools import partial
from types import SimpleNamespace

import models
import numpy as np
import pytest

import keras_morph as km
from keras_morph import exporting
from keras_morph.cli import deploying
from keras_morph.cli.deploying import compare_speed
from keras_morph.cli.shrink import Shrink
from keras_morph.costs.fitted import Coefficients
from keras_morph.machine import cpu_name
from keras_morph.timing import Conditions

pytestmark = pytest.mark.once

DATASET = SimpleNamespace(x_test=np.zeros((4, 6, 6, 3), "float32"), y_test=np.zeros((4,), "int64"))
TIMES = r"([\d.e-]+) -> ([\d.e-]+) ms, ([\d.]+)x as fast"


@pytest.fixture(scope="module")
def pair():
    """plain, and half of it."""
    seed = models.build("plain")
    return seed, km.prune(seed, "50%")


@pytest.fixture
def compared(pair, tmp_path, monkeypatch):
    """Function of options and a budget: the Compared of the pair, whose run's folder is `tmp_path`."""
    monkeypatch.setattr(deploying, "SECONDS", 0.02)
    monkeypatch.setattr(deploying, "benchmark", partial(km.benchmark, seconds=0.02))
    monkeypatch.setattr(deploying, "measure", partial(km.measure, rounds=2, repeats=1))
    seed, small = pair

    def compare(options, budget="50%"):
        found = compare_speed(
            options, [km.Budget(budget) if isinstance(budget, str) else budget], seed, {tmp_path: small}, DATASET
        )
        return found[tmp_path]

    return compare


def assert_in_keras(found, folder):
    assert re.match(r"[\d.]+x as fast in Keras, median", found.headline)
    assert [list(columns) for columns in found.rows.values()] == [["ms / 256 images"]] * 2
    assert found.benchmark is None
    assert not (folder / "benchmark.json").exists()


def test_a_runtime_that_is_there_is_timed_unasked(compared, tmp_path):
    found = compared(Shrink())
    before, after, ratio = map(float, re.match(f"litert, 1 thread: {TIMES}", found.headline).groups())
    seed, small = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert (seed["model"], small["model"]) == ("seed", "small")
    np.testing.assert_allclose([before, after], [1e3 * seed["min"], 1e3 * small["min"]], rtol=1e-2)
    np.testing.assert_allclose(ratio, seed["min"] / small["min"], atol=0.006)
    assert found.rows == {"seed": {"ms, litert": f"{before:.3g}"}, "fine-tuned": {"ms, litert": f"{after:.3g}"}}
    assert found.notes == ()
    assert f"{small['rounds']:,} rounds" in found.headline


def test_of_several_budgets_each_is_beside_the_seed(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(deploying, "SECONDS", 0.02)
    seed, small = pair
    places = [tmp_path / "75", tmp_path / "50"]
    budgets = [km.Budget("75%"), km.Budget("50%")]
    found = compare_speed(Shrink(), budgets, seed, dict.fromkeys(places, small), DATASET)
    rows = [json.loads((place / "benchmark.json").read_text())["rows"] for place in places]
    assert [[row["model"] for row in each] for each in rows] == [["seed", "small"]] * 2
    assert rows[0][0] == rows[1][0]
    assert rows[0][1] != rows[1][1]
    assert list(found) == places


def test_without_a_runtime_keras_is_timed_and_a_line_says_what_to_install(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(deploying, "find_spec", lambda name: None)
    found = compared(Shrink())
    assert_in_keras(found, tmp_path)
    (note,) = found.notes
    assert "pip install 'keras-morph[litert]'" in note


@pytest.mark.parametrize(
    ("backend", "tensorflow", "expected"),
    [("torch", None, "[onnx]"), ("torch", object(), "--export litert"), ("jax", None, "[litert,tensorflow]")],
)
def test_what_to_install_on_the_other_backends(backend, tensorflow, expected, monkeypatch):
    monkeypatch.setattr(deploying.keras.backend, "backend", lambda: backend)
    monkeypatch.setattr(deploying, "find_spec", lambda name: tensorflow if name == "tensorflow" else None)
    assert expected in deploying._what_to_install()


@pytest.mark.parametrize("error", [km.UnsupportedModelError("no such\noperation"), RuntimeError("no such")])
def test_what_fails_is_one_line_and_keras_is_timed(error, compared, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(deploying, "benchmark", fails)
    found = compared(Shrink())
    assert_in_keras(found, tmp_path)
    assert found.notes == ("timed in Keras, since litert failed: no such",)


def test_an_export_that_fails_is_raised_when_all_else_is_there(compared, monkeypatch):
    error = km.KerasMorphError("litert: outputs differ by 1.0")

    def fails(*_):
        raise error

    monkeypatch.setattr(deploying, "_exported", fails)
    found = compared(Shrink(export="litert"))
    assert found.failure is error
    assert found.rows.keys() == {"seed", "fine-tuned"}


def test_a_network_that_cannot_be_written_is_timed_in_keras(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting, "write_here", lambda model, files, calibration: dict.fromkeys(files, "no such operation")
    )
    monkeypatch.setattr(exporting, "PREFERENCE", ("tensorflow",))
    found = compared(Shrink())
    assert_in_keras(found, tmp_path)
    (note,) = found.notes
    assert note.startswith("timed in Keras, since litert failed: ")
    assert "no such operation" in note


def test_a_cost_that_was_measured_foretells(pair, compared, tmp_path):
    seed, small = pair
    conditions = Conditions("litert", "1.0", 1, 1, cpu_name())
    cost = km.MeasuredLatency.of(conditions, Coefficients({"Conv2D 9": {"work": 1e-9}, "Dense 1": {"call": 1e-6}}), "")
    found = compared(Shrink(latency="litert"), km.Budget("50%", cost))
    start = f"litert, 1 thread: predicted {1e3 * cost(seed):.3g} -> {1e3 * cost(small):.3g} ms, measured "
    assert found.headline.startswith(start)
    (note,) = found.notes
    assert re.fullmatch(re.escape(start) + TIMES + r"; [\d,]+ -> [\d,]+ bytes; accuracy .* \(small\)", note)
    assert deploying.cost_of_time(km.Budget("50% FLOPs, 60%", cost)) == cost
    assert deploying.cost_of_time(km.Budget("50%")) is None
