"""Labelled images in one form, whatever they come from, in the range that a model takes."""

__all__ = ["NAMES", "PIXELS", "Batches", "Choice", "Dataset", "Images", "Pixels", "choose_pixels", "load"]

from keras_morph.datasets.arrays import Dataset
from keras_morph.datasets.catalog import NAMES, load
from keras_morph.datasets.pixels import PIXELS, Choice, Pixels, choose_pixels
from keras_morph.datasets.streams import Batches, Images
