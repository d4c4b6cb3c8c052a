"""One training in several processes, on one machine or on several: who takes part, and which part of each batch is whose.

JAX's processes form one mesh by `keras.distribution.initialize`, TensorFlow's replicate the model by
`tf.distribute.MultiWorkerMirroredStrategy`. All read the same data in the same order, each its own part of a batch, and make the
same steps, so that each has the whole result. Keras has no such engine on PyTorch.
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import _exit as end_at_once
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.errors import KerasMorphError, LostProcessError

__all__ = ["Process", "agree", "engine", "here", "join", "leave", "of_tf_config", "share_newest", "watching_others"]

LOST = re.compile(
    r"gloo|nccl|collective|unavailable|coordination|connection (closed|reset)|socket closed|heartbeat", re.I
)
"""What backends say when another process is gone: each has an error class of its own, JAX even a plain ValueError."""


@dataclass(frozen=True)
class Process:
    """One of the processes of a training.

    Attributes:
        number: from 0 on. Number 0 prints.
        addresses: HOST:PORT of each process, in the order of their numbers; none for a training in one process.

    Example:
        >>> from keras_morph.processes import Process
        >>> Process(1, ("10.0.0.1:5000", "10.0.0.2:5000")).part([1, 2, 3, 4])
        [3, 4]
    """

    number: int = 0
    addresses: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many there are."""
        return max(1, len(self.addresses))

    def part(self, batch: Any) -> Any:
        """Its equal part of a batch."""
        size = -(-len(batch) // self.count)
        return batch[self.number * size : (self.number + 1) * size]

    def __str__(self) -> str:
        return f"process {self.number} of {self.count}"


_here = Process()
_engine: Any = None


def here() -> Process:
    """This process."""
    return _here


def engine() -> Any:
    """TensorFlow's strategy, which has to be there before anything is computed; None on JAX."""
    return _engine


def of_tf_config(text: str) -> Process:
    """Read TF_CONFIG: `{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}`; a chief is number 0.

    Raises:
        KerasMorphError: if it is something else.
    """
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        hosts = {job: list(cluster.get(job, [])) for job in ("chief", "worker")}
        first = 0 if task["type"] == "chief" else len(hosts["chief"])
        number = first + int(task["index"])
        addresses = (*hosts["chief"], *hosts["worker"])
        if number < first or set(cluster) - set(hosts) or addresses[number] != hosts[task["type"]][int(task["index"])]:
            raise ValueError("other jobs")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise KerasMorphError(
            'TF_CONFIG expects {"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}, with or '
            f"without a chief. Received: {text[:200]!r}."
        ) from error
    return Process(number, addresses)


def join(process: Process) -> None:
    """Meet the other processes. This has to come before anything is computed, and happens once.

    Raises:
        KerasMorphError: if the backend has no engine for several processes, or if they do not meet.
    """
    global _here, _engine
    if process.count == 1:
        return
    import keras

    if keras.backend.backend() not in ("jax", "tensorflow"):
        raise KerasMorphError(
            f"Keras {keras.__version__} has no engine for several processes on {keras.backend.backend()}. Expected: one "
            f"process, or KERAS_BACKEND=jax or tensorflow. Received: {process.count} processes."
        )
    try:
        if keras.backend.backend() == "jax":
            import jax

            settings: Any = jax.config
            settings.update("jax_cpu_collectives_implementation", "gloo")  # without it CPUs cannot meet
            keras.utils.set_random_seed(0)  # else Keras computes one in common
            keras.distribution.initialize(",".join(process.addresses), process.count, process.number)
        else:
            _engine = _strategy(process)
    except Exception as error:
        raise LostProcessError(
            f"{process} did not meet the others. Expected: {process.count} processes with the same addresses, "
            f"{', '.join(process.addresses)}, started at about the same time. Received: {_first_line(error)}."
        ) from error
    _here = process
    agree("number of devices", _local_devices())


def _local_devices() -> int:
    """How many devices train in this process."""
    if _engine is not None:
        return len(_engine.extended.worker_devices)
    import jax

    return int(jax.local_device_count())


def _strategy(process: Process) -> Any:
    """TensorFlow's strategy with two repairs of how Keras 3.15 uses it.

    Keras reduces the scalars of its logs over their first axis, and a whole batch of tensors in one call, which only
    strategies of one process take. And each process gives its own part of a batch, which must not be cut once more.
    """
    import tensorflow as tf

    class Strategy(tf.distribute.MultiWorkerMirroredStrategy):
        def reduce(self, reduce_op: Any, value: Any, axis: int | None) -> Any:
            def one(tensor: Any) -> Any:
                rank = self.experimental_local_results(tensor)[0].shape.rank
                return tf.distribute.Strategy.reduce(self, reduce_op, tensor, axis if rank else None)

            return tf.nest.map_structure(one, value)

        def experimental_distribute_dataset(self, dataset: Any, options: Any = None) -> Any:
            local = self.extended.worker_devices
            return self.distribute_datasets_from_function(lambda _: _per_device(tf, dataset, len(local)), options)

    spec = tf.train.ClusterSpec({"worker": list(process.addresses)})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec, task_type="worker", task_id=process.number, rpc_layer="grpc"
    )
    return Strategy(cluster_resolver=resolver)


