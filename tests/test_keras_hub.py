"""KerasHub's classifiers: subclasses of functional models, nested, with layers of their own that we do not know."""

import architectures
import hub_networks
import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_exact

import keras_morph as km

pytestmark = pytest.mark.needs("keras_hub")


@pytest.mark.parametrize("kind", ["half", "dead_layers"])
@pytest.mark.parametrize("name", hub_networks.BACKBONES)
def test_a_classifier_is_rebuilt_exactly_and_its_file_opens(name, kind, tmp_path):
    model = hub_networks.build(name)
    inputs = models.examples(model, count=16)
    graph, structure = architectures.prepare(model, lambda graph, _: structures.draw(graph, kind, seed=1), inputs)
    small = assert_exact(model, structure, tolerance=1e-4)
    np.testing.assert_equal(km.ModelSize()(graph, structure), small.count_params())
    small.save(tmp_path / "small.keras")
    again = keras.models.load_model(tmp_path / "small.keras")
    for one, other in zip(models.outputs(again, inputs), models.outputs(small, inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())
