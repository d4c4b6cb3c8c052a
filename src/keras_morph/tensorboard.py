"""TensorBoard events on every backend, without TensorFlow: what the Model Zoo writes, and what else one would look for."""

__all__ = ["TensorBoardLog"]

from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from keras_morph.events import Events
from keras_morph.graph.structure import Structure
from keras_morph.reporting import report
from keras_morph.training.callbacks import _OfLearner

SCALARS = ("loss", "accuracy", "val_loss", "val_accuracy")


class TensorBoardLog(_OfLearner):
    """Write TensorBoard events before the first epoch and after each; the step is the optimizer's.

    Scalars: `RegularizationLoss` (the penalty, mean of the epoch), the cost of the structure under its own name
    (`FLOPs`, in its unit), the same as a share of the seed's, `strength`, accuracies and losses. Per layer: a picture
    of the widths whenever they have changed, and a histogram of the alive shares.

    Args:
        folder: usually the run's; `tensorboard --logdir` takes the folder above it.

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> learner = km.StructureLearner(seed, regularizer=km.Gamma(), cost=km.FLOPs(), strength=1e-9)
        >>> learner.compile("adam", "sparse_categorical_crossentropy")
        >>> x, y = np.zeros((8, 8, 8, 1)), np.zeros(8, int)
        >>> history = learner.fit(x, y, verbose=0, callbacks=[km.TensorBoardLog("runs/first")])
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.drawn: Structure | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.events = Events(self.folder)
        if not self._step():
            self._write_structure(0)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs, step = logs or {}, self._step()
        if "penalty" in logs:
            self.events.scalar("RegularizationLoss", logs["penalty"], step)
        for name in SCALARS:
            if name in logs:
                self.events.scalar(name, logs[name], step)
        self._write_structure(step)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.events.close()

    def _step(self) -> int:
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def _write_structure(self, step: int) -> None:
        learner = self.learner
        structure, cost = learner.structure(), learner.target_cost
        now, seed = cost(learner.graph, structure), cost(learner.graph)
        self.events.scalar(cost.name, now, step)
        self.events.scalar(f"{cost.name}_share_of_seed", now / seed, step)
        self.events.scalar("strength", learner.strength, step)
        shares = [structure.widths[layer] / width for layer, width in structure.seed_widths.items()]
        self.events.histogram("alive_share_of_layers", np.array(shares), np.linspace(0, 1, 21), step)
        if structure != self.drawn:
            self.events.image("widths", _pixels(report(learner, structure).picture()), step)
            self.drawn = structure
        self.events.flush()


def _pixels(figure: Any) -> np.ndarray:
    """The figure as uint8, `(height, width, 3)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)  # matplotlib's canvas has no types
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
