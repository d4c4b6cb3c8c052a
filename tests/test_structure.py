"""A structure is a value: saved, loaded, compared, edited by hand, given as counts."""

import dataclasses
import json

import keras
import models
import numpy as np
import pytest
import structures

import keras_morph as km
from keras_morph.graph.identities import fingerprint, fingerprint_of, identities
from keras_morph.graph.structure import _first_of
from keras_morph.surgery.copying import cloned

pytestmark = pytest.mark.once


def drawn(name, kind="half"):
    graph = km.trace(models.build(name))
    return graph, structures.draw(graph, kind, seed=0)


def chosen(name, **dead):
    """The structure in which these channels of these layers are dead."""
    graph = km.trace(models.build(name))
    alive = np.ones(graph.num_groups, bool)
    for layer in graph.layers:
        if layer.name in dead:
            alive[graph.group_of[layer.made[list(dead[layer.name])]]] = False
    return km.Structure.closed(graph, alive)


@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("name", models.NAMES)
def test_a_saved_structure_is_loaded_as_it_was(name, kind, tmp_path):
    graph, structure = drawn(name, kind)
    structure.save(tmp_path / "structure.json")
    loaded = km.Structure.load(str(tmp_path / "structure.json"))
    assert loaded == structure
    assert loaded.widths == structure.widths
    assert loaded.counts() == structure.counts()
    assert (loaded.seed, loaded.seed_widths, loaded.kinds) == (structure.seed, structure.seed_widths, structure.kinds)
    np.testing.assert_array_equal(loaded.groups(graph), structure.groups(graph))


def test_the_file_says_which_channels_of_which_model_are_alive(tmp_path):
    structure = chosen("plain", conv1=[1, 3], conv2=[0])
    structure.save(tmp_path / "structure.json")
    graph = km.trace(models.build("plain"))
    assert json.loads((tmp_path / "structure.json").read_text()) == {
        "format": 2,
        "seed": {"name": "plain", "fingerprint": fingerprint(graph)},
        "wiring": {"protect": [], "tie": [], "grouped": "whole"},
        "layers": {
            "conv1": {"width": 5, "alive": [0, 2, 4], "kind": "Conv2D"},
            "conv2": {"width": 4, "alive": [1, 2, 3], "kind": "Conv2D"},
            "dense": {"width": 3, "alive": [0, 1, 2], "kind": "Dense", "identity": "dense#0"},
        },
        "connections": structure.connections,
    }


def test_the_file_of_the_format_as_documented_is_read(tmp_path):
    content = {
        "format": 1,
        "seed": {"name": "plain", "fingerprint": fingerprint(km.trace(models.build("plain")))},
        "layers": {
            "conv1": {"width": 5, "alive": [0, 2, 4]},
            "conv2": {"width": 4, "alive": [1, 2, 3]},
            "dense": {"width": 3, "alive": [0, 1, 2]},
        },
    }
    (tmp_path / "structure.json").write_text(json.dumps(content))
    assert km.Structure.load(tmp_path / "structure.json") == chosen("plain", conv1=[1, 3], conv2=[0])


def test_a_file_that_was_edited_by_hand_is_what_it_says(tmp_path):
    path = tmp_path / "structure.json"
    chosen("residual_identity", conv1=[0]).save(path)
    content = json.loads(path.read_text())
    content["layers"]["conv1"]["alive"] = [2, 3]
    for layer in ("stem", "conv2"):
        content["layers"][layer]["alive"].remove(1)
    path.write_text(json.dumps(content))
    assert km.Structure.load(path) == chosen("residual_identity", conv1=[0, 1, 4], stem=[1])
    seed = models.build("residual_identity")
    small = km.rebuild(seed, path)
    np.testing.assert_array_equal(small.get_layer("stem").bias, np.take(seed.get_layer("stem").bias, [0, 2, 3]))
    np.testing.assert_array_equal(small.get_layer("bn1").gamma, np.take(seed.get_layer("bn1").gamma, [2, 3]))


def test_counts_have_the_keys_of_the_model_zoo():
    assert chosen("plain", conv1=[1, 3], conv2=[0]).counts() == {"conv1/Conv2D": 3, "conv2/Conv2D": 3}
    for name, keys in (
        ("separable", ["separable1/separable_conv2d", "separable2/separable_conv2d"]),
        ("u_net", ["down1/Conv2D", "down2/Conv2D", "up/conv2d_transpose", "last/Conv2D", "map/Conv2D"]),
        ("operations", ["conv1/Conv2D", "inner/conv2/Conv2D", "conv3/Conv2D"]),
        ("flattening", ["conv1/Conv2D", "conv2/Conv2D"]),
    ):
        assert list(drawn(name)[1].counts()) == keys


