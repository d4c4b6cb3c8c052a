"""Images that stay on disk: the same as in memory, in an order that a seed and the number of the epoch decide."""

import os
import shutil
import signal

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image
from test_datasets import fill, paint, zipped

import keras_morph as km
from keras_morph import machine
from keras_morph.datasets import Batches, Images, arrays, load, streams
from keras_morph.errors import DataError
from keras_morph.training.checkpoints import Saved
from keras_morph.training.recipe import fit_on


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images for training, 10 for validation and 12 for the test, each of its own colour."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 5), ("test", 6)):
        for name in ("cat", "dog"):
            for index in range(count):
                paint(folder / part / name / f"{index:02}.png", tuple(rng.integers(0, 256, 3).tolist()))
    return folder


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("size", [None, (5, 3)])
def test_a_stream_gives_what_memory_holds(photos, tmp_path, kind, size):
    path = photos if kind == "folder" else zipped(photos, tmp_path / "photos.zip")
    here, there = (load(path, stream=stream, image_size=size) for stream in (False, True))
    assert (here.streamed, there.streamed) == (False, True)
    assert (there.image_shape, repr(there)) == (here.image_shape, repr(here))
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(np.asarray(getattr(there, f"x_{part}")), getattr(here, f"x_{part}"))
        np.testing.assert_array_equal(getattr(there, f"y_{part}"), getattr(here, f"y_{part}"))
    changed = [each.in_pixels(km.datasets.PIXELS["0-255"]) for each in (here, there)]
    np.testing.assert_array_equal(np.asarray(changed[1].x_val), changed[0].x_val)


def test_val_is_for_validation(photos):
    data = load(photos)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [40, 10, 12]
    np.testing.assert_array_equal(np.bincount(data.y_val), [5, 5])
    few = load(photos, limit=10)  # for both together, in proportion
    assert [len(few.x_train), len(few.x_val), len(few.x_test)] == [8, 2, 10]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_val_alone_is_for_the_test_too_and_a_note_says_so(tmp_path, name):
    fill(tmp_path / "train", {"a": 9, "b": 99}, 8, mode="L")
    fill(tmp_path / name, {"a": 9, "b": 99}, 3, mode="L")
    data = load(tmp_path)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [16, 6, 6]
    assert any("there is no test/" in note for note in data.notes)
    assert data.notes[0] in str(data)


def test_images_are_indexed_like_an_array(photos):
    data, x = load(photos, stream=True), load(photos, stream=False).x_train
    images = data.x_train
    assert isinstance(images, Images)
    assert (images.shape, images.dtype, images.ndim) == (x.shape, x.dtype, x.ndim)
    np.testing.assert_array_equal(images[3], x[3])
    np.testing.assert_array_equal(images[np.array([5, 1, 5])], x[[5, 1, 5]])
    assert isinstance(images[4:9], Images)
    np.testing.assert_array_equal(np.asarray(images[4:9]), x[4:9])
    np.testing.assert_array_equal(np.asarray(images.resized((2, 2)))[0], np.asarray(images[:1].resized((2, 2)))[0])
    assert np.asarray(images[:0]).shape == (0, *x.shape[1:])


def test_what_does_not_fit_stays_on_disk_and_a_line_says_so(photos, monkeypatch):
    size = 4 * 3 * 4 * 6 * 62
    for free, streamed, words in (
        (4 * size, False, ["in memory", "62 images of 4x6", "17.9 kB", "71.4 kB that are free"]),
        (4 * size - 1, True, ["from disk", "62 images of 4x6", "17.9 kB", "more than 25% of the 71.4 kB"]),
    ):
        for module in (streams, arrays):
            monkeypatch.setattr(module, "free_memory", lambda free=free: free)
        data = load(photos)
        assert data.streamed == streamed
        (note,) = data.notes
        for word in words:
            assert word in note


def test_free_memory_is_that_of_a_machine():
    assert 2**26 < machine.free_memory() < 2**45


def test_one_colour_image_makes_a_stream_colour(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / part, {"a": 51, "b": 102}, 3, mode="L")
    assert load(tmp_path, stream=True).image_shape == (4, 6, 1)
    paint(tmp_path / "test" / "a" / "red.png", (255, 0, 0))
    data = load(tmp_path, stream=True)
    assert data.image_shape == (4, 6, 3)
    np.testing.assert_allclose(np.asarray(data.x_train)[data.y_train == 1], 0.4, atol=1e-6)


