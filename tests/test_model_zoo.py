"""What the document of the Model Zoo promises: its class, its command, its files, its networks."""

import csv
import importlib.util
import inspect
import json
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
from exactness import assert_equal_outputs
from keras import layers

import keras_morph as km
from keras_morph.cli import main, training
from keras_morph.cli.train import Train
from keras_morph.zoo import MorphNetModel

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
REFERENCE = json.loads((GOLDEN / "morphnet_reference.json").read_text())
QUICK = ("ResNet50", "VGG16", "MobileNetV2")  # of the networks of the reference, one of each kind


def large(*values):
    """A case of a network that takes seconds to build."""
    return pytest.param(*values, marks=pytest.mark.slow)


PAIRS = [
    (name, algorithm) if name in QUICK else large(name, algorithm)
    for name, found in REFERENCE.items()
    for algorithm in found
    if algorithm != "input_shape"
]


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What the original computes ---------------------------------------------------------------------------------------


def seed_weights(model):
    """The weight state in which the original was measured: normal kernels of which 30 % of the channels are zero."""
    original_names = {"head": "dense", "logits": "dense_1"}
    for layer in model.layers:
        for number, weight in enumerate(layer.weights):
            name = original_names.get(layer.name, layer.name)
            random = np.random.default_rng(zlib.crc32(f"{name}/{number}".encode()))
            weight.assign(seeded_value(weight.name, tuple(weight.shape), random).astype(np.float32))


def seeded_value(name, shape, random):
    if name in ("kernel", "pointwise_kernel"):
        return random.normal(size=shape) * 0.05 * random.choice([0.0, 1.0], size=shape[-1], p=[0.3, 0.7])
    if name == "depthwise_kernel":
        return random.normal(size=shape) * 0.05 * random.choice([0.0, 1.0], size=(shape[2], 1), p=[0.3, 0.7])
    if name == "gamma":
        value = random.uniform(0, 1, size=shape)
        return np.where(value < 0.3, 0.001, value)
    return {
        "beta": lambda: random.normal(size=shape) * 0.1,
        "moving_mean": lambda: random.normal(size=shape) * 0.1,
        "moving_variance": lambda: random.uniform(0.5, 1.5, size=shape),
        "bias": lambda: random.normal(size=shape) * 0.01,
    }[name]()


def norms(layer):
    """Root mean square of each output channel's kernel."""
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    return np.sqrt((kernel**2).mean(axis=tuple(range(kernel.ndim - 1))))


@pytest.fixture(scope="module")
def seeded():
    """Builds each network once, in the seeded state."""
    built = {}

    def build(name):
        if name not in built:
            built.clear()
            size = km.zoo.minimum_size(name)
            built[name] = km.zoo.build(name, input_shape=(size, size, 3))
            seed_weights(built[name])
        return built[name]

    return build


@pytest.mark.once
@pytest.mark.parametrize(("name", "algorithm"), PAIRS)
def test_costs_and_alive_counts_are_the_originals(name, algorithm, seeded):
    model, expected = seeded(name), REFERENCE[name][algorithm]
    assert model.input_shape[1:] == tuple(REFERENCE[name]["input_shape"])
    flops = km.FLOPs()
    np.testing.assert_equal(flops(model), expected["initial_flops"])
    structure = km.StructureLearner(model, regularizer=getattr(km, algorithm)()).structure()
    assert {key.rpartition("/")[0]: count for key, count in structure.counts().items()} == expected[
        "seeded_alive_counts"
    ]
    # The original prunes the logits too; ours are pinned, and come back in its figure.
    logits = np.sum(norms(model.get_layer("logits")) > 1e-2) if algorithm == "GroupLasso" else 10
    dead = (10 - logits) * 2 * structure.widths["head"]
    np.testing.assert_equal(flops(model, structure) - dead, expected["seeded_flops"])


def conv(pixels, size, n_in, n_out):
    return 2 * pixels**2 * size**2 * n_in * n_out


def head(width):
    return 2 * (width * 1024 + 1024 * 10)


def resnet(blocks, version):
    """FLOPs at 32x32: 16 pixels after the stem, 8 after pooling; halved by the first (v1) or last (v2) block of a stage."""
    total, pixels, n_in = conv(16, 7, 3, 64), 8, 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            halves = (stage > 0 and block == 0) if version == 1 else (stage < 3 and block == count - 1)
            before, pixels = pixels, pixels // 2 if halves else pixels
            total += conv(pixels if version == 1 else before, 1, n_in, width)
            total += conv(pixels, 3, width, width) + conv(pixels, 1, width, 4 * width)
            total += conv(pixels, 1, n_in, 4 * width) if block == 0 else 0
            n_in = 4 * width
    return total + head(2048)


