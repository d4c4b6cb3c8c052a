"""The command line: what each command prints and writes, and one line with exit code 2 for every mistake.

`train` and its options are in test_model_zoo.py.
"""

import contextlib
import csv
import functools
import inspect
import io
import json
import re
import sys
import typing
import zipfile

import keras
import models
import numpy as np
import pytest
import typer
from keras import layers

import keras_morph as km
from keras_morph.benchmarking import accuracy
from keras_morph.cli import INTERRUPTED, choices, deploying, finetuning, inspecting, main, options, shrinking
from keras_morph.cli.app import app
from keras_morph.costs.fitted import Coefficients
from keras_morph.formats import FORMATS
from keras_morph.runs import save_model
from keras_morph.runtimes import RUNTIMES
from keras_morph.saving import open_model
from keras_morph.timing import Conditions
from keras_morph.training.recipe import SCORES

pytestmark = pytest.mark.once

MODEL = "test_cli:for_digits"


@pytest.fixture(autouse=True)
def _timed_briefly(monkeypatch):
    monkeypatch.setattr(deploying, "SECONDS", 0.02)
    monkeypatch.setattr(deploying, "measure", functools.partial(km.measure, rounds=2, repeats=1))


COMMANDS = (
    "train",
    "shrink",
    "inspect",
    "rebuild",
    "expand",
    "finetune",
    "report",
    "compare",
    "export",
    "benchmark",
    "measure",
    "zoo",
    "sweep",
)


def command(*arguments):
    """Exit code of `keras-morph ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


# Models for `package.module:function`.


def for_digits(input_shape=(8, 8, 1), classes=10, name="for_digits"):
    """image(1) -- conv1(6) -- bn -- relu -- conv2(5) -- bn -- relu -- mean -- logits(10), without a softmax."""
    image = x = keras.Input(input_shape, name="image")
    for number, width in ((1, 6), (2, 5)):
        x = layers.Conv2D(width, 3, padding="same", name=f"conv{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(layers.BatchNormalization(name=f"bn{number}")(x))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name=name)


def for_small_colour_images():
    return for_digits((6, 6, 3), 10)


def for_three_classes():
    return for_digits((8, 8, 1), 3)


def without_gamma():
    image = keras.Input((8, 8, 1))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3, name="conv1")(image))
    return keras.Model(image, layers.Dense(10, name="logits")(x), name="gammaless")


def with_groups():
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, groups=1, name="conv1")(image)
    x = layers.Conv2D(6, 3, groups=2, activation="relu", name="grouped")(x)
    x = layers.Concatenate()([layers.Conv2D(4, 1, name="conv2")(x), layers.Conv2D(4, 1, name="conv3")(x)])
    return keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)), name="with_groups")


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


def subclassed():
    return Subclassed(name="subclassed")


def nothing():
    return 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Whatever the commands below read, sound and damaged."""
    folder = tmp_path_factory.mktemp("files")
    seed = for_digits()
    graph = km.trace(seed)
    save_model(seed, folder / "seed.keras")
    structure = km.fit_budget(seed, "50%")
    structure.save(folder / "structure.json")
    save_model(km.rebuild(seed, structure), folder / "small.keras")
    (folder / "alive_10").write_text(json.dumps({"conv1/Conv2D": 2, "conv2/Conv2D": 3}))
    (folder / "too_many").write_text(json.dumps({"conv1/Conv2D": 7}))
    (folder / "unknown_layer").write_text(json.dumps({"conv9/Conv2D": 1}))
    (folder / "cut_off.json").write_text((folder / "structure.json").read_text()[:99])
    km.Structure.closed(
        km.trace(models.build("plain")), np.ones(km.trace(models.build("plain")).num_groups, bool)
    ).save(folder / "of_another.json")
    (folder / "cut_off.keras").write_bytes((folder / "seed.keras").read_bytes()[:999])
    (folder / "no_images").mkdir()
    (folder / "no_images" / "notes.txt").write_text("none")
    with zipfile.ZipFile(folder / "no_images.zip", "w") as archive:
        archive.writestr("train/cat/notes.txt", "none")
    (folder / "damaged.zip").write_bytes(b"PK\x03\x04 and no more")
    assert graph.num_groups > 0
    return folder


# What they do ----------------------------------------------------------------------------------------------------


def test_zoo_lists_every_name(capsys):
    assert command("zoo") == 0
    printed = capsys.readouterr().out
    for name in km.zoo.known_names():
        assert re.search(rf"\b{name}\b", printed), name
    assert re.search(r"InceptionV3 +images of at least 75 x 75", printed)


def parameters_of(callback):
    """Those that are arguments and options."""
    parameters = inspect.signature(callback).parameters.values()
    return [parameter for parameter in parameters if parameter.annotation is not typer.Context]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_option(name):
    (registered,) = [each for each in app.registered_commands if each.callback.__name__ == name]
    assert registered.callback.__doc__
    for parameter in parameters_of(registered.callback):
        (option,) = parameter.annotation.__metadata__
        assert len(option.help) > 8, parameter.name


