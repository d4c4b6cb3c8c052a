"""What works on all channels at once is given the values of the dead ones: where these are not what they seem.

image(6, 6, 3) -- conv(5) -- what is given -- mean over channels        `image`
vector(4) --+-- a(6), 0 where dead ----+-- what is given                 `vector`
            +-- b(6), 0.5 where dead --+
"""

import functools

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_exact
from keras import layers, ops
from laws.test_costs_agree import assert_costs_agree

import keras_morph as km
from keras_morph.layers.rules import TABLE

pytestmark = pytest.mark.usefixtures("quick_initializers")

POSITIONS = np.arange(36, dtype="float32").reshape(6, 6, 1)


def mean(x):
    return ops.mean(x, axis=-1)


def image(part):
    def network():
        x = keras.Input((6, 6, 3))
        return keras.Model(x, mean(part(layers.Conv2D(5, 3, padding="same", name="conv")(x))))

    return network


def vector(part):
    def network():
        x = keras.Input((4,))
        a = layers.Dense(6, name="a")(x)
        b = layers.Dense(6, activation="sigmoid", name="b")(x)
        return keras.Model(x, part(a, b))

    return network


def steps(part, length=7):
    def network():
        x = keras.Input((length, 4))
        return keras.Model(x, part(x))

    return network


def nested(part):
    x = keras.Input((6,))
    return keras.Model(x, part(x))


def both(model, a, b):
    return layers.Dense(3)(layers.Concatenate()([model(a), model(b)]))


