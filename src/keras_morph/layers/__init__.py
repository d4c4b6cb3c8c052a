"""What we know of each layer type: one table, complete once this package is imported."""

from keras_morph.layers import contractions  # noqa: F401 -- it imports and completes the rows of all others
