"""Fine-tune a small classifier to answer as its seed does."""

from typing import Any

import keras
from keras import ops

from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import added_losses, without_gradients
from keras_morph.training.steps import Trainee

__all__ = ["Distiller", "share_by_default"]

SMALLEST = 1e-7  # probability whose logarithm is still taken
SHARE = 0.5  # of the loss, where nobody knows how often the teacher is right; else that share,
LARGEST_SHARE = 0.9  # and no more than this


def share_by_default(right: float | None) -> float:
    """The teacher's share of the loss, by how often it is right; None where nobody knows."""
    return SHARE if right is None else round(min(right, LARGEST_SHARE), 2)


class Distiller(Trainee):
    """A model that computes what the student computes and trains the student in place, under plain `compile` and `fit`.

    Its loss is `(1 - weight) * compiled loss + weight * T^2 * KL(teacher || student)`, both softened by the temperature T, and
    what layers add: regularizers and `add_loss`.

    Args:
        student: a classifier with one output.
        teacher: a classifier with the same classes; it is not trained.
        weight: share of the teacher, 0 to 1.
        temperature: divides the logits of both.
        from_logits: whether the models return logits; else probabilities.

    References:
        Hinton et al., Distilling the knowledge in a neural network, https://arxiv.org/abs/1503.02531

    Example:
        >>> student = km.Distiller(km.prune(model, "50%"), model, weight=0.3)
        >>> student.compile("adam", "sparse_categorical_crossentropy")
        >>> _ = student.fit(x, y, verbose=0)
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        *,
        weight: float = 0.5,
        temperature: float = 4.0,
        from_logits: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(student, name=name or f"{student.name}_distiller")
        if not 0 <= weight <= 1 or not temperature > 0:
            raise KerasMorphError(
                f"Distiller expects a weight from 0 to 1 and a temperature above 0. "
                f"Received: weight={weight}, temperature={temperature}."
            )
        shapes = [model.output_shape for model in (student, teacher)]
        if isinstance(shapes[0], list) or shapes[0] != shapes[1]:
            raise KerasMorphError(f"Distiller expects two models with the same single output. Received: {shapes}.")
        self.weight, self.temperature, self.from_logits = weight, temperature, from_logits
        self._answers = lambda x: teacher(x, training=False)  # a function, so that its weights are not tracked

    @property
    def student(self) -> keras.Model:
        return self.network

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if not training or not self.weight:
            return loss
        with without_gradients():
            answers = self._answers(x)
        # One output, whether it has a name or not.
        (teacher,), (student,), (weights,) = map(keras.tree.flatten, (answers, y_pred, sample_weight))
        kl = _Divergence(self.temperature, self.from_logits)(ops.stop_gradient(teacher), student, sample_weight=weights)
        return loss + self.weight * (added_losses(self) - loss + self.temperature**2 * ops.cast(kl, loss.dtype))


class _Divergence(keras.losses.Loss):
    """KL(teacher || student) of softened answers, as float32; Keras weighs and masks it as it does the compiled loss."""

    def __init__(self, temperature: float, from_logits: bool) -> None:
        super().__init__(name="distillation", dtype="float32")
        self.temperature, self.from_logits = temperature, from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        teacher, student = self._soft(y_true), self._soft(y_pred)
        return ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)

    def _soft(self, outputs: Any) -> Any:
        """Logarithms of the softened probabilities."""
        logits = outputs if self.from_logits else ops.log(ops.maximum(outputs, SMALLEST))
        return ops.log_softmax(logits / self.temperature, axis=-1)
