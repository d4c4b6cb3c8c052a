"""Fine-tune a small classifier to answer as its seed does, and to see in between what the seed sees."""

import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.channels import ChannelGraph, Weight
from keras_morph.errors import KerasMorphError, UnknownLayerWarning
from keras_morph.graph.closure import close
from keras_morph.graph.structure import graph_and_structure
from keras_morph.graph.tracing import trace
from keras_morph.keras_internals import functional_in, mask_of, nodes_of, structs, without_gradients
from keras_morph.surgery.counterparts import counterparts
from keras_morph.training.steps import Trainee

__all__ = ["Distiller", "Feature", "shared_features"]

SMALLEST = 1e-7  # probability whose logarithm is still taken; variance that is still divided by

# (distiller, features of its last call in training) until its loss is computed. By thread, as TensorFlow's replicas are.
_MADE: ContextVar[tuple[Any, Any]] = ContextVar("made", default=(None, None))


@dataclass(frozen=True, eq=False)
class Feature:
    """What a smaller model computes in between, and what its seed does.

    Attributes:
        student: Keras's tensor of the smaller model.
        teacher: Keras's tensor of the seed.
        kept: positions of the seed's channels that are left, along `axis`.
        axis: the channel axis of both, the batch axis included.
    """

    student: Any
    teacher: Any
    kept: np.ndarray
    axis: int


def shared_features(model: Any, structure: Any, small: keras.Model) -> list[Feature]:
    """Where a smaller model can be held against its seed: what its layers read that mix channels, from the second on.

    Each channel that is left is one of the seed's, so that nothing has to be learned in between to compare them. What is inside
    nested models is left out.

    Args:
        model: the seed, or its ChannelGraph.
        structure: as in `rebuild`.
        small: `rebuild(model, structure)`, trained or not.

    Example:
        >>> structure = km.fit_budget(model, "50%")
        >>> small = km.rebuild(model, structure)
        >>> student = km.Distiller(small, model, features=km.shared_features(model, structure, small))
    """
    graph, structure = graph_and_structure(model, structure)
    channels = close(graph, structure.copies(graph)).channels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLayerWarning)
        after = trace(small)
    theirs, ours, seeds = counterparts(graph, after), _own_tensors(after), _own_tensors(graph)
    mixing = {n for n, layer in enumerate(after.layers) if any(map(_mixes, layer.weights))}
    read = {tensor for call in after.calls if call.layer in mixing for tensor in call.operands}
    found = []
    for call in after.calls:
        twin = theirs.get(call.layer)
        if call.mode == "input" or twin is None or len(twin.outputs) != len(call.outputs):
            continue
        for one, other in zip(call.outputs, twin.outputs, strict=True):
            if one not in read or one not in ours or other not in seeds:
                continue
            tensor, seed = after.tensors[one], graph.tensors[other]
            if tensor.axis != seed.axis or not 0 < tensor.axis < len(tensor.shape):
                continue
            kept = np.flatnonzero(channels[graph.channels_of(seed)])
            if len(kept) == tensor.shape[tensor.axis]:
                found.append(Feature(ours[one], seeds[other], kept, tensor.axis))
    return found


def _mixes(weight: Weight) -> bool:
    """Whether a weight makes channels of channels, as the kernel of a Dense layer does."""
    return weight.reads is not None and sum(vector >= 0 for vector in weight.vectors) > 1


def _own_tensors(graph: ChannelGraph) -> dict[int, Any]:
    """Keras's tensors that a model's own calls make, not those inside nested models, by their numbers."""
    made = {id(x) for node in nodes_of(functional_in(graph.model)) for x in node.outputs}
    return {n: x for call in graph.calls for x, n in call.numbers.items() if id(x) in made and "float" in x.dtype}


