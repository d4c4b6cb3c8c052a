"""Several devices: which are chosen, what a batch has to look like, and that two virtual ones compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_morph import datasets, devices, zoo
from keras_morph.cli import main
from keras_morph.errors import KerasMorphError

SCRIPT = Path(__file__).parent / "two_devices.py"


def run(*arguments):
    """Run two_devices.py with this backend on two virtual CPU devices."""
    environment = os.environ | {
        "KERAS_BACKEND": keras.backend.backend(),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",  # compiles faster
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def comparison(network, tmp_path):
    finished = run(network, tmp_path)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def assert_same(found):
    """Weights, penalties, losses and probabilities after 3 single steps and 2 epochs."""
    assert found["replicas"] == [1, 2]
    assert found["weights"] < 1e-6
    assert found["probabilities"] < 1e-6
    # The penalty falls by 5e-5 a step: counted once per replica, it would fall twice as fast.
    np.testing.assert_allclose(*found["penalties"], rtol=1e-6)
    assert found["penalties"][0][0] - found["penalties"][0][2] > 5e-5
    np.testing.assert_allclose(*found["loss"], rtol=1e-6)
    for same in ("accuracy", "cost", "widths"):
        assert found[same][0] == found[same][1]


@pytest.mark.only_on("jax")
def test_two_devices_on_jax(tmp_path):
    assert_same(comparison("normalized", tmp_path))


@pytest.mark.only_on("tensorflow")
@pytest.mark.parametrize("network", [pytest.param("plain", marks=pytest.mark.slow), "synchronized"])
def test_two_replicas_on_tensorflow(network, tmp_path):
    assert_same(comparison(network, tmp_path))


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
def test_replicas_have_their_own_batch_statistics_on_tensorflow(tmp_path):
    found = comparison("normalized", tmp_path)
    assert 1e-5 < found["weights"] < 0.1
    # The penalty does not depend on them, but by way of the weights.
    np.testing.assert_allclose(*found["penalties"], rtol=1e-4)


@pytest.mark.only_on("jax", "tensorflow")
@(pytest.mark.slow if keras.backend.backend() == "tensorflow" else lambda test: test)  # where it takes 10 s
def test_the_command_on_two_devices(tmp_path):
    """234 images: 211 to train on, the last batch of which has 19, and 23 for validation."""
    options = ["--base-model-name", "two_devices:tiny", "--dataset", "digits", "--limit", "234", "--batch-size", "32"]
    options += ["--num-epochs", "1", "--num-cuda-device", "2", "--log-dir", tmp_path]
    finished = run("train", *options)
    assert finished.returncode == 0, finished.stderr
    assert "training data-parallel on 2 devices: cpu:0, cpu:1" in finished.stdout
    assert "the last batch is dropped: 2 devices cannot share 19 images" in finished.stdout
    assert "validation is padded with images of weight 0 to a multiple of 2 devices" in finished.stdout
    (folder,) = tmp_path.iterdir()
    steps = {path.name for path in folder.glob("learned_structure/*")}
    assert steps == {"alive_0", "alive_6"}
    assert (folder / "small.keras").exists()


@pytest.mark.only_on("jax")
def test_evaluation_on_a_device_of_its_own(tmp_path):
    finished = run("elsewhere", tmp_path)
    assert finished.returncode == 0, finished.stderr
    for here, there in json.loads(finished.stdout.splitlines()[-1]):
        assert here[0] == there[0]
        np.testing.assert_allclose(here[1], there[1], rtol=1e-5)


@pytest.mark.only_on("jax")
def test_the_command_evaluates_on_a_device_of_its_own(tmp_path):
    options = ["--base-model-name", "two_devices:tiny", "--dataset", "digits", "--limit", "300", "--num-epochs", "1"]
    options += ["--num-cuda-device", "1", "--main-eval-device", "/cpu:1", "--log-dir", tmp_path]
    finished = run("train", *options)
    assert finished.returncode == 0, finished.stderr
    (folder,) = tmp_path.iterdir()
    header, row = (line.split(",") for line in (folder / "history.csv").read_text().splitlines())
    images = datasets.load("digits", limit=300)
    predictions = keras.models.load_model(folder / "seed.keras").predict(images.x_val, verbose=0)
    np.testing.assert_allclose(
        float(row[header.index("val_accuracy")]), np.mean(predictions.argmax(axis=1) == images.y_val), rtol=1e-6
    )


@pytest.mark.only_on("torch")
def test_pytorch_has_no_engine(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--num-cuda-device", "2", "--log-dir", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no engine for several devices on PyTorch" in error


# On a machine of several accelerators, whatever this one has -------------------------------------------------------


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: ("gpu:0", "gpu:1", "gpu:2", "gpu:3"))


@pytest.mark.only_on("tensorflow", "jax")
def test_choosing(four):
    assert devices.choose().names == ("gpu:0", "gpu:1", "gpu:2", "gpu:3")
    assert devices.choose(2).names == ("gpu:0", "gpu:1")
    assert devices.choose(2, first="/gpu:2").names == ("gpu:2", "gpu:0")
    assert devices.choose(1, first="/gpu:2").names == ("gpu:2",)
    assert devices.choose(2, first="/cpu:0").names == ("gpu:0", "gpu:1")


def test_one_device_or_the_cpu(four):
    assert devices.choose(1).names == ()  # the backend's own choice
    assert str(devices.choose(1)) == "on gpu:0"
    assert "gpu:0" in devices.choose(1)
    assert devices.choose(0).names == ("cpu:0",)
    assert devices.choose(0).count == devices.choose(1).count == 1


def test_a_machine_without_accelerators(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: ())
    assert devices.choose() == devices.choose(0) == devices.Devices(())
    assert str(devices.choose()) == "on cpu:0"
    with pytest.raises(KerasMorphError, match=r"at most the 0 that are visible \(no GPU\), received 1"):
        devices.choose(1)
    with devices.choose().scope():
        assert keras.layers.Dense(1)(np.ones((1, 1))).shape == (1, 1)


@pytest.mark.parametrize("name", ["/gpu:1", "gpu:1", "GPU:1", "/device:GPU:1", "cuda:1"])
def test_names_of_a_device(name, four):
    assert devices.existing(name) == "gpu:1"
    assert devices.existing("cpu") == "cpu:0"
    with pytest.raises(KerasMorphError, match="expected one of gpu:0, gpu:1, gpu:2, gpu:3, cpu:0, received 'gpu:4'"):
        devices.existing("gpu:4")


def test_more_devices_than_there_are(four):
    with pytest.raises(KerasMorphError):
        devices.choose(5)
    with pytest.raises(KerasMorphError, match="received -1"):
        devices.choose(-1)


def test_batches_that_cannot_be_shared():
    three = devices.Devices(("gpu:0", "gpu:1", "gpu:2"))
    three.check_batch_size(33)
    for size, advice in ((32, 30), (2, 3)):
        with pytest.raises(KerasMorphError, match=f"a multiple of 3 devices, received {size}; take {advice}"):
            three.check_batch_size(size)


@pytest.mark.parametrize(
    ("examples", "batch_size", "count", "whole"),
    [(100, 32, 1, 100), (100, 32, 2, 100), (101, 32, 2, 96), (96, 32, 2, 96), (6, 32, 2, 6), (101, 20, 4, 100)],
)
def test_the_last_batch(examples, batch_size, count, whole):
    np.testing.assert_equal(devices.whole_batches(examples, batch_size, count), whole)


def test_a_last_batch_that_is_the_only_one():
    with pytest.raises(KerasMorphError, match="Received: 32"):
        devices.whole_batches(7, 32, 2)


def test_padding_has_no_weight():
    x, y = np.ones((5, 2, 2, 1), np.float32), np.arange(5)
    padded_x, padded_y, weights = devices.padded(x, y, 4)
    assert padded_x.shape == (8, 2, 2, 1)
    np.testing.assert_array_equal(padded_x[:5], x)
    np.testing.assert_array_equal(padded_y, [0, 1, 2, 3, 4, 0, 0, 0])
    np.testing.assert_array_equal(weights, [1, 1, 1, 1, 1, 0, 0, 0])
    assert len(devices.padded(x, y, 1)[0]) == 5


@pytest.mark.parametrize(("there", "policy"), [((), "mixed_bfloat16"), (("gpu:0",), "mixed_float16")])
def test_mixed_precision(there, policy, monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: there)
    before = keras.config.dtype_policy().name
    with devices.mixed_precision():
        model = zoo.digits_resnet()
    assert model.get_layer("stem_conv").dtype_policy.name == policy
    assert model.get_layer("logits").dtype_policy.name == "float32"
    with devices.mixed_precision(on=False):
        assert keras.config.dtype_policy().name == before
    with pytest.raises(ZeroDivisionError), devices.mixed_precision():
        raise ZeroDivisionError
    assert keras.config.dtype_policy().name == before
