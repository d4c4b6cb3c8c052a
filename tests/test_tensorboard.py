"""TensorBoard's events, read back from the file as TensorBoard does: records of length, checksum and message."""

import io
import json
import struct

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import keras_morph as km
from keras_morph.cli import main

pytestmark = pytest.mark.usefixtures("uncompiled")


def events(folder):
    """Every value as (tag, step, value)."""
    (path,) = folder.glob("events.out.tfevents.*")
    stream = io.BytesIO(path.read_bytes())
    while head := stream.read(12):  # length, and its checksum
        event = Event.FromString(stream.read(struct.unpack("<Q", head[:8])[0]))
        stream.read(4)  # the message's checksum
        for value in event.summary.value:
            yield value.tag, event.step, value


def scalars(folder):
    found = {}
    for tag, step, value in events(folder):
        if value.HasField("simple_value"):
            found.setdefault(tag, {})[step] = value.simple_value
    return found


def tiny():
    """image(2) -- conv(4) -- bn -- mean -- dense(3)."""
    image = keras.Input((5, 5, 2))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(image))
    return keras.Model(image, layers.Dense(3, name="dense")(layers.GlobalAveragePooling2D()(x)), name="tiny")


def fit(folder, **options):
    learner = km.StructureLearner(tiny(), regularizer=km.Gamma(0.5), cost=km.ModelSize(), strength=1e-3)
    learner.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    random = np.random.default_rng(0)
    x, y = random.random((16, 5, 5, 2)), random.integers(0, 3, 16)
    log = km.TensorBoardLog(folder)
    history = learner.fit(x, y, batch_size=8, verbose=0, callbacks=[*options.pop("before", []), log], **options).history
    return learner, history


def test_scalars(tmp_path):
    learner, history = fit(tmp_path, epochs=2, validation_split=0.5)
    found = scalars(tmp_path)
    steps = [1, 2]  # 8 images, 8 a batch
    assert set(found) == {
        "RegularizationLoss", "ModelSize", "ModelSize_share_of_seed", "strength",
        "loss", "accuracy", "val_loss", "val_accuracy",
    }  # fmt: skip
    for tag, name in (("RegularizationLoss", "penalty"), ("loss", "loss"), ("val_accuracy", "val_accuracy")):
        assert list(found[tag]) == steps
        np.testing.assert_allclose(list(found[tag].values()), history[name], rtol=1e-6)
    for tag in ("ModelSize", "ModelSize_share_of_seed", "strength"):
        assert list(found[tag]) == [0, *steps]
    np.testing.assert_allclose(found["ModelSize"][0], learner.seed.count_params())
    np.testing.assert_allclose(list(found["strength"].values()), 1e-3, rtol=1e-6)


class KillChannels(keras.callbacks.Callback):
    """Half of the channels die at the end of the second epoch."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.model.seed.get_layer("bn").gamma.assign([0.0, 1.0, 0.0, 1.0])


def test_what_has_died_is_seen(tmp_path):
    learner, _ = fit(tmp_path, epochs=3, before=[KillChannels()])
    found = scalars(tmp_path)
    now = km.ModelSize()(learner.seed, learner.structure())
    assert now < learner.seed.count_params()
    np.testing.assert_allclose(found["ModelSize"][6], now)
    np.testing.assert_allclose(found["ModelSize_share_of_seed"][6], now / learner.seed.count_params(), rtol=1e-6)
    pictures = {step: value.image for tag, step, value in events(tmp_path) if tag == "widths"}
    assert list(pictures) == [0, 4]  # drawn when the structure has changed
    image = Image.open(io.BytesIO(pictures[4].encoded_image_string))
    assert image.size == (pictures[4].width, pictures[4].height)
    assert len(np.unique(np.asarray(image))) > 10
    shares = {step: value.histo for tag, step, value in events(tmp_path) if tag == "alive_share_of_layers"}
    assert list(shares) == [0, 2, 4, 6]
    np.testing.assert_allclose([shares[0].min, shares[0].num], [1, 2])
    np.testing.assert_allclose([shares[6].min, shares[6].max], [0.5, 1])


def test_another_model_is_refused(tmp_path):
    model = tiny()
    model.compile("sgd", "mse")
    with pytest.raises(km.KerasMorphError, match="TensorBoardLog expects fit of a StructureLearner"):
        model.fit(np.ones((2, 5, 5, 2)), np.ones((2, 3)), verbose=0, callbacks=[km.TensorBoardLog(tmp_path)])


def test_events_of_the_class_and_of_the_command(tmp_path):
    model = km.zoo.MorphNetModel(
        lambda input_shape: keras.Model(image := keras.Input(input_shape), layers.Conv2D(4, 3)(image)),
        3,
        input_shape=(5, 5, 2),
        morphnet_regularization_strength=1e-3,
        log_dir=tmp_path / "class",
    )
    losses = [model.train(np.ones((4, 5, 5, 2)), [0, 1, 2, 0]) for _ in range(2)]
    model.close()
    found = scalars(model.folder)
    assert list(found) == ["RegularizationLoss", "FLOPs"]
    np.testing.assert_allclose(list(found["FLOPs"].values()), [cost for _, _, cost in losses])
    assert list(found["RegularizationLoss"]) == [1, 2]

    options = "train --base-model-name two_devices:tiny --dataset digits --limit 100 --num-epochs 1 --log-dir"
    with pytest.raises(SystemExit) as caught:
        main([*options.split(), str(tmp_path / "command")])
    assert caught.value.code == 0
    (folder,) = (tmp_path / "command").iterdir()
    found = scalars(folder)
    config = json.loads((folder / "config.json").read_text())
    np.testing.assert_allclose(found["FLOPs"][0], config["initial_cost"])
    np.testing.assert_allclose(found["strength"][1], config["strength"], rtol=1e-6)
    assert {"RegularizationLoss", "accuracy", "val_accuracy"} < set(found)
