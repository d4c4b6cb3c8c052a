"""What `compare` and the end of a sweep show: figures of finished runs side by side. No Keras."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from keras_morph.cli.options import config_of
from keras_morph.errors import KerasMorphError
from keras_morph.events import Events
from keras_morph.runs import going_on, write_text

__all__ = [
    "Row",
    "differing",
    "front",
    "goodness",
    "grouped",
    "log_hyperparameters",
    "rows_of",
    "save_picture",
    "table",
    "write_csv",
]

PLACES = (
    "budget",
    "budgets",
    "cost",
    "log_dir",
    "name",
    "resume",
)  # options that say where, or that the figures repeat
FIGURES = ("cost_share", "FLOPs", "parameters", "val_accuracy", "test_accuracy", "seconds")


@dataclass(frozen=True)
class Row:
    """A finished run.

    Attributes:
        name: of its folder, below the one that was asked for.
        folder: where it is.
        options: those of its command.
        figures: what `results.json` holds.
    """

    name: str
    folder: Path
    options: dict[str, Any]
    figures: dict[str, Any]


def rows_of(folders: Sequence[Path]) -> list[Row]:
    """All finished runs in some folders: of runs, of families or of sweeps.

    Raises:
        KerasMorphError: if there is none in one of them.
    """
    rows: list[Row] = []
    for folder in folders:
        before = len(rows)
        found = sorted(folder.rglob("results.json"))
        if not found:
            raise KerasMorphError(
                f"compare expects folders of finished runs of keras-morph shrink or sweep. Received: {folder}, where no "
                "results.json is."
            )
        for path in found:
            place = path.parent
            # The options of a family are those of the folder above.
            config = config_of(place) or config_of(place.parent)
            if config.get("command", "shrink") not in ("shrink", "sweep"):  # such as finetune, which has no budget
                continue
            options = config.get("options", {})
            name = str(place.relative_to(folder)) if place != folder else folder.name
            rows.append(Row(name, place, options, _read(path)))
        if len(rows) == before:
            raise KerasMorphError(
                f"compare expects folders of finished runs of keras-morph shrink or sweep. Received: {folder}, where "
                f"{found[0]} is another command's."
            )
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: figures[name] for name in FIGURES}
        if not all(value is None or isinstance(value, int | float) for value in numbers.values()):
            raise ValueError("a figure is no number")
        if empty := [
            name for name, value in numbers.items() if value is None and name not in ("val_accuracy", "seconds")
        ]:
            raise ValueError(f"{', '.join(empty)} is empty")
        return numbers | {name: str(figures[name]) for name in ("budget", "cost")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KerasMorphError(
            f"{path} cannot be read. Expected: what keras-morph shrink writes. Received: {type(error).__name__} {error}."
        ) from error


def goodness(row: Row) -> float:
    """What runs are chosen by: the accuracy on validation images, or on test images where there are none."""
    value = row.figures["val_accuracy"]
    return float(row.figures["test_accuracy"] if value is None else value)


def differing(rows: Sequence[Row]) -> list[str]:
    """Options that are not the same in all runs, apart from budget and cost."""
    names = dict.fromkeys(name for row in rows for name in row.options if name not in PLACES)
    return [name for name in names if len({repr(row.options.get(name)) for row in rows}) > 1]


def _key(row: Row, options: Sequence[str]) -> tuple[str, ...]:
    return row.figures["cost"], row.figures["budget"], *(str(row.options.get(name)) for name in options)


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ in nothing but the random seed, together; by cost."""
    options = [name for name in differing(rows) if name != "random_seed"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row, options), []).append(row)
    return sorted(groups.values(), key=_place)


def _place(group: Sequence[Row]) -> tuple[str, float, float]:
    """Where a group is on the picture: the lower the better."""
    return group[0].figures["cost"], _mean(group, "cost_share"), -_goodness(group)


def _goodness(group: Sequence[Row]) -> float:
    return float(np.mean([goodness(row) for row in group]))


def front(groups: Sequence[list[Row]]) -> list[list[Row]]:
    """Groups that no other of the same cost beats: by no higher cost, and no lower accuracy."""
    found: list[list[Row]] = []
    for group in sorted(groups, key=_place):
        if (
            not found
            or found[-1][0].figures["cost"] != group[0].figures["cost"]
            or _goodness(group) > _goodness(found[-1])
        ):
            found.append(group)
    return found