@pytest.mark.parametrize(
    ("shown", "known"),
    [
        (options.ALGORITHMS, choices.ALGORITHMS),
        (options.BASE_MODELS, km.zoo.NAMES),
        (options.COSTS, choices.COSTS),
        (options.DATA, km.datasets.NAMES),
        (options.EXPORTS, FORMATS),
        (options.RUNTIMES, RUNTIMES),
        (options.DEVICES, (*km.HARDWARE, "Others")),
        (options.OPTIMIZERS, choices.OPTIMIZERS),
        (options.PIXELS, km.datasets.PIXELS),
        (options.SCHEDULES, choices.SCHEDULES),
        (options.SCORES, SCORES),
    ],
)
def test_the_help_knows_the_names_without_keras(shown, known):
    assert list(shown) == list(known)


def test_the_help_of_a_command_shows_its_options_and_defaults(capsys):
    assert command("shrink", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--budget" in printed
    assert "[default: 50%]" in printed


def test_the_help_of_all_lists_the_commands(capsys):
    assert command("--help") == 0
    listed = re.findall(r"^  ([a-z]+) +[A-Z]", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_inspect_shows_channels_groups_and_what_is_pinned(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert command("inspect", files / "seed.keras") == 0
    printed = capsys.readouterr().out
    assert "for_digits: 22 channels in 22 groups, 11 of them pinned" in printed
    row = next(line for line in printed.splitlines() if "conv2" in line)
    share = 2 * 64 * 9 * 6 * 5 / km.FLOPs()(for_digits())
    assert row.split()[:7] == [
        "conv2", "Conv2D", "5", "1", "1", f"{share:.1%}", f"{275 / for_digits().count_params():.1%}"
    ]  # fmt: skip
    assert re.search(r"logits .* model output", printed)


def test_inspect_takes_names_and_functions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert command("inspect", "DigitsResNet", "--image-size", 16, "--classes", 7) == 0
    assert re.search(r"logits +Dense +7 +7 ", capsys.readouterr().out)
    assert command("inspect", "test_cli:for_small_colour_images") == 0
    assert "for_digits" in capsys.readouterr().out


def test_rebuild_carries_the_weights(files, tmp_path, capsys):
    assert command("rebuild", files / "seed.keras", files / "structure.json", tmp_path / "new" / "small.keras") == 0
    x = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    expected, received = (
        keras.models.load_model(path).predict(x, verbose=0)
        for path in (files / "small.keras", tmp_path / "new" / "small.keras")
    )
    np.testing.assert_allclose(received, expected, rtol=1e-6)
    flops = km.FLOPs()(keras.models.load_model(files / "small.keras"))
    assert f"{flops:,.0f} FLOPs" in capsys.readouterr().out


def test_export_writes_a_file_for_each_format(files, tmp_path, capsys):
    assert command("export", files / "small.keras", "--to", "onnx,litert", "--output", tmp_path / "new" / "small") == 0
    printed = capsys.readouterr().out.splitlines()
    for line, suffix, runtime in zip(printed, (".onnx", ".tflite"), ("onnxruntime", "ai-edge-litert"), strict=True):
        path = tmp_path / "new" / f"small{suffix}"
        assert line.startswith(f"{path}: {path.stat().st_size:,} bytes; {runtime} agrees with Keras to ")


def test_export_in_eight_bits_says_what_it_costs(files, tmp_path, capsys):
    options = ["--to", "litert", "--output", tmp_path / "small", "--int8", "--calibrate", "digits"]
    assert command("export", files / "seed.keras", *options) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"small\.tflite: [\d,]+ bytes in int8; ai-edge-litert agrees with Keras to ", first)
    costs = r"  \d+\.\d% of float32's [\d,]+ bytes; accuracy on the 359 test images of digits: ([\d.]+)%, in float32 ([\d.]+)%"
    before, after = map(float, re.fullmatch(costs, second).groups())
    assert abs(before - after) < 10


def test_benchmark_of_nothing_that_runs_is_an_error(tmp_path, capsys):
    (tmp_path / "damaged.tflite").write_bytes(b"no network")
    assert command("benchmark", tmp_path / "damaged.tflite", "--runtimes", "litert") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"expected some that can be timed\. Received: .*damaged\.tflite", line)


def test_benchmark_prints_a_table_and_writes_its_figures(files, tmp_path, capsys):
    paths, output = [files / "seed.keras", files / "small.keras"], tmp_path / "figures.json"
    options = ["--runtimes", "onnxruntime", "--data", "digits", "--seconds", "0.05", "--output", output]
    assert command("benchmark", *paths, *options) == 0
    printed = capsys.readouterr()
    rows = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in rows] == ["seed.keras", "small.keras"]
    assert "onnxruntime: timing seed.keras, small.keras" in printed.err
    for row, line in zip(rows, printed.out.splitlines()[2:4], strict=True):
        assert line.startswith(f"| onnxruntime | {row['model']}")
        assert f"{row['accuracy']:.2%}" in line


def test_expand_widens_to_the_cost_of_the_seed(files, tmp_path, capsys):
    output = tmp_path / "wide.keras"
    assert command("expand", files / "seed.keras", files / "structure.json", output, "--cost", "ModelSize") == 0
    seed, small, wide = (open_model(str(path)) for path in (files / "seed.keras", files / "small.keras", output))
    assert small.count_params() < wide.count_params() <= seed.count_params()
    assert re.search(r"wide\.keras: [\d,]+ FLOPs .* \d+ parameters", capsys.readouterr().out)


