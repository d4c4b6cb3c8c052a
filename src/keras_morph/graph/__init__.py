"""From a Keras model to its channels, and which of them are alive."""
