"""Reports of a tiny pair: text, Markdown and JSON word for word, the picture and the page by what they show."""

import base64
import io
import json
from html.parser import HTMLParser

import keras
import models
import numpy as np
import pytest
from keras import layers
from PIL import Image

import keras_morph as km
from keras_morph.costs.fitted import Coefficients
from keras_morph.graph.structure import graph_and_structure
from keras_morph.timing import Conditions

pytestmark = pytest.mark.once

# Each 3x3 convolution takes 2 microseconds, a 1x1 and a merge 1, and dense 0.1 for each of its inputs.
COST = km.MeasuredLatency.of(
    Conditions("litert", "2.3.0", 1, 1, "AMD EPYC"),
    Coefficients(
        {
            "Conv2D 9": {"call": 2e-6},
            "Conv2D 1": {"call": 1e-6},
            "Add": {"call": 1e-6},
            "Dense 1": {"read": 1e-7},
            "ReLU": {},
            "Rescaling": {},
        }
    ),
    "",
)
CONDITIONS = {"batch_size": 1, "threads": 1, "cpu": "AMD EPYC", "cores": 2, "versions": {"litert": "2.3.0"}}
BENCHMARK = km.Benchmark(
    tuple(
        km.BenchmarkRow(name, "litert", 2860, 1e-7, None, least, 1.1 * least, least, 2 * least, 1.0, 300)
        for name, least in (("seed", 2e-5), ("small", 1.25e-5), ("small_int8.tflite", 5e-6))
    ),
    {},
    CONDITIONS,
)
HISTORY = (
    {"phase": "seed", "epoch": 1, "accuracy": 0.5, "val_accuracy": 0.25, "cost_share": None},
    {"phase": "learn", "epoch": 1, "accuracy": 0.6, "val_accuracy": None, "cost_share": 0.75},
    {"phase": "learn", "epoch": 2, "accuracy": 0.7, "val_accuracy": 0.5, "cost_share": 0.5},
)
RESULTS = {"seed": {"test accuracy": "99.44%"}, "fine-tuned": {"test accuracy": "98.10%", "<ms>": "1.2 & more"}}


@pytest.fixture(scope="module")
def pair():
    """residual_projection without the inside of its second block; a1 keeps 2 of 4 channels, the first trunk 5 of 6."""
    seed = models.build("residual_projection")
    counts = {"stem": 3, "a1": 2, "a2": 5, "a0": 5, "b1": 0, "b2": 5}
    return seed, km.rebuild(seed, counts)


@pytest.fixture(scope="module")
def report(pair):
    return km.report(*pair, history=HISTORY, results=RESULTS)


@pytest.fixture(scope="module")
def timed(pair):
    return km.report(*pair, cost=COST, benchmark=BENCHMARK)


def test_text(report, golden):
    golden("report.txt", str(report))


def test_markdown(report, golden):
    golden("report.md", report.markdown())


def test_json(report, golden):
    golden("report.json", json.dumps(report.json(), indent=2) + "\n")


def test_the_figures_are_those_of_the_models(pair, report):
    """By hand: b1 and b2 vanish; a2 has 2 inputs and 5 outputs at 3 x 3 positions."""
    seed, small = pair
    rows = {row.layer: row for row in report.rows}
    assert (rows["a2"].width, rows["a2"].width_after) == (6, 5)
    assert (rows["a2"].flops, rows["a2"].flops_after) == (2 * 9 * 9 * 4 * 6, 2 * 9 * 9 * 2 * 5)
    assert (rows["a2"].parameters, rows["a2"].parameters_after) == (9 * 4 * 6 + 6, 9 * 2 * 5 + 5)
    for gone in ("b1", "b2"):
        assert (rows[gone].width_after, rows[gone].flops_after, rows[gone].parameters_after) == (0, 0, 0)
    for cost in (km.FLOPs(), km.ModelSize(), km.Activations()):
        assert report.totals[cost.name] == (cost(seed), cost(small))
    np.testing.assert_equal(sum(row.flops_after for row in report.rows), km.FLOPs()(small))


