"""Laws 1 and 2 on a network of each family of `keras.applications`, at the smallest images that they take.

`benchmarks/applications.py` does the same, and more, for all 40.
"""

import architectures
import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs

import keras_morph as km

# Building and running them takes most of the time of all tests: the other families are left to `make test-all`, as is
# ResNet50 on JAX, which compiles it for half a minute, and the younger ones are tried at one structure.
BOTH_KINDS = ("ResNet50", "ResNet50V2", "VGG16", "MobileNet", "MobileNetV2", "DenseNet121", "Xception")
BACKEND = keras.backend.backend()
QUICK = {
    ("MobileNetV2", "half"): [pytest.mark.slow] * (BACKEND != "tensorflow"),
    ("MobileNetV2", "dead_layers"): [],
    ("ResNet50", "half"): [pytest.mark.slow] * (BACKEND == "jax"),
}
CASES = [
    pytest.param(name, kind, marks=QUICK.get((name, kind), [pytest.mark.once, pytest.mark.slow]))
    for name in architectures.FAMILIES
    for kind in (("half", "dead_layers") if name in BOTH_KINDS else ("dead_layers",))
]

pytestmark = pytest.mark.usefixtures("quick_initializers")


@pytest.fixture(scope="module")
def seed(request, quick_initializers):
    keras.backend.clear_session()
    return architectures.build(request.param)


@pytest.mark.parametrize(("seed", "kind"), CASES, indirect=["seed"])
def test_rebuilt_application_returns_what_the_masked_seed_returns_and_costs_what_was_foretold(seed, kind):
    inputs = architectures.images(seed)
    graph, structure = architectures.prepare(seed, lambda graph, _: structures.draw(graph, kind, seed=1), inputs)
    small = km.rebuild(seed, structure)
    expected = models.outputs(km.masked(seed, structure), inputs)
    assert np.ptp(expected[0], axis=0).max() > 1e-2 * np.abs(expected[0]).max()
    assert_equal_outputs(models.outputs(small, inputs), expected, tolerance=1e-4)
    np.testing.assert_equal(km.ModelSize()(graph, structure), small.count_params())
    np.testing.assert_equal(km.FLOPs()(graph, structure), km.FLOPs()(small))
    assert small.count_params() < 0.7 * seed.count_params()


@pytest.mark.once
def test_there_are_forty_applications_and_each_family_has_its_representative():
    assert len(architectures.NAMES) == 40
    assert set(architectures.FAMILIES) <= set(architectures.NAMES)


@pytest.mark.once
def test_resnet50_has_as_many_channels_and_groups_as_counted_by_hand():
    # 3 inputs, 64 of the stem and 1000 classes; a stage of n blocks of width w has n * (w + w + 4w) + 4w:
    #     3 blocks of 64: 1,408; 4 of 128: 3,584; 6 of 256: 10,240; 3 of 512: 11,264      27,563 channels
    # A stage's shortcut and the last convolution of each of its blocks are one group per channel: n ties of 4w channels
    #     256 * 3 + 512 * 4 + 1024 * 6 + 2048 * 3 = 15,104 groups fewer                   12,459 groups
    graph = km.trace(architectures.build("ResNet50", classes=1000))
    assert graph.num_channels == 3 + 64 + 1408 + 3584 + 10240 + 11264 + 1000 == 27563
    assert graph.num_groups == 27563 - (256 * 3 + 512 * 4 + 1024 * 6 + 2048 * 3) == 12459
