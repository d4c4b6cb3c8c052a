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
def test_a_format_without_a_file_is_refused():
    with pytest.raises(km.KerasMorphError, match=r"onnx, litert or openvino\. Received: 'saved_model'"):
        km.FileSize.measured(models.build("plain"), "saved_model")