def test_times_are_those_of_the_cost_and_of_the_benchmark(pair, timed, golden):
    """By hand: dense reads 54 and 45 inputs; the second block goes, with its merge."""
    golden("report_times.txt", str(timed))
    golden("report_times.md", timed.markdown())
    rows = {row.layer: (row.seconds, row.seconds_after) for row in timed.rows}
    expected = {
        "stem": (2, 2),
        "a1": (2, 2),
        "a2": (2, 2),
        "a0": (1, 1),
        "b1": (2, 0),
        "b2": (2, 0),
        "dense": (5.4, 4.5),
    }
    assert rows.keys() == expected.keys()
    for layer, microseconds in expected.items():
        np.testing.assert_allclose(rows[layer], np.multiply(microseconds, 1e-6), atol=1e-12)
    np.testing.assert_allclose(timed.others, (2e-6, 1e-6))
    predicted, measured, quantized = timed.times
    np.testing.assert_allclose((predicted.seconds, predicted.seconds_after), [COST(each) for each in pair])
    assert str(predicted) == f"predicted 0.01840 -> 0.01250 ms, 1.47x as fast ({COST!r})"
    assert (
        str(measured)
        == "measured 0.02000 -> 0.01250 ms, 1.60x as fast (small in litert 2.3.0, 1 thread, batch 1, AMD EPYC)"
    )
    assert quantized.where.startswith("small_int8.tflite in litert")


def test_the_page_and_the_picture_show_times(timed):
    cells = Page(timed.html()).cells
    at = cells.index("others")
    assert cells[at + 8 : at + 10] == ["0.00200", "0.00100"]
    assert str(timed.times[1]).replace(">", "&gt;") in timed.html()
    _, times = timed.picture().axes
    before, after = (np.array([bar.get_width() for bar in bars]) for bars in times.containers)
    np.testing.assert_allclose((before.sum(), after.sum()), (1.84e-2, 1.25e-2))


def test_new_keys_do_not_change_the_others(report, timed):
    plain, found = report.json(), timed.json()
    assert plain.keys() == found.keys()
    assert (plain["times"], plain["others"]) == ((), None)
    assert [row | {"seconds": None, "seconds_after": None} for row in found["rows"]] == list(plain["rows"])


def test_a_cost_of_something_else_is_refused(pair):
    with pytest.raises(km.KerasMorphError, match=r"seconds.*Received: FLOPs"):
        km.report(*pair, cost=km.FLOPs())


def test_a_cost_that_needs_a_size_that_is_unknown_adds_nothing():
    image = keras.Input((None, None, 3))
    seed = keras.Model(image, layers.Conv2D(2, 1, name="map")(layers.Conv2D(4, 3, name="conv")(image)))
    found = km.report(seed, km.rebuild(seed, {"conv": 1}), cost=km.Latency("V100"))
    assert (found.times, found.others) == ((), None)


def test_a_structure_is_reported_as_the_model_that_is_rebuilt_from_it(pair):
    seed, small = pair
    graph = km.trace(seed)
    structure = graph_and_structure(graph, {"a1": 2, "a2": 5, "a0": 5, "b1": 0, "b2": 5})[1]
    expected = km.report(seed, small)
    assert km.report(seed, structure) == km.report(graph, structure) == expected
    assert km.report(km.StructureLearner(seed), structure) == expected


def test_the_picture_shows_both_widths_of_each_layer_and_the_history(report):
    widths, history = report.picture().axes
    before, after = (np.array([bar.get_width() for bar in bars]) for bars in widths.containers)
    np.testing.assert_array_equal(before, [row.width for row in report.rows])
    np.testing.assert_array_equal(after, [row.width_after for row in report.rows])
    assert [label.get_text() for label in widths.get_yticklabels()] == [row.layer for row in report.rows]
    assert [text.get_text() for text in widths.texts][-3:] == ["gone, of 4", "gone, of 6", "3 of 3"]
    curves = {line.get_label(): line.get_ydata() for line in history.lines if not line.get_label().startswith("_")}
    np.testing.assert_array_equal(curves.pop("cost / cost of the seed"), [np.nan, 0.75, 0.5])
    np.testing.assert_array_equal(curves.pop("accuracy, training"), [0.5, 0.6, 0.7])
    np.testing.assert_array_equal(curves.pop("accuracy, validation"), [0.25, np.nan, 0.5])
    assert not curves
    assert [text.get_text() for text in history.texts] == ["seed", "learn"]


