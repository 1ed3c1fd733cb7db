"""`moeinf serve`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

import importlib.util
import json as json_format
import sys
from typing import Annotated

import typer

from moeinf.cli import options, quiet_interrupts
from moeinf.pocket import POCKET, model_name
from moeinf.server.settings import Settings, bind

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def command(
    checkpoint: options.Checkpoint = POCKET,
    host: Annotated[
        str,
        typer.Option(help="Where to listen. Beyond this machine, a key is needed."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MOEINF_API_KEY",
            help="What clients must send as a bearer token. An option is seen by other users of "
            "this machine, the variable is not.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; that of the checkpoint without it."),
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Requests that are answered at once, in turns.")
    ] = 4,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more get status 429.")
    ] = 64,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts get status 400.")
    ] = 4096,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Of one answer; who asks for more gets status 400.")
    ] = 1024,
    max_body: Annotated[
        int, typer.Option(min=1, help="Bytes of a request; larger ones get status 413.")
    ] = 1 << 20,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="For answers in progress, after SIGTERM or Ctrl-C."),
    ] = 30,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    memory: options.Memory = "auto",
    policy: options.Policy = None,
    prefetch: options.Prefetch = None,
    linear: options.Linear = "auto",
    dense: options.Dense = "auto",
    threads: options.Threads = None,
    also: options.Also = None,
    device: options.Device = "auto",
    host_memory: options.HostMemory = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line with the address, once ready.")
    ] = False,
) -> None:
    """Serves a model over HTTP as OpenAI does, with a page to try it at /.

    Routes: /v1/chat/completions, /v1/completions, /v1/models, /metrics (Prometheus) and /health.
    SIGTERM or Ctrl-C lets answers in progress finish. docs/serve.md lists every parameter.
    """
    for needed in NEEDS:
        if importlib.util.find_spec(needed) is None:
            raise ImportError(f"the server needs {needed}: pip install 'moeinf[serve]'")
    settings = Settings(
        name=name or ("pocket" if checkpoint == POCKET else model_name(checkpoint)),
        host=host,
        port=port,
        api_key=api_key,
        parallel=parallel,
        queue=queue,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        body_bytes=max_body,
        drain_seconds=drain_seconds,
    )
    bound = bind(settings)
    with quiet_interrupts():
        from moeinf.integrations.transformers.generation import load_with_tokenizer
        from moeinf.server.run import serve
    model, tokenizer = load_with_tokenizer(
        checkpoint,
        revision,
        trust_remote_code,
        device=device,
        memory=memory,
        host_memory=host_memory,
        policy=policy,
        prefetch=prefetch,
        linear=linear,
        dense=dense,
        threads=threads,
        also=also or (),
    )

    def on_ready(address: str) -> None:
        if json:
            print(json_format.dumps({"address": address, "model": settings.name}), flush=True)
            return
        who = "with the API key" if settings.api_key else "for this machine alone, without a key"
        cache = model.moeinf.cache
        total = cache.store.num_layers * cache.store.num_experts
        print(
            f"moeinf: {settings.name} at {address} (page) and {address}/v1 (OpenAI), {who}; "
            f"{cache.slots} of {total} experts in memory; Ctrl-C ends",
            file=sys.stderr,
        )

    serve(model, tokenizer, settings, bound, on_ready)
