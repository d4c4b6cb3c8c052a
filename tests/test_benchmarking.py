"""Models side by side: what is timed, compared and shown."""

import json
from types import SimpleNamespace

import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_morph as km
from keras_morph import benchmarking

pytestmark = pytest.mark.once


# Three networks: four classes told apart by which input is largest, and the same ones always wrong.


def told_apart(shift=0, name="told_apart"):
    x = keras.Input((4,), name="x")
    kernel = np.roll(np.eye(4, dtype="float32"), shift, axis=1)
    dense = layers.Dense(4, name="dense")
    model = keras.Model(x, dense(x), name=name)
    dense.set_weights([kernel, np.zeros(4)])
    return model


@pytest.fixture(scope="module")
def found():
    x = np.random.default_rng(0).random((50, 4), np.float32)
    lines = []
    result = km.benchmark(
        {"right": told_apart(), "wrong": told_apart(1)},
        runtimes=["onnxruntime", "litert"],
        data=(x, x.argmax(-1)),
        seconds=0.05,
        batch_size=2,
        progress=lines.append,
    )
    return result, lines


def test_every_model_has_a_row_for_every_runtime(found):
    rows = found[0].rows
    assert [(row.runtime, row.model) for row in rows] == [
        (runtime, model) for runtime in ("onnxruntime", "litert") for model in ("right", "wrong")
    ]
    for row in rows:
        assert row.accuracy == (row.model == "right")
        assert 0 < row.min <= row.low <= row.median <= row.high
        assert row.rounds >= 9  # three in each of three processes
        assert row.difference < 1e-6
        assert row.bytes > 64
    assert [row.speedup for row in rows[::2]] == [1.0, 1.0]


def test_the_conditions_are_recorded(found):
    result = found[0]
    assert (result.conditions["batch_size"], result.conditions["threads"]) == (2, 1)
    assert set(result.conditions["versions"]) == {"onnxruntime", "litert"}
    assert result.conditions["cpu"]
    again = json.loads(result.json())
    assert again["conditions"] == result.conditions
    assert [row["model"] for row in again["rows"]] == [row.model for row in result.rows]


def test_it_prints_as_a_table(found):
    lines = repr(found[0]).splitlines()
    assert [len(line) for line in lines[:6]] == [len(lines[0])] * 6
    assert lines[1].startswith("| ---")
    assert "100.00%" in lines[2]
    assert "Batch 2, 1 thread, in turn" in lines[7]
    assert "<td" in found[0]._repr_html_()


def test_progress_is_told(found):
    assert found[1][:3] == [
        "onnxruntime: exporting right", "onnxruntime: exporting wrong", "onnxruntime: timing right, wrong"
    ]  # fmt: skip


def test_files_are_timed_in_their_own_runtime(tmp_path):
    km.export(told_apart(), tmp_path / "a.onnx")
    result = km.benchmark({"a": tmp_path / "a.onnx"}, runtimes=["onnxruntime", "litert"], seconds=0.05)
    assert [(row.runtime, row.difference, row.accuracy) for row in result.rows] == [("onnxruntime", None, None)]


def test_a_runtime_that_cannot_is_told_below_the_table(monkeypatch):
    def fails(*arguments, **options):
        raise km.UnsupportedModelError("it cannot be exported")

    monkeypatch.setattr(benchmarking, "export", fails)
    result = km.benchmark({"a": told_apart()}, runtimes=["litert"])
    assert (result.rows, result.failures) == ((), {"litert": "it cannot be exported"})
    assert repr(result).endswith("litert: it cannot be exported")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "keras", "tensorflow"])
def test_the_other_runtimes(runtime):
    (row,) = km.benchmark({"a": models.build("plain")}, runtimes=[runtime], seconds=0.05).rows
    assert row.min > 0
    assert row.difference < 1e-5


def test_what_cannot_be_timed_says_why(tmp_path):
    (tmp_path / "damaged.onnx").write_text("nothing")
    result = km.benchmark({"damaged": tmp_path / "damaged.onnx"}, runtimes=["onnxruntime"])
    assert "cannot be opened" in result.failures["onnxruntime"]


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        ([[0.1, 0.9], [0.8, 0.2]], [1, 1], 0.5),
        ([[0.1, 0.9], [0.8, 0.2]], [[0, 1], [1, 0]], 1.0),
        ([[0.7], [0.2]], [1, 1], 0.5),
        ([[0.7], [0.2]], [[1], [0]], 1.0),
    ],
)
def test_accuracy_of_classes_numbers_and_one_output(outputs, labels, expected):
    taken = SimpleNamespace(dtype=np.dtype("float32"))
    session = SimpleNamespace(inputs=(taken,), run=lambda arrays: [np.array(outputs)])
    assert benchmarking.accuracy(session, np.zeros((2, 1)), labels) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": ["onnx"]}, "runtimes: expected some of onnxruntime, .*Received: 'onnx'"),
        ({"threads": 0}, "threads.*0"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"seconds": 0}, "seconds.*0"),
        ({"models": {}}, "models"),
        ({"data": np.ones((3, 4))}, "data: expected examples and as many labels"),
    ],
)
def test_a_mistake_is_one_clear_line(options, message):
    with pytest.raises(km.KerasMorphError, match=message):
        km.benchmark(**{"models": {"a": told_apart()}, **options})


def test_a_file_is_not_left_out_without_a_word():
    with pytest.raises(km.KerasMorphError, match="expected onnxruntime among them, which serves a"):
        km.benchmark({"a": "small.onnx"}, runtimes=["litert"])
