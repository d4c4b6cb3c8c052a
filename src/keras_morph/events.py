"""TensorBoard events, through tensorboardX; neither TensorFlow nor Keras is needed."""

__all__ = ["Events"]

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.runs import going_on


class Events:
    """A file of TensorBoard events, written at once.

    tensorboardX's SummaryWriter hands events to a thread through a queue: once that thread has died of a full disk, nobody
    empties the queue, and whoever writes or closes waits for ever. Here the disk is only an error, and is said once.

    Args:
        folder: where the file is made with the first event.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: Any = None

    def scalar(self, tag: str, value: Any, step: int) -> None:
        from tensorboardX import summary  # imports PyTorch where that is installed

        self._write(summary.scalar(tag, float(value)), step)

    def histogram(self, tag: str, values: np.ndarray, bins: np.ndarray, step: int) -> None:
        from tensorboardX import summary

        self._write(summary.histogram(tag, values, bins), step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Of shape `(height, width, 3)`, uint8."""
        from tensorboardX import summary

        self._write(summary.image(tag, pixels, dataformats="HWC"), step)

    def hyperparameters(self, values: dict[str, Any], figures: dict[str, float]) -> None:
        """What a run was given and what came of it, for the HParams tab; the figures are scalars too."""
        from tensorboardX import summary

        for each in summary.hparams(values, figures):
            self._write(each, 0)
        for name, figure in figures.items():
            self.scalar(name, figure, 0)

    def flush(self) -> None:
        if self._writer is not None:
            with self._going_on():
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._going_on():
                self._writer.close()
            self._writer = None

    def _write(self, summary: Any, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        with self._going_on():
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Two processes that write within a second do not share a file.
                self._writer = EventsWriter(str(self.folder / "events"), f".{os.getpid()}")
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        with going_on(self.folder / "events.out.tfevents"):
            try:
                yield
            except OSError:
                self._writer = None  # half an event may be there: a new file, as soon as there is room
                raise
