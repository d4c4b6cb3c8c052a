"""Labelled images in one form, whatever they come from."""

__all__ = ["NAMES", "Dataset", "load"]

from keras_morph.datasets.arrays import Dataset
from keras_morph.datasets.catalog import NAMES, load