class Distiller(Trainee):
    """A model that computes what the student computes and trains the student in place, under plain `compile` and `fit`.

    Its loss is `(1 - weight) * compiled loss + weight * T^2 * KL(teacher || student)`, both softened by the temperature T, and
    `feature_weight` times the mean over the features of their mean squared difference, in units of the teacher's variance.

    Args:
        student: a classifier with one output.
        teacher: a classifier with the same classes; it is not trained.
        weight: share of the teacher, 0 to 1.
        temperature: divides the logits of both.
        from_logits: whether the models return logits; else probabilities.
        features: what else should be as the teacher's, from `shared_features`.
        feature_weight: of the features, at least 0.

    References:
        Hinton et al., Distilling the knowledge in a neural network, https://arxiv.org/abs/1503.02531
        Romero et al., FitNets: hints for thin deep nets, https://arxiv.org/abs/1412.6550

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
        temperature: float = 2.0,
        from_logits: bool = False,
        features: Sequence[Feature] = (),
        feature_weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, name=name or f"{student.name}_distiller")
        if not (0 <= weight <= 1 and temperature > 0 and feature_weight >= 0):
            raise KerasMorphError(
                "Distiller expects a weight from 0 to 1, a temperature above 0 and a feature_weight of at least 0. "
                f"Received: weight={weight}, temperature={temperature}, feature_weight={feature_weight}."
            )
        shapes = [model.output_shape for model in (student, teacher)]
        if isinstance(shapes[0], list) or shapes[0] != shapes[1]:
            raise KerasMorphError(f"Distiller expects two models with the same single output. Received: {shapes}.")
        self.weight, self.temperature, self.from_logits = weight, temperature, from_logits
        self.feature_weight = feature_weight
        self.features = tuple(features) if feature_weight else ()
        # Functions, so that weights are not tracked: the teacher's are not trained, the student's are there already.
        self._answers = _with_features(teacher, [each.teacher for each in self.features])
        self._made = _with_features(student, [each.student for each in self.features])

    @property
    def student(self) -> keras.Model:
        return self.network

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not (training and self.features):
            return super().call(inputs, training=training)
        answers, made = self._made(inputs, training=True)
        _MADE.set((self, made))
        return answers

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if not training or not (self.weight or self.features):
            return loss
        with without_gradients():
            answers, seen = self._answers(x, training=False)
        # One output, whether it has a name or not.
        (teacher,), (student,), (weights,) = map(tree.flatten, (answers, y_pred, sample_weight))
        if self.weight:
            divergence = _Divergence(self.temperature, self.from_logits)
            kl = divergence(ops.stop_gradient(teacher), student, sample_weight=weights)
            loss = (1 - self.weight) * loss + self.weight * self.temperature**2 * ops.cast(kl, loss.dtype)
        if not self.features:
            return loss
        distances = [
            _distance(ops.take(theirs, each.kept, each.axis), ours, each.axis, weights)
            for each, theirs, ours in zip(self.features, seen, self._features(x), strict=True)
        ]
        return loss + self.feature_weight * ops.cast(sum(distances), loss.dtype) / len(distances)

    def _features(self, x: Any) -> list[Any]:
        """Those of the call that gave the answers."""
        distiller, made = _MADE.get()
        _MADE.set((None, None))
        return made if distiller is self else self._made(x, training=True)[1]


def _with_features(model: keras.Model, features: list[Any]) -> Any:
    """A function that computes what a model does, and a list of tensors in between."""
    if not features:
        return lambda x, training: (model(x, training=training), [])
    inputs, outputs = structs(model)
    both = keras.Model(inputs, (outputs, features), name=f"{model.name}_features")
    return lambda x, training: both(x, training=training)


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


def _distance(theirs: Any, ours: Any, axis: int, weights: Any) -> Any:
    """Mean squared difference of two features, in units of the mean variance of the teacher's channels, float32.

    Args:
        theirs, ours: of teacher and student, of one shape.
        axis: of the channels.
        weights: of examples or of their parts, as `fit` takes them, or None.
    """
    mask = mask_of(ours)
    theirs, ours = ops.stop_gradient(ops.cast(theirs, "float32")), ops.cast(ours, "float32")
    variance = ops.mean(ops.var(theirs, axis=[a for a in range(len(theirs.shape)) if a != axis]))
    squares = ops.square(theirs - ours)
    if mask is not None:
        mask = ops.cast(ops.reshape(mask, ops.shape(mask) + (1,) * (len(squares.shape) - len(mask.shape))), "float32")
        squares = squares * mask / ops.maximum(ops.mean(mask), SMALLEST)
    examples = ops.mean(squares, axis=list(range(1, len(squares.shape))))
    if weights is not None:
        examples = examples * ops.cast(ops.mean(ops.reshape(weights, (ops.shape(weights)[0], -1)), axis=1), "float32")
    return ops.mean(examples) / ops.maximum(variance, SMALLEST)
