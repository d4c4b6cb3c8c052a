"""The code in docs/ does what the text says: its blocks run one after the other, as a reader would type them."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import structures
from exactness import assert_exact

import keras_morph as km
from keras_morph.layers.rules import TABLE, Routed, Rule, same

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def table(monkeypatch):
    """Rows that a test adds are gone after it."""
    for known in list(TABLE):
        monkeypatch.setitem(TABLE, known, TABLE[known])
    before = set(TABLE)
    yield TABLE
    for added in set(TABLE) - before:
        del TABLE[added]


def run(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return blocks, names


def test_the_layers_of_add_a_layer_are_narrowed_as_it_says(table, capsys):
    blocks, names = run("add-a-layer.md")
    assert len(blocks) == 3
    structure, small = names["structure"], names["small"]
    assert capsys.readouterr().out == f"{structure}\n"
    assert {"mirrored", "again", "maxout"} <= set(structure.widths)
    for layer, field in (("mirrored", "filters"), ("again", "filters"), ("maxout", "units")):
        assert getattr(small.get_layer(layer), field) == structure.widths[layer]
    assert sum(structure.widths.values()) < sum(structure.seed_widths.values())
    for kind in structures.KINDS:
        assert_exact(names["model"], structures.draw(km.trace(names["model"]), kind, seed=1))


def test_what_add_a_layer_makes_is_saved_and_loaded(table, tmp_path):
    _, names = run("add-a-layer.md")
    names["small"].save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    expected, received = (each.predict(names["images"], verbose=0) for each in (names["small"], loaded))
    np.testing.assert_allclose(received, expected, rtol=1e-6)


# What a row that is wrong is answered.


class Sloped(keras.layers.Layer):
    def build(self, shape):
        self.slope = self.add_weight(shape=(shape[-1],), name="slope")

    def call(self, x):
        return keras.ops.maximum(x, self.slope * x)


def network(layer):
    image = keras.Input((6, 6, 3))
    x = layer(keras.layers.Conv2D(4, 3, name="conv")(image))
    return keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


def test_a_layer_that_hands_its_channels_on_needs_one_line(table):
    km.register_rule(Sloped, Rule(same, "uniform", {"slope": "in"}))
    model = network(Sloped(name="sloped"))
    model.get_layer("sloped").slope.assign([0.1, 0.2, 0.3, 0.4])
    structure = structures.draw(km.trace(model), "half", seed=2)
    small = assert_exact(model, structure)
    assert small.get_layer("sloped").slope.shape == (structure.widths["conv"],)
    assert structure.widths["conv"] < 4


def test_a_row_is_for_one_class_and_none_for_its_subclasses(table):
    class Steeper(Sloped):
        pass

    km.register_rule(Sloped, Rule(same, "uniform", {"slope": "in"}))
    with pytest.warns(km.UnknownLayerWarning, match="Steeper"):
        km.trace(network(Steeper()))


def test_a_row_with_an_axis_too_many_names_the_layer_the_weight_and_its_shape(table):
    km.register_rule(Sloped, Rule(same, "uniform", {"slope": "in out"}))
    with pytest.raises(km.KerasMorphError, match=r"sloped.*slope='in out'.*\(4,\)"):
        km.trace(network(Sloped(name="sloped")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Sloped, "Conv2D"), "expects a Rule"),
        ((Sloped(), Rule(same, "uniform")), "expects a class"),
        ((Sloped, Rule(same, "uniformly")), "mode='uniformly'.*'strict'"),
        ((Sloped, Rule(same, "make", {"slope": "in"}, {"slope": "output"})), "multiplies.*'outputs'"),
        ((Sloped, Rule(same, "make", {"slope": "in"}, {"slop": "outputs"})), "multiplies.*'slop'"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(table, arguments, message):
    with pytest.raises(km.KerasMorphError, match=rf"register_rule.*{message}"):
        km.register_rule(*arguments)
    assert Sloped not in table


def test_a_row_whose_layer_was_registered_again_is_replaced(table):
    km.register_rule(Sloped, Rule(lambda flow: Routed([(flow.inputs[0].ids, 1)]), "strict"))
    km.register_rule(Sloped, Rule(same, "uniform", {"slope": "in"}))
    assert table[Sloped].mode == "uniform"


def test_api_lists_each_public_name_with_what_it_says_of_itself():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(km.__all__)
    said = {name: getattr(km, name).__doc__.strip().splitlines()[0] for name, _ in rows if name != "HARDWARE"}
    assert {name: text.replace("\\|", "|") for name, text in rows if name != "HARDWARE"} == said


def test_data_says_what_is_chosen(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, names = run("data.md")
    (line,) = capsys.readouterr().out.splitlines()
    assert f"# {line}\n" in (DOCS / "data.md").read_text()
    assert (names["photos"].streamed, len(names["batches"])) == (True, 5)
    assert names["images"].shape == (8, 16, 16, 3)


@pytest.mark.once
def test_the_pages_of_accuracy_are_what_the_rows_of_the_benchmarks_say(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks")
    import efficientnet_lite0
    import quality

    for benchmark, page in ((quality, quality.TABLE), (efficientnet_lite0, efficientnet_lite0.PAGE)):
        assert page.read_text(encoding="utf-8") == benchmark.table(quality.rows_at(benchmark.RESULTS))


@pytest.mark.once
def test_of_settings_that_are_level_the_first_is_taken_in_whatever_order_they_ran(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks")
    from quality import best

    validation = {"0.004": ("0.9792", "0.9861", "0.9931"), "0.008": ("0.9931", "0.9792", "0.9861")}
    rows = [
        {"learning_rate": rate, "strength": "", "random_seed": str(seed), "validation": accuracy}
        for rate, accuracies in validation.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    assert best(rows) == best(rows[::-1]) == ("0.004", "")
    rows[3]["validation"] = "0.9932"
    assert best(rows) == ("0.008", "")
    assert best(rows[3:5] + rows[:1]) == ("0.008", "")  # they share the random seed 0
    assert best([*rows, {**rows[0], "strength": "0.1", "validation": "0.9933"}]) == ("0.004", "0.1")
    assert best([]) is None