def test_without_a_history_the_picture_has_no_second_part(pair):
    assert len(km.report(*pair).picture().axes) == 1


class Page(HTMLParser):
    """Collects the cells of all tables and the sources of all images."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.images = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        if self.cells and self.lasttag in ("td", "th"):
            self.cells[-1] += data


def test_the_page_holds_the_tables_and_the_picture_and_nothing_from_elsewhere(report):
    text = report.html()
    page = Page(text)
    for row in report.rows:
        at = page.cells.index(row.layer)
        assert page.cells[at + 1 : at + 6] == [
            row.kind, str(row.width), str(row.width_after), f"{row.flops:,.0f}", f"{row.flops_after:,.0f}"
        ]  # fmt: skip
    assert "99.44%" in page.cells
    assert "<ms>" in page.cells
    assert "1.2 & more" in page.cells
    (source,) = page.images
    image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    assert min(image.size) > 300
    assert "http" not in text


def test_all_forms_are_written(report, tmp_path):
    report.save(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        f"report.{form}" for form in ("md", "json", "png", "html")
    }
    assert (tmp_path / "run" / "report.md").read_text() == report.markdown()
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == json.loads(json.dumps(report.json()))
    assert Image.open(tmp_path / "run" / "report.png").size > (300, 300)


def test_a_model_of_unknown_size_is_reported_by_its_parameters():
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, name="conv")(image)
    seed = keras.Model(image, layers.Conv2D(2, 1, name="map")(x))
    found = km.report(seed, km.rebuild(seed, {"conv": 1}))
    assert found.totals["FLOPs"] == (0, 0)
    assert found.totals["ModelSize"] == (9 * 3 * 4 + 4 + 4 * 2 + 2, 9 * 3 + 1 + 2 + 2)
    assert "| FLOPs | 0 | 0 | - |" in found.markdown()


def test_layers_that_were_taken_out_of_a_nested_model_are_there():
    inside = keras.Input((6, 6, 3))
    y = keras.layers.Conv2D(8, 3, name="c1")(inside)
    backbone = keras.Model(inside, [y, keras.layers.Conv2D(8, 3, name="c2")(y)], name="backbone")
    image = keras.Input((6, 6, 3))
    seed = keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(backbone(image)[0])))
    structure = km.fit_budget(seed, "50%")
    rows = {row.layer: row for row in km.report(seed, km.rebuild(seed, structure)).rows}
    expected = {row.layer: row for row in km.report(seed, structure).rows}
    assert rows["backbone/c1"].width_after == expected["backbone/c1"].width_after > 0


def test_rows_are_of_their_layers_though_names_are_alike():
    tokens, x = keras.Input((6,)), keras.Input((6,))
    enc = keras.Model(tokens, keras.layers.Dense(10, name="dense")(tokens), name="enc")
    seed = keras.Model(x, keras.layers.Dense(2, name="out")(keras.layers.Dense(20, name="enc_dense")(enc(x))))
    found = km.report(seed, km.rebuild(seed, {"enc/dense": 3, "enc_dense": 15}))
    assert [(row.layer, row.width_after) for row in found.rows] == [("enc/dense", 3), ("enc_dense", 15), ("out", 2)]
    assert sum(row.flops_after for row in found.rows) == found.totals["FLOPs"][1]


def test_an_expanded_structure_is_reported_as_what_is_rebuilt_from_it():
    seed = km.zoo.digits_resnet()
    wider = km.expand(seed, km.fit_budget(seed, "30%"), km.FLOPs(), "100%")
    one, other = km.report(seed, wider), km.report(seed, km.rebuild(seed, wider, weights=False))
    assert one.totals == other.totals
    assert one.totals["FLOPs"][1] > 0.8 * km.FLOPs()(seed)
