"""Exports: files that agree with the Keras model in the runtimes that serve them, and are not written where they do not."""

import os
import subprocess
import sys

import keras
import models
import numpy as np
import pytest
from keras import layers
from user_models import L1Distance

import keras_morph as km
from keras_morph import exporting, formats, quantizing, runtimes
from keras_morph.exporting import export_all
from keras_morph.formats import FORMATS, Format
from keras_morph.runtimes import RUNTIMES

NAMES = {name: f"small{row.suffix}" for name, row in FORMATS.items()}
HERE = keras.backend.backend()
# To run a SavedModel, TensorFlow has to be imported beside JAX or PyTorch: a test of its own, which is slow.
QUICK = [name for name in FORMATS if name != "saved_model" or HERE == "tensorflow"]


# Networks of tests/models.py and formats that have no counterpart of an operation of theirs.
IMPOSSIBLE = {
    ("three_dimensional", "litert"): "AvgPool3D",
    ("channels_first_u_net", "litert"): "DataFormatVecPerm",
    ("channels_first_volume", "litert"): "Transpose",
}


def mixed():
    """All that an exporter may stumble over: two inputs of two types, outputs by name, training only, a layer of one's own.

    image(3) -- norm -- noise -- flip -- grouped(6) -- bn -- separable(5) -- dropout -- mean --+-- distance -- scores(3)
                                                                                               |
    words -- embedding(5) -- mean -- gelu -----------------------------------------------------+-------------- classes(2)
    """
    image = x = keras.Input((8, 8, 3), name="image")
    x = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[0.5, 1.0, 2.0])(x)
    x = layers.RandomFlip()(layers.GaussianNoise(1.0)(x))
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, strides=2, padding="same", groups=3)(x))
    x = layers.Dropout(0.9)(layers.SeparableConv2D(5, 3, activation="relu")(x))
    x = layers.GlobalAveragePooling2D()(x)
    words = keras.Input((None,), dtype="int32", name="words")
    y = layers.Activation("gelu")(layers.GlobalAveragePooling1D()(layers.Embedding(11, 5)(words)))
    scores = layers.Dense(3, name="scores")(L1Distance()(x, y))
    outputs = {"scores": scores, "classes": layers.Dense(2, name="classes")(y)}
    return models.randomize(keras.Model({"words": words, "image": image}, outputs, name="mixed"), seed=1)


@pytest.fixture(scope="session")
def model():
    return mixed()


@pytest.fixture(scope="session")  # a module is left and entered again where workers take tests from each other
def exported(model, tmp_path_factory):
    """All formats, from whatever backend this is: one process on TensorFlow writes them from the others."""
    folder = tmp_path_factory.mktemp("exported")
    return dict(zip(QUICK, export_all(model, [folder / NAMES[name] for name in QUICK]), strict=True))


@pytest.fixture
def one_of_ours(monkeypatch):
    """Puts a format in place of ONNX that this backend writes with the function given."""

    def put(write):
        monkeypatch.setitem(FORMATS, "onnx", Format("onnxruntime", {HERE: ()}, write))

    return put


def examples(count, words=6):
    random = np.random.default_rng(count)
    image, text = random.normal(size=(count, 8, 8, 3)).astype("float32"), random.integers(0, 11, (count, words))
    return {"image": image, "words": text.astype("int32")}


