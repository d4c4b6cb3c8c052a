"""Law 1: for every structure, the rebuilt model returns in inference what the masked seed returns."""

import keras_morph as km
import models
import networks
import numpy as np
import pytest
import structures
from exactness import assert_exact
from hypothesis import given

SEEDS = (0, 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("name", models.PARAMETERS)
def test_rebuilt_tiny_network_returns_what_the_masked_seed_returns(name, kind, seed):
    model = models.build(name)
    assert_exact(model, structures.draw(km.trace(model), kind, seed))


@given(networks.recipes(), networks.kills)
def test_rebuilt_random_network_returns_what_the_masked_seed_returns(recipe, kill):
    model = networks.build(recipe)
    assert_exact(model, structures.mixed(km.trace(model), *kill))
