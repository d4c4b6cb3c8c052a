"""The range of pixels that a model takes is read off its front, tried, or said; what is right outside is right here."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_morph as km
from keras_morph.cli import main, shrinking
from keras_morph.datasets import PIXELS, choose_pixels, load
from keras_morph.errors import DataError
from keras_morph.runs import save_model


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def behind(*front, shape=(8, 8, 3)):
    """image -- front -- conv(4) -- mean -- logits(10)"""
    x = image = keras.Input(shape)
    for layer in front:
        x = layer(x)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="conv")(x))
    return keras.Model(image, layers.Dense(10, name="logits")(x))


def nested(*front):
    """A Sequential in front of a model that begins with `front`, as users put heads on networks with preprocessing."""
    image = keras.Input((8, 8, 3))
    x = image
    for layer in front:
        x = layer(x)
    inner = keras.Model(image, layers.Conv2D(4, 3)(x))
    return keras.Sequential([keras.Input((8, 8, 3)), layers.RandomFlip(), inner, layers.Flatten(), layers.Dense(10)])


class Halved(layers.Layer):
    """A user's own preprocessing."""

    def call(self, inputs):
        return inputs / 127.5 - 1


def uint8_input():
    image = keras.Input((8, 8, 3), dtype="uint8")
    return keras.Model(image, layers.Flatten()(layers.Conv2D(4, 3)(layers.Rescaling(1.0)(image))))


FRONTS = [
    (lambda: behind(layers.Rescaling(1 / 255)), "0-255", "0 to 1"),
    (lambda: behind(layers.Rescaling(1 / 127.5, -1)), "0-255", "-1 to 1"),
    (lambda: behind(layers.Rescaling(2, -1)), "0-1", "-1 to 1"),
    (lambda: behind(layers.Normalization(mean=[120.0] * 3, variance=[3600.0] * 3)), "0-255", "-2 to 2.25"),
    (lambda: behind(layers.Normalization(mean=[0.5] * 3, variance=[0.0625] * 3)), "0-1", "-2 to 2"),
    (lambda: behind(layers.Rescaling(255), layers.Rescaling(1 / 128, -1)), "0-1", "-1 to 0.992"),
    (lambda: behind(layers.RandomFlip(), layers.ZeroPadding2D(), layers.Rescaling(1 / 255)), "0-255", "0 to 1"),
    (lambda: behind(lambda x: x / 255), "0-255", "0 to 1"),
    (lambda: behind(Halved()), "0-255", "-1 to 1"),
    (lambda: behind(keras.applications.resnet50.preprocess_input), "0-255", "-124 to 151"),
    (lambda: behind(keras.applications.densenet.preprocess_input), "0-255", "-2.12 to 2.64"),
    (lambda: nested(layers.Rescaling(1 / 255)), "0-255", "0 to 1"),
    (lambda: nested(layers.Rescaling(2.0, -1)), "0-1", "-1 to 1"),
    (uint8_input, "0-255", "uint8"),
    (lambda: behind(), "0-1", "nothing in front"),
    (lambda: behind(layers.BatchNormalization()), "0-1", "nothing in front"),
]


@pytest.mark.parametrize(("build", "name", "words"), FRONTS)
def test_what_stands_in_front_says_the_range(build, name, words):
    images = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    chosen = choose_pixels(build(), images)
    assert chosen.pixels.name == name
    assert words in str(chosen)
    assert "\n" not in str(chosen)


def test_a_model_without_a_graph_takes_0_to_1():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs / 255

    model = Own()
    model(np.zeros((1, 8, 8, 3), np.float32))
    model.inputs = [keras.KerasTensor((None, 8, 8, 3))]
    assert choose_pixels(model, np.zeros((1, 8, 8, 3), np.float32)).pixels.name == "0-1"


@pytest.mark.parametrize("name", ["caffe", "torch", "-1-1"])
def test_ranges_are_those_of_keras(name):
    images = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    module = {"caffe": "resnet50", "torch": "densenet", "-1-1": "mobilenet"}[name]
    expected = getattr(keras.applications, module).preprocess_input(images * 255)
    np.testing.assert_allclose(PIXELS[name](images), expected, rtol=1e-4, atol=1e-4)


def fitted(digits, pixels, front=(), shape=(8, 8, 1)):
    """image -- front -- conv(8) -- relu -- flat -- logits(10), whose last layer is a regression on the training images."""
    image = keras.Input(shape)
    x = image
    for layer in front:
        x = layer(x)
    x = layers.Flatten(name="flat")(layers.Conv2D(8, 3, activation="relu", name="conv")(x))
    model = keras.Model(image, layers.Dense(10, activation="softmax", name="logits")(x), name="fitted")
    images = pixels(coloured(digits.x_train, shape))
    features = keras.Model(image, x).predict(images, verbose=0).astype(float)
    features = np.concatenate([features, np.full((len(features), 1), features.std())], axis=1)
    ridge = 1e-3 * np.trace(features.T @ features) / len(features.T)
    weights = np.linalg.solve(
        features.T @ features + ridge * np.eye(len(features.T)), features.T @ np.eye(10)[digits.y_train]
    )
    weights *= 10
    model.get_layer("logits").set_weights([weights[:-1], weights[-1] * features[0, -1]])
    return model


def coloured(images, shape):
    return images if shape[-1] == 1 else images * np.array([0.5, 0.8, 0.9], np.float32) + np.float32(0.1)


@pytest.mark.once
@pytest.mark.parametrize("name", PIXELS)
def test_where_nothing_says_it_each_range_is_tried(digits, name):
    shape = (8, 8, 3)
    model = fitted(digits, PIXELS[name], shape=shape)
    chosen = choose_pixels(model, coloured(digits.x_train, shape), digits.y_train)
    assert chosen.pixels.name == name
    assert "256 training images right" in str(chosen)


