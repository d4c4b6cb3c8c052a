"""What `inspect` shows: layers, groups, what is pinned and why, costs, the cheapest structure in reach."""

from collections import Counter
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from keras_morph.channels import ChannelGraph
from keras_morph.costs.costs import Activations, Cost, FLOPs, Latency, ModelSize
from keras_morph.errors import UnsupportedModelError
from keras_morph.graph.closure import Closed, close, whole
from keras_morph.showing import console

__all__ = ["gather", "show"]

COSTS: tuple[Cost, ...] = (FLOPs(), ModelSize(), Activations(), Latency("V100"))
HEADS = {"FLOPs": "FLOPs", "ModelSize": "size", "Activations": "activ.", "Latency": "V100"}


def gather(graph: ChannelGraph) -> dict[str, Any]:
    """All that there is to say about a model, as plain data.

    Returns:
        `layers`: for each layer that makes channels its width, its width in the cheapest structure that can be reached
        (0 where the layer is gone), the numbers of its channels by the size of their groups, its pinned channels by
        reason, and what it costs. `costs`: for each cost its unit, that of the model and that of the cheapest
        structure; None where an input size is unknown.
    """
    least = close(graph, graph.pinned_mask)
    before, after = ({cost: _per_layer(cost, graph, closed) for cost in COSTS} for closed in (whole(graph), least))
    sizes = np.bincount(graph.group_of, minlength=graph.num_groups)
    layers = []
    for number, layer in enumerate(graph.layers):
        if layer.made is None:
            continue
        groups = graph.group_of[layer.made]
        layers.append(
            {
                "layer": layer.name,
                "kind": layer.kind,
                "width": len(groups),
                "cheapest": int(least.alive[groups].sum()) * bool(least.present[len(graph.calls) + number]),
                "group_sizes": {str(size): count for size, count in sorted(Counter(sizes[groups].tolist()).items())},
                "pinned": dict(Counter(graph.pinned[group] for group in groups.tolist() if group in graph.pinned)),
                "costs": {cost.name: None if per is None else float(per[number]) for cost, per in before.items()},
            }
        )
    return {
        "model": graph.model.name,
        "channels": graph.num_channels,
        "groups": graph.num_groups,
        "pinned_groups": len(graph.pinned),
        "layers": layers,
        "uncounted": list(FLOPs().uncounted(graph)),
        "costs": {
            cost.name: {"cost": repr(cost), "unit": cost.unit, "now": _total(per), "cheapest": _total(after[cost])}
            for cost, per in before.items()
        },
    }


def _per_layer(cost: Cost, graph: ChannelGraph, closed: Closed) -> np.ndarray | None:
    try:
        return cost.per_layer(graph, closed)
    except UnsupportedModelError:  # an input size is unknown
        return None


def _total(per_layer: np.ndarray | None) -> float | None:
    return None if per_layer is None else float(per_layer.sum())


def show(found: dict[str, Any]) -> None:
    """Print what `gather` found; through a pager where it is longer than the terminal."""
    screen, tables = console(), _tables(found)
    with screen.capture() as capture:
        screen.print(tables)
    if screen.is_terminal and capture.get().count("\n") >= screen.height:
        with screen.pager(styles=True):
            screen.print(tables)
    else:
        screen.print(tables)


def _tables(found: dict[str, Any]) -> Group:
    """A table of the layers, narrow enough for 100 columns, and one of the costs."""
    layers = Table(
        title=f"{found['model']}: {found['channels']:,} channels in {found['groups']:,} groups, "
        f"{found['pinned_groups']:,} of them pinned",
        caption="cheapest: width in the cheapest structure in reach (0: gone); tied: channels per group",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    layers.add_column("layer", overflow="fold", min_width=20)
    layers.add_column("kind", overflow="fold")
    for name in ("width", "cheapest", "tied", *HEADS.values()):
        layers.add_column(name, justify="right", no_wrap=True)
    layers.add_column("pinned", overflow="fold", min_width=12)
    totals = {name: cost["now"] for name, cost in found["costs"].items()}
    for layer in found["layers"]:
        layers.add_row(
            layer["layer"],
            layer["kind"],
            f"{layer['width']:,}",
            f"{layer['cheapest']:,}",
            _span(layer["group_sizes"]),
            *(_share(layer["costs"][name], totals[name], digits=1) for name in HEADS),
            "; ".join(
                reason if count == layer["width"] else f"{count:,}: {reason}"
                for reason, count in layer["pinned"].items()
            ),
        )
    left_out = ", ".join(found["uncounted"])
    note = f"FLOPs and Latency leave out {left_out}: what they compute cannot be counted" if left_out else None
    costs = Table(
        title="costs",
        title_justify="left",
        caption=note,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("cost", "unit", "as it is", "cheapest in reach", "share"):
        costs.add_column(name, justify="left" if name in ("cost", "unit") else "right")
    for cost in found["costs"].values():
        now, least = cost["now"], cost["cheapest"]
        if now is None:
            costs.add_row(cost["cost"], cost["unit"], "-", "-", "needs a static input size")
        else:
            costs.add_row(cost["cost"], cost["unit"], f"{now:,.6g}", f"{least:,.6g}", _share(least, now, digits=2))
    return Group(layers, costs)


def _span(sizes: dict[str, int]) -> str:
    known = list(sizes)
    return "" if not known else known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _share(part: float | None, total: float | None, *, digits: int) -> str:
    return "-" if part is None or not total else f"{part / total:.{digits}%}"
