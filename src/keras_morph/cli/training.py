"""What `train` does: check what its options name, train a network under the penalty, log and rebuild its structure."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import keras

from keras_morph.cli.choices import (
    SCHEDULES,
    base_model_of,
    cost_of,
    is_named,
    one_of,
    optimizer_of,
    pixels_of,
    regularizer_of,
)
from keras_morph.cli.options import OF_THE_PLACE, plain, process_of
from keras_morph.cli.resuming import say_finished, say_unfinished
from keras_morph.cli.train import Train
from keras_morph.costs.costs import Cost
from keras_morph.datasets import PIXELS, Dataset, load
from keras_morph.devices import Devices, choose, existing, mixed_precision, whole_batches
from keras_morph.errors import KerasMorphError
from keras_morph.graph.tracing import trace
from keras_morph.processes import agree, here, join, share_newest, watching_others
from keras_morph.runs import describe_environment, save_model, write_json, write_somewhere
from keras_morph.status import running
from keras_morph.surgery.rebuilding import rebuild
from keras_morph.tensorboard import TensorBoardLog
from keras_morph.training.callbacks import EpochLog, StructureLog
from keras_morph.training.checkpoints import Saved, fit_resumably
from keras_morph.training.regularizers import Gamma, Regularizer
from keras_morph.zoo import WITHOUT_GAMMA, MorphNetModel, build, minimum_size

__all__ = ["run"]

BATCH_PER_GPU, BATCH_ON_CPU = 256, 128  # four GPUs: the Model Zoo's 1024


@dataclass(frozen=True)
class _Plan:
    """What the options name."""

    base_model: str | Callable[..., keras.Model]
    regularizer: Regularizer
    cost: Cost
    optimizer: Callable[..., keras.optimizers.Optimizer]
    schedule: Callable[[float, int], Any]
    devices: Devices
    batch_size: int

    @property
    def on_cpu(self) -> bool:
        return "cpu:0" in self.devices


def run(options: Train) -> None:
    """Train, and write the run's folder."""
    if say_finished(options.resume):
        return
    process = process_of(options.job_addresses, options.process_id)
    if process.count > 1:
        print(f"{process}: waits for the others, {', '.join(process.addresses)}", flush=True)
    join(process)
    with contextlib.ExitStack() as stack:
        if process.number:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(watching_others())
        _train(options)


def _train(options: Train) -> None:
    plan = _planned(options)
    if options.resume is None:
        say_unfinished("train", options)
    _say_devices(options, plan)
    keras.utils.set_random_seed(options.random_seed)
    images = _images(options, plan)
    whole = _whole(images, plan)
    _agree(options, plan, images)
    with mixed_precision(options.mixed_precision):
        model = _model(options, plan, images, whole)
        named = is_named(options.base_model_name)
        pixels = pixels_of(options.pixels, model.learner.seed, images, named=named, trained=False)  # the head is fresh
        images = images.in_pixels(pixels.pixels)
        initial_cost = model.get_model_cost()
        strength = options.morphnet_regularization_multiplier / initial_cost
        model.set_morphnet_regularization_strength(strength)
        filled = {"batch_size": plan.batch_size, "num_classes": model.num_classes}
        config: dict[str, Any] = {"command": "train", "options": plain(options) | filled, "devices": str(plan.devices)}
        config |= {"initial_cost": initial_cost, "strength": strength}
        with running(model.folder):
            if options.resume is None:
                write_json(model.folder / "config.json", config | describe_environment())
            print(f"{images}\n{pixels}\ninitial cost {initial_cost:.6g} {plan.cost.unit}, strength {strength:.4g}")
            print(f"run folder: {model.folder}", flush=True)
            if here().number:  # each has one of its own, to go on from
                sys.stderr.write(f"keras-morph: {here()}: run folder: {model.folder}\n")
            with watching_others():
                _fit(model, images, whole, options)
                _save(model)
    share = model.get_model_cost() / initial_cost
    print(f"cost {share:.1%} of the seed's; structure.json and small.keras are in {model.folder}")


def _agree(options: Train, plan: _Plan, images: Dataset) -> None:
    """Whether all processes have been asked for the same: else each would wait for steps that the others do not make."""
    asked = {name: value for name, value in plain(options).items() if name not in (*OF_THE_PLACE, "log_dir", "dataset")}
    asked |= {"batch_size": plan.batch_size, "num_classes": options.num_classes or images.num_classes}
    agree("options", crc32(json.dumps(asked, sort_keys=True).encode()) >> 1)
    labels = b"".join(part.tobytes() for part in (images.y_train, images.y_val))
    agree("data", crc32(repr((images.image_shape, images.class_names)).encode() + labels) >> 1)