@pytest.mark.parametrize(
    ("name", "counts", "widths"),
    [
        ("plain", {"conv1/Conv2D": 3}, {"conv1": 3, "conv2": 4}),
        ("plain", {"conv1": 3, "conv2": 1}, {"conv1": 3, "conv2": 1}),
        ("plain", {"conv1/Conv2D": 5, "conv2/Conv2D": 4}, {"conv1": 5, "conv2": 4}),
        ("residual_identity", {"stem/Conv2D": 2}, {"stem": 2, "conv1": 5, "conv2": 2}),
        ("residual_identity", {"stem/Conv2D": 2, "conv2/Conv2D": 2, "conv1/Conv2D": 0}, {"stem": 2, "conv1": 0}),
        ("operations", {"inner/conv2/Conv2D": 2}, {"inner/conv2": 2, "conv1": 4}),
        ("operations", {"inner/conv2": 2}, {"inner/conv2": 2, "conv1": 4}),
        ("separable", {"separable1/separable_conv2d": 2}, {"separable1": 2, "separable2": 5}),
        ("u_net", {"up/conv2d_transpose": 1}, {"up": 1, "down1": 4}),
        ("grouped", {"conv2/Conv2D": 2}, {"conv1": 4, "conv2": 2}),
    ],
)
def test_counts_keep_the_first_channels_of_each_layer(name, counts, widths, tmp_path):
    seed = models.build(name)
    (tmp_path / "alive_7").write_text(json.dumps(counts))
    for source in (counts, tmp_path / "alive_7", str(tmp_path / "alive_7")):
        graph = km.trace(km.rebuild(seed, source, weights=False))
        for layer, width in widths.items():
            np.testing.assert_equal(graph.widths.get(layer, 0), width)
    if name == "plain":
        kept = counts.get("conv1/Conv2D", counts.get("conv1"))
        np.testing.assert_array_equal(
            km.rebuild(seed, counts).get_layer("conv1").bias, seed.get_layer("conv1").bias[:kept]
        )


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kind", structures.KINDS)
@pytest.mark.parametrize("name", models.NAMES)
def test_the_counts_of_a_structure_rebuild_to_the_widths_of_the_structure(name, kind):
    graph, structure = drawn(name, kind)
    received, expected = (
        km.trace(km.rebuild(graph.model, source, weights=False)).widths for source in (structure.counts(), structure)
    )
    convolutions = [layer for layer, layer_kind in structure.kinds.items() if "Conv" in layer_kind]
    assert convolutions
    for layer in convolutions:
        np.testing.assert_equal(received.get(layer, 0), expected.get(layer, 0), err_msg=layer)


def test_structures_are_equal_when_the_same_channels_of_the_same_model_are_alive():
    assert chosen("plain", conv1=[1]) == chosen("plain", conv1=[1])
    assert chosen("plain", conv1=[1]) != chosen("plain", conv1=[2])
    assert chosen("plain") != chosen("residual_identity")
    assert chosen("plain") != {"conv1": 5}
    with pytest.raises(TypeError):
        hash(chosen("plain"))


def test_a_structure_fits_every_copy_of_its_model_and_no_other_one():
    structure = chosen("plain", conv1=[1, 3])
    np.testing.assert_equal(km.rebuild(models.BUILDERS["plain"](), structure).get_layer("conv1").filters, 3)
    prints = {fingerprint(km.trace(models.build(name))) for name in models.NAMES}
    np.testing.assert_equal(len(prints), len(models.NAMES))


def test_a_structure_of_a_copy_fits_the_model_though_its_input_has_no_name(tmp_path):
    image = keras.Input((8, 8, 3))
    inner = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    outer = {"a": keras.Input((8, 8, 3)), "b": keras.Input((8, 8, 3), name="named")}
    joined = keras.layers.Add()([inner(x) for x in outer.values()])
    for model in (keras.Model(image, inner(image)), keras.Model(outer, joined)):
        model.save(tmp_path / "model.keras")
        copies = (cloned(model), keras.models.load_model(tmp_path / "model.keras"))
        np.testing.assert_equal([fingerprint(km.trace(each)) for each in copies], [fingerprint(km.trace(model))] * 2)


def test_the_fingerprint_is_that_of_the_wiring_and_not_of_the_order_of_branches():
    def model(order, joined):
        image = keras.Input((8, 8, 3), name="image")
        branch = {}
        for n in order:
            branch[n] = keras.layers.Conv2D(4, 1, name=f"branch{n}")(image)
        return keras.Model(image, keras.layers.Concatenate(name="join")([branch[n] for n in joined]))

    def print_of(*args):
        return fingerprint(km.trace(model(*args)))

    assert print_of((0, 1), (0, 1)) == print_of((1, 0), (0, 1))
    assert print_of((0, 1), (0, 1)) != print_of((0, 1), (1, 0))


