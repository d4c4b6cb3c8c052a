"""Before and after, layer by layer: gathered once, then written as text, Markdown, JSON, picture or HTML."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_morph.benchmarking import Benchmark
from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import Activations, Cost, FLOPs, ModelSize
from keras_morph.errors import KerasMorphError, UnsupportedModelError
from keras_morph.graph.closure import Closed, close, whole
from keras_morph.graph.identities import counterparts
from keras_morph.graph.structure import Structure, graph_and_structure
from keras_morph.graph.tracing import graph_of
from keras_morph.runs import write_atomically, write_json, write_text
from keras_morph.showing import console, html_table

__all__ = ["LayerRow", "Report", "Time", "report"]

COSTS: tuple[Cost, ...] = (FLOPs(), ModelSize(), Activations())


@dataclass(frozen=True)
class LayerRow:
    """One layer that makes channels, before and after.

    Attributes:
        layer, kind: name and class.
        width, width_after: channels; 0 where the layer is gone.
        flops, flops_after: FLOPs for one example.
        parameters, parameters_after: number of weights.
        seconds, seconds_after: as predicted by a cost; None without one.
    """

    layer: str
    kind: str
    width: int
    width_after: int
    flops: float
    flops_after: float
    parameters: float
    parameters_after: float
    seconds: float | None = None
    seconds_after: float | None = None


@dataclass(frozen=True)
class Time:
    """How long the whole networks take.

    Attributes:
        how: "predicted" or "measured".
        where: the cost that predicts it, or the conditions under which it was measured.
        seconds, seconds_after: of one pass.
    """

    how: str
    where: str
    seconds: float
    seconds_after: float

    def __str__(self) -> str:
        times = f"{_ms(self.seconds, self.seconds)} -> {_ms(self.seconds_after, self.seconds)} ms"
        speedup = f", {self.seconds / self.seconds_after:.2f}x as fast" if self.seconds_after else ""
        return f"{self.how} {times}{speedup} ({self.where})"


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
        times: of the whole networks, predicted and measured, if any.
        others: seconds before and after, as predicted, of all that has no row, such as merges and pooling; with the rows'
            they make up the total.

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
    times: tuple[Time, ...] = ()
    others: tuple[float, float] | None = None

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

    def _head(self) -> tuple[str, ...]:
        return self.HEADER if self.others is None else (*self.HEADER, "ms predicted", "after")

    def _cells(self) -> list[list[str]]:
        rows = [
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
        if self.others is None:
            return rows
        rows.append(["others", *[""] * (len(self.HEADER) - 1)])
        seconds = [*((row.seconds or 0.0, row.seconds_after or 0.0) for row in self.rows), self.others]
        whole = sum(before for before, _ in seconds)
        return [[*cells, *(_ms(each, whole) for each in pair)] for cells, pair in zip(rows, seconds, strict=True)]

    def _totals(self) -> list[list[str]]:
        rows = [(name, pair, [f"{each:,.0f}" for each in pair]) for name, pair in self.totals.items()]
        for time in self.times:
            if time.how == "predicted":  # the sum of the layers' column
                pair = time.seconds, time.seconds_after
                rows.append(("ms predicted", pair, [_ms(each, time.seconds) for each in pair]))
        return [[name, *texts, f"{pair[1] / pair[0]:.1%}" if pair[0] else "-"] for name, pair, texts in rows]

    HEADER = ("layer", "kind", "width", "after", "FLOPs", "after", "parameters", "after")

    def text(self, width: int = 120) -> str:
        """Two tables for a terminal, and lines on times."""
        from rich.table import Table

        layers = Table(title=f"{self.model}, layer by layer", title_justify="left")
        for number, name in enumerate(self._head()):
            layers.add_column(name, justify="left" if number < 2 else "right", no_wrap=number == 0)
        for cells in self._cells():
            layers.add_row(*cells)
        totals = Table(title="in total", title_justify="left", caption=self._note() or None, caption_justify="left")
        for name in ("cost", "before", "after", "share"):
            totals.add_column(name, justify="left" if name == "cost" else "right")
        for cells in self._totals():
            totals.add_row(*cells)
        screen = console(width=width, file=io.StringIO(), force_terminal=False)
        screen.print(layers, totals)
        for each in self.times:
            screen.print(str(each), soft_wrap=True)
        return screen.file.getvalue()  # type: ignore[attr-defined]

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [f"# {self.model}, before and after", ""]
        if self.times:
            lines += [*(f"- {each}" for each in self.times), ""]
        if self.results:
            columns = list(dict.fromkeys(column for values in self.results.values() for column in values))
            lines += _markdown_table(
                ["", *columns], [[name, *(str(v.get(c, "")) for c in columns)] for name, v in self.results.items()]
            )
        lines += _markdown_table(["cost", "before", "after", "share"], self._totals())
        note = [self._note(), ""] if self.uncounted else []
        return "\n".join(lines + note + _markdown_table(self._head(), self._cells()))

    def json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def picture(self) -> Any:
        """A matplotlib figure: widths per layer before and after, predicted times likewise, and cost over time."""
        from matplotlib.figure import Figure

        bars = 0.22 * len(self.rows) + 1.2
        heights = [bars, *([bars] if self.others is not None else []), *([3.2] if self.history else [])]
        figure = Figure(figsize=(9, sum(heights)), layout="constrained")
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_widths(axes[0], self.rows)
        axes[0].set_title(f"{self.model}: channels of each layer, before and after", loc="left")
        if self.others is not None:
            _draw_times(axes[1], self.rows, self.others)
            axes[1].set_title("milliseconds of each layer as predicted, before and after", loc="left")
        if self.history:
            _draw_history(axes[-1], self.history)
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
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in self._totals()
        )
        times = "<br>".join(html.escape(str(each)) for each in self.times)
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
        head = "".join(f"<th>{name}</th>" for name in self._head())
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(self.model)}</title><style>"
            "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}"
            "table{border-collapse:collapse;margin:1.5rem 0}td,th{padding:.25rem .8rem;text-align:right;"
            "border-bottom:1px solid #dde3ea}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
            f"</style><h1>{html.escape(self.model)}, before and after</h1>"
            f"{f'<p>{times}</p>' if times else ''}{results}"
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


def _ms(seconds: float, of: float) -> str:
    """Milliseconds, with as many decimals as show four digits of the whole."""
    if not seconds:
        return "0"
    decimals = max(0, 3 - math.floor(math.log10(1e3 * of))) if of > 0 else 0
    return f"{1e3 * seconds:.{decimals}f}"


def _draw_widths(axis: Any, rows: Sequence[LayerRow]) -> None:
    texts = [f"{row.width_after:,} of {row.width:,}" if row.width_after else f"gone, of {row.width:,}" for row in rows]
    pairs = [(row.width, row.width_after) for row in rows]
    _draw_pairs(axis, [row.layer for row in rows], pairs, texts)


def _draw_times(axis: Any, rows: Sequence[LayerRow], others: tuple[float, float]) -> None:
    pairs = [*((row.seconds or 0.0, row.seconds_after or 0.0) for row in rows), others]
    whole = sum(before for before, _ in pairs)
    texts = [f"{_ms(before, whole)} -> {_ms(after, whole)}" for before, after in pairs]
    milliseconds = [(1e3 * before, 1e3 * after) for before, after in pairs]
    _draw_pairs(axis, [*(row.layer for row in rows), "others"], milliseconds, texts)
    axis.margins(x=0.25)  # the texts are longer than those of widths


def _draw_pairs(axis: Any, names: Sequence[str], pairs: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """A bar per layer from the input down, its value before behind its value after."""
    at = np.arange(len(names))
    axis.barh(at, [before for before, _ in pairs], color="#c7d0dd", height=0.8)
    axis.barh(at, [after for _, after in pairs], color="#1f5fa8", height=0.5)
    for y, (pair, text) in enumerate(zip(pairs, texts, strict=True)):
        axis.annotate(text, (max(pair), y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(at, names, fontsize=8)
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
    seed: Any,
    small: Any,
    *,
    history: Sequence[dict[str, Any]] = (),
    results: dict[str, dict[str, Any]] | None = None,
    cost: Cost | None = None,
    benchmark: Benchmark | None = None,
) -> Report:
    """Compare a seed with its smaller model.

    Args:
        seed: the model before, its ChannelGraph, or a StructureLearner.
        small: the model after, or a structure of the seed as in `rebuild`.
        history: rows per epoch, for the curve of the cost.
        results: name -> {column: value}, shown above everything else.
        cost: a cost of seconds (`MeasuredLatency`, `Latency`), which predicts what each layer takes before and after.
        benchmark: what `km.benchmark` measured, the seed first.

    Raises:
        KerasMorphError: if the cost is none of seconds.

    Example:
        >>> seed = km.zoo.digits_resnet()
        >>> small = km.prune(seed, "50%")
        >>> print(km.report(seed, small).markdown())
        # DigitsResNet, before and after
        <BLANKLINE>
        | cost | before | after | share |
        | --- | ---: | ---: | ---: |
        | FLOPs | 1,527,040 | ...
        >>> found = km.report(seed, small, cost=km.Latency("V100"))
        >>> rows = [(row.seconds, row.seconds_after) for row in found.rows]
        >>> np.allclose(np.sum([*rows, found.others], axis=0), [km.Latency("V100")(each) for each in (seed, small)])
        True
    """
    if cost is not None and cost.unit != "seconds":
        raise KerasMorphError(f"cost: expected a cost of seconds, such as MeasuredLatency. Received: {cost!r}.")
    if isinstance(small, (Structure, Mapping, str, Path)):
        before, structure = graph_and_structure(seed, small)
        after, left, widths = before, close(before, structure.copies(before)), structure.widths
    else:
        before, after = graph_of(seed), graph_of(small)
        left, widths = whole(after), after.widths
    seeds = counterparts(before, after)
    first, widths = _costs(before, whole(before)), _as_in(seeds, widths)
    second = {name: (total, _as_in(seeds, parts)) for name, (total, parts) in _costs(after, left).items()}
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
    found = Report(before.model.name, rows, totals, tuple(history), results, FLOPs().uncounted(before))
    if cost is not None:
        total, parts = _cost(cost, after, left)
        found = _with_predictions(found, cost, _cost(cost, before, whole(before)), (total, _as_in(seeds, parts)))
    return replace(found, times=(*found.times, *_measured(benchmark)))


Shares = tuple[float, dict[str, float]]  # a total, and the part of each layer that is present


def _with_predictions(found: Report, cost: Cost, first: Shares, second: Shares) -> Report:
    """The report with what a cost predicts in seconds; as it is where the cost needs a size that is unknown."""
    if not first[0]:
        return found
    rows = tuple(
        replace(row, seconds=first[1].get(row.layer, 0.0), seconds_after=second[1].get(row.layer, 0.0))
        for row in found.rows
    )
    pairs = [(row.seconds or 0.0, row.seconds_after or 0.0) for row in rows]
    before, after = np.maximum([first[0], second[0]] - np.sum(pairs, axis=0), 0.0).tolist()
    time = Time("predicted", repr(cost), first[0], second[0])
    return replace(found, rows=rows, others=(before, after), times=(time,))


def _measured(benchmark: Benchmark | None) -> list[Time]:
    if benchmark is None:
        return []
    known = benchmark.conditions
    threads = f"{known['threads']} thread{'s' * (known['threads'] > 1)}, batch {known['batch_size']}, {known['cpu']}"
    return [
        Time(
            "measured", f"{row.model} in {row.runtime} {known['versions'][row.runtime]}, {threads}", first.min, row.min
        )
        for first, row in benchmark.pairs()
    ]


def _as_in(seeds: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of layers by their names in the seed: those of a nested model may have been taken out of it."""
    return {seeds.get(name, name): value for name, value in values.items()}


def _costs(graph: ChannelGraph, closed: Closed) -> dict[str, Shares]:
    return {cost.name: _cost(cost, graph, closed) for cost in COSTS}


def _cost(cost: Cost, graph: ChannelGraph, closed: Closed) -> Shares:
    present = closed.present[len(graph.calls) :]
    try:
        values = cost.per_layer(graph, closed)
    except UnsupportedModelError:  # an unknown input size: parameters are all that can be said
        values = np.zeros(len(graph.layers))
    names = [layer.name for layer in graph.layers]
    return float(values.sum()), {n: float(v) for n, v, p in zip(names, values, present, strict=True) if p}
