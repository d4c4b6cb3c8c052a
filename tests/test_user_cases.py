"""What models of users' kinds broke, each as a tiny network: exact, costs agree, and what is free stays free.

"name": (network, layers whose channels must all be free)
"""

import functools
import warnings

import keras
import models
import numpy as np
import pytest
import structures
from exactness import assert_equal_outputs, assert_exact
from keras import layers, ops
from networks import weights_of_steps

import keras_morph as km

pytestmark = [
    pytest.mark.filterwarnings("ignore::keras_morph.UnknownLayerWarning"),
    pytest.mark.filterwarnings("ignore::keras_morph.UncountedLayerWarning"),
    pytest.mark.usefixtures("quick_initializers"),
]

TOKENS = np.array([[1, 2, 0, 0, 0], [3, 1, 2, 4, 0], [2, 2, 2, 2, 2]], "int32")


def embedded(merge, recurrent=layers.LSTM):
    """A masked embedding merged with a branch that may die, and a recurrent layer behind."""

    def network():
        tokens = keras.Input((5,), dtype="int32", name="tokens")
        x = layers.Embedding(5, 4, mask_zero=True, name="embedding")(tokens)
        y = layers.Dense(4, name="branch")(layers.Dense(3, name="hidden")(layers.Embedding(5, 2, name="plain")(tokens)))
        return keras.Model(tokens, layers.Dense(2, name="head")(recurrent(6, name="recurrent")(merge([x, y]))))

    return network


def split():
    """Dense(10) -> Reshape((2, 5)) -> Add with a live branch: the constant differs by position."""
    image = keras.Input((6,), name="features")
    made = layers.Dense(10, activation="softplus", name="made")(
        layers.Dense(4, activation="relu", name="hidden")(image)
    )
    live = layers.Reshape((2, 5))(layers.Dense(10, name="live")(image))
    x = layers.Add()([layers.Reshape((2, 5))(made), live])
    return keras.Model(image, layers.Dense(2, name="head")(layers.Flatten()(x)))


def windows():
    """As in Swin: an axis is moved into the batch, and back."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="stem")(image)
    x = ops.reshape(ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 6)), (0, 1, 3, 2, 4, 5)), (-1, 16, 6))
    x = x + layers.Dense(6, name="out")(layers.Dense(9, activation="gelu", name="in")(x))
    x = ops.transpose(ops.reshape(x, (-1, 2, 2, 4, 4, 6)), (0, 1, 3, 2, 4, 5))
    x = layers.Conv2D(5, 1, name="last")(ops.reshape(x, (-1, 8, 8, 6)))
    return keras.Model(image, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(x)))


def steps_by_hand():
    """TimeDistributed by hand, where the number of steps is that of the features."""
    clip = keras.Input((4, 8, 8, 3), name="clip")
    x = layers.Conv2D(5, 3, activation="relu", name="conv")(ops.reshape(clip, (-1, 8, 8, 3)))
    x = layers.Dense(4, name="vector")(layers.GlobalAveragePooling2D()(x))
    x = layers.GRU(4, name="recurrent")(ops.reshape(x, (-1, 4, 4)))
    return keras.Model(clip, layers.Dense(2, name="head")(x))


def two_sizes():
    """A backbone of unknown size that is called at two resolutions."""
    inside = keras.Input((None, None, 3))
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same", name="conv")(inside))
    backbone = keras.Model(inside, layers.Conv2D(4, 1, name="last")(layers.ReLU()(x)), name="backbone")
    image = keras.Input((8, 8, 3), name="image")
    ends = [layers.GlobalMaxPooling2D()(backbone(x)) for x in (image, layers.AveragePooling2D(2)(image))]
    return keras.Model(image, layers.Dense(2, name="head")(layers.Concatenate()(ends)))


def shared_reshape():
    """One Reshape for two squeeze-and-excitation blocks of different width."""
    image, reshape = keras.Input((8, 8, 3), name="image"), layers.Reshape((1, 1, -1), name="reshape")
    x = image
    for width, name in ((6, "a"), (9, "b")):
        x = layers.Conv2D(width, 3, activation="relu", name=f"conv_{name}")(x)
        gate = layers.Dense(width, activation="sigmoid", name=f"gate_{name}")(layers.GlobalAveragePooling2D()(x))
        x = layers.Multiply()([x, reshape(gate)])
    return keras.Model(image, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(x)))


def odd_names():
    """TensorFlow refuses a colon in the name of a layer with weights, but not in others'."""
    colon = ":" if keras.backend.backend() != "tensorflow" else ">"
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Activation("relu", name="block1:act")(layers.Conv2D(6, 3, name=f"block1{colon}conv")(image))
    x = layers.Concatenate(name="block1:join")([x, layers.Conv2D(4, 3, name="side")(image)])
    return keras.Model(image, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(x)))