def _planned(options: Train) -> _Plan:
    """Everything that can be wrong without the data is found here."""
    base_model = base_model_of(options.base_model_name)
    regularizer = regularizer_of(
        options.morphnet_regularizer_algorithm,
        options.morphnet_regularizer_threshold,
        options.regularizer_option or (),
    )
    cost = cost_of(options.morphnet_target_cost, options.morphnet_hardware, options.peak_flops, options.bandwidth)
    make_optimizer = optimizer_of(options.optimizer, options.momentum, options.weight_decay)
    schedule = one_of("--schedule", options.schedule, SCHEDULES)
    devices = choose(options.num_cuda_device, first=options.main_train_device)
    if options.main_eval_device is not None:
        existing(options.main_eval_device)
    batch_size = options.batch_size or (BATCH_ON_CPU if "cpu:0" in devices else BATCH_PER_GPU) * devices.count
    devices.check_batch_size(batch_size)
    if isinstance(regularizer, Gamma) and options.base_model_name in WITHOUT_GAMMA:
        size = minimum_size(base_model)
        regularizer.sources(trace(build(base_model, input_shape=(size, size, 3))))  # raises, and says where
    return _Plan(base_model, regularizer, cost, make_optimizer, schedule, devices, batch_size)


def _say_devices(options: Train, plan: _Plan) -> None:
    unasked = plan.on_cpu and options.num_cuda_device is None
    print(f"training {plan.devices}" + (": no GPU is visible" if unasked else ""))
    named = options.main_train_device
    if named is not None and existing(named) not in plan.devices:
        print(f"the parameters are where training is: --main-train-device {named} is not used")


def _images(options: Train, plan: _Plan) -> Dataset:
    """The data set, of at least the smallest images that the network takes."""
    images = load(
        options.dataset,
        image_size=options.image_size,
        limit=options.limit,
        seed=options.random_seed,
        stream=options.stream,
    )
    minimum = minimum_size(plan.base_model)
    height, width, _ = images.image_shape
    size = (max(height, minimum), max(width, minimum))
    if size != (height, width):
        print(f"{plan.base_model} takes images of at least {minimum}x{minimum}: enlarged from {height}x{width}")
        images = images.resized(size)
    if options.pixels != "auto":
        PIXELS[options.pixels].check(images.image_shape)
    if options.num_classes is not None and options.num_classes < images.num_classes:
        raise KerasMorphError(
            f"--num-classes expects at least the {images.num_classes} classes of {images.name}. "
            f"Received: {options.num_classes}."
        )
    return images


def _whole(images: Dataset, plan: _Plan) -> int:
    """How many training images the devices can share."""
    count = plan.devices.count
    whole = whole_batches(len(images.x_train), plan.batch_size, count)
    if whole < len(images.x_train):
        print(f"the last batch is dropped: {count} devices cannot share {len(images.x_train) - whole} images")
    if len(images.x_val) % count:
        print(f"validation is padded with images of weight 0 to a multiple of {count} devices")
    return whole


def _model(options: Train, plan: _Plan, images: Dataset, whole: int) -> MorphNetModel:
    steps = options.num_epochs * -(-whole // plan.batch_size)
    return MorphNetModel(
        plan.base_model,
        options.num_classes or images.num_classes,
        plan.schedule(options.learning_rate, steps),
        plan.batch_size,
        options.num_cuda_device,
        options.main_train_device,
        options.main_eval_device,
        plan.regularizer,
        plan.cost,
        log_dir=options.log_dir,
        input_shape=images.image_shape,
        optimizer=plan.optimizer,
        run=options.resume,
    )


def _fit(model: MorphNetModel, images: Dataset, whole: int, options: Train) -> None:
    """Train on the first `whole` images, validate, and log; where a checkpoint is, from there on."""
    size = model.batch_size
    held_out = images.validation(size, devices=model.devices.count)
    elsewhere = held_out is not None and model.evaluates_elsewhere

    def validate(epoch: int, logs: dict[str, float]) -> None:
        parts = [slice(start, start + size) for start in range(0, len(images.y_val), size)]
        right = sum(len(images.y_val[s]) * model.validate(images.x_val[s], images.y_val[s])[0] for s in parts)
        logs["val_accuracy"] = right / len(images.y_val)

    checkpoints = model.folder / "checkpoint"
    saved = Saved.load(checkpoints / "last.npz")
    share_newest(checkpoints / "last.npz", (-1, 0) if saved is None else (saved.state["epoch"], saved.state["steps"]))
    callbacks = [
        *([keras.callbacks.LambdaCallback(on_epoch_end=validate)] if elsewhere else []),
        EpochLog(model.folder / "history.csv", line=print, left=options.num_epochs),
        StructureLog(model.folder / "learned_structure"),
        TensorBoardLog(model.folder),
    ]
    with model.devices.scope():
        fit_resumably(
            model.learner,
            images.training(size, options.random_seed, examples=whole),
            size,
            phase="learn",
            epochs=options.num_epochs,
            folder=checkpoints,
            saved=Saved.load(checkpoints / "last.npz"),
            callbacks=callbacks,
            seed=options.random_seed,
            validation_data=None if elsewhere else held_out,
            verbose=0,
        )


def _save(model: MorphNetModel) -> None:
    structure = model.learner.structure()
    write_somewhere(model.folder / "structure.json", structure.save)
    for name, network in (("seed", model.learner.seed), ("small", rebuild(model.learner, structure))):
        write_somewhere(model.folder / f"{name}.keras", partial(save_model, network))
