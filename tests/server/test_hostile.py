"""Bad, huge, slow and vanishing requests: a clear status each, and nothing for others to notice."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import openai
import pytest
from fuzzing import fuzzed_request
from running import NAME, Running, read_reply, request, running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"model": NAME, "prompt": "import os\n", "max_tokens": 400, "ignore": None}


@pytest.fixture(autouse=True)
def others_are_unaffected(served: Running) -> Iterator[None]:
    """After each test nothing runs, and the next client is served."""
    yield
    served.until(lambda: served.server.scheduler.running == 0)
    answer = served.client().completions.create(model=NAME, prompt="import", max_tokens=1)
    assert answer.usage.completion_tokens == 1


def never_ends(**more: Any) -> bytes:
    """A request that runs for long: no end token stops it before its limit."""
    return json.dumps({**LONG, "temperature": 0, **more}).encode()


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", "found 'hot'"),
        ({"temperature": -1}, "temperature", "found -1"),
        ({"temperature": 2.5}, "temperature", "found 2.5"),
        ({"top_p": 1.5}, "top_p", "found 1.5"),
        ({"max_tokens": 0}, "max_tokens", "found 0"),
        ({"max_tokens": 1.5}, "max_tokens", "found 1.5"),
        ({"max_tokens": True}, "max_tokens", "found True"),
        ({"seed": 2**64}, "seed", "found 18446744073709551616"),
        ({"stop": [""]}, "stop", "found ''"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stream": "yes"}, "stream", "found 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"prompt": ""}, "prompt", "found none"),
        ({"prompt": []}, "prompt", "found none"),
        ({"prompt": ["a", "b"]}, "prompt", "at most 1 item"),
        ({"prompt": [3072]}, "prompt", "below 3072, found 3072"),
        ({"prompt": [-1]}, "prompt", "found -1"),
        ({"prompt": None}, "prompt", ""),
        ({"model": None}, "model", "found None"),
        ({"n": 2}, "n", "nothing but 1, found 2"),
        ({"echo": True}, "echo", "nothing but False, found True"),
        ({"presence_penalty": 0.5}, "presence_penalty", "found 0.5"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "nothing but {}"),
        ({"frobnicate": 1}, "frobnicate", "knows no such parameter"),
        ({"logprobs": 21}, "logprobs", "found 21"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_its_name(
    served: Running, change: dict[str, Any], param: str, message: str
) -> None:
    reply = served.post(COMPLETIONS, {"model": NAME, "prompt": "a", **change})
    assert reply.status == 400
    error = reply.error()
    assert error["param"].startswith(param) and message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),  # there is no template
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages.0.mood"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_a_chat_cannot_be_is_refused_by_its_name(
    served: Running, change: dict[str, Any], param: str
) -> None:
    messages = [{"role": "user", "content": "a"}]
    reply = served.post(CHAT, {"model": NAME, "messages": messages, **change})
    assert reply.status == 400
    assert reply.error()["param"].startswith(param)


def test_defaults_and_ignored_parameters_are_accepted(served: Running) -> None:
    defaults = {"n": 1, "echo": False, "presence_penalty": 0.0, "logit_bias": None, "user": "me"}
    body = {"model": NAME, "prompt": "a", "max_tokens": 1, "stop": None, **defaults}
    assert served.post(COMPLETIONS, body).status == 200
    answer = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}
    messages = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "c"}]
    defaults = {"response_format": {"type": "text"}, "tools": [], "metadata": {"a": "b"}}
    body = {"model": NAME, "messages": messages, "max_tokens": 1, **defaults}
    assert served.post(CHAT, body).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "pocket", "prompt": "\\ud800", "messages": '
        b'[{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "prompt": "a", "\\ud800": 1, "messages": "\\ud800"}',
        b'{"model": "pocket", "prompt": "a", "temperature": NaN}',
        b'{"model": "pocket", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 19_000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_a_body_that_is_no_request_is_refused(served: Running, body: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        reply = served.ask("POST", path, body)
        assert reply.status == 400
        assert reply.error()["type"] == "invalid_request_error"


def test_a_body_of_another_type_is_refused(served: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        reply = served.ask("POST", COMPLETIONS, never_ends(), content_type=kind)
        assert reply.status == 415 and "application/json" in reply.error()["message"]


def test_routes_that_are_not_there_and_methods_that_do_not_fit(served: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/embeddings", 404),
        ("POST", "/reset", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models/pocket", 405),
        ("GET", "/docs", 404),
    ):
        reply = served.ask(method, path, b"{}" if method == "POST" else None)
        assert reply.status == status
        reply.error()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(served: Running) -> None:
    declared = request("POST", COMPLETIONS, b"", content_length="99999999999")
    reply = served.raw(declared)
    assert reply is not None and reply.status == 413
    assert "20000 bytes" in reply.error()["message"]
    whole = served.ask("POST", COMPLETIONS, b" " * 30_000)
    assert whole.status == 413 and whole.error()["code"] == "body_too_large"
    chunked = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + (b"2000\r\n" + b" " * 0x2000 + b"\r\n") * 3
    )
    reply = served.raw(chunked)
    assert reply is not None and reply.status == 413


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # without Host
        b"GET  / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: " + b"b" * 200_000,
        b"\r\n\r\n\x00\x00\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_not_http_is_refused_in_the_same_shape(served: Running, data: bytes) -> None:
    reply = served.raw(data)
    assert reply is not None and reply.status in (400, 415)
    reply.error()


def test_a_page_of_another_origin_gets_nothing(served: Running) -> None:
    assert served.ask("GET", "/v1/models", host="evil.example").status == 400
    assert served.ask("GET", "/v1/models", host="127.0.0.1:1234").status == 200
    assert served.ask("GET", "/v1/models", host="[::1]:1234").status == 200
    reply = served.ask("OPTIONS", COMPLETIONS, origin="http://evil.example")
    assert "access-control-allow-origin" not in reply.headers


def test_slow_clients_are_told_so(served: Running) -> None:
    with served.connect() as head, served.connect() as body, served.connect() as silent:
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: loc")
        body.sendall(request("POST", COMPLETIONS, never_ends())[:-20])
        for connection, what in ((head, "head"), (body, "body"), (silent, "head")):
            reply = read_reply(connection)
            assert reply is not None and reply.status == 408
            assert f"the {what} " in reply.error()["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(served: Running, stream: bool) -> None:
    scheduler = served.server.scheduler
    cancelled = served.metric("moeinf_cancelled_requests_total")
    before = served.metric("moeinf_generated_tokens_total")
    with served.connect() as connection:
        connection.sendall(request("POST", COMPLETIONS, never_ends(stream=stream)))
        if stream:
            connection.recv(100)
        served.until(lambda: scheduler.running == 1)
    served.until(lambda: scheduler.running == 0)
    assert served.metric("moeinf_cancelled_requests_total") == cancelled + 1
    assert served.metric("moeinf_generated_tokens_total") < before + 400


def test_a_client_that_leaves_the_queue_never_runs(served: Running) -> None:
    scheduler = served.server.scheduler
    with served.connect() as last:
        running = [served.connect() for _ in range(4)]
        for connection in running:
            connection.sendall(request("POST", COMPLETIONS, never_ends()))
        served.until(lambda: scheduler.running == 4)
        last.sendall(request("POST", COMPLETIONS, never_ends()))
        served.until(lambda: scheduler.waiting == 1)
    served.until(lambda: scheduler.waiting == 0)
    assert scheduler.running == 4
    for connection in running:
        connection.close()


def test_a_full_queue_refuses_the_next_one(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, parallel=1, queue=1) as small:
        scheduler = small.server.scheduler
        taken = [small.connect() for _ in range(2)]
        for count, connection in enumerate(taken):
            connection.sendall(request("POST", COMPLETIONS, never_ends()))
            small.until(lambda wanted=count: (scheduler.running, scheduler.waiting) == (1, wanted))
        with pytest.raises(openai.RateLimitError, match="as many as may") as refused:
            small.client().completions.create(model=NAME, prompt="a")
        assert refused.value.code == "queue_full"
        assert refused.value.response.headers["retry-after"] == "1"
        for connection in taken:
            connection.close()


def test_too_many_connections_and_answers_that_nobody_takes(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, connections=3, stall_seconds=0.5) as small:
        held = [small.connect() for _ in range(3)]
        reply = small.raw(b"")
        assert reply is not None and reply.status == 503
        reply.error()
        held.pop().close()
        held.pop().close()
        small.until(lambda: len(small.server.server_state.connections) == 1)
        state = small.server.server_state
        deaf = held.pop()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(2000):  # it never reads, until the server can write no more
            done = state.total_requests
            if not state.connections:
                break
            with suppress(ConnectionError):
                deaf.sendall(request("GET", "/"))
            small.until(lambda done=done: state.total_requests > done or not state.connections)
        assert not state.connections
        deaf.close()


def test_requests_without_end_in_one_connection_are_cut_off(served: Running) -> None:
    with served.connect() as greedy:
        greedy.sendall(request("POST", COMPLETIONS, never_ends()))
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                greedy.sendall(request("GET", "/health") * 100)


def test_a_server_with_a_key_asks_for_it(model: Any, tokenizer: Any) -> None:
    with running(model, tokenizer, api_key="s3cret") as locked:
        for key in ("none", "s3cretx", "S3CRET", "s3cre", ""):
            reply = locked.ask("GET", "/v1/models", authorization=f"Bearer {key}")
            assert reply.status == 401 and reply.error()["code"] == "invalid_api_key"
        assert locked.ask("GET", "/metrics").status == 401
        assert locked.ask("GET", "/metrics", authorization="Basic s3cret").status == 401
        with pytest.raises(openai.AuthenticationError, match="expected the API key"):
            locked.client(api_key="wrong").models.list()
        assert locked.ask("GET", "/health", host="any.example").status == 200
        assert locked.client(api_key="s3cret").models.list().data[0].id == NAME


def test_requests_at_random_all_get_an_answer(served: Running, seed: int) -> None:
    draws = [random.Random(seed + number) for number in range(200)]

    def ask(draw: random.Random) -> None:
        data = fuzzed_request(draw, NAME)
        with served.connect() as connection:
            connection.sendall(data)
            reply = read_reply(connection)
        assert reply is not None and 200 <= reply.status < 500, (seed, data)
        if reply.status >= 400 and reply.body:  # HEAD has no body
            reply.error()

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(ask, draws):
            pass
