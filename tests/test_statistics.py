"""BatchNormalization's statistics, estimated anew."""

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_morph as km

X = np.random.default_rng(0).normal(1, 2, (40, 6, 6, 3)).astype("float32")


def network(**options):
    image = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.BatchNormalization(name="bn", **options)(x)
    return models.randomize(keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(x))), seed=1)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[10 * index : 10 * index + 10], np.zeros(10)


@pytest.mark.parametrize("data", [(X, np.zeros(40)), X, Batches()], ids=["arrays", "images", "dataset"])
def test_statistics_are_the_mean_over_the_batches_and_nothing_else_moves(data):
    model = network()
    before = {v.path: ops.convert_to_numpy(v).copy() for v in model.variables}
    km.reestimate_statistics(model, data, batch_size=10)
    # Batches of arrays come from all over them.
    order = np.arange(40).reshape(10, 4).T.ravel() if not isinstance(data, Batches) else np.arange(40)
    channels = ops.convert_to_numpy(model.get_layer("conv")(X[order]))
    channels = channels.reshape(4, -1, 4)  # batches, all positions, channels
    bn = model.get_layer("bn")
    np.testing.assert_allclose(ops.convert_to_numpy(bn.moving_mean), channels.mean(1).mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(bn.moving_variance), channels.var(1).mean(0), rtol=1e-4)
    moved = {v.path for v in model.variables if not np.array_equal(ops.convert_to_numpy(v), before[v.path])}
    assert {path.split("/")[-1] for path in moved} == {"moving_mean", "moving_variance"}
    assert bn.momentum == 0.99


def test_frozen_layers_keep_theirs():
    model = network(trainable=False)
    before = model.get_weights()
    km.reestimate_statistics(model, (X, None))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_few_examples_are_one_batch():
    model = network()
    km.reestimate_statistics(model, (X[:7], None), batch_size=64)
    mean = ops.convert_to_numpy(model.get_layer("conv")(X[:7])).mean((0, 1, 2))
    np.testing.assert_allclose(ops.convert_to_numpy(model.get_layer("bn").moving_mean), mean, rtol=1e-4, atol=1e-4)


def test_batch_renormalization_goes_by_the_same_statistics():
    model = network(renorm=True)
    km.reestimate_statistics(model, (X, None), batch_size=10)
    bn = model.get_layer("bn")
    np.testing.assert_allclose(*(ops.convert_to_numpy(v) for v in (bn.renorm_mean, bn.moving_mean)), rtol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(bn.renorm_stddev), ops.convert_to_numpy(bn.moving_stddev), rtol=1e-5
    )
    assert (bn.momentum, bn.renorm_momentum) == (0.99, 0.99)
