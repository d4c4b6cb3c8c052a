"""Graph, budget, structure and recipe are values: made once, handed on, and nothing is repeated beside them."""

import contextlib
import inspect
import io

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs, assert_exact
from keras import layers
from test_grouped import resnext

import keras_morph as km

WIRINGS = {
    "protect": lambda: km.trace(models.build("residual_projection"), protect=["a1"]),
    "tie": lambda: km.trace(models.build("residual_projection"), tie=[["a1", "b1"]]),
    "grouped": lambda: km.trace(resnext(), grouped="equal"),
}


@pytest.fixture(params=WIRINGS)
def wired(request):
    """A graph with a wiring of its own, and half of its channels."""
    graph = WIRINGS[request.param]()
    return graph, structures.draw(graph, "half", seed=1)


def test_a_structure_needs_no_word_about_its_wiring(wired):
    graph, structure = wired
    model = graph.model
    small = assert_exact(model, structure)
    for cost in (km.FLOPs(), km.ModelSize()):
        np.testing.assert_equal(cost(model, structure), cost(small))
        np.testing.assert_equal(cost(graph, structure), cost(small))
    assert km.report(model, structure) == km.report(graph, structure) == km.report(model, small)


@pytest.mark.once
def test_the_wiring_follows_layers_that_keras_names_anew():
    def network():
        image = keras.Input((6, 6, 3))
        x = layers.Conv2D(8, 3)(layers.Conv2D(6, 3)(image))
        return keras.Model(image, layers.Dense(2)(layers.Flatten()(x)))

    one, other = network(), network()
    first, second = (
        [layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)] for model in (one, other)
    )
    assert first != second
    structure = structures.draw(km.trace(one, protect=[first[1]]), "half", seed=1)
    assert structure.widths[first[1]] == 8
    small = km.rebuild(other, structure)
    assert small.get_layer(second[1]).filters == 8


@pytest.mark.once
def test_what_can_have_no_effect_is_refused():
    model = models.build("plain")
    graph = km.trace(model)
    for traced in (graph, km.StructureLearner(model)):
        with pytest.raises(km.KerasMorphError, match="traced before"):
            km.trace(traced, protect=["conv1"])
        assert km.trace(traced) is (traced if traced is graph else traced.graph)
    wired = km.trace(model, protect=["conv1"])
    assert km.trace(wired, protect=["conv1"]) is wired
    with pytest.raises(km.KerasMorphError, match=r'protect=\["head'):
        km.trace(model, protect="conv1")


@pytest.mark.once
def test_a_learner_stands_for_a_model_everywhere():
    learner = km.StructureLearner(km.trace(models.build("plain"), protect=["conv1"]), cost=km.ModelSize())
    structure = km.fit_budget(learner, "70%")
    assert km.FLOPs()(learner) == km.FLOPs()(learner.seed)
    assert km.FLOPs()(learner, structure) == km.FLOPs()(learner.seed, structure)
    assert km.report(learner, structure) == km.report(learner.seed, structure)
    assert km.expand(learner, structure, budget="100%").widths["conv1"] >= structure.widths["conv1"]
    assert km.reach(learner).cost is learner.target_cost
    assert km.prune(learner, "70%").count_params() == km.ModelSize()(learner, structure)


@pytest.mark.once
@pytest.mark.parametrize("budget", ["50%", 5000.0, {km.FLOPs(): "50%"}, "60% FLOPs, 80% ModelSize"])
def test_a_budget_is_a_value_or_what_one_is_made_of(budget):
    model = models.build("plain")
    assert km.fit_budget(model, km.Budget(budget)) == km.fit_budget(model, budget)