def test_finetune_trains_what_was_rebuilt_and_goes_on(files, tmp_path, capsys):
    """By labels and the seed's answers; ended after the second epoch, it comes to what an unbroken run comes to."""
    arguments = ["finetune", files / "small.keras", "--teacher", files / "seed.keras", "--distillation", "0.5"]
    arguments += ["--epochs", "3", "--limit", "200", "--log-dir", tmp_path, "--learning-rate", "0.01"]
    assert command(*arguments, "--name", "whole") == 0
    assert "50% of the loss are the answers of" in capsys.readouterr().out
    whole = keras.models.load_model(tmp_path / "whole" / "small.keras")
    before = open_model(str(files / "small.keras"))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before.get_weights(), whole.get_weights(), strict=True))
    rows = list(csv.DictReader((tmp_path / "whole" / "history.csv").open()))
    assert [row["phase"] for row in rows] == ["fine-tune"] * 3
    assert 0 <= json.loads((tmp_path / "whole" / "results.json").read_text())["test_accuracy"] <= 1

    def ended(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning.EpochLog, "on_epoch_begin", lambda self, epoch, logs=None: epoch == 2 and ended())
        assert command(*arguments, "--name", "broken") == INTERRUPTED
    assert command("finetune", "--resume", tmp_path / "broken") == 0
    broken = keras.models.load_model(tmp_path / "broken" / "small.keras")
    for one, other in zip(whole.get_weights(), broken.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert command("finetune", "--resume", tmp_path / "broken") == 0
    assert "is finished" in capsys.readouterr().out


def test_rebuild_from_counts_and_without_weights(files, tmp_path):
    for weights, name in (("--weights", "carried.keras"), ("--no-weights", "fresh.keras")):
        assert command("rebuild", files / "seed.keras", files / "alive_10", tmp_path / name, weights) == 0
    seed, carried, fresh = (
        keras.models.load_model(path)
        for path in (files / "seed.keras", tmp_path / "carried.keras", tmp_path / "fresh.keras")
    )
    kernels = [keras.ops.convert_to_numpy(each.get_layer("conv1").kernel) for each in (seed, carried, fresh)]
    np.testing.assert_array_equal(kernels[1], kernels[0][..., :2])
    assert kernels[2].shape == kernels[1].shape
    assert not np.any(kernels[2] == kernels[1])


def test_report_prints_and_writes(files, tmp_path, capsys):
    pair = [files / "seed.keras", files / "small.keras"]
    assert command("report", *pair, "--folder", tmp_path / "report") == 0
    expected = km.report(*(keras.models.load_model(path) for path in pair))
    assert capsys.readouterr().out == str(expected) + "\n"
    assert (tmp_path / "report" / "report.md").read_text() == expected.markdown()
    assert len(list((tmp_path / "report").iterdir())) == 4


def test_report_foretells_the_time_of_each_layer(files, tmp_path, capsys):
    pair, latency = [files / "seed.keras", files / "small.keras"], tmp_path / "latency.json"
    conditions = Conditions("onnxruntime", "", 1, 1, "a device")
    cost = km.MeasuredLatency.of(conditions, Coefficients({"Conv2D 9": {"work": 1e-9}, "Dense 1": {"call": 1e-6}}), "")
    cost.save(latency)
    assert command("report", *pair, "--latency", latency) == 0
    expected = km.report(*(keras.models.load_model(path) for path in pair), cost=cost)
    printed = capsys.readouterr().out
    assert printed == str(expected) + "\n"
    assert "milliseconds" in printed or " ms" in printed


# 90 images to train on, in whole batches: every other size of a batch is compiled anew.
LIMIT = 100
SHRINK = ("--limit", LIMIT, "--seed-epochs", 1, "--epochs", 3, "--batch-size", 30, "--learning", 0.4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`keras-morph shrink`: what it printed, and the run's folder."""
    log_dir, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploying, "SECONDS", 0.02)
        assert command("shrink", MODEL, "--budget", "60%", *SHRINK, "--log-dir", log_dir) == 0
    (folder,) = log_dir.iterdir()
    return printed.getvalue(), folder


def test_shrink_leaves_every_file(run):
    _, folder = run
    assert {path.name for path in folder.iterdir()} == {
        "benchmark.json", "checkpoint", "config.json", "history.csv", "learned_structure", "report.html", "report.json",
        "report.md", "report.png", "results.json", "seed.keras", "small.keras", "status.json", "structure.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["command"], config["options"]["budget"]) == ("shrink", "60%")
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert rows[0]["phase"] == "seed"
    assert rows[-1]["phase"] == "fine-tune"
    seed, small = (keras.models.load_model(folder / name) for name in ("seed.keras", "small.keras"))
    flops = km.FLOPs()
    assert flops(small) <= 0.6 * flops(seed)
    assert flops(seed, folder / "structure.json") == flops(small)
    for path in (folder / "learned_structure").iterdir():
        assert json.loads(path.read_text()).keys() == {"conv1/Conv2D", "conv2/Conv2D"}


def test_shrink_prints_the_table_that_the_report_holds(run):
    printed, folder = run
    results = json.loads((folder / "report.json").read_text())["results"]
    assert list(results) == ["seed", "trained, before the cut", "cut and recovered", "fine-tuned"]
    for name, values in results.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"│ {name} ")]
        assert [cell.strip() for cell in line.split("│")[2:-1]] == list(values.values())


