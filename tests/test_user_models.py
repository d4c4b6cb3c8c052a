"""Models as users write them (user_models.py): rebuilt exactly; benchmarks/user_models.py tries more structures of each."""

import keras
import models
import numpy as np
import pytest
import structures
import user_models
from exactness import largest_difference

import keras_morph as km

pytestmark = [
    pytest.mark.only_on("torch"),  # where a network is built in a third of the time
    pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning"),
    pytest.mark.filterwarnings("ignore::keras_morph.UncountedLayerWarning"),
    pytest.mark.usefixtures("quick_initializers"),
]


def floats(model, inputs):
    """Outputs in inference; whole numbers (an argmax) may change at the smallest difference."""
    return [x for x in models.outputs(model, inputs) if "float" in x.dtype.name]


@pytest.mark.parametrize("network", user_models.MODELS, ids=lambda network: network.__name__)
def test_it_is_rebuilt_exactly(network):
    model = models.randomize(network(), seed=1)
    inputs = user_models.example(model, 3, 0)
    graph = km.trace(model)
    structure = structures.draw(graph, "half", seed=1)
    small = km.rebuild(model, structure)
    # The sampling layer of conv_vae draws random numbers in inference: from the same seed, the same ones.
    keras.utils.set_random_seed(0)
    received = floats(small, inputs)
    keras.utils.set_random_seed(0)
    expected = floats(km.masked(model, structure), inputs)
    assert largest_difference(received, expected) <= 1e-5
    np.testing.assert_equal(km.ModelSize()(graph, structure), small.count_params())
    keeps_budgets(graph)


def keeps_budgets(graph):
    """With widths that are rounded by default, where closing takes away what rounding asks for."""
    cost = km.ModelSize()
    least = km.reach(graph, cost).minimum
    for limit in (0.5 * cost(graph), 0.2 * cost(graph), 1.01 * least):
        if least <= limit:
            assert cost(graph, km.fit_budget(graph, limit, cost=cost)) <= limit
        else:
            with pytest.raises(km.BudgetError, match="reachable minimum"):
                km.fit_budget(graph, limit, cost=cost)
