"""The routes. Every answer that is an error has OpenAI's shape."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from moeinf.server.client import Client
from moeinf.server.edge import Edge, answer
from moeinf.server.errors import Refused
from moeinf.server.job import Ended, Job, Piece
from moeinf.server.metrics import Metrics
from moeinf.server.prompts import Prompts
from moeinf.server.replies import END_OF_STREAM, ChatReply, CompletionReply, Reply, as_event
from moeinf.server.requests import ChatRequest, Common, CompletionRequest, in_words
from moeinf.server.scheduler import Scheduler
from moeinf.server.settings import Settings

PAGE = Path(__file__).with_name("page.html")
# The page may load and ask nothing but this server, and no other page may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_LEFT = 499  # nobody reads it; it names the request in the metrics


def build_app(
    settings: Settings, prompts: Prompts, scheduler: Scheduler, metrics: Metrics, fingerprint: str
) -> Any:
    """The application: the routes behind the edge."""
    app = FastAPI(title="moeinf", docs_url=None, redoc_url=None)
    tokenizing = ThreadPoolExecutor(1, "moeinf-tokenizer")
    tokenizer = prompts.tokenizer
    card = {
        "id": settings.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "moeinf",
    }

    @app.get("/", response_class=HTMLResponse)
    def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        if scheduler.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> dict[str, Any]:
        check_model(model)
        return card

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        reply = CompletionReply(tokenizer, settings.name, fingerprint)
        return await respond(request, asked, reply, prompts.of_text)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        reply = ChatReply(tokenizer, settings.name, fingerprint)
        return await respond(request, asked, reply, prompts.of_messages)

    def check_model(name: str) -> None:
        if name != settings.name:
            raise Refused(
                404,
                f"model: expected {settings.name!r}, found {name!r:.200}",
                param="model",
                code="model_not_found",
            )

    async def respond(request: Request, asked: Any, reply: Reply, encode: Any) -> Response:
        check_model(asked.model)
        asked.refuse_unknown()
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(tokenizing, encode, asked)
        client = Client(request, scheduler)
        job = Job(
            prompt=ids,
            max_new_tokens=prompts.room(ids, asked.limit()),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            send=client.send,
            sampling=sampling_of(asked),
            stops=asked.stops(),
            top_logprobs=asked.top_logprobs_asked(),
        )
        if not await client.begin(job):
            return Response(status_code=CLIENT_LEFT)
        if not asked.stream:
            return await whole(client, job, reply)
        wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = stream(client, job, reply, wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    app.add_exception_handler(Refused, lambda _, error: answer(error))  # type: ignore[arg-type]
    app.add_exception_handler(
        RequestValidationError,
        lambda _, error: answer(in_words(error.errors())),  # type: ignore[attr-defined]
    )
    app.add_exception_handler(
        HTTPException,
        lambda _, error: answer(Refused(error.status_code, error.detail)),  # type: ignore[attr-defined]
    )
    app.add_exception_handler(
        Exception, lambda *_: answer(Refused(500, "the server failed; its log says how"))
    )
    return Edge(app, settings, metrics.request)


async def whole(client: Client, job: Job, reply: Reply) -> Response:
    """The answer in one document."""
    text, chances = "", []
    async for event in client.events():
        if isinstance(event, Piece):
            text += event.text
            chances += event.chances
        elif isinstance(event, Ended):
            known = None if job.top_logprobs is None else chances
            usage = usage_of(job, event)
            return JSONResponse(reply.whole(text, known, event.reason, usage))
    return Response(status_code=CLIENT_LEFT)


async def stream(client: Client, job: Job, reply: Reply, wants_usage: bool) -> AsyncIterator[bytes]:
    """The answer piece by piece. An error after the first byte is an event of its own."""
    no_usage = {"usage": None} if wants_usage else {}
    with_chances = job.top_logprobs is not None
    begin = reply.begin()
    if begin is not None:
        yield as_event({**begin, **no_usage})
    try:
        async for event in client.events():
            if isinstance(event, Piece):
                chances = event.chances if with_chances else None
                yield as_event({**reply.chunk(event.text, chances, None), **no_usage})
            elif isinstance(event, Ended):
                yield as_event({**reply.chunk("", None, event.reason), **no_usage})
                if wants_usage:
                    yield as_event(reply.usage_chunk(usage_of(job, event)))
    except Refused as refused:
        yield as_event(refused.body())
    yield END_OF_STREAM


def usage_of(job: Job, ended: Ended) -> dict[str, int]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": ended.new_tokens,
        "total_tokens": len(job.prompt) + ended.new_tokens,
    }


def sampling_of(asked: Common) -> dict[str, Any]:
    """Arguments of `generate`. A request that says nothing takes the checkpoint's own settings; one
    that gives temperature or top_p takes OpenAI's default, 1, for the other."""
    if asked.temperature is None and asked.top_p is None:
        return {}
    temperature = 1.0 if asked.temperature is None else asked.temperature
    if temperature < LEAST_TEMPERATURE:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_p = 1.0 if asked.top_p is None else asked.top_p
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": None}


LEAST_TEMPERATURE = 1e-5  # below it logits by temperature may overflow: the likeliest token
