"""Law 2: the cost of a structure is the cost of the model that is rebuilt from it."""

import models
import networks
import numpy as np
import pytest
import structures
from hypothesis import given

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

COSTS = [
    km.FLOPs(),
    km.ModelSize(),
    km.Activations(),
    km.Latency("V100"),
    km.Latency("P100"),
    km.Latency(km.Hardware("own", peak_flops=4e9, bandwidth=1e9, precision="int8"), batch_size=3),
]


def assert_costs_agree(graph, structure):
    small = km.rebuild(graph, structure, weights=False)
    rebuilt = km.trace(small)
    for cost in COSTS:
        np.testing.assert_allclose(cost(graph, structure), cost(rebuilt), rtol=1e-12, err_msg=repr(cost))
    np.testing.assert_equal(km.ModelSize()(graph, structure), small.count_params())


@pytest.mark.once
@pytest.mark.one_of(2)
@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("name", models.NAMES)
def test_cost_of_a_structure_is_the_cost_of_the_rebuilt_tiny_network(name, kind):
    graph = km.trace(models.build(name))
    assert_costs_agree(graph, structures.draw(graph, kind, seed=1))


@pytest.mark.once
@given(networks.recipes(), networks.kills, networks.grouped_modes)
def test_cost_of_a_structure_is_the_cost_of_the_rebuilt_random_network(recipe, kill, grouped):
    graph = km.trace(networks.build(recipe), grouped=grouped)
    assert_costs_agree(graph, structures.mixed(graph, *kill))


@pytest.mark.parametrize("name", models.PARAMETERS)
def test_model_size_is_what_keras_counts(name):
    model = models.build(name)
    np.testing.assert_equal(km.ModelSize()(model), model.count_params())


# By hand. `plain`, positions x kernel x inputs x outputs, and what is next to the kernels:
#
#     image(3) -- conv1(5) -- bn -- relu -- conv2(4) -- pool -- mean -- dense(3)
#      6 x 6       6 x 6                     4 x 4      2 x 2
#
#                   seed                              3 of conv1 and 2 of conv2 alive
#     multiply-adds conv1 36 * 9 * 3 * 5 = 4,860      36 * 9 * 3 * 3 = 2,916
#                   conv2 16 * 9 * 5 * 4 = 2,880      16 * 9 * 3 * 2 =   864
#                   dense          4 * 3 =    12               2 * 3 =     6
#                                          7,752                       3,786
#     parameters    conv1  9 * 3 * 5 + 5 =   140       9 * 3 * 3 + 3 =    84
#                   bn             4 * 5 =    20               4 * 3 =    12
#                   conv2  9 * 5 * 4 + 4 =   184       9 * 3 * 2 + 2 =    56
#                   dense      4 * 3 + 3 =    15           2 * 3 + 3 =     9
#                                            359                         161
#     outputs       36 * 5 + 16 * 4 + 3  =   247  36 * 3 + 16 * 2 + 3  = 143
#
# `inverted_residual`: all layers at 6 x 6 = 36 positions, though the padded input of the depthwise layer is 8 x 8.
#
#     image(3) -- stem(4) --+-- expand(6) -- bn1 -- pad -- depthwise(6) -- bn2 -- project(4) -- bn3 -- add -- mean -- dense(3)
#                           +--------------------------------------------------------------------------+
#
#                   seed                              trunk 3 of 4, expand 2 of 6       expand dead: the stem is left
#     multiply-adds stem      9 * 3 * 4 = 108         9 * 3 * 3 = 81                    108
#     per position  expand        4 * 6 =  24             3 * 2 =  6
#                   depthwise     9 * 6 =  54             9 * 2 = 18
#                   project       6 * 4 =  24             2 * 3 =  6
#                                         210                    111                    108
#     dense                       4 * 3 =  12             3 * 3 =  9                     12
#     multiply-adds 36 * 210 + 12     = 7,572  36 * 111 + 9  = 4,005  36 * 108 + 12 = 3,900
#     parameters    210 + 4 * (6 + 6 + 4) + 12 + 3 = 289
#                                          111 + 4 * (2 + 2 + 3) + 9 + 3 = 151
#                                                                              108 + 12 + 3 = 123
BY_HAND = [
    ("plain", None, 2 * 7752, 359, 247),
    ("plain", {"conv1": 3, "conv2": 2}, 2 * 3786, 161, 143),
    ("inverted_residual", None, 2 * 7572, 289, 36 * (4 + 6 + 6 + 4) + 3),
    ("inverted_residual", {"stem": 3, "project": 3, "expand": 2}, 2 * 4005, 151, 36 * (3 + 2 + 2 + 3) + 3),
    ("inverted_residual", {"expand": 0}, 2 * 3900, 123, 36 * 4 + 3),
]


@pytest.mark.once
@pytest.mark.parametrize(("name", "counts", "flops", "parameters", "elements"), BY_HAND)
def test_flops_parameters_and_activations_are_those_counted_by_hand(name, counts, flops, parameters, elements):
    model = models.build(name)
    assert [cost(model, counts) for cost in COSTS[:3]] == [flops, parameters, elements]


@pytest.mark.once
def test_latency_is_the_larger_of_two_times_per_layer_added_up_by_hand():
    # Of `plain`, in int8, one byte each: weights, inputs and outputs.
    #     conv1   9,720 FLOPs   140 + 36 * 3 + 36 * 5 = 428 bytes
    #     conv2   5,760 FLOPs   184 + 36 * 5 + 16 * 4 = 428 bytes
    #     dense      24 FLOPs    15 +      4 +      3 =  22 bytes
    # At 20 FLOPs and 1 byte per second conv1 computes for 486 s, conv2 moves for 428 s, dense for 22 s.
    model = models.build("plain")
    device = km.Hardware("slow", peak_flops=20, bandwidth=1, precision="int8")
    np.testing.assert_allclose(km.Latency(device)(model), 486 + 428 + 22, rtol=1e-12)
    # Of two examples the weights are read once: 2 * 486 s; 2 * 288 s against 184 + 2 * 244 s; 15 + 2 * 7 s.
    np.testing.assert_allclose(km.Latency(device, batch_size=2)(model), 972 + 672 + 29, rtol=1e-12)
