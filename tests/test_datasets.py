"""Every source gives the same form; every mistake gives one line."""

import io
import sys
import types
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

from keras_morph import datasets
from keras_morph.datasets import decoding
from keras_morph.errors import DataError


def paint(path, value, *, mode="RGB", size=(6, 4)):
    """Write an image of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def fill(folder, classes, count, **options):
    """Write `count` images for each class of `{name: colour}`."""
    for name, value in classes.items():
        for index in range(count):
            paint(folder / name / f"{index}.png", value, **options)


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def photos(tmp_path):
    """Red cats and blue dogs, 20 for training and 5 for the test."""
    folder = tmp_path / "photos"
    fill(folder / "train", {"cat": (255, 0, 0), "dog": (0, 0, 255)}, 20)
    fill(folder / "test", {"cat": (255, 0, 0), "dog": (0, 0, 255)}, 5)
    return folder


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (60, 5, 7, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8),
        "y_test": np.arange(12) % 3,
    }


def complaint(*args, **options):
    """Load what cannot be loaded, and return the one line that says so."""
    with pytest.raises(DataError) as caught:
        datasets.load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert "received" in message or "not installed" in message
    return message


def assert_form(data, image_shape, classes):
    assert data.image_shape == image_shape
    assert data.num_classes == classes
    for x, y in ((data.x_train, data.y_train), (data.x_val, data.y_val), (data.x_test, data.y_test)):
        assert (x.dtype, y.dtype) == (np.float32, np.int32)
        assert x.shape == (len(y), *image_shape)
        assert 0 <= x.min() <= x.max() <= 1
        assert set(np.unique(y)) == set(range(classes))


def test_digits():
    data = datasets.load("digits")
    assert_form(data, (8, 8, 1), 10)
    assert len(data.x_train) + len(data.x_val) + len(data.x_test) == 1797
    assert data.x_train.max() == 1
    assert data.class_names == tuple("0123456789")
    assert repr(data) == "Dataset(digits: 1294 training, 144 validation and 359 test images of 8x8x1, 10 classes)"


def test_the_seed_moves_training_and_validation_but_not_the_test():
    first, again, other = (datasets.load("digits", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.x_train, again.x_train)
    np.testing.assert_array_equal(first.x_val, again.x_val)
    np.testing.assert_array_equal(first.x_test, other.x_test)
    assert not np.array_equal(first.x_val, other.x_val)


def test_no_image_is_in_two_parts(tmp_path):
    # Image i is grey at level i, so that a pixel tells which one it is.
    x = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 2, 2))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(200) % 4, x_test=x[:4], y_test=np.arange(4))
    data = datasets.load(tmp_path / "a.npz", validation_split=0.25)
    train, val = (np.rint(part[:, 0, 0, 0] * 255).astype(int) for part in (data.x_train, data.x_val))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(200))
    np.testing.assert_array_equal(train % 4, data.y_train)
    np.testing.assert_allclose(np.bincount(data.y_val), 12.5, atol=0.5)


@pytest.mark.parametrize("limit", [10, 33, 100, 1000])
def test_limit_keeps_the_classes_in_proportion(limit):
    data = datasets.load("digits", limit=limit, validation_split=0)
    assert len(data.x_train) == limit
    assert len(data.x_test) == min(limit, 359)
    assert len(data.x_val) == 0
    counts = np.bincount(data.y_train, minlength=10)
    assert counts.min() >= 1
    # The digits themselves are not quite even: 174 to 183 of each.
    np.testing.assert_allclose(counts, limit / 10, atol=1 + 0.04 * limit / 10)


def test_a_rare_class_stays_in_training(tmp_path):
    y = np.array([0] * 99 + [1])
    np.savez(tmp_path / "a.npz", x_train=np.zeros((100, 2, 2)), y_train=y, x_test=np.zeros((1, 2, 2)), y_test=[0])
    for seed in range(5):
        data = datasets.load(tmp_path / "a.npz", limit=20, validation_split=0.5, seed=seed)
        np.testing.assert_array_equal(np.bincount(data.y_train), [9, 1])
        np.testing.assert_array_equal(data.y_val, np.zeros(10))


def test_folder(photos):
    data = datasets.load(photos)
    assert_form(data, (4, 6, 3), 2)
    assert (data.name, data.class_names) == ("photos", ("cat", "dog"))
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [36, 4, 10]
    expected = np.array([[1, 0, 0], [0, 0, 1]])[data.y_train]
    np.testing.assert_array_equal(data.x_train[:, 0, 0], expected)


@pytest.mark.parametrize("prefix", ["", "cifar/", "a/b/", "./"])
def test_zip_equals_folder(photos, tmp_path, prefix):
    for junk in ("train/.hidden.png", "__MACOSX/train/cat/._0.png", "notes.txt"):
        path = photos / junk
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    path = zipped(photos, tmp_path / "photos.zip", prefix)
    one, other = datasets.load(photos), datasets.load(str(path))
    np.testing.assert_array_equal(one.x_train, other.x_train)
    np.testing.assert_array_equal(one.y_val, other.y_val)
    np.testing.assert_array_equal(one.x_test, other.x_test)


def test_class_folders_alone_give_a_test_part_that_no_seed_moves(tmp_path):
    # A class may be called like a part.
    fill(tmp_path / "things", {"train": (250, 0, 0), "bus": (0, 250, 0)}, 20)
    one, other = (datasets.load(tmp_path / "things", seed=seed) for seed in (0, 1))
    assert one.class_names == ("bus", "train")
    assert [len(one.x_train), len(one.x_val), len(one.x_test)] == [29, 3, 8]
    np.testing.assert_array_equal(one.y_test, other.y_test)
    np.testing.assert_array_equal(np.bincount(one.y_test), [4, 4])


def test_only_chosen_images_are_decoded(photos, monkeypatch):
    decoded = []
    original = decoding._pixels
    monkeypatch.setattr(decoding, "_pixels", lambda *args: decoded.append(args[0]) or original(*args))
    datasets.load(photos, limit=6)
    assert len(decoded) == len(set(decoded)) == 12


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "webp", "PNG"])
def test_every_format_is_decoded(tmp_path, suffix):
    for name, value in (("dark", (40, 40, 200)), ("light", (240, 200, 40))):
        for index in range(10):
            paint(tmp_path / name / f"{index}.{suffix}", value, size=(8, 8))
    data = datasets.load(tmp_path)
    expected = np.array([[40, 40, 200], [240, 200, 40]])[data.y_train] / 255
    np.testing.assert_allclose(data.x_train[:, 4, 4], expected, atol=0.02)


@pytest.mark.parametrize(
    ("mode", "value", "level"),
    [("L", 51, 0.2), ("1", 1, 1), ("LA", (51, 9), 0.2), ("I;16", 13107, 0.2)],
)
def test_grey_stays_one_channel_when_all_are_grey(tmp_path, mode, value, level):
    fill(tmp_path, {"a": value, "b": value}, 10, mode=mode)
    data = datasets.load(tmp_path)
    assert data.image_shape == (4, 6, 1)
    np.testing.assert_allclose(data.x_train, level, atol=1e-6)


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_colour_image_makes_all_colour(tmp_path, part):
    for folder in ("train", "test"):
        fill(tmp_path / folder, {"a": 51, "b": 102}, 3, mode="L")
    paint(tmp_path / part / "a" / "red.png", (255, 0, 0))
    data = datasets.load(tmp_path)
    assert data.image_shape == (4, 6, 3)
    greys = data.x_train[data.y_train == 1]
    np.testing.assert_allclose(greys, 0.4, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_transparent_palettes_are_decoded(tmp_path):
    for name in "ab":
        for index in range(5):
            path = tmp_path / name / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            image = Image.new("P", (4, 4), 1)
            image.putpalette([0, 0, 0, 255, 102, 0])
            image.save(path, transparency=bytes([9, 200]))
    np.testing.assert_allclose(datasets.load(tmp_path).x_train[:, 0, 0], [[1, 0.4, 0]] * 7, atol=1e-6)


@pytest.mark.parametrize(("size", "shape"), [(3, (3, 3, 3)), ((10, 2), (10, 2, 3))])
def test_image_size_for_files_and_arrays(photos, arrays, tmp_path, size, shape):
    np.savez(tmp_path / "a.npz", **arrays)
    assert datasets.load(photos, image_size=size).image_shape == shape
    assert datasets.load(tmp_path / "a.npz", image_size=size).image_shape == shape


def test_resizing_files_and_arrays_agrees(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 9, 12, 3), dtype=np.uint8)
    y = np.arange(20) % 2
    for index in range(20):
        for part in ("train", "test"):
            path = tmp_path / "files" / part / str(y[index]) / f"{index // 2:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[index]).save(path)
    order = np.argsort(y, kind="stable")
    np.savez(tmp_path / "a.npz", x_train=x[order], y_train=y[order], x_test=x[order], y_test=y[order])
    files, other = (datasets.load(tmp_path / name, image_size=(5, 8)) for name in ("files", "a.npz"))
    np.testing.assert_array_equal(files.y_train, other.y_train)
    np.testing.assert_allclose(files.x_train, other.x_train, atol=1 / 255)
    # Shrinking averages: the mean colour stays.
    np.testing.assert_allclose(other.x_test.mean(), x.mean() / 255, atol=0.01)


def test_npz(arrays, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays)
    data = datasets.load(tmp_path / "mine.npz")
    assert_form(data, (5, 7, 3), 3)
    assert (data.name, data.class_names) == ("mine", ("0", "1", "2"))
    np.testing.assert_allclose(np.sort(data.x_test, axis=None), np.sort(arrays["x_test"], axis=None) / 255, rtol=1e-6)


def test_npz_of_floats_grey_images_and_columns_of_labels(arrays, tmp_path):
    for part in ("train", "test"):
        arrays[f"x_{part}"] = arrays[f"x_{part}"][..., 0] / 255
        arrays[f"y_{part}"] = arrays[f"y_{part}"][:, None]
    np.savez(tmp_path / "a.npz", **arrays)
    assert_form(datasets.load(tmp_path / "a.npz"), (5, 7, 1), 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": None}, ["x_test is missing"]),
        ({"x_train": np.zeros((60, 5))}, ["x_train", "(n, height, width, channels)", "(60, 5)"]),
        ({"x_train": np.zeros((59, 5, 7, 3))}, ["x_train", "60 images", "(59, 5, 7, 3)"]),
        ({"x_train": np.zeros((60, 5, 7, 3), int)}, ["x_train", "uint8", "int64"]),
        ({"x_train": np.full((60, 5, 7, 3), 255.0)}, ["x_train", "[0, 1]", "255"]),
        ({"x_train": np.full((60, 5, 7, 3), np.nan)}, ["x_train", "[0, 1]", "nan"]),
        ({"x_test": np.zeros((12, 9, 9, 3))}, ["(5, 7, 3)", "(9, 9, 3)", "image size"]),
        ({"y_train": np.zeros(60)}, ["y_train", "integer", "float64"]),
        ({"y_train": np.eye(3, dtype=int)[np.arange(60) % 3]}, ["y_train", "(60, 3)", "argmax"]),
        ({"y_train": np.arange(60) - 1}, ["y_train", "-1"]),
        ({"y_train": np.arange(60) * 2000}, ["y_train", "118000"]),
        ({"y_test": np.arange(12)}, ["'3'", "training images"]),
        ({"y_train": np.array([{}] * 60)}, ["plain arrays"]),
    ],
)
def test_npz_complaints(arrays, tmp_path, change, words):
    arrays |= change
    np.savez(tmp_path / "odd.npz", **{key: value for key, value in arrays.items() if value is not None})
    message = complaint(tmp_path / "odd.npz")
    for word in ["odd", *words]:
        assert word in message


def test_damaged_archives(tmp_path):
    for name in ("a.npz", "a.zip"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and nothing else")
        assert name in complaint(tmp_path / name)
    (tmp_path / "a.rar").write_bytes(b"")
    assert "'.rar'" in complaint(tmp_path / "a.rar")


def test_folder_complaints(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert ".png" in complaint(empty)

    fill(tmp_path / "one", {"cat": 0}, 3, mode="L")
    assert "at least two folders" in complaint(tmp_path / "one")

    fill(tmp_path / "stranger" / "train", {"cat": 0, "dog": 0}, 3, mode="L")
    fill(tmp_path / "stranger" / "test", {"cat": 0, "emu": 0}, 3, mode="L")
    assert "'emu'" in complaint(tmp_path / "stranger")

    fill(tmp_path / "renamed" / "train", {"cat": 0, "dog": 0}, 3, mode="L")
    fill(tmp_path / "renamed" / "rest", {"cat": 0, "dog": 0}, 3, mode="L")
    assert "received rest" in complaint(tmp_path / "renamed")

    fill(tmp_path / "mixed", {"cat": 0, "dog": 0}, 3, mode="L")
    paint(tmp_path / "mixed" / "dog" / "wide.png", 0, mode="L", size=(9, 4))
    assert "image size" in complaint(tmp_path / "mixed")
    assert datasets.load(tmp_path / "mixed", image_size=4).image_shape == (4, 4, 1)


def test_an_unreadable_image_is_named(photos, tmp_path):
    whole = (photos / "train" / "dog" / "7.png").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        (photos / "train" / "dog" / "7.png").write_bytes(damaged)
        assert "7.png" in complaint(photos)
        assert "train/dog/7.png" in complaint(zipped(photos, tmp_path / "photos.zip"))


def test_a_zip_member_with_a_wrong_checksum_is_named(photos, tmp_path):
    path = zipped(photos, tmp_path / "photos.zip")
    whole = path.read_bytes()
    at = whole.index(b"IDAT")
    path.write_bytes(whole[: at + 6] + b"\x00\x01\x02" + whole[at + 9 :])
    assert "test/cat/0.png" in complaint(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 9}, ["limit", "10 classes", "9"]),
        ({"limit": 0}, ["limit", "0"]),
        ({"validation_split": 1.0}, ["validation_split", "1.0"]),
        ({"validation_split": -0.1}, ["validation_split", "-0.1"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"image_size": 0}, ["image_size", "0"]),
        ({"image_size": (8, 8, 3)}, ["image_size", "(8, 8, 3)"]),
        ({"image_size": (8.5, 8)}, ["image_size", "(8.5, 8)"]),
    ],
)
def test_option_complaints(options, words):
    message = complaint("digits", **options)
    for word in words:
        assert word in message


def test_unknown_names_list_the_known_ones(tmp_path):
    message = complaint("cifar-10")
    assert "did you mean cifar10?" in message
    for name in datasets.NAMES:
        assert name in message
    assert "check the path" in complaint(tmp_path / "nowhere" / "data.npz")


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("digits", "sklearn.datasets", "demo"), ("tfds:mnist", "tensorflow_datasets", "tfds")]
)
def test_a_missing_extra_is_named(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"keras-morph[{extra}]" in complaint(name)


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("mnist", 10), ("fashion_mnist", 10)]
)
def test_downloaded_sets(monkeypatch, name, classes):
    """What Keras's loaders return, in shape and dtype, without the download."""
    labels = (np.arange(300) % classes).astype(np.uint8)
    if name.startswith("cifar"):
        images, labels = np.full((300, 32, 32, 3), 255, np.uint8), labels[:, None]
    else:
        images = np.full((300, 28, 28), 255, np.uint8)
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: ((images, labels), (images, labels)))
    data = datasets.load(name, limit=200, validation_split=0.5)
    assert_form(data, (*images.shape[1:3], 3 if images.ndim == 4 else 1), classes)
    np.testing.assert_array_equal(data.x_train, 1)


