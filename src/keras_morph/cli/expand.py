"""`keras-morph expand MODEL STRUCTURE OUTPUT`: a structure widened uniformly, as a fresh model."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import COSTS, Classes, ImageSize, among, check_name, check_output
from keras_morph.errors import KerasMorphError

__all__ = ["expand"]


def expand(
    model: Annotated[str, typer.Argument(help="the seed: a zoo name, a .keras file, or package.module:function")],
    structure: Annotated[Path, typer.Argument(help="a structure.json, or an alive_STEP file of counts")],
    output: Annotated[Path, typer.Argument(help="the .keras file to write: fresh weights")],
    budget: Annotated[str, typer.Option(help='"100%" of the seed, "300M", "2MB", or a number')] = "100%",
    cost: Annotated[str, typer.Option(help="what the budget is for", **among(COSTS))] = "FLOPs",
    image_size: ImageSize = 32,
    classes: Classes = 10,
) -> None:
    """Widen a structure uniformly until a budget is used, and save a fresh model of it."""
    if output.suffix != ".keras":
        raise KerasMorphError(f"OUTPUT expects a file name that ends in .keras. Received: {output}.")
    check_output("OUTPUT", output, [model, structure])
    check_name("--cost", cost, COSTS)

    from keras_morph.cli.choices import cost_of, load_model
    from keras_morph.costs.costs import FLOPs, ModelSize
    from keras_morph.graph.tracing import trace
    from keras_morph.runs import save_model
    from keras_morph.search import expansion
    from keras_morph.surgery.rebuilding import rebuild

    seed = trace(load_model(model, input_shape=(image_size, image_size, 3), classes=classes))
    expanded = expansion.expand(seed, structure, cost_of(cost, "V100", None, None), budget)
    wide = rebuild(seed, expanded, weights=False)
    save_model(wide, output)
    flops, size = FLOPs(), ModelSize()
    print(
        f"{output}: {flops(wide):,.0f} FLOPs ({flops(wide) / flops(seed):.1%} of the seed's), "
        f"{size(wide):,.0f} parameters ({size(wide) / size(seed):.1%})"
    )
