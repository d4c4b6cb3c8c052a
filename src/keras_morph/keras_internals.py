"""All that we use of Keras's private side: the classes of `keras.ops`, the graph that a functional model records, layers made
anew, and a few switches. The only file that imports `keras.src` or touches a name of Keras's with an underscore in front.
"""

import collections
import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType, SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import tree
from keras.src.activations import activations
from keras.src.applications.convnext import LayerScale
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.layers.layer import CallContext
from keras.src.models.functional import Functional
from keras.src.ops import core, image, nn
from keras.src.ops import math as maths
from keras.src.ops import numpy as numeric
from keras.src.ops.symbolic_arguments import SymbolicArguments
from keras.src.saving import object_registration
from keras.src.utils.naming import to_snake_case

from keras_morph.errors import KerasMorphError, UnsupportedModelError

__all__ = [
    "CustomScaleLayer",
    "LayerScale",
    "activations",
    "added_losses",
    "as_if_training",
    "build_metrics",
    "call_on",
    "compiled_with",
    "core",
    "count_names_anew",
    "forget_averages",
    "functional_in",
    "graph_in",
    "held_by",
    "hold_instead",
    "image",
    "input_layers",
    "losses_are_given",
    "made_from",
    "maker_of",
    "mask_of",
    "maths",
    "nn",
    "nodes_of",
    "numeric",
    "one_or_all",
    "operations_of",
    "parts_of",
    "place_of",
    "pytorch_modules",
    "random_states",
    "recorded_arguments",
    "registered_as",
    "remade",
    "seed_shared",
    "set_random_states",
    "settings_of",
    "structs",
    "sync_weights",
    "taken_by",
    "takes_a_mask",
    "tensors_of",
    "to_snake_case",
    "weights_are_elsewhere",
    "without_values",
]


def graph_in(model: Any) -> Any:
    """The functional graph that a model computes; None if it is not built, or if its `call` is the user's own."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None) if type(model).call is keras.Sequential.call else None
    return model if hasattr(model, "_nodes_by_depth") and type(model).call is Functional.call else None


def functional_in(model: Any) -> Any:
    """The functional graph inside a model.

    Raises:
        UnsupportedModelError: if there is none.
    """
    function = graph_in(model)
    if function is not None:
        return function
    if isinstance(model, keras.Sequential) and getattr(model, "_functional", None) is None:
        raise UnsupportedModelError(
            f"{model.name} is not built, so it has no graph to trace. Expected a model with a known input shape. "
            f"Received: an unbuilt Sequential; add keras.Input(shape) in front or call {model.name}.build(shape)."
        )
    name = getattr(model, "name", repr(model))
    raise UnsupportedModelError(
        f"{name} has no graph to trace. Expected a functional or Sequential model. "
        f"Received: {type(model).__name__}, whose call() is plain Python; call it on an input, x = keras.Input(shape), "
        "and give keras.Model(x, model(x)): a call that consists of layers and keras.ops is followed."
    )


def structs(model: keras.Model) -> tuple[Any, Any]:
    """How a model's inputs and outputs are nested: a tensor, or lists and dictionaries of them."""
    function = functional_in(model)
    return function._inputs_struct, function._outputs_struct


def maker_of(tensor: Any) -> Any:
    """The layer or operation that makes a Keras tensor."""
    return tensor._keras_history.operation


def as_taken(model: Any, inputs: Any) -> list[Any]:
    """Inputs as `fit` hands them to a functional model: a flat list of tensors, by name where they are named, of its ranks.

    Raises:
        ValueError: if they do not fit.
    """
    return functional_in(model)._standardize_inputs(inputs)


def input_layers(model: keras.Model) -> Any:
    """The InputLayers of a functional model, nested as its inputs are."""
    return tree.map_structure(maker_of, model.input)


def nodes_of(function: Any) -> list[Any]:
    """Calls of a functional graph, in the order in which they run."""
    depths = function._nodes_by_depth
    return [node for depth in sorted(depths, reverse=True) for node in depths[depth]]


def operations_of(function: Any) -> list[Any]:
    """Layers and operations of a functional graph."""
    return list(function._operations)


def tensors_of(args: Any, kwargs: Any) -> Any:
    """The Keras tensors among a call's arguments: a list, or the only one."""
    return one_or_all([x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)])


