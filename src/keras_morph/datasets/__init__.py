"""Labelled images in one form, whatever they come from, in the range that a model takes."""

__all__ = ["NAMES", "PIXELS", "Choice", "Dataset", "Pixels", "choose_pixels", "load"]

from keras_morph.datasets.arrays import Dataset
from keras_morph.datasets.catalog import NAMES, load
from keras_morph.datasets.pixels import PIXELS, Choice, Pixels, choose_pixels
