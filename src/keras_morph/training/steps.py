"""What the class of a user's model does in its own way when it trains, kept by the models that stand around it.

Keras's guide has users write `train_step` in a class and make a functional model of it. What we train is another model, a
learner or a rebuilt network; it takes over the class's methods, but for those that make the network.
"""

from types import CellType, FunctionType
from typing import Any

import keras

from keras_morph.errors import KerasMorphError
from keras_morph.keras_internals import registered_as
from keras_morph.processes import here

__all__ = ["Trainee", "compile_plainly", "has_own_steps", "jit_compiles", "training_as"]

STEPS = ("train_step", "test_step", "compute_loss", "compute_metrics")
NETWORK = {
    "__init__", "__new__", "__dict__", "__weakref__", "call", "build", "get_config", "from_config", "compute_output_shape",
    "compute_output_spec", "summary", "fit", "evaluate", "predict",
}  # fmt: skip


def has_own_steps(model: Any) -> bool:
    """Whether the class of a model trains or tests in its own way."""
    plain = (keras.Model, keras.Sequential)
    return any(getattr(type(model), step) not in [getattr(kind, step) for kind in plain] for step in STEPS)


class Trainee(keras.Model):
    """A model that computes what another computes and trains it in place.

    Args:
        network: what is trained.
        name: of the model.
    """

    def __init__(self, network: keras.Model, name: str | None = None) -> None:
        keras.Model.__init__(self, name=name or f"{network.name}_trainee")  # not that of a user's class in between
        self.network = network
        self.built = True  # all weights are there, so that an optimizer's state can be loaded before any call

    @property
    def output_names(self) -> list[str] | None:
        """By which losses and metrics are given."""
        return getattr(self.network, "output_names", None)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.network(inputs, training=training)


def training_as(model: keras.Model, kind: type) -> type:
    """A subclass of `kind` that trains and tests as the class of a model does; `kind` itself where that is as Keras does.

    What the methods find in `self` and the subclass has not is looked up in the model.

    Args:
        model: a user's model.
        kind: a class of models whose `__init__` calls that of `keras.Model` by its name, such as Trainee.
    """
    if not has_own_steps(model) or hasattr(kind, "like"):
        return kind
    keras_names = frozenset(vars(keras.Model(model.inputs, model.outputs)))
    own = {"like": model, "keras_names": keras_names, "__getattr__": _found_in_the_model, "metrics": property(_metrics)}
    mixed = type(kind.__name__, (kind, _without_network(type(model))), {**own, "__module__": kind.__module__})
    mixed.__doc__ = kind.__doc__
    registered_as(mixed, kind)
    return mixed


def compile_plainly(model: keras.Model, **options: Any) -> None:
    """Compile as `keras.Model` does; what a `compile` of the user's own has kept besides is found in their model."""
    keras.Model.compile(model, **options)


def jit_compiles() -> bool | str:
    """Whether what we train is compiled with XLA: as Keras chooses, but not by TensorFlow without an accelerator.

    There XLA takes twice as long to compile, and runs a depthwise convolution many times slower (docs/decisions.md). Nor in
    several processes of TensorFlow, whose collective operations XLA cannot compile.

    Returns:
        A value for the `jit_compile` of `compile`.
    """
    if keras.backend.backend() != "tensorflow":
        return "auto"
    accelerated = any(name[:3] != "cpu" for name in keras.distribution.list_devices())
    return "auto" if accelerated and here().count == 1 else False


def _without_network(kind: type) -> type:
    """A user's class with `keras.Model` in the place of the functional model that it is."""
    if not issubclass(kind, keras.Model):
        return kind
    if kind.__module__.split(".")[0] == "keras":
        return keras.Model
    bases = tuple(dict.fromkeys(_without_network(base) for base in kind.__bases__))
    members = {name: value for name, value in vars(kind).items() if name not in NETWORK}
    mirrored = type(kind.__name__, bases, {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    for name, value in members.items():
        if not name.startswith("__"):
            setattr(mirrored, name, _as_method_of(mirrored, value))
    return mirrored


def _as_method_of(kind: type, value: Any) -> Any:
    """A method for another class: `super()` looks up its class in a cell of the function."""
    if isinstance(value, property):
        get, write, delete = (part and _as_method_of(kind, part) for part in (value.fget, value.fset, value.fdel))
        return property(get, write, delete, value.__doc__)
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_as_method_of(kind, value.__func__))
    if not isinstance(value, FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    names = value.__code__.co_freevars
    cells = [
        CellType(kind) if n == "__class__" else cell for n, cell in zip(names, value.__closure__ or (), strict=True)
    ]
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    copy.__kwdefaults__, copy.__doc__ = value.__kwdefaults__, value.__doc__
    return copy


def _found_in_the_model(self: Any, name: str) -> Any:
    """What `self` of a user's method has not."""
    kind = type(self)
    for base in kind.__mro__[1:]:  # PyTorch's modules look up what they hold in this way
        if "__getattr__" in vars(base):
            try:
                return vars(base)["__getattr__"](self, name)
            except AttributeError:
                break
    if name.startswith("_") and (name not in vars(kind.like) or name in kind.keras_names):
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
    value = getattr(kind.like, name)
    holds_weights = isinstance(value, (keras.Layer, keras.Variable))
    if holds_weights and getattr(self, "seed", None) is not kind.like:
        raise KerasMorphError(
            f"{type(kind.like).__name__} trains with self.{name}, a {type(value).__name__} of {kind.like.name}, but what is "
            f"trained here is a copy. Expected: steps that call self(x), or a StructureLearner of the model itself. "
            f"Received: a step that reads self.{name}."
        )
    return value


def _metrics(self: Any) -> list[Any]:
    """Those of Keras, or what the user's class lists, and behind them what the user's model holds besides."""
    found = list(super(type(self), self).metrics)
    kept = [value for value in vars(type(self).like).values() if isinstance(value, keras.metrics.Metric)]
    known = {id(metric) for metric in found} | {id(vars(type(self).like).get(key)) for key in type(self).keras_names}
    return found + [metric for metric in kept if id(metric) not in known]
