"""Networks of `keras.applications` in a state in which law 1 means something, however deep they are."""

import inspect

import keras
import models
import numpy as np
from keras import applications

import keras_morph as km
from keras_morph.graph.closure import close
from keras_morph.layers.rules import variable

NAMES = sorted(name for name, value in vars(applications).items() if inspect.isfunction(value) and name[0].isupper())
# The smallest of each family (of Inception the one that is built fast); Keras does not build NASNetMobile on PyTorch.
FAMILIES = (
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "Xception",
)


def build(name, classes=10):
    """One of them at the smallest images that it takes, without its softmax."""
    size = km.zoo.minimum_size(name)
    function = getattr(applications, name)
    return function(input_shape=(size, size, 3), weights=None, classes=classes, classifier_activation=None)


def images(model, count=16):
    """Random images of the range that a network expects."""
    prepares = any(
        isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)) for layer in model.layers[:3]
    )
    return (100 if prepares else 1) * models.examples(model, count)


def prepare(model, kind_of_structure, inputs, seed=1):
    """Draw a structure, and give the model weights for it.

    Without care the same comes out whatever enters a deep network of which little is left, and anything would be exact;
    or the network is chaotic, and the last bit of float32 decides. So kernels grow by what they lose, BatchNormalization
    gets the statistics of the masked network but for some noise, small gammas, and betas that leave no ReLU always off;
    where there is none, small biases and kernels of a positive mean do the same.

    Args:
        model: a network; it loses its weights.
        kind_of_structure: `(graph, random) -> closed structure`.
        inputs: a batch of examples.

    Returns:
        The graph and the structure.
    """
    random = np.random.default_rng(seed)
    graph = km.trace(models.randomize(model, seed))
    structure = kind_of_structure(graph, random)
    layers = list(model._flatten_layers())
    normalized = any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    for layer in layers:
        if not normalized and getattr(layer, "bias", None) is not None:
            layer.bias.assign(0.1 * abs(layer.bias))
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.beta.assign(abs(layer.beta))
            if layer.scale:
                layer.gamma.assign(0.4 * layer.gamma)
    counts = close(graph, structure.groups(graph)).counts
    for layer in graph.layers:
        for weight in layer.weights:
            read = [v for axis, v in enumerate(weight.vectors) if v >= 0 and axis != weight.scores]
            if weight.scores is not None and read and counts[read[0]]:
                kernel = variable(layer.operation, weight.name)
                grown = keras.ops.multiply(kernel, np.sqrt(len(graph.vectors[read[0]]) / counts[read[0]]))
                if not normalized:
                    grown = 0.5 * grown + 1.5 / (counts[read[0]] * weight.static_size)
                kernel.assign(grown)
    masked = km.masked(model, structure)
    # By the names that tracing gives: copies hold their layers in another order, and under other names of their own.
    normalizations = [
        {layer.name: layer.operation for layer in km.trace(each).layers if layer.kind == "BatchNormalization"}
        for each in (model, masked)
    ]
    for layer in masked._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
        elif isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    masked(inputs, training=True)
    for name, target in normalizations[0].items():
        source = normalizations[1][name]
        mean, variance = (keras.ops.convert_to_numpy(x) for x in (source.moving_mean, source.moving_variance))
        variance = np.maximum(variance, 1e-4)  # that of a constant channel may come out below 0
        target.moving_mean.assign(mean + 0.1 * random.normal(size=mean.shape) * np.sqrt(variance))
        target.moving_variance.assign(variance * random.uniform(0.8, 1.2, variance.shape))
    return graph, structure
