"""Several devices through the backend's own engine, what a batch has to look like for them, and mixed precision.

JAX shards each batch over a `keras.distribution.DataParallel`, and computes what one device computes. TensorFlow
replicates the model with `tf.distribute.MirroredStrategy`: each replica has its own part of the batch, and its own
statistics in a BatchNormalization that does not say `synchronized=True`. Keras has no such engine on PyTorch. Several processes
(processes.py) train on all devices that they have together.
"""

__all__ = ["Devices", "choose", "existing", "mixed_precision", "padded", "visible", "whole_batches"]

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_morph.errors import KerasMorphError
from keras_morph.processes import engine, here


@dataclass(frozen=True)
class Devices:
    """Where a model is built and trained.

    Attributes:
        names: Devices as Keras names them, such as `gpu:0`; none leaves the choice to the backend.
    """

    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of parts that a batch is cut into."""
        return max(1, len(self.names))

    def __contains__(self, name: str) -> bool:
        return name in (self.names or (_default(),))

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Where a model has to be built, trained and evaluated."""
        if self.count > 1:
            return self._engine.scope()
        return keras.device(self.names[0]) if self.names else contextlib.nullcontext()

    @functools.cached_property
    def _engine(self) -> Any:
        # One for the whole life of a model: TensorFlow refuses a model that was built under another one.
        if here().count > 1:
            return engine() or keras.distribution.DataParallel(devices=list(self.names), auto_shard_dataset=False)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.distribute.MirroredStrategy(list(self.names))
        return keras.distribution.DataParallel(devices=list(self.names))

    def check_batch_size(self, batch_size: int) -> None:
        """A batch can be shared evenly.

        Raises:
            KerasMorphError: If it cannot.
        """
        if batch_size % self.count:
            lower = batch_size - batch_size % self.count or self.count
            msg = f"batch size: expected a multiple of {self.count} devices, received {batch_size}; take {lower}"
            raise KerasMorphError(msg)

    def __str__(self) -> str:
        if self.count > 1:
            several = f" of {here().count} processes" if here().count > 1 else ""
            return f"data-parallel on {self.count} devices{several}: {', '.join(self.names)}"
        return f"on {self.names[0] if self.names else _default()}"


def visible() -> tuple[str, ...]:
    """List the accelerators that the backend sees; where there are none, its virtual CPU devices if it has several."""
    if keras.backend.backend() == "torch":
        import torch

        return tuple(f"gpu:{number}" for number in range(torch.cuda.device_count()))
    names = tuple(keras.distribution.list_devices())
    return () if names == ("cpu:0",) else names


def choose(count: int | None = None, *, first: str | None = None) -> Devices:
    """Choose the devices to train on.

    Args:
        count: How many accelerators; by default all that are visible (on PyTorch one). 0 is the CPU.
        first: A device that comes first if it is an accelerator, such as `/gpu:1`.

    Raises:
        KerasMorphError: If there are not so many, if there is no such device, or if Keras has no engine for several; in
            several processes, if any are chosen at all.
    """
    there = visible()
    if here().count > 1:
        return _of_all_processes(there, count, first)
    main = None if first is None else existing(first)
    if main in there:
        there = (main, *(name for name in there if name != main))
    on_torch = keras.backend.backend() == "torch"
    if count is None:
        count = min(1, len(there)) if on_torch else len(there)
    if count < 0:
        msg = f"number of devices: expected 0 (the CPU) or more, received {count}"
        raise KerasMorphError(msg)
    if count > 1 and on_torch:
        msg = (
            f"Keras {keras.__version__} has no engine for several devices on PyTorch. Expected: 1 device, or "
            f"KERAS_BACKEND=jax or tensorflow. Received: {count} devices."
        )
        raise KerasMorphError(msg)
    if count > len(there):
        msg = (
            f"number of devices: expected at most the {len(there)} that are visible ({', '.join(there) or 'no GPU'}), "
            f"received {count}; leave it out to take what there is"
        )
        raise KerasMorphError(msg)
    if not count:
        return Devices(("cpu:0",) if there else ())
    # The backend's own choice is left alone where it is the same.
    return Devices(() if count == 1 and there[0] == visible()[0] else there[:count])


def _of_all_processes(there: tuple[str, ...], count: int | None, first: str | None) -> Devices:
    if count is not None or first is not None:
        msg = (
            f"number of devices: expected all that each of {here().count} processes sees, received "
            f"{first if count is None else count}; hide others from a process by CUDA_VISIBLE_DEVICES"
        )
        raise KerasMorphError(msg)
    if engine() is None:
        return Devices(there)
    names = [name.split("device:")[-1].lower() for name in engine().extended.worker_devices]
    return Devices(
        tuple(f"{name} of process {number}" if number else name for number in range(here().count) for name in names)
    )


def existing(name: str) -> str:
    """Give a device as Keras names it: `/gpu:0`, `GPU:0`, `gpu` and `/device:GPU:0` are all `gpu:0`.

    Raises:
        KerasMorphError: If there is no such device.
    """
    kind, _, number = name.lower().removeprefix("/").removeprefix("device:").partition(":")
    device = f"{kind.replace('cuda', 'gpu')}:{number or 0}"
    there = dict.fromkeys((*visible(), "cpu:0"))
    if device not in there:
        msg = f"device: expected one of {', '.join(there)}, received {name!r}"
        raise KerasMorphError(msg)
    return device


def whole_batches(examples: int, batch_size: int, devices: int) -> int:
    """Count the examples to train on: all, or without those of a last batch that the devices cannot share evenly.

    Raises:
        KerasMorphError: If there is no batch but the last.
    """
    last = examples % batch_size
    if last % devices == 0:
        return examples
    if last == examples:
        msg = (
            f"batch size: {examples} training images are one batch, which {devices} devices cannot share evenly. "
            f"Expected: at most {examples - examples % devices}. Received: {batch_size}."
        )
        raise KerasMorphError(msg)
    return examples - last


def padded(inputs: Any, labels: Any, devices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Append zeros until the devices can share the examples evenly, and weigh each example: 1, what is appended 0.

    Returns:
        Inputs, labels and sample weights, float32 of shape `(n,)`, as `fit` and `evaluate` take them.
    """
    missing = -len(inputs) % devices
    weights = np.ones(len(inputs), np.float32)
    arrays = (np.asarray(inputs), np.asarray(labels), weights)
    inputs, labels, weights = (np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
    return inputs, labels, weights


@contextlib.contextmanager
def mixed_precision(on: bool = True) -> Iterator[None]:
    """Let models that are built inside compute in half precision, with float32 weights: bfloat16 on a CPU, else float16.

    The penalty, the scores and the last layer stay float32.
    """
    before = keras.config.dtype_policy()
    if on:
        keras.config.set_dtype_policy("mixed_bfloat16" if _default().startswith("cpu") else "mixed_float16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _default() -> str:
    there = visible()
    return there[0] if there else "cpu:0"
