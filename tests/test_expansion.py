"""Expanded structures: one factor for all widths, the largest that the budget allows."""

import models
import numpy as np
import pytest

import keras_morph as km

# Of the others more than 60 % of the FLOPs cannot be removed.
NAMES = [name for name in models.NAMES if name not in ("separable", "intermediate_outputs")]


@pytest.mark.once
@pytest.mark.parametrize("budget", ["100%", "300%"])
@pytest.mark.parametrize("name", NAMES)
def test_an_expanded_structure_costs_what_its_model_costs_and_stays_within_the_budget(name, budget):
    seed = models.build(name)
    flops = km.FLOPs()
    structure = km.fit_budget(seed, "60%")
    wide = km.expand(seed, structure, flops, budget)
    model = km.rebuild(seed, wide, weights=False)
    assert flops(seed, wide) == flops(model) <= float(budget[:-1]) / 100 * flops(seed)
    assert km.ModelSize()(seed, wide) == model.count_params()
    assert flops(seed, wide) >= flops(seed, structure)
    for layer, width in structure.widths.items():
        assert wide.widths[layer] >= width


@pytest.mark.once
def test_a_wide_network_uses_its_budget_and_keeps_its_proportions():
    seed = km.zoo.build("ResNet20", input_shape=(16, 16, 3))
    structure = km.fit_budget(seed, km.Budget("30%", per_cost=0.5, round_to=1), scores=km.GroupLasso())
    wide = km.expand(seed, structure, km.FLOPs(), km.Budget("100%", round_to=1))
    assert 0.97 <= km.FLOPs()(seed, wide) / km.FLOPs()(seed) <= 1
    widths = [
        (n, wide.widths[layer]) for layer, n in structure.widths.items() if layer not in ("image", "logits") and n
    ]
    ratios = [after / before for before, after in widths]
    factor = np.median(ratios)
    assert factor > 1.3
    assert all(abs(after - factor * before) <= 1 + 0.05 * before for before, after in widths)


@pytest.mark.once
def test_widths_are_rounded():
    seed = km.zoo.build("ResNet20", input_shape=(16, 16, 3))
    structure = km.fit_budget(seed, km.Budget("30%", per_cost=0.5, round_to=4))
    wide = km.expand(seed, structure, km.FLOPs(), km.Budget("100%", round_to=4))
    inner = [n for layer, n in wide.widths.items() if layer not in ("image", "logits")]
    assert all(n % 4 == 0 for n in inner)
    assert wide.is_expanded


@pytest.mark.once
def test_an_expanded_structure_is_saved_and_has_no_weights_to_carry(tmp_path):
    seed = models.build("residual_identity")
    wide = km.expand(seed, km.fit_budget(seed, "60%"), km.FLOPs(), "300%")
    wide.save(tmp_path / "structure.json")
    assert km.Structure.load(tmp_path / "structure.json") == wide
    for make in (km.rebuild, km.masked):
        with pytest.raises(km.KerasMorphError, match="weights=False"):
            make(seed, wide)


@pytest.mark.once
def test_what_costs_too_much_as_it_is_cannot_expand():
    seed = models.build("plain")
    with pytest.raises(km.BudgetError, match="times the budget as it is"):
        km.expand(seed, km.fit_budget(seed, "90%"), km.FLOPs(), "50%")