def vgg(blocks):
    total, pixels, n_in = 0, 32, 3
    for width, count in zip((64, 128, 256, 512, 512), blocks, strict=True):
        for _ in range(count):
            total += conv(pixels, 3, n_in, width)
            n_in = width
        pixels //= 2
    return total + head(512)


def densenet(blocks):
    total, pixels, width = conv(16, 7, 3, 64), 8, 64
    for number, count in enumerate(blocks):
        for _ in range(count):
            total += conv(pixels, 1, width, 128) + conv(pixels, 3, 128, 32)
            width += 32
        if number < 3:
            total += conv(pixels, 1, width, width // 2)
            pixels, width = pixels // 2, width // 2
    return total + head(width)


def mobilenet():
    total, pixels, width = conv(16, 3, 3, 32), 16, 32
    for next_width, strides in zip(
        (64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024), (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), strict=True
    ):
        pixels //= strides
        total += conv(pixels, 3, 1, width) + conv(pixels, 1, width, next_width)
        width = next_width
    return total + head(1024)


BY_HAND = {
    "ResNet50": resnet((3, 4, 6, 3), 1),
    "ResNet101": resnet((3, 4, 23, 3), 1),
    "ResNet152": resnet((3, 8, 36, 3), 1),
    "ResNet50V2": resnet((3, 4, 6, 3), 2),
    "ResNet101V2": resnet((3, 4, 23, 3), 2),
    "ResNet152V2": resnet((3, 8, 36, 3), 2),
    "VGG16": vgg((2, 2, 3, 3, 3)),
    "VGG19": vgg((2, 2, 4, 4, 4)),
    "MobileNet": mobilenet(),
    "DenseNet121": densenet((6, 12, 24, 16)),
    "DenseNet169": densenet((6, 12, 32, 32)),
    "DenseNet201": densenet((6, 12, 48, 32)),
}


@pytest.mark.once
def test_the_formulas_of_this_file_give_the_originals_figures():
    for name in set(BY_HAND) & set(REFERENCE):
        np.testing.assert_equal(BY_HAND[name], REFERENCE[name]["GroupLasso"]["initial_flops"])


@pytest.mark.once
@pytest.mark.parametrize("name", [large("ResNet101"), large("ResNet50V2"), "VGG19", "MobileNet", large("DenseNet169")])
def test_flops_of_further_networks_by_hand(name, seeded):
    np.testing.assert_equal(km.FLOPs()(seeded(name)), BY_HAND[name])


@pytest.mark.once
@pytest.mark.parametrize("name", ["MobileNetV2", large("InceptionResNetV2"), large("NASNetMobile")])
def test_flops_of_networks_that_are_too_long_to_write_down(name, seeded):
    """From the shapes of the kernels and outputs alone."""
    total = 0
    for layer in seeded(name).layers:
        kernels = [weight.shape for weight in layer.weights if weight.name.endswith("kernel")]
        positions = np.prod(layer.output.shape[1:-1], dtype=int) if kernels else 0
        total += 2 * sum(int(positions * np.prod(shape)) for shape in kernels)
    np.testing.assert_equal(km.FLOPs()(seeded(name)), total)


@pytest.mark.once
@pytest.mark.parametrize("name", [large("ResNet101"), "VGG19", "MobileNet"])
def test_alive_counts_of_further_networks_by_hand(name, seeded):
    model = seeded(name)
    scores = {layer.name: norms(layer) for layer in model.layers if type(layer) in (layers.Conv2D, layers.Dense)}
    alive = {layer: score > 1e-2 for layer, score in scores.items()}
    if name == "ResNet101":  # the trunk of a stage: its projection and the last convolution of each block
        for stage in (2, 3, 4, 5):
            trunk = [key for key in alive if key.startswith(f"conv{stage}_") and key[-6:] in ("0_conv", "3_conv")]
            alive |= dict.fromkeys(trunk, np.any([alive[key] for key in trunk], axis=0))
    structure = km.StructureLearner(model).structure()
    for layer, channels in alive.items():
        if layer != "logits":
            np.testing.assert_array_equal(structure.alive[layer], np.flatnonzero(channels))


# The support table ------------------------------------------------------------------------------------------------

support = imported(ROOT / "benchmarks" / "model_zoo_support.py")


@pytest.mark.once
def test_the_support_table_has_every_network_and_nothing_fails():
    rows = support.rows()
    combinations = {(row["network"], row["algorithm"], row["cost"]) for row in rows}
    assert combinations == {(n, a, c) for n in km.zoo.NAMES for a in support.ALGORITHMS for c in support.COSTS}
    assert len(rows) == len(combinations) == 18 * 2 * 5
    for row in rows:
        without = row["algorithm"] == "Gamma" and row["network"] in km.zoo.WITHOUT_GAMMA
        assert row["result"] == ("no gamma" if without else "works")
        if row["network"] in BY_HAND:
            np.testing.assert_equal(int(row["flops"]), BY_HAND[row["network"]])
    assert support.TABLE.read_text() == support.table(rows)


@pytest.mark.once
def test_the_table_in_the_readme_is_that_of_the_results():
    readme, rows = support.README.read_text(), support.rows()
    assert support.summary(rows) in readme
    assert readme == support.with_summary(readme, rows)
    # By hand: networks of one result share a line, and what differs is told apart.
    failed = [row | {"result": "FAILS"} if (row["network"], row["cost"]) == ("VGG16", "FLOPs") else row for row in rows]
    lines = support.summary(failed).splitlines()[2:]
    assert len(lines) == 3
    assert (
        "| VGG16 | FLOPs ✗, Latency V100 ✓, Latency P100 ✓, Latency Others ✓, ModelSize ✓ | FLOPs ✗, Latency"
        in lines[1]
    )
    assert lines[2] == "| VGG19, InceptionV3, InceptionResNetV2 | ✓ | no gamma |"
    assert support.with_summary(readme, failed) != readme


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("MobileNet", [("Gamma", "Latency Others")]),
        ("VGG16", [("GroupLasso", "ModelSize"), ("Gamma", "FLOPs")]),
        large("MobileNet", [("GroupLasso", "Latency P100"), ("Gamma", "ModelSize")]),
        large("InceptionV3", [("GroupLasso", "FLOPs"), ("Gamma", "FLOPs")]),
        large("NASNetMobile", [("Gamma", "Latency V100")]),
    ],
)
def test_networks_of_the_support_table(name, pairs):
    seed, x, y = support.prepared(name)
    for algorithm, cost in pairs:
        found = support.check(seed, algorithm, support.COSTS[cost], x, y)
        assert found["result"] == ("no gamma" if algorithm == "Gamma" and name in km.zoo.WITHOUT_GAMMA else "works"), (
            found
        )