@pytest.mark.parametrize("name", QUICK)
def test_a_file_computes_what_the_model_computes_for_any_batch(name, exported, model):
    session = km.open_exported(exported[name].path)
    for count in (4, 1, 2):
        given = examples(count)
        expected = models.outputs(model, given)
        received = session.run([given[each.name].astype(each.dtype) for each in session.inputs])
        assert len(received) == 2
        for ours, theirs in zip(received, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", QUICK)
def test_a_file_keeps_the_names_and_types_of_the_inputs(name, exported):
    session = km.open_exported(exported[name].path)
    found = {each.name: (each.shape, each.dtype.kind) for each in session.inputs}
    assert found == {"image": ((None, 8, 8, 3), "f"), "words": ((None, None), "i")}


@pytest.mark.parametrize("name", QUICK)
def test_what_is_returned_says_what_was_written(name, exported):
    found = exported[name]
    files = [each for each in found.path.parent.rglob("*") if each.is_file() and found.path.stem == "small"]
    own = {".xml": (".xml", ".bin"), "": (None,)}.get(found.path.suffix, (found.path.suffix,))
    inside = [each for each in files if found.path in each.parents] if found.path.is_dir() else files
    assert found.bytes == sum(each.stat().st_size for each in inside if own == (None,) or each.suffix in own)
    assert (found.format, found.backend) == (name, "tensorflow")
    assert 0 <= found.difference < 1e-5
    assert f"{found.bytes:,} bytes" in str(found)


def test_nothing_else_is_left_behind(exported):
    folder = exported["onnx"].path.parent
    assert {each.name for each in folder.iterdir()} == {*(NAMES[name] for name in QUICK), "small.bin"}


def test_the_model_is_as_it_was(exported, model):
    assert km.trace(model).num_channels == km.trace(mixed()).num_channels
    assert list(model.output) == ["scores", "classes"]


@pytest.mark.only_on("tensorflow")
def test_softplus_is_finite_in_litert_where_keras_is(tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, [layers.Activation("softplus")(x), layers.Activation("log_sigmoid")(x)])
    values = np.array([[-200.0, -1.0, 0.0], [1.0, 20.0, 200.0]], "float32")
    assert km.export(model, tmp_path / "small.tflite", check=values).difference < 1e-6


@pytest.mark.slow
@pytest.mark.only_on("jax", "torch")
def test_a_saved_model_is_written_from_every_backend(model, tmp_path):
    assert km.export(model, tmp_path / "small").difference < 1e-5


@pytest.mark.once
def test_files_are_opened_without_keras(exported):
    paths = [str(exported[name].path) for name in ("onnx", "litert", "openvino")]
    code = (
        "import sys, numpy as np; from keras_morph.runtimes import open_exported\n"
        f"for path in {paths}:\n"
        "    session = open_exported(path, threads=1)\n"
        "    session.run([np.ones([size or 2 for size in each.shape], each.dtype) for each in session.inputs])\n"
        "assert 'keras' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_pytorch_exports_where_there_is_no_tensorflow(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "PREFERENCE", ("torch",))
    plain = models.build("residual_projection")
    found = km.export(plain, tmp_path / NAMES[name])
    assert (found.backend, found.difference < 1e-5) == ("torch", True)


def in_half_precision():
    x = keras.Input((4,), name="x")
    hidden = layers.Dense(6, activation="relu", dtype="mixed_float16")(x)
    return keras.Model(x, layers.Dense(3, dtype="float32")(hidden))


@pytest.mark.only_on("tensorflow")
def test_mixed_precision_is_exported_in_float32(tmp_path):
    model, given = in_half_precision(), np.random.default_rng(0).random((3, 4), np.float32)
    assert km.export(model, tmp_path / "small.onnx").difference < 1e-6
    (expected,), (received,) = models.outputs(model, given), km.open_exported(tmp_path / "small.onnx").run([given])
    np.testing.assert_allclose(received, expected, atol=2e-3)
    assert model.layers[1].compute_dtype == "float16"


EIGHT_BITS = [name for name in FORMATS if name != "saved_model"]


def to_quantize():
    """image(3) -- conv(32) -- bn -- relu -- conv(64) -- mean -- dense(10): 20,394 parameters."""
    image = x = keras.Input((8, 8, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(32, 3)(x)))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(64, 3, activation="relu")(x))
    return models.randomize(keras.Model(image, layers.Dense(10)(x), name="to_quantize"), seed=1)


@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each == "openvino")) for each in EIGHT_BITS]
)
def test_eight_bits_are_smaller_and_close(name, tmp_path):
    model, images = to_quantize(), examples(60)["image"]
    before = km.export(model, tmp_path / "before" / NAMES[name])
    found = km.export(model, tmp_path / NAMES[name], int8=images[:40])
    assert found.precision == "int8"
    assert found.bytes < 0.6 * before.bytes  # names and shapes are most of what is left
    assert {each.name for each in tmp_path.iterdir()} == {each.name for each in before.path.parent.iterdir()} | {
        "before"
    }
    session = km.open_exported(found.path)
    assert session.inputs == km.open_exported(before.path).inputs
    (received,), (expected,) = session.run([images[40:]]), models.outputs(model, images[40:])
    off = np.sqrt(np.mean((received - expected) ** 2)) / expected.std()
    assert 1e-4 < off < 0.1  # in float32 it would be 1e-6


