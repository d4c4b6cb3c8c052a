"""What a sweep starts in tests instead of `keras-morph shrink`: a run that trains nothing, named after how it goes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from keras_morph.runs import write_json, write_text
from keras_morph.status import running


def main():
    arguments = sys.argv[1:]
    given = dict(zip(arguments[2::2], arguments[3::2], strict=True)) if arguments[1] != "--resume" else {}
    if given:
        folder = Path(given["--log-dir"]) / given["--name"]
        folder.mkdir()
        options = {name[2:].replace("-", "_"): value for name, value in given.items()} | {"model": arguments[1]}
    else:
        folder = Path(arguments[2])
        options = json.loads((folder / "config.json").read_text())["options"]
    with (folder.parent / "calls.txt").open("a") as calls:
        calls.write(f"{folder.name} {'begins' if given else 'goes on'}\n")
    with running(folder):
        write_json(folder / "config.json", {"command": "shrink", "options": options})
        behave(options["model"], bool(given), folder)
        if options["model"] == "learning":
            learn(folder, float(options["learning_rate"]), int(options["epochs"]))
        budget, seed = options.get("budget", "50%"), int(options.get("random_seed", 0))
        share = float(budget.rstrip("%")) / 100 - 0.01
        accuracy = share + float(options.get("learning_rate", 0)) - seed / 500
        figures = {
            "cost_share": share,
            "FLOPs": 1e6 * share,
            "parameters": 10,
            "seconds": 1.0,
            "budget": budget,
            "cost": "FLOPs",
        }
        write_json(folder / "results.json", figures | {"val_accuracy": accuracy, "test_accuracy": accuracy})
        (folder / "small.keras").write_text("")


def behave(model, begins, folder):
    if model == "killed" and begins:
        os.kill(os.getpid(), signal.SIGKILL)
    if model == "failing" and (folder.parent / "failing").exists() and folder.name.endswith("seed=1"):
        sys.exit("keras-morph: it cannot be done")
    while model == "slow" and (folder.parent / "slow").exists() and folder.name.endswith(("seed=1", "seed=2")):
        time.sleep(0.02)


def learn(folder, rate, epochs):
    """Epochs that write their accuracy, the better the higher the rate; time for a look at each."""
    rows = ["phase,val_accuracy", "seed,0.9"]
    for epoch in range(epochs):
        write_text(folder / "history.csv", "\n".join([*rows, f"learn,{rate * (epoch + 1)}"]) + "\n")
        rows.append(f"learn,{rate * (epoch + 1)}")
        time.sleep(0.1)
