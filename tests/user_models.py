"""Forty small Keras 3 models, each in the style of the people who use that kind."""

import math

import keras
import numpy as np
from keras import initializers, layers, ops, regularizers

register = keras.saving.register_keras_serializable("user_models")

# What to feed the inputs that are not plain normal floats, by input name.
#   ("ids", n)      integers 0..n-1
#   ("tokens", n)   integers 1..n-1, zero padded at the end
#   ("mask",)       True for the real positions, False for the padding
#   ("adjacency",)  symmetric 0/1 matrix
#   ("image",)      0..255
#   ("unit",)       0..1
INPUT_KINDS = {}
# The size for each unknown axis, by model name (axis -> size).
UNKNOWN_SIZES = {}


# --------------------------------------------------------------------------
# 1. Attention U-Net
# --------------------------------------------------------------------------


def _conv_bn_relu(x, filters, name):
    for i in (1, 2):
        x = layers.Conv2D(
            filters,
            3,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"{name}-conv{i}",
        )(x)
        x = layers.BatchNormalization(name=f"{name}-bn{i}")(x)
        x = layers.Activation("relu", name=f"{name}-relu{i}")(x)
    return x


def _attention_gate(skip, gating, inter, name):
    theta = layers.Conv2D(inter, 2, strides=2, padding="same", use_bias=False, name=name + "-theta")(skip)
    phi = layers.Conv2D(inter, 1, name=name + "-phi")(gating)
    f = layers.Activation("relu", name=name + "-f")(layers.add([theta, phi]))
    psi = layers.Conv2D(1, 1, activation="sigmoid", name=name + "-psi")(f)
    alpha = layers.UpSampling2D(2, interpolation="bilinear", name=name + "-alpha")(psi)
    return layers.multiply([alpha, skip], name=name + "-gated")


