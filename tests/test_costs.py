"""Costs layer by layer, and a cost of one's own; what they add up to is in laws/test_costs_agree.py."""

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km
from keras_morph.costs.costs import CONSTANT, Monomials
from keras_morph.graph.closure import close, whole

pytestmark = pytest.mark.once

# A layer on an input, its FLOPs (2 per multiply-add), its parameters and the elements of its output, by hand.
LAYERS = {
    "Conv1D": (layers.Conv1D(4, 3, padding="same"), (8, 2), 2 * 8 * 3 * 2 * 4, 3 * 2 * 4 + 4, 8 * 4),
    "Conv2D": (layers.Conv2D(4, (3, 2)), (8, 6, 2), 2 * 6 * 5 * 6 * 2 * 4, 6 * 2 * 4 + 4, 6 * 5 * 4),
    "Conv2D with strides": (
        layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False),
        (8, 6, 2),
        2 * 4 * 3 * 9 * 2 * 4,
        9 * 2 * 4,
        4 * 3 * 4,
    ),
    "Conv2D in groups": (layers.Conv2D(4, 3, groups=2), (8, 8, 6), 2 * 36 * 9 * 3 * 4, 9 * 3 * 4 + 4, 36 * 4),
    "Conv2D with dilation": (layers.Conv2D(4, 3, dilation_rate=2), (8, 8, 2), 2 * 16 * 9 * 2 * 4, 76, 16 * 4),
    "Conv3D": (layers.Conv3D(3, 2), (4, 4, 4, 2), 2 * 27 * 8 * 2 * 3, 8 * 2 * 3 + 3, 27 * 3),
    # Each position of the input is multiplied with the whole kernel.
    "Conv2DTranspose": (
        layers.Conv2DTranspose(3, 2, strides=2),
        (4, 4, 2),
        2 * 16 * 4 * 2 * 3,
        4 * 2 * 3 + 3,
        64 * 3,
    ),
    "DepthwiseConv2D": (
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        (6, 6, 3),
        2 * 16 * 9 * 6,
        9 * 6 + 6,
        16 * 6,
    ),
    # 9 multiply-adds for each of 3 x 2 hidden channels, then 6 for each of 4 outputs.
    "SeparableConv2D": (
        layers.SeparableConv2D(4, 3, depth_multiplier=2),
        (6, 6, 3),
        2 * 16 * (9 * 6 + 6 * 4),
        9 * 6 + 6 * 4 + 4,
        16 * 4,
    ),
    "Dense": (layers.Dense(5), (7,), 2 * 7 * 5, 7 * 5 + 5, 5),
    "Dense at each position": (layers.Dense(5), (6, 7), 2 * 6 * 7 * 5, 7 * 5 + 5, 6 * 5),
    "BatchNormalization": (layers.BatchNormalization(), (6, 6, 3), 0, 4 * 3, 0),
    "PReLU": (layers.PReLU(shared_axes=[1, 2]), (6, 6, 3), 0, 3, 0),
    "MaxPooling2D": (layers.MaxPooling2D(), (6, 6, 3), 0, 0, 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_costs_of_one_layer_are_those_counted_by_hand(name):
    layer, shape, flops, parameters, elements = LAYERS[name]
    image = keras.Input(shape)
    model = keras.Model(image, layer(image))
    assert [cost(model) for cost in (km.FLOPs(), km.ModelSize(), km.Activations())] == [flops, parameters, elements]


@pytest.mark.parametrize("cost", [km.FLOPs(), km.ModelSize(), km.Activations(), km.Latency()], ids=repr)
@pytest.mark.parametrize("name", ["inverted_residual", "shared_layer", "operations"])
def test_layers_add_up_to_the_total(name, cost):
    graph = km.trace(models.build(name))
    alive = np.arange(graph.num_groups) % 3 > 0
    closed = close(graph, alive)
    parts = cost.per_layer(graph, closed)
    assert len(parts) == len(graph.layers)
    assert np.count_nonzero(parts) > 3
    np.testing.assert_allclose(parts.sum(), cost(graph, km.Structure.closed(graph, alive)), rtol=1e-12)


def test_a_layer_that_is_called_twice_computes_twice_and_is_stored_once():
    """twins is called three times at 6 x 6 positions; its 4 x 4 kernels of 3 x 3 and 4 biases are there once."""
    graph = km.trace(models.build("shared_layer"))
    number = [layer.name for layer in graph.layers].index("twins")
    closed = close(graph, np.ones(graph.num_groups, bool))
    assert km.FLOPs().per_layer(graph, closed)[number] == 3 * 2 * 36 * 9 * 4 * 4
    assert km.ModelSize().per_layer(graph, closed)[number] == 9 * 4 * 4 + 4


def test_a_cost_takes_a_model_a_graph_and_any_form_of_a_structure(tmp_path):
    model, flops = models.build("plain"), km.FLOPs()
    graph = km.trace(model)
    structure = km.Structure.closed(graph, np.arange(graph.num_groups) % 2 > 0)
    structure.save(tmp_path / "structure.json")
    expected = flops(km.rebuild(model, structure))
    assert 0 < expected < flops(model) == flops(graph)
    for given in (structure, tmp_path / "structure.json", str(tmp_path / "structure.json")):
        assert flops(model, given) == flops(graph, given) == expected
    # The same widths by their counts, whichever channels those are.
    assert flops(model, {layer: width for layer, width in structure.widths.items() if layer != "dense"}) == expected


class Channels(km.Cost):
    """Number of channels that convolutions make."""

    unit = "channels"

    def monomials(self, graph):
        rows = [
            (1.0, graph.tensors[call.outputs[0]].vector, CONSTANT, 0, number)
            for number, call in enumerate(graph.calls)
            if "Conv" in graph.layers[call.layer].kind
        ]
        return Monomials.table(rows)


def test_a_cost_of_ones_own_is_one_method():
    model, cost = models.build("residual_projection"), Channels()
    assert cost(model) == 3 + 4 + 6 + 6 + 4 + 6
    structure = km.fit_budget(model, "50%", cost=cost)
    assert cost(model, structure) <= 14
    assert cost(km.rebuild(model, structure)) == cost(model, structure)
    learner = km.StructureLearner(model, cost=cost, regularizer=km.GroupLasso(threshold=0.0))
    _, total = learner._penalty()
    assert float(total) == 29


def test_a_recurrent_layer_multiplies_at_every_step_wherever_its_states_come_from():
    steps, h, c = keras.Input((20, 8)), keras.Input((16,)), keras.Input((16,))
    lstm = keras.layers.LSTM(16, return_sequences=True, name="lstm")
    model = keras.Model([steps, h, c], lstm(steps, initial_state=[h, c]))
    np.testing.assert_equal(km.FLOPs()(model), 2 * 20 * (8 * 64 + 16 * 64))
    alone = keras.Model(steps, keras.layers.LSTM(16, return_sequences=True)(steps))
    np.testing.assert_allclose(km.Latency("V100")(model), km.Latency("V100")(alone), rtol=1e-12)


class Scaled(layers.Layer):
    """Weights of its own, multiplied by operations: a convolution of a kernel that is divided first, and a product."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(3, 3, shape[-1], 4))
        self.mix, self.scale = self.add_weight(shape=(4, 5)), self.add_weight(shape=(5,))

    def call(self, x):
        x = ops.conv(x, self.kernel / ops.std(self.kernel), padding="same")
        return ops.einsum("bhwc,cd->bhwd", x, self.mix) * self.scale


class Copied(layers.Dense):
    pass


@pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning")
@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [(Scaled(), (6, 6, 2), 36 * (9 * 2 * 4 + 4 * 5)), (Copied(7), (3,), 3 * 7)],
    ids=["operations", "subclass"],
)
def test_what_a_layer_multiplies_by_operations_is_counted(layer, shape, macs):
    image = keras.Input(shape)
    model = keras.Model(image, layer(image))
    assert km.FLOPs()(model) == 2 * macs
    assert km.FLOPs().uncounted(km.trace(model)) == ()


@pytest.mark.parametrize(
    ("shape", "network", "flops"),
    [
        ((16,), lambda x: layers.LSTM(8)(layers.Reshape((16, 1))(x)), 16 * 2 * (1 + 8) * 4 * 8),
        ((6,), lambda x: layers.Bidirectional(layers.GRU(4))(layers.Reshape((6, 1))(x)), 2 * 6 * 2 * (1 + 4) * 3 * 4),
        ((5, 16), lambda x: layers.LSTM(8)(layers.Permute((2, 1))(x)), 16 * 2 * (5 + 8) * 4 * 8),
        (
            (8, 8),
            lambda x: layers.Conv2DTranspose(4, 3, strides=2, padding="same")(ops.expand_dims(x, -1)),
            8 * 8 * 2 * 9 * 4,
        ),
    ],
    ids=["LSTM", "GRU", "Permute", "Conv2DTranspose"],
)
def test_what_reads_another_axis_than_the_channels_multiplies_at_every_step(shape, network, flops):
    """As in a series of one number at each step, where the steps are taken for channels."""
    x = keras.Input(shape)
    assert km.FLOPs()(keras.Model(x, network(x))) == flops


@pytest.mark.parametrize(
    ("product", "macs"),
    [
        (lambda x: ops.conv(x, np.ones((3, 8, 5), "float32"), padding="same"), 4 * 3 * 8 * 5),
        (lambda x: ops.matmul(np.ones((6, 4), "float32"), x), 6 * 4 * 8),
        (lambda x: ops.einsum("btc,cd->btd", x, np.ones((8, 3), "float32")), 4 * 8 * 3),
        (lambda x: ops.dot(x, np.ones((8, 3), "float32")), None),
    ],
    ids=["conv", "matmul", "einsum", "dot"],
)
def test_a_product_with_a_constant_is_counted_or_named(product, macs):
    x = keras.Input((4, 8))
    made = product(layers.Dense(8)(x))
    model = keras.Model(x, layers.GlobalAveragePooling1D()(made))
    cost, graph = km.FLOPs(), km.trace(model)
    counted = cost.total(graph, whole(graph)) - 2 * 4 * 8 * 8
    assert counted == 2 * (macs or 0)
    assert bool(cost.uncounted(graph)) == (macs is None)


def test_the_whole_network_costs_what_it_is_with_what_nothing_reads():
    image = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, name="conv")(image)[..., :5]
    model = keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    assert km.ModelSize()(model) == model.count_params()
    assert km.FLOPs()(model) == 2 * (16 * 9 * 2 * 8 + 5 * 3)
    assert km.FLOPs()(model, {"conv": 8}) == 2 * (16 * 9 * 2 * 5 + 5 * 3)


@pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning")
def test_a_layer_that_is_not_followed_has_activations():
    dense, x = layers.Dense(20), keras.Input((10,))
    model = keras.Model(x, layers.Dense(3)(dense(x)))
    dense.enable_lora(2)
    assert km.Activations()(model) == 23


def test_of_two_limits_for_one_cost_the_smaller_counts():
    graph = km.trace(models.build("plain"))
    for amount in ("40% FLOPs, 60%", "60% FLOPs, 40%"):
        budget = km.Budget(amount)
        ((cost, limit),) = budget.within(budget.limits(graph)).amounts()
        assert limit == pytest.approx(0.4 * cost(graph))


def test_a_share_of_latency_is_of_the_cost_of_seconds_that_is_given():
    stairs = km.Staircase(km.Latency("T4"))
    (one, share), (_, other) = km.Budget("60% Latency, 50% FLOPs", stairs).amounts()
    assert (one, share, other) == (stairs, "60%", "50%")


def test_a_reshape_of_an_unknown_size_is_one_line():
    tokens = keras.Input((None,), dtype="int32")
    x = ops.reshape(layers.Embedding(10, 16)(tokens), (-1, 16))
    with pytest.raises(km.UnsupportedModelError, match="depends on the size of its outputs, which is unknown"):
        km.FLOPs()(keras.Model(tokens, layers.Dense(4)(x)))
