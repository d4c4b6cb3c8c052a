"""Every network of keras.applications and KerasHub, before and after halving, as files of ONNX Runtime, LiteRT and OpenVINO.

    python benchmarks/exports.py [--again] [ResNet50 MobileNetV2 ...] [--formats litert openvino]
    python benchmarks/exports.py --hub                                    KerasHub's classifiers, tiny; needs keras-morph[hub]

Each network is built at the smallest images that it takes, gets random weights with which its outputs depend on its inputs
(`prepare` of tests/architectures.py), and is exported as it is, and rebuilt within half of its FLOPs. An export counts if the
file opens in its runtime and agrees with Keras to 1e-4 of the largest output. Appends a row per network, stage and format to
benchmarks/results/exports.csv, and writes the table in docs/export.md. Goes on where it was interrupted: rows of this backend
that are there are left alone, unless --again is given.
"""

import argparse
import datetime
import gc
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_morph as km
from keras_morph.formats import FORMATS
from keras_morph.runs import describe_environment, write_text
from keras_morph.runtimes import RUNTIMES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures
import models
import structures
from rows import append, rows_at

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "exports.csv", ROOT / "docs" / "export.md"
TITLES = {"onnx": "ONNX Runtime", "litert": "LiteRT", "openvino": "OpenVINO"}
STAGES, HUB = ("before", "after"), "KerasHub "
BUDGET = "50%"
BEGIN, END = "<!-- exports.py -->\n", "<!-- end -->\n"


def stages(name):
    """The network before and after, each with the share by which its outputs vary between examples."""
    if name.startswith(HUB):
        import hub_networks

        model = hub_networks.build(name.removeprefix(HUB))
        inputs = models.examples(model, 16)
    else:
        model = architectures.build(name)
        inputs = architectures.images(model)
    architectures.prepare(model, lambda graph, _: structures.whole(graph), inputs)
    yield "before", model, variation(model, inputs)
    try:
        km.fit_budget(model, BUDGET)
    except km.BudgetError as error:
        print(f"{name} cannot be halved: {error}")
        return
    _, structure = architectures.prepare(model, lambda graph, _: km.fit_budget(graph, BUDGET), inputs)
    small = km.rebuild(model, structure)
    yield "after", small, variation(small, inputs)


def variation(model, inputs):
    (outputs,) = models.outputs(model, inputs)
    return float(np.ptp(outputs, axis=0).max() / np.abs(outputs).max())


def measure(name, stage, model, varies, kind, environment):
    start, runtime = time.process_time(), RUNTIMES[FORMATS[kind].runtime]
    row = {"difference": "", "bytes": "", "written_by": "", "cause": ""}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = km.export(model, Path(folder) / f"{name}{FORMATS[kind].suffix}")
            row |= {"difference": f"{found.difference:.1e}", "bytes": found.bytes, "written_by": found.backend}
        except km.KerasMorphError as error:
            row["cause"] = str(error).partition("Received, ")[2].replace(folder, "") or str(error)
    return {
        "date": f"{datetime.date.today()}",
        "network": name,
        "image_size": model.input_shape[1],
        "stage": stage,
        "format": kind,
        "result": "fails" if row["cause"] else "agrees",
        **row,
        "variation": f"{varies:.1e}",
        "own_seconds": f"{time.process_time() - start:.1f}",
        "runtime": f"{runtime.package} {runtime.version}",
        **{key: environment[key] for key in ("backend", "backend_version", "keras", "cpu", "cores")},
        "command": f"KERAS_BACKEND={environment['backend']} python benchmarks/exports.py {name}",
    }


def last_rows():
    """The last row of each network, stage, format and backend."""
    return {(row["network"], row["stage"], row["format"], row["backend"]): row for row in rows_at(RESULTS)}


def table(found):
    """The table of docs/export.md: a line per network, for all backends that were tried."""
    agree = sum(row["result"] == "agrees" for row in found.values())
    devices = sorted({row["cpu"] for row in found.values()})
    runtimes = sorted({row["runtime"] for row in found.values()})
    tried = {key[0] for key in found}
    hub = {name for name in tried if name.startswith(HUB)}
    lines = [
        f"{len(tried - hub)} of the {len(architectures.NAMES)} networks of keras.applications were tried, and {len(hub)} of",
        f"KerasHub's classifiers (tiny configurations, `--hub`): {agree} of {len(found)} exports",
        f"agree with Keras, on {'; '.join(devices)}, in {', '.join(runtimes)}. Each cell: the largest",
        "difference before and after halving, relative to the largest output; `-` where it was not tried.",
        "",
        f"| network | images | from | {' | '.join(TITLES.values())} |",
        "|---|---:|---|---|---|---|",
    ]
    networks = sorted({(network, backend) for network, _, _, backend in found})
    for network, backend in networks:
        rows = {key[1:3]: row for key, row in found.items() if (key[0], key[3]) == (network, backend)}
        cells = [", ".join(cell(rows.get((stage, kind))) for stage in STAGES) for kind in TITLES]
        size = next(iter(rows.values()))["image_size"]
        lines.append(f"| {network} | {size} | {backend} | {' | '.join(cells)} |")
    if kept := sorted(name for name in tried if not any(key[0] == name and key[1] == "after" for key in found)):
        lines += ["", f"Not halved, since they keep all of their channels ([why](keras-hub.md)): {', '.join(kept)}."]
    failures = [(key, row) for key, row in found.items() if row["result"] == "fails"]
    if failures:
        lines += ["", "What failed, and why:", ""]
        lines += [f"- {', '.join(key)}: {row['cause']}" for key, row in failures]
    return "\n".join([*lines, ""])


def cell(row):
    return "-" if row is None else row["difference"] if row["result"] == "agrees" else "**fails**"


def write_page():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write_text(PAGE, before + BEGIN + table(last_rows()) + END + rest.partition(END)[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=architectures.NAMES)
    parser.add_argument("--again", action="store_true", help="measure what has a row too")
    parser.add_argument(
        "--formats", nargs="+", default=list(TITLES), choices=list(TITLES), help="where one needs all memory"
    )
    parser.add_argument("--hub", action="store_true", help="KerasHub's classifiers")
    arguments = parser.parse_args()
    if arguments.hub:
        import hub_networks

        arguments.networks = [f"{HUB}{name}" for name in hub_networks.BACKBONES]
    environment = describe_environment()
    for name in arguments.networks:
        keys = {(name, stage, kind, environment["backend"]) for stage in STAGES for kind in arguments.formats}
        missing = keys if arguments.again else keys - last_rows().keys()
        if not missing:
            continue
        keras.backend.clear_session()
        gc.collect()
        for stage, model, varies in stages(name):
            for kind in TITLES:
                if (name, stage, kind, environment["backend"]) in missing:
                    row = measure(name, stage, model, varies, kind, environment)
                    append(RESULTS, row)
                    print(*(f"{key}={row[key]}" for key in tuple(row)[1:12]), flush=True)
        write_page()


if __name__ == "__main__":
    main()