@pytest.mark.once
def test_scores_are_an_array_or_a_regularizer():
    model = models.build("plain")
    graph = km.trace(model)
    scores = np.random.default_rng(0).random(graph.num_groups)
    structure = km.fit_budget(graph, "60%", scores=scores)
    assert (
        structure
        == km.fit_budget(model, "60%", scores=scores)
        == km.fit_budget(km.StructureLearner(model), "60%", scores=scores)
    )
    assert structure != km.fit_budget(graph, "60%", scores=-scores)
    with pytest.raises(km.KerasMorphError, match="one per group"):
        km.fit_budget(graph, "60%", scores=scores[1:])
    scores[:] = np.nan
    with pytest.raises(km.KerasMorphError, match="finite"):
        km.fit_budget(graph, "60%", scores=scores)


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in km.__all__ if callable(getattr(km, name))])
def test_no_public_function_has_more_than_ten_parameters(name):
    value = getattr(km, name)
    frozen = hasattr(value, "__dataclass_fields__")  # a value's fields are its parameters
    if not frozen and not (inspect.isclass(value) and issubclass(value, Exception)):
        assert len(inspect.signature(value).parameters) <= 10 + inspect.isclass(value)


@pytest.mark.once
def test_prune_reaches_every_option_of_the_budget():
    model = models.build("residual_projection")
    small = km.prune(model, km.Budget("70%", km.ModelSize(), round_to=2, floor=0.0, per_cost=0.5))
    assert small.count_params() <= 0.7 * model.count_params()
    assert all(
        width % 2 == 0 or width == km.trace(model).widths[layer] for layer, width in km.trace(small).widths.items()
    )


# shrink


def examples(model, n=32):
    random = np.random.default_rng(0)
    return random.normal(size=(n, *model.input_shape[1:])).astype("float32"), random.integers(
        0, model.output_shape[-1], n
    )


def classifier(width=8):
    image = keras.Input((6, 6, 2))
    x = layers.Conv2D(width, 3, use_bias=False)(image)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(width, 3)(x))
    return keras.Model(image, layers.Dense(3)(x))


def test_shrink_trains_with_what_the_model_was_compiled_with():
    model = classifier()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    result = km.shrink(model, "70%", examples(model), epochs=3, verbose=0, regularizer=km.GroupLasso())
    assert result.learner.loss.from_logits
    assert {"loss", "accuracy"} <= set(result.history[-1])
    small = result.small
    assert small.loss.from_logits


@pytest.mark.once
def test_nobody_guesses_a_loss():
    model = classifier()
    with pytest.raises(km.KerasMorphError, match="not compiled"):
        km.shrink(model, "70%", examples(model), epochs=3)


@pytest.mark.once
def test_labels_that_the_loss_does_not_take_are_named():
    model = models.build("plain")
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = examples(model)
    for labels, wrong in ((y + 30, "3"), (y - 9, "-"), (y + 0.5, "0.5"), (np.array(["a"] * len(y)), "type")):
        with pytest.raises(km.DataError, match=f"class numbers from 0 to .*Received: .*{wrong}"):
            km.shrink(model, "50%", (x, labels), epochs=3)
    for data, received in (((x, y[:-1]), "lengths of"), ((x[:0], y[:0]), "lengths of 0, 0"), (None, "None")):
        with pytest.raises(km.DataError, match=f"data expects.*Received: {received}"):
            km.shrink(model, "50%", data, epochs=3)
    with pytest.raises(km.DataError, match="one-hot"):
        km.shrink(model, "70%", (x, keras.utils.to_categorical(y)), epochs=3)
    with pytest.raises(km.DataError, match="labels belong to it"):
        km.shrink(model, "70%", x, epochs=3)


class Labelled(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.x[index::2], self.y[index::2]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["PyDataset", "tf.data"])
def test_labels_in_the_first_batch_of_a_data_set_are_checked(kind):
    import tensorflow as tf

    model = models.build("plain")
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = examples(model)

    def data_of(labels):
        return Labelled(x, labels) if kind == "PyDataset" else tf.data.Dataset.from_tensor_slices((x, labels)).batch(8)

    for labels, wrong in ((y + 30, "3"), (y + 0.5, "0.5")):
        with pytest.raises(km.DataError, match=f"class numbers from 0 to .*Received: .*{wrong}"):
            km.shrink(model, "50%", data_of(labels), epochs=3)
        with pytest.raises(km.DataError, match="class numbers from 0 to"):
            km.shrink(model, "50%", (x, y), validation_data=data_of(labels), epochs=3)
    with pytest.raises(km.DataError, match="one-hot"):
        km.shrink(model, "70%", data_of(keras.utils.to_categorical(y)), epochs=3)
    assert km.shrink(model, "70%", data_of(y), epochs=3, verbose=0).small.count_params() < model.count_params()


