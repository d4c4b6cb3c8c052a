"""Run by test_devices.py in a process of its own: two virtual CPU devices have to be set up before anything else.

`python two_devices.py NETWORK LOG_DIR` trains a network on one device and on two, and prints how much they differ;
`python two_devices.py train OPTIONS` is the command line.
"""

import json
import sys

import keras
import numpy as np
from keras import layers

if __name__ == "__main__" and keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras_morph as km


def network(*, normalize, **options):
    def base_model(input_shape):
        image = x = keras.Input(input_shape)
        for number, width in enumerate((6, 5)):
            x = layers.Conv2D(width, 3, padding="same", name=f"conv{number}")(x)
            if normalize:
                x = layers.BatchNormalization(name=f"bn{number}", **options)(x)
            x = layers.ReLU(name=f"relu{number}")(x)
        return keras.Model(image, x)

    return base_model


def make(base_model, count, log_dir, **options):
    keras.utils.set_random_seed(0)
    model = km.zoo.MorphNetModel(
        base_model,
        3,
        learning_rate=0.05,
        batch_size=8,
        num_gpus=count,
        morphnet_regularization_strength=1e-5,
        log_dir=log_dir,
        input_shape=(6, 6, 2),
        optimizer=keras.optimizers.SGD,
        **options,
    )
    random = np.random.default_rng(0)
    return model, random.random((24, 6, 6, 2), np.float32), random.integers(0, 3, 24)


def trained(base_model, count, log_dir):
    model, x, y = make(base_model, count, log_dir)
    penalties = []
    for start in (0, 8, 16):
        model.train(x[start : start + 8], y[start : start + 8])
        penalties.append(float(model.learner.penalty_tracker.result()))
    with model.devices.scope():
        fitted = model.learner.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    accuracy, cost = model.validate(x[:13], y[:13])
    return {
        "replicas": model.devices.count,
        "weights": model.learner.get_weights(),
        "penalties": penalties + fitted["penalty"],
        "loss": fitted["loss"],
        "accuracy": accuracy,
        "cost": cost,
        "probabilities": model.test(x[:13]),
        "widths": model.learner.structure().widths,
    }


tiny = network(normalize=True)
"""For `--base-model-name two_devices:tiny`."""

NETWORKS = {
    "plain": network(normalize=False),
    "normalized": network(normalize=True),
    "synchronized": network(normalize=True, synchronized=True),
}


def compare(base_model, log_dir):
    one, two = (trained(base_model, count, log_dir) for count in (1, 2))
    return {
        "replicas": [one["replicas"], two["replicas"]],
        "weights": max(float(np.abs(a - b).max()) for a, b in zip(one["weights"], two["weights"], strict=True)),
        "probabilities": float(np.abs(one["probabilities"] - two["probabilities"]).max()),
        **{key: [one[key], two[key]] for key in ("penalties", "loss", "accuracy", "cost", "widths")},
    }


def elsewhere(log_dir):
    """Train on the first device or on both, evaluate on the second: with the weights and gates of the moment."""
    result = []
    for count, algorithm in ((1, "GroupLasso"), (2, "GroupLasso"), (1, "LogisticSigmoid")):
        options = {"morphnet_regularizer_algorithm": algorithm}
        here, x, y = make(NETWORKS["normalized"], count, log_dir, **options)
        there, _, _ = make(NETWORKS["normalized"], count, log_dir, main_eval_device="/cpu:1", **options)
        for model in (here, there):
            model.train(x[:8], y[:8])
        result.append([[model.validate(x[:13], y[:13]), model.test(x[:13]).tolist()] for model in (here, there)])
        if count == 1:
            assert {device.id for weight in there._copy.weights for device in weight.value.devices()} == {1}
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "elsewhere":
        elsewhere(sys.argv[2])
    elif sys.argv[1] == "train":
        from keras_morph.cli import main

        main(sys.argv[1:])
    else:
        print(json.dumps({name: compare(NETWORKS[name], sys.argv[2]) for name in sys.argv[3:]}))