def unnamed():
    """Layers, operations and a nested model that nobody named."""
    image = keras.Input((8, 8, 3))
    inside = keras.Input((8, 8, 4))
    nested = keras.Model(inside, keras.layers.Conv2D(4, 3, padding="same")(inside) + inside)
    x = keras.ops.relu(nested(keras.layers.Conv2D(4, 1)(image)) * 2.0)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(6, 3)(x))
    x = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
    return models.randomize(keras.Model(image, x), seed=1)


def test_a_structure_fits_the_same_model_made_once_more_though_keras_counts_on(tmp_path):
    first, second = unnamed(), unnamed()
    assert [layer.name for layer in km.trace(first).layers] != [layer.name for layer in km.trace(second).layers]
    structure = structures.draw(km.trace(first), "half", seed=1)
    structure.save(tmp_path / "structure.json")
    for each in (structure, tmp_path / "structure.json"):
        ours, theirs = km.rebuild(first, structure), km.rebuild(second, each)
        assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]
        assert km.FLOPs()(second, each) == km.FLOPs()(first, structure)
    assert list(structure.named_as(km.trace(second)).alive) == list(km.trace(second).widths)


def test_a_structure_of_an_earlier_version_fits_the_model_of_its_names():
    model = unnamed()
    graph = km.trace(model)
    structure = structures.draw(graph, "half", seed=1)
    earlier = dataclasses.replace(
        structure, fingerprint=fingerprint_of(graph, {n: n for n in identities(graph)}), identities={}, connections={}
    )
    assert km.FLOPs()(model, earlier) == km.FLOPs()(model, structure)


def test_the_error_says_which_layer_is_connected_otherwise():
    def model(swapped):
        image = keras.Input((8, 8, 3))
        x = keras.layers.Conv2D(4, 1, name="conv1")(image)
        y = keras.layers.Conv2D(4, 1, name="conv2")(x)
        return keras.Model(image, keras.layers.Conv2D(2, 1, name="head")(y * x if swapped else y + x))

    structure = structures.whole(model(swapped=False))
    with pytest.raises(km.StructureMismatchError, match=r"there is 'add#0' no more, other layers are read by 'head'"):
        km.rebuild(model(swapped=True), structure)


def test_a_structure_in_words():
    assert str(chosen("plain", conv1=[1, 3], conv2=[0])) == "\n".join(
        [
            "Structure of plain: 9 of 12 channels in 3 layers",
            "  conv1                                         3 of      5",
            "  conv2                                         3 of      4",
            "  dense                                         3 of      3",
        ]
    )


def test_saving_makes_folders_and_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "runs" / "structure.json"
    chosen("plain").save(path)
    chosen("plain", conv1=[0]).save(path)
    assert km.Structure.load(path) == chosen("plain", conv1=[0])
    assert [file.name for file in path.parent.iterdir()] == ["structure.json"]


def upsampled():
    image = keras.Input((4, 4, 3))
    x = keras.ops.depth_to_space(keras.layers.Conv2D(16, 3, padding="same", name="up")(image), 2)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv")(x))
    return keras.Model(image, keras.layers.Dense(2)(x))


def normalized():
    image = keras.Input((4, 4, 3))
    x = keras.layers.GroupNormalization(4)(keras.layers.Conv2D(32, 3, name="up")(image))
    return keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("network", [upsampled, normalized])
def test_counts_of_channels_that_go_together_are_kept_or_refused(network):
    """4 go together in the first, 8 in the second: the counts of a structure are those of what is rebuilt from them."""
    model = network()
    for width in (8, 16):
        rebuilt = km.rebuild(model, {"up": width}, weights=False)
        assert rebuilt.get_layer("up").filters == width
    structure = km.fit_budget(model, "50%")
    rebuilt = km.trace(km.rebuild(model, structure.counts(), weights=False))
    assert rebuilt.widths == {name: width for name, width in structure.widths.items() if width}
    with pytest.raises(km.StructureMismatchError, match=r"gives 11 channels to up\. Expected: as many as go together"):
        km.rebuild(model, {"up": 11}, weights=False)


def test_the_first_groups_that_fill_a_count():
    groups = np.array([5, 3, 5, 3, 7, 8, 8, 8])
    for count, chosen in ((0, []), (1, [7]), (2, [5]), (3, [5, 7]), (5, [5, 3, 7]), (7, [5, 3, 8]), (8, [5, 3, 7, 8])):
        assert _first_of(groups, count).tolist() == chosen
    assert _first_of(groups[[0, 2]], 1) is None
