"""`keras-morph inspect`: what a model is made of, what is pinned and why, what it costs and what it could cost."""

import json
import pydoc
import re

import keras
import models
import numpy as np
import pytest
from keras import layers
from rich.console import Console

import keras_morph as km
from keras_morph import showing
from keras_morph.cli import inspecting, main

pytestmark = pytest.mark.once


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def residual():
    return models.build("residual_identity")


def unknown_size():
    image = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="conv")(image))
    return keras.Model(image, layers.Dense(2, name="dense")(x), name="unknown_size")


def test_json_holds_what_follows_by_hand(capsys):
    # Per position conv1 reads 4 and makes 5 channels by 3x3, at 6x6 positions: 2 * 9 * 4 * 5 * 36 = 12,960 FLOPs;
    # stem and conv2 are tied: 4 groups of 2 channels. With nothing but one channel of the stem, which the dense layer
    # reads, there are 27 + 1 of the stem and 1 * 3 + 3 of the dense layer: 34 parameters.
    found = json.loads(printed(capsys, "test_inspect:residual", "--json"))
    assert (found["model"], found["channels"], found["groups"]) == ("residual_identity", 3 + 4 + 5 + 4 + 3, 15)
    assert found["pinned_groups"] == 6
    rows = {row["layer"]: row for row in found["layers"]}
    assert list(rows) == ["image", "stem", "conv1", "conv2", "dense"]
    assert rows["conv1"]["costs"]["FLOPs"] == 12960
    assert rows["conv1"]["group_sizes"] == {"1": 5}
    assert rows["conv2"]["group_sizes"] == {"2": 4}
    assert [row["cheapest"] for row in rows.values()] == [3, 1, 0, 0, 3]
    assert rows["dense"]["pinned"] == {"model output": 3}
    assert rows["conv1"]["pinned"] == {}
    assert found["costs"]["ModelSize"]["now"] == residual().count_params()
    assert found["costs"]["ModelSize"]["cheapest"] == 34


def test_the_cheapest_structure_is_that_of_the_smallest_budget():
    model = residual()
    found = inspecting.gather(km.trace(model))
    least = found["costs"]["FLOPs"]["cheapest"]
    widths = {row["layer"]: row["cheapest"] for row in found["layers"] if row["cheapest"] and row["layer"] != "image"}
    small = km.rebuild(model, km.fit_budget(model, least))
    assert km.trace(small).widths == widths
    assert km.FLOPs()(small) == least
    with pytest.raises(km.BudgetError, match="reachable minimum"):
        km.fit_budget(model, 0.99 * least)


def test_tables_are_at_most_as_wide_as_the_terminal_and_show_every_layer(capsys, monkeypatch):
    monkeypatch.setattr(showing, "COLUMNS", 100)
    text = printed(capsys, "ResNet50")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "tied: channels per group" in text
    for name in km.trace(km.zoo.build("ResNet50")).widths:
        assert sum(re.match(rf" {name} ", line) is not None for line in lines) == 1, name
    assert re.search(r"^ conv1_conv +Conv2D +64 +1 +1 ", text, re.MULTILINE)
    assert re.search(r"^ input_layer .* model input", text, re.MULTILINE)


@pytest.mark.parametrize(("height", "paged"), [(10, True), (500, False)])
def test_what_does_not_fit_on_a_terminal_is_paged(height, paged, capsys, monkeypatch):
    pages = []
    monkeypatch.setattr(pydoc, "pager", pages.append)
    monkeypatch.setattr(
        inspecting, "console", lambda: Console(force_terminal=True, width=100, height=height, legacy_windows=False)
    )
    text = printed(capsys, "test_inspect:residual")
    assert len(pages) == paged
    assert "conv2" in (pages[0] if paged else text)


def test_names_that_look_like_markup_are_shown_in_lines_wide_enough_for_all_columns(capsys):
    image = keras.Input((4, 4, 2))
    odd = layers.Conv2D(3, 3, name="odd[bold]name[")
    inspecting.show(inspecting.gather(km.trace(keras.Model(image, odd(image)))))
    text = capsys.readouterr().out
    assert "odd[bold]name[" in text
    assert "pinned" in text


def test_what_is_written_to_a_file_is_never_paged(capsys, monkeypatch):
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setattr(pydoc, "pager", lambda _: pytest.fail("paged"))
    assert "residual_identity" in printed(capsys, "test_inspect:residual")


def test_a_model_of_unknown_input_size_has_a_size_but_no_flops(capsys, monkeypatch):
    monkeypatch.setattr(showing, "COLUMNS", 100)
    found = json.loads(printed(capsys, "test_inspect:unknown_size", "--json"))
    assert found["costs"]["FLOPs"]["now"] is None
    assert found["costs"]["ModelSize"]["now"] == 4 * 28 + 2 * 5
    assert re.search(r"FLOPs\(\).*needs a static input size", printed(capsys, "test_inspect:unknown_size"))


def test_part_of_a_layer_that_is_pinned_is_counted():
    image = keras.Input((6, 6, 3))
    x = layers.Conv2D(5, 1, name="conv")(image)
    model = keras.Model(image, [x[..., :2], layers.Conv2D(2, 1, name="last")(x)], name="partly")
    (row,) = [row for row in inspecting.gather(km.trace(model))["layers"] if row["layer"] == "conv"]
    assert row["pinned"] == {"model output": 2}
    assert row["cheapest"] == 2
    np.testing.assert_equal(row["width"], 5)
