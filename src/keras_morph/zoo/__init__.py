"""Architectures by name: the Model Zoo's, every other of `keras.applications`, and small residual networks."""

__all__ = [
    "NAMES",
    "WITHOUT_GAMMA",
    "MorphNetModel",
    "build",
    "digits_resnet",
    "known_names",
    "minimum_size",
    "resnet20",
    "resnet56",
    "resnet_cifar",
]

from keras_morph.zoo.applications import NAMES, WITHOUT_GAMMA, build, known_names, minimum_size
from keras_morph.zoo.morphnet_model import MorphNetModel
from keras_morph.zoo.small import digits_resnet, resnet20, resnet56, resnet_cifar
