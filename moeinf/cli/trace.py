"""`moeinf trace`: records the routing of a model over a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from moeinf.checkpoint.folder import Checkpoint
from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import check_writable, print_facts, print_json
from moeinf.pocket import POCKET, model_name


def command(
    checkpoint: options.Checkpoint = POCKET,
    revision: options.Revision = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line.", exists=True)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace file.")] = Path(
        "trace.safetensors"
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 64,
    memory: Annotated[str, typer.Option(help="What experts may take.")] = "25%",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    router: Annotated[
        bool, typer.Option("--router", help="Record the router's probabilities of all experts too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generates from every prompt and saves which experts each token used."""
    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts else DEMO_PROMPTS
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{prompts}: holds no prompt")
    check_writable(output)
    with quiet_interrupts():
        import torch
        from transformers import AutoTokenizer

        from moeinf.integrations.transformers.generation import continue_prompt
        from moeinf.integrations.transformers.load import load
    opened = Checkpoint.open(checkpoint, revision)
    tokenizer = AutoTokenizer.from_pretrained(opened.path)
    model: Any = load(opened, memory=memory)
    torch.manual_seed(seed)
    with (
        Progress(console=Console(stderr=True)) as progress,
        model.moeinf.cache.record(router=router) as recorder,
    ):
        for line in progress.track(lines, description="Prompts"):
            continue_prompt(
                model,
                tokenizer(line, return_tensors="pt"),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
    trace = recorder.trace(model=model_name(checkpoint), source="moeinf trace")
    trace.save(output)
    facts = {"file": str(output), **trace.info()}
    if json:
        print_json(facts)
    else:
        print_facts("Trace", {name: str(value) for name, value in facts.items()})


DEMO_PROMPTS = [
    "import os\n",
    "def read_lines(path):\n",
    '"""Return the',
    "class Parser:\n    def __init__(self",
    "    def test_",
    "for name in sorted(",
    "if not isinstance(",
    "raise ValueError(",
]
