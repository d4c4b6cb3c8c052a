"""Every public function and class shows an example, which is run here."""

import contextlib
import dataclasses
import doctest
import inspect
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_morph as km

pytestmark = pytest.mark.usefixtures("quick_initializers")

WITHOUT = {"Progress"}  # nobody makes one
PLACES = {"": km, "zoo.": km.zoo, "datasets.": km.datasets}
PUBLIC = {prefix + name: getattr(place, name) for prefix, place in PLACES.items() for name in place.__all__}
PUBLIC = {name: each for name, each in PUBLIC.items() if inspect.isclass(each) or inspect.isfunction(each)}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


# What examples call model, x and y.
X = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 64)


def model():
    network = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(8, 3, name="last"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, activation="softmax", name="head"),
        ],
        name="small",
    )
    network.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return network


def example_of(name):
    """The examples in the docstring of a public name; None if there is no section for them."""
    names = {"km": km, "keras": keras, "np": np, "contextlib": contextlib, "dataclasses": dataclasses, "Path": Path}
    names |= {"warnings": warnings, "x": X, "y": Y, "images": X}
    (found,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(PUBLIC[name], name, globs=names)
    return found if "\nExample:\n" in inspect.cleandoc(found.docstring) and found.examples else None


def test_what_has_no_example_is_listed():
    assert {name for name in PUBLIC if example_of(name) is None} == WITHOUT


# On the other backends a process on TensorFlow writes the file, as test_exporting.py has it do once.
MARKS = dict.fromkeys(("benchmark", "export"), pytest.mark.only_on("tensorflow"))
MARKS["MeasuredLatency"] = pytest.mark.slow  # it times for 20 seconds


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in sorted(PUBLIC.keys() - WITHOUT)]
)
def test_the_example_runs(name, tmp_path, monkeypatch, uncompiled):
    monkeypatch.chdir(tmp_path)
    printed = []
    example = example_of(name)
    if any("model" in each.source for each in example.examples):
        example.globs["model"] = model()
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=printed.append)
    assert result.failed == 0, "".join(printed)
    assert result.attempted > 0
