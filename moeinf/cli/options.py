"""Options that several commands have, with their limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a temperature")
    return value


Checkpoint = Annotated[
    Path,
    typer.Argument(help="A checkpoint folder; the built-in model without it.", show_default=False),
]
Traces = Annotated[list[Path], typer.Argument(help="Trace files.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write for each prompt.")]
Memory = Annotated[
    str, typer.Option(help="What experts may take: 2GiB, a share of all experts, or auto.")
]
Temperature = Annotated[
    float, typer.Option(min=0.0, callback=_finite, help="0 takes the likeliest token.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**64 - 1, help="Of sampling, when the temperature is above 0."),
]
Router = Annotated[
    bool, typer.Option("--router", help="Record the router's probabilities of all experts too.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