def test_shrink_ends_with_milliseconds_of_a_runtime(run):
    printed, folder = run
    seed, small = json.loads((folder / "benchmark.json").read_text())["rows"]
    times = f"{1e3 * seed['min']:.3g} -> {1e3 * small['min']:.3g} ms, {seed['min'] / small['min']:.2f}x as fast"
    assert f"digits, {LIMIT} test images; litert, 1 thread: {times} (shortest of " in printed
    (time,) = json.loads((folder / "report.json").read_text())["times"]
    assert (time["how"], time["seconds"], time["seconds_after"]) == ("measured", seed["min"], small["min"])


def test_the_table_says_what_the_files_do(run):
    _, folder = run
    results = json.loads((folder / "report.json").read_text())["results"]
    data = km.datasets.load("digits", limit=LIMIT)
    for name, file in (("seed", "seed.keras"), ("fine-tuned", "small.keras")):
        model = keras.models.load_model(folder / file)
        accuracy = np.mean(model.predict(data.x_test, verbose=0).argmax(axis=1) == data.y_test)
        assert results[name]["test accuracy"] == f"{accuracy:.2%}"
        assert results[name]["FLOPs"] == f"{km.FLOPs()(model):,.0f}"
        assert results[name]["parameters"] == f"{model.count_params():,}"


