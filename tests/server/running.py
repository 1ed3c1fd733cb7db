"""A server in this process, and clients of a few lines that show every byte."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from moeinf.server.run import Server
from moeinf.server.settings import Settings, bind

NAME = "pocket"


@dataclass
class Reply:
    """An HTTP response, as a client of a few lines reads it."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error, in OpenAI's shape."""
        document = json.loads(self.body)
        assert set(document) == {"error"}
        error: dict[str, Any] = document["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and isinstance(error["message"], str) and error["type"]
        return error


def read_reply(connection: socket.socket) -> Reply | None:
    """The next response; None where the server closes the connection without one."""
    stream = connection.makefile("rb")
    first = stream.readline()
    if not first:
        return None
    version, status, *_ = first.split()
    assert version == b"HTTP/1.1"
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(stream.readline(), 16):
            body += stream.read(size)
            stream.readline()
        stream.readline()
    else:
        body = stream.read(int(headers.get("content-length", 0)))
    return Reply(int(status), headers, body)


@dataclass
class Running:
    """A server that runs, and ways to talk to it."""

    address: str
    server: Server
    thread: threading.Thread
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.address}/v1", **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, data: bytes) -> Reply | None:
        """The answer to bytes of any kind."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_reply(connection)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        reply = self.raw(request(method, path, body, **headers))
        assert reply is not None
        return reply

    def post(self, path: str, document: Any) -> Reply:
        return self.ask("POST", path, json.dumps(document).encode())

    def metric(self, name: str) -> float:
        for line in self.ask("GET", "/metrics", **self.keys).body.decode().splitlines():
            if re.match(rf"{name}({{.*}})? ", line):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.01)


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """The bytes of a request; `None` as a header leaves it out."""
    known = {"host": "localhost"}
    if body is not None:
        known |= {"content-type": "application/json", "content-length": str(len(body))}
    known |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {known[name]}" for name in known)]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@contextmanager
def running(model: Any, tokenizer: Any, **options: Any) -> Iterator[Running]:
    """Runs a server in a thread, until the end of the block."""
    settings = Settings(name=NAME, port=0, **options)
    ready: list[str] = []
    server = Server(model, tokenizer, settings, ready.append)
    thread = threading.Thread(target=server.run, args=([bind(settings)],))
    thread.start()
    one = Running("", server, thread)
    one.until(lambda: bool(ready))
    one.address = ready[0]
    try:
        yield one
    finally:
        server.handle_exit(15, None)
        server.handle_exit(15, None)
        thread.join(20)
        server.scheduler.close(10)
        assert not thread.is_alive()
