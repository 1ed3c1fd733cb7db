"""Options that several commands have, with their limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a temperature")
    return value


Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A folder, a GGUF file, or a name on the Hub; the built-in model without it.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit, where the checkpoint is on the Hub.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
]
Traces = Annotated[list[Path], typer.Argument(help="Trace files.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write for each prompt.")]
Memory = Annotated[
    str, typer.Option(help="What experts may take: 2GiB, a share of all experts, or auto.")
]
Policy = Annotated[
    str | None,
    typer.Option(help="Who leaves when a slot is needed; learned, or as tuned, without it."),
]
Prefetch = Annotated[
    str | None,
    typer.Option(
        help="What guesses the experts to come: off, previous, transition, eam or gate. Off, or as "
        "tuned, without it."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: where the slots lie.")]
HostMemory = Annotated[
    str | None,
    typer.Option(help="What experts may take of the RAM below a GPU; all of them without it."),
]
Linear = Annotated[
    str,
    typer.Option(help="What computes linear layers of a few tokens on the CPU: auto or torch."),
]
Dense = Annotated[
    str,
    typer.Option(
        help="What a quantised checkpoint has outside the experts: decoded when it is loaded; "
        "packed, as it is stored, on the CPU; or auto, packed on the CPU and decoded elsewhere."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="Of experts and linear layers on the CPU; all that are usable without it."),
]
Also = Annotated[
    list[Path] | None,
    typer.Option(
        help="A folder on another disk with copies of the checkpoint's files: both are read. May "
        "be given again."
    ),
]
OwnTemperature = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        callback=_finite,
        help="0 takes the likeliest token; without it, the checkpoint's own settings.",
        show_default=False,
    ),
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
