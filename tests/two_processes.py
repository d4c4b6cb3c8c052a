"""For `--base-model-name two_processes:tiny`: nothing in it is moved by noise alone, as a bias in front of a normalization is."""

import keras
from keras import layers


def tiny(input_shape):
    image = x = keras.Input(input_shape)
    own = {"synchronized": True} if keras.backend.backend() == "tensorflow" else {}
    for number, width in enumerate((6, 5)):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = layers.BatchNormalization(name=f"bn{number}", **own)(x)
        x = layers.ReLU(name=f"relu{number}")(x)
    return keras.Model(image, x)
