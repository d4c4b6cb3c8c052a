"""Law 3: a price is the derivative of the cost; and the penalty is the sum of price x score, by its definition."""

import functools
from operator import attrgetter

import keras
import models
import numpy as np
import pytest
from keras import layers, ops

import keras_morph as km
from keras_morph.graph.closure import close

pytestmark = pytest.mark.usefixtures("quick_initializers")

COSTS = {
    "FLOPs": km.FLOPs(),
    "ModelSize": km.ModelSize(),
    "Activations": km.Activations(),
    "Latency V100": km.Latency("V100"),
    # Tiny layers are bound by memory everywhere; on this one they are bound by computing too.
    "Latency balanced": km.Latency(km.Hardware("balanced", 20e9, 4e9), batch_size=3),
}
REGULARIZERS = {
    "GroupLasso": km.GroupLasso(),
    "GroupLasso with l1": km.GroupLasso(l1_fraction=0.3),
    "Gamma": km.Gamma(),
}
HAVE_GAMMA = [
    "plain",
    "residual_identity",
    "residual_projection",
    "preactivation",
    "concatenating",
    "inverted_residual",
    "separable",
    "flattening",
    "one_dimensional",
    "u_net",
    "grouped",
    "operations",
]
STEP = 1e-4  # of a channel; a cost is of second degree in each count, so the central difference is exact


def owner_costs(table, counts, owners):
    return table.branch_sums(counts, owners).max(axis=1)


def differences(table, counts, owners):
    """Central finite differences of each owner's cost by each vector's count, `(owners, vectors)`."""
    columns = []
    for vector in range(len(counts)):
        step = STEP * (np.arange(len(counts)) == vector)
        above, below = (owner_costs(table, counts + sign * step, owners) for sign in (1, -1))
        columns.append((above - below) / (2 * STEP))
    return np.array(columns).T


def prices(table, counts, owners):
    """Prices summed per owner and vector, `(owners, vectors)`."""
    summed = np.zeros((owners, len(counts)))
    for vectors, values in zip((table.a, table.b), table.prices(counts, owners), strict=True):
        known = vectors >= 0
        np.add.at(summed, (table.owner[known], vectors[known]), values[known])
        np.testing.assert_array_equal(values[~known], 0)
    return summed


def smooth(table, counts, owners):
    """Owners that are away from the kink of a roofline, bool, `(owners,)`."""
    sums = np.sort(table.branch_sums(counts, owners), axis=1)
    return (sums[:, -1] == 0) | (sums[:, 0] < 0.99 * sums[:, -1]) if sums.shape[1] > 1 else np.ones(owners, bool)


@pytest.mark.once
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", models.NAMES)
def test_price_is_the_derivative_by_each_count_where_every_channel_is_alive(name, cost):
    graph = km.trace(models.build(name))
    table, closed = COSTS[cost].monomials(graph), close(graph, np.ones(graph.num_groups, bool))
    counts, owners = closed.counts.astype(float), len(closed.present)
    away = smooth(table, counts, owners)
    assert away.sum() >= owners - 1
    received, expected = (f(table, counts, owners)[away] for f in (prices, differences))
    assert expected.max() > 0
    np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-9 * expected.max())


@pytest.mark.once
def test_the_balanced_hardware_takes_both_sides_of_the_roofline():
    sides = set()
    for name in models.NAMES:
        graph = km.trace(models.build(name))
        table = COSTS["Latency balanced"].monomials(graph)
        sums = table.branch_sums(graph.counts(np.ones(graph.num_groups, bool)), len(graph.calls) + len(graph.layers))
        sides |= set(sums[sums.any(axis=1)].argmax(axis=1).tolist())
    assert sides == {0, 1}


@pytest.mark.once
def test_the_smaller_side_of_a_roofline_has_no_price():
    graph = km.trace(models.build("plain"))
    counts, owners = graph.counts(np.ones(graph.num_groups, bool)), len(graph.calls) + len(graph.layers)
    for cost, slower in (
        (km.Latency(km.Hardware("slow", 1e3, 1e15)), 0),
        (km.Latency(km.Hardware("narrow", 1e15, 1e3)), 1),
    ):
        table = cost.monomials(graph)
        a, b = table.prices(counts, owners)
        np.testing.assert_array_equal((a + b)[table.branch != slower], 0)
        assert np.all((a + b)[table.branch == slower] > 0)


