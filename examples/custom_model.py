"""A model of your own in the Model Zoo: learn its structure on handwritten digits, then rebuild it.

    python examples/custom_model.py

`tiny_resnet` is written like a `keras.applications` function without its top: it takes the shape of an image and
returns feature maps. MorphNetModel adds the classifier. The same function works on the command line:

    keras-morph train --base-model-name examples.custom_model:tiny_resnet --dataset digits
"""

import sys

import keras
import numpy as np
from keras import layers

import keras_morph as km
from keras_morph.datasets import load


def tiny_resnet(input_shape):
    """Two residual blocks; the second one halves the image and has a projection."""
    image = keras.Input(input_shape)
    x = layers.ReLU(name="stem_relu")(conv_bn(image, 16, 3, name="stem"))
    for number, (width, strides) in enumerate([(16, 1), (32, 2)], start=1):
        name = f"block{number}"
        shortcut = x if strides == 1 else conv_bn(x, width, 1, strides=strides, name=f"{name}_projection")
        x = layers.ReLU(name=f"{name}_relu1")(conv_bn(x, width, 3, strides=strides, name=f"{name}_conv1"))
        x = layers.Add(name=f"{name}_add")([shortcut, conv_bn(x, width, 3, name=f"{name}_conv2")])
        x = layers.ReLU(name=f"{name}_relu2")(x)
    return keras.Model(image, x, name="tiny_resnet")


def conv_bn(x, width, size, *, name, strides=1):
    """A convolution with BatchNormalization, whose moving averages follow within an epoch of digits."""
    x = layers.Conv2D(width, size, strides=strides, padding="same", use_bias=False, name=name)(x)
    return layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)


def main(log_dir="runs", epochs=10):
    """Train, and give the model and its rebuilt, smaller version."""
    keras.utils.set_random_seed(0)
    data = load("digits")
    batches = len(data.x_train) // 32
    model = km.zoo.MorphNetModel(
        tiny_resnet,
        data.num_classes,
        learning_rate=keras.optimizers.schedules.CosineDecay(1e-2, epochs * batches),
        batch_size=32,
        input_shape=data.image_shape,
        morphnet_regularizer_algorithm="Gamma",
        morphnet_target_cost="FLOPs",
        log_dir=log_dir,
    )
    initial_cost = model.get_model_cost()
    model.set_morphnet_regularization_strength(3 / initial_cost)
    model.export_model_config_with_inputs()
    random = np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        order = random.permutation(len(data.x_train))[: 32 * batches]
        for batch in order.reshape(batches, 32):
            loss, accuracy, cost = model.train(data.x_train[batch], data.y_train[batch])
        val_accuracy, cost = model.validate(data.x_val, data.y_val)
        share = cost / initial_cost
        print(f"epoch {epoch}: {loss=:.2f}, {accuracy=:.3f}, {val_accuracy=:.3f}, {share:.1%} of the FLOPs")
        model.export_model_config_with_inputs()
    small = km.rebuild(model.learner, model.learner.structure())
    print(f"{small.count_params():,} of {model.learner.seed.count_params():,} parameters; files are in {model.folder}")
    model.close()
    return model, small


if __name__ == "__main__":
    main(*sys.argv[1:2])