def decoder():
    """As in GANs and VAEs: Dense -> Reshape((8, 8, 4)); the model's own channel axis is meant, though 8 is longer."""
    code = keras.Input((6,), name="code")
    x = layers.Reshape((8, 8, 4))(layers.Dense(256, activation="relu", name="project")(code))
    x = layers.Conv2DTranspose(5, 3, strides=2, padding="same", activation="relu", name="up")(x)
    return keras.Model(code, layers.Conv2D(1, 3, padding="same", name="head")(x))


def res2net():
    """Splits that are added up one after the other: an Add that is gone ties nothing."""
    image = keras.Input((6, 6, 3), name="image")
    parts = ops.split(layers.Conv2D(12, 1, activation="relu", name="stem")(image), 3, axis=-1)
    made = [parts[0]]
    for number, part in enumerate(parts[1:]):
        y = part if number == 0 else layers.Add()([part, made[-1]])
        made.append(layers.Conv2D(4, 3, padding="same", activation="relu", name=f"conv{number}")(y))
    x = layers.Conv2D(5, 1, name="merge")(layers.Concatenate()(made))
    return keras.Model(image, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(x)))


def video():
    """TimeDistributed(model)."""
    frame = keras.Input((6, 6, 3))
    x = layers.BatchNormalization()(layers.Conv2D(5, 3, activation="relu", name="conv")(frame))
    backbone = keras.Model(frame, layers.Dense(4, name="vector")(layers.GlobalAveragePooling2D()(x)), name="backbone")
    clip = keras.Input((3, 6, 6, 3), name="clip")
    x = layers.LSTM(6, name="recurrent")(layers.TimeDistributed(backbone, name="frames")(clip))
    return keras.Model(clip, layers.Dense(2, name="head")(x))


def towers():
    """Two towers and a dot product, in two ways."""
    user, item = keras.Input((5,), name="user"), keras.Input((7,), name="item")
    u = layers.Dense(6, name="user_vector")(layers.Dense(8, activation="relu", name="user_hidden")(user))
    v = layers.Dense(6, name="item_vector")(layers.Dense(9, activation="relu", name="item_hidden")(item))
    return keras.Model([user, item], [layers.Dot(axes=1, normalize=True)([u, v]), ops.sum(u * v, -1, keepdims=True)])


def seq2seq():
    """An encoder's states begin a decoder."""
    source, target = keras.Input((5, 3), name="source"), keras.Input((4, 3), name="target")
    encoded, h, c = layers.LSTM(6, return_sequences=True, return_state=True, name="encoder")(source)
    decoded = layers.LSTM(6, return_sequences=True, name="decoder")(target, initial_state=[h, c])
    decoded = layers.Concatenate()([decoded, layers.Attention()([decoded, encoded])])
    return keras.Model([source, target], layers.Dense(2, name="head")(decoded))


def transformer():
    """Attention with a mask and operands by keyword, pre-norm and post-norm: the stream can be narrowed too."""
    tokens, mask = keras.Input((5, 3), name="tokens"), np.tril(np.ones((1, 5, 5), bool))
    x = layers.Dense(8, name="stream")(tokens)
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(3, 4, name="heads")(query=y, value=y, attention_mask=mask)
    y = layers.RMSNormalization()(x)
    x = layers.LayerNormalization()(x + layers.Dense(8, name="out")(layers.Dense(9, activation="gelu", name="in")(y)))
    return keras.Model(tokens, layers.Dense(2, name="head")(layers.LayerNormalization()(x)))


def by_hand(form):
    """Attention written with einsum or matmul."""

    def network():
        tokens = keras.Input((5, 3), name="tokens")
        q, k, v = (layers.Dense(width, name=name)(tokens) for name, width in (("q", 6), ("k", 6), ("v", 7)))
        if form == "einsum":
            weights = ops.softmax(ops.einsum("bqc,bkc->bqk", q, k) / np.sqrt(6))
            x = ops.einsum("bqk,bkc->bqc", weights, v)
        else:
            x = ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1)))), v)
        return keras.Model(tokens, layers.Dense(2, name="head")(x))

    return network


def images(*parts):
    """image(3) -- conv(6) -- what is given -- last(5) -- mean -- head(2)."""

    def network():
        image = keras.Input((8, 8, 3), name="image")
        x = layers.Conv2D(6, 3, padding="same", name="conv")(image)
        for part in parts:
            x = part(x)
        x = layers.Conv2D(5, 1, activation="relu", name="last")(x)
        return keras.Model(image, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(x)))

    return network


