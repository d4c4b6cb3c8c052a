"""What is imported when, each in a process of its own: no second framework, no Keras before a command needs it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import COMMANDS

import keras_morph as km
from keras_morph import api

pytestmark = pytest.mark.once

SOURCE = Path(__file__).parents[1] / "src"
MODULES = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def python(code, *, folder=None, **environment):
    """Run code in a process of its own, which finds `folder`'s modules before all others."""
    path = os.pathsep.join(str(each) for each in (folder, SOURCE) if each)
    environment = {**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": "jax", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def command(*arguments, **options):
    return python(f"import sys; from keras_morph.cli import main; main({list(arguments)!r})", **options)


def imported(code):
    return set(json.loads(python(f"{code}; {MODULES}").stdout))


def test_all_of_the_public_api_imports_nothing_that_keras_does_not():
    """No second framework, no matplotlib, rich, typer, tensorboardX or Pillow but those that Keras itself imports."""
    ours = imported("import keras_morph as km; names = [getattr(km, name) for name in km.__all__]")
    assert {"keras", "jax"} <= ours  # what is imported is seen
    others = ours - imported("import keras") - set(sys.stdlib_module_names)
    assert others == {"keras_morph"}


def test_importing_the_package_alone_imports_no_keras():
    assert not imported("import keras_morph") & {"keras", "jax", "numpy"}


def test_the_package_lists_its_names_and_no_others():
    assert set(api.__all__) <= set(dir(km))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = km.prun


def test_no_module_hides_a_public_name():
    """`keras_morph.x` would be the module from its first import on, and the name of the API only later."""
    modules = {path.stem for path in (SOURCE / "keras_morph").iterdir()}
    assert modules & set(api.__all__) == {"datasets", "zoo"}
    assert (km.datasets.__name__, km.zoo.__name__) == ("keras_morph.datasets", "keras_morph.zoo")


# The command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def without_keras(tmp_path):
    """A folder whose `keras` cannot be imported."""
    (tmp_path / "keras.py").write_text("raise RuntimeError('Keras was imported')")
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_answer_before_keras_is_imported(arguments, without_keras):
    done = command(*arguments, folder=without_keras)
    assert (done.returncode, done.stderr) == (0, "")
    assert (km.__version__ if arguments == ["--version"] else "--help") in done.stdout


def test_a_command_does_import_keras(without_keras):
    assert "Keras was imported" in command("zoo", folder=without_keras).stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("keras-morph in", "inspect"),
        ("keras-morph shrink --reg", "--regularizer"),
        ("keras-morph train --optimizer ", "adamw"),
    ],
)
def test_completion_answers_before_keras_is_imported(words, expected, without_keras):
    completing = {"_KERAS_MORPH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = command(folder=without_keras, **completing)
    assert expected in done.stdout.split()
    assert done.stderr == ""


@pytest.mark.parametrize("mistake", [["shrink"], ["shrink", "ResNet50", "--epochs", "many"], ["shrunk"]])
def test_a_mistake_in_writing_is_found_before_keras_is_imported(mistake, without_keras):
    done = command(*mistake, folder=without_keras)
    assert done.returncode == 2
    assert done.stderr.startswith("keras-morph: ")


def test_interrupting_an_import_is_one_line(tmp_path):
    (tmp_path / "keras.py").write_text(f"import os, time; os.kill(os.getpid(), {int(signal.SIGINT)}); time.sleep(9)")
    done = command("zoo", folder=tmp_path)
    assert (done.returncode, done.stderr) == (130, "keras-morph: interrupted\n")


ABSENT = {backend: f"raise ModuleNotFoundError(name={backend!r})" for backend in ("tensorflow", "jax", "torch")}
ABSENT["abacus"] = "raise ValueError('Unable to import backend : abacus')"


@pytest.mark.parametrize("backend", ABSENT)
def test_without_a_backend_one_line_names_the_extras(backend, tmp_path):
    (tmp_path / "keras.py").write_text(ABSENT[backend])
    done = command("zoo", folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for name in ("tensorflow", "jax", "torch"):
        assert f"'keras-morph[{name}]'" in done.stderr
    assert f"Received: {backend}, which is not installed" in done.stderr
    done = python("import keras_morph as km; km.trace", folder=tmp_path)
    assert "MissingBackendError: Keras expects a backend" in done.stderr.splitlines()[-1]


def test_an_unknown_backend_is_one_line():
    done = command("zoo", KERAS_BACKEND="abacus")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Received: abacus" in done.stderr


def test_a_module_that_is_missing_later_is_not_taken_for_a_backend(tmp_path):
    (tmp_path / "keras.py").touch()
    code = "from keras_morph.errors import backend_needed\nimport keras\nwith backend_needed(): import jax.absent"
    assert "ModuleNotFoundError" in python(code, folder=tmp_path).stderr.splitlines()[-1]


def test_what_else_is_missing_is_one_line_too(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')")
    done = command("inspect", "DigitsResNet", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "keras-morph: rich is not installed. Run pip install rich.\n"
