"""What a cut loses, regressed back from a few hundred images, without labels and without training.

Layer by layer, in the order in which the smaller model runs: each convolution and Dense layer gets the kernel by which its
results, of what the smaller model hands it, come closest to those of the seed. With the patches P that a layer of the smaller
model reads (a row for each position), its kernel K as it was cut, and the seed's results Y for the channels that are left,

    K += (P'P / n + l I)^-1 P'(Y - P K) / n        l = ridge * mean(diag(P'P / n))

where P and Y are centered if the layer has a bias, or if BatchNormalization follows: these take the constant. It is ridge
regression towards the kernel of the cut: where nothing is lost, or nothing varies, that is what stays, and law 1 holds.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_morph.channels import Call, ChannelGraph, Layer
from keras_morph.errors import UnknownLayerWarning
from keras_morph.graph.closure import Closed, close
from keras_morph.graph.examples import image_batches
from keras_morph.graph.identities import counterparts
from keras_morph.graph.streaming import Stream
from keras_morph.graph.structure import graph_and_structure
from keras_morph.graph.tracing import trace
from keras_morph.layers.rules import variable
from keras_morph.surgery.rebuilding import as_computed

__all__ = ["loses", "recover"]

# Layers that multiply patches of what they read by a kernel; exact classes, as a subclass may do other things.
CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
LINEAR = (layers.Dense, *CONVOLUTIONS, *DEPTHWISE, *SEPARABLE)
SAMPLES = 40_000  # positions that a kernel is fitted on: some ten for each unknown of a 3x3 convolution of 512 channels
ALONE = 10_000  # of a depthwise one, which has a position of its own for each channel, and nine or so unknowns
SMALLEST_SCALE = 1e-3  # of a normalization's channels, as a share of the largest; what has less cannot make up for much
LARGEST = 8192  # unknowns of a fit, per output: the matrix that is solved takes their square, here 0.5 GB


def recover(small: keras.Model, model: Any, structure: Any, images: Any, *, ridge: float = 1e-2) -> None:
    """Regress back what a cut lost, from a few hundred images without labels.

    Kernels and biases of convolutions and Dense layers are fitted to the seed's own results, one layer after the other on what
    the smaller model computes by then; BatchNormalization's statistics move by as much as those of its operand do. Layers
    of other kinds, and those that are called more than once, stay as they were cut, and so does what was lost of nothing.

    In the end each trainable BatchNormalization has the statistics of its operand, and scale and offset by which it computes the
    same, so that a training goes on from what was regained; where it has no scale, its variance is the seed's still.

    Args:
        small: `rebuild(model, structure)`, changed in place.
        model: the seed that the structure belongs to, its ChannelGraph, or a StructureLearner; it is left alone.
        structure: as in `rebuild`.
        images: an array, or a list or dictionary of them for a model of several inputs; `(x, y)`, whose labels are left
            alone; or whatever else `fit` takes as its first argument. A few hundred serve; up to 4,096 are used, by early
            layers only as many as fill 0.5 GB, and the more there are the better the late ones are fitted.
        ridge: how strongly kernels are held where they were cut, as a share of the mean variance of what they read.

    Raises:
        DataError: if there are no images, or not as many arrays as the model has inputs.
        StructureMismatchError: if the structure is not one of this seed.

    References:
        He et al., Channel pruning for accelerating very deep neural networks, https://arxiv.org/abs/1707.06168
        CORP, https://arxiv.org/abs/2602.05243

    Example:
        >>> structure = km.fit_budget(model, "50%")
        >>> small = km.rebuild(model, structure)
        >>> km.recover(small, model, structure, images)
    """
    graph, structure = graph_and_structure(model, structure)
    closed = close(graph, structure.copies(graph))
    if getattr(model, "gates", None) is not None:
        graph = as_computed(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLayerWarning)
        after = trace(small)
    batches = image_batches(graph, images)
    pairs = list(_Pairing(graph, closed, after).pairs())
    before, now = Stream(graph, batches, [t for pair in pairs for t in pair.looks]), Stream(after, batches)
    by_call = {id(pair.call): pair for pair in pairs}
    for call in now:
        pair = by_call.get(id(call))
        if pair is not None:
            if pair.is_normalization:
                _renormalize(pair, now.values[call.inputs[0]], before[pair.read])
            else:
                _fit(pair, now, before, ridge)
            for tensor in pair.looks:
                before.release(tensor)
        operation = after.layers[call.layer].operation
        if type(operation) is layers.BatchNormalization and len(after.layer_calls[call.layer]) == 1:
            _restate(operation, now.values[call.inputs[0]])
            _renorm(operation)


def loses(model: Any, structure: Any) -> bool:
    """Whether a cut loses anything: of a seed whose dead channels have faded to zero it does not."""
    graph, structure = graph_and_structure(model, structure)
    entries = graph.dead_entries(close(graph, structure.copies(graph)).channels)
    return any(_values(variable(layer.operation, weight.name))[dead].any() for layer, weight, dead in entries)


@dataclass(frozen=True)
class _Pair:
    """A call of the smaller model and the one of the seed that it stands for.

    Attributes:
        call: of the smaller model.
        layer, original: its layer, and the seed's.
        read: what the seed's layer reads, a tensor of the seed.
        kept: positions of the original's channels that are left, along the channel axis of its result.
        norm: BatchNormalization that alone reads the result, before any activation, or None.
        beside: what is added to the result afterwards: tensors of the smaller model and of the seed, and the channel axis.
    """

    call: Call
    layer: Layer
    original: Layer
    read: int
    kept: np.ndarray
    norm: Any = None
    beside: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_normalization(self) -> bool:
        return type(self.layer.operation) is layers.BatchNormalization

    @property
    def looks(self) -> list[int]:
        """Tensors of the seed that are looked at."""
        return [self.read, *(theirs for _, theirs, _ in self.beside)]


class _Pairing:
    """Finds the calls that can be fitted: of layers that are called once, in the seed and in the smaller model."""

    def __init__(self, graph: ChannelGraph, closed: Closed, after: ChannelGraph) -> None:
        self.graph, self.closed, self.after = graph, closed, after
        numbers = {layer.name: number for number, layer in enumerate(graph.layers)}
        originals = {ours: numbers[theirs] for ours, theirs in counterparts(graph, after).items()}
        self.theirs: dict[int, Call] = {}  # layer of the smaller model -> call of the seed
        for number, layer in enumerate(after.layers):
            original = originals.get(layer.name, -1)
            if original >= 0 and len(graph.layer_calls[original]) == len(after.layer_calls[number]) == 1:
                self.theirs[number] = graph.calls[graph.layer_calls[original][0]]
        self.readers: dict[int, list[Call]] = {}
        for call in after.calls:
            for tensor in set(call.numbers.values()):
                self.readers.setdefault(tensor, []).append(call)

    def pairs(self) -> Iterator[_Pair]:
        fitted = set()  # normalizations whose mean takes the constant of a fit
        for call in self.after.calls:
            layer = self.after.layers[call.layer]
            if not self.can_be_fitted(call) or id(layer.operation) in fitted:
                continue
            theirs = self.theirs[call.layer]
            pair = _Pair(call, layer, self.graph.layers[theirs.layer], theirs.inputs[0], self.kept(theirs.outputs[0]))
            if pair.is_normalization or not _is_linear(layer):
                yield pair
                continue
            result, reader = call.outputs[0], self.only_reader(call.outputs[0])
            if reader is not None and self.normalizes(reader):
                pair = replace(pair, norm=self.after.layers[reader.layer].operation)
                fitted.add(id(pair.norm))
                result, reader = reader.outputs[0], self.only_reader(reader.outputs[0])
            yield pair if reader is None else replace(pair, beside=self.beside(result, reader))

    def normalizes(self, call: Call) -> bool:
        return type(self.after.layers[call.layer].operation) is layers.BatchNormalization and self.can_be_fitted(call)

    def can_be_fitted(self, call: Call) -> bool:
        layer, theirs = self.after.layers[call.layer], self.theirs.get(call.layer)
        return theirs is not None and _can_be_fitted(layer, self.graph.layers[theirs.layer])

    def kept(self, tensor: int) -> np.ndarray:
        return np.flatnonzero(self.closed.channels[self.graph.channels_of(self.graph.tensors[tensor])])

    def only_reader(self, tensor: int) -> Call | None:
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.after.outputs else None

    def beside(self, tensor: int, adding: Call) -> tuple[tuple[int, int, int], ...]:
        """What a call adds to a tensor, where it has its shape."""
        tensors, theirs = self.after.tensors, self.theirs.get(adding.layer)
        if theirs is None or self.after.layers[adding.layer].kind != "Add" or len(theirs.inputs) != len(adding.inputs):
            return ()
        if any(
            tensors[t].shape != tensors[tensor].shape or tensors[t].axis != tensors[tensor].axis for t in adding.inputs
        ):
            return ()
        pairs = zip(adding.inputs, theirs.inputs, strict=True)
        return tuple((ours, other, tensors[ours].axis) for ours, other in pairs if ours != tensor)


def _is_linear(layer: Layer) -> bool:
    return getattr(layer.operation, "activation", None) in (None, keras.activations.linear)


def _can_be_fitted(layer: Layer, original: Layer) -> bool:
    kind = type(layer.operation)
    if kind is not type(original.operation) or layer.rule is None or layer.operation is original.operation:
        return False
    if kind is layers.BatchNormalization:
        return all(weight.vectors[0] >= 0 for weight in original.weights)
    if kind not in LINEAR:
        return False
    return _matrices(layer.operation).shape[1] <= LARGEST


def _fit(pair: _Pair, now: Stream, before: Stream, ridge: float) -> None:
    """Fit a kernel, and the constant with it, to the results that the seed's layer has.

    Where the result is added to what the smaller model has computed already, the fit makes up for what is missing there.
    """
    operation, original = pair.layer.operation, pair.original.operation
    kernel, theirs = _matrices(operation), _matrices(original)
    bias = _values(operation.bias) if operation.use_bias else np.zeros(len(pair.kept))
    given, had = _same_images(now.values[pair.call.inputs[0]], before.finite(pair.read, pair.original.name))
    missing = _Missing(pair, now, before)
    groups, unknowns, outputs = kernel.shape
    squares, products = np.zeros((groups, unknowns, unknowns)), np.zeros((groups, unknowns, outputs))
    mean, error = np.zeros((groups, 1, unknowns)), np.zeros((groups, 1, outputs))
    centered = operation.use_bias or pair.norm is not None
    random, n, origin = np.random.default_rng(0), 0, np.zeros((groups, 1, unknowns))
    for number, (x, y) in enumerate(zip(given, had, strict=True)):
        places = _Places(operation, x, len(given), random)
        p, q = places.patches(operation, x), places.patches(original, y)
        wanted = _results(q, theirs)[:, pair.kept]
        if operation.use_bias:
            wanted = wanted + _values(original.bias)[pair.kept]
        wanted = wanted + missing.at(places, number)
        e = _split(wanted - _results(p, kernel) - bias, groups)
        if centered and not number:
            origin = p.mean(1, keepdims=True)  # near the mean, which may be huge
        p = p - origin
        n += p.shape[1]
        mean, error = mean + p.sum(1, keepdims=True), error + e.sum(1, keepdims=True)
        squares, products = squares + p.transpose(0, 2, 1) @ p, products + p.transpose(0, 2, 1) @ e
    mean, error, squares, products = mean / n, error / n, squares / n, products / n
    if centered:
        squares = squares - mean.transpose(0, 2, 1) @ mean
        products = products - mean.transpose(0, 2, 1) @ error
    held = ridge * np.einsum("gii->g", squares) / unknowns
    held = np.where(held > 0, held, 1.0)  # where nothing varies, nothing changes
    change = np.linalg.solve(squares + held[:, None, None] * np.eye(unknowns), products)
    change = _within(_kernel(operation), kernel, change, squares, products)
    _kernel(operation).assign((kernel + change).transpose(1, 0, 2).reshape(_kernel(operation).shape))
    constant = (error - (origin + mean) @ change).ravel()
    if operation.use_bias:
        operation.bias.assign(bias + constant)
        if operation.bias.constraint is not None:
            operation.bias.assign(operation.bias.constraint(operation.bias))
    elif pair.norm is not None:
        pair.norm.moving_mean.assign(_values(pair.norm.moving_mean) - constant)


def _within(
    variable: Any, kernel: np.ndarray, change: np.ndarray, squares: np.ndarray, products: np.ndarray
) -> np.ndarray:
    """A change after which a kernel keeps to its constraint: what the constraint leaves of it where that is better than none."""
    if variable.constraint is None:
        return change
    wanted = (kernel + change).transpose(1, 0, 2).reshape(variable.shape).astype(variable.dtype)
    kept = _values(variable.constraint(ops.convert_to_tensor(wanted)))
    change = kept.reshape(kernel.shape[1], len(kernel), -1).transpose(1, 0, 2) - kernel
    gained = 2 * np.sum(change * products) - np.sum(change * (squares @ change))
    return change if gained > 0 else np.zeros_like(change)


class _Missing:
    """What the smaller model lacks so far of what is added to a layer's results, in front of a BatchNormalization."""

    def __init__(self, pair: _Pair, now: Stream, before: Stream) -> None:
        known = all(ours in now.values for ours, *_ in pair.beside)
        beside = pair.beside if known else ()
        self.operands = [(now.values[ours], before[theirs], axis) for ours, theirs, axis in beside]
        self.kept, self.factor = pair.kept, np.ones(len(pair.kept))
        if pair.norm is not None:
            scale = 1.0 if pair.norm.gamma is None else _values(pair.norm.gamma)
            scale = scale / np.sqrt(_values(pair.norm.moving_variance) + pair.norm.epsilon)
            usable = np.abs(scale) > SMALLEST_SCALE * np.abs(scale).max(initial=0)
            self.factor = np.where(usable, 1 / np.where(usable, scale, 1.0), 0.0)

    def at(self, places: "_Places", batch: int) -> np.ndarray | float:
        total: np.ndarray | float = 0.0
        for ours, theirs, axis in self.operands:
            one, other = (np.moveaxis(_values(each[batch]), axis, -1)[places.at] for each in (theirs, ours))
            total = total + (one[:, self.kept] - other) * self.factor
        return total


