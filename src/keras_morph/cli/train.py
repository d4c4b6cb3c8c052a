"""`keras-morph train`: the Model Zoo's command. Train a network under the penalty, and log and rebuild its structure."""

from pathlib import Path
from typing import Annotated, Any

import keras
import typer

from keras_morph import zoo
from keras_morph.cli.choices import (
    ALGORITHMS,
    COSTS,
    OPTIMIZERS,
    SCHEDULES,
    base_model_of,
    check_folder,
    check_number,
    cost_of,
    one_of,
    optimizer_of,
    regularizer_of,
)
from keras_morph.costs.hardware import HARDWARE
from keras_morph.datasets import Dataset, load
from keras_morph.devices import choose, existing, mixed_precision, padded, whole_batches
from keras_morph.errors import KerasMorphError
from keras_morph.graph.tracing import trace
from keras_morph.runs import describe_environment, save_model, write_json
from keras_morph.surgery.rebuilding import rebuild
from keras_morph.tensorboard import TensorBoardLog
from keras_morph.training.callbacks import EpochLog, StructureLog
from keras_morph.training.regularizers import Gamma
from keras_morph.zoo.morphnet_model import MorphNetModel

BATCH_PER_GPU, BATCH_ON_CPU = 256, 128  # four GPUs: the Model Zoo's 1024


def _among(choices: Any) -> str:
    return f"[{'|'.join(choices)}]"


