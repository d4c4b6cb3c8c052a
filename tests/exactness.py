"""Law 1 as a function: the rebuilt model returns what the masked seed returns."""

import models
import numpy as np

import keras_morph as km


def assert_exact(model, structure, tolerance=1e-5, inputs=None):
    """Compares the rebuilt model with the masked seed, and hands the rebuilt model back; options are those of `trace`.

    Without inputs random numbers are given.

    The difference is held against the largest output, and where the outputs depend on the input noticeably, against
    how much they do: else a network that ignores its input but for a large constant would pass.
    """
    inputs = models.examples(model) if inputs is None else inputs
    small = km.rebuild(model, structure)
    expected, received = (models.outputs(each, inputs) for each in (km.masked(model, structure), small))
    assert_equal_outputs(received, expected, tolerance)
    return small


def assert_equal_outputs(received, expected, tolerance=1e-5):
    assert len(received) == len(expected)
    for one, other in zip(received, expected, strict=True):
        assert np.isfinite(other).all()
        largest, varying = np.abs(other).max(), np.ptp(other, axis=0).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest)
        if varying > 1e-2 * largest:
            # Of numbers that differ by a hundredth, float32 keeps the last digits of the whole.
            bound = tolerance * max(3 * varying, 0.1 * largest)
            np.testing.assert_allclose(one - one[:1], other - other[:1], rtol=0, atol=bound)


def largest_difference(received, expected):
    """The largest difference of any output, relative to the largest number in it."""
    assert len(received) == len(expected)
    assert all(np.isfinite(other).all() for other in expected)
    return float(
        np.max(
            [
                np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)
                for a, b in zip(received, expected, strict=True)
            ]
        )
    )
