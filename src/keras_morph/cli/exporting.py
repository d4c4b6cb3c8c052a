"""What `export` does: write the files, and say what eight bits cost."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import keras
import numpy as np

from keras_morph.benchmarking import accuracy
from keras_morph.cli.choices import images_for
from keras_morph.exporting import export_all
from keras_morph.quantizing import CALIBRATED
from keras_morph.runtimes import open_exported

__all__ = ["written"]


def written(model: keras.Model, files: Mapping[str, Path], calibrate: str | None) -> Iterator[str]:
    """Write a file of each format; gives a line for each of them, and with calibration data one for what eight bits cost."""
    formats, paths = list(files), list(files.values())
    if calibrate is None:
        yield from map(str, export_all(model, paths, formats=formats))
        return
    dataset = images_for(model, calibrate)
    x, y = dataset.x_test, dataset.y_test
    with TemporaryDirectory() as folder:
        plain = export_all(model, [Path(folder) / path.name for path in paths], formats=formats)
        before = [(each.bytes, accuracy(open_exported(each.path), x, y)) for each in plain]
    for (size, right), exported in zip(
        before, export_all(model, paths, formats=formats, int8=np.asarray(dataset.x_train[:CALIBRATED])), strict=True
    ):
        yield str(exported)
        yield (
            f"  {exported.bytes / size:.1%} of float32's {size:,} bytes; accuracy on the {len(y):,} test images of "
            f"{dataset.name}: {accuracy(open_exported(exported.path), x, y):.2%}, in float32 {right:.2%}"
        )