def _per_device(tf: Any, dataset: Any, devices: int) -> Any:
    """One batch for each device of this process, from batches for all of them."""
    if devices == 1:
        return dataset

    def cut(*batch: Any) -> Any:
        parts = tf.nest.map_structure(lambda v: tf.reshape(v, tf.concat([[devices, -1], tf.shape(v)[1:]], 0)), batch)
        return tf.data.Dataset.from_tensor_slices(parts)

    return dataset.flat_map(cut)


def _gathered(numbers: Sequence[int]) -> np.ndarray:
    """These numbers, below 2 ** 31, of each process: int32, `(processes, numbers)`."""
    values = np.array(numbers, np.int32)
    if _engine is None:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(values)).reshape(_here.count, -1)
    import tensorflow as tf

    of_devices = _engine.run(lambda: tf.constant(values[np.newaxis]))
    return _engine.gather(of_devices, axis=0).numpy()[:: _local_devices()]


def _sent(values: np.ndarray, source: int) -> np.ndarray:
    """Values of the source, int32; what the others give has their length."""
    given = values if _here.number == source else np.zeros_like(values)
    if _engine is None:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.broadcast_one_to_all(given, is_source=_here.number == source))
    import tensorflow as tf

    def of_device() -> Any:  # the first of each process has it all
        first = tf.distribute.get_replica_context().replica_id_in_sync_group % _local_devices() == 0
        return tf.constant(given) * tf.cast(first, tf.int32)

    return _engine.reduce("SUM", _engine.run(of_device), None).numpy()


def agree(what: str, number: int) -> None:
    """Check that all processes have the same number, below 2 ** 31.

    Args:
        what: it says, for the message, such as "data".
        number: usually a checksum.

    Raises:
        KerasMorphError: if they do not.
    """
    if _here.count == 1:
        return
    found = _gathered([number])[:, 0]
    others = [str(process) for process in np.flatnonzero(found != found[0])]
    if others:
        raise KerasMorphError(
            f"All {_here.count} processes expect the same {what}. Received: other {what} in process {', '.join(others)} than in "
            "process 0."
        )


def share_newest(path: Path, place: Sequence[int]) -> None:
    """Give every process the checkpoint of the one that came furthest: one that was killed while it wrote is behind.

    Args:
        path: where the checkpoint of each process is.
        place: epoch and step of this process's, or what comes before all where it has none.
    """
    from keras_morph.runs import write_atomically

    if _here.count == 1:
        return
    size = path.stat().st_size if path.exists() else 0
    found = _gathered([*place, size]).tolist()
    newest = max(range(_here.count), key=lambda number: found[number][:-1])
    if all(each[:-1] == found[newest][:-1] for each in found):
        return
    size = found[newest][-1]
    content = np.zeros(-(-size // 4) * 4, np.uint8)
    if _here.number == newest:
        content[:size] = np.frombuffer(path.read_bytes(), np.uint8)
    received = _sent(content.view(np.int32), newest).astype(np.int32).view(np.uint8)[:size].tobytes()

    def write(temporary: Path) -> None:
        temporary.write_bytes(received)

    if found[_here.number][:-1] != found[newest][:-1]:
        write_atomically(path, write)


@contextmanager
def watching_others() -> Iterator[None]:
    """Inside, the end of another process is one clear error.

    Raises:
        LostProcessError: if another process is gone.
    """
    try:
        yield
    except KerasMorphError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if _here.count == 1 or not LOST.search(text):
            raise
        raise LostProcessError(
            f"{_here} lost another one. Expected: {_here.count} processes that train together. Received: {_first_line(error)}. "
            "To go on start each of them again with --resume and its run folder."
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, in short: TensorFlow puts the places of the code in front."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next(
        (line for line in lines if LOST.search(line) and not line.startswith("Detected at")), "".join(lines[:1])
    )
    return f"{type(error).__name__}: {said[:200]}".rstrip(".")


def leave(error: BaseException) -> None:
    """End a process that failed at once: the backend would wait for the others, which wait for this one."""
    code = error.code if isinstance(error, SystemExit) else 1
    if _here.count == 1 or not code:
        return
    if not isinstance(error, SystemExit):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    end_at_once(code if isinstance(code, int) else 1)
