"""`moeinf tune`: settings that make a checkpoint faster on this machine, kept for later runs."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from moeinf import profiles
from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import print_json
from moeinf.cli.run import DEMO_PROMPT
from moeinf.pocket import POCKET


def command(
    checkpoint: options.Checkpoint = POCKET,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=8, help="Tokens of each run; more make it surer, and longer.")
    ] = 48,
    memory: options.Memory = "25%",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Runs the model in pairs and keeps each setting that is better by more than the noise."""
    with quiet_interrupts():
        from transformers.utils import logging

        from moeinf.integrations.transformers.generation import Request
        from moeinf.integrations.transformers.load import open_checkpoint
        from moeinf.planning import tuning
    logging.disable_progress_bar()  # of each load
    opened = open_checkpoint(checkpoint, revision, trust_remote_code, to_generate=True)
    start = tuning.survey(opened, device, memory)
    request = Request(
        path=checkpoint,
        revision=revision,
        trust_remote_code=trust_remote_code,
        prompt=DEMO_PROMPT * 2,
        raw=True,
        max_new_tokens=max_new_tokens,
        device=device,
    )
    trials: list[tuning.Trial] = []

    def told(trial: tuning.Trial) -> None:
        trials.append(trial)
        ratio = statistics.median(trial.ratios)
        print(
            f"{trial.setting}={trial.value}: {ratio:.2f} of the time, {len(trial.ratios)} pairs, "
            + ("kept" if trial.kept else "not kept"),
            file=sys.stderr,
        )

    run, tried = tuning.Runs(request, memory), tuning.candidates(start)
    settings = tuning.tune(run, start.settings, tried, told)
    file = profiles.write(start.fingerprint, start.device, settings, str(checkpoint))
    facts = {"settings": settings, "profile": str(file), "trials": [asdict(one) for one in trials]}
    if json:
        print_json(facts)
        return
    words = ", ".join(f"{name}={value}" for name, value in settings.items())
    print(f"{words or 'No setting was better than what is usual'}; kept in {file}.")
