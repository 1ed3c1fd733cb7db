"""`moeinf trace`: records the routing of a model over a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import console, print_facts, print_json
from moeinf.output_files import check_writable
from moeinf.pocket import POCKET, model_name


def command(
    checkpoint: options.Checkpoint = POCKET,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file, one prompt a line.", exists=True, dir_okay=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace file.")] = Path(
        "trace.safetensors"
    ),
    max_new_tokens: options.MaxNewTokens = 64,
    memory: options.Memory = "25%",
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    router: options.Router = False,
    json: options.Json = False,
) -> None:
    """Generates from every prompt and saves which experts each token used."""
    lines = _read(prompts) if prompts else DEMO_PROMPTS
    check_writable(output)
    with quiet_interrupts():
        import torch

        from moeinf.integrations.transformers.generation import (
            continue_prompt,
            read_tokenizer,
            start_recording,
        )
        from moeinf.integrations.transformers.load import load, open_checkpoint
    opened = open_checkpoint(checkpoint, revision, trust_remote_code, to_generate=True)
    tokenizer = read_tokenizer(opened.path, trust_remote_code)
    model: Any = load(opened, memory=memory)
    torch.manual_seed(seed)
    with (
        Progress(console=console(stderr=True)) as progress,
        start_recording(model, router=router) as recorder,
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


def _read(prompts: Path) -> list[str]:
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts}: expected text in UTF-8: {error}") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{prompts}: holds no prompt")
    return lines


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
