"""What has to be the same on every backend, as plain numbers.

`python backend_values.py` prints them as JSON: test_backends_agree.py runs it once per backend, since the backend of a
process is fixed.
"""

import json

import keras
import models
import numpy as np
from keras import ops

import keras_morph as km

CASES = (
    ("residual_projection", "GroupLasso"),
    ("residual_projection", "Gamma"),
    ("inverted_residual", "Gamma"),
    ("separable", "GroupLasso with l1"),
)
# Thresholds in the middle of the random weights' scores, so that some channels are dead.
REGULARIZERS = {
    "GroupLasso": km.GroupLasso(threshold=0.23),
    "GroupLasso with l1": km.GroupLasso(threshold=0.45, l1_fraction=0.5),
    "Gamma": km.Gamma(threshold=1.1),
}
COSTS = {
    "FLOPs": km.FLOPs(),
    "ModelSize": km.ModelSize(),
    "Activations": km.Activations(),
    "Latency": km.Latency(km.Hardware("balanced", 20e9, 4e9)),
}


class Revealing(keras.optimizers.Optimizer):
    """Puts each gradient in the place of its variable."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, gradient)


def gradients(learner):
    """Gradient of penalty times strength by each weight that is scored; the weights are lost."""
    learner.compile(
        Revealing(learning_rate=1.0),
        loss=lambda _, outputs: 0.0 * ops.mean(outputs, axis=-1),
        run_eagerly=keras.backend.backend() == "tensorflow",
    )
    learner.train_on_batch(models.examples(learner.seed, count=1), np.zeros((1, *learner.seed.output_shape[1:])))
    return {
        f"{source.layer.name}.{source.weight.name}": ops.convert_to_numpy(source.variable)
        for source in learner.regularizer.sources(learner.graph)
    }


def fresh(name):
    return models.randomize(models.BUILDERS[name](), seed=1)


def with_gammas(value):
    """Two blocks whose trunk passes two BatchNormalizations: each of its groups has two gammas, all of one value."""
    model = fresh("residual_projection")
    for name in ("bn_a", "bn_b"):
        model.get_layer(name).gamma.assign(np.full(6, value))
    return model


def values():
    """(network, regularizer, cost) -> {what: numbers}."""
    found = {}
    for name, regularizer in CASES:
        for cost in COSTS if name == "residual_projection" else ("Latency",):
            found[f"{name}, {regularizer}, {cost}"] = of_learner(name, regularizer, cost)
        learner = km.StructureLearner(fresh(name), regularizer=REGULARIZERS[regularizer], strength=1.0)
        found[f"{name}, {regularizer}, gradients"] = gradients(learner)
    for value in (1.0, 0.0):
        learner = km.StructureLearner(with_gammas(value), regularizer=REGULARIZERS["Gamma"], strength=1.0)
        found[f"gammas of {value}, gradients"] = gradients(learner)
    return found


def of_learner(name, regularizer, cost):
    learner = km.StructureLearner(models.build(name), regularizer=REGULARIZERS[regularizer], cost=COSTS[cost])
    graph, table = learner.graph, COSTS[cost].monomials(learner.graph)
    counts = graph.counts((learner.scores() > learner.regularizer.threshold) | graph.pinned_mask)
    penalty, alive_cost = learner._penalty()
    structures = {"by threshold": learner.structure(), "by budget": km.fit_budget(learner, "90%")}
    return {
        "cost": COSTS[cost](learner.seed),
        "scores": learner.scores(),
        "scores in the graph": ops.convert_to_numpy(learner._penalty.scores()),
        "prices": np.concatenate(table.prices(counts, len(graph.calls) + len(graph.layers))),
        "penalty": float(ops.convert_to_numpy(penalty)),
        "cost in the graph": float(ops.convert_to_numpy(alive_cost)),
        **{
            f"structure {how}": np.concatenate(
                [np.isin(np.arange(structure.seed_widths[layer]), alive) for layer, alive in structure.alive.items()]
            )
            for how, structure in structures.items()
        },
    }


def plain(values):
    """The same as lists and numbers."""
    return json.loads(json.dumps(values, default=lambda array: array.tolist()))


if __name__ == "__main__":
    print(json.dumps({"backend": keras.backend.backend(), "values": plain(values())}))