def test_complaints_of_a_stream(photos, tmp_path):
    with pytest.raises(DataError, match="expected a folder or zip of images, received digits"):
        load("digits", stream=True)
    fill(tmp_path, {"a": 51, "b": 102}, 9, mode="L")
    paint(tmp_path / "b" / "wide.png", 0, mode="L", size=(9, 4))
    with pytest.raises(DataError, match=r"wide.png: expected 4x6 .* received 4x9"):
        load(tmp_path, stream=True)
    (tmp_path / "b" / "wide.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"wide.png: expected an image"):
        load(tmp_path, stream=True)


# Batches ---------------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_seed_and_epoch():
    x, y = np.zeros((50, 2, 2, 1), np.float32), np.arange(50)
    batches = Batches(x, y, 8, seed=3)

    def shown(of):
        return np.concatenate([of[index][1] for index in range(len(of))])

    epochs = []
    for _ in range(3):
        batches[0]  # as Keras looks at the shape of one
        batches.on_epoch_end()
        batches.on_epoch_begin()
        epochs.append(shown(batches))
        batches.on_epoch_end()
    for number, epoch in enumerate(epochs):
        np.testing.assert_array_equal(np.sort(epoch), y)
        np.testing.assert_array_equal(shown(Batches(x, y, 8, seed=3, epoch=number)), epoch)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], shown(Batches(x, y, 8, seed=4)))
    np.testing.assert_array_equal(shown(Batches(x, y, 8)), y)


def test_a_batch_is_padded_for_devices():
    batches = Batches(np.ones((7, 2, 2, 1), np.float32), np.arange(7), 4, devices=2)
    x, y, weights = batches[1]
    assert len(x) == len(y) == 4
    np.testing.assert_array_equal(weights, [1, 1, 1, 0])


class Recorder(keras.layers.Layer):
    """Adds up what it sees: the sum of its inputs, each multiplied by the number of its step, tells their order."""

    def build(self, shape):
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs, training=False):
        if training:
            self.steps.assign(self.steps + 1)
            self.seen.assign(self.seen + self.steps * keras.ops.mean(inputs))
        return inputs


