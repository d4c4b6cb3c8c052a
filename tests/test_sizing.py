"""A budget in bytes is the size of a file."""

import models
import numpy as np
import pytest
import structures

import keras_morph as km


def test_overhead_is_there_in_every_structure():
    graph = km.trace(models.build("residual_projection"))
    cost = km.FileSize(2.0, overhead=1000)
    for kind in ("half", "tenth", "everything_dead"):
        structure = structures.draw(graph, kind, seed=1)
        np.testing.assert_allclose(cost(graph, structure), 2 * km.ModelSize()(graph, structure) + 1000)


def test_it_prices_a_parameter():
    graph = km.trace(models.build("plain"))
    counts = graph.counts(np.ones(graph.num_groups, bool))
    np.testing.assert_allclose(
        km.FileSize(3.0, overhead=50).table(graph).prices(counts), 3 * km.ModelSize().table(graph).prices(counts)
    )


@pytest.mark.parametrize(("text", "expected"), [("2MB", 2e6), ("512KiB", 2**19), ("1000", 1000), ("1000B", 1000)])
def test_amounts_are_in_bytes(text, expected):
    from keras_morph.costs.budget import parse_budget

    assert parse_budget(text, km.FileSize(), 1e9) == expected


@pytest.mark.only_on("tensorflow")
def test_the_file_keeps_the_budget(tmp_path):
    seed = km.zoo.digits_resnet()
    cost = km.FileSize.measured(seed, "onnx")
    whole = km.export(seed, tmp_path / "seed.onnx").bytes
    np.testing.assert_allclose(cost(seed), whole, rtol=1e-3)  # names hold numbers that Keras counts up
    small = km.prune(seed, "150KB", cost=cost)
    written = km.export(small, tmp_path / "small.onnx").bytes
    assert 0.9 * 150_000 < written <= 150_000
    np.testing.assert_allclose(cost(small), written, rtol=0.02)


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("2MB litert int8", [("FileSize(litert int8)", "2MB")]),
        ("1.5 KiB onnx", [("FileSize(onnx float32)", "1.5 KiB")]),
        ("50% FLOPs, 70KB openvino float32", [("FLOPs()", "50%"), ("FileSize(openvino float32)", "70KB")]),
        ("2MB", [("ModelSize()", "2MB")]),
    ],
)
def test_a_text_says_which_file_is_meant(text, amounts):
    assert [(repr(cost), amount) for cost, amount in km.Budget(text).amounts()] == amounts


@pytest.mark.once
@pytest.mark.parametrize("text", ["50% litert", "2M onnx", "2MB tflite", "2MB litert int4", "5ms litert"])
def test_other_texts_with_the_name_of_a_format_are_refused(text):
    with pytest.raises(km.BudgetError):
        km.fit_budget(models.build("plain"), text)


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
def test_a_text_is_kept_by_the_file(tmp_path):
    """In eight bits: calibrated by other examples than those that weighed it."""
    seed = km.zoo.digits_resnet()
    small = km.prune(seed, "60KB litert int8")
    images = np.random.default_rng(1).random((8, 8, 8, 1), np.float32)
    written = km.export(small, tmp_path / "small.tflite", int8=images).bytes
    assert 0.85 * 60_000 < written <= 60_000
    ((cost, _),) = km.Budget("60KB litert int8").amounts()
    learner = km.StructureLearner(seed, cost=cost, strength=1e-6)
    assert float(learner.penalty()) > 0
    assert str(km.reach(seed, cost)).startswith("FileSize(litert int8): ")
    assert repr(km.StructureLearner.from_config(learner.get_config()).target_cost) == "FileSize(litert int8)"


@pytest.mark.once
def test_a_format_without_a_file_is_refused():
    with pytest.raises(km.KerasMorphError, match=r"onnx, litert or openvino\. Received: 'saved_model'"):
        km.FileSize.measured(models.build("plain"), "saved_model")
