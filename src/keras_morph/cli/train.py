"""The options of `keras-morph train`, the Model Zoo's command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import (
    ALGORITHMS,
    BASE_MODELS,
    COSTS,
    DATA,
    DEVICES,
    OPTIMIZERS,
    PIXELS,
    SCHEDULES,
    JobAddresses,
    PixelRange,
    ProcessId,
    Resume,
    Streamed,
    among,
    check_folder,
    check_name,
    check_number,
    process_of,
)
from keras_morph.errors import KerasMorphError

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Run MorphNet on the image classification Model Zoo.

    Trains a network under the penalty, writes its structure once an epoch, and rebuilds it in the end.
    """

    num_epochs: Annotated[int, typer.Option(help="The number of epochs for training.")] = 1000
    num_classes: Annotated[
        int | None, typer.Option(help="The number of classes for image classification; default: the data set's.")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size, on all devices together; default: 256 per GPU, 128 on a CPU.")
    ] = None
    learning_rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4
    base_model_name: Annotated[
        str,
        typer.Option(
            **among(BASE_MODELS),
            help="Select base model for image classification. Also: what else `keras-morph zoo` lists, or "
            "package.module:function of your own.",
        ),
    ] = "ResNet50"
    morphnet_regularizer_algorithm: Annotated[
        str, typer.Option(help="Select MorphNet regularization algorithm.", **among(ALGORITHMS))
    ] = "GroupLasso"
    morphnet_target_cost: Annotated[str, typer.Option(help="Select MorphNet target cost.", **among(COSTS))] = "FLOPs"
    morphnet_hardware: Annotated[str, typer.Option(help="Select MorphNet hardware, for Latency.", **among(DEVICES))] = (
        "V100"
    )
    morphnet_regularizer_threshold: Annotated[
        float, typer.Option(help="Set the threshold [0, 1] for killing neuron layers.")
    ] = 1e-2
    morphnet_regularization_multiplier: Annotated[
        float,
        typer.Option(
            help="Set MorphNet regularization multiplier for regularization strength. The regularization strength for "
            "training equals the regularization multiplier divided by the initial cost of the model. Zero turns "
            "MorphNet regularization off."
        ),
    ] = 1000.0
    log_dir: Annotated[Path, typer.Option(help="Log directory for TensorBoard and optimized model architectures.")] = (
        Path("morphnet_log")
    )
    num_cuda_device: Annotated[
        int | None,
        typer.Option(help="Number of CUDA device to use; default: all that are visible, else the CPU. 0: the CPU."),
    ] = None
    random_seed: Annotated[int, typer.Option(help="Random seed.")] = 0
    main_train_device: Annotated[
        str | None,
        typer.Option(help="The device where the model parameters were located: first of those that train."),
    ] = None
    main_eval_device: Annotated[
        str | None, typer.Option(help="The device used for model evaluation; default: those that train.")
    ] = None
    dataset: Annotated[
        str,
        typer.Option(help=f"{', '.join(DATA)}, an image folder or zip, an .npz, tfds:NAME", **among(DATA, show=False)),
    ] = "cifar10"
    image_size: Annotated[int | None, typer.Option(help="Resize the images to this height and width.")] = None
    pixels: PixelRange = "auto"
    stream: Streamed = None
    limit: Annotated[int | None, typer.Option(help="Use up to this many images for training and validation.")] = None
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", help="Compute in half precision; penalty and scores stay float32.")
    ] = False
    optimizer: Annotated[str, typer.Option(help="Optimizer.", **among(OPTIMIZERS))] = "adam"
    momentum: Annotated[float | None, typer.Option(help="For sgd (default 0.9) and rmsprop.")] = None
    weight_decay: Annotated[float | None, typer.Option(help="The optimizer's decoupled weight decay.")] = None
    schedule: Annotated[
        str, typer.Option(help="How the learning rate falls over the whole training.", **among(SCHEDULES))
    ] = "constant"
    regularizer_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Further argument of the regularizer; may be repeated."),
    ] = None
    peak_flops: Annotated[float | None, typer.Option(help="FLOP/s of the hardware Others.")] = None
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s of the hardware Others.")] = None
    resume: Resume = None
    job_addresses: JobAddresses = None
    process_id: ProcessId = None

    def check(self) -> None:
        """What is wrong whatever the network, the data and the machine are, before Keras is imported."""
        for option, value, low, high in (
            ("--num-epochs", self.num_epochs, 1, 10**9),
            ("--num-classes", self.num_classes, 1, 2**16),
            ("--batch-size", self.batch_size, 1, 10**9),
            ("--morphnet-regularizer-threshold", self.morphnet_regularizer_threshold, 0, 1),
            ("--morphnet-regularization-multiplier", self.morphnet_regularization_multiplier, 0, float("inf")),
            ("--num-cuda-device", self.num_cuda_device, 0, 10**6),
            ("--random-seed", self.random_seed, 0, 2**32 - 1),
            ("--image-size", self.image_size, 1, 2**16),
            ("--limit", self.limit, 1, 10**9),
        ):
            check_number(option, value, low, high)
        check_name("--pixels", self.pixels, ("auto", *PIXELS))
        check_number("--learning-rate", self.learning_rate, 0, above=True)
        if self.resume is None:
            check_folder("--log-dir", self.log_dir)
        process = process_of(self.job_addresses, self.process_id)
        if process.count > 1 and (self.main_eval_device or self.main_train_device or self.num_cuda_device is not None):
            raise KerasMorphError(
                f"--job-addresses expects no choice of devices: each of {process.count} processes takes all that it sees. "
                "Received: --num-cuda-device, --main-train-device or --main-eval-device; hide devices by CUDA_VISIBLE_DEVICES."
            )