def _renormalize(pair: _Pair, given: list[Any], had: list[Any]) -> None:
    """Move the statistics of a BatchNormalization by as much as those of its operand have moved."""
    operation, original = pair.layer.operation, pair.original.operation
    given, had = _same_images(given, had)
    mean, variance = _moments(operation, given)
    their_mean, their_variance = (each[pair.kept] for each in _moments(original, had))
    operation.moving_mean.assign(_values(original.moving_mean)[pair.kept] + mean - their_mean)
    ratio = (variance + operation.epsilon) / (their_variance + operation.epsilon)
    operation.moving_variance.assign(_values(original.moving_variance)[pair.kept] * ratio)


def _restate(operation: Any, given: list[Any]) -> None:
    """Give a BatchNormalization the statistics of its operand, and scale and offset by which it computes what it did.

    While it trains, it computes by the statistics of a batch: with others in its weights that would be another function.
    """
    if operation.beta is None or not operation.trainable:
        return
    if operation.beta.constraint is not None or getattr(operation.gamma, "constraint", None) is not None:
        return
    mean, variance = _moments(operation, given)
    gamma = 1.0 if operation.gamma is None else _values(operation.gamma)
    scale = gamma / np.sqrt(_values(operation.moving_variance) + operation.epsilon)
    operation.beta.assign(_values(operation.beta) + scale * (mean - _values(operation.moving_mean)))
    operation.moving_mean.assign(mean)
    if operation.gamma is not None:
        operation.gamma.assign(scale * np.sqrt(variance + operation.epsilon))
        operation.moving_variance.assign(variance)


