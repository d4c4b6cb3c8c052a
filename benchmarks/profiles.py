"""What bounds the speed of a smaller network: the time of its nodes, by kind, as the runtimes' own profilers give it.

    python benchmarks/profiles.py MobileNetV2 EfficientNetB0 --folder FOLDER [--share 50] [--size 224] [--round-to auto]

FOLDER holds the files that benchmarks/speed.py wrote. One thread, batch 1; seed and small network in turn, the median over
passes of each kind's sum. Appends rows to benchmarks/results/profiles.csv, and writes the table of docs/latency.md.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from rows import append, rows_at, write_section

from keras_morph.machine import cpu_name

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "profiles.csv", ROOT / "docs" / "latency.md"
PASSES, ROUNDS = 20, 5
LEAST = 0.01  # of the seed's time: kinds that take less are one line


def in_onnxruntime(path):
    """Microseconds by kind of node, one Counter per pass."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        x = np.random.default_rng(0).random([size if isinstance(size, int) else 1 for size in entry.shape], np.float32)
        for _ in range(PASSES):
            session.run(None, {entry.name: x})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    per_pass = len(nodes) // PASSES
    passes = [nodes[number * per_pass : (number + 1) * per_pass] for number in range(1, PASSES)]
    return [_summed((_kind(node["args"]), node["dur"]) for node in each) for each in passes]


def _kind(node):
    """Convolutions apart by their kernels."""
    name = node["op_name"]
    if name not in ("Conv", "FusedConv"):
        return name
    (kernel,) = node["input_type_shape"][1].values()
    if kernel[1] == 1 and kernel[0] > 1:
        return "depthwise convolution"
    return f"{kernel[2]}x{kernel[3]} convolution"


def in_openvino(path):
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"PERF_COUNT": "YES", "INFERENCE_NUM_THREADS": 1})
    shape = [size.get_length() if size.is_static else 1 for size in model.input(0).partial_shape]
    x = np.random.default_rng(0).random(shape, np.float32)
    request = model.create_infer_request()
    found = []
    for _ in range(PASSES):
        request.infer([x])
        infos = request.get_profiling_info()
        found.append(_summed((info.node_type, info.real_time.total_seconds() * 1e6) for info in infos))
    return found[1:]


def _summed(pairs):
    total = Counter()
    for kind, microseconds in pairs:
        total[kind] += microseconds
    return total


RUNTIMES = {"onnxruntime": (in_onnxruntime, ".onnx"), "openvino": (in_openvino, ".xml")}


def profiled(runtime, paths):
    """Median microseconds of each kind, for the seed and the small network."""
    profiler, _ = RUNTIMES[runtime]
    passes = [[], []]
    for _ in range(ROUNDS):
        for found, path in zip(passes, paths, strict=True):
            found += profiler(str(path))
    kinds = {kind for each in passes for one in each for kind in one}
    return {kind: [float(np.median([one[kind] for one in each])) for each in passes] for kind in kinds}


def table():
    last = {(row["network"], row["share"], row["runtime"], row["kind"]): row for row in rows_at(RESULTS)}
    groups = {}
    for (network, share, runtime, _), row in last.items():
        groups.setdefault((network, share, runtime), []).append(row)
    lines = [
        "By `benchmarks/profiles.py NETWORKS --folder FOLDER`, one thread: where the time goes at this share of the FLOPs.",
        "",
        "| network | FLOPs | runtime | kind of node | seed, ms | small, ms | times as fast | share of the small one's time |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for (network, share, runtime), rows in groups.items():
        total = [sum(float(row[name]) for row in rows) for name in ("seed_us", "small_us")]
        shown = [row for row in rows if float(row["seed_us"]) >= LEAST * total[0]]
        pairs = [(row["kind"], float(row["seed_us"]), float(row["small_us"])) for row in shown]
        pairs.sort(key=lambda pair: -pair[2])
        rest = [all_of - sum(pair[place] for pair in pairs) for place, all_of in enumerate(total, 1)]
        for kind, seed, small in [*pairs, ("others", *rest), ("**all**", *total)]:
            ratio = f"{seed / small:.2f}" if small > 0 else ""
            lines.append(
                f"| {network} | {share}% | {runtime} | {kind} | {seed / 1e3:.3f} | {small / 1e3:.3f} | {ratio} "
                f"| {small / total[1]:.0%} |"
            )
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--share", type=int, default=50)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--round-to", default="auto")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    for name in options.networks:
        for runtime in options.runtimes:
            suffix = RUNTIMES[runtime][1]
            stem = f"{name}-{options.size}-{options.round_to}"
            found = profiled(runtime, [options.folder / f"{stem}-{share}{suffix}" for share in (100, options.share)])
            for kind, (seed, small) in sorted(found.items()):
                row = {
                    "date": datetime.date.today().isoformat(),
                    "network": name,
                    "size": options.size,
                    "share": options.share,
                    "runtime": runtime,
                    "kind": kind,
                    "seed_us": round(seed, 2),
                    "small_us": round(small, 2),
                    "passes": ROUNDS * (PASSES - 1),
                    "cpu": cpu_name(),
                    "command": "python benchmarks/profiles.py " + shlex.join(a for a in sys.argv[1:] if "/" not in a),
                }
                append(RESULTS, row)
            print(name, runtime, {kind: [round(each) for each in pair] for kind, pair in found.items()}, flush=True)
    write_section(PAGE, "profiles.py", table())


if __name__ == "__main__":
    main()
