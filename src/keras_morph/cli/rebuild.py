"""`keras-morph rebuild MODEL STRUCTURE OUTPUT`: the smaller model of a structure file."""

from pathlib import Path
from typing import Annotated

import typer

from keras_morph.cli.options import Classes, Grouped, ImageSize, check_output
from keras_morph.errors import KerasMorphError

__all__ = ["rebuild"]


def rebuild(
    model: Annotated[str, typer.Argument(help="the seed: a zoo name, a .keras file, or package.module:function")],
    structure: Annotated[Path, typer.Argument(help="a structure.json, or an alive_STEP file of counts")],
    output: Annotated[Path, typer.Argument(help="the .keras file to write")],
    weights: Annotated[bool, typer.Option(help="carry the seed's weights, or start from fresh ones")] = True,
    image_size: ImageSize = 32,
    classes: Classes = 10,
    grouped: Grouped = "whole",
) -> None:
    """Rebuild a model from a structure file and save it."""
    if output.suffix != ".keras":
        raise KerasMorphError(f"OUTPUT expects a file name that ends in .keras. Received: {output}.")
    check_output("OUTPUT", output, [model, structure])

    from keras_morph.cli.choices import load_model, wiring_of
    from keras_morph.costs.costs import FLOPs, ModelSize
    from keras_morph.graph.tracing import trace
    from keras_morph.runs import save_model
    from keras_morph.surgery import rebuilding

    wiring = wiring_of(grouped=grouped)
    seed = load_model(model, input_shape=(image_size, image_size, 3), classes=classes)
    small = rebuilding.rebuild(trace(seed, **wiring) if grouped != "whole" else seed, structure, weights=weights)
    save_model(small, output)
    flops, size = FLOPs(), ModelSize()
    print(
        f"{output}: {flops(small):,.0f} FLOPs ({flops(small) / flops(seed):.1%} of the seed's), "
        f"{size(small):,.0f} parameters ({size(small) / size(seed):.1%})"
    )
