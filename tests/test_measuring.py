"""Measured latencies: in alternation, without the first round, as median and percentiles."""

from types import SimpleNamespace

import keras
import models
import numpy as np
import pytest
from keras import layers

import keras_morph as km
from keras_morph.costs import measured as measuring


class Timed:
    """Stands in for a model whose passes take these seconds, one after the other, on a clock that it moves."""

    inputs = (SimpleNamespace(shape=(None, 4)),)

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.received = clock, iter(seconds), []

    def predict_on_batch(self, inputs):
        self.received.append(inputs.shape)
        self.clock.order.append(self)
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0, order=[])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.once
def test_the_first_round_is_left_out_and_the_others_are_summed_up(clock):
    model = Timed(clock, [100, 100, *range(1, 23)])  # two passes a round: rounds of 1.5, 3.5, ..., 21.5 seconds
    found = km.measure({"one": model}, batch_size=5, rounds=11, repeats=2)["one"]
    np.testing.assert_allclose((found.low, found.median, found.high), (3.5, 11.5, 19.5))
    assert (found.rounds, found.batch_size) == (11, 5)
    assert model.received == [(5, 4)] * 24


@pytest.mark.once
def test_models_take_turns(clock):
    one, other = (Timed(clock, [seconds] * 6) for seconds in (1, 2))
    found = km.measure({"one": one, "other": other}, rounds=2, repeats=2)
    assert clock.order == [one, one, other, other] * 3
    assert (found["one"].median, found["other"].median) == (1, 2)


@pytest.mark.once
def test_in_words():
    assert str(measuring.Measured(0.0125, 0.01, 0.02, 30, 32)) == "12.50 ms (10.00 to 20.00)"


def test_models_of_several_inputs_are_measured():
    found = km.measure({"two": models.build("two_inputs"), "one": models.build("plain")}, rounds=3, repeats=1)
    for measured in found.values():
        assert 0 < measured.low <= measured.median <= measured.high
        assert (measured.rounds, measured.batch_size) == (3, 32)


def test_more_work_takes_longer():
    """40 matrix products of 512 x 512 against one."""
    deep, shallow = (
        keras.Sequential([keras.Input((512,)), *(layers.Dense(512) for _ in range(depth))]) for depth in (40, 1)
    )
    found = km.measure({"deep": deep, "shallow": shallow}, rounds=5, repeats=1)
    assert found["deep"].low > found["shallow"].median
