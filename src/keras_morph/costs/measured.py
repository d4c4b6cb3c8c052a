"""Latencies measured on this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

__all__ = ["Measured", "measure"]


@dataclass(frozen=True)
class Measured:
    """Seconds of one forward pass, over several rounds.

    Attributes:
        median, low, high: median, 10th and 90th percentile, in seconds.
        rounds: number of timed rounds.
        batch_size: examples per pass.
    """

    median: float
    low: float
    high: float
    rounds: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"


def measure(
    models: Mapping[str, keras.Model], *, batch_size: int = 32, rounds: int = 30, repeats: int = 5
) -> dict[str, Measured]:
    """Time the compiled forward pass of models in alternation, so that a noisy machine is equally unfair to all.

    Args:
        models: name -> model; inputs have static sizes but for the batch.
        batch_size: examples per pass.
        rounds: how often each model is timed, in turn.
        repeats: passes per timing.

    Returns:
        name -> Measured.

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> times = km.measure({"seed": seed, "small": km.prune(seed, "50%")}, batch_size=8, rounds=2, repeats=1)
        >>> list(times), times["seed"].rounds
        (['seed', 'small'], 2)
    """
    inputs = {name: _random_inputs(model, batch_size) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(repeats):
                model.predict_on_batch(inputs[name])
            if number:  # the first round compiles
                seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: _summary(times, batch_size) for name, times in seconds.items()}


def _summary(times: list[float], batch_size: int) -> Measured:
    median, low, high = np.quantile(times, [0.5, 0.1, 0.9]).tolist()
    return Measured(median, low, high, len(times), batch_size)


def _random_inputs(model: keras.Model, batch_size: int) -> Any:
    rng = np.random.default_rng(0)
    shapes = [(batch_size, *(size or 32 for size in tensor.shape[1:])) for tensor in model.inputs]
    arrays = [rng.random(shape, np.float32) for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]
