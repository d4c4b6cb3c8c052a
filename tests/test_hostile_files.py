"""Some of the files and options of tests/hostile.py; benchmarks/hostile.py tries thousands."""

import io
import os
import random
import sys
import zipfile

import hostile
import keras
import models
import numpy as np
import pytest
from keras import layers
from PIL import Image
from test_cli import MODEL, command, for_digits
from test_datasets import complaint, fill, paint, zipped

import keras_morph as km
from keras_morph.cli import choices, main
from keras_morph.datasets import arrays, catalog, decoding, load
from keras_morph.errors import DataError
from keras_morph.runs import read_regular
from keras_morph.saving import open_model

pytestmark = pytest.mark.once


@pytest.mark.parametrize(("kind", "count"), [("structures", 60), ("models", 25), ("pictures", 60)])
def test_what_is_mutated_is_refused_or_right(kind, count, tmp_path):
    found = hostile.tried(kind, tmp_path, count, seed=7)
    assert found["refused"] > count / 4  # else nothing was tried


def test_a_judge_that_sees_a_fault_says_which_case_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile.Structures, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        hostile.tried("structures", tmp_path, 1, seed=3)
    assert error.value.__notes__ == ["structures, seed 3, case 0"]


def test_options_at_nonsense_values(tmp_path):
    folder = tmp_path / "some" / "folders" / "below"
    km.fit_budget(for_digits(), "50%").save(folder / "structure.json")
    cases = list(hostile.option_cases())
    for arguments in random.Random("options 7").sample(cases, 40):
        hostile.judge_command(arguments, folder, within=tmp_path)


def test_what_is_written_outside_is_seen(tmp_path):
    found = []
    with hostile.written(found, tmp_path / "inside"):
        (tmp_path / "outside").write_text("")
    assert found == [str(tmp_path / "outside")]


# Folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    fill(tmp_path / "photos" / "train", {"cat": 50, "dog": 200}, 6, mode="L")
    fill(tmp_path / "photos" / "test", {"cat": 50, "dog": 200}, 2, mode="L")
    return tmp_path / "photos"


def noted(path, *words):
    """The data set, one of whose notes contains these words."""
    data = load(path)
    assert any(all(word in note for word in words) for note in data.notes), data.notes
    return data


def test_links_that_lead_back_are_not_followed(photos):
    (photos / "train" / "cat" / "again").symlink_to(photos)
    (photos / "train" / "dog" / "up").symlink_to("..")
    assert len(noted(photos, "2 links", "not followed").x_train) == 11


def test_links_to_other_folders_are_followed_once(photos, tmp_path):
    fill(tmp_path / "elsewhere", {"emu": 9}, 4, mode="L")
    (tmp_path / "elsewhere" / "emu" / "back").symlink_to(photos)
    for part in ("train", "test"):
        (photos / part / "emu").symlink_to(tmp_path / "elsewhere" / "emu")
    data = noted(photos, "links", "are followed")
    assert data.class_names == ("cat", "dog", "emu")


def test_links_of_files_and_those_that_lead_nowhere(photos):
    (photos / "train" / "cat" / "more.png").symlink_to(photos / "train" / "dog" / "0.png")
    (photos / "train" / "cat" / "gone.png").symlink_to(photos / "nowhere.png")
    assert len(noted(photos, "1 links that lead nowhere").x_train) == 12


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in the file system")
def test_pipes_and_devices_are_left_out_and_never_opened(photos, tmp_path):
    os.mkfifo(photos / "train" / "cat" / "pipe.png")
    (photos / "train" / "dog" / "zero.png").symlink_to("/dev/zero")
    with hostile.watched(10):
        noted(photos, "1 pipes are left out")
        noted(photos, "1 devices are left out")
        os.mkfifo(tmp_path / "pipe.zip")
        assert "neither a file nor a folder" in complaint(tmp_path / "pipe.zip")
        for path in (tmp_path / "pipe.zip", "/dev/zero"):
            with pytest.raises(OSError, match="no regular file"):
                read_regular(path, 100)
            with pytest.raises(km.StructureMismatchError, match="no regular file"):
                km.Structure.load(path)


def test_what_is_beside_the_images_is_said(photos):
    (photos / "train" / "cat" / "movie.mp4").touch()
    (photos / "train" / "raw.HEIC").touch()
    paint(photos / "train" / "stray.png", 0, mode="L")
    (photos / "train" / "gnu").mkdir()
    data = noted(photos, "2 files that are no images", ".mp4 (1)", ".heic (1)")
    assert data.class_names == ("cat", "dog")
    noted(photos, "1 images outside a class folder")
    noted(photos, "1 folders without images", "gnu")


def test_a_folder_that_cannot_be_read_is_refused(photos, monkeypatch):
    original = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "Permission denied" in complaint(photos)


@pytest.mark.parametrize(
    "path", ["", " ", "/", "/proc", "/proc/self", "/sys", "/dev", "~nobody-here/x", "x" * 5000, "a\0b"]
)
def test_paths_that_are_no_data(path):
    with hostile.watched(10), pytest.raises(DataError, match="expected") as error:
        load(path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[:2, :3] = 255  # white at the upper left
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2)}
    turns |= {6: np.rot90, 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: lambda x: np.rot90(x, 3)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in "ab":
        for index in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
            stored.save(tmp_path / name / f"{index}.png", exif=exif)
    for stream in (False, True):
        data = load(tmp_path, stream=stream)
        np.testing.assert_array_equal(np.asarray(data.x_test)[0], upright / np.float32(255))


# Bombs -----------------------------------------------------------------------------------------------------------


def test_images_of_too_many_pixels_or_bytes_are_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "PIXEL_LIMIT", 24)
    paint(photos / "train" / "cat" / "0.png", 0, mode="L", size=(5, 5))
    assert "cat/0.png" in complaint(photos, image_size=4)
    assert "5x5 pixels, more than 24" in complaint(photos, image_size=4, stream=True)


