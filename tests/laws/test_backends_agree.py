"""Law 7: the same weights give the same scores, prices, penalties and structures on every backend."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import backend_values
import keras
import numpy as np
import pytest

import keras_morph as km

# On the default backend only, which is held against both others.
pytestmark = pytest.mark.once

SCRIPT = Path(backend_values.__file__)
OTHERS = [
    backend
    for backend in ("tensorflow", "jax", "torch")
    if importlib.util.find_spec(backend) and backend != keras.backend.backend()
]
# Relative to the largest number of the kind; None: equal.
TOLERANCES = {
    "cost": None,
    "scores": 1e-6,
    "scores in the graph": 1e-6,
    "prices": 1e-6,
    "penalty": 1e-5,
    "cost in the graph": 1e-6,
    "structure by threshold": None,
    "structure by budget": None,
}


@pytest.fixture(scope="module")
def here():
    return backend_values.plain(backend_values.values())


@pytest.fixture(scope="module", params=OTHERS)
def there(request):
    finished = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "KERAS_BACKEND": request.param, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["backend"] == request.param
    return found["values"]


def assert_near(received, expected, tolerance):
    received, expected = np.array(received), np.array(expected)
    np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_there_is_another_backend_to_agree_with():
    assert OTHERS


@pytest.mark.parametrize("what", TOLERANCES)
def test_every_network_has_the_same_on_another_backend(here, there, what):
    compared = [key for key in here if what in here[key]]
    assert len(compared) == 10
    assert here.keys() == there.keys()
    for key in compared:
        if TOLERANCES[what] is None:
            np.testing.assert_array_equal(there[key][what], here[key][what], err_msg=key)
        else:
            assert_near(there[key][what], here[key][what], TOLERANCES[what])


def test_gradients_of_the_penalty_are_the_same_on_another_backend(here, there):
    compared = [key for key in here if key.endswith("gradients")]
    assert len(compared) == 6
    for key in compared:
        assert here[key].keys() == there[key].keys()
        largest = max(np.abs(gradient).max() for gradient in here[key].values())
        for weight, gradient in here[key].items():
            np.testing.assert_allclose(there[key][weight], gradient, rtol=0, atol=1e-5 * largest, err_msg=weight)


def test_some_channels_are_dead_and_some_alive(here):
    for key, found in here.items():
        for structure in (found[what] for what in found if what.startswith("structure")):
            assert 0 < np.mean(structure) < 1, key


def group_prices(learner):
    """Price of one more channel of each group, from the table of the cost."""
    graph, table = learner.graph, learner.target_cost.monomials(learner.graph)
    counts = graph.counts((learner.scores() > learner.regularizer.threshold) | graph.pinned_mask)
    by_vector = np.zeros(len(graph.vectors))
    for vectors, prices in zip(
        (table.a, table.b), table.prices(counts, len(graph.calls) + len(graph.layers)), strict=True
    ):
        np.add.at(by_vector, vectors[vectors >= 0], prices[vectors >= 0])
    vector, group, count = graph.pairs
    return np.bincount(group, weights=by_vector[vector] * count, minlength=graph.num_groups) * ~graph.pinned_mask


def test_two_equal_gammas_of_a_group_share_its_price_evenly(here):
    model = backend_values.with_gammas(1.0)
    learner = km.StructureLearner(model, regularizer=backend_values.REGULARIZERS["Gamma"], strength=1.0)
    trunk = next(layer.made for layer in learner.graph.layers if layer.name == "a2")
    prices = group_prices(learner)[learner.graph.group_of[trunk]]
    assert np.all(prices > 0)
    for name in ("bn_a.gamma", "bn_b.gamma"):
        np.testing.assert_allclose(here["gammas of 1.0, gradients"][name], prices / 2, rtol=1e-6)


def test_gammas_that_are_all_zero_get_no_gradient(here):
    for gradient in here["gammas of 0.0, gradients"].values():
        np.testing.assert_array_equal(gradient, np.zeros(6))


def test_of_two_gammas_of_a_group_the_larger_one_bears_the_price(here):
    model = backend_values.fresh("residual_projection")
    learner = km.StructureLearner(model, regularizer=backend_values.REGULARIZERS["Gamma"], strength=1.0)
    trunk = next(layer.made for layer in learner.graph.layers if layer.name == "a2")
    prices = group_prices(learner)[learner.graph.group_of[trunk]]
    a, b = (np.abs(keras.ops.convert_to_numpy(model.get_layer(name).gamma)) for name in ("bn_a", "bn_b"))
    found = here["residual_projection, Gamma, gradients"]
    np.testing.assert_allclose(found["bn_a.gamma"], np.where(a > b, prices, 0), rtol=1e-6)
    np.testing.assert_allclose(found["bn_b.gamma"], np.where(b > a, prices, 0), rtol=1e-6)
