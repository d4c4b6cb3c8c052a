"""`keras-morph train`: the Model Zoo's command. Train a network of the zoo under the penalty and log its structure."""

from pathlib import Path
from typing import Annotated

import keras
import typer

from keras_morph import zoo
from keras_morph.callbacks import EpochLog, StructureLog
from keras_morph.cli.choices import cost_of, optimizer_of, regularizer_of
from keras_morph.datasets import load
from keras_morph.errors import KerasMorphError
from keras_morph.learning import StructureLearner
from keras_morph.rebuilding import rebuild
from keras_morph.runs import describe_environment, new_run_folder, save_model, write_json


def train(
    base_model_name: Annotated[str, typer.Option(help="a name that `keras-morph zoo` lists")] = "ResNet50",
    num_epochs: Annotated[int, typer.Option(help="epochs of training")] = 10,
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 128,
    learning_rate: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    morphnet_regularizer_algorithm: Annotated[str, typer.Option(help="GroupLasso or Gamma")] = "GroupLasso",
    morphnet_target_cost: Annotated[str, typer.Option(help="FLOPs, Latency, ModelSize or Activations")] = "FLOPs",
    morphnet_hardware: Annotated[str, typer.Option(help="for Latency: V100, P100, Others, ...")] = "V100",
    morphnet_regularizer_threshold: Annotated[float, typer.Option(help="channels above it are alive")] = 1e-2,
    morphnet_regularization_multiplier: Annotated[float, typer.Option(help="strength x cost of the seed")] = 1000.0,
    peak_flops: Annotated[float | None, typer.Option(help="for Others: FLOP/s")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="for Others: bytes/s")] = None,
    dataset: Annotated[
        str, typer.Option(help="digits, cifar10, ..., an image folder or zip, an .npz, tfds:NAME")
    ] = "cifar10",
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw or rmsprop")] = "adam",
    image_size: Annotated[int | None, typer.Option(help="resize the images to this height and width")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many training images")] = None,
    log_dir: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs"),
    random_seed: Annotated[int, typer.Option(help="for weights, data order and everything else")] = 0,
) -> None:
    """Train a network under the penalty; write the learned structure once an epoch, and rebuild it in the end."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    cost = cost_of(morphnet_target_cost, morphnet_hardware, peak_flops, bandwidth)
    regularizer = regularizer_of(morphnet_regularizer_algorithm, morphnet_regularizer_threshold)
    make_optimizer = optimizer_of(optimizer)
    minimum = zoo.minimum_size(base_model_name)
    for option, value, low in (("--num-epochs", num_epochs, 1), ("--batch-size", batch_size, 1)):
        if value < low:
            raise KerasMorphError(f"{option} expects at least {low}. Received: {value}.")
    if morphnet_regularization_multiplier < 0:
        raise KerasMorphError(
            "--morphnet-regularization-multiplier expects at least 0 (0 turns the penalty off). "
            f"Received: {morphnet_regularization_multiplier}."
        )
    keras.utils.set_random_seed(random_seed)
    images = load(dataset, image_size=image_size, limit=limit, seed=random_seed)
    if min(images.image_shape[:2]) < minimum:
        print(
            f"{base_model_name} needs images of {minimum} x {minimum}: they are enlarged from {images.image_shape[:2]}."
        )
        images = load(dataset, image_size=minimum, limit=limit, seed=random_seed)
    seed = zoo.build(base_model_name, input_shape=images.image_shape, classes=images.num_classes)
    learner = StructureLearner(seed, regularizer=regularizer, cost=cost)
    learner.strength = morphnet_regularization_multiplier / cost(seed)
    folder = new_run_folder(log_dir)
    write_json(folder / "config.json", {"command": "train", "options": options, **describe_environment()})
    print(f"{images}\nrun folder: {folder}")
    learner.compile(make_optimizer(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    learner.fit(
        images.x_train,
        images.y_train,
        batch_size=batch_size,
        epochs=num_epochs,
        validation_data=(images.x_val, images.y_val) if len(images.x_val) else None,
        verbose=0,
        callbacks=[EpochLog(folder / "history.csv", line=print), StructureLog(folder / "learned_structure")],
    )
    structure = learner.structure()
    structure.save(folder / "structure.json")
    save_model(seed, folder / "seed.keras")
    save_model(rebuild(learner, structure), folder / "small.keras")
    print(
        f"cost {cost(seed, structure) / cost(seed):.1%} of the seed's; structure.json and small.keras are in {folder}"
    )