def attention_unet():
    """Attention U-Net for binary organ segmentation, as medical imaging labs use it."""
    inputs = keras.Input((32, 32, 1), name="ct_slice")
    e1 = _conv_bn_relu(inputs, 4, "enc1")
    e2 = _conv_bn_relu(layers.MaxPooling2D()(e1), 8, "enc2")
    e3 = _conv_bn_relu(layers.MaxPooling2D()(e2), 12, "enc3")
    b = _conv_bn_relu(layers.MaxPooling2D()(e3), 16, "bridge")
    b = layers.SpatialDropout2D(0.2)(b)

    x = b
    for skip, filters, i in ((e3, 12, 3), (e2, 8, 2), (e1, 4, 1)):
        gated = _attention_gate(skip, x, filters // 2, f"gate{i}")
        x = layers.Conv2DTranspose(filters, 2, strides=2, padding="same", name=f"up{i}->dec{i}")(x)
        x = layers.concatenate([x, gated], axis=-1)
        x = _conv_bn_relu(x, filters, f"dec{i}")
    outputs = layers.Conv2D(1, 1, activation="sigmoid", name="organ")(x)
    return keras.Model(inputs, outputs, name="attention_unet")


# --------------------------------------------------------------------------
# 2. DeepLabV3+
# --------------------------------------------------------------------------


def _deeplab_block(block_input, num_filters=8, kernel_size=3, dilation_rate=1, use_bias=False):
    x = layers.Conv2D(
        num_filters,
        kernel_size=kernel_size,
        dilation_rate=dilation_rate,
        padding="same",
        use_bias=use_bias,
        kernel_initializer=keras.initializers.HeNormal(),
    )(block_input)
    x = layers.BatchNormalization()(x)
    return ops.nn.relu(x)


def deeplab_v3_plus():
    """DeepLabV3+ with a multi-output nested backbone, for street scene segmentation (keras.io style)."""
    stem_in = keras.Input(shape=(32, 32, 3))
    y = layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False)(stem_in)
    y = layers.BatchNormalization()(y)
    y = layers.ReLU(max_value=6.0)(y)
    low = layers.SeparableConv2D(8, 3, padding="same", activation="relu")(y)
    y = layers.MaxPooling2D(3, strides=2, padding="same")(low)
    shortcut = layers.Conv2D(12, 1)(y)
    y = layers.SeparableConv2D(12, 3, padding="same", depth_multiplier=2)(y)
    y = layers.BatchNormalization(scale=False)(y)
    high = ops.relu(y + shortcut)
    backbone = keras.Model(stem_in, [low, high], name="mini_xception")

    model_input = keras.Input(shape=(32, 32, 3), name="street")
    low_level, x = backbone(model_input / 255.0)

    # ASPP
    dims = x.shape
    pooled = layers.AveragePooling2D(pool_size=(dims[-3], dims[-2]))(x)
    pooled = _deeplab_block(pooled, kernel_size=1, use_bias=True)
    out_pool = layers.UpSampling2D(
        size=(dims[-3] // pooled.shape[1], dims[-2] // pooled.shape[2]),
        interpolation="bilinear",
    )(pooled)
    out_1 = _deeplab_block(x, kernel_size=1, dilation_rate=1)
    out_2 = _deeplab_block(x, kernel_size=3, dilation_rate=2)
    out_3 = _deeplab_block(x, kernel_size=3, dilation_rate=3)
    x = layers.Concatenate(axis=-1)([out_pool, out_1, out_2, out_3])
    x = _deeplab_block(x, kernel_size=1)

    input_a = ops.image.resize(x, (16, 16), interpolation="bilinear")
    input_b = _deeplab_block(low_level, num_filters=4, kernel_size=1)
    x = layers.Concatenate(axis=-1)([input_a, input_b])
    x = _deeplab_block(x)
    x = layers.UpSampling2D(size=(2, 2), interpolation="bilinear")(x)
    x = layers.Conv2D(4, kernel_size=(1, 1), padding="same")(x)
    return keras.Model(inputs=model_input, outputs=layers.Softmax(axis=-1)(x))


INPUT_KINDS["street"] = ("image",)


# --------------------------------------------------------------------------
# 3. Tiny YOLO
# --------------------------------------------------------------------------


def _darknet_conv(x, filters, size, downsample=False):
    if downsample:
        x = layers.ZeroPadding2D(((1, 0), (1, 0)))(x)
        padding, strides = "valid", 2
    else:
        padding, strides = "same", 1
    x = layers.Conv2D(
        filters,
        size,
        strides=strides,
        padding=padding,
        use_bias=False,
        kernel_regularizer=regularizers.l2(5e-4),
    )(x)
    x = layers.BatchNormalization(epsilon=1e-5)(x)
    return layers.LeakyReLU(negative_slope=0.1)(x)


def tiny_yolo():
    """Two-scale YOLOv3-tiny detector that decodes its own boxes, for edge cameras."""
    n_classes, size = 2, 32
    anchors = {8: [(4, 6), (8, 8)], 4: [(14, 10), (20, 24)]}

    image = keras.Input((size, size, 3), name="camera frame:0")
    x = layers.Rescaling(1.0 / 255)(image)
    x = _darknet_conv(x, 4, 3)
    x = _darknet_conv(x, 6, 3, downsample=True)
    x = route = _darknet_conv(x, 8, 3, downsample=True)
    x = _darknet_conv(x, 12, 3, downsample=True)
    x = layers.add([x, _darknet_conv(_darknet_conv(x, 6, 1), 12, 3)])
    coarse = _darknet_conv(x, 16, 3)
    up = layers.UpSampling2D(2)(_darknet_conv(x, 6, 1))
    fine = _darknet_conv(layers.concatenate([up, route]), 12, 3)

    boxes, scores = [], []
    for feat in (coarse, fine):
        g = feat.shape[1]
        a = len(anchors[g])
        raw = layers.Conv2D(a * (5 + n_classes), 1)(feat)
        raw = layers.Reshape((g, g, a, 5 + n_classes))(raw)
        stride = size // g
        grid = np.stack(np.meshgrid(np.arange(g), np.arange(g)), axis=-1)
        grid = grid[None, :, :, None, :].astype("float32")
        wh_prior = np.array(anchors[g], "float32")
        xy = (ops.sigmoid(raw[..., 0:2]) + grid) * stride
        wh = ops.exp(ops.clip(raw[..., 2:4], -4.0, 4.0)) * wh_prior
        conf = ops.sigmoid(raw[..., 4:5])
        prob = ops.sigmoid(raw[..., 5:])
        corners = ops.concatenate([xy - wh / 2, xy + wh / 2], axis=-1)
        boxes.append(layers.Reshape((-1, 4))(ops.clip(corners / size, 0.0, 1.0)))
        scores.append(layers.Reshape((-1, n_classes))(conf * prob))
    return keras.Model(
        image,
        {
            "bbox/xyxy": layers.Concatenate(axis=1)(boxes),
            "class scores": layers.Concatenate(axis=1)(scores),
        },
        name="tiny_yolo",
    )


INPUT_KINDS["camera frame:0"] = ("image",)


# --------------------------------------------------------------------------
# 4. CenterNet
# --------------------------------------------------------------------------


def centernet():
    """CenterNet with max-pool peak picking and top-k gathers, for aerial vehicle counting."""
    k, classes = 3, 2
    inp = keras.layers.Input(shape=(32, 32, 3))
    p1 = keras.layers.Conv2D(8, 7, strides=2, padding="same", activation="relu")(inp)
    p2 = keras.layers.Conv2D(12, 3, strides=2, padding="same", activation="relu")(p1)
    p3 = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(p2)
    # FPN neck
    t3 = keras.layers.Conv2D(12, 1)(p3)
    t2 = keras.layers.Conv2D(12, 1)(p2) + keras.layers.UpSampling2D(2)(t3)
    feat = keras.layers.Conv2D(12, 3, padding="same", activation="relu")(t2)

    def head(channels, bias=0.0):
        h = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(feat)
        return keras.layers.Conv2D(channels, 1, bias_initializer=keras.initializers.Constant(bias))(h)

    heat = keras.ops.sigmoid(head(classes, bias=-2.19))
    size = keras.ops.softplus(head(2))
    offset = keras.ops.tanh(head(2)) * 0.5

    hmax = keras.layers.MaxPooling2D(3, strides=1, padding="same")(heat)
    peaks = keras.ops.where(keras.ops.equal(heat, hmax), heat, 0.0)
    flat = keras.ops.reshape(peaks, (-1, 8 * 8 * classes))
    scores, idx = keras.ops.top_k(flat, k)
    cls = idx % classes
    cell = idx // classes
    ys = keras.ops.cast(cell // 8, "float32")
    xs = keras.ops.cast(cell % 8, "float32")
    where_ = keras.ops.expand_dims(cell, -1)
    wh = keras.ops.take_along_axis(keras.layers.Reshape((64, 2))(size), keras.ops.repeat(where_, 2, axis=-1), axis=1)
    off = keras.ops.take_along_axis(keras.layers.Reshape((64, 2))(offset), keras.ops.repeat(where_, 2, axis=-1), axis=1)
    centers = keras.ops.stack([xs, ys], axis=-1) + off
    boxes = keras.ops.concatenate([centers - wh / 2, centers + wh / 2], axis=-1) * 4.0
    return keras.Model(inp, {"boxes": boxes, "scores": scores, "classes": cls, "heatmap": heat})


# --------------------------------------------------------------------------
# 5. Siamese
# --------------------------------------------------------------------------


@register
class L1Distance(layers.Layer):
    def call(self, anchor, other):
        return ops.abs(anchor - other)


def siamese_signatures():
    """Siamese network with a shared Sequential backbone, for checking signatures at a bank."""
    encoder = keras.Sequential(name="encoder")
    encoder.add(keras.Input((24, 24, 1)))
    encoder.add(layers.Conv2D(6, 5, activation="relu", kernel_regularizer="l2"))
    encoder.add(layers.MaxPool2D())
    encoder.add(layers.Conv2D(8, 3, activation="relu", kernel_regularizer="l2"))
    encoder.add(layers.MaxPool2D())
    encoder.add(layers.Flatten())
    encoder.add(layers.Dense(12, activation="sigmoid"))

    left = keras.Input((24, 24, 1), name="left")
    right = keras.Input((24, 24, 1), name="right")
    scale = layers.Normalization(mean=0.13, variance=0.0949, axis=None)
    a, b = encoder(scale(left)), encoder(scale(right))
    d = L1Distance()(a, b)
    same = layers.Dense(1, activation="sigmoid", name="same")(d)
    euclid = ops.sqrt(ops.maximum(ops.sum(ops.square(a - b), axis=1, keepdims=True), 1e-7))
    return keras.Model(inputs=[left, right], outputs=[same, euclid], name="siamese")


# --------------------------------------------------------------------------
# 6. Two-tower retrieval
# --------------------------------------------------------------------------


def two_tower():
    """Two-tower retrieval model with normalised dot product, for a film recommender."""
    user_id = keras.Input((), dtype="int32", name="user_id")
    age = keras.Input((1,), name="age")
    history = keras.Input((6,), dtype="int32", name="history")
    movie_id = keras.Input((), dtype="int32", name="movie_id")
    genres = keras.Input((3,), dtype="int32", name="genres")
    title = keras.Input((5,), dtype="int32", name="title_tokens")

    movie_table = layers.Embedding(25, 8, mask_zero=True, name="movie_table")

    u = layers.Embedding(12, 8)(user_id)
    bucket = layers.Discretization(bin_boundaries=[-1.0, 0.0, 1.0], output_mode="one_hot")(age)
    h = layers.GlobalAveragePooling1D()(movie_table(history))
    u = layers.Concatenate()([u, bucket, h])
    u = layers.Dense(12, activation="relu")(u)
    u = layers.Dense(8, name="user_tower")(u)

    g = layers.CategoryEncoding(num_tokens=6, output_mode="multi_hot")(genres)
    t = layers.Embedding(30, 8, mask_zero=True)(title)
    t = layers.GRU(6)(t)
    m = layers.Concatenate()([movie_table(movie_id), g, t])
    m = layers.Dense(12, activation="relu")(m)
    m = layers.Dense(8, name="movie_tower")(m)

    cosine = layers.Dot(axes=1, normalize=True, name="cosine")([u, m])
    score = cosine / 0.1
    return keras.Model(
        {
            "user_id": user_id,
            "age": age,
            "history": history,
            "movie_id": movie_id,
            "genres": genres,
            "title_tokens": title,
        },
        {"score": score, "user": layers.UnitNormalization()(u)},
        name="two_tower",
    )


INPUT_KINDS.update(
    user_id=("ids", 12),
    history=("tokens", 25),
    movie_id=("ids", 25),
    genres=("ids", 6),
    title_tokens=("tokens", 30),
)


# --------------------------------------------------------------------------
# 7. DLRM
# --------------------------------------------------------------------------


@register
class DotInteraction(layers.Layer):
    """Pairwise dot products between feature vectors, lower triangle only."""

    def __init__(self, self_interaction=False, **kwargs):
        super().__init__(**kwargs)
        self.self_interaction = self_interaction

    def build(self, input_shapes):
        n = len(input_shapes)
        rows, cols = np.tril_indices(n, 0 if self.self_interaction else -1)
        self._flat = (rows * n + cols).astype("int32")
        self._n = n

    def call(self, inputs):
        stacked = ops.stack(inputs, axis=1)
        pairs = ops.matmul(stacked, ops.transpose(stacked, (0, 2, 1)))
        pairs = ops.reshape(pairs, (-1, self._n * self._n))
        return ops.take(pairs, self._flat, axis=1)

    def compute_output_shape(self, input_shapes):
        n = len(input_shapes)
        k = n * (n + 1) // 2 if self.self_interaction else n * (n - 1) // 2
        return (input_shapes[0][0], k)

    def get_config(self):
        return {**super().get_config(), "self_interaction": self.self_interaction}


def _mlp(x, units, name):
    for i, u in enumerate(units):
        x = layers.Dense(u, activation="relu", name=f"{name}-{i}")(x)
    return x


def dlrm():
    """DLRM click model with pairwise feature interaction, for an ad team."""
    dense = keras.Input((5,), name="dense_features")
    sparse = keras.Input((4,), dtype="int64", name="sparse_features")
    vocab = [7, 11, 13, 17]
    bottom = _mlp(ops.log1p(ops.relu(dense)), [12, 8], "bottom")
    columns = ops.split(sparse, 4, axis=1)
    vectors = []
    for i, (column, n) in enumerate(zip(columns, vocab)):
        e = layers.Embedding(n, 8, embeddings_initializer="uniform", name=f"C{i}")(column)
        vectors.append(ops.squeeze(e, axis=1))
    inter = DotInteraction(name="interaction")([bottom] + vectors)
    top = _mlp(ops.concatenate([bottom, inter], axis=1), [16, 8], "top")
    return keras.Model([dense, sparse], layers.Dense(1, activation="sigmoid", name="ctr")(top), name="dlrm")


INPUT_KINDS["sparse_features"] = ("ids", 7)


# --------------------------------------------------------------------------
# 8. Wide & deep & cross, with FM term
# --------------------------------------------------------------------------


@register
class CrossLayer(keras.layers.Layer):
    """x0 * (U V x + b) + x from DCN-V2 (low rank)."""

    def __init__(self, rank=4, **kw):
        super().__init__(**kw)
        self.rank = rank

    def build(self, input_shape):
        d = input_shape[0][-1]
        self.U = self.add_weight(name="U", shape=(d, self.rank), initializer="glorot_uniform")
        self.V = self.add_weight(name="V", shape=(self.rank, d), initializer="glorot_uniform")
        self.b = self.add_weight(name="b", shape=(d,), initializer="zeros")
        self.built = True

    def call(self, inputs):
        x0, x = inputs
        return x0 * ((x @ self.U) @ self.V + self.b) + x

    def get_config(self):
        cfg = super().get_config()
        cfg["rank"] = self.rank
        return cfg


def wide_deep_cross():
    """Wide, deep, cross and FM branches over census columns with preprocessing layers, from a tabular tutorial."""
    numeric = ["age_years", "hours_per_week", "capital_gain"]
    categorical = {"workclass": 5, "education": 6, "occupation": 8}

    inputs, encoded, embedded = {}, [], []
    for col in numeric:
        inputs[col] = keras.Input((1,), name=col)
        norm = layers.Normalization(mean=[0.1], variance=[1.7], name=col + "_norm")
        encoded.append(norm(inputs[col]))
    for col, n in categorical.items():
        inputs[col] = keras.Input((1,), name=col, dtype="int64")
        encoded.append(layers.CategoryEncoding(n, output_mode="one_hot")(inputs[col]))
        emb = layers.Embedding(n, 4, name=col + "_embedding")(inputs[col])
        embedded.append(layers.Reshape((4,))(emb))

    wide_in = layers.concatenate(encoded)
    deep_in = layers.concatenate(encoded[: len(numeric)] + embedded)

    wide = layers.Dense(1, kernel_regularizer=keras.regularizers.L1L2(1e-4, 1e-4))(wide_in)

    deep = deep_in
    for units in (16, 8):
        deep = layers.Dense(units)(deep)
        deep = layers.BatchNormalization()(deep)
        deep = layers.ReLU()(deep)
        deep = layers.Dropout(0.1)(deep)

    cross = deep_in
    for _ in range(2):
        cross = CrossLayer(rank=3)([deep_in, cross])

    v = ops.stack(embedded, axis=1)
    fm = 0.5 * ops.sum(ops.sum(v, axis=1) ** 2 - ops.sum(v**2, axis=1), axis=-1, keepdims=True)
    logit = wide + layers.Dense(1)(layers.concatenate([deep, cross])) + fm
    return keras.Model(inputs, layers.Activation("sigmoid", name="income_over_50k")(logit))


INPUT_KINDS.update(workclass=("ids", 5), education=("ids", 6), occupation=("ids", 8))


# --------------------------------------------------------------------------
# 9. SASRec
# --------------------------------------------------------------------------


@register
class LearnedPositions(layers.Layer):
    def __init__(self, max_len, **kwargs):
        super().__init__(**kwargs)
        self.max_len = max_len
        self.supports_masking = True

    def build(self, input_shape):
        self.table = self.add_weight(name="table", shape=(self.max_len, input_shape[-1]), initializer="uniform")

    def call(self, x):
        return x + self.table[: ops.shape(x)[1]]

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = super().get_config()
        config.update({"max_len": self.max_len})
        return config


def sasrec():
    """SASRec sequential recommender scoring positive and negative items, for a web shop."""
    maxlen, dim, n_items = 10, 8, 40
    seq = keras.Input((maxlen,), dtype="int32", name="item_seq")
    pos = keras.Input((maxlen,), dtype="int32", name="pos_item")
    neg = keras.Input((maxlen,), dtype="int32", name="neg_item")
    items = layers.Embedding(n_items, dim, mask_zero=True, name="item_embedding")

    mask = ops.expand_dims(ops.cast(ops.not_equal(seq, 0), "float32"), -1)
    x = items(seq) * math.sqrt(dim)
    x = LearnedPositions(maxlen)(x)
    x = layers.Dropout(0.2)(x)
    x = x * mask
    for i in range(2):
        q = layers.LayerNormalization(epsilon=1e-8, name=f"ln_q{i}")(x)
        att = layers.MultiHeadAttention(2, dim // 2, dropout=0.2, name=f"mha{i}")(q, x, use_causal_mask=True)
        x = q + att
        x = layers.LayerNormalization(epsilon=1e-8, name=f"ln_f{i}")(x)
        f = layers.Conv1D(dim, 1, activation="relu", name=f"ffn{i}_1")(x)
        f = layers.Conv1D(dim, 1, name=f"ffn{i}_2")(layers.Dropout(0.2)(f))
        x = (x + f) * mask
    x = layers.LayerNormalization(epsilon=1e-8, name="ln_final")(x)
    pos_logits = ops.sum(x * items(pos), axis=-1)
    neg_logits = ops.sum(x * items(neg), axis=-1)
    return keras.Model(
        {"item_seq": seq, "pos_item": pos, "neg_item": neg},
        {"pos": pos_logits, "neg": neg_logits},
        name="sasrec",
    )


INPUT_KINDS.update(item_seq=("tokens", 40), pos_item=("tokens", 40), neg_item=("tokens", 40))


# --------------------------------------------------------------------------
# 10. BERT with tied MLM head
# --------------------------------------------------------------------------


@register
class BertEncoderBlock(keras.layers.Layer):
    def __init__(self, hidden, heads, intermediate, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.heads = hidden, heads
        self.intermediate, self.rate = intermediate, dropout
        self.attention = keras.layers.MultiHeadAttention(heads, hidden // heads, dropout=dropout, name="self_attention")
        self.attention_norm = keras.layers.LayerNormalization(epsilon=1e-12)
        self.dense_in = keras.layers.Dense(intermediate, activation=keras.activations.gelu, name="intermediate")
        self.dense_out = keras.layers.Dense(hidden, name="output")
        self.output_norm = keras.layers.LayerNormalization(epsilon=1e-12)
        self.drop1 = keras.layers.Dropout(dropout)
        self.drop2 = keras.layers.Dropout(dropout)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.attention_norm.build(input_shape)
        self.dense_in.build(input_shape)
        self.dense_out.build((*input_shape[:-1], self.intermediate))
        self.output_norm.build(input_shape)
        self.built = True

    def call(self, x, padding_mask=None, training=False):
        attn_mask = None
        if padding_mask is not None:
            attn_mask = padding_mask[:, None, :]
        a = self.attention(x, x, attention_mask=attn_mask, training=training)
        x = self.attention_norm(x + self.drop1(a, training=training))
        h = self.dense_out(self.dense_in(x))
        return self.output_norm(x + self.drop2(h, training=training))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = super().get_config()
        config.update(
            hidden=self.hidden,
            heads=self.heads,
            intermediate=self.intermediate,
            dropout=self.rate,
        )
        return config


def bert_mlm():
    """BERT encoder with tied masked-LM head and pooler, for domain pretraining in an NLP team."""
    vocab, length, hidden = 50, 12, 16
    token_ids = keras.Input((length,), dtype="int32", name="token_ids")
    segment_ids = keras.Input((length,), dtype="int32", name="segment_ids")
    padding_mask = keras.Input((length,), dtype="bool", name="padding_mask")
    positions = keras.Input((3,), dtype="int32", name="mask_positions")

    word = layers.ReversibleEmbedding(vocab, hidden, name="token_embedding")
    segment = layers.Embedding(2, hidden, name="segment_embedding")
    x = word(token_ids) + segment(segment_ids)
    x = LearnedPositions(16, name="position_embedding")(x)
    x = layers.LayerNormalization(epsilon=1e-12, name="embeddings>norm")(x)
    x = layers.Dropout(0.1)(x)
    for i in range(2):
        x = BertEncoderBlock(hidden, 4, 24, name=f"encoder>layer>{i}")(x, padding_mask=padding_mask)
    pooled = layers.Dense(hidden, activation="tanh", name="pooler")(x[:, 0, :])

    masked = ops.take_along_axis(x, positions[:, :, None], axis=1)
    masked = layers.Dense(hidden, activation="gelu", name="mlm>transform")(masked)
    masked = layers.LayerNormalization(epsilon=1e-12, name="mlm>norm")(masked)
    mlm = word(masked, reverse=True)
    return keras.Model(
        inputs={
            "token_ids": token_ids,
            "segment_ids": segment_ids,
            "padding_mask": padding_mask,
            "mask_positions": positions,
        },
        outputs={
            "mlm_logits": mlm,
            "nsp_logits": layers.Dense(2, name="nsp")(pooled),
            "sequence_output": x,
        },
        name="bert",
    )


INPUT_KINDS.update(
    token_ids=("tokens", 50),
    segment_ids=("ids", 2),
    padding_mask=("mask",),
    mask_positions=("ids", 12),
)


# --------------------------------------------------------------------------
# 11. Mixtral-like decoder
# --------------------------------------------------------------------------


@register
class RotaryGQA(layers.Layer):
    """Grouped-query causal attention with rotary embeddings."""

    def __init__(self, num_heads, num_kv_heads, head_dim, base=10000.0, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.base = base

    def build(self, input_shape):
        d = input_shape[-1]
        h, kv, k = self.num_heads, self.num_kv_heads, self.head_dim
        self.q_proj = layers.EinsumDense("btd,dhk->bthk", (None, h, k), name="q_proj")
        self.k_proj = layers.EinsumDense("bsd,dgk->bsgk", (None, kv, k), name="k_proj")
        self.v_proj = layers.EinsumDense("bsd,dgk->bsgk", (None, kv, k), name="v_proj")
        self.o_proj = layers.EinsumDense("bthk,hkd->btd", (None, d), name="o_proj")
        for p in (self.q_proj, self.k_proj, self.v_proj):
            p.build(input_shape)
        self.o_proj.build((None, None, h, k))
        super().build(input_shape)

    def _rope(self, x):
        half = self.head_dim // 2
        pos = ops.arange(ops.shape(x)[1], dtype="float32")
        freq = self.base ** (-ops.arange(half, dtype="float32") / half)
        angle = pos[:, None] * freq[None, :]
        cos = ops.cos(angle)[None, :, None, :]
        sin = ops.sin(angle)[None, :, None, :]
        x1, x2 = x[..., :half], x[..., half:]
        return ops.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    def call(self, x):
        t = ops.shape(x)[1]
        q, k, v = self._rope(self.q_proj(x)), self._rope(self.k_proj(x)), self.v_proj(x)
        groups = self.num_heads // self.num_kv_heads
        k = ops.repeat(k, groups, axis=2)
        v = ops.repeat(v, groups, axis=2)
        scores = ops.einsum("bthk,bshk->bhts", q, k) * self.head_dim**-0.5
        i = ops.arange(t)
        causal = i[:, None] >= i[None, :]
        scores = ops.where(causal[None, None], scores, -1e9)
        return self.o_proj(ops.einsum("bhts,bshk->bthk", ops.softmax(scores, -1), v))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = super().get_config()
        config.update(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            base=self.base,
        )
        return config


@register
class SparseMoE(layers.Layer):
    """Top-2 routed SwiGLU experts, evaluated densely."""

    def __init__(self, experts, hidden, top_k=2, **kwargs):
        super().__init__(**kwargs)
        self.experts, self.hidden, self.top_k = experts, hidden, top_k

    def build(self, input_shape):
        d, e, h = input_shape[-1], self.experts, self.hidden
        self.router = self.add_weight(shape=(d, e), name="router")
        self.w1 = self.add_weight(shape=(e, d, h), name="w1")
        self.w3 = self.add_weight(shape=(e, d, h), name="w3")
        self.w2 = self.add_weight(shape=(e, h, d), name="w2")

    def call(self, x):
        gate = ops.matmul(x, self.router)
        top, index = ops.top_k(gate, self.top_k)
        weight = ops.softmax(top, axis=-1)
        combine = ops.sum(ops.one_hot(index, self.experts, dtype=x.dtype) * weight[..., None], axis=-2)
        h = ops.silu(ops.einsum("btd,edh->bteh", x, self.w1))
        h = h * ops.einsum("btd,edh->bteh", x, self.w3)
        y = ops.einsum("bteh,ehd->bted", h, self.w2)
        return ops.einsum("bted,bte->btd", y, combine)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return dict(
            super().get_config(),
            experts=self.experts,
            hidden=self.hidden,
            top_k=self.top_k,
        )


def mixtral_decoder():
    """Mixtral-like causal LM (RoPE, GQA, RMSNorm, top-2 MoE, any length), by an LLM hobbyist."""
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    x = layers.Embedding(48, 16, name="model_embed_tokens")(ids)
    for i in range(2):
        p = f"model_layers_{i}_"
        h = layers.RMSNormalization(epsilon=1e-5, name=p + "input_layernorm")(x)
        x = x + RotaryGQA(4, 2, 4, name=p + "self_attn")(h)
        h = layers.RMSNormalization(epsilon=1e-5, name=p + "post_attention_layernorm")(x)
        x = x + SparseMoE(4, 12, name=p + "block_sparse_moe")(h)
    x = layers.RMSNormalization(epsilon=1e-5, name="model_norm")(x)
    logits = layers.Dense(48, use_bias=False, name="lm_head")(x)
    logits = ops.tanh(logits / 30.0) * 30.0
    return keras.Model(ids, logits, name="mixtral")


INPUT_KINDS["input_ids"] = ("ids", 48)


# --------------------------------------------------------------------------
# 12. ViT with LoRA
# --------------------------------------------------------------------------


@register
class ClassToken(layers.Layer):
    def build(self, input_shape):
        self.cls = self.add_weight(name="cls", shape=(1, 1, input_shape[-1]), initializer="truncated_normal")
        self.pos = self.add_weight(
            name="pos",
            shape=(1, input_shape[1] + 1, input_shape[-1]),
            initializer=initializers.RandomNormal(stddev=0.02),
        )

    def call(self, x):
        cls = ops.broadcast_to(self.cls, (ops.shape(x)[0], 1, x.shape[-1]))
        return ops.concatenate([cls, x], axis=1) + self.pos

    def compute_output_shape(self, s):
        return (s[0], s[1] + 1, s[2])


def vit_lora():
    """ViT with class token, frozen trunk and LoRA-enabled dense layers, fine-tuned on plant photos."""
    inputs = keras.Input((16, 16, 3), name="leaf_photo")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = layers.Conv2D(16, 4, strides=4, name="patch_embed")(x)
    x = layers.Reshape((-1, 16))(x)
    x = ClassToken(name="cls_pos")(x)
    for i in range(2):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.MultiHeadAttention(num_heads=2, key_dim=8, name=f"attn_{i}")(y, y)
        x = layers.Add()([y, x])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(32, activation="gelu", name=f"mlp_{i}_up")(y)
        y = layers.Dense(16, name=f"mlp_{i}_down")(y)
        x = layers.Add()([y, x])
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    logits = layers.Dense(4, name="head", dtype="float32")(x[:, 0])
    model = keras.Model(inputs, logits, name="vit_lora")
    for layer in model.layers:
        layer.trainable = layer.name == "head"
    rng = np.random.default_rng(7)
    for layer in model.layers:
        if isinstance(layer, layers.Dense) and layer.name.startswith("mlp"):
            layer.trainable = True
            layer.enable_lora(rank=2)
            # as after some fine-tuning
            layer.lora_kernel_b.assign(rng.normal(0, 0.1, layer.lora_kernel_b.shape).astype("float32"))
    return model


INPUT_KINDS["leaf_photo"] = ("image",)


# --------------------------------------------------------------------------
# 13. Swin
# --------------------------------------------------------------------------


def window_partition(x, window):
    _, h, w, c = x.shape
    x = ops.reshape(x, (-1, h // window, window, w // window, window, c))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, window * window, c))


def window_reverse(windows, window, h, w, c):
    x = ops.reshape(windows, (-1, h // window, w // window, window, window, c))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, h, w, c))


@register
class SwinBlock(layers.Layer):
    def __init__(self, dim, num_heads, window=4, shift=0, mlp_ratio=2, **kwargs):
        super().__init__(**kwargs)
        self.dim, self.num_heads = dim, num_heads
        self.window, self.shift, self.mlp_ratio = window, shift, mlp_ratio
        self.norm1 = layers.LayerNormalization(epsilon=1e-5)
        self.norm2 = layers.LayerNormalization(epsilon=1e-5)
        self.qkv = layers.Dense(dim * 3)
        self.proj = layers.Dense(dim)
        self.fc1 = layers.Dense(dim * mlp_ratio, activation="gelu")
        self.fc2 = layers.Dense(dim)

    def build(self, input_shape):
        _, h, w, c = input_shape
        m = self.window
        self.norm1.build(input_shape)
        self.norm2.build(input_shape)
        self.qkv.build((None, m * m, c))
        self.proj.build((None, m * m, c))
        self.fc1.build(input_shape)
        self.fc2.build((None, h, w, c * self.mlp_ratio))
        self.bias_table = self.add_weight(
            name="relative_position_bias_table",
            shape=((2 * m - 1) ** 2, self.num_heads),
            initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        )
        coords = np.stack(np.meshgrid(np.arange(m), np.arange(m), indexing="ij"))
        coords = coords.reshape(2, -1)
        rel = (coords[:, :, None] - coords[:, None, :]).transpose(1, 2, 0) + m - 1
        self.rel_index = (rel[..., 0] * (2 * m - 1) + rel[..., 1]).astype("int32")
        if self.shift:
            img = np.zeros((h, w), "int32")
            cuts = (slice(0, -m), slice(-m, -self.shift), slice(-self.shift, None))
            for n, (a, b) in enumerate((a, b) for a in cuts for b in cuts):
                img[a, b] = n
            win = img.reshape(h // m, m, w // m, m).transpose(0, 2, 1, 3).reshape(-1, m * m)
            self.mask = np.where(win[:, None, :] != win[:, :, None], -100.0, 0.0).astype("float32")
        super().build(input_shape)

    def attend(self, x, n_windows):
        n, heads = self.window**2, self.num_heads
        d = self.dim // heads
        qkv = ops.reshape(self.qkv(x), (-1, n, 3, heads, d))
        q, k, v = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)), 3, axis=0)
        attn = (q * d**-0.5) @ ops.swapaxes(k, -1, -2)
        bias = ops.take(self.bias_table, self.rel_index.reshape(-1), axis=0)
        bias = ops.transpose(ops.reshape(bias, (n, n, heads)), (2, 0, 1))
        attn = attn + bias[None]
        if self.shift:
            attn = ops.reshape(attn, (-1, n_windows, heads, n, n))
            attn = attn + ops.convert_to_tensor(self.mask)[None, :, None]
            attn = ops.reshape(attn, (-1, heads, n, n))
        out = ops.transpose(ops.softmax(attn, axis=-1) @ v, (0, 2, 1, 3))
        return self.proj(ops.reshape(out, (-1, n, self.dim)))

    def call(self, x):
        _, h, w, c = x.shape
        m, s = self.window, self.shift
        y = self.norm1(x)
        if s:
            y = ops.roll(y, shift=(-s, -s), axis=(1, 2))
        y = self.attend(window_partition(y, m), (h // m) * (w // m))
        y = window_reverse(y, m, h, w, c)
        if s:
            y = ops.roll(y, shift=(s, s), axis=(1, 2))
        x = x + y
        return x + self.fc2(self.fc1(self.norm2(x)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = super().get_config()
        for key in ("dim", "num_heads", "window", "shift", "mlp_ratio"):
            config[key] = getattr(self, key)
        return config


@register
class PatchMerging(layers.Layer):
    def __init__(self, out_dim, **kwargs):
        super().__init__(**kwargs)
        self.out_dim = out_dim
        self.norm = layers.LayerNormalization(epsilon=1e-5)
        self.reduction = layers.Dense(out_dim, use_bias=False)

    def build(self, input_shape):
        merged = (input_shape[0], input_shape[1] // 2, input_shape[2] // 2, input_shape[3] * 4)
        self.norm.build(merged)
        self.reduction.build(merged)

    def call(self, x):
        x = ops.concatenate([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], axis=-1)
        return self.reduction(self.norm(x))

    def compute_output_shape(self, s):
        return (s[0], s[1] // 2, s[2] // 2, self.out_dim)

    def get_config(self):
        return {**super().get_config(), "out_dim": self.out_dim}


def swin_tiny():
    """Swin transformer with shifted windows and patch merging, ported from PyTorch for Kaggle."""
    img = keras.Input((32, 32, 3), name="image")
    x = layers.Conv2D(8, 4, 4, name="patch_embed-proj")(img)
    x = layers.LayerNormalization(epsilon=1e-5, name="patch_embed-norm")(x)
    x = SwinBlock(8, 2, window=4, shift=0, name="layers-0-blocks-0")(x)
    x = SwinBlock(8, 2, window=4, shift=2, name="layers-0-blocks-1")(x)
    x = PatchMerging(16, name="layers-0-downsample")(x)
    x = SwinBlock(16, 4, window=4, name="layers-1-blocks-0")(x)
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    x = layers.GlobalAveragePooling2D(name="avgpool")(x)
    return keras.Model(img, layers.Dense(3, activation="softmax", name="head")(x))


# --------------------------------------------------------------------------
# 14. gMLP
# --------------------------------------------------------------------------


def gmlp_patches():
    """gMLP image classifier with a spatial gating unit, following the keras.io MLP example."""
    data_augmentation = keras.Sequential(
        [
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(0.05),
            layers.RandomZoom(height_factor=0.1, width_factor=0.1),
            layers.RandomContrast(0.1),
        ],
        name="data_augmentation",
    )
    inputs = layers.Input(shape=(24, 24, 3))
    augmented = data_augmentation(inputs)
    patches = ops.image.extract_patches(augmented, size=(8, 8), padding="valid")
    patches = ops.reshape(patches, (-1, 9, 8 * 8 * 3))
    x = layers.Dense(units=12)(patches)
    positions = ops.arange(start=0, stop=9, step=1)
    x = x + layers.Embedding(input_dim=9, output_dim=12)(positions)
    for _ in range(2):
        residual = x
        x = layers.LayerNormalization()(x)
        x = layers.Dense(24, activation="gelu")(x)
        u, v = ops.split(x, 2, axis=2)
        v = layers.LayerNormalization()(v)
        v = layers.Permute((2, 1))(v)
        v = layers.Dense(9, bias_initializer="ones")(v)
        v = layers.Permute((2, 1))(v)
        x = layers.Dense(12)(layers.Multiply()([u, v]))
        x = layers.Add()([x, residual])
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(rate=0.2)(x)
    return keras.Model(inputs=inputs, outputs=layers.Dense(4)(x))


# --------------------------------------------------------------------------
# 15. ConvNeXt, mixed precision
# --------------------------------------------------------------------------


@register
class StochasticDepth(layers.Layer):
    def __init__(self, drop_path_rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.drop_path_rate = drop_path_rate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, x, training=None):
        if training and self.drop_path_rate > 0:
            keep = 1 - self.drop_path_rate
            shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
            r = keep + keras.random.uniform(shape, 0, 1, seed=self.seed_generator, dtype=x.dtype)
            x = (x / keep) * ops.floor(r)
        return x

    def compute_output_shape(self, s):
        return s

    def get_config(self):
        return {
            **super().get_config(),
            "drop_path_rate": self.drop_path_rate,
            "seed": self.seed,
        }


@register
class LayerScale(layers.Layer):
    def __init__(self, init_values=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.init_values = init_values

    def build(self, input_shape):
        self.gamma = self.add_weight(
            shape=(input_shape[-1],),
            initializer=initializers.Constant(self.init_values),
            name="gamma",
        )

    def call(self, x):
        return x * self.gamma

    def get_config(self):
        return {**super().get_config(), "init_values": self.init_values}


def convnext_bf16():
    """ConvNeXt trained in mixed bfloat16 with layer scale and stochastic depth, for TPU users."""
    policy = "mixed_bfloat16"

    def block(x, dim, rate, name):
        y = layers.DepthwiseConv2D(7, padding="same", dtype=policy, name=name + "_dw")(x)
        y = layers.LayerNormalization(epsilon=1e-6, dtype=policy, name=name + "_ln")(y)
        y = layers.Dense(4 * dim, dtype=policy, name=name + "_pw1")(y)
        y = layers.Activation("gelu", dtype=policy, name=name + "_gelu")(y)
        y = layers.Dense(dim, dtype=policy, name=name + "_pw2")(y)
        y = LayerScale(0.1, dtype=policy, name=name + "_scale")(y)
        y = StochasticDepth(rate, dtype=policy, name=name + "_drop")(y)
        return layers.Add(dtype=policy, name=name + "_add")([x, y])

    inputs = keras.Input((32, 32, 3), name="x")
    x = layers.Conv2D(8, 4, strides=4, dtype=policy, name="stem")(inputs)
    x = layers.LayerNormalization(epsilon=1e-6, dtype=policy, name="stem_ln")(x)
    x = block(x, 8, 0.0, "stage0_block0")
    down = keras.Sequential(
        [
            layers.LayerNormalization(epsilon=1e-6, dtype=policy),
            layers.Conv2D(12, 2, strides=2, dtype=policy),
        ],
        name="downsampling_block_0",
    )
    x = down(x)
    x = block(x, 12, 0.1, "stage1_block0")
    x = layers.GlobalAveragePooling2D(dtype=policy)(x)
    x = layers.LayerNormalization(epsilon=1e-6, dtype="float32")(x)
    outputs = layers.Dense(3, activation="softmax", dtype="float32", name="predictions")(x)
    return keras.Model(inputs, outputs, name="convnext_bf16")


# --------------------------------------------------------------------------
# 16. Perceiver
# --------------------------------------------------------------------------


@register
class LatentArray(layers.Layer):
    def __init__(self, count, dim, **kwargs):
        super().__init__(**kwargs)
        self.count, self.dim = count, dim

    def build(self, input_shape):
        self.latents = self.add_weight(name="latents", shape=(self.count, self.dim), initializer="random_normal")

    def call(self, x):
        return ops.tile(self.latents[None], (ops.shape(x)[0], 1, 1))

    def compute_output_shape(self, s):
        return (s[0], self.count, self.dim)

    def get_config(self):
        return {**super().get_config(), "count": self.count, "dim": self.dim}


def perceiver():
    """Perceiver with Fourier features and weight-shared cross attention, for multispectral pixels."""
    side, bands, dim, n_latent = 8, 4, 12, 5
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side)), -1)
    feats = [grid] + [f(grid * np.pi * k) for k in (1, 2, 4) for f in (np.sin, np.cos)]
    fourier = np.concatenate(feats, -1).reshape(1, side * side, -1).astype("float32")

    img = keras.Input((side, side, bands), name="pixels")
    x = ops.reshape(img, (-1, side * side, bands))
    # zeros_like trick gives the position codes the batch size
    pos = ops.zeros_like(x[:, :, :1]) + fourier
    x = ops.concatenate([x, pos], axis=-1)

    z = LatentArray(n_latent, dim)(x)
    ln_kv, ln_q = layers.LayerNormalization(), layers.LayerNormalization()
    wq, wk, wv = layers.Dense(dim), layers.Dense(dim), layers.Dense(dim)
    out, ff = layers.Dense(dim), layers.Dense(dim, activation="gelu")
    latent_tf = layers.MultiHeadAttention(3, 4)
    ln_z = layers.LayerNormalization()

    kv = ln_kv(x)
    k, v = wk(kv), wv(kv)
    for _ in range(3):  # same weights on each iteration
        q = wq(ln_q(z))
        att = ops.softmax(ops.matmul(q, ops.transpose(k, axes=[0, 2, 1])) / dim**0.5)
        z = z + out(ops.matmul(att, v))
        zz = ln_z(z)
        z = z + latent_tf(zz, zz)
        z = z + ff(z)
    return keras.Model(img, layers.Dense(4)(ops.mean(z, axis=1)), name="perceiver")


# --------------------------------------------------------------------------
# 17. LSTM seq2seq
# --------------------------------------------------------------------------


def seq2seq_lstm():
    """Character-level LSTM encoder-decoder with bidirectional states, for date normalisation."""
    enc_in = keras.Input(shape=(None,), dtype="int32", name="encoder_tokens")
    dec_in = keras.Input(shape=(None,), dtype="int32", name="decoder_tokens")

    e = layers.Embedding(20, 8, mask_zero=True)(enc_in)
    _, fh, fc, bh, bc = layers.Bidirectional(layers.LSTM(6, return_state=True), name="encoder")(e)
    state_h = layers.Concatenate()([fh, bh])
    state_c = layers.Concatenate()([fc, bc])

    d = layers.Embedding(14, 8, mask_zero=True)(dec_in)
    seq, h, c = layers.LSTM(12, return_sequences=True, return_state=True, name="decoder")(
        d, initial_state=[state_h, state_c]
    )
    probs = layers.TimeDistributed(layers.Dense(14, activation="softmax"))(seq)
    return keras.Model([enc_in, dec_in], [probs, h, c], name="seq2seq")


INPUT_KINDS.update(encoder_tokens=("tokens", 20), decoder_tokens=("tokens", 14))
UNKNOWN_SIZES["seq2seq"] = {1: 8}


# --------------------------------------------------------------------------
# 18. Attention seq2seq
# --------------------------------------------------------------------------


def attention_nmt():
    """Luong-style GRU translator with additive attention over a masked source, from a course."""
    src = keras.Input((9,), dtype="int64", name="source")
    tgt = keras.Input((7,), dtype="int64", name="target")
    src_x = layers.Embedding(30, 8, mask_zero=True, name="src_emb")(src)
    enc = layers.Bidirectional(layers.GRU(8, return_sequences=True), merge_mode="sum", name="enc")(src_x)
    enc = layers.LayerNormalization()(enc)

    # the output softmax reuses the target embedding
    shared = layers.Embedding(25, 8, mask_zero=True, name="tgt_emb")
    dec, state = layers.GRU(8, return_sequences=True, return_state=True, name="dec")(shared(tgt))
    context, weights = layers.AdditiveAttention(name="bahdanau")([dec, enc], return_attention_scores=True)
    x = layers.concatenate([dec, context])
    x = layers.Dense(8, activation="tanh", use_bias=False, name="attention_vector")(x)
    logits = layers.Dense(25, name="vocab_logits")(x)
    return keras.Model(
        inputs=[src, tgt],
        outputs={"logits": logits, "attention": weights, "state": state},
        name="attention_nmt",
    )


INPUT_KINDS.update(source=("tokens", 30), target=("tokens", 25))


# --------------------------------------------------------------------------
# 19. CRNN OCR
# --------------------------------------------------------------------------


def crnn_ocr():
    """CRNN for text lines of any width with CTC-ready log probabilities, for invoice OCR."""
    image = keras.Input((16, None, 1), name="line_image")
    x = image
    for i, (f, pool) in enumerate([(6, (2, 2)), (8, (2, 2)), (12, (2, 1))]):
        x = layers.Conv2D(f, 3, padding="same", name=f"conv{i + 1}")(x)
        x = layers.BatchNormalization(axis=-1, name=f"bn{i + 1}")(x)
        x = layers.ELU(name=f"elu{i + 1}")(x)
        x = layers.MaxPool2D(pool, name=f"pool{i + 1}")(x)
    x = layers.Permute((2, 1, 3), name="hwc->whc")(x)
    x = layers.TimeDistributed(layers.Flatten(), name="columns")(x)
    x = layers.Dense(12, activation="relu", name="map-to-seq")(x)
    x = layers.Bidirectional(layers.LSTM(8, return_sequences=True), name="blstm1")(x)
    x = layers.Bidirectional(layers.LSTM(8, return_sequences=True), merge_mode="ave", name="blstm2")(x)
    x = layers.Dense(11 + 1, name="chars_and_blank")(x)
    return keras.Model(image, ops.log_softmax(x, axis=-1), name="crnn")


UNKNOWN_SIZES["crnn"] = {2: 32}


# --------------------------------------------------------------------------
# 20. WaveNet
# --------------------------------------------------------------------------


def wavenet():
    """WaveNet-like causal dilated net on mu-law samples with a speaker condition, for TTS people."""
    audio = keras.Input((None,), dtype="uint8", name="mu_law")
    speaker = keras.Input((1,), dtype="int32", name="speaker")
    x = ops.one_hot(ops.cast(audio, "int32"), 32)
    x = layers.Conv1D(8, 2, padding="causal", name="causal_in")(x)
    g = layers.Embedding(3, 8, name="speaker_embedding")(speaker)
    skips = []
    for stack in range(2):
        for d in (1, 2, 4):
            n = f"s{stack}-d{d}->"
            z = layers.Conv1D(16, 2, dilation_rate=d, padding="causal", name=n + "dilated")(x)
            z = z + layers.Dense(16, use_bias=False, name=n + "cond")(g)
            filt, gate = z[..., :8], z[..., 8:]
            z = ops.tanh(filt) * ops.sigmoid(gate)
            skips.append(layers.Conv1D(8, 1, name=n + "skip")(z))
            x = (x + layers.Conv1D(8, 1, name=n + "res")(z)) * math.sqrt(0.5)
    y = layers.Add(name="skip_sum")(skips)
    y = ops.relu(y)
    y = layers.Conv1D(12, 1, activation="relu", name="out1")(y)
    logits = layers.Conv1D(32, 1, name="out2")(y)
    return keras.Model({"mu_law": audio, "speaker": speaker}, logits, name="wavenet")


INPUT_KINDS.update(mu_law=("ids", 32), speaker=("ids", 3))
UNKNOWN_SIZES["wavenet"] = {1: 12}


# --------------------------------------------------------------------------
# 21. Conformer
# --------------------------------------------------------------------------


@register
class ConformerConvModule(layers.Layer):
    def __init__(self, filters, kernel_size=5, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.dropout = filters, kernel_size, dropout
        self.seq = keras.Sequential(
            [
                layers.LayerNormalization(name="ln"),
                layers.Conv1D(2 * filters, 1, name="pointwise_1"),
            ],
            name="expand",
        )
        self.depthwise = layers.DepthwiseConv1D(kernel_size, padding="same", name="dw")
        self.bn = layers.BatchNormalization(momentum=0.9, name="bn")
        self.pointwise = layers.Conv1D(filters, 1, name="pointwise_2")
        self.drop = layers.Dropout(dropout)

    def build(self, input_shape):
        self.seq.build(input_shape)
        self.depthwise.build(input_shape)
        self.bn.build(input_shape)
        self.pointwise.build(input_shape)
        self.built = True

    def call(self, x, training=None):
        y = self.seq(x)
        y = ops.glu(y, axis=-1)
        y = self.depthwise(y)
        y = ops.silu(self.bn(y, training=training))
        return x + self.drop(self.pointwise(y), training=training)

    def compute_output_shape(self, s):
        return s

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "dropout": self.dropout,
        }


def conformer_asr():
    """Conformer encoder with half-step feed-forwards and conv subsampling, for speech recognition."""
    dim = 12
    mel = keras.Input((24, 16), name="log_mel")
    x = layers.Reshape((24, 16, 1))(mel)
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Reshape((x.shape[1], x.shape[2] * x.shape[3]))(x)
    x = layers.Dense(dim, name="linear_in")(x)

    def half_ff(x, name):
        y = layers.LayerNormalization(name=name + "_ln")(x)
        y = layers.Dense(dim * 4, activation="swish", name=name + "_up")(y)
        y = layers.Dropout(0.1)(y)
        y = layers.Dense(dim, name=name + "_down")(y)
        return x + 0.5 * y

    for i in range(2):
        x = half_ff(x, f"block{i}_ff1")
        y = layers.LayerNormalization(name=f"block{i}_mhsa_ln")(x)
        x = x + layers.MultiHeadAttention(2, 6, name=f"block{i}_mhsa")(y, y, y)
        x = ConformerConvModule(dim, name=f"block{i}_conv")(x)
        x = half_ff(x, f"block{i}_ff2")
        x = layers.LayerNormalization(name=f"block{i}_final_ln")(x)
    return keras.Model(mel, layers.Dense(10, activation="log_softmax", name="ctc")(x))


# --------------------------------------------------------------------------
# 22. Keyword spotting with STFT and attention
# --------------------------------------------------------------------------


def keyword_attention_rnn():
    """Keyword spotter computing its own spectrogram, CNN + BiLSTM + query attention, for firmware makers."""
    wave = keras.Input((256,), name="waveform")
    x = wave - ops.mean(wave, axis=1, keepdims=True)
    real, imag = ops.stft(x, sequence_length=32, sequence_stride=16, fft_length=32)
    mag = ops.sqrt(ops.square(real) + ops.square(imag) + 1e-6)
    spec = ops.log(mag + 1e-3)
    spec = ops.expand_dims(spec, axis=-1)
    x = layers.BatchNormalization()(spec)
    x = layers.Conv2D(6, (5, 1), activation="relu", padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(1, (5, 1), activation="relu", padding="same")(x)
    x = ops.squeeze(x, axis=-1)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(x)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(x)
    mid = x[:, x.shape[1] // 2]
    query = layers.Dense(10)(mid)
    att = layers.Dot(axes=[1, 2])([query, x])
    att = layers.Softmax(name="attSoftmax")(att)
    vec = layers.Dot(axes=[1, 1])([att, x])
    x = layers.Dense(8, activation="relu")(vec)
    x = layers.Dense(4, name="output_word")(x)
    return keras.Model(inputs=[wave], outputs=[layers.Activation("softmax")(x)])


# --------------------------------------------------------------------------
# 23. PointNet segmentation
# --------------------------------------------------------------------------


@register
class OrthogonalRegularizer(keras.regularizers.Regularizer):
    def __init__(self, num_features, l2reg=0.001):
        self.num_features = num_features
        self.l2reg = l2reg

    def __call__(self, x):
        x = ops.reshape(x, (-1, self.num_features, self.num_features))
        xxt = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
        return ops.sum(self.l2reg * ops.square(xxt - ops.eye(self.num_features)))

    def get_config(self):
        return {"num_features": self.num_features, "l2reg": self.l2reg}


def _pn_conv(x, filters, name):
    x = layers.Conv1D(filters, kernel_size=1, padding="valid", name=f"{name}_conv")(x)
    x = layers.BatchNormalization(momentum=0.0, name=f"{name}_batch_norm")(x)
    return layers.Activation("relu", name=f"{name}_relu")(x)


def _tnet(inputs, num_features, name):
    x = _pn_conv(inputs, 8, f"{name}_1")
    x = _pn_conv(x, 16, f"{name}_2")
    x = layers.GlobalMaxPooling1D()(x)
    x = layers.Dense(8, activation="relu")(x)
    x = layers.Dense(
        num_features**2,
        kernel_initializer="zeros",
        bias_initializer=keras.initializers.Constant(np.eye(num_features).flatten()),
        activity_regularizer=OrthogonalRegularizer(num_features),
        name=f"{name}_final",
    )(x)
    transform = layers.Reshape((num_features, num_features))(x)
    return layers.Dot(axes=(2, 1), name=f"{name}_mm")([inputs, transform])


def pointnet_segmentation():
    """PointNet part segmentation with two T-nets and a global max feature, for robotics."""
    n = 20
    points = keras.Input(shape=(n, 3), name="points")
    x = _tnet(points, 3, "input_transform")
    f64 = _pn_conv(x, 6, "features_64")
    f128 = _pn_conv(f64, 8, "features_128_1")
    xt = _tnet(f128, 8, "transformed_features")
    f512 = _pn_conv(xt, 12, "features_512")
    f2048 = _pn_conv(f512, 16, "pre_maxpool_block")
    global_features = layers.MaxPooling1D(pool_size=n, name="global_features")(f2048)
    global_features = ops.tile(global_features, [1, n, 1])
    x = layers.Concatenate(name="segmentation_input")([f64, f128, xt, f512, global_features])
    x = _pn_conv(x, 8, "segmentation_features")
    outputs = layers.Conv1D(3, 1, activation="softmax", name="segmentation_head")(x)
    return keras.Model(points, outputs)


# --------------------------------------------------------------------------
# 24. Graph network, dense adjacency
# --------------------------------------------------------------------------


@register
class DenseGAT(layers.Layer):
    def __init__(self, units, heads=2, concat=True, activation="elu", **kwargs):
        super().__init__(**kwargs)
        self.units, self.heads, self.concat = units, heads, concat
        self.activation = keras.activations.get(activation)

    def build(self, input_shape):
        x_shape = input_shape[0]
        self.kernel = self.add_weight(
            name="kernel", shape=(x_shape[-1], self.heads, self.units), initializer="glorot_uniform"
        )
        self.a_src = self.add_weight(name="a_src", shape=(self.heads, self.units), initializer="glorot_uniform")
        self.a_dst = self.add_weight(name="a_dst", shape=(self.heads, self.units), initializer="glorot_uniform")
        self.built = True

    def call(self, inputs):
        x, adj = inputs
        h = ops.einsum("bnf,fhu->bnhu", x, self.kernel)
        src = ops.einsum("bnhu,hu->bnh", h, self.a_src)
        dst = ops.einsum("bnhu,hu->bnh", h, self.a_dst)
        e = ops.leaky_relu(src[:, :, None, :] + dst[:, None, :, :], negative_slope=0.2)
        e = ops.where(adj[..., None] > 0, e, -1e9)
        alpha = ops.softmax(e, axis=2)
        out = ops.einsum("bijh,bjhu->bihu", alpha, h)
        if self.concat:
            out = ops.reshape(out, (ops.shape(x)[0], ops.shape(x)[1], self.heads * self.units))
        else:
            out = ops.mean(out, axis=2)
        return self.activation(out)

    def compute_output_shape(self, input_shape):
        b, n, _ = input_shape[0]
        return (b, n, self.heads * self.units if self.concat else self.units)

    def get_config(self):
        config = super().get_config()
        config.update(
            units=self.units,
            heads=self.heads,
            concat=self.concat,
            activation=keras.activations.serialize(self.activation),
        )
        return config


def molecule_gnn():
    """GCN layer then graph attention on dense adjacency with node masking, for molecule properties."""
    nodes = keras.Input((None, 5), name="atom_features")
    adj = keras.Input((None, None), name="adjacency")
    node_mask = keras.Input((None,), dtype="bool", name="atom_mask")

    keep = ops.cast(node_mask, "float32")
    a = adj * keep[:, None, :] * keep[:, :, None]
    degree = ops.sum(a, axis=-1, keepdims=True)
    inv_sqrt = ops.rsqrt(ops.maximum(degree, 1.0))
    a_hat = a * inv_sqrt * ops.swapaxes(inv_sqrt, 1, 2)

    x = layers.Dense(8, use_bias=False)(nodes)
    x = ops.relu(ops.matmul(a_hat, x))
    x = DenseGAT(4, heads=2)([x, a])
    x = layers.Dropout(0.3)(x)
    x = DenseGAT(6, heads=3, concat=False, activation="linear")([x, a])
    weights = layers.Dense(1)(x)
    weights = ops.where(node_mask[..., None], weights, -1e9)
    weights = ops.softmax(weights, axis=1)
    readout = ops.sum(x * weights, axis=1)
    mean = ops.sum(x * keep[..., None], axis=1) / (ops.sum(keep, axis=1, keepdims=True) + 1e-6)
    g = ops.concatenate([readout, mean], axis=-1)
    return keras.Model(
        {"atom_features": nodes, "adjacency": adj, "atom_mask": node_mask},
        layers.Dense(2, name="solubility_toxicity")(layers.Dense(8, activation="elu")(g)),
        name="molecule_gnn",
    )


INPUT_KINDS.update(adjacency=("adjacency",), atom_mask=("mask",))


# --------------------------------------------------------------------------
# 25. VAE
# --------------------------------------------------------------------------


@register
class Sampling(layers.Layer):
    """Uses (z_mean, z_log_var) to sample z and adds the KL loss."""

    def __init__(self, beta=1.0, **kwargs):
        super().__init__(**kwargs)
        self.beta = beta
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        z_mean, z_log_var = inputs
        kl = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
        self.add_loss(self.beta * ops.mean(ops.sum(kl, axis=1)))
        batch = ops.shape(z_mean)[0]
        dim = ops.shape(z_mean)[1]
        epsilon = keras.random.normal(shape=(batch, dim), seed=self.seed_generator)
        return z_mean + ops.exp(0.5 * z_log_var) * epsilon

    def get_config(self):
        return {**super().get_config(), "beta": self.beta}


def conv_vae():
    """Convolutional VAE with a sampling layer, nested encoder and decoder, for digits (keras.io style)."""
    latent_dim = 3
    encoder_inputs = keras.Input(shape=(16, 16, 1))
    x = layers.Conv2D(6, 3, activation="relu", strides=2, padding="same")(encoder_inputs)
    x = layers.Conv2D(8, 3, activation="relu", strides=2, padding="same")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(12, activation="relu")(x)
    z_mean = layers.Dense(latent_dim, name="z_mean")(x)
    z_log_var = layers.Dense(latent_dim, name="z_log_var")(x)
    z = Sampling(beta=0.5)([z_mean, z_log_var])
    encoder = keras.Model(encoder_inputs, [z_mean, z_log_var, z], name="encoder")

    latent_inputs = keras.Input(shape=(latent_dim,))
    x = layers.Dense(4 * 4 * 8, activation="relu")(latent_inputs)
    x = layers.Reshape((4, 4, 8))(x)
    x = layers.Conv2DTranspose(8, 3, activation="relu", strides=2, padding="same")(x)
    x = layers.Conv2DTranspose(6, 3, activation="relu", strides=2, padding="same")(x)
    decoder_outputs = layers.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x)
    decoder = keras.Model(latent_inputs, decoder_outputs, name="decoder")

    inputs = keras.Input((16, 16, 1), name="digit")
    mean, log_var, z = encoder(inputs)
    return keras.Model(inputs, [decoder(z), mean, log_var], name="vae")


# --------------------------------------------------------------------------
# 26. SAGAN projection discriminator
# --------------------------------------------------------------------------


@register
class SelfAttention2D(layers.Layer):
    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.f = layers.SpectralNormalization(layers.Conv2D(channels // 4, 1))
        self.g = layers.SpectralNormalization(layers.Conv2D(channels // 4, 1))
        self.h = layers.SpectralNormalization(layers.Conv2D(channels, 1))

    def build(self, input_shape):
        self.f.build(input_shape)
        self.g.build(input_shape)
        self.h.build(input_shape)
        self.gamma = self.add_weight(shape=(), initializer=initializers.Constant(0.3), name="gamma")
        super().build(input_shape)

    def call(self, x, training=False):
        b, (h, w, c) = ops.shape(x)[0], x.shape[1:]
        f = ops.reshape(self.f(x, training=training), (b, h * w, c // 4))
        g = ops.reshape(self.g(x, training=training), (b, h * w, c // 4))
        v = ops.reshape(self.h(x, training=training), (b, h * w, c))
        beta = ops.softmax(ops.matmul(g, ops.transpose(f, (0, 2, 1))), axis=-1)
        o = ops.reshape(ops.matmul(beta, v), (b, h, w, c))
        return self.gamma * o + x

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


def sagan_discriminator():
    """SAGAN projection discriminator with spectral normalisation and minibatch-free attention, for GAN artists."""
    sn = layers.SpectralNormalization
    image = keras.Input((32, 32, 3), name="real_or_fake")
    label = keras.Input((1,), dtype="int32", name="label")
    x = image
    for i, f in enumerate((4, 8)):
        x = sn(layers.Conv2D(f, 4, strides=2, padding="same"), name=f"sn_conv{i}")(x)
        x = layers.LeakyReLU(0.2)(x)
    x = SelfAttention2D(8)(x)
    x = sn(layers.Conv2D(16, 4, strides=2, padding="same"), power_iterations=2)(x)
    x = layers.LeakyReLU(0.2)(x)
    x = ops.sum(x, axis=[1, 2])
    emb = sn(layers.Embedding(4, 16))(label)
    emb = layers.Flatten()(emb)
    proj = ops.sum(emb * x, axis=1, keepdims=True)
    return keras.Model([image, label], sn(layers.Dense(1))(x) + proj, name="D")


INPUT_KINDS["label"] = ("ids", 4)


# --------------------------------------------------------------------------
# 27. Diffusion U-Net
# --------------------------------------------------------------------------


@register
class TimeEmbedding(layers.Layer):
    def __init__(self, dim, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.half_dim = dim // 2
        self.emb = math.log(10000) / (self.half_dim - 1)
        self.emb = np.exp(np.arange(self.half_dim, dtype="float32") * -self.emb)

    def call(self, inputs):
        inputs = ops.cast(inputs, "float32")
        emb = inputs[:, None] * ops.convert_to_tensor(self.emb)[None, :]
        return ops.concatenate([ops.sin(emb), ops.cos(emb)], axis=-1)

    def compute_output_shape(self, s):
        return (s[0], self.dim)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim}


def ddpm_unet():
    """DDPM U-Net with time embedding, FiLM residual blocks and spatial attention, for generative art."""
    widths, groups = (8, 12, 16), 4
    img = layers.Input((16, 16, 3), name="noisy_image")
    t = keras.Input((), dtype="int64", name="timestep")

    temb = TimeEmbedding(16)(t)
    temb = layers.Dense(16, activation="swish")(temb)
    temb = layers.Dense(16)(temb)

    def res(x, width):
        residual = x if x.shape[-1] == width else layers.Conv2D(width, 1)(x)
        film = layers.Dense(2 * width)(keras.activations.swish(temb))[:, None, None, :]
        scale, shift = ops.split(film, 2, axis=-1)
        x = layers.GroupNormalization(groups=groups)(x)
        x = keras.activations.swish(x)
        x = layers.Conv2D(width, 3, padding="same")(x)
        x = layers.GroupNormalization(groups=groups)(x)
        x = x * (1 + scale) + shift
        x = keras.activations.swish(x)
        x = layers.Conv2D(width, 3, padding="same", kernel_initializer="orthogonal")(x)
        return layers.Add()([x, residual])

    def attn(x, width):
        y = layers.GroupNormalization(groups=groups)(x)
        y = layers.MultiHeadAttention(2, width // 2, attention_axes=(1, 2))(y, y)
        return layers.Add()([x, y])

    x = layers.Conv2D(widths[0], 3, padding="same")(img)
    skips = [x]
    for i, w in enumerate(widths):
        x = res(x, w)
        if i == 2:
            x = attn(x, w)
        skips.append(x)
        if i != len(widths) - 1:
            x = layers.Conv2D(w, 3, strides=2, padding="same")(x)
            skips.append(x)
    x = res(x, widths[-1])
    x = attn(x, widths[-1])
    for i in reversed(range(len(widths))):
        for _ in range(2):
            x = layers.Concatenate(axis=-1)([x, skips.pop()])
            x = res(x, widths[i])
        if i:
            x = layers.UpSampling2D(size=2, interpolation="nearest")(x)
            x = layers.Conv2D(widths[i - 1], 3, padding="same")(x)
    x = layers.GroupNormalization(groups=groups)(x)
    x = keras.activations.swish(x)
    eps = layers.Conv2D(3, 3, padding="same", kernel_initializer="he_uniform")(x)
    return keras.Model([img, t], eps, name="unet")


INPUT_KINDS["timestep"] = ("ids", 1000)


# --------------------------------------------------------------------------
# 28. ShuffleNetV2+ with augmentation and SE
# --------------------------------------------------------------------------


def _channel_shuffle(x, groups=2):
    h, w, c = x.shape[1:]
    x = layers.Reshape((h, w, groups, c // groups))(x)
    x = layers.Permute((1, 2, 4, 3))(x)
    return layers.Reshape((h, w, c))(x)


def _shuffle_unit(x, out, stride):
    if stride == 1:
        c = x.shape[-1] // 2
        left, right = x[..., :c], x[..., c:]
    else:
        left = layers.DepthwiseConv2D(3, strides=2, padding="same", use_bias=False)(x)
        left = layers.BatchNormalization()(left)
        left = layers.Conv2D(out // 2, 1, use_bias=False)(left)
        left = layers.ReLU()(layers.BatchNormalization()(left))
        right = x
    right = layers.Conv2D(out // 2, 1, use_bias=False)(right)
    right = layers.Activation("hard_swish")(layers.BatchNormalization()(right))
    right = layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False)(right)
    right = layers.BatchNormalization()(right)
    right = layers.Conv2D(out // 2, 1, groups=2, use_bias=False)(right)
    right = layers.ReLU()(layers.BatchNormalization()(right))
    se = layers.GlobalAveragePooling2D(keepdims=True)(right)
    se = layers.Conv2D(max(2, out // 8), 1, activation="relu")(se)
    se = layers.Conv2D(out // 2, 1, activation="hard_sigmoid")(se)
    right = layers.Multiply()([right, se])
    return _channel_shuffle(layers.Concatenate()([left, right]))


def shufflenet_se():
    """ShuffleNetV2 with squeeze-excitation and augmentation in front, for a phone app."""
    inputs = keras.Input((32, 32, 3), name="photo")
    x = layers.RandomTranslation(0.1, 0.1, fill_mode="reflect")(inputs)
    x = layers.RandomBrightness(0.2, value_range=(0, 255))(x)
    x = layers.CenterCrop(28, 28)(x)
    x = layers.Resizing(32, 32)(x)
    x = layers.Normalization(mean=[123.675, 116.28, 103.53], variance=[3409.0, 3262.0, 3291.0], axis=-1)(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    for out in (8, 16):
        x = _shuffle_unit(x, out, 2)
        x = _shuffle_unit(x, out, 1)
    # CBAM at the end
    ch_avg = layers.GlobalAveragePooling2D()(x)
    ch_max = layers.GlobalMaxPooling2D()(x)
    shared = keras.Sequential([layers.Dense(4, activation="relu"), layers.Dense(16)], name="cbam_mlp")
    ch = ops.sigmoid(shared(ch_avg) + shared(ch_max))
    x = x * layers.Reshape((1, 1, 16))(ch)
    sp = layers.Concatenate()([ops.mean(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)])
    x = x * layers.Conv2D(1, 7, padding="same", activation="sigmoid", use_bias=False)(sp)
    x = layers.GlobalMaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, activation="softmax")(x), name="shufflenet_se")


INPUT_KINDS["photo"] = ("image",)


# --------------------------------------------------------------------------
# 29. HRNet, subclassed
# --------------------------------------------------------------------------


@register
class BasicBlock(keras.layers.Layer):
    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv1 = layers.Conv2D(filters, 3, padding="same", use_bias=False)
        self.bn1 = layers.BatchNormalization()
        self.conv2 = layers.Conv2D(filters, 3, padding="same", use_bias=False)
        self.bn2 = layers.BatchNormalization()

    def call(self, x, training=None):
        y = ops.relu(self.bn1(self.conv1(x), training=training))
        y = self.bn2(self.conv2(y), training=training)
        return ops.relu(x + y)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


@register
class HRNet(keras.Model):
    """High resolution net with three branches and exchange units; predicts joint coordinates."""

    def __init__(self, widths=(4, 8, 12), joints=3, **kwargs):
        super().__init__(**kwargs)
        self.widths, self.joints = tuple(widths), joints
        self.stem = layers.Conv2D(widths[0], 3, strides=2, padding="same", activation="relu")
        self.transitions = [layers.Conv2D(w, 3, strides=2, padding="same", activation="relu") for w in widths[1:]]
        self.branches = [[BasicBlock(w) for _ in range(2)] for w in widths]
        self.fuse = {}
        for i, wi in enumerate(widths):
            for j in range(len(widths)):
                if j > i:
                    self.fuse[f"{j}->{i}"] = keras.Sequential(
                        [
                            layers.Conv2D(wi, 1, use_bias=False),
                            layers.BatchNormalization(),
                            layers.UpSampling2D(2 ** (j - i)),
                        ]
                    )
                elif j < i:
                    seq = keras.Sequential()
                    for s in range(i - j):
                        seq.add(layers.Conv2D(wi, 3, strides=2, padding="same", use_bias=False))
                        seq.add(layers.BatchNormalization())
                        if s < i - j - 1:
                            seq.add(layers.ReLU())
                    self.fuse[f"{j}->{i}"] = seq
        self.head = layers.Conv2D(joints, 1)

    def call(self, inputs, training=None):
        xs = [self.stem(inputs)]
        for t in self.transitions:
            xs.append(t(xs[-1]))
        ys = []
        for x, blocks in zip(xs, self.branches):
            for b in blocks:
                x = b(x, training=training)
            ys.append(x)
        fused = []
        for i in range(len(ys)):
            acc = ys[i]
            for j in range(len(ys)):
                if j != i:
                    acc = acc + self.fuse[f"{j}->{i}"](ys[j], training=training)
            fused.append(ops.relu(acc))
        heat = self.head(fused[0])
        # soft-argmax
        n = heat.shape[1] * heat.shape[2]
        p = ops.softmax(ops.reshape(heat, (-1, n, self.joints)), axis=1)
        grid = np.linspace(0.0, 1.0, heat.shape[1], dtype="float32")
        gy, gx = np.meshgrid(grid, grid, indexing="ij")
        gx = ops.convert_to_tensor(gx.reshape(1, n, 1))
        gy = ops.convert_to_tensor(gy.reshape(1, n, 1))
        xy = ops.stack([ops.sum(p * gx, axis=1), ops.sum(p * gy, axis=1)], axis=-1)
        return {"heatmaps": heat, "joints": xy}

    def get_config(self):
        return {**super().get_config(), "widths": list(self.widths), "joints": self.joints}


def hrnet_pose():
    """HRNet pose estimator as a subclassed model wrapped functionally, for sports analysis."""
    x = keras.Input((32, 32, 3), name="person_crop")
    return keras.Model(x, HRNet(name="hrnet")(x), name="hrnet_pose")


# --------------------------------------------------------------------------
# 30. MMoE
# --------------------------------------------------------------------------


def mmoe():
    """Multi-gate mixture of experts with click, like and watch-time tasks, for a feed ranking team."""
    n_experts, units = 4, 8
    feats = keras.Input((10,), name="user features")
    item = keras.Input((1,), dtype="int32", name="item id")
    e = layers.Flatten()(layers.Embedding(20, 4)(item))
    x = layers.concatenate([layers.LayerNormalization()(feats), e])

    experts = ops.stack(
        [layers.Dense(units, activation="relu", name=f"expert_{i}")(x) for i in range(n_experts)],
        axis=1,
    )
    outputs = {}
    for task in ("click", "like", "watch_time"):
        gate = layers.Dense(n_experts, activation="softmax", use_bias=False, name=f"gate_{task}")(x)
        mixed = ops.einsum("be,beu->bu", gate, experts)
        tower = layers.Dense(6, activation="selu", name=f"tower_{task}")(mixed)
        tower = layers.AlphaDropout(0.1)(tower)
        outputs[task] = layers.Dense(1, activation="softplus" if task == "watch_time" else "sigmoid", name=task)(tower)
    # a like can only follow a click
    outputs["like"] = outputs["like"] * outputs["click"]
    return keras.Model({"user features": feats, "item id": item}, outputs, name="mmoe")


INPUT_KINDS["item id"] = ("ids", 20)


# --------------------------------------------------------------------------
# 31. N-BEATS
# --------------------------------------------------------------------------


@register
class NBeatsBlock(keras.layers.Layer):
    def __init__(self, kind, lookback, horizon, units=8, degree=2, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.lookback, self.horizon = kind, lookback, horizon
        self.units, self.degree = units, degree
        self.fc = [layers.Dense(units, activation="relu", name=f"fc{i}") for i in range(3)]
        if kind == "generic":
            self.theta_b = layers.Dense(lookback, name="theta_b")
            self.theta_f = layers.Dense(horizon, name="theta_f")
        else:
            k = degree + 1 if kind == "trend" else 2 * degree
            self.theta_b = layers.Dense(k, use_bias=False, name="theta_b")
            self.theta_f = layers.Dense(k, use_bias=False, name="theta_f")
            self.basis_b = self._basis(lookback)
            self.basis_f = self._basis(horizon)

    def _basis(self, n):
        t = np.arange(n) / n
        if self.kind == "trend":
            return np.stack([t**i for i in range(self.degree + 1)]).astype("float32")
        rows = [np.cos(2 * np.pi * (i + 1) * t) for i in range(self.degree)]
        rows += [np.sin(2 * np.pi * (i + 1) * t) for i in range(self.degree)]
        return np.stack(rows).astype("float32")

    def build(self, input_shape):
        shape = tuple(input_shape)
        for d in self.fc:
            d.build(shape)
            shape = (shape[0], self.units)
        self.theta_b.build(shape)
        self.theta_f.build(shape)
        self.built = True

    def call(self, x):
        for d in self.fc:
            x = d(x)
        b, f = self.theta_b(x), self.theta_f(x)
        if self.kind != "generic":
            b, f = ops.dot(b, self.basis_b), ops.dot(f, self.basis_f)
        return b, f

    def compute_output_shape(self, s):
        return (s[0], self.lookback), (s[0], self.horizon)

    def get_config(self):
        keys = ("kind", "lookback", "horizon", "units", "degree")
        return {**super().get_config(), **{k: getattr(self, k) for k in keys}}


def nbeats():
    """N-BEATS with trend, seasonality and generic stacks and backcast subtraction, for demand forecasting."""
    lookback, horizon = 12, 4
    stack_input = layers.Input(shape=(lookback,), name="stack_input")
    level = ops.max(ops.abs(stack_input), axis=1, keepdims=True) + 1e-3
    residuals = stack_input / level
    forecast = None
    for i, kind in enumerate(["trend", "seasonality", "generic", "generic"]):
        backcast, block_forecast = NBeatsBlock(kind, lookback, horizon, name=f"{i}_{kind}_block")(residuals)
        residuals = layers.subtract([residuals, backcast], name=f"subtract_{i}")
        if forecast is None:
            forecast = block_forecast
        else:
            forecast = layers.add([forecast, block_forecast], name=f"add_{i}")
    return keras.Model(stack_input, forecast * level, name="nbeats")


# --------------------------------------------------------------------------
# 32. Temporal fusion transformer
# --------------------------------------------------------------------------


@register
class GRN(layers.Layer):
    """Gated residual network with optional context."""

    def __init__(self, units, output_units=None, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.units, self.output_units, self.dropout = units, output_units, dropout
        out = output_units or units
        self.dense_x = layers.Dense(units)
        self.dense_c = layers.Dense(units, use_bias=False)
        self.dense_2 = layers.Dense(units)
        self.drop = layers.Dropout(dropout)
        self.gate = layers.Dense(2 * out)
        self.skip = layers.Dense(out)
        self.norm = layers.LayerNormalization()

    def call(self, x, context=None, training=None):
        h = self.dense_x(x)
        if context is not None:
            c = self.dense_c(context)
            if len(h.shape) == 3 and len(c.shape) == 2:
                c = ops.expand_dims(c, 1)
            h = h + c
        h = self.dense_2(ops.elu(h))
        h = self.drop(h, training=training)
        a, b = ops.split(self.gate(h), 2, axis=-1)
        h = a * ops.sigmoid(b)
        if x.shape[-1] != h.shape[-1]:
            x = self.skip(x)
        return self.norm(x + h)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "output_units": self.output_units,
            "dropout": self.dropout,
        }


def _variable_selection(variables, units, context, name):
    flat = layers.Concatenate(axis=-1)(variables)
    weights = GRN(units, output_units=len(variables), name=f"{name}_weights")(flat, context=context)
    weights = layers.Softmax(axis=-1)(weights)[..., None, :]
    each = [GRN(units, name=f"{name}_{i}")(v) for i, v in enumerate(variables)]
    each = ops.stack(each, axis=-1)
    return ops.sum(weights * each, axis=-1)


def temporal_fusion():
    """Temporal fusion transformer with nested dict inputs and quantile outputs, for energy forecasts."""
    past_len, future_len, d = 8, 4, 8
    inputs = {
        "static": {"region": keras.Input((), dtype="int32", name="region")},
        "past": {
            "load": keras.Input((past_len, 1), name="load"),
            "temperature": keras.Input((past_len, 1), name="temperature"),
        },
        "known": {
            "hour": keras.Input((past_len + future_len,), dtype="int32", name="hour"),
            "holiday": keras.Input((past_len + future_len, 1), dtype="bool", name="holiday"),
        },
    }
    static = layers.Embedding(5, d)(inputs["static"]["region"])
    c_select = GRN(d, name="c_select")(static)
    c_h, c_c = GRN(d, name="c_h")(static), GRN(d, name="c_c")(static)
    c_enrich = GRN(d, name="c_enrich")(static)

    load = layers.Dense(d)(inputs["past"]["load"])
    temp = layers.Dense(d)(inputs["past"]["temperature"])
    hour = layers.Embedding(24, d)(inputs["known"]["hour"])
    holiday = layers.Dense(d)(ops.cast(inputs["known"]["holiday"], "float32"))

    past = _variable_selection([load, temp, hour[:, :past_len], holiday[:, :past_len]], d, c_select, "past")
    future = _variable_selection([hour[:, past_len:], holiday[:, past_len:]], d, c_select, "future")
    enc, h, c = layers.LSTM(d, return_sequences=True, return_state=True)(past, initial_state=[c_h, c_c])
    dec = layers.LSTM(d, return_sequences=True)(future, initial_state=[h, c])
    seq = ops.concatenate([enc, dec], axis=1)
    skip = ops.concatenate([past, future], axis=1)
    gate = layers.TimeDistributed(layers.Dense(d, activation="sigmoid"))(seq)
    seq = layers.LayerNormalization()(skip + gate * seq)
    enriched = GRN(d, name="enrichment")(seq, context=c_enrich)
    att = layers.MultiHeadAttention(2, 4)(
        enriched[:, past_len:],
        enriched,
        enriched,
        attention_mask=np.tril(np.ones((1, future_len, past_len + future_len), "bool"), past_len),
    )
    out = GRN(d, name="decoder_out")(layers.LayerNormalization()(att + enriched[:, past_len:]))
    raw = layers.Dense(3)(out)
    # keep the quantiles ordered
    quantiles = ops.cumsum(ops.concatenate([raw[..., :1], ops.softplus(raw[..., 1:])], axis=-1), axis=-1)
    return keras.Model(inputs, {"p10_p50_p90": quantiles}, name="tft")


INPUT_KINDS.update(region=("ids", 5), hour=("ids", 24))


# --------------------------------------------------------------------------
# 33. TabNet
# --------------------------------------------------------------------------


@register
class Sparsemax(layers.Layer):
    def call(self, z):
        n = z.shape[-1]
        z = z - ops.max(z, axis=-1, keepdims=True)
        z_sorted = ops.flip(ops.sort(z, axis=-1), axis=-1)
        cssv = ops.cumsum(z_sorted, axis=-1) - 1.0
        rank = ops.cast(ops.arange(1, n + 1), z.dtype)
        support = ops.cast(rank * z_sorted > cssv, z.dtype)
        k = ops.sum(support, axis=-1, keepdims=True)
        tau = ops.sum(support * z_sorted, axis=-1, keepdims=True)
        tau = (tau - 1.0) / k
        return ops.maximum(z - tau, 0.0)

    def compute_output_shape(self, s):
        return s


def _glu_step(x, shared, units, residual=True):
    fc = shared if shared is not None else layers.Dense(2 * units, use_bias=False)
    h = layers.BatchNormalization(momentum=0.7)(fc(x))
    h = h[:, :units] * ops.sigmoid(h[:, units:])
    if residual:
        h = (h + x) * float(np.sqrt(0.5))
    return h


def tabnet():
    """TabNet with sparsemax feature masks and prior scales, for a credit scoring notebook."""
    n_d, n_a, steps, gamma = 4, 4, 3, 1.3
    units = n_d + n_a
    cols = keras.Input((9,), name="features")
    x = layers.BatchNormalization(momentum=0.9)(cols)
    shared1 = layers.Dense(2 * units, use_bias=False, name="shared_fc_1")
    shared2 = layers.Dense(2 * units, use_bias=False, name="shared_fc_2")

    def transformer(v):
        v = _glu_step(v, shared1, units, residual=False)
        v = _glu_step(v, shared2, units)
        return _glu_step(v, None, units)

    att = transformer(x)[:, n_d:]
    prior = ops.ones_like(x)
    decision, importance = 0.0, 0.0
    for i in range(steps):
        m = layers.Dense(9, use_bias=False, name=f"attentive_{i}")(att)
        m = layers.BatchNormalization(momentum=0.7)(m)
        m = Sparsemax(name=f"sparsemax_{i}")(m * prior)
        prior = prior * (gamma - m)
        h = transformer(m * x)
        d, att = h[:, :n_d], h[:, n_d:]
        d = ops.relu(d)
        decision = d + decision
        importance = importance + m * ops.sum(d, axis=1, keepdims=True)
    logits = layers.Dense(2, use_bias=False, name="logits")(decision)
    return keras.Model(cols, (ops.softmax(logits), importance), name="tabnet")


# --------------------------------------------------------------------------
# 34. Style transfer
# --------------------------------------------------------------------------


@register
class ReflectionPadding2D(layers.Layer):
    def __init__(self, padding=1, **kwargs):
        super().__init__(**kwargs)
        self.padding = padding

    def call(self, x):
        p = self.padding
        return ops.pad(x, [[0, 0], [p, p], [p, p], [0, 0]], mode="reflect")

    def compute_output_shape(self, s):
        p = 2 * self.padding
        return (s[0], s[1] and s[1] + p, s[2] and s[2] + p, s[3])

    def get_config(self):
        return {"padding": self.padding, **super().get_config()}


@register
class ConditionalInstanceNorm(layers.Layer):
    def __init__(self, n_styles, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.n_styles, self.epsilon = n_styles, epsilon

    def build(self, input_shape):
        c = input_shape[0][-1]
        self.gammas = self.add_weight(
            name="gammas", shape=(self.n_styles, c), initializer=initializers.RandomNormal(1.0, 0.1)
        )
        self.betas = self.add_weight(name="betas", shape=(self.n_styles, c), initializer="zeros")

    def call(self, inputs):
        x, style_weights = inputs
        mean, var = ops.moments(x, axes=[1, 2], keepdims=True)
        gamma = ops.matmul(style_weights, self.gammas)[:, None, None]
        beta = ops.matmul(style_weights, self.betas)[:, None, None]
        return gamma * (x - mean) / ops.sqrt(var + self.epsilon) + beta

    def compute_output_shape(self, s):
        return s[0]

    def get_config(self):
        return {**super().get_config(), "n_styles": self.n_styles, "epsilon": self.epsilon}


def style_transfer():
    """Fast multi-style transfer net with reflection padding and instance norm, any image size, for artists."""
    img = keras.Input((None, None, 3), name="content")
    style = keras.Input((3,), name="style_logits")
    s = layers.Softmax()(style)

    def conv(x, f, k, stride=1, act="relu"):
        x = ReflectionPadding2D(k // 2)(x)
        x = layers.Conv2D(f, k, strides=stride)(x)
        x = ConditionalInstanceNorm(3)([x, s])
        return layers.Activation(act)(x) if act else x

    x = img / 255.0
    x = conv(x, 4, 9)
    x = conv(x, 6, 3, 2)
    x = conv(x, 8, 3, 2)
    for _ in range(2):
        x = layers.add([x, conv(conv(x, 8, 3), 8, 3, act=None)])
    for f in (6, 4):
        x = layers.UpSampling2D(2)(x)
        x = conv(x, f, 3)
    x = ReflectionPadding2D(4)(x)
    x = layers.Conv2D(3, 9)(x)
    x = layers.GroupNormalization(groups=-1, name="instance_norm_out")(x)
    return keras.Model([img, style], (ops.tanh(x) + 1.0) * 127.5, name="style_transfer")


INPUT_KINDS["content"] = ("image",)
UNKNOWN_SIZES["style_transfer"] = {1: 16, 2: 20}


# --------------------------------------------------------------------------
# 35. Super resolution
# --------------------------------------------------------------------------


@register
class PixelShuffle(layers.Layer):
    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, x):
        b, h, w, c = ops.shape(x)
        r = self.scale
        x = ops.reshape(x, (b, h, w, r, r, c // (r * r)))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (b, h * r, w * r, c // (r * r)))

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


def rcan_super_resolution():
    """RCAN-style x4 super resolution with pixel shuffle and channel attention, for satellite images."""
    lr = keras.Input((8, 8, 3), name="low_res")
    mean = np.array([0.4488, 0.4371, 0.4040], dtype="float32")
    x = head = layers.Conv2D(8, 3, padding="same", name="head")(lr - mean)
    for i in range(2):
        y = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
        y = layers.Conv2D(8, 3, padding="same")(y)
        ca = layers.GlobalAveragePooling2D()(y)
        ca = layers.Reshape((1, 1, 8))(ca)
        ca = layers.Conv2D(4, 1)(ca)
        ca = layers.PReLU(shared_axes=[1, 2])(ca)
        ca = layers.Conv2D(8, 1, activation="sigmoid")(ca)
        x = x + 0.1 * (y * ca)
    x = layers.Conv2D(8, 3, padding="same")(x) + head
    x = layers.Conv2D(16, 3, padding="same")(x)
    x = PixelShuffle(2, name="shuffle_1")(x)
    x = layers.Conv2D(12, 3, padding="same")(x)
    x = ops.nn.depth_to_space(x, 2)
    up = layers.UpSampling2D(4, interpolation="bilinear")(lr)
    sr = ops.clip(x + up, 0.0, 1.0)
    return keras.Model(lr, sr, name="rcan")


INPUT_KINDS["low_res"] = ("unit",)


# --------------------------------------------------------------------------
# 36. Video classifier
# --------------------------------------------------------------------------


def video_classifier():
    """Frozen frame CNN in TimeDistributed with a masked RNN and attention pooling, for action recognition."""
    cnn = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Rescaling(1.0 / 255),
            layers.Conv2D(6, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.SeparableConv2D(8, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
        ],
        name="frame_backbone",
    )
    cnn.trainable = False

    frames = keras.Input((6, 16, 16, 3), dtype="uint8", name="frames")
    mask = keras.Input((6,), dtype="bool", name="frame_mask")
    x = layers.TimeDistributed(cnn)(ops.cast(frames, "float32"))
    x = layers.GRU(8, return_sequences=True)(x, mask=mask)
    cells = [layers.LSTMCell(8), layers.GRUCell(6)]
    x = layers.RNN(cells, return_sequences=True, name="stacked")(x, mask=mask)
    # soft attention over frames
    e = layers.Dense(1, activation="tanh")(x)
    e = layers.Flatten()(e)
    e = e + (1.0 - ops.cast(mask, "float32")) * -1e9
    a = layers.Activation("softmax", name="frame_weights")(e)
    a = layers.RepeatVector(6)(a)
    a = layers.Permute([2, 1])(a)
    pooled = layers.Multiply()([x, a])
    pooled = ops.sum(pooled, axis=1)
    out = layers.Dense(3, activation="softmax", name="action")(pooled)
    return keras.Model([frames, mask], out, name="video_classifier")


INPUT_KINDS.update(frames=("image",), frame_mask=("mask",))


# --------------------------------------------------------------------------
# 37. ConvLSTM
# --------------------------------------------------------------------------


def convlstm_nowcast():
    """Sequential ConvLSTM next-frame predictor ending in Conv3D, for precipitation nowcasting."""
    model = keras.Sequential(name="nowcast")
    model.add(keras.Input((None, 12, 12, 1)))
    model.add(layers.ConvLSTM2D(6, (5, 5), padding="same", return_sequences=True, activation="relu"))
    model.add(layers.BatchNormalization())
    model.add(layers.ConvLSTM2D(4, 3, padding="same", return_sequences=True, recurrent_activation="hard_sigmoid"))
    model.add(layers.BatchNormalization())
    model.add(layers.Conv3D(1, (3, 3, 3), activation="sigmoid", padding="same"))
    return model


UNKNOWN_SIZES["nowcast"] = {1: 5}


# --------------------------------------------------------------------------
# 38. Capsule network
# --------------------------------------------------------------------------


@register
def squash(vectors, axis=-1):
    n = ops.sum(ops.square(vectors), axis=axis, keepdims=True)
    return n / (1.0 + n) * vectors / ops.sqrt(n + 1e-7)


@register
class DigitCaps(layers.Layer):
    def __init__(self, num_capsule, dim_capsule, routings=3, **kwargs):
        super().__init__(**kwargs)
        self.num_capsule = num_capsule
        self.dim_capsule = dim_capsule
        self.routings = routings

    def build(self, input_shape):
        self.n_in, self.d_in = input_shape[1], input_shape[2]
        self.W = self.add_weight(
            shape=[self.num_capsule, self.n_in, self.dim_capsule, self.d_in],
            initializer="glorot_uniform",
            name="W",
        )
        self.built = True

    def call(self, inputs):
        u_hat = ops.einsum("jiod,bid->bjio", self.W, inputs)
        b = ops.zeros((ops.shape(inputs)[0], self.num_capsule, self.n_in))
        for r in range(self.routings):
            c = ops.softmax(b, axis=1)
            v = squash(ops.einsum("bji,bjio->bjo", c, u_hat))
            if r < self.routings - 1:
                b = b + ops.einsum("bjo,bjio->bji", v, u_hat)
        return v

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_capsule, self.dim_capsule)

    def get_config(self):
        config = {
            "num_capsule": self.num_capsule,
            "dim_capsule": self.dim_capsule,
            "routings": self.routings,
        }
        return dict(list(super().get_config().items()) + list(config.items()))


def capsnet():
    """CapsNet with routing by agreement and masked reconstruction decoder, for a paper reproduction."""
    n_class = 3
    x = layers.Input((16, 16, 1), name="x")
    y = layers.Input((n_class,), name="y_onehot")
    c = layers.Conv2D(8, 5, activation="relu", name="conv1")(x)
    p = layers.Conv2D(8, 5, strides=2, padding="valid", name="primarycap_conv2d")(c)
    p = layers.Reshape((-1, 4), name="primarycap_reshape")(p)
    p = layers.Activation(squash, name="primarycap_squash")(p)
    d = DigitCaps(n_class, 6, routings=3, name="digitcaps")(p)
    length = ops.sqrt(ops.sum(ops.square(d), axis=-1) + 1e-7)
    masked = layers.Flatten()(d * y[..., None])
    decoder = keras.models.Sequential(name="decoder")
    decoder.add(layers.Dense(12, activation="relu", input_shape=(n_class * 6,)))
    decoder.add(layers.Dense(16, activation="relu"))
    decoder.add(layers.Dense(256, activation="sigmoid"))
    decoder.add(layers.Reshape((16, 16, 1), name="out_recon"))
    return keras.models.Model([x, y], [length, decoder(masked)], name="capsnet")


# --------------------------------------------------------------------------
# 39. V-Net 3D
# --------------------------------------------------------------------------


def vnet_3d():
    """V-Net for 3D volumes with PReLU residual stages and cropped skip, for MRI tumour segmentation."""
    vol = keras.Input((16, 16, 8, 2), name="t1_t2")

    def stage(x, f, n, name):
        short = layers.Conv3D(f, 1, padding="same", name=name + "-proj")(x)
        for i in range(n):
            x = layers.Conv3D(f, 3, padding="same", name=f"{name}-conv{i}")(x)
            x = layers.GroupNormalization(groups=2, name=f"{name}-gn{i}")(x)
            if i < n - 1:
                x = layers.PReLU(shared_axes=[1, 2, 3], name=f"{name}-prelu{i}")(x)
        return layers.PReLU(shared_axes=[1, 2, 3], name=name + "-out")(layers.add([x, short]))

    s1 = stage(vol, 4, 1, "down1")
    x = layers.Conv3D(6, 2, strides=2, activation="relu", name="pool1")(s1)
    s2 = stage(x, 6, 2, "down2")
    x = layers.MaxPooling3D((2, 2, 1), name="pool2")(s2)
    x = stage(x, 8, 2, "bottom")
    x = layers.SpatialDropout3D(0.2)(x)
    x = layers.UpSampling3D((2, 2, 1), name="up2")(x)
    x = stage(layers.concatenate([x, s2]), 6, 2, "up_stage2")
    x = layers.Conv3DTranspose(4, 2, strides=2, activation="relu", name="up1")(x)
    x = stage(layers.concatenate([x, s1]), 4, 1, "up_stage1")
    x = layers.Cropping3D(((1, 1), (1, 1), (1, 1)))(x)
    seg = layers.Conv3D(3, 1, activation="softmax", name="tissue")(x)
    volume = ops.mean(seg, axis=(1, 2, 3))
    return keras.Model(vol, {"segmentation": seg, "volume fraction": volume}, name="vnet")


# --------------------------------------------------------------------------
# 40. LSTM autoencoder
# --------------------------------------------------------------------------


def lstm_anomaly_autoencoder():
    """LSTM autoencoder with RepeatVector and per-sample anomaly score, for machine sensor monitoring."""
    timesteps, sensors = 10, 3
    inputs = keras.Input((timesteps, sensors), name="window")
    x = layers.Normalization(mean=[0.1, -0.2, 0.3], variance=[1.0, 2.0, 0.5])(inputs)
    target = x
    x = layers.Masking(mask_value=0.0)(x)
    x = layers.GaussianNoise(0.05)(x)
    x = layers.LSTM(12, return_sequences=True)(x)
    x = layers.LSTM(4, return_sequences=False, name="code")(x)
    # highway layer on the code
    t = layers.Dense(4, activation="sigmoid", bias_initializer=keras.initializers.Constant(-1.0))(x)
    h = layers.Dense(4, activation="tanh")(x)
    x = t * h + (1 - t) * x
    x = layers.RepeatVector(timesteps)(x)
    x = layers.LSTM(4, return_sequences=True)(x)
    x = layers.LSTM(12, return_sequences=True, go_backwards=True)(x)
    x = ops.flip(x, axis=1)
    out = layers.TimeDistributed(layers.Dense(sensors), name="reconstruction")(x)
    error = ops.abs(out - target)
    score = layers.GlobalAveragePooling1D()(error)
    worst = ops.argmax(score, axis=-1)
    alarm = ops.any(score > 1.0, axis=-1)
    return keras.Model(
        inputs,
        {"reconstruction": out, "score": score, "worst_sensor": worst, "alarm": alarm},
        name="lstm_autoencoder",
    )


MODELS = [
    attention_unet,
    deeplab_v3_plus,
    tiny_yolo,
    centernet,
    siamese_signatures,
    two_tower,
    dlrm,
    wide_deep_cross,
    sasrec,
    bert_mlm,
    mixtral_decoder,
    vit_lora,
    swin_tiny,
    gmlp_patches,
    convnext_bf16,
    perceiver,
    seq2seq_lstm,
    attention_nmt,
    crnn_ocr,
    wavenet,
    conformer_asr,
    keyword_attention_rnn,
    pointnet_segmentation,
    molecule_gnn,
    conv_vae,
    sagan_discriminator,
    ddpm_unet,
    shufflenet_se,
    hrnet_pose,
    mmoe,
    nbeats,
    temporal_fusion,
    tabnet,
    style_transfer,
    rcan_super_resolution,
    video_classifier,
    convlstm_nowcast,
    capsnet,
    vnet_3d,
    lstm_anomaly_autoencoder,
]


def _draw(model, tensor, batch, seed, index):
    rng = np.random.default_rng([seed, index])
    sizes = UNKNOWN_SIZES.get(model.name, {})
    shape = [batch] + [sizes.get(axis, 6) if d is None else d for axis, d in enumerate(tensor.shape[1:], start=1)]
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    kind, *args = INPUT_KINDS.get(tensor.name, ("normal",))

    def keep():
        # one length per sample, the same for every input of that many positions
        lengths = np.random.default_rng([seed, 12345, shape[1]]).integers(
            max(1, shape[1] // 2), shape[1] + 1, size=batch
        )
        return np.arange(shape[1])[None, :] < lengths[:, None]

    if kind == "ids":
        return rng.integers(0, args[0], size=shape).astype(dtype)
    if kind == "tokens":
        return (rng.integers(1, args[0], size=shape) * keep()).astype(dtype)
    if kind == "mask":
        return keep()
    if kind == "adjacency":
        a = rng.random(shape) < 0.4
        a = a | np.swapaxes(a, 1, 2) | np.eye(shape[1], dtype=bool)
        return a.astype(dtype)
    if kind == "image":
        return rng.integers(0, 256, size=shape).astype(dtype)
    if kind == "unit":
        return rng.random(shape).astype(dtype)
    if dtype == "bool":
        return rng.random(shape) < 0.3
    return rng.normal(size=shape).astype(dtype)


def example(model, batch, seed):
    """Random inputs with the structure that the model takes."""
    struct = getattr(model, "_inputs_struct", None)
    if struct is None:
        struct = model.inputs if len(model.inputs) > 1 else model.inputs[0]
    flat = keras.tree.flatten(struct)
    arrays = [_draw(model, t, batch, seed, i) for i, t in enumerate(flat)]
    return keras.tree.pack_sequence_as(struct, arrays)