@pytest.mark.once
@pytest.mark.parametrize(("name", "layer"), [("inverted_residual", "depthwise"), ("grouped", "conv2")])
def test_depthwise_and_grouped_layers_have_one_side(name, layer):
    graph = km.trace(models.build(name))
    table = km.FLOPs().monomials(graph)
    (call,) = (n for n, call in enumerate(graph.calls) if graph.layers[call.layer].name == layer)
    (row,) = np.flatnonzero(table.owner == call)
    assert sorted([table.a[row] >= 0, table.b[row] >= 0]) == [False, True]


@functools.cache
def partly_dead(name):
    """A tiny network in which some channels are exactly zero and some are below every threshold.

    The last third of each layer is dead, so that channels that are tied die together; of the others some. No layer is
    dead as a whole: there a roofline has a kink.
    """
    model = models.randomize(models.BUILDERS[name](), seed=3)
    random = np.random.default_rng(4)
    for variable in model.trainable_variables:
        width = variable.shape[-1]
        if variable.name not in ("kernel", "gamma", "pointwise_kernel") or width < 3:
            continue
        factors = random.choice([0.0, 1e-3, 1.0], width, p=[0.1, 0.1, 0.8])
        factors[0] = 1.0
        factors[np.arange(width) >= 2 / 3 * width] *= 1e-3
        variable.assign(ops.convert_to_numpy(variable) * factors)
    return model


def scores_by_definition(graph, regularizer):
    """Score of each group, and whether anything scores it, from the weights and the formula of the regularizer."""
    scores, scored = np.zeros(graph.num_groups), np.zeros(graph.num_groups, bool)
    for layer in graph.layers:
        for weight in layer.weights:
            if isinstance(regularizer, km.Gamma):
                if weight.name != "gamma":
                    continue
                values = np.abs(ops.convert_to_numpy(layer.operation.gamma).astype(np.float64))
                ids = graph.vectors[weight.vectors[0]]
            else:
                if weight.scores is None:
                    continue
                kernel = ops.convert_to_numpy(attrgetter(weight.name)(layer.operation)).astype(np.float64)
                flat = np.moveaxis(kernel, weight.scores, -1).reshape(-1, kernel.shape[weight.scores])
                l1 = regularizer.l1_fraction
                values = (1 - l1) * np.sqrt((flat**2).mean(axis=0)) + l1 * np.abs(flat).mean(axis=0)
                ids = graph.vectors[weight.vectors[weight.scores]]
            for channel, value in zip(ids, values, strict=True):
                group = graph.group_of[channel]
                scores[group], scored[group] = max(scores[group], value), True
    return scores, scored


def penalty_by_definition(graph, regularizer, cost):
    """Sum over layers and their sides of (cost of one more channel) x (sum of the scores on that side).

    Channels that are pinned, or that nothing scores, are always alive and add no score.
    """
    scores, scored = scores_by_definition(graph, regularizer)
    held = graph.pinned_mask | ~scored
    alive = (scores > regularizer.threshold) | held
    counts = np.array([alive[graph.group_of[ids]].sum() for ids in graph.vectors], float)
    sums = np.array([(scores * ~held)[graph.group_of[ids]].sum() for ids in graph.vectors])
    table, owners = cost.monomials(graph), len(graph.calls) + len(graph.layers)
    assert smooth(table, counts, owners).all()
    assert np.all(counts > 0)
    assert np.any(~alive)
    return (differences(table, counts, owners) @ sums).sum(), owner_costs(table, counts, owners).sum()