def train(
    num_epochs: Annotated[int, typer.Option(help="The number of epochs for training.")] = 1000,
    num_classes: Annotated[
        int | None, typer.Option(help="The number of classes for image classification; default: the data set's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size, on all devices together; default: 256 per GPU, 128 on a CPU.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    base_model_name: Annotated[
        str,
        typer.Option(
            metavar=_among(zoo.NAMES),
            help="Select base model for image classification. Also: what else `keras-morph zoo` lists, or "
            "package.module:function of your own.",
        ),
    ] = "ResNet50",
    morphnet_regularizer_algorithm: Annotated[
        str, typer.Option(metavar=_among(ALGORITHMS), help="Select MorphNet regularization algorithm.")
    ] = "GroupLasso",
    morphnet_target_cost: Annotated[
        str, typer.Option(metavar=_among(COSTS), help="Select MorphNet target cost.")
    ] = "FLOPs",
    morphnet_hardware: Annotated[
        str, typer.Option(metavar=_among((*HARDWARE, "Others")), help="Select MorphNet hardware, for Latency.")
    ] = "V100",
    morphnet_regularizer_threshold: Annotated[
        float, typer.Option(help="Set the threshold [0, 1] for killing neuron layers.")
    ] = 1e-2,
    morphnet_regularization_multiplier: Annotated[
        float,
        typer.Option(
            help="Set MorphNet regularization multiplier for regularization strength. The regularization strength for "
            "training equals the regularization multiplier divided by the initial cost of the model. Zero turns "
            "MorphNet regularization off."
        ),
    ] = 1000.0,
    log_dir: Annotated[
        Path, typer.Option(help="Log directory for TensorBoard and optimized model architectures.")
    ] = Path("morphnet_log"),
    num_cuda_device: Annotated[
        int | None,
        typer.Option(help="Number of CUDA device to use; default: all that are visible, else the CPU. 0: the CPU."),
    ] = None,
    random_seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    main_train_device: Annotated[
        str | None,
        typer.Option(help="The device where the model parameters were located: first of those that train."),
    ] = None,
    main_eval_device: Annotated[
        str | None, typer.Option(help="The device used for model evaluation; default: those that train.")
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fashion_mnist, cifar10, cifar100, an image folder or zip, an .npz, tfds:NAME"
        ),
    ] = "cifar10",
    image_size: Annotated[int | None, typer.Option(help="Resize the images to this height and width.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images for training and validation.")] = None,
    mixed_precision_: Annotated[
        bool, typer.Option("--mixed-precision", help="Compute in half precision; penalty and scores stay float32.")
    ] = False,
    optimizer: Annotated[str, typer.Option(metavar=_among(OPTIMIZERS), help="Optimizer.")] = "adam",
    momentum: Annotated[float | None, typer.Option(help="For sgd (default 0.9) and rmsprop.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="The optimizer's decoupled weight decay.")] = None,
    schedule: Annotated[
        str, typer.Option(metavar=_among(SCHEDULES), help="How the learning rate falls over the whole training.")
    ] = "constant",
    regularizer_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Further argument of the regularizer; may be repeated."),
    ] = None,
    peak_flops: Annotated[float | None, typer.Option(help="FLOP/s of the hardware Others.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s of the hardware Others.")] = None,
) -> None:
    """Run MorphNet on the image classification Model Zoo.

    Trains a network under the penalty, writes its structure once an epoch, and rebuilds it in the end.
    """
    options = {name.rstrip("_"): str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    # Everything that can be wrong without the data is found here.
    for option, value, low, high in (
        ("--num-epochs", num_epochs, 1, 10**9),
        ("--num-classes", num_classes, 1, 2**16),
        ("--batch-size", batch_size, 1, 10**9),
        ("--morphnet-regularizer-threshold", morphnet_regularizer_threshold, 0, 1),
        ("--morphnet-regularization-multiplier", morphnet_regularization_multiplier, 0, float("inf")),
        ("--num-cuda-device", num_cuda_device, 0, 10**6),
        ("--random-seed", random_seed, 0, 2**32 - 1),
        ("--image-size", image_size, 1, 2**16),
        ("--limit", limit, 1, 10**9),
    ):
        check_number(option, value, low, high)
    check_number("--learning-rate", learning_rate, 0, above=True)
    base_model = base_model_of(base_model_name)
    regularizer = regularizer_of(
        morphnet_regularizer_algorithm, morphnet_regularizer_threshold, regularizer_option or ()
    )
    cost = cost_of(morphnet_target_cost, morphnet_hardware, peak_flops, bandwidth)
    make_optimizer = optimizer_of(optimizer, momentum, weight_decay)
    scheduled = one_of("--schedule", schedule, SCHEDULES)
    devices = choose(num_cuda_device, first=main_train_device)
    if main_eval_device is not None:
        existing(main_eval_device)
    on_cpu = "cpu:0" in devices
    batch_size = batch_size or (BATCH_ON_CPU if on_cpu else BATCH_PER_GPU) * devices.count
    devices.check_batch_size(batch_size)
    check_folder("--log-dir", log_dir)
    if isinstance(regularizer, Gamma) and base_model_name in zoo.WITHOUT_GAMMA:
        size = zoo.minimum_size(base_model_name)
        regularizer.sources(trace(zoo.build(base_model_name, input_shape=(size, size, 3))))  # raises, and says where

    print(f"training {devices}" + (": no GPU is visible" if on_cpu and num_cuda_device is None else ""))
    if main_train_device is not None and existing(main_train_device) not in devices:
        print(f"the parameters are where training is: --main-train-device {main_train_device} is not used")
    keras.utils.set_random_seed(random_seed)
    images = _large_enough(load(dataset, image_size=image_size, limit=limit, seed=random_seed), base_model)
    if num_classes is not None and num_classes < images.num_classes:
        raise KerasMorphError(
            f"--num-classes expects at least the {images.num_classes} classes of {images.name}. Received: {num_classes}."
        )
    whole = whole_batches(len(images.x_train), batch_size, devices.count)
    if whole < len(images.x_train):
        print(f"the last batch is dropped: {devices.count} devices cannot share {len(images.x_train) - whole} images")
    if len(images.x_val) % devices.count:
        print(f"validation is padded with images of weight 0 to a multiple of {devices.count} devices")
    with mixed_precision(mixed_precision_):
        model = MorphNetModel(
            base_model,
            num_classes or images.num_classes,
            scheduled(learning_rate, num_epochs * -(-whole // batch_size)),
            batch_size,
            num_cuda_device,
            main_train_device,
            main_eval_device,
            regularizer,
            cost,
            log_dir=log_dir,
            input_shape=images.image_shape,
            optimizer=make_optimizer,
        )
        initial_cost = model.get_model_cost()
        strength = morphnet_regularization_multiplier / initial_cost
        model.set_morphnet_regularization_strength(strength)
        write_json(
            model.folder / "config.json",
            {
                "command": "train",
                "options": options | {"batch_size": batch_size, "num_classes": model.num_classes},
                "devices": str(devices),
                "initial_cost": initial_cost,
                "strength": strength,
                **describe_environment(),
            },
        )
        print(f"{images}\ninitial cost {initial_cost:.6g} {cost.unit}, strength {strength:.4g}")
        print(f"run folder: {model.folder}")
        _fit(model, images, whole, num_epochs)
        structure = model.learner.structure()
        structure.save(model.folder / "structure.json")
        save_model(model.learner.seed, model.folder / "seed.keras")
        save_model(rebuild(model.learner, structure), model.folder / "small.keras")
    share = model.get_model_cost() / initial_cost
    print(f"cost {share:.1%} of the seed's; structure.json and small.keras are in {model.folder}")


def _large_enough(images: Dataset, base_model: Any) -> Dataset:
    """Images of at least the smallest size that the network takes."""
    minimum = zoo.minimum_size(base_model)
    height, width, _ = images.image_shape
    size = (max(height, minimum), max(width, minimum))
    if size != (height, width):
        print(f"{base_model} takes images of at least {minimum}x{minimum}: enlarged from {height}x{width}")
        images = images.resized(size)
    return images


def _fit(model: MorphNetModel, images: Dataset, whole: int, epochs: int) -> None:
    """Train on the first `whole` images, validate, and log."""
    held_out = padded(images.x_val, images.y_val, model.devices.count) if len(images.x_val) else None
    elsewhere = held_out is not None and model.evaluates_elsewhere

    def validate(epoch: int, logs: dict[str, float]) -> None:
        logs["val_accuracy"], _ = model.validate(images.x_val, images.y_val)

    with model.devices.scope():
        model.learner.fit(
            images.x_train[:whole],
            images.y_train[:whole],
            batch_size=model.batch_size,
            epochs=epochs,
            validation_data=None if elsewhere else held_out,
            verbose=0,
            callbacks=[
                *([keras.callbacks.LambdaCallback(on_epoch_end=validate)] if elsewhere else []),
                EpochLog(model.folder / "history.csv", line=print),
                StructureLog(model.folder / "learned_structure"),
                TensorBoardLog(model.folder),
            ],
        )
