"""Every mistake of a user gets the right class and one line, which names the thing and says what was expected."""

import json
import warnings

import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_morph as km
from keras_morph.costs.budget import parse_budget
from keras_morph.layers.rules import TABLE

pytestmark = pytest.mark.once


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


class Unheard(layers.Layer):
    """A layer that we do not know."""


class Unseen(layers.Layer):
    """Another one."""


def without_size():
    """A fully convolutional network for images of any size."""
    image = keras.Input((None, None, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv1")(image)
    return keras.Model(image, layers.GlobalAveragePooling2D(name="mean")(x), name="any_size")


class Opaque(keras.layers.Layer):
    """With a weight of its own, and no row."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return keras.ops.cumsum(x, axis=-1) * self.scale


def of_one_unknown_layer():
    image = keras.Input((4,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", km.UnknownLayerWarning)
        model = keras.Model(image, Opaque(name="opaque")(image))
        return km.trace(model)


def without_gamma():
    """BatchNormalization without scale, and none at all: as in InceptionV3 and VGG16."""
    image = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv1")(image)
    x = layers.BatchNormalization(scale=False, name="bn1")(x)
    x = layers.Conv2D(5, 3, name="conv2")(x)
    return keras.Model(image, layers.Dense(2, name="dense")(layers.Flatten(name="flat")(x)), name="gammaless")


def data(*shape):
    return np.zeros((4, *shape), "float32"), np.zeros(4, "int64")


def data_and_epochs():
    return {"data": data(6, 6, 3), "epochs": 3, "recipe": km.Recipe(loss="mse")}


# What is called, which class it raises, and what its one line has to contain.
MISTAKES = {
    "tracing a subclass": (
        lambda: km.trace(Subclassed()),
        km.UnsupportedModelError,
        ["subclassed", "functional or Sequential", "Subclassed"],
    ),
    "tracing an unbuilt Sequential": (
        lambda: km.trace(keras.Sequential([layers.Dense(2)], name="unbuilt")),
        km.UnsupportedModelError,
        ["unbuilt", "is not built", "keras.Input"],
    ),
    "tracing what is no model": (
        lambda: km.trace("ResNet50"),
        km.UnsupportedModelError,
        ["'ResNet50'", "Expected a Keras model"],
    ),
    "learning of a subclass": (lambda: km.StructureLearner(Subclassed()), km.UnsupportedModelError, ["subclassed"]),
    "the cost of a subclass": (lambda: km.FLOPs()(Subclassed()), km.UnsupportedModelError, ["subclassed"]),
    "shrinking a subclass": (
        lambda: km.shrink(Subclassed(), "50%", **data_and_epochs()),
        km.UnsupportedModelError,
        ["subclassed", "functional or Sequential"],
    ),
    "protecting an unknown layer": (
        lambda: km.trace(models.build("plain"), protect=["conv9"]),
        km.KerasMorphError,
        ["'conv9'", "did you mean", "conv1"],
    ),
    "protecting by half a name": (
        lambda: km.trace(models.build("plain"), protect=["conv"]),
        km.KerasMorphError,
        ["'conv'", "whole"],
    ),
    "protecting by what is no regular expression": (
        lambda: km.trace(models.build("plain"), protect=["conv("]),
        km.KerasMorphError,
        ["conv(", "regular expression"],
    ),
    "tying an unknown layer": (
        lambda: km.trace(models.build("plain"), tie=[["conv1", "conv7"]]),
        km.KerasMorphError,
        ["'conv7'", "did you mean"],
    ),
    "tying layers of unequal widths": (
        lambda: km.trace(models.build("plain"), tie=[["conv1", "conv2"]]),
        km.KerasMorphError,
        ["equal width", "'conv1': 5", "'conv2': 4"],
    ),
    "Gamma without a gamma": (
        lambda: km.StructureLearner(without_gamma(), regularizer=km.Gamma()),
        km.UnsupportedModelError,
        ["gammaless", "conv1, conv2, dense", "GroupLasso"],
    ),
    "nothing that could be removed": (
        lambda: km.StructureLearner(of_one_unknown_layer(), regularizer=km.GroupLasso()),
        km.UnsupportedModelError,
        ["opaque", "(Opaque)", "could be removed"],
    ),
    "a budget by Gamma without a gamma": (
        lambda: km.fit_budget(models.build("sequential"), "50%", scores=km.Gamma()),
        km.UnsupportedModelError,
        ["sequential", "conv1, dense1, dense2", "GroupLasso"],
    ),
    "a negative strength": (
        lambda: km.StructureLearner(models.build("plain"), strength=-1.0),
        km.KerasMorphError,
        ["-1.0", "at least 0"],
    ),
    "a strength that is no number": (
        lambda: km.StructureLearner(models.build("plain"), strength=float("nan")),
        km.KerasMorphError,
        ["nan", "strength"],
    ),
    "an infinite strength": (
        lambda: setattr(km.StructureLearner(models.build("plain")), "strength", float("inf")),
        km.KerasMorphError,
        ["inf", "strength"],
    ),
    "a negative threshold": (
        lambda: km.GroupLasso(threshold=-0.1),
        km.KerasMorphError,
        ["threshold=-0.1", "at least 0"],
    ),
    "a threshold that is no number": (lambda: km.Gamma(threshold=float("nan")), km.KerasMorphError, ["threshold=nan"]),
    "an L1 fraction above 1": (lambda: km.GroupLasso(l1_fraction=1.5), km.KerasMorphError, ["l1_fraction=1.5", "<= 1"]),
    "unknown hardware": (lambda: km.Latency("V1000"), km.KerasMorphError, ["'V1000'", "V100", "Hardware("]),
    "hardware without a peak": (lambda: km.Hardware("mine", 0, 1e9), km.KerasMorphError, ["'mine'", "peak_flops=0"]),
    "hardware of negative bandwidth": (
        lambda: km.Hardware("mine", 1e9, -5),
        km.KerasMorphError,
        ["'mine'", "bandwidth=-5"],
    ),
    "hardware of infinite bandwidth": (
        lambda: km.Hardware("mine", 1e9, float("inf")),
        km.KerasMorphError,
        ["'mine'", "bandwidth=inf"],
    ),
    "hardware of an unknown precision": (
        lambda: km.Hardware("mine", 1e9, 1e9, "float8"),
        km.KerasMorphError,
        ["'mine'", "'float8'", "float16"],
    ),
    "FLOPs of an unknown input size": (
        lambda: km.FLOPs()(without_size()),
        km.UnsupportedModelError,
        ["conv1", "unknown", "static input size", "input_shape"],
    ),
    "latency of an unknown input size": (
        lambda: km.Latency()(without_size()),
        km.UnsupportedModelError,
        ["Latency of conv1"],
    ),
    "activations of an unknown input size": (
        lambda: km.Activations()(without_size()),
        km.UnsupportedModelError,
        ["Activations of conv1"],
    ),
    "an unreachable budget": (
        lambda: km.fit_budget(models.build("plain"), "1%"),
        km.BudgetError,
        ["cannot be reached for plain", "reachable minimum of FLOPs is"],
    ),
    "pruning below what is reachable": (
        lambda: km.prune(models.build("plain"), 1.0),
        km.BudgetError,
        ["reachable minimum"],
    ),
    "shrinking below what is reachable": (
        lambda: km.shrink(models.build("plain"), "1%", **data_and_epochs()),
        km.BudgetError,
        ["reachable minimum"],
    ),
    "a budget that cannot be read": (
        lambda: km.fit_budget(models.build("plain"), "half"),
        km.BudgetError,
        ["'half'", '"50%"', "300M"],
    ),
    "a share as a number": (
        lambda: km.fit_budget(models.build("plain"), 0.5),
        km.BudgetError,
        ["Received: budget=0.5", 'did you mean "50%" of the seed'],
    ),
    "a share as a text without its sign": (
        lambda: km.fit_budget(models.build("plain"), "0.125"),
        km.BudgetError,
        ["Received: budget='0.125'", 'did you mean "12.5%" of the seed'],
    ),
    "a cost's name in another case": (
        lambda: km.fit_budget(models.build("plain"), "50% Flops"),
        km.BudgetError,
        ["ModelSize", "'50% Flops'", 'did you mean "50% FLOPs"'],
    ),
    "a cost's name with a slip, among others": (
        lambda: km.fit_budget(models.build("plain"), "50% FLOPs, 80% ModelSiz"),
        km.BudgetError,
        ["'80% ModelSiz'", 'did you mean "80% ModelSize"'],
    ),
    "a unit that is no cost": (
        lambda: km.fit_budget(models.build("plain"), "50 apples"),
        km.BudgetError,
        ["'50 apples'", "300M"],
    ),
    "images without labels": (
        lambda: km.shrink(models.build("plain"), "50%", data=np.zeros((4, 6, 6, 3))),
        km.DataError,
        ["data expects (x, y)", "Received: an array of shape (4, 6, 6, 3)", "labels"],
    ),
    "validation images without labels": (
        lambda: km.shrink(
            models.build("plain"), "50%", data=data(6, 6, 3), validation_data=keras.ops.zeros((4, 6, 6, 3))
        ),
        km.DataError,
        ["validation_data expects (x, y)", "(4, 6, 6, 3)"],
    ),
    "validation data that can be read once": (
        lambda: km.shrink(
            models.build("plain"), "50%", data=data(6, 6, 3), validation_data=(batch for batch in [data(6, 6, 3)])
        ),
        km.DataError,
        ["validation_data: expected what can be read in every epoch", "a generator"],
    ),
    "lists of numbers": (
        lambda: km.shrink(models.build("plain"), "50%", data=tuple(part.tolist() for part in data(6, 6, 3))),
        km.DataError,
        ["data expects arrays", "np.array"],
    ),
    "a file instead of a model": (
        lambda: km.shrink("seed.keras", "50%", data=data(6, 6, 3)),
        km.UnsupportedModelError,
        ["'seed.keras'", "load_model"],
    ),
    "a file that is not there, to be timed": (
        lambda: km.benchmark({"one": models.build("plain"), "other": "nowhere.keras"}, runtimes=["keras"]),
        km.KerasMorphError,
        ["nowhere.keras", "does not exist"],
    ),
    "images and labels as a list": (
        lambda: km.shrink(models.build("plain"), "50%", data=list(data(6, 6, 3))),
        km.DataError,
        ["data expects (x, y)", "Received: a list of 2"],
    ),
    "inputs by name without labels": (
        lambda: km.shrink(models.build("plain"), "50%", data={"image": np.zeros((4, 6, 6, 3))}),
        km.DataError,
        ["data expects (x, y)", "Received: a dict of 1"],
    ),
    "a budget in another unit": (
        lambda: parse_budget("5ms", km.ModelSize(), 1.0),
        km.BudgetError,
        ["ModelSize in parameters", "'5ms'", "2MB"],
    ),
    "too few epochs": (
        lambda: km.shrink(models.build("plain"), "50%", data(6, 6, 3), epochs=2),
        km.KerasMorphError,
        ["epochs >= 3", "2"],
    ),
    "a rule and a likeness": (
        lambda: km.register_rule(Unheard, TABLE[layers.Conv2D], like=layers.Dense),
        km.KerasMorphError,
        ["Unheard", "either a rule or like"],
    ),
    "neither a rule nor a likeness": (
        lambda: km.register_rule(Unheard),
        km.KerasMorphError,
        ["Unheard", "either a rule or like"],
    ),
    "like a layer without a rule": (
        lambda: km.register_rule(Unheard, like=Unseen),
        km.KerasMorphError,
        ["Unheard", "Unseen", "no rule"],
    ),
    "a structure log of a plain model": (
        lambda: fit_plain(km.StructureLog("anywhere")),
        km.KerasMorphError,
        ["StructureLog", "StructureLearner", "Functional"],
    ),
    "fading a plain model": (
        lambda: fit_plain(km.FadeOut(structure_of("plain"))),
        km.KerasMorphError,
        ["FadeOut", "StructureLearner", "Functional"],
    ),
    "a structure of another model": (
        lambda: km.rebuild(models.build("plain"), structure_of("residual_identity")),
        km.StructureMismatchError,
        ["residual_identity", "plain", "'stem'"],
    ),
    "the cost at a structure of another model": (
        lambda: km.FLOPs()(models.build("plain"), structure_of("residual_identity")),
        km.StructureMismatchError,
        ["residual_identity", "plain"],
    ),
    "a structure of a model of equal layers that are wired otherwise": (
        lambda: km.rebuild(wired(twice=False), structure_of(wired(twice=True))),
        km.StructureMismatchError,
        ["wired", "connections", "other layers are read by"],
    ),
    "counts of an unknown layer": (
        lambda: km.rebuild(models.build("plain"), {"conv9/Conv2D": 3}),
        km.StructureMismatchError,
        ["'conv9'", "plain"],
    ),
    "more channels than there are": (
        lambda: km.rebuild(models.build("plain"), {"conv1/Conv2D": 6}),
        km.StructureMismatchError,
        ["6 channels", "conv1", "at most 5"],
    ),
    "a negative count": (
        lambda: km.rebuild(models.build("plain"), {"conv1/Conv2D": -1}),
        km.StructureMismatchError,
        ["counts"],
    ),
    "a count that is not whole": (
        lambda: km.rebuild(models.build("plain"), {"conv1/Conv2D": 2.5}),
        km.StructureMismatchError,
        ["whole"],
    ),
    "counts that part tied layers": (
        lambda: km.rebuild(models.build("residual_identity"), {"stem/Conv2D": 2, "conv2/Conv2D": 3}),
        km.StructureMismatchError,
        ["conv2", "tied"],
    ),
    "what is neither structure nor counts": (
        lambda: km.rebuild(models.build("plain"), 0.5),
        km.StructureMismatchError,
        ["Structure", "0.5"],
    ),
    "a structure file that is not there": (
        lambda: km.Structure.load("nowhere/structure.json"),
        km.StructureMismatchError,
        ["structure.json", "FileNotFoundError"],
    ),
    "a report on a subclass": (
        lambda: km.report(Subclassed(), models.build("plain")),
        km.UnsupportedModelError,
        ["subclassed"],
    ),
    "a report at a structure of another model": (
        lambda: km.report(models.build("plain"), structure_of("residual_identity")),
        km.StructureMismatchError,
        ["residual_identity", "plain"],
    ),
    "an unknown architecture": (lambda: km.zoo.build("ResNet51"), km.KerasMorphError, ["'ResNet51'", "ResNet50"]),
}


def structure_of(model):
    """All channels of a model, or of a tiny network by its name."""
    graph = km.trace(models.build(model) if isinstance(model, str) else model)
    return km.Structure.closed(graph, np.ones(graph.num_groups, bool))


def wired(twice):
    """image(3) -- conv1(4) -- conv2(4), and add -- flat -- dense(2) of conv1 with conv2 or, if `twice`, with itself."""
    image = keras.Input((6, 6, 3), name="image")
    one = layers.Conv2D(4, 3, padding="same", name="conv1")(image)
    two = layers.Conv2D(4, 3, padding="same", name="conv2")(one)
    x = layers.Add(name="add")([one, one] if twice else [one, two])
    return keras.Model(image, [layers.Dense(2, name="dense")(layers.Flatten(name="flat")(x)), two], name="wired")


def fit_plain(callback):
    model = models.BUILDERS["plain"]()
    model.compile("sgd", "mse")
    model.fit(np.zeros((2, 6, 6, 3)), np.zeros((2, 3)), verbose=0, callbacks=[callback])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_of_the_right_class_that_names_the_thing(mistake):
    make, expected, parts = MISTAKES[mistake]
    with pytest.raises(km.KerasMorphError) as error:
        make()
    assert type(error.value) is expected
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def good_file():
    """The content of a structure file of `plain`."""
    structure = structure_of("plain")
    return {
        "format": 1,
        "seed": {"name": structure.seed, "fingerprint": structure.fingerprint},
        "layers": {
            layer: {"width": structure.seed_widths[layer], "alive": alive.tolist(), "kind": structure.kinds[layer]}
            for layer, alive in structure.alive.items()
        },
    }


def changed(**changes):
    return json.dumps(good_file() | changes)


def with_alive(alive):
    content = good_file()
    content["layers"]["conv1"]["alive"] = alive
    return json.dumps(content)


# Content of a file, and what the one line about it has to contain.
DAMAGED = {
    "an empty file": ("", ["JSONDecodeError"]),
    "a file that was cut off": (changed()[:60], ["JSONDecodeError"]),
    "a file that is no text": (b"\x80\x81\xff", ["UnicodeDecodeError"]),
    "JSON of another kind: a list": ("[1, 2, 3]", ["structure"]),
    "JSON of another kind: a number": ("3", ["structure"]),
    "JSON of another kind: an object": ('{"name": "plain", "layers": 3}', ["whole numbers"]),
    "a later format": (changed(format=3), ["format 3", "Expected: one of (1, 2)"]),
    "a format that is no number": (changed(format="one"), ["format 'one'"]),
    "no layers": (json.dumps({"format": 1, "seed": good_file()["seed"]}), ["layers"]),
    "no seed": (json.dumps({"format": 1, "layers": good_file()["layers"]}), ["seed"]),
    "layers in a list": (changed(layers=["conv1"]), ["not a structure file"]),
    "a layer without width": (changed(layers={"conv1": {"alive": [0]}}), ["width"]),
    "channels that are no numbers": (with_alive(["a"]), ["not a structure file"]),
    "channels that are not whole": (with_alive([0.5, 1.5]), ["conv1"]),
    "channels in nested lists": (with_alive([[0], [1]]), ["conv1"]),
    "channels in disorder": (with_alive([2, 1]), ["'conv1'", "ascending"]),
    "channels twice": (with_alive([1, 1]), ["'conv1'", "ascending"]),
    "channels beyond the width": (with_alive([0, 5]), ["'conv1'", "width 5"]),
    "channels below 0": (with_alive([-1, 0]), ["'conv1'"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_structure_file_is_one_line_that_names_the_file(damage, tmp_path):
    content, parts = DAMAGED[damage]
    path = tmp_path / "structure.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (km.Structure.load, lambda path: km.rebuild(models.build("plain"), path)):
        with pytest.raises(km.StructureMismatchError) as error:
            read(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    for part in parts:  # of rebuild, which takes counts too
        assert part in str(error.value)


def test_the_undamaged_file_is_read(tmp_path):
    (tmp_path / "structure.json").write_text(changed())
    assert km.Structure.load(tmp_path / "structure.json") == structure_of("plain")


def test_a_file_that_parts_tied_channels_names_both(tmp_path):
    path = tmp_path / "structure.json"
    structure_of("residual_identity").save(path)
    content = json.loads(path.read_text())
    content["layers"]["stem"]["alive"] = [0, 1, 3]
    path.write_text(json.dumps(content))
    with pytest.raises(km.StructureMismatchError) as error:
        km.rebuild(models.build("residual_identity"), path)
    for part in ("channel 2 of stem", "channel 2 of conv2", "tied", "both or neither"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_one_class_catches_them_all():
    for error in (km.BudgetError, km.DataError, km.StructureMismatchError, km.UnsupportedModelError):
        assert issubclass(error, km.KerasMorphError)
    assert issubclass(km.KerasMorphError, ValueError)


@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize("name", ["data", "validation_data"])
def test_a_dataset_gives_batches_and_ends(name):
    import tensorflow

    examples = tensorflow.data.Dataset.from_tensor_slices(data(6, 6, 3))
    for given, message in (
        (examples, r"single examples; append batch"),
        (examples.batch(4).repeat(), "without an end"),
    ):
        with pytest.raises(km.DataError, match=rf"^{name}: expected.*{message}"):
            km.shrink(models.build("plain"), "50%", **{"data": data(6, 6, 3), name: given})