@pytest.mark.one_of(3)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("name", "regularizer"),
    [
        *((name, "GroupLasso") for name in models.NAMES),
        *((name, "Gamma") for name in HAVE_GAMMA),
        ("residual_identity", "GroupLasso with l1"),
    ],
)
def test_the_penalty_in_the_graph_is_the_one_of_the_definition(name, regularizer, cost):
    learner = km.StructureLearner(partly_dead(name), regularizer=REGULARIZERS[regularizer], cost=COSTS[cost])
    received = [float(ops.convert_to_numpy(value)) for value in learner._penalty()]
    expected = penalty_by_definition(learner.graph, REGULARIZERS[regularizer], COSTS[cost])
    np.testing.assert_allclose(received, expected, rtol=2e-5)


def by_hand():
    """image(2) at 4x4 -- conv1(5, 3x3, same) -- conv2(4, 1x1) -- mean -- dense(2).

    Two of conv1's channels are dead: its scores are 0.5 0.5 0.5 0.001 0.001; those of conv2 are 0.25 each.
    """
    image = keras.Input((4, 4, 2), name="image")
    x = layers.Conv2D(5, 3, padding="same", name="conv1")(image)
    x = layers.Conv2D(4, 1, use_bias=False, name="conv2")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    model = keras.Model(image, layers.Dense(2, name="dense")(x), name="by_hand")
    model.get_layer("conv1").kernel.assign(np.ones((3, 3, 2, 5)) * [0.5, -0.5, 0.5, 0.001, -0.001])
    model.get_layer("conv2").kernel.assign(np.full((1, 1, 5, 4), 0.25))
    return model


S1, S2 = 3 * 0.5 + 2 * 0.001, 4 * 0.25
# 16 positions, 3 of 5 channels alive in conv1, all 4 in conv2; image and dense are pinned.
# FLOPs: conv1 = 2*16*9 * 2 * n1        -> by n1: 576
#        conv2 = 2*16*1 * n1 * n2       -> by n1: 32 * 4 = 128; by n2: 32 * 3 = 96
#        dense = 2 * n2 * 2             -> by n2: 4
FLOPS = (576 + 128) * S1 + (96 + 4) * S2
# ModelSize: conv1 = 9*2*n1 + n1        -> by n1: 18 + 1 (bias)
#            conv2 = n1 * n2            -> by n1: 4; by n2: 3
#            dense = n2 * 2 + 2         -> by n2: 2
SIZE = (19 + 4) * S1 + (3 + 2) * S2
# Activations: 16 n1 + 16 n2 + 2
ACTIVATIONS = 16 * S1 + 16 * S2
# Latency, bound by bandwidth (4 bytes per element, 1 byte per second):
#        conv1 = 4 (18 n1 + n1 + 16*2 + 16 n1)      -> by n1: 4 * 35
#        conv2 = 4 (n1 n2 + 16 n1 + 16 n2)          -> by n1: 4 * (4 + 16); by n2: 4 * (3 + 16)
#        dense = 4 (2 n2 + 2 + n2 + 2)              -> by n2: 4 * 3
LATENCY = 4 * ((35 + 20) * S1 + (19 + 3) * S2)


@pytest.mark.parametrize(
    ("cost", "penalty", "total"),
    [
        (km.FLOPs(), FLOPS, 576 * 3 + 32 * 3 * 4 + 4 * 4),
        (km.ModelSize(), SIZE, 19 * 3 + 3 * 4 + 2 * 4 + 2),
        (km.Activations(), ACTIVATIONS, 16 * 3 + 16 * 4 + 2),
        (km.Latency(km.Hardware("narrow", 1e12, 1.0)), LATENCY, 4 * (35 * 3 + 32 + 12 + 48 + 64 + 8 + 2 + 4 + 2)),
    ],
    ids=lambda value: repr(value) if isinstance(value, km.Cost) else "",
)
def test_penalty_and_cost_derived_by_hand(cost, penalty, total):
    learner = km.StructureLearner(by_hand(), regularizer=km.GroupLasso(threshold=1e-2), cost=cost)
    received = [float(ops.convert_to_numpy(value)) for value in learner._penalty()]
    np.testing.assert_allclose(received, (penalty, total), rtol=1e-6)