def added_losses(model: Any) -> Any:
    """What regularizers and `add_loss` add to the loss, the sum."""
    return sum((model._aggregate_additional_loss(each) for each in model.losses), 0.0)


def forget_averages(callbacks: Sequence[Any]) -> None:
    """Let SwapEMAWeights take what is in the model for its weights: those that a phase before has left there stay."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.SwapEMAWeights):
            callback._ema_weights_in_model = False


def taken_by(operation: Any, function: Any, arguments: Any) -> list[Any]:
    """The Keras tensors of a call in the order of the inputs of its graph: a model takes a dictionary's by their names."""
    given = arguments.args[0] if arguments.args else next(iter(arguments.kwargs.values()), None)
    if isinstance(given, dict) and graph_in(operation) is not None:
        keys = structs(function)[0]
        keys = sorted(keys) if isinstance(keys, dict) else [source.name for source in function.inputs]
        if all(isinstance(given.get(key), keras.KerasTensor) for key in keys):
            return [given[key] for key in keys]
    return list(arguments.keras_tensors)


def one_or_all(values: list[Any]) -> Any:
    """As Keras takes tensors: several in a list, a single one as it is."""
    return values if len(values) > 1 else values[0]


def remade(layer: Any, name: str | None = None, *, lenient: bool = False) -> Any:
    """A layer made anew from its config, with fresh weights; or the layer itself, where that fails.

    It fails for a Lambda, for a layer whose arguments Keras cannot write down and that has no `get_config`, and for one
    that `quantize` changed inside, which its config does not say.

    Args:
        layer: a layer or operation.
        name: name of the copy; that of the layer by default.
        lenient: leave out what the config holds and the class does not take, as in some of KerasHub's transformers.
    """
    name = name or layer.name
    try:
        config = layer.get_config()
        config = {**config, "name": name} if "name" in config else config
        try:
            copy = made_from(layer, config)
        except TypeError:
            if not lenient:
                raise
            copy = _from_known_arguments(type(layer), config)
    except Exception:  # whatever a user's layer raises
        return layer
    if _quantized(copy) != _quantized(layer):
        return layer
    _complete(copy, layer)
    copy.name = name  # where __init__ takes no name
    return copy


def settings_of(layer: Any) -> dict[str, Any]:
    """Numbers, switches, texts and arrays that a layer keeps in public attributes, also nested: what its call may depend on."""
    found = {name: _plain(value) for name, value in vars(layer).items() if name[0] != "_"}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """What tells a setting from another one, in a tuple; None of what is none."""
    if isinstance(value, bool | int | float | str):
        return (value,)
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, list | tuple | dict):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        parts = [_plain(each) for each in items]
        return None if None in parts else (tuple(map(str, value)) if isinstance(value, dict) else (), tuple(parts))
    return None


def _complete(copy: Any, layer: Any) -> None:
    """Settings of a user's layer that its config does not tell: it would be made anew with others, without a word."""
    if type(layer).__module__.startswith("keras.") or not isinstance(layer, keras.Layer):
        return
    own, ours = settings_of(layer), settings_of(copy)
    for name in own.keys() & ours.keys() - OF_KERAS:
        if own[name] != ours[name]:
            setattr(copy, name, vars(layer)[name])


OF_KERAS = {"name", "built", "trainable", "autocast", "supports_masking", "supports_jit"}
"""Public attributes of every layer, which say nothing of what it computes."""


def made_from(layer: Any, config: dict[str, Any]) -> Any:
    """A layer of the same class from a config of it; functions that Keras cannot make anew are those of the layer.

    Such are a lambda for an activation, and functions that are defined inside others.
    """
    try:
        return type(layer).from_config(config)
    except (TypeError, ValueError):
        own = {key: getattr(layer, key, None) for key in config}
        functions = {key: value for key, value in own.items() if isinstance(value, FunctionType)}
        if not functions:
            raise
        return type(layer)(**{**config, **functions})


def _quantized(layer: Any) -> set[str]:
    """How a layer, or what it holds, is quantized."""
    parts = parts_of(layer) if isinstance(layer, keras.Layer) else []
    return {mode for part in parts if (mode := getattr(part, "quantization_mode", None))}


def _from_known_arguments(kind: Any, config: dict) -> Any:
    """A layer whose config holds more than its class takes.

    The copy's own config is without it, so that what is saved can be loaded.
    """
    parameters = inspect.signature(kind).parameters
    taken = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken |= {"name", "trainable", "dtype"}
    config = {key: value for key, value in config.items() if key in taken}
    copy = kind.from_config(config)
    copy.get_config = lambda: dict(config)
    return copy