def seen_in(images, labels, epochs, **options):
    """What a training of some epochs sees in which order, as one number."""
    recorder = Recorder()
    model = keras.Sequential([keras.Input((4, 6, 3)), recorder, layers.Flatten(), layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batches = Batches(images, labels, 7, seed=5, **options)
    fit_on(model, batches, 7, first=options.get("epoch", 0), epochs=epochs, verbose=0)
    return float(recorder.seen)


def expected_of(images, labels, first, epochs):
    total, step = 0.0, 0
    for epoch in range(first, first + epochs):
        batches = Batches(images, labels, 7, seed=5, epoch=epoch)
        for index in range(len(batches)):
            step += 1
            total += step * float(np.mean(batches[index][0]))
    return total


def test_fit_sees_each_epoch_in_its_order(photos):
    data, here = load(photos, stream=True), load(photos, stream=False)
    for first, epochs in ((0, 3), (2, 1)):
        expected = expected_of(here.x_train, here.y_train, first, epochs)
        received = seen_in(data.x_train, data.y_train, epochs, epoch=first)
        np.testing.assert_allclose(received, expected, rtol=1e-4)
    other = expected_of(here.x_train, here.y_train, 3, 3)
    assert abs(other - expected_of(here.x_train, here.y_train, 0, 3)) > 1e-3 * other


@pytest.mark.parametrize(("room", "depth", "decoded"), [(True, 8, 8), (False, 8, 16), (True, 16, 22)])
def test_what_is_decoded_is_kept_as_bytes_where_there_is_room(tmp_path, monkeypatch, room, depth, decoded):
    """Eight training images out of ten, twice; sixteen bits are no bytes, which is found out once."""
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 2**depth, (4, 6), np.uint16 if depth == 16 else np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    here, there = (load(tmp_path, stream=stream, validation_split=0) for stream in (False, True))
    monkeypatch.setattr(streams, "free_memory", lambda: 4 * 8 * 3 * 4 * 6 if room else 0)
    decode, seen = streams.decode, []
    monkeypatch.setattr(streams, "decode", lambda images, *how: seen.extend(images) or decode(images, *how))
    for mapped in (km.datasets.PIXELS["0-1"], km.datasets.PIXELS["-1-1"]):
        x, images = (each.in_pixels(mapped).x_train for each in (here, there))
        kept = streams._Kept.of(images)
        seen.clear()
        for chosen in (np.array([7, 0, 1, 2, 3, 4]), np.arange(8), np.array([5, 6])):
            np.testing.assert_array_equal(kept[chosen], x[chosen])
        assert len(seen) == decoded
    batches = Batches(images, there.y_train, 4, seed=0)
    expected = Batches(x, there.y_train, 4, seed=0)
    for number in (0, 1, 0, 1):
        np.testing.assert_array_equal(batches[number][0], expected[number][0])


def test_a_stream_goes_on_within_an_epoch(photos):
    """The first two batches of epoch 1 are left out, and none of epoch 2."""
    data = load(photos, stream=True)
    whole = Batches(data.x_train, data.y_train, 7, seed=5)
    expected = []
    for epoch in (1, 2):
        whole.set_epoch(epoch)
        expected += [whole[index] for index in range(2 if epoch == 1 else 0, len(whole))]
    rest = Batches(data.x_train, data.y_train, 7, seed=5, epoch=1)
    rest.skip(2)
    received = []
    for _ in range(2):
        rest.on_epoch_begin()
        received += [rest[index] for index in range(len(rest))]
        rest.on_epoch_end()
    assert rest.epoch == 3
    for ours, theirs in zip(received, expected, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.only_on("torch")  # compiles nothing
def test_a_stream_that_was_terminated_goes_on_within_the_epoch(photos, tmp_path):
    data = load(photos, stream=True)

    def shrink(folder, *callbacks):
        keras.utils.set_random_seed(0)
        seed = keras.Sequential(
            [
                keras.Input(data.image_shape),
                layers.Conv2D(4, 3, use_bias=False, name="conv"),
                layers.BatchNormalization(),
                layers.GlobalAveragePooling2D(),
                layers.Dense(2, activation="softmax", name="head"),
            ],
            name="tiny",
        )
        return km.shrink(seed, "60%", data.training(7, 0), epochs=3, verbose=0, run=folder, callbacks=list(callbacks))

    class Ending(keras.callbacks.Callback):
        """Sends SIGTERM in the n-th step."""

        def __init__(self, step):
            super().__init__()
            self.left = step

        def on_train_batch_end(self, batch, logs=None):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    undisturbed = shrink(tmp_path / "whole", Ending(1000))
    with pytest.raises(SystemExit):
        shrink(tmp_path / "ended", Ending(2))
    assert Saved.load(tmp_path / "ended" / "checkpoint" / "last.npz").state["steps"] == 2
    result = shrink(tmp_path / "ended", Ending(1000))
    for ours, theirs in zip(result.small.get_weights(), undisturbed.small.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in undisturbed.history]


def test_a_file_that_breaks_while_training_is_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    data = load(tmp_path / "photos", stream=True)
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "dog" / "03.png").write_bytes(b"gone")
        model = keras.Sequential([keras.Input((4, 6, 3)), layers.Flatten(), layers.Dense(2, activation="softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy")
        with pytest.raises(DataError, match=rf"{part}.dog.03.png: expected an image"):
            fit_on(model, data.training(7, 0), 7, seed=0, epochs=1, verbose=0, validation_data=data.validation(7))
        shutil.copy(photos / part / "dog" / "03.png", tmp_path / "photos" / part / "dog" / "03.png")


@pytest.mark.only_on("tensorflow", "torch")  # JAX compiles for half a minute
@pytest.mark.usefixtures("uncompiled")
def test_shrink_trains_on_a_stream(photos, tmp_path):
    data = load(photos, stream=True)
    model = keras.Sequential(
        [
            keras.Input(data.image_shape),
            layers.Conv2D(6, 3, padding="same", name="conv"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    result = km.shrink(model, "60%", data.training(16, 0), validation_data=data.validation(16), epochs=3, verbose=0)
    assert [row["phase"] for row in result.history] == ["learn", "fine-tune", "fine-tune"]
    assert all(0 <= row["val_accuracy"] <= 1 for row in result.history)
    assert result.small.predict(data.test(5), verbose=0).shape == (12, 2)
