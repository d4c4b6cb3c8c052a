"""Copies of layers and models, with all that they hold."""

import tempfile
from contextlib import suppress
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_morph.graph.composites import local_names, recordings_in
from keras_morph.graph.replaying import replayed
from keras_morph.keras_internals import (
    graph_in,
    held_by,
    hold_instead,
    input_layers,
    nodes_of,
    own_variables,
    parts_of,
    remade,
    tensors_of,
)
from keras_morph.layers.rules import rule_for
from keras_morph.runs import uncompiled

__all__ = ["Held", "cloned", "transfer"]


def transfer(source: Any, target: Any) -> None:
    """Give a layer or model everything that saving another one writes: weights, statistics, vocabularies."""
    for one, other in zip(parts_of(source), parts_of(target), strict=True):
        if one is other:
            continue
        other.trainable = one.trainable  # parents first: what a layer holds has the last word
        for ours, theirs in zip(own_variables(one), own_variables(other), strict=False):
            theirs.trainable = ours.trainable  # some may be frozen one by one, as LoRA does
        learns = all(getattr(each, "lora_enabled", False) for each in (one, other))
        if learns and getattr(one, "quantization_mode", None) is None:
            # Keras saves the kernel with what was learned added to it, and zeros that would never learn again.
            theirs = {variable.name: variable for variable in own_variables(other)}
            for ours in own_variables(one):
                theirs[ours.name].assign(ours)
            continue
        state: dict[str, Any] = {}
        one.save_own_variables(state)
        # JAX gives a variable's array away when it trains: what is trained must not share it.
        state = {key: np.array(ops.convert_to_numpy(value)) for key, value in state.items()}
        try:
            other.load_own_variables(state)
        except ValueError:  # a subclass with more weights than the class that it is of, which Keras cannot load
            for ours, theirs in zip(own_variables(one), own_variables(other), strict=True):
                theirs.assign(ours)
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)


def cloned(model: keras.Model) -> keras.Model:
    """A copy of a model. Layers that cannot be made anew are shared with it, as `remade` says.

    A layer made of layers becomes a nested functional model of what it does: its config need not tell all of that.
    """
    copies = _Copies()
    with uncompiled(model):  # what it was compiled with may not be what Keras can write down
        copy = copies.of(model)
    # Layer by layer: a subclass of a functional model may keep the same layers in another order.
    for source, target in copies.known.values():
        if graph_in(target) is None and isinstance(source, keras.layers.Layer):
            transfer(source, target)
    if model.compiled:
        with suppress(TypeError, ValueError, NotImplementedError):
            copy.compile_from_config(model.get_compile_config())
    return copy


class Held:
    """Layers that several others hold, or a model and one of its layers, and the copy that stands for each in all of them.

    A config tells of what a layer holds, not of who else does: copies that were made from configs would untie weights.
    """

    def __init__(self) -> None:
        self.copies: dict[int, tuple[Any, Any]] = {}  # with what was copied, so that nothing else is at its address

    def of(self, layer: Any) -> Any:
        """The copy of a layer that was made before, by itself or inside another one; or None."""
        return self.copies.get(id(layer), (None, None))[1]

    def add(self, layer: Any, copy: Any) -> Any:
        """Remember a copy that is not called yet, and give it what was made before of the layers that it holds."""
        if copy is not layer and isinstance(layer, keras.Layer):
            self.copies.setdefault(id(layer), (layer, copy))
            parts = () if graph_in(layer) is not None else zip(held_by(layer), held_by(copy), strict=False)
            for part, other in parts:
                if type(part) is not type(other):
                    break  # what a layer makes when it is built has no copy yet
                known = self.of(part)
                if known is None:
                    self.add(part, other)
                elif known is not other:
                    hold_instead(copy, other, known)
        return copy


class _Copies:
    """One copy of each layer of a model; of a layer made of layers, one for each graph that is recorded of it."""

    def __init__(self) -> None:
        self.known: dict[tuple, tuple[Any, Any]] = {}
        self.recordings: dict[int, Any] = {}  # those of the layers in the graph that is being copied
        self.held = Held()

    def of(self, layer: Any, name: str | None = None) -> Any:
        recorded = self.recordings.get(id(layer))
        recorded = None if isinstance(recorded, str) else recorded
        key = id(layer), None if recorded is None else id(recorded)
        if key not in self.known:
            self.known[key] = layer, self.made(layer, name, recorded)
        return self.known[key][1]

    def made(self, layer: Any, name: str | None, recorded: Any) -> Any:
        function = graph_in(layer) if recorded is None else recorded
        if function is None:
            if type(layer) not in (keras.layers.TimeDistributed, keras.layers.SpectralNormalization):
                return self.held.of(layer) or self.held.add(layer, remade(layer, name, lenient=True))
            config = {key: value for key, value in layer.get_config().items() if key != "layer"}
            # What is inside may be called elsewhere too.
            return type(layer)(self.of(layer.layer), **{**config, "name": name or layer.name})
        if recorded is None and (known := self.held.of(layer)) is not None:  # inside of what was copied before
            return known
        outer, self.recordings = self.recordings, {**self.recordings, **recordings_in(nodes_of(function))}
        if recorded is not None or (name is not None and rule_for(layer) is None):
            copy = self.functional(layer, function, name or layer.name)
        else:
            copy = self.of_its_class(layer)
        self.recordings = outer
        return copy if recorded is not None else self.held.add(layer, copy)

    def functional(self, layer: Any, function: Any, name: str) -> keras.Model:
        """A functional model that does what is recorded of a layer, with copies under their local names.

        A nested model in it is called in the same way, under local names too.
        """
        names = local_names(function, None if graph_in(layer) is not None else layer)

        def run(node: Any, args: tuple, kwargs: dict) -> Any:
            return _called(node.operation, self.of(node.operation, names[id(node.operation)]), args, kwargs)

        return replayed(function, run, name)

    def of_its_class(self, model: keras.Model) -> keras.Model:
        """`clone_model`, which by itself would call input layers by the names of their tensors.

        A replay would lose the class: a Sequential's, or that of a subclass of a functional model.
        """
        if isinstance(model, keras.Sequential):
            return keras.models.clone_model(model, clone_function=self.of)
        originals: dict[int, Any] = {}

        def copy_of(layer: Any) -> Any:
            copy = self.of(layer)
            originals[id(copy)] = layer
            return copy

        def call(copy: Any, *args: Any, **kwargs: Any) -> Any:
            return _called(originals[id(copy)], copy, args, kwargs)

        inputs = tree.map_structure(lambda layer: remade(layer).output, input_layers(model))
        return keras.models.clone_model(model, input_tensors=inputs, clone_function=copy_of, call_function=call)


def _called(original: Any, copy: Any, args: tuple, kwargs: dict) -> Any:
    """Call a copy as its original is called; a functional model of what is recorded takes the tensors alone."""
    if graph_in(copy) is not None and graph_in(original) is None:
        return copy(tensors_of(args, kwargs))
    return copy(*args, **kwargs)