def film(x):
    """A vector per example, of fewer axes than what it scales."""
    return layers.Multiply()([x, layers.Dense(6, activation="sigmoid", name="gate")(layers.GlobalMaxPooling2D()(x))])


def pooled_by_attention():
    tokens = keras.Input((5, 3), name="tokens")
    x = layers.LSTM(6, return_sequences=True, name="recurrent")(tokens)
    x = layers.Multiply()([x, weights_of_steps(x, 6)])
    return keras.Model(tokens, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


def masked_steps(recurrent):
    def network():
        steps = keras.Input((5, 3), name="steps")
        x = layers.Dense(4, name="dense")(layers.Masking()(steps))
        return keras.Model(steps, layers.Dense(2, name="head")(recurrent(6, name="recurrent")(x)))

    return network


def joined_embeddings():
    """Their mask is the OR of both."""
    tokens, tags = keras.Input((5,), dtype="int32", name="tokens"), keras.Input((5,), dtype="int32", name="tags")
    x = layers.Concatenate()(
        [layers.Embedding(5, width, mask_zero=True, name=f"e{width}")(each) for each, width in ((tokens, 4), (tags, 3))]
    )
    return keras.Model([tokens, tags], layers.Dense(2, name="head")(layers.GRU(6, name="recurrent")(x)))


def owned_lora():
    features = keras.Input((6,), name="features")
    frozen = layers.Dense(7, name="frozen")
    x = frozen(layers.Dense(5, activation="relu", name="hidden")(features))
    frozen.enable_lora(2)
    return keras.Model(features, layers.Dense(2, name="head")(layers.Dense(4, name="free")(x)))


def activated_by_a_layer():
    """An activation that has weights, which Keras makes when it is called with numbers."""
    features = keras.Input((6,), name="features")
    x = layers.Dense(8, activation=layers.PReLU(), name="learned")(layers.Dense(5, name="hidden")(features))
    model = keras.Model(features, layers.Dense(2, name="head")(layers.Dense(4, name="free")(x)))
    model(np.zeros((1, 6), "float32"))
    return model


def quantized_attention():
    """`quantize` changes the layers that an attention holds, which its config does not say."""
    steps = keras.Input((5, 3), name="tokens")
    x = layers.Dense(4, name="dense")(steps)
    attention = layers.MultiHeadAttention(2, 3, name="heads")
    x = attention(x, x)
    for part in ("query", "key", "value", "output"):
        getattr(attention, f"_{part}_dense").quantize("int8")
    return keras.Model(steps, layers.Dense(2, name="head")(layers.Dense(30, name="free")(x)))


def reflected():
    """Channels that are copies of others stand beside them."""
    steps = keras.Input((5, 3), name="tokens")
    x = ops.pad(layers.Dense(6, name="dense")(steps), [[0, 0], [0, 0], [2, 2]], mode="reflect")
    return keras.Model(steps, layers.Dense(2, name="head")(layers.Dense(5, name="free")(x)))


def stacked_across():
    """Channels of one operand lie along the steps of the other."""
    steps = keras.Input((5, 3), name="tokens")
    x, y = layers.Dense(5, name="one")(steps), layers.Dense(5, name="other")(steps)
    x = ops.mean(ops.stack([x, layers.Permute((2, 1))(y)], axis=1), axis=-1)[:, 0]
    return keras.Model(steps, layers.Dense(2, name="head")(layers.Dense(5, name="free")(x)))


def by_name():
    """A nested model that is called with a dictionary of its inputs' names, in another order than theirs."""
    query, candidate = (keras.Input((4,), name=name) for name in ("query", "candidate"))
    towers = [layers.Dense(6, name="one")(query), layers.Dense(6, name="other")(candidate)]
    inside = keras.Model([query, candidate], layers.Concatenate()(towers), name="inside")
    x = keras.Input((5,), name="features")
    given = {"candidate": layers.Dense(4, name="c")(x), "query": layers.Dense(4, name="q")(x)}
    return keras.Model(x, layers.Dense(2, name="head")(inside(given)))


def shared_over_time():
    """An encoder of each step and of a still."""
    image = keras.Input((6, 6, 3))
    y = layers.GlobalMaxPooling2D()(layers.Conv2D(8, 3, activation="relu", name="conv")(image))
    encoder = keras.Model(image, layers.Dense(5, name="vector")(y), name="encoder")
    clip, still = keras.Input((3, 6, 6, 3), name="clip"), keras.Input((6, 6, 3), name="still")
    steps = layers.GRU(4, name="recurrent")(layers.TimeDistributed(encoder)(clip))
    return keras.Model([clip, still], layers.Dense(2, name="head")(layers.Concatenate()([steps, encoder(still)])))


def filled_in():
    """One number per channel where a mask of one channel says so."""
    tokens = keras.Input((6, 3), name="tokens")
    x = ops.where(tokens[..., :1] > 0, layers.Dense(8, name="free")(tokens), np.arange(8.0, dtype="float32"))
    return keras.Model(tokens, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


def folded_twice():
    """One Add for two sums, each with a constant where its branch is gone."""
    x, add = keras.Input((5,), name="features"), layers.Add(name="add")
    gone = layers.Dense(4, activation="softplus", name="gone")(x)
    a = layers.ReLU()(add([layers.Dense(6, activation="tanh", name="p")(gone), layers.Dense(6, name="q")(x)]))
    b = add([layers.Dense(6, activation="sigmoid", name="r")(gone), layers.Dense(6, name="s")(a)])
    return keras.Model(x, layers.Dense(2, name="head")(b))


def squared():
    """An activation that is a function of the user's own: its layer keeps its channels, the others lose theirs."""
    x = keras.Input((5,), name="features")
    y = layers.Dense(6, name="free")(layers.Dense(8, activation=lambda t: ops.square(ops.relu(t)), name="own")(x))
    return keras.Model(x, layers.Dense(2, name="head")(y))


@keras.saving.register_keras_serializable("tests")
class TiedHead(layers.Layer):
    """Logits by the transposed table of an embedding that it holds, in a list too."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding, self.tables = embedding, [embedding]

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.tables[0].embeddings))

    def get_config(self):
        return {**super().get_config(), "embedding": keras.saving.serialize_keras_object(self.embedding)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("embedding")), **config)


def tied_head():
    """Language models' tied embedding: the head, whose rule nobody knows, holds the layer that makes its input."""
    tokens, embedding = keras.Input((5,), dtype="int32", name="tokens"), layers.Embedding(5, 4, name="embedding")
    x = embedding(tokens)
    x = x + layers.Dense(4, name="out")(layers.Dense(19, activation="relu", name="in")(x))
    return keras.Model(tokens, TiedHead(embedding, name="head")(x))


def tied_head_first():
    """The same head in front of the embedding that it holds, which a model nested behind calls."""
    x, tokens = keras.Input((4,), name="features"), keras.Input((5,), dtype="int32", name="tokens")
    embedding, inner = layers.Embedding(5, 4, name="embedding"), keras.Input((5,), dtype="int32")
    inside = keras.Model(inner, embedding(inner), name="inside")
    logits = TiedHead(embedding, name="logits")(layers.Dense(4, name="out")(layers.Dense(29, name="free")(x)))
    return keras.Model(
        [x, tokens], [logits, layers.Dense(2, name="head")(layers.GRU(6, name="recurrent")(inside(tokens)))]
    )


def one_layer_over_two_lengths():
    """Two TimeDistributed around one layer, and that layer by itself: one weight, of which each keeps the same channels."""
    long, short, one = (
        keras.Input((5, 3), name="long"),
        keras.Input((2, 3), name="short"),
        keras.Input((3,), name="one"),
    )
    shared = layers.Dense(8, activation="relu", name="shared")
    steps = [layers.TimeDistributed(shared, name=name)(x) for name, x in (("t", long), ("u", short))]
    pooled = [layers.GlobalAveragePooling1D()(x) for x in steps]
    x = layers.Concatenate()([layers.Dense(5, name="p")(pooled[0]), layers.Dense(6, name="q")(pooled[1]), shared(one)])
    return keras.Model([long, short, one], layers.Dense(2, name="head")(x))


def reshapes_by_default_names():
    """One Reshape for two tensors, which may keep different counts, beside another that Keras has called `reshape_1`."""
    x, shared = keras.Input((5,)), layers.Reshape((2, 8), name="reshape")
    a, b = (shared(layers.Dense(16, name=name)(x)) for name in "ab")
    c = layers.Reshape((4, 2), name="reshape_1")(layers.Dense(8, name="c")(x))
    return keras.Model(x, [layers.Dense(3, name=f"head_{name}")(y) for name, y in zip("abc", (a, b, c), strict=True)])


CASES = {
    "add of a mask": (embedded(layers.Add()), ["recurrent"]),
    "average of a mask": (embedded(layers.Average()), ["recurrent"]),
    "ops.concatenate of a mask": (embedded(lambda x: ops.concatenate(x, axis=-1), layers.GRU), ["branch", "recurrent"]),
    "ops.add of a mask": (embedded(lambda x: ops.add(*x)), ["branch", "embedding", "recurrent"]),
    "maximum of a mask": (embedded(layers.Maximum(), layers.SimpleRNN), ["recurrent"]),
    "multiply of a mask": (embedded(layers.Multiply(), layers.GRU), ["recurrent"]),
    "subtract of a mask": (embedded(layers.Subtract()), ["recurrent"]),
    "mean over a masked product": (embedded(layers.Multiply(), lambda *_, name: layers.GlobalAveragePooling1D()), []),
    "reshape that splits": (split, ["made", "live", "hidden"]),
    "windows in the batch": (windows, ["stem", "in", "last"]),
    "steps in the batch": (steps_by_hand, ["conv", "vector", "recurrent"]),
    "two sizes": (two_sizes, ["backbone/conv", "backbone/last"]),
    "shared reshape": (shared_reshape, ["conv_a", "gate_a", "conv_b", "gate_b"]),
    "reshapes by default names": (reshapes_by_default_names, ["a", "b", "c"]),
    "odd names": (odd_names, ["side"]),
    "decoder": (decoder, ["project", "up"]),
    "res2net": (res2net, ["stem", "conv0", "conv1", "merge"]),
    "video": (video, ["frames/conv", "frames/vector", "recurrent"]),
    "two towers": (towers, ["user_hidden", "user_vector", "item_hidden", "item_vector"]),
    "seq2seq": (seq2seq, ["encoder", "decoder"]),
    "transformer": (transformer, ["stream", "heads", "in", "out"]),
    "attention by einsum": (by_hand("einsum"), ["q", "k", "v"]),
    "attention by matmul": (by_hand("matmul"), ["q", "k", "v"]),
    "attention pooling": (pooled_by_attention, ["recurrent"]),
    "masked steps, LSTM": (masked_steps(layers.LSTM), ["dense", "recurrent"]),
    "masked steps, GRU": (masked_steps(layers.GRU), ["dense", "recurrent"]),
    "joined embeddings": (joined_embeddings, ["e4", "e3", "recurrent"]),
    "operands of fewer axes": (images(film), ["conv", "gate", "last"]),
    "relu as a function": (images(keras.activations.relu), ["conv", "last"]),
    "instance normalization": (images(layers.GroupNormalization(-1)), ["conv", "last"]),
    "groups normalized": (images(layers.GroupNormalization(3)), ["conv", "last"]),
    "unit normalization": (images(layers.UnitNormalization()), ["conv", "last"]),
    "augmentation inside": (images(layers.RandomFlip(), layers.RandomRotation(0.1)), ["conv", "last"]),
    "pooling by functions": (
        images(
            lambda x: ops.max_pool(x, 2, 2),
            lambda x: ops.average_pool(x, 2, 2),
            lambda x: ops.image.resize(x, (6, 6)),
        ),
        ["conv", "last"],
    ),
    "other functions": (
        images(
            lambda x: ops.where(x > 0, x, 0.1 * x),
            lambda x: ops.roll(x, 1, axis=1),
            lambda x: ops.logaddexp(x, ops.cumsum(x, axis=2)),
            lambda x: ops.glu(layers.Conv2D(8, 1, name="twice")(ops.tile(x, (1, 1, 2, 1)))),
        ),
        ["conv", "twice", "last"],
    ),
    "statistics over channels": (
        images(lambda x: x * ops.mean(x, -1, keepdims=True) + ops.max(x, -1, keepdims=True)),
        ["conv", "last"],
    ),
    "lora": (owned_lora, ["free"]),
    "an activation with weights": (activated_by_a_layer, ["free"]),
    "quantized attention": (quantized_attention, ["free"]),
    "padding by reflection": (reflected, ["free"]),
    "stacked across axes": (stacked_across, ["free"]),
    "inputs by name": (by_name, ["inside/one", "inside/other", "c", "q"]),
    "shared over time": (shared_over_time, ["recurrent"]),
    "filled in": (filled_in, ["free"]),
    "folded twice": (folded_twice, ["gone", "p", "s"]),
    "an activation of one's own": (squared, ["free"]),
    "a tied head": (tied_head, ["in"]),
    "a tied head in front": (tied_head_first, ["free", "recurrent"]),
    "one layer over two lengths": (one_layer_over_two_lengths, ["t", "p", "q"]),
    "moments": (images(lambda x: x - ops.moments(x, axes=1, keepdims=True)[0]), ["conv", "last"]),
}


def example(model):
    """Inputs with tokens, padded at the end, and steps that are masked."""

    def one(tensor):
        if "int" in tensor.dtype:
            return TOKENS
        values = np.random.default_rng(0).normal(0, 1, (3, *tensor.shape[1:])).astype("float32")
        if tensor.name == "steps":
            values *= TOKENS[..., None] > 0
        return values

    return keras.tree.map_structure(one, model.input)


@functools.cache
def build(name):
    """A network with random weights; built once, so leave its weights alone."""
    return models.randomize(CASES[name][0](), seed=1)


@pytest.fixture(params=CASES)
def case(request):
    return build(request.param), CASES[request.param][1]


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kind", structures.KINDS)
def test_it_is_exact_and_its_costs_agree(case, kind):
    model, _ = case
    graph = km.trace(model)
    structure = structures.draw(graph, kind, seed=1)
    small = assert_exact(model, structure, inputs=example(model))
    for cost in (km.FLOPs(), km.ModelSize(), km.Activations(), km.Latency("V100")):
        np.testing.assert_allclose(cost(graph, structure), cost(small), rtol=1e-12, err_msg=repr(cost))
    np.testing.assert_equal(km.ModelSize()(graph, structure), small.count_params())


@(pytest.mark.slow if keras.backend.backend() != "tensorflow" else lambda test: test)
def test_a_tight_budget_is_exact(case):
    model, _ = case
    structure = km.fit_budget(model, "65% ModelSize")
    assert km.ModelSize()(model, structure) <= 0.65 * model.count_params()
    assert_exact(model, structure, inputs=example(model))


@pytest.mark.parametrize("name", ["a tied head", "a tied head in front", "one layer over two lengths"])
def test_copies_hold_one_layer_where_the_seed_does(name):
    model = build(name)
    structure = km.fit_budget(model, "70% ModelSize")
    small, masked = km.rebuild(model, structure), km.masked(model, structure)
    assert masked.count_params() == model.count_params() > small.count_params()
    assert len(small.trainable_weights) == len(model.trainable_weights)


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.Layer):
    """What a layer that it holds makes, times a weight and a factor that its config does not tell."""

    def __init__(self, layer=None, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.factor = layer, factor

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return (x if self.layer is None else self.layer(x)) * self.scale * self.factor

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("layer")), **config)