def test_a_member_that_unpacks_to_much_is_refused_before_it_is(photos, tmp_path):
    path = zipped(photos, tmp_path / "bomb.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("train/cat/z.png", "w") as member:
        for _ in range(2**28 // 2**20 + 1):
            member.write(bytes(2**20))
    before = hostile.largest_memory()
    message = complaint(path)
    assert "z.png" in message
    assert "more than 268,435,456" in message
    assert hostile.largest_memory() - before < 2**27


@pytest.mark.parametrize(
    ("shape", "words"), [("(99999999, 99999, 9)", "expected"), ("(20, 4, 5)", "400 bytes"), ("(-20, 4, 4)", "expected")]
)
def test_arrays_are_what_their_headers_say(tmp_path, shape, words):
    stream = io.BytesIO()
    np.save(stream, np.zeros((20, 4, 4), np.uint8))
    member = stream.getvalue().replace(b"(20, 4, 4)", shape.encode(), 1)
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", member)
    assert words in complaint(tmp_path / "odd.npz")


def test_arrays_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    x = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "big.npz", x_train=x, y_train=np.arange(20) % 2, x_test=x, y_test=np.arange(20) % 2)
    assert len(load(tmp_path / "big.npz").x_test) == 20
    monkeypatch.setattr(catalog, "free_memory", lambda: 3_000)
    assert "free memory" in complaint(tmp_path / "big.npz")
    monkeypatch.setattr(arrays, "free_memory", lambda: 3_000)
    assert "8x9" in complaint("digits", image_size=(8, 9))


def test_labels_that_are_no_numbers_of_classes(tmp_path):
    x = np.zeros((20, 4, 4), np.uint8)
    np.savez(
        tmp_path / "years.npz", x_train=x, y_train=1900 + np.arange(20) % 2, x_test=x, y_test=1900 + np.arange(20) % 2
    )
    assert "2 different ones up to 1901" in complaint(tmp_path / "years.npz")


# Models ----------------------------------------------------------------------------------------------------------


def changed(path, member, change):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[member] = change(members.get(member, b""))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("member", "change", "words"),
    [
        ("config.json", lambda text: text.replace(b'"units": 10', b'"units": 2000000000'), "parameters, and holds"),
        ("config.json", lambda _: b"[]", "cannot be loaded"),
        ("../outside", lambda _: b"", "outside its folder"),
        ("config.json", lambda _: b" " * (2**26 + 1), "67,108,865 bytes"),
    ],
)
def test_models_that_say_more_than_they_hold(tmp_path, member, change, words):
    for_digits().save(tmp_path / "model.keras")
    changed(tmp_path / "model.keras", member, change)
    with hostile.watched(), pytest.raises(km.KerasMorphError, match=words):
        choices.load_model(str(tmp_path / "model.keras"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


def test_every_sound_model_opens(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.RandomFlip(),
            layers.Normalization(mean=[1.0, 2, 3], variance=[1.0, 1, 1]),
            layers.SeparableConv2D(4, 3),
            layers.BatchNormalization(),
            layers.Reshape((-1, 4)),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
            layers.Dense(5),
        ]
    )
    model.save(tmp_path / "model.keras")
    opened = choices.load_model(str(tmp_path / "model.keras"))
    assert [weight.shape for weight in opened.weights] == [weight.shape for weight in model.weights]


# The command line ------------------------------------------------------------------------------------------------


def raises_an_os_error():
    raise FileNotFoundError(2, "No such file or directory", "weights.h5")


def test_an_error_of_the_users_function_keeps_its_traceback():
    with pytest.raises(FileNotFoundError) as error:
        main(["inspect", "test_hostile_files:raises_an_os_error"])
    assert error.traceback[-1].name == "raises_an_os_error"
    assert "code of yours, test_hostile_files:raises_an_os_error" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(28, "No space left on device", "/x/y"), "/x/y: No space left"), (MemoryError(), "memory")],
)
def test_a_full_disk_or_memory_is_one_line(error, words, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(choices, "load_model", fail)
    assert command("inspect", MODEL) == 1
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


def with_another_alphabet():
    return for_digits(name="漢")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_terminal_that_knows_few_characters(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert command("report", *["test_hostile_files:with_another_alphabet"] * 2) == 0
    streams[0].flush()
    printed = streams[0].buffer.getvalue()
    assert b"+---" in printed
    assert b"| conv1 " in printed
    assert b"\\u25" not in printed
    assert b"\\u6f22" in printed
    assert command("inspect", "漢\udcff") == 2
    streams[1].flush()
    assert b"\\u6f22\\udcff" in streams[1].buffer.getvalue()


def test_a_name_cannot_give_the_terminal_commands(capsys):
    assert command("inspect", "\x1b[31m.keras") == 2
    line = capsys.readouterr().err
    assert "\x1b" not in line
    assert "\\x1b[31m.keras" in line


def test_files_are_read_up_to_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", 4)


def test_a_model_that_was_opened_leaves_nothing_to_be_initialized(tmp_path):
    """Keras keeps a list of variables without values, and gives them some when the next scope ends."""
    path = tmp_path / "seed.keras"
    models.build("separable").save(path)
    open_model(path)
    with keras.StatelessScope():
        pass
    doubled = keras.layers.Lambda(lambda x: 2 * x)(keras.Input((3,)))  # its shape is found out in such a scope
    assert doubled.shape == (None, 3)
