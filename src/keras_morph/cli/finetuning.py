"""What `finetune` does: train a model for some epochs, by labels and a teacher's answers, in a run's folder."""

import time
from typing import Any

import keras

from keras_morph.cli.choices import (
    accuracy_of,
    check_fits,
    dataset_of,
    is_named,
    load_model,
    loss_of,
    optimizer_of,
    pixels_of,
)
from keras_morph.cli.finetune import Finetune
from keras_morph.cli.options import plain
from keras_morph.cli.resuming import say_finished, say_unfinished
from keras_morph.costs.costs import FLOPs, ModelSize
from keras_morph.errors import KerasMorphError
from keras_morph.runs import describe_environment, going_on, new_run_folder, save_model, write_json
from keras_morph.status import running
from keras_morph.training.callbacks import EpochLog
from keras_morph.training.checkpoints import Saved, fit_resumably
from keras_morph.training.distilling import Distiller, share_by_default
from keras_morph.training.guards import judged
from keras_morph.training.recipe import cosine
from keras_morph.training.steps import jit_compiles

__all__ = ["run"]


def run(options: Finetune) -> None:
    """Fine-tune, and write the run's folder. Everything that can be wrong is found before anything is trained or written."""
    if say_finished(options.resume):
        return
    start = time.monotonic()
    optimizer = optimizer_of(options.optimizer)
    if options.resume is None:
        say_unfinished("finetune", options)
    dataset = dataset_of(options)
    sizes: dict[str, Any] = {"input_shape": dataset.image_shape, "classes": dataset.num_classes}
    model, teacher = load_model(options.model, **sizes), None
    if options.teacher is not None:
        try:
            teacher = load_model(options.teacher, **sizes)
        except KerasMorphError as error:
            raise KerasMorphError(str(error).replace("MODEL", "--teacher", 1)) from error
    for each in (model, *([] if teacher is None else [teacher])):
        check_fits(each, dataset)
    pixels = pixels_of(options.pixels, model, dataset, named=is_named(options.model))
    dataset = dataset.in_pixels(pixels.pixels)
    trained: keras.Model = model
    share = options.distillation
    validation = dataset.validation(options.batch_size)
    if teacher is not None:
        if share is None:
            share = share_by_default(judged(teacher, validation, "validation", options.batch_size))
        trained = Distiller(model, teacher, weight=share, from_logits=loss_of(model).from_logits)

    folder = options.resume or new_run_folder(options.log_dir, name=options.name)
    with running(folder):
        if options.resume is None:
            config = {"command": "finetune", "options": plain(options), **describe_environment()}
            write_json(folder / "config.json", config)
        taught = "" if teacher is None else f"\n{share:.0%} of the loss are the answers of {options.teacher}"
        print(f"{dataset}\n{pixels}{taught}\nrun folder: {folder}")
        before = accuracy_of(model, dataset)
        log = EpochLog(folder / "history.csv", phase="fine-tune", line=print)
        steps = -(-len(dataset.x_train) // options.batch_size)
        trained.compile(
            optimizer(cosine(options.learning_rate, steps * options.epochs)),
            loss_of(model),
            metrics=["accuracy"],
            jit_compile=jit_compiles(),
        )
        checkpoints = folder / "checkpoint"
        fit_resumably(
            trained,
            dataset.training(options.batch_size, options.random_seed),
            options.batch_size,
            phase="fine-tune",
            epochs=options.epochs,
            folder=checkpoints,
            models={"model": model},
            saved=Saved.load(checkpoints / "last.npz"),
            callbacks=[log],
            seed=options.random_seed,
            validation_data=validation,
            verbose=0,
        )
        save_model(model, folder / "small.keras")
        after = accuracy_of(model, dataset)
        figures = {
            "FLOPs": FLOPs()(model),
            "parameters": ModelSize()(model),
            "val_accuracy": log.rows[-1]["val_accuracy"] if log.rows else None,
            "test_accuracy": after,
            "seconds": time.monotonic() - start if options.resume is None else None,
        }
        with going_on(folder / "results.json"):
            write_json(folder / "results.json", figures)
    print(f"{dataset.name}, {len(dataset.x_test)} test images: {before:.2%} -> {after:.2%} ({folder / 'small.keras'})")
