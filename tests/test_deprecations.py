"""What Keras will drop fails every test that uses it: these are examples of its warnings, and of ours to heed."""

import warnings

import pytest
from keras import layers

pytestmark = pytest.mark.once


def test_what_keras_will_drop_is_an_error():
    with pytest.raises(UserWarning, match="deprecated"):
        layers.LeakyReLU(alpha=0.1)


@pytest.mark.parametrize(("module", "is_ours"), [("keras_morph.pipeline", True), ("keras.src.trainers", False)])
def test_what_we_use_that_a_library_will_drop_is_an_error(module, is_ours):
    def warn():
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)

    if is_ours:
        with pytest.raises(DeprecationWarning):
            warn()
    else:
        warn()
