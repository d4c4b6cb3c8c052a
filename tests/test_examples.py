"""Every public function and class shows an example, which is run here."""

import dataclasses
import doctest
import inspect
import warnings

import keras
import numpy as np
import pytest

import keras_morph as km

# To be shortened: what has no example yet.
WITHOUT = {
    *("Anneal", "ChannelGraph", "Distiller", "EpochLog", "FadeOut", "Gamma", "GroupLasso", "LogisticSigmoid", "Reach"),
    *("Rule", "Shrunk", "StopWithin", "StrengthController", "Structure", "StructureLearner", "StructureLog"),
    *("expand", "fit_budget", "masked", "prune", "reach", "rebuild", "reestimate_statistics", "register_rule"),
    *("shrink", "trace"),
}
PLACES = {"": km, "zoo.": km.zoo, "datasets.": km.datasets}
PUBLIC = {prefix + name: getattr(place, name) for prefix, place in PLACES.items() for name in place.__all__}
PUBLIC = {name: each for name, each in PUBLIC.items() if inspect.isclass(each) or inspect.isfunction(each)}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def example_of(name):
    """The examples in the docstring of a public name; None if there is no section for them."""
    names = {"km": km, "keras": keras, "np": np, "dataclasses": dataclasses, "warnings": warnings}
    (found,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(PUBLIC[name], name, globs=names)
    return found if "\nExample:\n" in inspect.cleandoc(found.docstring) and found.examples else None


def test_what_has_no_example_is_listed():
    assert {name for name in PUBLIC if example_of(name) is None} == WITHOUT


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT))
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example_of(name), out=printed.append)
    assert result.failed == 0, "".join(printed)
    assert result.attempted > 0