# Optimizers.


def batches_seen(optimizer: Any) -> int:
    """Steps that an optimizer's schedule counts: also those in which gradients are only added up."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return int(keras.ops.convert_to_numpy(optimizer._iterations))


def optimizer_like(optimizer: Any, rate: Any) -> Any:
    """An optimizer with the settings of another one, and another learning rate or schedule.

    Raises:
        KerasMorphError: if variables are excluded from its weight decay one by one.
    """
    config = optimizer.get_config()
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer_like(optimizer.inner_optimizer, rate)
        return type(optimizer)(inner, **{key: value for key, value in config.items() if key != "inner_optimizer"})
    copy = type(optimizer).from_config({**config, "learning_rate": rate})
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise KerasMorphError(
            "What is trained here is a copy of the model, which has other variables. Expected: an optimizer with "
            "exclude_from_weight_decay(var_names=[...]). Received: one with exclude_from_weight_decay(var_list=...)."
        )
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if pattern is not None:
        copy.exclude_from_weight_decay(var_names=[pattern.pattern])
    return copy


# Layers, and what they hold.


def parts_of(layer: Any, *, itself: bool = True) -> list[Any]:
    """All layers inside a layer or model, itself first."""
    return list(layer._flatten_layers(include_self=itself))


def held_by(layer: Any) -> list[Any]:
    """The layers that a layer holds itself, in the order in which it was given them."""
    return list(layer._layers)


def hold_instead(holder: Any, old: Any, new: Any) -> None:
    """Let a layer hold another one in place of one that it holds, under all of its names."""
    if not holder._tracker.is_in_store("layers", new):
        holder._tracker.replace_tracked_value("layers", old, new)
    for name, value in {**vars(holder), **pytorch_modules(holder)}.items():
        if value is old:
            setattr(holder, name, new)
        elif isinstance(value, list | dict) and not name.startswith("_"):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                if each is old:
                    value[key] = new


def own_variables(layer: Any) -> list[Any]:
    """The weights of a layer that none of the layers inside it holds."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def builds_weights(layer: Any) -> bool:
    """Whether a layer has a `build` of its own, which makes weights."""
    return type(layer).build is not keras.Layer.build


def pytorch_modules(layer: Any) -> dict[str, Any]:
    """What a layer holds as a PyTorch module, where PyTorch is the backend: it keeps modules apart from attributes."""
    return dict(vars(layer).get("_modules", {}))


def takes_a_mask(layer: Any) -> bool:
    """Whether a layer's `call` has an argument for a mask."""
    return bool(layer._call_has_mask_arg)


def mask_of(tensor: Any) -> Any:
    """The Keras mask that a tensor carries, or None."""
    return getattr(tensor, "_keras_mask", None)


# Switches.

_CONTEXT = "current_call_ctx"  # where Keras keeps whether a network trains, while one of its layers is called
_SEEDS = "global_seed_generator"  # where it keeps the random generator of those who bring none
_COUNTERS = "object_name_uids"  # how many layers were named after each class
_UNINITIALIZED = "uninitialized_variables"  # of layers that were made in a stateless scope


@contextmanager
def as_if_training(layer: Any, training: bool) -> Iterator[None]:
    """Inside, what a layer's `call` runs believes that the layer is called in training, or in inference."""
    context = CallContext(layer)
    context.set_value("training", training)
    before = global_state.get_global_attribute(_CONTEXT)
    global_state.set_global_attribute(_CONTEXT, context)
    try:
        yield
    finally:
        global_state.set_global_attribute(_CONTEXT, before)


def recorded_arguments(*args: Any, **kwargs: Any) -> Any:
    """Arguments of a call, as Keras records them."""
    return SymbolicArguments(*args, **kwargs)


def call_on(tensors: Sequence[Any]) -> Any:
    """A call of a layer on some tensors, with its `arguments`."""
    return SimpleNamespace(arguments=recorded_arguments(*tensors))