# The document's example -------------------------------------------------------------------------------------------


@pytest.mark.once
def test_the_structure_of_the_document_rebuilds():
    """10 of 16 blocks have dead inner layers, one of them with a projection."""
    counts = json.loads((GOLDEN / "resnet50_alive_after.json").read_text())
    assert sum(counts[f"{name}_1_conv/Conv2D"] == 0 for name in {key[:12] for key in counts if "block" in key}) == 10
    seed = km.zoo.build("ResNet50")
    assert km.StructureLearner(seed).structure().counts() == json.loads(
        (GOLDEN / "resnet50_alive_before.json").read_text()
    )
    fresh = km.rebuild(seed, GOLDEN / "resnet50_alive_after.json", weights=False)
    widths = {layer.name: layer.filters for layer in fresh.layers if isinstance(layer, layers.Conv2D)}
    for key, count in counts.items():
        assert widths.get(key.partition("/")[0], 0) in (count, 0)
    assert len(widths) == sum(count > 0 for count in counts.values()) - 10  # a dead block's last convolution goes too
    # With weights, the first channels of each layer are carried: what the masked seed computes.
    small = km.rebuild(seed, GOLDEN / "resnet50_alive_after.json")
    assert small.count_params() == fresh.count_params() < seed.count_params() / 9
    masked = km.masked(seed, GOLDEN / "resnet50_alive_after.json")
    x = np.random.default_rng(0).random((16, 32, 32, 3), np.float32)
    assert_equal_outputs(*([keras.ops.convert_to_numpy(each(x, training=False))] for each in (small, masked)), 1e-4)


