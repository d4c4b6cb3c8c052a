"""What is saved is opened by another process on the same backend: one process opens all of it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import keras
import models
import numpy as np
import pytest
import structures
import test_saving
import test_user_cases
from exactness import assert_equal_outputs
from test_values import WIRINGS

import keras_morph as km
from keras_morph.runs import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning"),
    pytest.mark.usefixtures("quick_initializers"),
]

# Of another backend test_rebuild_is_exact.py shows that rebuilt networks need no keras_morph.
REBUILT = ("add of a mask", "windows in the batch", "video", "transformer")
SCRIPT = """
import json, pathlib, sys
import keras, numpy as np

folder = pathlib.Path(sys.argv[1])
for path in folder.glob("rebuilt.*.keras"):
    model, inputs = keras.models.load_model(path), np.load(path.with_suffix(".npy"))
    np.save(path.with_suffix(".outputs.npy"), keras.ops.convert_to_numpy(model(inputs)))
assert "keras_morph" not in sys.modules

import keras_morph as km

for path in folder.glob("wired.*.keras"):
    model, structure = keras.models.load_model(path), path.with_suffix(".json")
    inputs = np.load(path.with_suffix(".npy"))
    outputs = [keras.ops.convert_to_numpy(make(model, structure)(inputs)) for make in (km.rebuild, km.masked)]
    np.savez(path.with_suffix(".npz"), *outputs)
    json.dump(km.FLOPs()(model, structure), path.with_suffix(".flops").open("w"))

learner = keras.models.load_model(folder / "learner.keras")
learner.structure().save(folder / "structure.json")
np.save(folder / "predictions.npy", learner.predict(np.load(folder / "x.npy"), verbose=0))
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory, quick_initializers):
    """What was written, by its kind, and the folder into which the other process has written too."""
    folder = tmp_path_factory.mktemp("opened")
    rebuilt, wired = {}, {}
    for name in REBUILT if keras.backend.backend() == "tensorflow" else ():
        model = test_user_cases.build(name)
        small, inputs = (
            km.rebuild(model, structures.draw(km.trace(model), "half", seed=1)),
            test_user_cases.example(model),
        )
        rebuilt[name] = models.outputs(small, inputs)
        save_model(small, folder / f"rebuilt.{name}.keras")
        np.save(folder / f"rebuilt.{name}.npy", inputs)
    for name, wiring in WIRINGS.items():
        graph = wiring()
        structure = structures.draw(graph, "half", seed=1)
        save_model(graph.model, folder / f"wired.{name}.keras")
        structure.save(folder / f"wired.{name}.json")
        np.save(folder / f"wired.{name}.npy", models.examples(graph.model))
        wired[name] = graph, structure
    learner = test_saving.compiled("LogisticSigmoid")
    test_saving.killed_channel(learner)
    learner.save(folder / "learner.keras")
    np.save(folder / "x.npy", test_saving.X)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], env=environment, check=True, timeout=300)
    return SimpleNamespace(folder=folder, rebuilt=rebuilt, wired=wired, learner=learner)


@pytest.mark.once
def test_a_rebuilt_model_opens_where_nobody_knows_keras_morph(opened):
    assert len(opened.rebuilt) == len(REBUILT)
    for name, expected in opened.rebuilt.items():
        found = np.load(opened.folder / f"rebuilt.{name}.outputs.npy")
        np.testing.assert_allclose(found, expected[0], atol=1e-5)


def test_the_file_of_a_structure_needs_no_word_about_its_wiring(opened):
    for name, (graph, structure) in opened.wired.items():
        expected = models.outputs(km.masked(graph.model, structure), models.examples(graph.model))
        with np.load(opened.folder / f"wired.{name}.npz") as arrays:
            small, masked = arrays.values()
        assert_equal_outputs([small], expected)
        assert_equal_outputs([masked], expected)
        assert json.loads((opened.folder / f"wired.{name}.flops").read_text()) == km.FLOPs()(graph, structure)


def test_a_learner_is_loaded_without_custom_objects(opened):
    learner, folder = opened.learner, opened.folder
    assert km.Structure.load(folder / "structure.json") == learner.structure()
    expected = learner.predict(test_saving.X, verbose=0)
    np.testing.assert_allclose(np.load(folder / "predictions.npy"), expected, rtol=1e-5, atol=1e-6)