@pytest.mark.only_on("tensorflow")
def test_eight_bits_that_are_only_noise_are_refused(tmp_path, monkeypatch):
    """One image is a million times as bright as the others, which are rounded away."""
    images = examples(40)["image"]
    monkeypatch.setattr(exporting, "PREFERENCE", ("tensorflow",))
    images[0] *= 1e6
    with pytest.raises(km.UnsupportedModelError, match=r"in eight bits its outputs are off by .* deviation"):
        km.export(to_quantize(), tmp_path / "small.onnx", int8=images, check=examples(8)["image"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.only_on("jax", "torch")
def test_eight_bits_from_another_backend(tmp_path):
    images = examples(40)["image"]
    assert km.export(to_quantize(), tmp_path / "small.tflite", int8=images).precision == "int8"


@pytest.mark.once
def test_a_saved_model_has_no_eight_bits(tmp_path):
    with pytest.raises(km.KerasMorphError, match=r"int8: .*saved_model"):
        km.export(one(1.0), tmp_path / "small", int8=np.ones((3, 4)))


@pytest.mark.once
@pytest.mark.parametrize("argument", ["int8", "check"])
def test_examples_that_are_no_whole_numbers_are_refused_where_the_model_takes_those(argument, tmp_path):
    x = keras.Input((4,), dtype="uint8", name="x")
    model = keras.Model(x, layers.Dense(3)(layers.Rescaling(1 / 255)(x)), name="of_bytes")
    fractions = np.random.default_rng(0).random((3, 4))
    with pytest.raises(
        km.KerasMorphError, match=rf"{argument}: expected whole numbers, as of_bytes takes uint8.*float64"
    ):
        km.export(model, tmp_path / "small.tflite", **{argument: fractions})
    with pytest.raises(km.KerasMorphError, match="from -20 to -10"):
        km.export(model, tmp_path / "small.tflite", **{argument: np.linspace([-20] * 4, [-10] * 4, 2)})


@pytest.mark.once
def test_a_missing_quantizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "find_spec", lambda _: None)
    with pytest.raises(km.KerasMorphError, match=r"'keras-morph\[int8\]'"):
        km.export(one(1.0), tmp_path / "small.xml", int8=np.ones((3, 4)))


def recurrent(steps):
    x = keras.Input((steps, 5), name="x")
    return keras.Model(x, layers.LSTM(3)(layers.Bidirectional(layers.GRU(2, return_sequences=True))(x)))


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize("name", FORMATS)
def test_recurrent_layers_of_a_fixed_number_of_steps(name, tmp_path):
    model = recurrent(7)
    assert km.export(model, tmp_path / NAMES[name]).difference < 1e-5
    assert not any(part.unroll for part in model._flatten_layers() if hasattr(part, "unroll"))


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
def test_recurrent_layers_of_any_number_of_steps_need_onnx(tmp_path):
    assert km.export(recurrent(None), tmp_path / "small.onnx").difference < 1e-5
    with pytest.raises(km.UnsupportedModelError, match="unroll"):
        km.export(recurrent(None), tmp_path / "small.tflite")


# What is wrong is refused.


def one(number):
    x = keras.Input((4,), name="x")
    return keras.Model(x, keras.ops.minimum(layers.Dense(4, kernel_initializer="identity", name="dense")(x), number))


@pytest.fixture
def wrong(one_of_ours):
    """An exporter that writes a network that cuts off at 1, where the model does at 5."""
    write = FORMATS["onnx"].write
    one_of_ours(lambda _, path, calibration: write(one(1.0), path, calibration))


@pytest.mark.only_on("tensorflow")
def test_an_export_that_differs_is_not_written_and_the_old_file_stays(wrong, tmp_path):
    path = tmp_path / "small.onnx"
    path.write_text("the old one")
    assert km.export(one(1.0), tmp_path / "right.onnx").difference == 0
    with pytest.raises(
        km.UnsupportedModelError, match=r"cannot be exported to onnx.*differ by \d\.\de-01.*not written"
    ):
        km.export(one(0.5), path)
    assert path.read_text() == "the old one"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["right.onnx", "small.onnx"]


@pytest.mark.only_on("tensorflow")
def test_examples_of_the_users_own_are_compared_too(wrong, tmp_path):
    """Random numbers from 0 to 1 do not tell the two apart."""
    km.export(one(5.0), tmp_path / "small.onnx")
    with pytest.raises(km.UnsupportedModelError, match="differ by"):
        km.export(one(5.0), tmp_path / "other.onnx", check=np.full((40, 4), 3.0))
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.once
def test_what_an_exporter_raises_is_the_reason(one_of_ours, tmp_path):
    def fails(model, path, calibration):
        raise RuntimeError("no rule for\nthat")

    one_of_ours(fails)
    with pytest.raises(km.UnsupportedModelError, match=r"by tensorflow: no rule for\. "):
        km.export(one(1.0), tmp_path / "new" / "small.onnx")


@pytest.mark.once
def test_a_process_says_why_it_failed(tmp_path):
    (found,) = formats.write_elsewhere([one(1.0)], [{"onnx": tmp_path / "small.onnx"}], "no_such_backend")
    assert "no_such_backend" in found["onnx"]


@pytest.mark.once
def test_layers_of_the_script_itself_need_a_module(tmp_path, monkeypatch):
    monkeypatch.setattr(L1Distance, "__module__", "__main__")
    (found,) = formats.write_elsewhere([mixed()], [{"litert": tmp_path / "small.tflite"}], "tensorflow")
    assert "move it to a module" in found["litert"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("small.h5", {}, r"\.onnx \(onnx\), \.tflite \(litert\), \.xml \(openvino\), or no suffix.*small\.h5"),
        ("small.onnx", {"format": "onyx"}, "expected onnx, litert, openvino, saved_model. Received: 'onyx'"),
        ("small.onnx", {"format": "litert"}, r"litert expects a name that ends in \.tflite"),
        ("small.onnx", {"format": "saved_model"}, "the name of a folder"),
        ("small.onnx", {"check": np.ones((3, 5))}, r"check: .*\(None, 4\).*\(3, 5\)"),
        ("small.onnx", {"int8": np.ones((3, 5))}, r"int8: .*\(None, 4\).*\(3, 5\)"),
        ("small.onnx", {"check": np.ones((0, 4))}, r"check: .*\(None, 4\).*\(0, 4\)"),
        ("small.onnx", {"check": [np.ones((3, 4))] * 2}, r"check: .*\(None, 4\).*\(3, 4\), \(3, 4\)"),
    ],
)
def test_a_mistake_is_one_clear_line(path, options, message, tmp_path):
    with pytest.raises(km.KerasMorphError, match=message) as caught:
        km.export(one(1.0), tmp_path / path, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_folder_that_is_no_saved_model_is_left_alone(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.png").write_text("precious")
    with pytest.raises(km.KerasMorphError, match="something else"):
        km.export(one(1.0), tmp_path / "holiday")
    assert [each.name for each in tmp_path.rglob("*")] == ["holiday", "photo.png"]


@pytest.mark.once
def test_a_folder_in_place_of_a_file_is_left_alone(tmp_path):
    (tmp_path / "small.onnx").mkdir()
    (tmp_path / "saved").mkdir()
    for name in ("saved_model.pb", "notes.txt"):
        (tmp_path / "saved" / name).write_text("mine")
    with pytest.raises(km.KerasMorphError, match=r"nothing else in it\. .*notes\.txt"):
        km.export(one(1.0), tmp_path / "saved")
    with pytest.raises(km.KerasMorphError, match="the name of a folder"):
        km.export(one(1.0), tmp_path / "net.onnx", format="saved_model")
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(km.KerasMorphError, match=r"weights of .*data\.xml go to .*data\.bin"):
        km.export(one(1.0), tmp_path / "data.xml")
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    with pytest.raises(km.KerasMorphError, match="which is a folder"):
        km.export(one(1.0), tmp_path / "small.onnx")


@pytest.mark.once
@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(
        km.KerasMorphError, match=rf"pip install 'keras-morph\[{RUNTIMES[FORMATS[name].runtime].extra}\]'"
    ):
        km.export(one(1.0), tmp_path / NAMES[name])


@pytest.mark.once
def test_a_format_that_no_installed_backend_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: module != "tensorflow" or None)
    with pytest.raises(km.KerasMorphError, match=r"litert needs tensorflow.*'keras-morph\[litert,tensorflow\]'"):
        km.export(one(1.0), tmp_path / "small.tflite")


@pytest.mark.once
def test_text_cannot_be_exported(tmp_path):
    text = keras.Input((), dtype="string", name="text")
    model = keras.Model(text, layers.Hashing(5)(text))
    with pytest.raises(km.UnsupportedModelError, match=r"numbers\. Received: text"):
        km.export(model, tmp_path / "small.onnx")


@pytest.mark.once
@pytest.mark.parametrize(
    ("file", "message"), [("none.onnx", "does not exist"), ("damaged.onnx", "cannot be opened"), ("a.txt", "ends in")]
)
def test_files_that_no_runtime_opens(file, message, tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(b"nothing")
    with pytest.raises(km.KerasMorphError, match=message):
        km.open_exported(tmp_path / file)


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize("name", models.BUILDERS)
def test_every_tiny_network_is_exported_to_every_format(name, tmp_path):
    files = [tmp_path / file for each, file in NAMES.items() if (name, each) not in IMPOSSIBLE]
    for found in export_all(models.build(name), files):
        assert found.difference < 1e-4


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize(("name", "format"), IMPOSSIBLE)
def test_what_cannot_be_exported_is_still_impossible(name, format, tmp_path):
    with pytest.raises(km.UnsupportedModelError, match=IMPOSSIBLE[name, format]):
        km.export(models.build(name), tmp_path / NAMES[format])
