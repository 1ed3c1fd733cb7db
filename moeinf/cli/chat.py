"""`moeinf chat`: a conversation with a model whose experts need not fit into memory."""

from __future__ import annotations

import json as json_format
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from moeinf.cli import options, quiet_interrupts
from moeinf.cli.output import human_bytes, print_facts, utf8
from moeinf.pocket import POCKET, model_name

HELP = "/reset forgets the conversation, /stats shows what was read, /exit or Ctrl-D ends"


def command(
    checkpoint: options.Checkpoint = POCKET,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    memory: options.Memory = "auto",
    policy: options.Policy = None,
    prefetch: options.Prefetch = None,
    linear: options.Linear = "auto",
    dense: options.Dense = "auto",
    threads: options.Threads = None,
    also: options.Also = None,
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
        from moeinf.integrations.transformers.generation import load_with_tokenizer
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
    chat = Conversation(model, tokenizer, system and utf8("--system", system))
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not chat.has_template:
        _note("The tokenizer has no chat template: the model continues the text of all messages.")
    if terminal:
        _note(f"{model_name(checkpoint)}: {HELP}; Ctrl-C stops an answer.")
    torch.manual_seed(seed)
    if not terminal:
        for line in sys.stdin:
            if not _say(chat, line.rstrip("\n"), max_new_tokens, temperature, json):
                return
        return

    def stop(*_: Any) -> None:
        chat.interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends the program

    with _on_ctrl_c(lambda *_: None):
        for message in _typed():
            with _on_ctrl_c(stop):
                try:
                    if not _say(chat, message, max_new_tokens, temperature, json):
                        return
                except ValueError as error:
                    _note(f"{error}.")


def _say(
    chat: Any, message: str, max_new_tokens: int, temperature: float | None, json: bool
) -> bool:
    """Answers a message or does what a command says; false where that is to end."""
    if message == "/exit":
        return False
    if message == "/reset":
        chat.reset()
    elif message == "/stats":
        _print_stats(chat, json)
    elif re.fullmatch(r"/\w+", message):
        _note(f"{message} is not a command: {HELP}.")
    elif message.strip():
        stream = None if json else sys.stdout
        answer = chat.answer(
            message, max_new_tokens=max_new_tokens, temperature=temperature, stream=stream
        )
        _print_answer(answer, json)
    return True


def _typed() -> Iterator[str]:
    """The lines that a person types, with editing and history."""
    import readline  # noqa: F401  # input() uses it

    while True:
        try:
            with _on_ctrl_c(signal.default_int_handler):
                message = input("> ")
        except KeyboardInterrupt:
            _note(f"\n{HELP}.")
        except EOFError:
            print()
            return
        else:
            yield message


@contextmanager
def _on_ctrl_c(action: Callable[..., Any]) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, action)
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
