"""TFRecord files, written by TensorFlow, read without it."""

import contextlib
import io
import struct

import keras
import numpy as np
import pytest
from PIL import Image

from keras_morph import datasets
from keras_morph.errors import DataError

pytestmark = pytest.mark.once

if keras.backend.backend() == "tensorflow":  # the only one on which these tests run
    import tensorflow as tf

SLIM = ("image/encoded", "image/class/label")
TFDS = ("image", "label")


def feature(value):
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=np.atleast_1d(value)))


def png(level):
    stream = io.BytesIO()
    Image.new("L", (5, 3), level).save(stream, "PNG")
    return stream.getvalue()


def write(path, labels, *, keys=SLIM, first=0, options=None, **further):
    """One file: an image of level `10 * label + index % 10` for each label."""
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for index, label in enumerate(labels, first):
            values = {
                keys[0]: png(10 * label + index % 10),
                keys[1]: label,
                "score": 0.5,
                "ids": [1, -2, 3],
                "image/height": 3,
            }
            values |= {key.replace("__", "/"): value(label) for key, value in further.items()}
            example = tf.train.Example(features=tf.train.Features(feature={k: feature(v) for k, v in values.items()}))
            writer.write(example.SerializeToString())


def folder(tmp_path, **options):
    records = tmp_path / "records"
    write(records / "train-00000-of-00002", [0, 1] * 10, **options)
    write(records / "train-00001-of-00002", [2] * 10, **options)
    write(records / "validation-00000-of-00001", [2, 1, 0], **options)
    return records


@pytest.mark.parametrize("keys", [SLIM, TFDS])
@pytest.mark.parametrize("stream", [False, True])
def test_images_and_labels(keys, stream, tmp_path):
    data = datasets.load(folder(tmp_path, keys=keys), stream=stream)
    assert data.image_shape == (3, 5, 1)
    assert (len(data.x_train), len(data.x_val), len(data.x_test)) == (30, 3, 3)
    for images, labels in ((data.x_train, data.y_train), (data.x_val, data.y_val)):
        levels = np.rint(np.asarray(images)[:, 0, 0, 0] * 255).astype(int)
        np.testing.assert_array_equal(levels // 10, labels)
        assert len(set(levels)) > 2
    assert any("validation files are for validation and for the test" in note for note in data.notes)
    assert data.class_names == ("0", "1", "2")
    assert data.streamed == stream


def test_one_file_and_the_names_of_classes(tmp_path):
    names = ["frog", "toad", "newt"]
    write(tmp_path / "all.tfrecord", [0, 1, 2] * 10, image__class__text=lambda label: names[label].encode())
    data = datasets.load(tmp_path / "all.tfrecord", limit=12, image_size=4)
    assert data.image_shape == (4, 4, 1)
    assert data.class_names == tuple(names)
    assert len(data.x_train) + len(data.x_val) == 12


def test_a_prepared_folder_of_tensorflow_datasets(tmp_path):
    prepared = tmp_path / "1.0.0"
    write(prepared / "ponds-train.tfrecord-00000-of-00001", [0, 1] * 10, keys=TFDS)
    write(prepared / "ponds-test.tfrecord-00000-of-00001", [1, 0], keys=TFDS)
    (prepared / "label.labels.txt").write_text("frog\ntoad\n")
    (prepared / "dataset_info.json").write_text("{}")
    data = datasets.load(prepared)
    assert data.class_names == ("frog", "toad")
    assert (len(data.x_train) + len(data.x_val), len(data.x_test)) == (20, 2)


def damaged(content):
    return content[:-20]


def longer(content):
    return struct.pack("<Q", 2**40) + content[8:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "damaged, or something else, at byte"),
        (longer, "damaged, or something else, at byte 0"),
        (lambda content: b"x" * 300, "damaged, or something else, at byte 0"),
        (lambda content: b"", "received one that cannot be read"),
        (lambda content: b"\x1f\x8b" + content, "compressed one; write it without compression"),
        (lambda content: struct.pack("<QI", 5, 0) + b"\x0a\xff\xff\xff\xff" + b"1234", "expected a tf.train.Example"),
        (lambda content: struct.pack("<QI", 5, 0) + b"\x0fabcd" + b"1234", "expected a tf.train.Example"),
        (
            lambda content: struct.pack("<QI", 0, 0) + b"1234",
            "expected image/encoded or image in each record, received nothing",
        ),
    ],
)
def test_another_file_is_one_line(change, message, tmp_path):
    path = folder(tmp_path) / "train-00000-of-00002"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        datasets.load(path.parent)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": ("picture", "label")}, "expected image/encoded or image in each record, received ids, image/height"),
        ({"keys": ("image", "class")}, "expected image/class/label or label in each record"),
        ({"image__class__label": lambda label: float(label)}, "one integer label, received others"),
        ({"image__class__label": lambda label: -1}, "expected labels from 0"),
        ({"image__encoded": lambda label: b"no image"}, r"train-0000\d-of-00002\[\d+\]"),
    ],
)
def test_other_records_are_one_line(options, message, tmp_path):
    with pytest.raises(DataError, match=message):
        datasets.load(folder(tmp_path, **options))


def test_any_byte_that_changes_is_an_error_of_ours_or_other_data(tmp_path):
    path = folder(tmp_path) / "train-00000-of-00002"
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, 400, 60):
        path.write_bytes(content[:place] + bytes([random.integers(0, 256)]) + content[place + 1 :])
        with contextlib.suppress(DataError):
            datasets.load(path.parent, limit=10, stream=False)


def test_array_record_and_no_training_part(tmp_path):
    write(tmp_path / "a" / "ponds-train.array_record-00000-of-00001", [0, 1])
    with pytest.raises(DataError, match="file_format='tfrecord'"):
        datasets.load(tmp_path / "a")
    write(tmp_path / "b" / "test-00000-of-00001", [0, 1])
    with pytest.raises(DataError, match="expected files of training images"):
        datasets.load(tmp_path / "b")