@pytest.mark.parametrize("first", [False, True])
def test_a_nested_model_that_an_unknown_layer_holds_too_is_one_in_copies(first):
    inside = keras.Sequential(
        [keras.Input((8,)), layers.Dense(6, "tanh", name="a"), layers.Dense(8, name="b")], name="inside"
    )
    x, unknown = keras.Input((5,), name="features"), Scaled(inside, name="unknown")
    y = layers.Dense(8, name="stem")(x)
    y = unknown(inside(y)) if first else inside(unknown(y))
    model = models.randomize(keras.Model(x, layers.Dense(2, name="head")(layers.Dense(40, name="free")(y))), seed=1)
    structure = km.fit_budget(model, "80% ModelSize")
    small = assert_exact(model, structure, inputs=example(model))
    assert small.count_params() == km.ModelSize()(model, structure) < model.count_params()
    assert km.masked(model, structure).count_params() == model.count_params()


def test_settings_that_a_config_does_not_tell_are_kept():
    x = keras.Input((5,), name="features")
    model = keras.Model(x, layers.Dense(2)(Scaled(factor=3.0)(layers.Dense(8, "relu")(x))))
    whole = km.rebuild(model, km.Structure.closed(km.trace(model), np.ones(km.trace(model).num_groups, bool)))
    values = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    np.testing.assert_allclose(whole.predict(values, verbose=0), model.predict(values, verbose=0), rtol=1e-5)