@pytest.mark.slow
@pytest.mark.only_on("tensorflow")
def test_one_command_ends_in_eight_bits_at_a_share_of_the_latency(tmp_path, capsys, monkeypatch):
    class Quick(km.MeasuredLatency):
        def __init__(self, graph, **options):
            super().__init__(graph, structures=12, seconds=10, **options)

    monkeypatch.setattr(shrinking, "MeasuredLatency", Quick)
    options = ("--latency", "onnxruntime", "--budget", "70%, 90KB onnx int8", "--export", "onnx", "--int8")
    assert command("shrink", "DigitsResNet", *options, *SHRINK, "--log-dir", tmp_path) == 0
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    cost = km.MeasuredLatency.load(folder / "latency.json")
    seed, small = (keras.models.load_model(folder / name) for name in ("seed.keras", "small.keras"))
    assert cost(small) <= 0.7 * cost(seed)
    written = folder / "small_int8.onnx"
    assert f"{written}: the budget of 90,000 bytes is kept" in printed
    assert written.stat().st_size <= 90_000
    found = json.loads((folder / "benchmark.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["seed", "small", "small_int8.onnx"]
    data = km.datasets.load("digits", limit=LIMIT)
    assert found["rows"][2]["accuracy"] == accuracy(km.open_exported(written), data.x_test, data.y_test)
    first, headline = [line for line in printed.splitlines() if line.startswith("onnxruntime, 1 thread: ")]
    assert first.startswith(
        f"onnxruntime, 1 thread: predicted {1e3 * cost(seed):.3g} -> {1e3 * cost(small):.3g} ms, measured "
    )
    assert headline.endswith(f"{found['rows'][2]['accuracy']:.2%} (small_int8.onnx)")
    report = json.loads((folder / "report.json").read_text())
    assert "small_int8.onnx" in report["results"]
    assert [time["how"] for time in report["times"]] == ["predicted", "measured", "measured"]
    np.testing.assert_allclose(report["times"][0]["seconds_after"], cost(small))


@pytest.mark.usefixtures("uncompiled")
def test_a_keras_file_is_shrunk_as_it_is(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deploying, "find_spec", lambda name: None)  # no runtime is installed
    options = ("--limit", 60, "--epochs", 3, "--cost", "ModelSize", "--regularizer", "GroupLasso")
    assert command("shrink", files / "seed.keras", "--budget", "1.5KB", *options, "--log-dir", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "x as fast in Keras" in printed
    assert "pip install 'keras-morph[litert]'\n" in printed
    (folder,) = tmp_path.iterdir()
    assert keras.models.load_model(folder / "small.keras").count_params() * 4 <= 1500
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert "seed" not in {row["phase"] for row in rows}
    for one, other in zip(
        *(keras.models.load_model(path).get_weights() for path in (files / "seed.keras", folder / "seed.keras")),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("uncompiled")
def test_layers_are_protected_and_tied_and_grouped_convolutions_lose_equal_counts(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deploying, "find_spec", lambda name: None)  # no runtime is installed

    def layers_of(*options):
        assert command("inspect", "test_cli:with_groups", "--json", *options) == 0
        return {layer["layer"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}

    assert layers_of()["conv1"]["group_sizes"] == {"6": 6}
    assert layers_of("--grouped", "equal")["conv1"]["group_sizes"] == {"2": 6}
    assert layers_of("--protect", "conv1")["conv1"]["cheapest"] == 6
    assert layers_of("--tie", "conv2,conv3")["conv3"]["group_sizes"] == {"2": 4}
    out = tmp_path / "runs"
    options = ("--grouped", "equal", "--limit", 40, "--epochs", 3, "--seed-epochs", 0, "--protect", "conv3")
    assert command("shrink", "test_cli:with_groups", *options, "--regularizer", "GroupLasso", "--log-dir", out) == 0
    (folder,) = out.iterdir()
    small = keras.models.load_model(folder / "small.keras")
    assert small.get_layer("conv1").filters < 6
    assert small.get_layer("conv3").filters == 4
    again = tmp_path / "again.keras"
    assert command("rebuild", folder / "seed.keras", folder / "structure.json", again, "--grouped", "equal") == 0
    rebuilt = keras.models.load_model(again)
    assert [weight.shape for weight in rebuilt.weights] == [weight.shape for weight in small.weights]


# Mistakes --------------------------------------------------------------------------------------------------------

# Arguments, where {} is the folder of files, and what the line has to contain.
MISTAKES = [
    (["shrink"], ["MODEL"]),
    (["shrunk", MODEL], ["shrunk"]),
    (["shrink", MODEL, "--budgetts", "50%"], ["--budgetts"]),
    (["shrink", "ResNet51"], ["ResNet51", "ResNet50"]),
    (["shrink", "{}/nowhere.keras"], ["nowhere.keras", "does not exist"]),
    (["shrink", "{}/cut_off.keras"], ["cut_off.keras", "cannot be loaded"]),
    (["shrink", "nowhere:model"], ["nowhere:model", "cannot be imported"]),
    (["shrink", "test_cli:absent"], ["test_cli:absent", "cannot be imported"]),
    (["shrink", "test_cli:COMMANDS"], ["test_cli:COMMANDS", "tuple"]),
    (["shrink", "test_cli:nothing"], ["test_cli:nothing", "int"]),
    (["shrink", "test_cli:subclassed"], ["subclassed", "functional or Sequential"]),
    (["shrink", "test_cli:without_gamma", "--regularizer", "Gamma"], ["gammaless", "conv1", "GroupLasso"]),
    (["shrink", "test_cli:for_small_colour_images"], ["(None, 6, 6, 3)", "(8, 8, 1)", "--image-size"]),
    (["shrink", "test_cli:for_three_classes"], ["(None, 3)", "10 classes"]),
    (["shrink", MODEL, "--budget", "half"], ["'half'", "50%"]),
    (["shrink", MODEL, "--budget", "-5%"], ["'-5%'"]),
    (["shrink", MODEL, "--budget", "0.5"], ["'0.5'", '"50%"']),
    (["shrink", MODEL, "--budget", "50% Flops"], ["'50% Flops'", '"50% FLOPs"']),
    (["shrink", MODEL, "--budget", "0.1%"], ["reachable minimum"]),
    (["shrink", MODEL, "--budgets", "50%,"], ["--budgets", "50%,"]),
    (["shrink", MODEL, "--budgets", "50%,25%", "--budget", "60%"], ["--budgets", "no --budget"]),
    (["shrink", MODEL, "--budgets", "50%,0.1%"], ["reachable minimum"]),
    (["shrink", MODEL, "--name", "a/b"], ["--name", "a/b"]),
    (["sweep"], ["MODEL"]),
    (["sweep", MODEL, "--budgets", "50%,50%"], ["--budgets", "different"]),
    (["sweep", MODEL, "--budgets", "50%,half"], ["--budgets", '"half"']),
    (["sweep", "nowhere.keras", "--budgets", "50%"], ["nowhere.keras", "does not exist"]),
    (["inspect", "{}"], ["is no .keras file"]),
    (["sweep", MODEL, "--costs", "FLOPs,Money"], ["--costs", "'Money'", "ModelSize"]),
    (["sweep", MODEL, "--regularizers", "Lasso"], ["--regularizers", "'Lasso'", "GroupLasso"]),
    (["sweep", MODEL, "--strengths", "1,-1"], ["--strength", "-1"]),
    (["sweep", MODEL, "--strengths", "1..2"], ["--trials"]),
    (["sweep", MODEL, "--learning-rates", "1,many"], ["--learning-rates", "many"]),
    (["sweep", MODEL, "--learning-rates", "1", "--learning-rate", "1"], ["--learning-rates", "no --learning-rate"]),
    (["sweep", MODEL, "--random-seeds", "0,,1"], ["--random-seeds", "0,,1"]),
    (["sweep", MODEL, "--trials", "0"], ["--trials", "0"]),
    (["sweep", MODEL, "--jobs", "0"], ["--jobs", "0"]),
    (["sweep", MODEL, "--engine", "slurm"], ["--engine", "'slurm'", "ray"]),
    (["sweep", MODEL, "--address", "here"], ["--address", "--engine ray"]),
    (["sweep", MODEL, "--gpus", "-1"], ["--gpus", "-1"]),
    (["sweep", MODEL, "--epochs", "2"], ["--epochs", "at least 3"]),
    (["sweep", "--resume", "{}"], ["--resume", "no config.json"]),
    (["compare"], ["RUN"]),
    (["compare", "{}"], ["no results.json"]),
    (["compare", "{}", "--csv", "{}/seed.keras/x.csv"], ["--csv"]),
    (["compare", "{}", "--picture", "{}/seed.keras/x.png"], ["--picture"]),
    (["shrink", MODEL, "--cost", "Money"], ["--cost", "Money", "FLOPs"]),
    (["shrink", MODEL, "--cost", "Latency", "--hardware", "Abacus"], ["--hardware", "Abacus", "V100"]),
    (["shrink", MODEL, "--cost", "Latency", "--hardware", "Others"], ["--hardware Others", "--peak-flops"]),
    (["shrink", MODEL, "--hardware", "T4"], ["--hardware T4", "--cost Latency"]),
    (["shrink", MODEL, "--latency", "litert", "--cost", "ModelSize"], ["--latency litert", "--cost ModelSize"]),
    (["shrink", MODEL, "--bandwidth", "1e9"], ["--bandwidth", "--hardware Others"]),
    (["shrink", MODEL, "--peak-flops", "0"], ["--peak-flops", "above 0"]),
    (["shrink", MODEL, "--scores", "magnitude"], ["--scores", "'magnitude'", "taylor"]),
    (["shrink", MODEL, "--budget", "5ms"], ["--cost Latency", "--latency"]),
    (["shrink", MODEL, "--regularizer", "Lasso"], ["--regularizer", "'Lasso'", "GroupLasso"]),
    (["shrink", MODEL, "--threshold", "-1"], ["threshold=-1"]),
    (["shrink", MODEL, "--strength", "-1"], ["--strength", "-1"]),
    (["shrink", MODEL, "--strength", "nan"], ["--strength", "nan"]),
    (["shrink", MODEL, "--per-cost", "-1"], ["--per-cost", "-1"]),
    (["shrink", MODEL, "--round-to", "0"], ["--round-to", "0"]),
    (["shrink", MODEL, "--rounds", "0"], ["--rounds", "0"]),
    (["shrink", MODEL, "--rounds", "3", "--epochs", "8"], ["--epochs", "at least 9"]),
    (["shrink", MODEL, "--grouped", "half"], ["--grouped", "'half'", "equal"]),
    (["shrink", MODEL, "--protect", "conv9"], ["protect", "conv9"]),
    (["shrink", MODEL, "--tie", "conv1"], ["--tie", "conv1", "LAYER,LAYER"]),
    (["shrink", MODEL, "--distillation", "1.5"], ["--distillation", "1.5"]),
    (["shrink", MODEL, "--learning", "1.5"], ["--learning", "1.5"]),
    (["shrink", MODEL, "--learning", "0", "--regularizer", "Gamma"], ["learning=0", "Gamma("]),
    (["shrink", MODEL, "--epochs", "2"], ["--epochs", "at least 3"]),
    (["shrink", MODEL, "--epochs", "many"], ["--epochs", "integer"]),
    (["shrink", MODEL, "--seed-epochs", "-1"], ["--seed-epochs"]),
    (["shrink", MODEL, "--batch-size", "0"], ["--batch-size"]),
    (["shrink", MODEL, "--learning-rate", "0"], ["--learning-rate"]),
    (["shrink", MODEL, "--optimizer", "magic"], ["--optimizer", "adam"]),
    (["shrink", MODEL, "--image-size", "0"], ["image_size", "0"]),
    (["shrink", MODEL, "--pixels", "0-256"], ["--pixels", "'0-256'", "0-255"]),
    (["shrink", MODEL, "--pixels", "caffe"], ["caffe", "3 colours"]),
    (["shrink", MODEL, "--stream"], ["stream", "digits", "in memory"]),
    (["shrink", MODEL, "--data", ""], ["data", "''", "check the path"]),
    (["shrink", MODEL, "--data", "/proc"], ["/proc", "the system's own"]),
    (["shrink", MODEL, "--data", "x" * 5000], ["data", "too long"]),
    (["shrink", MODEL, "--log-dir", "x" * 5000], ["--log-dir"]),
    (["shrink", "x" * 5000 + ".keras"], ["does not exist"]),
    (["inspect", "DigitsResNet", "--classes", "1000000000"], ["--classes", "65536"]),
    (["inspect", "DigitsResNet", "--image-size", "1000000000"], ["--image-size", "65536"]),
    (["shrink", MODEL, "--limit", "0"], ["limit", "0"]),
    (["shrink", MODEL, "--random-seed", "-1"], ["--random-seed"]),
    (["shrink", MODEL, "--log-dir", "{}/seed.keras"], ["--log-dir", "seed.keras"]),
    (["shrink", "--resume", "{}/nowhere"], ["--resume", "nowhere", "no config.json"]),
    (["shrink", MODEL, "--epochs", "9", "--resume", "{}"], ["--resume", "model, epochs"]),
    (["shrink", MODEL, "--data", "digit"], ["digit", "digits"]),
    (["shrink", MODEL, "--data", "{}/no_images"], ["no_images"]),
    (["shrink", MODEL, "--data", "{}/no_images.zip"], ["no_images.zip"]),
    (["shrink", MODEL, "--data", "{}/damaged.zip"], ["damaged.zip"]),
    (["train", "--dataset", "{}/no_images"], ["no_images"]),
    (["inspect"], ["MODEL"]),
    (["inspect", "ResNet51"], ["ResNet51"]),
    (["inspect", "test_cli:subclassed"], ["subclassed"]),
    (["inspect", "ResNet50", "--image-size", "8"], ["32x32"]),
    (["inspect", "DigitsResNet", "--image-size", "0"], ["0"]),
    (["inspect", "DigitsResNet", "--classes", "0"], ["classes", "0"]),
    (["inspect", "DigitsResNet", "--grouped", "half"], ["--grouped", "'half'", "equal"]),
    (["inspect", "DigitsResNet", "--protect", "conv9"], ["protect", "conv9"]),
    (["inspect", "DigitsResNet", "--tie", "conv1,"], ["--tie", "conv1,"]),
    (["rebuild", "{}/seed.keras", "{}/structure.json", "out.keras", "--grouped", "half"], ["--grouped", "equal"]),
    (["rebuild", MODEL, "{}/structure.json"], ["OUTPUT"]),
    (["expand", "{}/seed.keras", "{}/structure.json", "out.h5"], ["out.h5", ".keras"]),
    (["expand", "{}/seed.keras", "{}/structure.json", "out.keras", "--budget", "1%"], ["room to expand", "1%"]),
    (["expand", "{}/seed.keras", "{}/structure.json", "out.keras", "--cost", "flops"], ["--cost", "FLOPs", "flops"]),
    (["expand", "DigitsResNet", "{}/alive_10", "out.keras", "--image-size", "3"], ["4x4"]),
    (["expand", "DigitsResNet", "{}/alive_10", "out.keras", "--classes", "0"], ["classes", "0"]),
    (["finetune"], ["MODEL", "finetune --help"]),
    (["finetune", "{}/small.keras", "--distillation", "0.5"], ["--teacher", "0.5"]),
    (["finetune", "{}/small.keras", "--epochs", "0"], ["--epochs", "at least 1", "0"]),
    (["finetune", "{}/small.keras", "--teacher", "{}/nowhere.keras"], ["nowhere.keras"]),
    (["finetune", "{}/small.keras", "--data", "digit"], ["'digit'", "digits"]),
    (["finetune", "{}/small.keras", "--batch-size", "0"], ["--batch-size", "0"]),
    (["finetune", "{}/small.keras", "--learning-rate", "0"], ["--learning-rate"]),
    (["finetune", "{}/small.keras", "--optimizer", "magic"], ["--optimizer", "adam"]),
    (["finetune", "{}/small.keras", "--image-size", "0"], ["image_size", "0"]),
    (["finetune", "{}/small.keras", "--pixels", "0-256"], ["--pixels", "'0-256'"]),
    (["finetune", "{}/small.keras", "--limit", "0"], ["limit", "0"]),
    (["finetune", "{}/small.keras", "--log-dir", "{}/seed.keras"], ["--log-dir", "seed.keras"]),
    (["finetune", "{}/small.keras", "--name", "a/b"], ["--name", "a/b"]),
    (["finetune", "{}/small.keras", "--random-seed", "-1"], ["--random-seed"]),
    (["finetune", "--resume", "{}/nowhere"], ["--resume", "nowhere", "no config.json"]),
    (["rebuild", "{}/seed.keras", "{}/nowhere.json", "out.keras"], ["nowhere.json"]),
    (["rebuild", "{}/seed.keras", "{}/cut_off.json", "out.keras"], ["cut_off.json", "JSON"]),
    (["rebuild", "{}/seed.keras", "{}/of_another.json", "out.keras"], ["plain", "for_digits"]),
    (["rebuild", "{}/seed.keras", "{}/unknown_layer", "out.keras"], ["unknown_layer", "'conv9'"]),
    (["rebuild", "{}/seed.keras", "{}/too_many", "out.keras"], ["too_many", "7 channels to conv1", "at most 6"]),
    (["rebuild", "{}/seed.keras", "{}/structure.json", "out.h5"], ["out.h5", ".keras"]),
    (["rebuild", "{}/seed.keras", "{}/structure.json", "{}/seed.keras/out.keras"], ["OUTPUT", "seed.keras"]),
    (["export", "{}/nowhere.keras"], ["nowhere.keras", "does not exist"]),
    (["export", "{}/small.keras", "--to", "onnx,onyx"], ["--to", "'onyx'", "openvino"]),
    (["export", "{}/small.keras", "--output", "{}/small.keras/out"], ["--output", "small.keras"]),
    (["export", "{}/small.keras", "--int8"], ["--int8", "--calibrate DATA"]),
    (["export", "{}/small.keras", "--calibrate", "digits"], ["--calibrate", "--int8"]),
    (["export", "{}/small.keras", "--int8", "--calibrate", "digit"], ["'digit'", "digits"]),
    (["export", "DigitsResNet", "--image-size", "3"], ["4x4"]),
    (["export", "DigitsResNet", "--classes", "0"], ["classes", "0"]),
    (["benchmark", "{}/nowhere.keras"], ["nowhere.keras", "does not exist"]),
    (["benchmark", "{}/small.keras", "--runtimes", "onnx"], ["--runtimes", "'onnx'", "onnxruntime"]),
    (["benchmark", "{}/small.keras", "--threads", "0"], ["--threads", "0"]),
    (["benchmark", "{}/small.keras", "--batch-size", "0"], ["--batch-size", "0"]),
    (["benchmark", "{}/small.keras", "--seconds", "0"], ["--seconds", "0"]),
    (["benchmark", "{}/small.keras", "--pixels", "0-256"], ["--pixels", "'0-256'"]),
    (["benchmark", "{}/small.keras", "--data", "digit"], ["'digit'", "digits"]),
    (["benchmark", "{}/small.keras", "--output", "{}/small.keras/out.json"], ["--output", "small.keras"]),
    (["benchmark", "DigitsResNet", "--image-size", "3"], ["4x4"]),
    (["benchmark", "DigitsResNet", "--classes", "0"], ["classes", "0"]),
    (["measure", "{}/nowhere.keras"], ["nowhere.keras", "does not exist"]),
    (["measure", "{}/small.keras", "--runtime", "onnx"], ["--runtime", "'onnx'", "onnxruntime"]),
    (["measure", "{}/small.keras", "--threads", "0"], ["--threads", "0"]),
    (["measure", "{}/small.keras", "--batch-size", "0"], ["--batch-size", "0"]),
    (["measure", "{}/small.keras", "--structures", "11"], ["--structures", "11", "12"]),
    (["measure", "{}/small.keras", "--seconds", "-1"], ["--seconds", "-1"]),
    (["measure", "{}/small.keras", "--output", "{}/small.keras/out.json"], ["--output", "small.keras"]),
    (["measure", "{}/small.keras", "--on", "{}/small.keras/phone"], ["--on", "small.keras"]),
    (["measure", "DigitsResNet", "--image-size", "3"], ["4x4"]),
    (["measure", "DigitsResNet", "--classes", "0"], ["classes", "0"]),
    (["shrink", MODEL, "--latency", "{}/nowhere.json"], ["--latency", "nowhere.json", "onnxruntime"]),
    (["shrink", MODEL, "--latency", "litert", "--threads", "0"], ["--threads", "0"]),
    (["shrink", MODEL, "--export", "tflite"], ["--export", "'tflite'", "litert"]),
    (["shrink", MODEL, "--int8"], ["--int8", "--export"]),
    (["shrink", MODEL, "--int8", "--export", "saved_model"], ["int8", "saved_model"]),
    (["shrink", MODEL, "--budget", "2MB tflite"], ["'2MB tflite'"]),
    (["shrink", MODEL, "--latency", "{}/alive_10"], ["MeasuredLatency.save", "alive_10"]),
    (["rebuild", "DigitsResNet", "{}/alive_10", "out.keras", "--image-size", "3"], ["4x4"]),
    (["rebuild", "DigitsResNet", "{}/alive_10", "out.keras", "--classes", "0"], ["classes", "0"]),
    (["report", "{}/seed.keras"], ["AFTER"]),
    (["report", "DigitsResNet", "{}/small.keras", "--image-size", "3"], ["4x4"]),
    (["report", "DigitsResNet", "{}/small.keras", "--classes", "0"], ["classes", "0"]),
    (["report", "{}/seed.keras", "{}/nowhere.keras"], ["nowhere.keras"]),
    (["report", "{}/seed.keras", "{}/small.keras", "--folder", "{}/seed.keras"], ["--folder"]),
    (
        ["report", "{}/seed.keras", "{}/small.keras", "--latency", "{}/seed.keras"],
        ["MeasuredLatency.save", "seed.keras"],
    ),
    (["zoo", "ResNet50"], ["ResNet50"]),
]


def options_of(name):
    """Options of a command that take a value."""
    (registered,) = [each for each in app.registered_commands if each.callback.__name__ == name]
    parameters = parameters_of(registered.callback)
    return {
        "--" + parameter.name.replace("_", "-")
        for parameter in parameters
        if isinstance(parameter.annotation.__metadata__[0], typer.models.OptionInfo)
        and bool not in (parameter.annotation.__origin__, *typing.get_args(parameter.annotation.__origin__))
    }


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_option_has_a_bad_value_here(name):
    tried = {argument for arguments, _ in MISTAKES if arguments[0] == name for argument in arguments}
    # A sweep hands on what it shares with shrink.
    assert options_of(name) - (options_of("shrink") if name == "sweep" else set()) <= tried


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=lambda value: " ".join(value).replace("{}/", ""))
def test_a_mistake_is_one_line_and_leaves_no_file(arguments, parts, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    assert command(*(argument.replace("{}", str(files)) for argument in arguments)) == 2
    line = capsys.readouterr().err
    assert line.startswith("keras-morph: ")
    assert line.count("\n") == 1
    for part in parts:
        assert part.lower() in line.lower()
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


def test_without_a_command_the_help_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["keras-morph"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    for name in COMMANDS:
        assert name in captured.out + captured.err


def test_an_error_of_ours_that_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(inspecting, "gather", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", MODEL])


@pytest.mark.parametrize(
    ("head", "given"),
    [
        ("def build():", "{}"),
        ("def build(classes):", "{'classes': 7}"),
        ("def build(*, input_shape=(8, 8, 3)):", "{'input_shape': (16, 16, 3)}"),
        ("def build(**given):", "{'input_shape': (16, 16, 3), 'classes': 7}"),
    ],
)
def test_a_users_function_gets_what_it_takes_and_its_errors_are_its_own(head, given, tmp_path, monkeypatch):
    from keras_morph.cli.choices import load_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"theirs_{abs(hash(head))}"
    lines = [head, "    given = locals().get('given', locals())", "    raise TypeError(f'mine: {dict(given)}')"]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    with pytest.raises(TypeError) as error:
        load_model(f"{name}:build", input_shape=(16, 16, 3), classes=7)
    assert str(error.value) == f"mine: {given}"
    assert error.traceback[-1].path.name == f"{name}.py"
