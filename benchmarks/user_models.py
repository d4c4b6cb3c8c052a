"""Models of users' kinds, written by somebody who had not read our rules: is what we rebuild exact, and what share is free?

    KERAS_BACKEND=torch python benchmarks/user_models.py [attention_unet two_tower ...]

Each model of tests/user_models.py gets random weights and is rebuilt for eight structures: all channels, random structures
of several severities, and those that meet 50 % and 20 % of the FLOPs. Each is compared with the masked seed (law 1) and its
costs with those foretold (law 2), saved, and opened by a process that never imports keras_morph but knows the user's own
classes. Appends a row per model to benchmarks/results/user_models.csv, and writes docs/user-models.md.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "laws")]

import models
import structures
import user_models
from exactness import largest_difference
from rows import append, rows_at
from test_costs_agree import assert_costs_agree

import keras_morph as km
from keras_morph.runs import describe_environment, save_model, write_text

RESULTS, TABLE = ROOT / "benchmarks" / "results" / "user_models.csv", ROOT / "docs" / "user-models.md"
TOLERANCE = 1e-5  # of the largest output
KINDS = ("half", "tenth", "dead_layers", "dead_branches", "one_layer_dead")
BUDGETS = ("50%", "20%")
LOADER = """
import sys
import keras, numpy as np
sys.path.insert(0, sys.argv[1])
import user_models
for line in sys.stdin:
    path, name = line.split()
    try:
        model = keras.models.load_model(path + ".keras")
        model_inputs = user_models.example(model, 3, 0)
        outputs = [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(model_inputs, training=False))]
        np.savez(path + ".npz", *outputs)
        keras.backend.clear_session()
        assert "keras_morph" not in sys.modules
        print("predicted", flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " ")[:300], flush=True)
"""

COLUMNS = (
    *("date", "model", "result", "structures", "exact_to", "reloaded_to", "varies", "cost", "at_50", "at_20"),
    *("channels", "free", "reasons"),
)


class Elsewhere:
    """A process that opens models and predicts, and has never heard of keras_morph."""

    def __init__(self, folder):
        self.path = str(Path(folder) / "small")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER, str(ROOT / "tests")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def predict(self, model):
        save_model(model, Path(f"{self.path}.keras"))
        print(self.path, model.name, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if answer != "predicted\n":
            raise RuntimeError(f"the saved model: {answer}")
        with np.load(f"{self.path}.npz") as arrays:
            return list(arrays.values())


def of_floats(arrays):
    """Outputs as float64; whole numbers and booleans (an argmax, an alarm) may change at the smallest difference."""
    return [
        np.asarray(x, np.float64)
        for x in arrays
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))
    ]


def conformance(name, elsewhere):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    model = models.randomize(getattr(user_models, name)(), seed=1)
    inputs = user_models.example(model, 3, 0)
    graph = km.trace(model)
    tried = [structures.whole(model)] + [structures.draw(graph, kind, 1) for kind in KINDS]
    sized = all(None not in tensor.shape[1:] for tensor in model.inputs)
    cost = km.FLOPs() if sized and km.FLOPs()(graph) else km.ModelSize()  # FLOPs depend on sizes
    shares = []
    for budget in BUDGETS:
        try:
            structure = km.fit_budget(model, f"{budget} {cost.name}")
        except km.BudgetError as error:
            least = re.search(r"reachable minimum of \w+ is ([\d,.]+)", str(error))
            shares.append(f"least {float(least[1].replace(',', '')) / cost(graph):.0%}")
            continue
        share = cost(graph, structure) / cost(graph)
        assert share <= float(budget[:-1]) / 100, (budget, share)
        shares.append(f"{share:.1%}")
        tried.append(structure)
    differences, reloaded, varying = [], [], []
    for structure in tried:
        small = km.rebuild(model, structure)
        expected = of_floats(models.outputs(km.masked(model, structure), inputs))
        received = of_floats(models.outputs(small, inputs))
        differences.append(largest_difference(received, expected))
        if sized:
            assert_costs_agree(graph, structure)
        assert km.ModelSize()(graph, structure) == small.count_params()
        varying.append(max(np.ptp(x, axis=0).max() / max(np.abs(x).max(), 1e-30) for x in expected))
        reloaded.append(largest_difference(of_floats(elsewhere.predict(small)), received))
    free = ~graph.pinned_mask[graph.group_of]
    made = np.zeros(graph.num_channels, bool)
    for layer in graph.layers:
        if layer.made is not None and layer.kind != "InputLayer":
            made[layer.made] = True
    reasons = Counter(graph.pinned[g] for g in graph.group_of[made & ~free].tolist())
    return {
        "result": "exact" if np.max(differences) <= TOLERANCE and np.max(reloaded) <= TOLERANCE else "FAILS",
        "structures": len(tried),
        "exact_to": f"{np.max(differences):.1e}",
        "reloaded_to": f"{np.max(reloaded):.1e}",
        "varies": f"{np.max(varying):.0e}",
        "cost": cost.name,
        "at_50": shares[0],
        "at_20": shares[1],
        "channels": int(made.sum()),
        "free": f"{(free & made).sum() / made.sum():.0%}",
        "reasons": "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    names = arguments.names or [model.__name__ for model in user_models.MODELS]
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Elsewhere(folder)
        for name in names:
            try:
                row = conformance(name, elsewhere)
            except Exception as error:
                if arguments.dry:
                    traceback.print_exc()
                row = {"result": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
                elsewhere = Elsewhere(folder)
            row = dict.fromkeys(COLUMNS, "") | {"date": f"{datetime.date.today()}", "model": name, **row}
            print(row, flush=True)
            if not arguments.dry:
                row |= {key: environment[key] for key in ("backend", "backend_version", "keras", "cpu")}
                append(RESULTS, row)
    if not arguments.dry:
        write_table()


def write_table():
    """The newest row of each model and backend: one table, with the reasons of one backend."""
    rows = rows_at(RESULTS)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    newest = {(row["model"], row["backend"]): row for row in rows}
    lines = [
        "# Models of users' kinds",
        "",
        "Forty small models, written by somebody who had not read this project's rules (`tests/user_models.py`), each",
        "rebuilt for eight structures, of which two meet 50 % and 20 % of the FLOPs (of the parameters where a size is",
        "unknown). *Exact*: the largest difference from the masked seed in any float output, relative to its largest number.",
        "*Free*: the share of channels that may be removed. `least`: what is in reach, where a budget is not. Each rebuilt",
        "model was saved, and opened by a process without keras_morph, with the same outputs. Written by",
        "`python benchmarks/user_models.py`.",
        "",
        f"| model | {' | '.join(f'exact, {b}' for b in backends)} | at 50 % | at 20 % | channels | free | why the others stay |",
        f"|---|{'---:|' * len(backends)}---:|---:|---:|---:|---|",
    ]
    for model in (each.__name__ for each in user_models.MODELS):
        known = {b: newest[model, b] for b in backends if (model, b) in newest}
        if not known:
            continue
        row = next(iter(known.values()))
        exact = [
            known[b]["exact_to"] if b in known and known[b]["result"] == "exact" else known.get(b, {}).get("result", "")
            for b in backends
        ]
        reasons = row["reasons"].replace("|", "/")
        cells = [model, *exact, row["at_50"], row["at_20"], row["channels"], row["free"], reasons[:300]]
        lines.append(f"| {' | '.join(cells)} |")
    write_text(TABLE, "\n".join([*lines, ""]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