@pytest.mark.once
@pytest.mark.slow
def test_the_structure_of_the_document_trains():
    fresh = km.rebuild(km.zoo.build("ResNet50"), GOLDEN / "resnet50_alive_after.json", weights=False)
    fresh.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", jit_compile=False)
    random = np.random.default_rng(0)
    x, y = random.random((16, 32, 32, 3), np.float32), random.integers(0, 10, 16)
    losses = fresh.fit(x, y, epochs=4, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# The class --------------------------------------------------------------------------------------------------------


def tiny(input_shape, include_top=True, weights="imagenet", **_):
    """image -- conv1(6) -- bn -- relu -- conv2(4), like a function of keras.applications."""
    assert not include_top
    assert weights is None
    image = keras.Input(input_shape)
    x = layers.Conv2D(6, 3, padding="same", name="conv1")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    return keras.Model(image, layers.Conv2D(4, 3, name="conv2")(x))


def make(tmp_path, **options):
    options = {"input_shape": (6, 6, 2), "batch_size": 8, "log_dir": tmp_path, **options}
    return MorphNetModel(options.pop("base_model", tiny), options.pop("num_classes", 3), **options)


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return random.random((8, 6, 6, 2), np.float32), random.integers(0, 3, 8)


def test_the_methods_of_the_class(tmp_path, batch):
    x, y = batch
    model = make(tmp_path, learning_rate=0.01, morphnet_regularization_strength=0.0)
    cost = model.get_model_cost(x)
    assert cost == km.FLOPs()(model.learner.seed, model.learner.structure())
    plain = [model.train(x, y) for _ in range(5)]
    np.testing.assert_allclose(plain[0][2], cost)
    assert all(isinstance(number, float) for number in plain[0])
    assert plain[-1][0] < plain[0][0]
    assert model.step == 5
    model.set_morphnet_regularization_strength(1 / cost)
    assert model.train(x, y)[0] > plain[-1][0]
    probabilities = model.test(x)
    assert probabilities.shape == (8, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    accuracy, validated_cost = model.validate(x, y)
    np.testing.assert_allclose(accuracy, np.mean(probabilities.argmax(axis=1) == y))
    assert validated_cost == model.get_model_cost(x)
    path = model.export_model_config_with_inputs(x)
    assert path == model.folder / "learned_structure" / "alive_6"
    assert json.loads(path.read_text()) == {"conv1/Conv2D": 6, "conv2/Conv2D": 4}
    model.close()
    assert list(model.folder.glob("events.out.tfevents.*"))
    assert model.folder.parent == tmp_path


@pytest.mark.once
def test_the_arguments_of_the_document(tmp_path):
    model = MorphNetModel(
        base_model=keras.applications.MobileNetV2,
        num_classes=4,
        learning_rate=1e-3,
        batch_size=2,
        num_gpus=0,
        main_train_device="/cpu:0",
        main_eval_device="/cpu:0",
        morphnet_regularizer_algorithm="Gamma",
        morphnet_target_cost="Latency",
        morphnet_hardware="P100",
        morphnet_regularizer_threshold=0.5,
        morphnet_regularization_strength=1e-9,
        log_dir=tmp_path,
    )
    learner = model.learner
    assert [layer.name for layer in learner.seed.layers][-3:] == ["global_average_pooling", "head", "logits"]
    assert learner.seed.output_shape == (None, 4)
    assert repr(learner.regularizer) == "Gamma(threshold=0.5)"
    assert repr(learner.target_cost) == "Latency('P100')"
    np.testing.assert_allclose(learner.strength, 1e-9, rtol=1e-6)
    assert model.get_model_cost(np.zeros((2, 32, 32, 3))) == km.Latency("P100")(learner.seed)


def test_validation_uses_the_moving_averages(tmp_path, batch):
    x, y = batch
    model = make(tmp_path)
    for layer in model.learner.seed.layers:
        if layer.name == "bn":
            layer.moving_mean.assign(np.full(6, 0.3))
    expected = keras.ops.convert_to_numpy(model.learner.seed(x, training=False))
    np.testing.assert_allclose(model.test(x), expected, rtol=1e-5, atol=1e-6)
    before = model.learner.seed.get_weights()
    model.validate(x, y)
    for one, other in zip(before, model.learner.seed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("uncompiled")
def test_one_hot_labels_are_taken_too(tmp_path, batch):
    x, y = batch
    results = []
    for labels in (y, np.eye(3)[y]):
        keras.utils.set_random_seed(1)
        results.append(make(tmp_path).train(x, labels))
    assert results[0] == results[1]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.only_on("tensorflow")
def test_the_learner_takes_tf_data(tmp_path, batch):
    import tensorflow as tf

    model = make(tmp_path)
    images = tf.data.Dataset.from_tensor_slices(batch).batch(4)
    with model.devices.scope():
        history = model.learner.fit(images, epochs=2, validation_data=images, verbose=0).history
    assert model.step == 4
    assert history["loss"][1] < history["loss"][0]
    assert set(history) == {
        "loss",
        "accuracy",
        "penalty",
        "cost",
        "val_loss",
        "val_accuracy",
        "val_penalty",
        "val_cost",
    }


def test_arguments_of_the_regularizer(tmp_path):
    model = make(tmp_path, morphnet_regularizer_kwargs={"l1_fraction": 0.5})
    assert model.learner.regularizer.l1_fraction == 0.5
    with pytest.raises(km.KerasMorphError, match="no option 'fraction'"):
        make(tmp_path, morphnet_regularizer_kwargs={"fraction": 0.5})
    own = make(tmp_path, morphnet_regularizer_algorithm=km.Gamma(0.2), morphnet_target_cost=km.Activations())
    assert repr(own.learner.regularizer) == "Gamma(threshold=0.2)"


def no_gamma(input_shape):
    return keras.Sequential([keras.Input(input_shape), layers.Conv2D(4, 3, name="only_conv")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"morphnet_regularizer_algorithm": "Lasso"}, ["morphnet_regularizer_algorithm", "GroupLasso, Gamma", "Lasso"]),
        ({"morphnet_target_cost": "Time"}, ["morphnet_target_cost", "FLOPs", "Time"]),
        ({"morphnet_target_cost": "Latency", "morphnet_hardware": "Others"}, ["Others", "V100", "peak_flops"]),
        ({"morphnet_regularization_strength": -1.0}, ["strength", "-1"]),
        ({"morphnet_regularizer_threshold": -1.0}, ["threshold", "-1"]),
        ({"num_classes": 0}, ["classes", "0"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"num_gpus": -1}, ["number of devices", "-1"]),
        ({"main_train_device": "/gpu:7"}, ["/gpu:7"]),
        ({"main_eval_device": "moon"}, ["moon"]),
        ({"base_model": "ResNet5"}, ["ResNet50"]),
        ({"base_model": keras.applications.InceptionV3}, ["75x75", "(6, 6, 2)"]),
        ({"base_model": km.zoo.digits_resnet}, ["feature maps", "(None, 10)"]),
        ({"base_model": lambda: 3}, ["feature maps", "int"]),
        ({"base_model": no_gamma, "morphnet_regularizer_algorithm": "Gamma"}, ["only_conv", "GroupLasso"]),
    ],
)
def test_complaints(tmp_path, options, words):
    with pytest.raises(km.KerasMorphError) as caught:
        make(tmp_path / "logs", **options)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "logs").exists()