class Block(layers.Layer):
    """A layer made of layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm, self.dense = layers.LayerNormalization(), layers.Dense(6, activation="sigmoid")

    def call(self, x):
        return self.dense(self.norm(x))


def timed(a, b):
    model = layers.TimeDistributed(nested(lambda x: layers.Dense(5)(layers.LayerNormalization()(x))))
    twice = layers.RepeatVector(2)
    return layers.Concatenate()([model(twice(a)), model(twice(b))])


def normalized_inside():
    inner = keras.Input((5, 4))
    model = keras.Model(inner, layers.BatchNormalization()(layers.Dense(6, name="d")(inner)))
    outer = keras.Input((3, 5, 4))
    return keras.Model(outer, mean(layers.TimeDistributed(model, name="t")(outer)))


def shared_reshape():
    """Its first call cannot be followed, its second one can."""
    x = keras.Input((3,))
    a = layers.Dense(6)(layers.Reshape((4, 6))(layers.Dense(24)(x)))
    b = layers.Dense(4, name="q")(layers.Reshape((6, 4))(layers.Dense(24)(x)))
    reshape = layers.Reshape((6, 4))
    return keras.Model(x, [layers.Dense(3)(layers.Flatten()(reshape(a))), layers.Dense(3)(reshape(b))])


def scores_of_heads(attention):
    def part(x):
        y, scores = attention(x, x, return_attention_scores=True)
        return [layers.Dense(2)(y), ops.mean(scores, axis=1)]

    return part


def late_step(x):
    return mean(layers.BatchNormalization()(layers.Dense(6)(x))[:, 40])


def over_examples():
    x = keras.Input((4,))
    return keras.Model(x, mean(ops.softmax(layers.Dense(6, name="d")(x), axis=0)))


def array_beside():
    x = keras.Input((4,), batch_size=4)
    return keras.Model(x, layers.Dense(3)(ops.concatenate([layers.Dense(6)(x), np.ones((4, 2), "float32")], axis=-1)))


CASES = {
    # One copy of what is shared serves calls whose dead channels differ only if nothing of them is in it.
    "shared normalization": vector(
        lambda a, b: both(nested(lambda x: layers.Dense(5)(layers.LayerNormalization()(x))), a, b)
    ),
    "shared mean": vector(lambda a, b: [layers.Dense(2)(a + 1 * b), *map(nested(mean), (a, b))]),
    "shared gather": vector(lambda a, b: both(nested(lambda x: ops.take(x, [0, 2, 4, 1, 3, 5], axis=-1)), a, b)),
    "shared activation": vector(lambda a, b: both(nested(layers.ReLU()), a, b)),
    "shared block": vector(lambda a, b: both(Block(), a, b)),
    "block of a block": vector(lambda a, b: (block := Block())(block(a))),
    "shared TimeDistributed": vector(timed),
    "shared RMSNormalization": vector(lambda a, b: both(layers.RMSNormalization(), a, b)),
    "shared reshape": shared_reshape,
    "normalized at each step": normalized_inside,
    # A dead head attends to all positions alike.
    "scores of heads": steps(scores_of_heads(layers.MultiHeadAttention(4, 3, name="heads"))),
    "scores of grouped heads": steps(scores_of_heads(layers.GroupQueryAttention(3, 4, 2, name="heads"))),
    # Arguments say whether zero stays zero.
    # What works at full width keeps its own epsilon, and what it makes has layers of its own only once.
    "full width with a large epsilon": vector(lambda a, b: layers.Dense(3)(layers.RMSNormalization(epsilon=0.5)(b))),
    "one model at two widths": vector(lambda a, b: both(nested(layers.Dense(4)), a, layers.RMSNormalization()(b))),
    "normalized without scale": image(layers.LayerNormalization(scale=False)),
    "group normalized without scale": image(layers.GroupNormalization(1, scale=False)),
    "neither scale nor shift": image(layers.LayerNormalization(scale=False, center=False)),
    "padded with ones": image(lambda x: ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=1.0)),
    "threshold and slope": image(layers.ReLU(negative_slope=0.1, threshold=1.0)),
    "maximum of nothing": image(lambda x: ops.max(x, axis=1, initial=1.0)),
    "minimum of nothing": image(lambda x: ops.min(x, axis=1, initial=-1.0)),
    "resized with a frame": image(lambda x: ops.image.resize(x, (8, 12), pad_to_aspect_ratio=True, fill_value=2.0)),
    "resizing with a frame": image(layers.Resizing(8, 12, pad_to_aspect_ratio=True, fill_value=2.0)),
    # Arrays beside the operand.
    "add of positions": image(lambda x: layers.Add()([x, ops.convert_to_tensor(POSITIONS[None])])),
    "maximum of channels": image(lambda x: layers.Maximum()([x, 0.7 * ops.ones((1, 1, 1, 5))])),
    "offset of positions": image(layers.Rescaling(1.0, offset=POSITIONS.tolist())),
    "clipped by arrays": image(lambda x: ops.clip(x, np.linspace(-1, 0.5, 5).astype("float32"), 5.0)),
    "an array beside": array_beside,
    # What a softmax makes of a constant depends on how many there are.
    "softmax over unknown steps": steps(lambda x: mean(ops.softmax(layers.Dense(6)(x), axis=1)), None),
    "Softmax over unknown steps": steps(lambda x: mean(layers.Softmax(axis=1)(layers.Dense(6)(x))), None),
    "softmax over examples": over_examples,
    "a late step": steps(late_step, None),
    "statistics of the batch": image(lambda x: layers.BatchNormalization()(x, training=True)),
}


def example(name, model):
    if name == "a late step":
        return np.random.default_rng(0).normal(size=(3, 50, 4)).astype("float32")
    return models.examples(model)


@functools.cache
def build(name):
    """Built once, so leave its weights alone."""
    return models.randomize(CASES[name](), seed=1)


@pytest.mark.one_of(2)
@pytest.mark.parametrize(("kind", "seed"), [("half", 1), ("half", 2), ("one_layer_dead", 1), ("everything_dead", 1)])
@pytest.mark.parametrize("name", CASES)
def test_it_is_exact_and_the_seed_is_left_alone(name, kind, seed):
    model = build(name)
    with models.weights_stay(model):
        graph = km.trace(model)
        structure = structures.draw(graph, kind, seed=seed)
        assert_exact(model, structure, inputs=example(name, model))
        if None not in model.input_shape[1:]:
            assert_costs_agree(graph, structure)


class Shift(layers.Layer):
    """Not zero at zero, other than the class that it is likened to."""

    def call(self, x):
        return x + 1.0


def test_a_likeness_does_not_say_what_becomes_of_zeros(monkeypatch):
    monkeypatch.setitem(TABLE, Shift, None)  # gone after the test
    km.register_rule(Shift, like=layers.ReLU)
    model = models.randomize(image(lambda x: layers.LayerNormalization()(Shift()(x)))(), seed=1)
    assert_exact(model, structures.draw(km.trace(model), "half", seed=1))
