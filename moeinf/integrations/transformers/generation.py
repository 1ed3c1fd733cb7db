"""Generates from one prompt and measures it, for `moeinf run` and the benchmarks."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, TextStreamer

from moeinf.cache.recorder import Recorder
from moeinf.checkpoint.gguf import is_gguf
from moeinf.checkpoint.headers import check_is_no_pointer
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.integrations.transformers import gguf
from moeinf.integrations.transformers.load import load, open_checkpoint
from moeinf.pocket import model_name
from moeinf.traces.eam import EAMC


@dataclass(frozen=True)
class Request:
    """What to generate, and how; everything but the memory budget."""

    path: Path  # or a name on the Hub
    prompt: str
    max_new_tokens: int
    revision: str | None = None  # on the Hub
    trust_remote_code: bool = False
    raw: bool = False  # the prompt as it is, also where the tokenizer has a chat template
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    host_memory: str | None = None
    policy: str | None = None
    prefetch: str | None = None
    linear: str = "auto"
    dense: str = "auto"
    threads: int | None = None  # of the CPU's kernels
    also: Sequence[Path] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # others of `moeinf.load`
    generation: Mapping[str, Any] = field(default_factory=dict)  # of `generate`
    keep_logits: bool = False
    record: Path | None = None  # where to save the routing as a trace
    router: bool = False  # with the router's probabilities of all experts
    eamc: Path | None = None  # a collection to start from, where it exists, and to save at the end


@dataclass(frozen=True)
class Metrics:
    """Measurements of one generation; hit rate, bytes and stalls count prompt and decode."""

    device: str
    policy: str
    slots: int
    total_experts: int
    slot_memory_bytes: int
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float  # after the first token
    hit_rate: float
    bytes_read_per_token: float
    stall_share: float  # of the time from prompt to last token
    peak_memory_bytes: int  # of the process
    host: dict[str, Any] | None  # of the RAM below a GPU; None on the cpu
    prefetch: dict[str, Any] | None  # what came of predictions; None with prefetch off


@dataclass(frozen=True)
class Result:
    """`tokens` are the new ones; `logits` is [new_tokens, vocabulary]."""

    text: str
    tokens: list[int]
    logits: torch.Tensor  # empty unless asked for
    metrics: Metrics


def generate(request: Request, *, memory: str | int, stream: TextIO | None) -> Result:
    """Loads the model, continues the prompt, and writes both to `stream` as the text comes.

    Raises:
        ValueError: an empty prompt, one too long for the model's context, or a collection that
            does not fit the model or that nothing would use.
        CheckpointError, CapacityError, ReadError: see `moeinf.load`.
    """
    checkpoint = open_checkpoint(
        request.path, request.revision, request.trust_remote_code, to_generate=True
    )
    tokenizer: Any = read_tokenizer(checkpoint.path, request.trust_remote_code)
    chat = bool(tokenizer.chat_template) and not request.raw
    if chat:
        messages = [{"role": "user", "content": request.prompt}]
        prompt = as_chat(tokenizer, messages, return_tensors="pt")
    else:
        prompt = tokenizer(request.prompt, return_tensors="pt")
    count = prompt["input_ids"].shape[1]
    if count == 0 or not request.prompt:
        raise ValueError("the prompt is empty; give --prompt some text")
    limit = checkpoint.text_config().get("max_position_embeddings")
    if limit is not None and count + request.max_new_tokens > limit:
        raise ValueError(
            f"the prompt's {count} tokens and {request.max_new_tokens} new ones exceed the "
            f"model's context of {limit}"
        )
    options: dict[str, Any] = {
        "device": request.device,
        "memory": memory,
        "host_memory": request.host_memory,
        "policy": request.policy,
        "prefetch": request.prefetch,
        "linear": request.linear,
        "dense": request.dense,
        "threads": request.threads,
        "also": request.also,
        "fill": True,
        "eamc": EAMC.load(request.eamc) if request.eamc and request.eamc.exists() else None,
        **request.options,
    }
    model: Any = load(checkpoint, **options)
    if request.eamc:
        model.moeinf.cache.eamc()  # where there is none, that is better said before the run
    torch.manual_seed(request.seed)
    clock = Clock(tokenizer, stream)
    cache = model.moeinf.cache
    recorder = start_recording(model, router=request.router) if request.record else None
    if stream is not None:
        stream.write(request.prompt + ("\n\n" if chat else ""))
    start = time.perf_counter()
    output = continue_prompt(
        model,
        prompt,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        streamer=clock,
        output_logits=request.keep_logits,
        return_dict_in_generate=True,
        **request.generation,
    )
    end = time.perf_counter()
    if recorder is not None and request.record is not None:
        recorder.trace(model=model_name(request.path), source="moeinf run").save(request.record)
    if request.eamc:
        cache.eamc().save(request.eamc)
    begin = 1 if model.config.is_encoder_decoder else count  # what generate returns before them
    tokens = output.sequences[0, begin:].tolist()
    stats = model.moeinf.stats()
    first = clock.times[0] - start
    rest = clock.times[-1] - clock.times[0]
    read = stats["demand_bytes"] + stats["prefetch_bytes"]
    return Result(
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        tokens=tokens,
        logits=torch.cat(output.logits or (torch.empty(0),)),
        metrics=Metrics(
            device=stats["device"],
            policy=stats["policy"],
            slots=cache.slots,
            total_experts=cache.store.num_layers * cache.store.num_experts,
            slot_memory_bytes=cache.nbytes,
            prompt_tokens=count,
            new_tokens=len(tokens),
            first_token_seconds=first,
            tokens_per_second=(len(tokens) - 1) / rest if rest else 0.0,
            hit_rate=stats["hit_rate"],
            bytes_read_per_token=read / (count + len(tokens)),
            stall_share=stats["stall_seconds"] / (end - start),
            peak_memory_bytes=peak_memory(),
            host=stats["host"],
            prefetch=_prefetch_metrics(stats),
        ),
    )


def load_with_tokenizer(
    path: Path, revision: str | None, trust_remote_code: bool, **budget: Any
) -> tuple[Any, Any]:
    """A model that answers again and again, with `moeinf.load`'s options, and its tokenizer, which
    is read first: it is small, and may be missing."""
    checkpoint = open_checkpoint(path, revision, trust_remote_code, to_generate=True)
    tokenizer = read_tokenizer(checkpoint.path, trust_remote_code)
    return load(checkpoint, fill=True, **budget), tokenizer


def read_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, or of a GGUF file.

    Raises:
        CheckpointError: the folder has none, or one that needs code of its own.
    """
    if is_gguf(path):
        return gguf.read_tokenizer(path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        for file in path.glob("*token*"):
            check_is_no_pointer(file, file.read_bytes())
        why = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            why = "it needs code that comes with the checkpoint: trust_remote_code=True runs it"
        raise CheckpointError(f"{path}: no tokenizer can be made: {why}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CheckpointError(f"{path}: expected a tokenizer such as tokenizer.json, found none")
    known: PreTrainedTokenizerBase = tokenizer
    return known


def as_chat(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> BatchEncoding:
    """The tokens of messages in the tokenizer's chat template, up to where the answer begins.

    Raises:
        ValueError: the template refuses them, such as a role that it does not know.
    """
    try:
        encoded: BatchEncoding = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **options
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return encoded


def continue_prompt(
    model: Any,
    prompt: BatchEncoding,
    *,
    max_new_tokens: int,
    temperature: float | None,
    **options: Any,
) -> Any:
    """What `model.generate` returns for a prompt; temperature 0 takes the likeliest token.

    Without a temperature, the checkpoint's generation_config.json says how tokens are chosen.
    """
    if temperature is not None:
        options["do_sample"] = temperature > 0
        options |= {"temperature": temperature or None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        return model.generate(
            **prompt.to(model.moeinf.cache.device),
            max_new_tokens=max_new_tokens,
            **options,
        )


def start_recording(model: Any, *, router: bool) -> Recorder:
    """Like `model.moeinf.cache.record`.

    Raises:
        UnsupportedError: a model of which nothing would be recorded; better said before it runs.
    """
    modules = model.moeinf.cache.store.modules
    if model.config.is_encoder_decoder and len({"decoder" in m.split(".") for m in modules}) > 1:
        raise UnsupportedError(
            f"{type(model).__name__}: its encoder and its decoder run apart: neither is recorded"
        )
    recorder: Recorder = model.moeinf.cache.record(router=router)
    return recorder


def _prefetch_metrics(stats: dict[str, Any]) -> dict[str, Any] | None:
    if stats["prefetch"] is None:
        return None
    moved = ("prefetch_bytes", "prefetch_useful_bytes", "prefetch_wasted_bytes")
    return {**stats["prefetch"], **{name: stats[name] for name in moved}}


class Clock(TextStreamer):
    """Streams text and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: TextIO | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stream is not None:
            self.stream.write(text + ("\n" if stream_end else ""))
            self.stream.flush()


def peak_memory() -> int:
    """The most memory this process has held resident, in bytes."""
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
