"""`moeinf run`: generates text with a bounded part of the experts in memory."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import human_bytes, print_facts, print_json, utf8
from moeinf.output_files import check_writable
from moeinf.pocket import POCKET

DEMO_PROMPT = "import os\nimport sys\n\n\ndef main"


def command(
    checkpoint: options.Checkpoint = POCKET,
    prompt: Annotated[
        str,
        typer.Option(
            help="The text to continue; a few lines of Python without it.", show_default=False
        ),
    ] = DEMO_PROMPT,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="The prompt as it is, without the tokenizer's chat template."),
    ] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: options.MaxNewTokens = 64,
    memory: options.Memory = "25%",
    policy: options.Policy = None,
    prefetch: options.Prefetch = None,
    linear: options.Linear = "auto",
    dense: options.Dense = "auto",
    threads: options.Threads = None,
    also: options.Also = None,
    device: options.Device = "auto",
    host_memory: options.HostMemory = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    record: Annotated[
        Path | None, typer.Option(help="Save the routing as a trace for moeinf simulate.")
    ] = None,
    router: options.Router = False,
    eamc: Annotated[
        Path | None,
        typer.Option(
            help="The collection of --policy or --prefetch eam: read if it is there, saved again "
            "at the end."
        ),
    ] = None,
    json: options.Json = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with every expert resident, to the bit.")
    ] = False,
) -> None:
    """Writes text with most experts on disk, and reports hits, reads and time."""
    for output in filter(None, (record, eamc)):
        check_writable(output)
    with quiet_interrupts():
        from moeinf.integrations.transformers.generation import Request, generate

    if router and record is None:
        raise ValueError("--router says what --record keeps: give --record FILE")
    request = Request(
        path=checkpoint,
        revision=revision,
        trust_remote_code=trust_remote_code,
        prompt=utf8("--prompt", prompt),
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        host_memory=host_memory,
        policy=policy,
        prefetch=prefetch,
        linear=linear,
        dense=dense,
        threads=threads,
        also=also or (),
        keep_logits=verify,
        record=record,
        router=router,
        eamc=eamc,
    )
    result = generate(request, memory=memory, stream=None if json else sys.stdout)
    report: dict[str, Any] = asdict(result.metrics)
    for part in ("host", "prefetch"):
        if report[part] is None:
            del report[part]
    if verify:
        report["verified"] = _verify(request, result, quiet=json)
    if json:
        print_json({"text": result.text, "tokens": result.tokens, **report})
    else:
        _print_report(report)
    if verify and not report["verified"]:
        sys.exit("moeinf: the output differs from that of a run with every expert resident")


def _verify(request: Any, result: Any, *, quiet: bool) -> bool:
    """Runs again with every expert resident; true if tokens and logits are identical."""
    import torch

    from moeinf.integrations.transformers.generation import generate

    if not quiet:
        print("\nVerifying against a run with every expert resident", file=sys.stderr)
    resident = generate(replace(request, record=None, eamc=None), memory="100%", stream=None)
    return result.tokens == resident.tokens and torch.equal(result.logits, resident.logits)


def _print_report(report: dict[str, Any]) -> None:
    facts = {
        "tokens/s": f"{report['tokens_per_second']:.1f}",
        "time to first token": f"{report['first_token_seconds'] * 1e3:.0f} ms",
        "experts resident": f"{report['slots']} of {report['total_experts']} "
        f"({human_bytes(report['slot_memory_bytes'])}), policy {report['policy']}",
        "hit rate": f"{report['hit_rate']:.1%}",
        "read per token": human_bytes(report["bytes_read_per_token"]),
        "waiting for reads": f"{report['stall_share']:.1%} of the time",
        "peak memory": human_bytes(report["peak_memory_bytes"]),
    }
    if "host" in report:
        host = report["host"]
        facts |= {
            "device": report["device"],
            "experts in RAM": f"{host['slots']}, hit {host['hits']} of "
            f"{host['hits'] + host['misses']} times",
            "copied to the GPU": f"{human_bytes(host['copied_bytes'])} by {host['copy_path']}",
        }
    if "prefetch" in report:
        facts |= _prefetch_facts(report["prefetch"])
    if "verified" in report:
        facts["identical to all-resident"] = "yes, every bit" if report["verified"] else "NO"
    print()
    print_facts("", facts)


def _prefetch_facts(prefetch: dict[str, Any]) -> dict[str, str]:
    def percent(name: str) -> str:
        return "-" if prefetch[name] is None else f"{prefetch[name]:.1%}"

    return {
        f"prefetch, {prefetch['predictor']}": f"{prefetch['state']}, "
        f"read ahead in {percent('active_share')} of the steps, "
        f"gain {prefetch['gain']:+.1%} ± {prefetch['gain_error']:.1%}",
        "predictions": f"recall {percent('recall')}, precision {percent('precision')}, "
        f"among misses {percent('precision_among_misses')}",
        "prefetched": f"{human_bytes(prefetch['prefetch_bytes'])}, "
        f"{human_bytes(prefetch['prefetch_useful_bytes'])} useful, "
        f"{human_bytes(prefetch['prefetch_wasted_bytes'])} wasted",
        "late prefetches": f"{prefetch['late']} of {prefetch['fetched']}, "
        f"{prefetch['late_seconds'] * 1e3:.0f} ms",
    }
