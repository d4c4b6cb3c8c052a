"""`keras-morph inspect MODEL`: layers, groups, what is pinned and why, costs, the cheapest structure in reach."""

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from keras_morph.channels import ChannelGraph
from keras_morph.cli.choices import load_model
from keras_morph.closure import close
from keras_morph.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.tracing import trace

COSTS: tuple[Cost, ...] = (FLOPs(), ModelSize(), Activations(), Latency("V100"))


def inspect(
    model: Annotated[str, typer.Argument(help="a zoo name, a .keras file, or package.module:function")],
    image_size: Annotated[int, typer.Option(help="height and width that a zoo model is built at")] = 32,
    classes: Annotated[int, typer.Option(help="classes that a zoo model is built with")] = 10,
) -> None:
    """Show what a model's channels cost, what ties them, and what cannot be removed."""
    seed = load_model(model, input_shape=(image_size, image_size, 3), classes=classes)
    graph = trace(seed)
    console = Console()
    console.print(_layers(graph), _totals(graph))


def _layers(graph: ChannelGraph) -> Table:
    closed = close(graph, np.ones(graph.num_groups, bool))
    flops, parameters = (cost.per_layer(graph, closed) for cost in COSTS[:2])
    table = Table(
        title=f"{graph.model.name}: {graph.num_channels:,} channels in {graph.num_groups:,} groups, "
        f"{len(graph.pinned):,} of them pinned",
        title_justify="left",
    )
    for name in ("layer", "kind", "channels", "tied in groups of", "FLOPs", "parameters", "pinned because"):
        table.add_column(name, justify="right" if name in ("channels", "FLOPs", "parameters") else "left")
    sizes = np.bincount(graph.group_of, minlength=graph.num_groups)
    for number, layer in enumerate(graph.layers):
        if layer.made is None:
            continue
        groups = graph.group_of[layer.made]
        reasons = sorted({graph.pinned[group] for group in groups.tolist() if group in graph.pinned})
        table.add_row(
            layer.name,
            layer.kind,
            f"{len(layer.made):,}",
            _span(sizes[groups]),
            f"{flops[number] / max(flops.sum(), 1):.1%}",
            f"{parameters[number] / max(parameters.sum(), 1):.1%}",
            "; ".join(reasons),
        )
    return table


def _span(sizes: np.ndarray) -> str:
    if not len(sizes):
        return ""
    low, high = int(sizes.min()), int(sizes.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _totals(graph: ChannelGraph) -> Table:
    whole = close(graph, np.ones(graph.num_groups, bool))
    least = close(graph, graph.pinned_mask)
    table = Table(title="costs", title_justify="left")
    for name in ("cost", "unit", "as it is", "cheapest in reach", "share"):
        table.add_column(name, justify="left" if name in ("cost", "unit") else "right")
    for cost in COSTS:
        now, then = cost.total(graph, whole), cost.total(graph, least)
        table.add_row(repr(cost), cost.unit, f"{now:,.6g}", f"{then:,.6g}", f"{then / now:.2%}" if now else "-")
    return table