class Mixed(layers.Layer):
    """Two branches with factors in a list, which may be changed between two traces."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b, self.factors = layers.Dense(8), layers.Dense(8), [1.0, 2.0]

    def call(self, x):
        return self.a(x["x"]) * self.factors[0] + self.b(x["y"]) * self.factors[1]


def test_a_recording_follows_what_its_layer_keeps_in_lists_and_not_the_order_of_names():
    x, mixed = keras.Input((6,), name="features"), Mixed()
    made = mixed({"y": mixed({"x": x, "y": x})[:, :6], "x": x})
    model = keras.Model(x, layers.Dense(2, name="head")(made))
    assert not any("two ways" in reason for reason in km.trace(model).pinned.values())
    mixed.factors[1] = 5.0
    values = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    graph = km.trace(model)
    whole = km.rebuild(graph, km.Structure.closed(graph, np.ones(graph.num_groups, bool)))
    expected = mixed({"y": mixed({"x": values, "y": values})[:, :6], "x": values})
    expected = keras.ops.convert_to_numpy(model.get_layer("head")(expected))
    np.testing.assert_allclose(whole.predict(values, verbose=0), expected, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_one_by_one_is_frozen_in_copies():
    x = keras.Input((6,), name="features")
    dense = [layers.Dense(8, name=name) for name in "abc"]
    y = dense[2](dense[1](dense[0](x)))
    model = keras.Model(x, layers.Dense(2, name="head")(y))
    dense[1].enable_lora(2)
    dense[2].bias.trainable = False
    structure = km.fit_budget(model, "70%")
    learns = [
        [weight.path for weight in each.trainable_weights]
        for each in (model, km.rebuild(model, structure), km.masked(model, structure))
    ]
    assert learns[0] == learns[1] == learns[2]
    assert not {"b/kernel", "c/bias"} & set(learns[0])


@pytest.mark.once
def test_what_can_be_free_is_free(case):
    model, free = case
    graph = km.trace(model)
    for layer in graph.layers:
        if layer.name in free:
            reasons = {graph.pinned[g] for g in graph.group_of[layer.made].tolist() if g in graph.pinned}
            assert not reasons, (layer.name, reasons)
    assert set(free) <= set(graph.widths)


# Costs of what is not followed, by hand.


def wrapped():
    """TimeDistributed around a layer that has no row: 5 steps x 36 positions x 9 x 3 x 4, and the head."""

    @keras.saving.register_keras_serializable("user_cases")
    class Own(layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.conv = layers.Conv2D(4, 3, padding="same")

        def build(self, shape):
            self.conv.build(shape)
            self.built = True

        def call(self, x, training=None):
            return self.conv(x) * (2.0 if training else 1.0)

        def compute_output_shape(self, shape):
            return (*shape[:-1], 4)

    clip = keras.Input((5, 6, 6, 3))
    return keras.Model(clip, layers.TimeDistributed(Own())(clip))


def lora():
    """8 x 5 and 5 x 8 at full width, and two narrow products of rank 2 beside the second."""
    features = keras.Input((8,))
    x = layers.Dense(5)(features)
    dense = layers.Dense(8)
    x = dense(x)
    dense.enable_lora(2)
    return keras.Model(features, x)


def quantized():
    features = keras.Input((8,))
    dense = layers.Dense(5)
    x = dense(features)
    model = keras.Model(features, layers.Dense(3)(x))
    dense.quantize("int8")
    return model


def masked_lstm():
    """4 steps x (3 x 4 x 6 + 6 x 4 x 6)."""
    steps = keras.Input((4, 3))
    return keras.Model(steps, layers.LSTM(6)(layers.Masking()(steps)))


def larger_batches(grow):
    """6 x 8 behind what enlarges the batch."""

    def network():
        features = keras.Input((6,))
        return keras.Model(features, layers.Dense(8)(grow(features)))

    return network


FIXED = [
    (larger_batches(lambda x: ops.repeat(x, 3, axis=0)), 3 * 2 * 6 * 8),
    (larger_batches(lambda x: ops.tile(x, (3, 1))), 3 * 2 * 6 * 8),
    (larger_batches(lambda x: ops.take(x, [0, 0, 0], axis=0)), 3 * 2 * 6 * 8),
    (larger_batches(lambda x: ops.concatenate([x, -x], axis=0)), 2 * 2 * 6 * 8),
    (larger_batches(lambda x: layers.Concatenate(axis=0)([x, ops.repeat(x, 2, axis=0)])), 3 * 2 * 6 * 8),
    (wrapped, 2 * 5 * 36 * 9 * 3 * 4),
    (lora, 2 * (8 * 5 + 5 * 8 + 5 * 2 + 2 * 8)),
    (quantized, 2 * (8 * 5 + 5 * 3)),
    (masked_lstm, 2 * 4 * (3 * 24 + 6 * 24)),
]


@pytest.mark.parametrize(("network", "flops"), FIXED)
def test_what_is_not_followed_is_a_fixed_cost(network, flops):
    with warnings.catch_warnings():
        warnings.simplefilter("error", km.UncountedLayerWarning)
        np.testing.assert_equal(km.FLOPs()(network()), flops)


class Opaque(layers.Layer):
    """What it computes goes through NumPy."""

    def call(self, x):
        return ops.convert_to_tensor(2 * ops.convert_to_numpy(x))

    def compute_output_shape(self, shape):
        return shape


def test_what_cannot_be_counted_is_named_wherever_a_cost_is_shown():
    image = keras.Input((6, 6, 3))
    x = Opaque(name="mystery")(layers.Conv2D(4, 3, name="conv")(image))
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)), name="mysterious")
    with pytest.warns(km.UncountedLayerWarning, match=r"FLOPs of mysterious leaves out mystery \(Opaque\)"):
        km.FLOPs()(model)
    report = km.report(model, structures.whole(model))
    assert report.uncounted == ("mystery (Opaque)",)
    for text in (report.text(), report.markdown(), report.html()):
        assert "mystery (Opaque)" in text


def test_of_many_layers_that_cannot_be_counted_eight_are_named():
    x = image = keras.Input((6, 6, 3))
    for number in range(10):
        x = Opaque(name=f"mystery{number}")(x)
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(x)), name="mysteries")
    with pytest.warns(km.UncountedLayerWarning, match=r"mystery7 \(Opaque\) and 2 more: what they compute"):
        km.FLOPs()(model)


@pytest.mark.only_on("tensorflow", "torch")  # JAX has no float64 unless it is switched on for all
def test_constants_that_are_folded_in_float64_layers_keep_their_digits():
    """Keras's default stays float32; only the layers are float64."""

    def typed(kind, *args, **options):
        return kind(*args, dtype="float64", **options)

    image = keras.Input((6, 6, 3), dtype="float64", name="image")
    stem = typed(layers.Conv2D, 4, 1, name="stem")(image)
    branch = typed(layers.Conv2D, 4, 1, activation="tanh", name="branch")(
        typed(layers.Conv2D, 5, 1, name="dead")(image)
    )
    x = ops.maximum(typed(layers.Add)([stem, branch]) * branch, branch)
    x = typed(layers.Dense, 2, name="head")(typed(layers.GlobalAveragePooling2D)(x))
    model = models.randomize(keras.Model(image, x), seed=1)
    graph = km.trace(model)
    dead = next(layer.made for layer in graph.layers if layer.name == "dead")
    alive = np.ones(graph.num_groups, bool)
    alive[graph.group_of[dead]] = False
    inputs = np.random.default_rng(0).normal(0, 1, (3, 6, 6, 3))
    structure = km.Structure.closed(graph, alive)
    ours, expected = (models.outputs(each(model, structure), inputs) for each in (km.rebuild, km.masked))
    assert expected[0].dtype == np.float64
    assert_equal_outputs(ours, expected, 1e-13)


