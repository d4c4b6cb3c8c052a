"""`keras-morph inspect MODEL`: layers, groups, what is pinned and why, costs, the cheapest structure in reach."""

import json
from typing import Annotated

import typer

from keras_morph.cli.options import Classes, Grouped, ImageSize, Protect, Tie

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, typer.Argument(help="a zoo name, a .keras file, or package.module:function")],
    image_size: ImageSize = 32,
    classes: Classes = 10,
    protect: Protect = None,
    tie: Tie = None,
    grouped: Grouped = "whole",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Show what a model's channels cost, what ties them, and what cannot be removed."""
    from keras_morph.cli.choices import load_model, wiring_of
    from keras_morph.cli.inspecting import gather, show
    from keras_morph.graph.tracing import trace

    wiring = wiring_of(protect, tie, grouped)
    seed = load_model(model, input_shape=(image_size, image_size, 3), classes=classes)
    found = gather(trace(seed, **wiring))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