@pytest.mark.once
def test_a_model_that_knows_nothing_takes_0_to_1(digits):
    chosen = choose_pixels(behind(shape=(8, 8, 1)), digits.x_train, digits.y_train)
    assert chosen.pixels.name == "0-1"
    assert "guessing" in str(chosen)


def test_complaints(digits):
    with pytest.raises(DataError, match="3 colours for caffe, received 1"):
        digits.in_pixels(PIXELS["caffe"])
    with pytest.raises(DataError, match=r"expected images in \[0, 1\], received 0-255"):
        digits.in_pixels(PIXELS["0-255"]).in_pixels(PIXELS["0-1"])


def test_a_data_set_in_another_range(digits):
    small = load("digits", limit=100)
    changed = small.in_pixels(PIXELS["0-255"])
    np.testing.assert_allclose(changed.x_test, small.x_test * 255, rtol=1e-6)
    assert (changed.x_val.max(), changed.x_train.dtype) == (255, np.float32)
    assert repr(changed).endswith("10 classes, pixels 0-255)")


# On the command line ---------------------------------------------------------------------------------------------

MODELS = {
    "plain-0-1": ("0-1", ()),
    "plain-0-255": ("0-255", ()),
    "rescaling": ("0-255", (lambda: layers.Rescaling(1 / 255),)),
    "centred": ("0-1", (lambda: layers.Rescaling(2.0, -1.0),)),
}
SAVED = {}
SHRINK = ["--regularizer", "GroupLasso", "--budget", "70%", "--epochs", "3", "--seed-epochs", "0", "--limit", "300"]
TRAIN = ["--dataset", "digits", "--limit", "40", "--num-epochs", "1"]


def plain_0_1():
    return keras.models.load_model(SAVED["plain-0-1"])


def plain_0_255():
    return keras.models.load_model(SAVED["plain-0-255"])


def rescaling():
    return keras.models.load_model(SAVED["rescaling"])


def centred():
    return keras.models.load_model(SAVED["centred"])


def shrunk(model, log_dir, *options):
    with pytest.raises(SystemExit) as caught:
        main(
            ["shrink", str(model), "--log-dir", str(log_dir), *SHRINK, *options],
        )
    assert caught.value.code == 0
    (folder,) = log_dir.iterdir()
    return json.loads((folder / "report.json").read_text())["results"]["seed"]["test accuracy"]


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    """Makes a model of a kind once, in SAVED: its accuracy on the test images in its own range."""
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(kind):
        name, front = MODELS[kind]
        model = fitted(digits, PIXELS[name], [make() for make in front])
        SAVED[kind] = folder / f"{kind}.keras"
        save_model(model, SAVED[kind])
        model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        test = load("digits", limit=300)
        _, accuracy = model.evaluate(PIXELS[name](test.x_test), test.y_test, verbose=0)
        assert accuracy > 0.85
        return f"{accuracy:.2%}"

    return save


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("given", ["file", "function"])
def test_the_seed_is_as_accurate_as_evaluate_says_outside(saved, kind, given, tmp_path, capsys):
    outside = saved(kind)
    text = SAVED[kind] if given == "file" else f"test_pixels:{kind.replace('-', '_')}"
    assert shrunk(text, tmp_path / "runs") == outside
    assert f"pixels {MODELS[kind][0]}: " in capsys.readouterr().out


class Stopped(Exception):
    """Instead of a training."""


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "given", "option"),
    [(kind, given, "auto") for kind in MODELS for given in ("file", "function")] + [("plain-0-255", "file", "0-1")],
)
def test_what_is_trained_on_is_in_the_range_of_the_model(saved, kind, given, option, tmp_path, capsys, monkeypatch):
    trained = []

    def stop(graph, budget, data, **_):
        trained.append((graph.model, *data))
        raise Stopped

    monkeypatch.setattr(shrinking, "shrink_model", stop)
    outside = saved(kind)
    text = SAVED[kind] if given == "file" else f"test_pixels:{kind.replace('-', '_')}"
    with pytest.raises(Stopped):
        shrunk(text, tmp_path / "runs", "--pixels", option)
    ((model, x, y),) = trained
    accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
    said = capsys.readouterr().out
    if option == "auto":
        np.testing.assert_allclose(accuracy, float(outside.rstrip("%")) / 100, atol=0.06)  # others, but as easy
        assert f"pixels {MODELS[kind][0]}: " in said
    else:  # the user has the last word
        assert accuracy < 0.7
        assert "pixels 0-1: as --pixels says" in said


def with_rescaling(input_shape):
    image = keras.Input(input_shape)
    return keras.Model(image, layers.Conv2D(8, 3, name="conv")(layers.Rescaling(1 / 255)(image)))


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("base", "line"),
    [("test_pixels:with_rescaling", "pixels 0-255: they"), ("DigitsResNet", "pixels 0-1: what networks")],
)
def test_train_reads_it_off_too(base, line, tmp_path, capsys, monkeypatch):
    seen = []
    original = km.StructureLearner.fit
    monkeypatch.setattr(
        km.StructureLearner,
        "fit",
        lambda self, x, *args, **rest: seen.append(x[0][0].max()) or original(self, x, *args, **rest),
    )
    with pytest.raises(SystemExit) as caught:
        main(
            ["train", "--base-model-name", base, "--log-dir", str(tmp_path), *TRAIN],
        )
    assert caught.value.code == 0
    assert line in capsys.readouterr().out
    assert seen == [255.0 if "255" in line else 1.0]