@pytest.mark.parametrize("scale", [[1.0, 2.0, 3.0, 4.0], np.array([1.0, 2.0, 3.0, 4.0], "float32")])
def test_a_scale_per_channel_is_narrowed_where_channels_come_first(scale):
    """Keras reshapes it itself, to one number per channel and image."""
    before = keras.config.image_data_format()
    try:
        keras.config.set_image_data_format("channels_first")
        image = keras.Input((3, 6, 6), name="image")
        x = layers.Conv2D(4, 1, name="conv", data_format="channels_last")(layers.Permute((2, 3, 1))(image))
        x = layers.Permute((3, 1, 2))(x)
        x = layers.Rescaling(scale, name="rescaling")(x)
        model = keras.Model(image, layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(x)))
        model = models.randomize(model, seed=1)
        small = assert_exact(model, {"conv": 2}, inputs=example(model))
    finally:
        keras.config.set_image_data_format(before)
    assert small.get_layer("conv").filters == 2


def test_counts_name_only_layers_that_are_narrowed():
    with pytest.raises(km.StructureMismatchError, match="names the layer 'learned', that is not narrowed"):
        km.rebuild(build("an activation with weights"), {"learned": 3})


def test_what_is_quantized_inside_a_layer_is_rebuilt_as_it_is():
    """The masked seed shares it with the rebuilt model, so that it is held against the seed."""
    model = build("quantized attention")
    graph = km.trace(model)
    whole = km.rebuild(model, km.Structure.closed(graph, np.ones(graph.num_groups, bool)))
    assert_equal_outputs(models.outputs(whole, example(model)), models.outputs(model, example(model)))


def test_a_row_of_a_users_class_has_to_name_all_of_its_weights():
    """Layers inside that have no weights do no harm, built or not."""

    class Padded(layers.Conv2D):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.pad = layers.ZeroPadding2D()

        def call(self, x):
            return super().call(self.pad(x))

        def compute_output_shape(self, shape):
            return super().compute_output_shape(self.pad.compute_output_shape(shape))

    class Scaled(layers.Conv2D):
        def build(self, shape):
            super().build(shape)
            self.scale = self.add_weight(shape=(self.filters,), initializer="ones", name="scale")

        def call(self, x):
            return super().call(x) * self.scale

    for kind in (Padded, Scaled):
        km.register_rule(kind, like=layers.Conv2D)
    model = images(lambda x: Padded(4, 3, name="padded")(x), lambda x: Scaled(5, 3, name="scaled")(x))()
    model = models.randomize(model, seed=1)
    widths = km.trace(model).widths
    assert "padded" in widths
    assert "scaled" not in widths
    assert_exact(model, {"conv": 3, "last": 2})