def test_complaints_about_batches(tmp_path, batch):
    x, y = batch
    model = make(tmp_path)
    for inputs, labels, word in (
        (x[:, :5], y, "(8, 5, 6, 2)"),
        (x, y[:3], "(3,)"),
        (x, y + 1, "1 to 3"),
        (x[:0], y[:0], "(0, 6, 6, 2)"),
    ):
        with pytest.raises(km.KerasMorphError, match=r"Expected .* Received: ") as caught:
            model.train(inputs, labels)
        assert word in str(caught.value)


@pytest.mark.once
def test_the_example_runs(tmp_path, capsys):
    model, small = imported(ROOT / "examples" / "custom_model.py").main(tmp_path, epochs=1)
    assert small.count_params() <= model.learner.seed.count_params()
    assert "val_accuracy" in capsys.readouterr().out
    names = {path.name for path in model.folder.glob("learned_structure/*")}
    assert names == {"alive_0", "alive_40"}


# The command ------------------------------------------------------------------------------------------------------

DIGITS = ["--base-model-name", "two_devices:tiny", "--dataset", "digits", "--limit", "200", "--batch-size", "32"]


def command(*arguments):
    """Exit code of `python main.py ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, arguments)])
    return caught.value.code


def only_run(log_dir):
    (folder,) = log_dir.iterdir()
    return folder


def test_the_files_of_a_run(tmp_path, capsys):
    assert command(*DIGITS, "--num-epochs", 2, "--log-dir", tmp_path, "--learning-rate", 0.01) == 0
    folder = only_run(tmp_path)
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {
        "checkpoint", "config", "events", "history", "learned_structure", "seed", "small", "status", "structure"
    }  # fmt: skip
    steps = -(-180 // 32)
    assert {path.name for path in (folder / "learned_structure").iterdir()} == {
        "alive_0", f"alive_{steps}", f"alive_{2 * steps}"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["learning_rate"] == 0.01
    np.testing.assert_allclose(config["strength"], 1000 / config["initial_cost"])
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_accuracy"]) > 0
    seed, small = (keras.models.load_model(folder / name) for name in ("seed.keras", "small.keras"))
    structure = km.Structure.load(folder / "structure.json")
    assert structure.counts() == json.loads((folder / "learned_structure" / f"alive_{2 * steps}").read_text())
    assert km.FLOPs()(small) == km.FLOPs()(seed, structure)
    assert "no GPU is visible" in capsys.readouterr().out


def structure_of_run(log_dir, seed):
    log_dir.mkdir()
    options = ["--morphnet-regularizer-algorithm", "Gamma", "--learning-rate", "0.05", "--num-epochs", 2, "--limit", 70]
    options += [
        "--morphnet-regularization-multiplier",
        30,
        "--morphnet-regularizer-threshold",
        0.9,
        "--random-seed",
        seed,
        "--log-dir",
        log_dir,
    ]
    assert command(*DIGITS, *options) == 0
    return km.Structure.load(only_run(log_dir) / "structure.json")


@pytest.mark.usefixtures("uncompiled")
def test_one_random_seed_gives_one_structure(tmp_path):
    first, second, other = (structure_of_run(tmp_path / f"{number}", seed) for number, seed in enumerate((5, 5, 6)))
    assert sum(first.widths.values()) < sum(first.seed_widths.values())
    assert first == second
    assert first != other


@(pytest.mark.slow if keras.backend.backend() != "tensorflow" else lambda test: test)
@pytest.mark.usefixtures("uncompiled")
def test_further_options(tmp_path, capsys):
    options = ["--num-epochs", 1, "--log-dir", tmp_path, "--num-classes", 12, "--image-size", 6, "--mixed-precision"]
    options += ["--optimizer", "sgd", "--momentum", 0.5, "--weight-decay", 1e-4, "--schedule", "cosine"]
    options += ["--regularizer-option", "l1_fraction=0.25", "--main-eval-device", "/cpu:0"]
    options += ["--morphnet-target-cost", "Latency", "--morphnet-hardware", "Others"]
    assert command(*DIGITS, *options, "--peak-flops", 1e12, "--bandwidth", 1e11) == 0
    small = keras.models.load_model(only_run(tmp_path) / "small.keras")
    assert small.input_shape == (None, 6, 6, 1)
    assert small.output_shape == (None, 12)
    assert small.get_layer("conv0").compute_dtype == "bfloat16"
    assert small.get_layer("conv0").kernel.dtype == small.get_layer("logits").compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.usefixtures("uncompiled")
def test_the_penalty_is_float32_in_mixed_precision(tmp_path, batch):
    results = []
    for mixed in (False, True):
        keras.utils.set_random_seed(2)
        with km.devices.mixed_precision(mixed):
            model = make(tmp_path, morphnet_regularization_strength=1e-3)
        penalty, cost = model.learner._penalty()
        assert keras.backend.standardize_dtype(penalty.dtype) == "float32"
        assert np.isfinite(model.train(*batch)[0])
        results.append([keras.ops.convert_to_numpy(penalty), keras.ops.convert_to_numpy(cost)])
    np.testing.assert_array_equal(*results)


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_a_model_of_ones_own_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--base-model-name", "examples.custom_model:tiny_resnet", "--dataset", "digits", "--limit", 100]
    assert command(*options, "--num-epochs", 1, "--log-dir", tmp_path) == 0
    assert json.loads((only_run(tmp_path) / "learned_structure" / "alive_0").read_text())["stem/Conv2D"] == 16


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_small_images_are_enlarged(tmp_path, capsys):
    options = ["--base-model-name", "MobileNet", "--dataset", "digits", "--limit", 20, "--num-epochs", 1]
    assert command(*options, "--log-dir", tmp_path) == 0
    assert "MobileNet takes images of at least 32x32: enlarged from 8x8" in capsys.readouterr().out
    small = keras.models.load_model(only_run(tmp_path) / "small.keras")
    assert small.input_shape == (None, 32, 32, 1)


@pytest.fixture
def no_data(monkeypatch):
    """Fails where data would be loaded."""

    def load(*_, **__):
        raise AssertionError("data was loaded")

    monkeypatch.setattr(training, "load", load)


BAD = [
    ("--num-epochs", "0"),
    ("--num-epochs", "many"),
    ("--num-classes", "0"),
    ("--batch-size", "0"),
    ("--batch-size", "-3"),
    ("--learning-rate", "0"),
    ("--learning-rate", "nan"),
    ("--learning-rate", "inf"),
    ("--base-model-name", "ResNet51"),
    ("--base-model-name", "nowhere:function"),
    ("--base-model-name", "keras:layers"),
    ("--morphnet-regularizer-algorithm", "L2"),
    ("--morphnet-target-cost", "Money"),
    ("--morphnet-hardware", "Abacus"),
    ("--morphnet-regularizer-threshold", "1.5"),
    ("--morphnet-regularizer-threshold", "nan"),
    ("--morphnet-regularization-multiplier", "-1"),
    ("--morphnet-regularization-multiplier", "inf"),
    ("--num-cuda-device", "-1"),
    ("--num-cuda-device", "64"),
    ("--random-seed", "-1"),
    ("--main-train-device", "/gpu:63"),
    ("--main-eval-device", "toaster"),
    ("--image-size", "0"),
    ("--limit", "0"),
    ("--pixels", "0-256"),
    ("--optimizer", "magic"),
    ("--momentum", "1.5"),
    ("--momentum", "0.9"),  # the default optimizer has none
    ("--weight-decay", "-1"),
    ("--schedule", "lunar"),
    ("--regularizer-option", "l1_fraction"),
    ("--regularizer-option", "l1_fraction=2"),
    ("--regularizer-option", "l1_fraction=much"),
    ("--regularizer-option", "threshold=1"),
    ("--regularizer-option", "warmth=1"),
    ("--peak-flops", "0"),
    ("--bandwidth", "1e9"),  # belongs to Others
    ("--log-dir", "/dev/null"),
    ("--resume", "/nowhere"),
    ("--job-addresses", "somewhere"),
    ("--process-id", "1"),
    ("--no-such-option", "1"),
]


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.startswith("keras-morph: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.once
@pytest.mark.parametrize(("option", "value"), BAD)
def test_a_bad_value_is_one_line(option, value, no_data, capsys):
    assert command(option, value) == 2
    line = one_line(capsys)
    assert option in line or value.partition("=")[0] in line


@pytest.mark.once
def test_every_option_has_a_bad_value_here():
    """But for --dataset, whose mistakes are in test_datasets.py and test_cli.py, and those that take no value."""
    options = {"--" + name.replace("_", "-") for name in inspect.signature(Train).parameters}
    assert options == {option for option, _ in BAD if option != "--no-such-option"} | {
        "--dataset",
        "--mixed-precision",
        "--stream",
    }


@pytest.mark.once
def test_others_needs_its_data_sheet(no_data, capsys):
    assert command("--morphnet-target-cost", "Latency", "--morphnet-hardware", "Others") == 2
    assert "--peak-flops" in one_line(capsys)


@pytest.mark.once
@pytest.mark.parametrize(("name", "layer"), [("VGG16", "block1_conv1"), ("InceptionV3", "conv2d")])
def test_gamma_is_refused_before_any_data_is_loaded(name, layer, no_data, capsys):
    assert command("--base-model-name", name, "--morphnet-regularizer-algorithm", "Gamma") == 2
    line = one_line(capsys)
    assert "GroupLasso" in line
    assert layer in line


@pytest.mark.once
@pytest.mark.parametrize("name", ["VGG19", large("InceptionResNetV2"), large("ConvNeXtTiny")])
def test_networks_without_gamma(name):
    """All of `keras.applications` in that list: no BatchNormalization there has a scale. One of each family."""
    assert name in km.zoo.WITHOUT_GAMMA
    size = km.zoo.minimum_size(name)
    with pytest.raises(km.UnsupportedModelError):
        km.Gamma().sources(km.trace(km.zoo.build(name, input_shape=(size, size, 3))))


@pytest.mark.once
def test_too_few_classes(capsys):
    assert command(*DIGITS, "--num-classes", 3) == 2
    assert "10 classes of digits" in one_line(capsys)