@pytest.mark.usefixtures("uncompiled")
def test_after_several_rounds_structure_and_seed_fit_each_other(tmp_path):
    model = models.build("plain")
    recipe = km.Recipe(epochs=6, rounds=2, loss="mse")
    x, y = examples(model)
    result = km.shrink(
        model, "60%", (x, keras.utils.to_categorical(y, model.output_shape[-1])), recipe=recipe, run=tmp_path / "run",
        regularizer=km.GroupLasso(), verbose=0,
    )  # fmt: skip
    rebuilt = km.rebuild(result.seed, result.structure)
    assert rebuilt.count_params() == result.small.count_params()
    seed = keras.models.load_model(tmp_path / "run" / "seed.keras")
    again = km.rebuild(seed, tmp_path / "run" / "structure.json")
    inputs = models.examples(model)
    assert_equal_outputs(models.outputs(again, inputs), models.outputs(rebuilt, inputs))


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_each_epoch_says_what_a_cut_would_leave_and_the_time_that_is_left():
    model = models.build("plain")
    x, y = examples(model)
    y = keras.utils.to_categorical(y, model.output_shape[-1])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = km.shrink(
            model, "60%", (x, y), recipe=km.Recipe(epochs=6, loss="mse", metrics=[]), regularizer=km.GroupLasso(), verbose=2
        )  # fmt: skip
    lines = said.getvalue().splitlines()
    assert len(lines) == len(result.history)
    assert "a cut by them leaves" in lines[0]
    assert all("left" in line and "loss" in line for line in lines)
    first = result.history[0]
    assert 0 < first["scores_left"] <= 1
    assert sum(km.fit_budget(model, "60%").widths.values()) > 0 < first["channels_after_cut"]


@pytest.mark.once
@pytest.mark.usefixtures("uncompiled")
def test_values_print_on_a_screen():
    seed = models.build("plain")
    seed.compile("sgd", "mse")
    x, y = examples(seed)
    y = keras.utils.to_categorical(y, seed.output_shape[-1])
    result = km.shrink(seed, "60%", (x, y), epochs=3, regularizer=km.GroupLasso(), verbose=0)
    graph = km.trace(km.zoo.build("ResNet50", input_shape=(32, 32, 3), classes=10))
    structure = structures.draw(graph, "half", seed=1)
    for value in (result, graph, structure, km.Budget("50%"), km.Recipe(), km.FLOPs()):
        assert len(repr(value)) <= 400, type(value)
        assert len(str(value).splitlines()) <= 45, type(value)
    for value in (result, graph, structure, km.report(seed, result.small)):
        assert value._repr_html_().startswith("<")


@pytest.mark.once
def test_several_rounds_of_equal_counts_are_refused_before_any_training():
    graph = km.trace(resnext(), grouped="equal")
    before = graph.model.get_weights()
    recipe = km.Recipe(epochs=6, rounds=2, loss="mse")
    with pytest.raises(km.KerasMorphError, match="several rounds"):
        km.shrink(graph, "60%", (np.zeros((4, 6, 6, 3)), np.zeros((4, 3))), recipe=recipe, regularizer=km.GroupLasso())
    for one, other in zip(graph.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.once
def test_a_phase_of_ones_own_goes_between_the_others():
    from keras_morph.pipeline import choose, cut, fade, learn, tune

    seen = []

    def look(progress):
        seen.append((progress.small is None, progress.structure.widths))
        return progress

    model = models.build("plain")
    x, y = examples(model)
    recipe = km.Recipe(epochs=3, loss="mse", metrics=[], phases=(learn, choose, look, fade, cut, tune))
    result = km.shrink(
        model, "60%", (x, keras.utils.to_categorical(y, model.output_shape[-1])), recipe=recipe,
        regularizer=km.GroupLasso(), verbose=0,
    )  # fmt: skip
    assert seen == [(True, result.structure.widths)]