@contextmanager
def count_names_anew() -> Iterator[None]:
    """Inside, Keras numbers the layers that nobody names from the start; afterwards no name is given twice."""
    before = global_state.get_global_attribute(_COUNTERS) or {}
    global_state.set_global_attribute(_COUNTERS, collections.defaultdict(int))
    try:
        yield
    finally:
        inside = global_state.get_global_attribute(_COUNTERS)
        merged = {key: max(before.get(key, 0), inside.get(key, 0)) for key in {*before, *inside}}
        global_state.set_global_attribute(_COUNTERS, collections.defaultdict(int, merged))


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, variables have shapes only; afterwards nobody gives them values either.

    Keras keeps a list of those that are to be initialized when the next scope ends: it would fill the memory, or fail.
    """
    before = global_state.get_global_attribute(_UNINITIALIZED) or []
    global_state.set_global_attribute(_UNINITIALIZED, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(_UNINITIALIZED, before)


# Trainers.


def without_gradients() -> AbstractContextManager[Any]:
    """Inside, PyTorch keeps nothing for a gradient, which it would for all that is computed; elsewhere nothing is changed."""
    return sys.modules["torch"].no_grad() if keras.backend.backend() == "torch" else nullcontext()


def weights_are_elsewhere(model: keras.Model) -> bool:
    """Whether the variables are not those that are trained: while JAX trains, its trainer holds them.

    Inside a stateless call they are those that the call was given.
    """
    return getattr(model, "_jax_state_synced", True) is False and not in_stateless_scope()


def sync_weights(model: keras.Model) -> None:
    """Have the weights back in the variables, if JAX's trainer holds them."""
    if weights_are_elsewhere(model):
        model.jax_state_sync()


def random_states() -> dict[str, Any]:
    """The states of the random generators that a program shares, as JSON takes them: Keras's, Python's, NumPy's, PyTorch's.

    TensorFlow's own, which `keras.random` does not use, cannot be read.
    """
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  # the one that programs share
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    shared = global_state.get_global_attribute(_SEEDS)  # made when it is first used
    states = {
        "keras": None if shared is None else keras.ops.convert_to_numpy(shared.state).tolist(),
        "python": [version, list(numbers), gauss],
        "numpy": numpy_state,
    }
    torch = sys.modules.get("torch")  # imported by Keras, or by the user
    return states if torch is None else states | {"torch": torch.get_rng_state().tolist()}


def seed_shared(*numbers: int) -> None:
    """Set the random generators that `random_states` reads to what some numbers give.

    `keras.utils.set_random_seed` would import TensorFlow wherever it is installed.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    shared, torch = global_state.get_global_attribute(_SEEDS), sys.modules.get("torch")
    if shared is not None:
        shared.state.assign(np.array([seed, 0]))
    if torch is not None:
        torch.manual_seed(seed)


def set_random_states(states: dict[str, Any]) -> None:
    """Set the random generators to states that `random_states` gave."""
    if states["keras"] is not None:
        if global_state.get_global_attribute(_SEEDS) is None:
            global_state.set_global_attribute(_SEEDS, keras.random.SeedGenerator(0))
        global_state.get_global_attribute(_SEEDS).state.assign(np.array(states["keras"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = states["numpy"]["state"]
    np.random.set_state(states["numpy"] | {"state": inner | {"key": np.array(inner["key"], np.uint32)}})  # noqa: NPY002
    torch = sys.modules.get("torch")
    if torch is not None and "torch" in states:
        torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))


def build_metrics(model: keras.Model, batch: Any) -> None:
    """Make the variables of a compiled model's metrics now: TensorFlow's trainer does it in the first step."""
    model._symbolic_build(data_batch=batch)


def losses_are_given(model: keras.Model) -> bool:
    """Whether `losses` are those of the forward pass that JAX's trainer has just made, instead of new ones."""
    return bool(model._losses_override)


def compiled_with(model: keras.Model) -> dict[str, Any]:
    """What a model was compiled with, by the names of `compile`'s arguments; empty if it was not."""
    config = getattr(model, "_compile_config", None) if model.compiled else None
    return {} if config is None else dict(config.config)


def registered_as(kind: type, other: type) -> None:
    """Have a class saved under the name of another, which is then what loads it."""
    object_registration.GLOBAL_CUSTOM_NAMES[kind] = keras.saving.get_registered_name(other)


def place_of(optimizer: Any, variable: Any) -> int:
    """Which of its variables an optimizer is asked to update: TensorFlow's hands on what is inside a Keras variable."""
    return int(optimizer._get_variable_index(variable))