def _renorm(operation: Any) -> None:
    """Let batch renormalization, which keeps statistics of its own for training, go by those that inference has."""
    if getattr(operation, "renorm", False):
        deviation = np.sqrt(_values(operation.moving_variance) + operation.epsilon)
        operation.moving_stddev.assign(deviation)
        operation.renorm_stddev.assign(deviation)
        operation.renorm_mean.assign(_values(operation.moving_mean))


def _same_images(*tensors: list[Any]) -> list[list[Any]]:
    """The batches that are there of all: two streams may have room for different numbers."""
    present = min(map(len, tensors))
    return [batches[:present] for batches in tensors]


def _moments(operation: Any, batches: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel."""

    def rows() -> Iterator[np.ndarray]:
        for batch in batches:
            x = np.moveaxis(_values(batch), operation.axis, -1)
            yield x.reshape(-1, x.shape[-1])

    n = sum(map(len, rows()))
    mean = sum(x.sum(0) for x in rows()) / n
    return mean, sum(np.square(x - mean).sum(0) for x in rows()) / n  # in two passes: means may be huge


def _values(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(x), np.float64)


def _kernel(operation: Any) -> Any:
    """The variable that is fitted: of a separable convolution its second kernel."""
    return operation.pointwise_kernel if type(operation) in SEPARABLE else operation.kernel


def _matrices(operation: Any) -> np.ndarray:
    """The kernel as matrices (group, unknown, output), float64.

    There is one for each group of a grouped convolution, for each channel of a depthwise one, and else a single one. The
    unknowns are the positions of the kernel, and inside each of them the channels that are read.
    """
    kernel = _values(_kernel(operation))
    if type(operation) in DEPTHWISE:
        return _of_each_channel(kernel)
    groups = getattr(operation, "groups", 1)
    return kernel.reshape(-1, groups, kernel.shape[-1] // groups).transpose(1, 0, 2)


def _of_each_channel(kernel: np.ndarray) -> np.ndarray:
    """A depthwise kernel as matrices (channel, position, multiplier)."""
    return kernel.reshape(-1, *kernel.shape[-2:]).transpose(1, 0, 2)


def _split(results: np.ndarray, groups: int) -> np.ndarray:
    """(position, channel) -> (group, position, output)."""
    return results.reshape(len(results), groups, -1).transpose(1, 0, 2)


def _results(patches: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """What a layer makes of patches, before bias and activation: (position, channel)."""
    results = (patches @ matrices).transpose(1, 0, 2)
    return results.reshape(len(results), -1)


class _Places:
    """Some places of a layer's results in a batch, at most as many as its share of all samples, chosen at random."""

    def __init__(self, operation: Any, x: Any, batches: int, random: np.random.Generator) -> None:
        self.rank = len(getattr(operation, "kernel_size", ()))
        shape = (x.shape[0], *_spatial(operation, x.shape, self.rank)) if self.rank else x.shape[:-1]
        samples = ALONE if type(operation) in DEPTHWISE else SAMPLES
        number, most = int(np.prod(shape)), max(1, samples // batches)
        chosen = random.choice(number, most, replace=False) if number > most else np.arange(number)
        self.at = np.unravel_index(np.sort(chosen), shape)

    def patches(self, operation: Any, x: Any) -> np.ndarray:
        """(group, place, unknown), float64."""
        x = np.asarray(ops.convert_to_numpy(x), np.float32)
        if not self.rank:
            return x[self.at][None].astype(np.float64)
        if operation.data_format == "channels_first":
            x = np.moveaxis(x, 1, -1)
        sizes = [
            (size - 1) * step + 1 for size, step in zip(operation.kernel_size, operation.dilation_rate, strict=True)
        ]
        x = np.pad(x, [(0, 0), *_padding(operation, x.shape[1:-1], sizes), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, sizes, axis=tuple(range(1, self.rank + 1)))
        strided = (slice(None, None, step) for step in operation.strides)
        dilated = (slice(None, None, step) for step in operation.dilation_rate)
        patches = windows[(slice(None), *strided, slice(None), *dilated)][self.at]  # (place, channel, *positions)
        patches = patches.reshape(*patches.shape[:2], -1)
        alone = type(operation) in (*DEPTHWISE, *SEPARABLE)
        groups = patches.shape[1] if alone else operation.groups
        patches = patches.reshape(len(patches), groups, -1, patches.shape[-1])
        patches = patches.transpose(1, 0, 3, 2).reshape(groups, len(patches), -1).astype(np.float64)
        if type(operation) in SEPARABLE:  # what its first kernel makes of them
            return _results(patches, _of_each_channel(_values(operation.depthwise_kernel)))[None]
        return patches


def _spatial(operation: Any, shape: Any, rank: int) -> tuple[int, ...]:
    """Sizes of a convolution's results."""
    output = operation.compute_output_shape(tuple(shape))
    return tuple(output[2:] if operation.data_format == "channels_first" else output[1 : rank + 1])


def _padding(operation: Any, shape: tuple[int, ...], sizes: list[int]) -> list[tuple[int, int]]:
    if operation.padding == "causal":
        return [(size - 1, 0) for size in sizes]
    if operation.padding == "valid":
        return [(0, 0) for _ in sizes]
    missing = [
        max((-(-n // stride) - 1) * stride + size - n, 0)
        for n, stride, size in zip(shape, operation.strides, sizes, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in missing]