def test_a_failing_download_is_one_line(monkeypatch):
    def load_data():
        raise Exception("URL fetch failure on https://example.org: None -- \n no route")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", load_data)
    assert "URL fetch failure on https://example.org: None -- no route" in complaint("cifar10")


def test_tfds(monkeypatch):
    """The few calls of tensorflow_datasets that are made, answered as the library does: images stay encoded."""

    def encoded(level):
        stream = io.BytesIO()
        Image.new("L", (5, 3), level).save(stream, "PNG")
        return stream.getvalue()

    rows = {
        part: [{"image": encoded(100 + index % 2), "label": np.int64(index % 2)} for index in range(count)]
        for part, count in (("train", 20), ("test", 4))
    }
    info = types.SimpleNamespace(
        supervised_keys=("image", "label"),
        splits=rows,
        features={"label": types.SimpleNamespace(names=["off", "on"])},
    )
    builder = types.SimpleNamespace(
        info=info,
        download_and_prepare=lambda: None,
        as_dataset=lambda part, decoders: rows[part] if list(decoders) == ["image"] else None,
    )
    module = types.SimpleNamespace(
        builder={"switches": builder}.__getitem__,
        as_numpy=iter,
        decode=types.SimpleNamespace(SkipDecoding=lambda: "encoded"),
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    data = datasets.load("tfds:switches")
    assert_form(data, (3, 5, 1), 2)
    assert data.class_names == ("off", "on")
    np.testing.assert_allclose(data.x_train[:, 0, 0, 0], (100 + data.y_train) / 255, rtol=1e-6)
    assert "tfds:lamps" in complaint("tfds:lamps")