def _mean(group: Sequence[Row], figure: str) -> float:
    return float(np.mean([row.figures[figure] for row in group]))


def _spread(group: Sequence[Row], figure: str, scale: float, digits: int) -> str:
    """Mean and standard deviation; nothing where a run lacks the figure."""
    values = [row.figures[figure] for row in group]
    if None in values:
        return ""
    scaled = scale * np.array(values, float)
    spread = f" ± {scaled.std(ddof=1):,.{digits}f}" if len(values) > 1 else ""
    return f"{scaled.mean():,.{digits}f}{spread}"


def table(groups: Sequence[list[Row]], title: str = "") -> Table:
    """A line for each group; those on the front are marked."""
    rows = [row for group in groups for row in group]
    several = any(len(group) > 1 for group in groups)
    options = [name for name in differing(rows) if not (several and name == "random_seed")]
    best = front(groups)
    made = Table(title=title or None, title_justify="left")
    longest = max(len(row.name) for row in rows)
    made.add_column("n" if several else "run", overflow="fold", min_width=1 if several else min(longest, 24))
    for column in ("budget", *options):
        made.add_column(column.replace("_", " "), no_wrap=True)
    for column in ("cost, %", "validation, %", "test, %", "parameters", "seconds", "front"):
        made.add_column(column, justify="right", no_wrap=True)
    costs = len({row.figures["cost"] for row in rows}) > 1
    for group in groups:
        one = group[0]
        budget = one.figures["budget"] + (f" {one.figures['cost']}" if costs else "")
        made.add_row(
            str(len(group)) if several else one.name,
            budget,
            *(str(one.options.get(name)) for name in options),
            _spread(group, "cost_share", 100, 1),
            _spread(group, "val_accuracy", 100, 1),
            _spread(group, "test_accuracy", 100, 1),
            f"{_mean(group, 'parameters'):,.0f}",
            _spread(group, "seconds", 1, 0),
            "*" if group in best else "",
        )
    return made


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line for each run: its name, the options that differ, and its figures."""
    options, buffer = differing(rows), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "cost", "budget", *options, *FIGURES])
    for row in rows:
        writer.writerow([row.name, *_key(row, options), *(row.figures[name] for name in FIGURES)])
    write_text(path, buffer.getvalue())


def save_picture(groups: Sequence[list[Row]], path: Path) -> None:
    """Accuracy over cost, with the front as a line, for each cost; bars are standard deviations over random seeds."""
    from matplotlib.figure import Figure

    costs = list(dict.fromkeys(group[0].figures["cost"] for group in groups))
    figure = Figure(figsize=(6 * len(costs), 4), layout="constrained")
    for axis, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        here = [group for group in groups if group[0].figures["cost"] == cost]
        best = front(here)
        for shown, style in ((here, {"fmt": "o", "color": "0.6"}), (best, {"fmt": "o-", "color": "tab:blue"})):
            reached = [[100 * goodness(row) for row in group] for group in shown]
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in reached]
            shares = [100 * _mean(group, "cost_share") for group in shown]
            axis.errorbar(shares, [np.mean(values) for values in reached], spread, capsize=2, **style)
        for group in best:
            _, share, worse = _place(group)
            name = group[0].figures["budget"]
            axis.annotate(name, (100 * share, -100 * worse), xytext=(4, -10), textcoords="offset points", fontsize=8)
        axis.set_xlabel(f"{cost}, % of the seed")
        axis.set_ylabel("accuracy on validation images, %")
    figure.savefig(path, dpi=120)


def log_hyperparameters(rows: Sequence[Row]) -> None:
    """TensorBoard's HParams of each run, in its folder, once."""
    options = differing(rows)
    for row in rows:
        if any(row.folder.glob("events*")):
            continue
        given = {name: row.options.get(name) for name in options}
        values = {name: row.figures[name] for name in ("cost", "budget")}
        values |= {name: value if isinstance(value, int | float) else str(value) for name, value in given.items()}
        events = Events(row.folder)
        events.hyperparameters(values, {name: row.figures[name] for name in FIGURES if row.figures[name] is not None})
        with going_on(row.folder):
            events.close()
