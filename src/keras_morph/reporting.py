"""Before and after, layer by layer: gathered once, then written as text, Markdown, JSON, picture or HTML."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import Activations, Cost, FLOPs, ModelSize
from keras_morph.errors import UnsupportedModelError
from keras_morph.graph.closure import close
from keras_morph.graph.structure import Structure, graph_and_structure
from keras_morph.graph.tracing import graph_of
from keras_morph.runs import write_atomically, write_json, write_text
from keras_morph.showing import html_table

__all__ = ["LayerRow", "Report", "report"]

COSTS: tuple[Cost, ...] = (FLOPs(), ModelSize(), Activations())


@dataclass(frozen=True)
class LayerRow:
    """One layer that makes channels, before and after.

    Attributes:
        layer, kind: name and class.
        width, width_after: channels; 0 where the layer is gone.
        flops, flops_after: FLOPs for one example.
        parameters, parameters_after: number of weights.
    """

    layer: str
    kind: str
    width: int
    width_after: int
    flops: float
    flops_after: float
    parameters: float
    parameters_after: float


@dataclass(frozen=True, repr=False)
class Report:
    """What a smaller model saves.

    Attributes:
        model: the seed's name.
        rows: one per layer that makes channels.
        totals: cost -> (before, after), in the cost's unit.
        history: rows of `history.csv`, if any.
        results: lines of the result table, name -> {column: value}, if any.
        uncounted: layers whose FLOPs cannot be counted, such as `mix (Lambda)`.

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> found = km.report(seed, km.fit_budget(seed, "50%"))
        >>> before, after = found.totals["FLOPs"]
        >>> after <= 0.5 * before
        True
        >>> found.save("report")  # report.md, report.json, report.png and report.html
    """

    model: str
    rows: tuple[LayerRow, ...]
    totals: dict[str, tuple[float, float]]
    history: tuple[dict[str, Any], ...] = ()
    results: dict[str, dict[str, Any]] | None = None
    uncounted: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {after / before:.1%}" for name, (before, after) in self.totals.items() if before)
        return f"<Report of {self.model}: {len(self.rows):,} layers; {shares}>"

    def _repr_html_(self) -> str:
        rows = [[row.layer, row.kind, row.width, row.width_after, row.flops, row.flops_after] for row in self.rows]
        return html_table(repr(self)[1:-1], self.HEADER[:6], rows)

    def _note(self) -> str:
        return (
            f"FLOPs leave out {', '.join(self.uncounted)}: what they compute cannot be counted."
            if self.uncounted
            else ""
        )

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.layer,
                row.kind,
                f"{row.width:,}",
                f"{row.width_after:,}",
                f"{row.flops:,.0f}",
                f"{row.flops_after:,.0f}",
                f"{row.parameters:,.0f}",
                f"{row.parameters_after:,.0f}",
            ]
            for row in self.rows
        ]

    HEADER = ("layer", "kind", "width", "after", "FLOPs", "after", "parameters", "after")

    def text(self, width: int = 120) -> str:
        """Two tables for a terminal."""
        from rich.console import Console
        from rich.table import Table

        layers = Table(title=f"{self.model}, layer by layer", title_justify="left")
        for number, name in enumerate(self.HEADER):
            layers.add_column(name, justify="left" if number < 2 else "right", no_wrap=number == 0)
        for cells in self._cells():
            layers.add_row(*cells)
        totals = Table(title="in total", title_justify="left", caption=self._note() or None, caption_justify="left")
        for name in ("cost", "before", "after", "share"):
            totals.add_column(name, justify="left" if name == "cost" else "right")
        for name, (before, after) in self.totals.items():
            totals.add_row(name, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}" if before else "-")
        console = Console(width=width, file=io.StringIO(), force_terminal=False)
        console.print(layers, totals)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [f"# {self.model}, before and after", ""]
        if self.results:
            columns = list(dict.fromkeys(column for values in self.results.values() for column in values))
            lines += _markdown_table(
                ["", *columns], [[name, *(str(v.get(c, "")) for c in columns)] for name, v in self.results.items()]
            )
        lines += _markdown_table(
            ["cost", "before", "after", "share"],
            [[n, f"{b:,.0f}", f"{a:,.0f}", f"{a / b:.1%}" if b else "-"] for n, (b, a) in self.totals.items()],
        )
        note = [self._note(), ""] if self.uncounted else []
        return "\n".join(lines + note + _markdown_table(list(self.HEADER), self._cells()))

    def json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def picture(self) -> Any:
        """A matplotlib figure: widths per layer before and after, and cost over time."""
        from matplotlib.figure import Figure

        heights = [0.22 * len(self.rows) + 1.2, *([3.2] if self.history else [])]
        figure = Figure(figsize=(9, sum(heights)), layout="constrained")
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_widths(axes[0], self.rows)
        axes[0].set_title(f"{self.model}: channels of each layer, before and after", loc="left")
        if self.history:
            _draw_history(axes[1], self.history)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        return figure

    def html(self) -> str:
        """One page that needs nothing else."""
        buffer = io.BytesIO()
        self.picture().savefig(buffer, format="png", dpi=120)
        image = base64.b64encode(buffer.getvalue()).decode()
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in self._cells()
        )
        totals = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{before:,.0f}</td><td>{after:,.0f}</td>"
            f"<td>{after / before if before else 0:.1%}</td></tr>"
            for name, (before, after) in self.totals.items()
        )
        results = ""
        if self.results:
            columns = list(dict.fromkeys(column for values in self.results.values() for column in values))
            rows = "".join(
                f"<tr><td>{html.escape(name)}</td>"
                + "".join(f"<td>{html.escape(str(values.get(column, '')))}</td>" for column in columns)
                + "</tr>"
                for name, values in self.results.items()
            )
            results = f"<table><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in ['', *columns])}</tr>{rows}</table>"
        head = "".join(f"<th>{name}</th>" for name in self.HEADER)
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(self.model)}</title><style>"
            "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}"
            "table{border-collapse:collapse;margin:1.5rem 0}td,th{padding:.25rem .8rem;text-align:right;"
            "border-bottom:1px solid #dde3ea}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
            f"</style><h1>{html.escape(self.model)}, before and after</h1>{results}"
            f"<table><tr><th>cost</th><th>before</th><th>after</th><th>share</th></tr>{totals}</table>"
            f"{f'<p>{html.escape(self._note())}</p>' if self.uncounted else ''}"
            f'<img alt="width of each layer before and after" src="data:image/png;base64,{image}">'
            f"<table><tr>{head}</tr>{body}</table></html>"
        )

    def save(self, folder: str | Path) -> None:
        """Write `report.md`, `report.json`, `report.png` and `report.html`."""
        folder = Path(folder)
        write_text(folder / "report.md", self.markdown())
        write_json(folder / "report.json", self.json())
        write_atomically(folder / "report.png", lambda path: self.picture().savefig(path, dpi=120))
        write_text(folder / "report.html", self.html())

    def __str__(self) -> str:
        return self.text()


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)] + [""]


def _draw_widths(axis: Any, rows: Sequence[LayerRow]) -> None:
    """A bar per layer from the input down, with its two widths behind it."""
    at = np.arange(len(rows))
    axis.barh(at, [row.width for row in rows], color="#c7d0dd", height=0.8)
    axis.barh(at, [row.width_after for row in rows], color="#1f5fa8", height=0.5)
    for y, row in enumerate(rows):
        text = f"{row.width_after:,} of {row.width:,}" if row.width_after else f"gone, of {row.width:,}"
        axis.annotate(text, (row.width, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(at, [row.layer for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.01)
    axis.tick_params(axis="y", length=0)


def _draw_history(axis: Any, history: Sequence[dict[str, Any]]) -> None:
    at = np.arange(1, len(history) + 1)
    for name, label, color in (
        ("cost_share", "cost / cost of the seed", "#1f5fa8"),
        ("accuracy", "accuracy, training", "#8a94a3"),
        ("val_accuracy", "accuracy, validation", "#d06a2b"),
    ):
        values = [row.get(name) for row in history]
        if any(value is not None for value in values):
            numbers = [np.nan if value is None else value for value in values]
            axis.plot(at, numbers, color=color, label=label, marker=".")
    phases = [row["phase"] for row in history]
    for number, phase in enumerate(phases):
        if number and phase != phases[number - 1]:
            axis.axvline(number + 0.5, color="#dde3ea", zorder=0)
        if not number or phase != phases[number - 1]:
            axis.annotate(phase, (number + 1, 1.02), xycoords=("data", "axes fraction"), fontsize=9, color="#5a6675")
    axis.set_ylim(-0.02, 1.05)
    axis.set_xlabel("epoch")
    axis.legend(frameon=False, loc="lower left")


def report(
    seed: Any, small: Any, *, history: Sequence[dict[str, Any]] = (), results: dict[str, dict[str, Any]] | None = None
) -> Report:
    """Compare a seed with its smaller model.

    Args:
        seed: the model before, its ChannelGraph, or a StructureLearner.
        small: the model after, or a structure of the seed as in `rebuild`.
        history: rows per epoch, for the curve of the cost.
        results: name -> {column: value}, shown above everything else.

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> print(km.report(seed, km.prune(seed, "50%")).markdown())
        # DigitsResNet, before and after
        <BLANKLINE>
        | cost | before | after | share |
        | --- | ---: | ---: | ---: |
        | FLOPs | 1,527,040 | ...
    """
    if isinstance(small, (Structure, Mapping, str, Path)):
        before, structure = graph_and_structure(seed, small)
        after, alive = before, structure.groups(before)
        widths = structure.widths
    else:
        before, after = graph_of(seed), graph_of(small)
        alive, widths = np.ones(after.num_groups, bool), after.widths
    whole = np.ones(before.num_groups, bool)
    first, second = (_costs(before, whole), _costs(after, alive))
    rows = tuple(
        LayerRow(
            layer.name,
            layer.kind,
            before.widths[layer.name],
            widths.get(layer.name, 0) if layer.name in second["ModelSize"][1] else 0,
            *(
                table[name][1].get(layer.name, 0.0)
                for name in ("FLOPs", "ModelSize")
                for table in (first, second)
                if name in table
            ),
        )
        for layer in before.layers
        if layer.name in before.widths
    )
    totals = {name: (first[name][0], second[name][0]) for name in first}
    return Report(before.model.name, rows, totals, tuple(history), results, FLOPs().uncounted(before))


def _costs(graph: ChannelGraph, alive: np.ndarray) -> dict[str, tuple[float, dict[str, float]]]:
    """Cost -> (total, {layer that is present: its share})."""
    closed = close(graph, alive)
    present = closed.present[len(graph.calls) :]
    found = {}
    for cost in COSTS:
        try:
            values = cost.per_layer(graph, closed)
        except UnsupportedModelError:  # an unknown input size: parameters are all that can be said
            values = np.zeros(len(graph.layers))
        names = [layer.name for layer in graph.layers]
        found[cost.name] = (
            float(values.sum()),
            {n: float(v) for n, v, p in zip(names, values, present, strict=True) if p},
        )
    return found
