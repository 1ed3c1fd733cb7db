"""`moeinf chat`: a conversation with a model whose experts need not fit into memory."""

from __future__ import annotations

import json as json_format
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from moeinf.checkpoint.folder import Checkpoint
from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import human_bytes, print_facts
from moeinf.pocket import POCKET, model_name

HELP = "/reset forgets the conversation, /stats shows what was read, /exit or Ctrl-D ends"


def command(
    checkpoint: options.Checkpoint = POCKET,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    revision: options.Revision = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    memory: options.Memory = "auto",
    policy: options.Policy = "learned",
    prefetch: options.Prefetch = "off",
    device: options.Device = "auto",
    host_memory: options.HostMemory = None,
    temperature: options.OwnTemperature = None,
    seed: options.Seed = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each answer.")
    ] = False,
) -> None:
    """Answers messages, each a line of standard input; keeps what was said in the KV cache."""
    with quiet_interrupts():
        import torch

        from moeinf.integrations.transformers.conversation import Conversation
        from moeinf.integrations.transformers.generation import read_tokenizer
        from moeinf.integrations.transformers.load import load
    opened = Checkpoint.open(checkpoint, revision)
    model: Any = load(
        opened,
        device=device,
        memory=memory,
        host_memory=host_memory,
        policy=policy,
        prefetch=prefetch,
    )
    chat = Conversation(model, read_tokenizer(opened.path), system)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not chat.has_template:
        _note("The tokenizer has no chat template: the model continues the text of all messages.")
    if terminal:
        _note(f"{model_name(checkpoint)}: {HELP}; Ctrl-C stops an answer.")
    torch.manual_seed(seed)
    for message in _messages(terminal):
        if message == "/exit":
            return
        if message == "/reset":
            chat.reset()
        elif message == "/stats":
            _print_stats(chat, json)
        elif re.fullmatch(r"/\w+", message):
            _note(f"{message} is not a command: {HELP}.")
        elif message.strip():
            try:
                with _ctrl_c_stops(chat, terminal):
                    answer = chat.answer(
                        message,
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        stream=None if json else sys.stdout,
                    )
            except ValueError as error:
                if not terminal:
                    raise
                _note(f"{error}.")
            else:
                _print_answer(answer, json)


def _messages(terminal: bool) -> Iterator[str]:
    """The lines of standard input; at a terminal with editing and history."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # input() uses it

    while True:
        try:
            message = input("> ")
        except KeyboardInterrupt:
            _note(f"\n{HELP}.")
        except EOFError:
            print()
            return
        else:
            yield message


@contextmanager
def _ctrl_c_stops(chat: Any, terminal: bool) -> Iterator[None]:
    """At a terminal, Ctrl-C ends the answer; a second one, and any in a script, the program."""

    def stop(*_: Any) -> None:
        chat.interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.getsignal(signal.SIGINT)
    if terminal:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _print_answer(answer: Any, json: bool) -> None:
    if json:
        print(json_format.dumps(asdict(answer)), flush=True)
        return
    if not answer.tokens:
        _note("\n[stopped before the first token]")
        return
    how = {"interrupt": ", stopped", "length": ", cut at the limit", "end": ""}[answer.ended]
    _note(
        f"[{len(answer.tokens)} tokens{how}, {answer.tokens_per_second:.1f} tokens/s, first after "
        f"{answer.first_token_seconds:.2f} s, hit rate {answer.hit_rate:.1%}]"
    )


def _print_stats(chat: Any, json: bool) -> None:
    cache, stats = chat.model.moeinf.cache, chat.model.moeinf.stats()
    facts: dict[str, Any] = {
        "context_tokens": len(chat.said),
        "context_limit": chat.context,
        "slots": cache.slots,
        "total_experts": cache.store.num_layers * cache.store.num_experts,
        "slot_memory_bytes": cache.nbytes,
        "hit_rate": stats["hit_rate"],
        "bytes_read": stats["demand_bytes"] + stats["prefetch_bytes"],
        "stall_seconds": stats["stall_seconds"],
    }
    if json:
        print(json_format.dumps(facts), flush=True)
        return
    print_facts(
        "",
        {
            "conversation": f"{facts['context_tokens']} of {facts['context_limit']} tokens",
            "experts resident": f"{facts['slots']} of {facts['total_experts']} "
            f"({human_bytes(facts['slot_memory_bytes'])})",
            "hit rate": f"{facts['hit_rate']:.1%}",
            "read": human_bytes(facts["bytes_read"]),
            "waiting for reads": f"{facts['stall_seconds']:.1f} s",
        },
    )


def _note(text: str) -> None:
    """For the person at the terminal; standard output has the answers alone."""
    print(text, file=sys.stderr, flush=True)
