"""A Hugging Face Hub of one repository on 127.0.0.1: the requests that huggingface_hub makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

NAME, GATED = "tiny/moe", "tiny/gated"
COMMIT = "5" * 40
REVISIONS = {"main", "v1", COMMIT}


class Hub:
    """`sent` has the bytes of each file that were sent, `tokens` what clients showed."""

    def __init__(self, folder: Path, port: int):
        self.files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self.endpoint = f"http://127.0.0.1:{port}"
        self.sent: dict[str, int] = {}
        self.tokens: set[str | None] = set()


@contextmanager
def hub_of(folder: Path) -> Iterator[Hub]:
    """Serves the files of `folder` as they are now."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(folder, server.server_address[1])  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.tokens.add(self.headers.get("Authorization"))
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "models", owner, model, *rest]:
                pass
            case [owner, model, "resolve", *rest]:
                rest = ["resolve", *rest]
            case _:
                return self._answer(404)
        name, revision = f"{owner}/{model}", rest[1] if len(rest) > 1 else "main"
        if name == GATED:
            return self._answer(403, {"X-Error-Code": "GatedRepo"})
        if name != NAME:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in REVISIONS:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        match rest:
            case ["tree", *_]:
                listing = [
                    {"type": "file", "path": path, "size": len(data), "oid": _sha(data)}
                    for path, data in hub.files.items()
                ]
                return self._answer(200, body=json.dumps(listing).encode())
            case ["resolve", _, *parts]:
                return self._send_file(hub, "/".join(parts))
        siblings = [{"rfilename": path} for path in hub.files]
        info = {"id": NAME, "sha": COMMIT, "siblings": siblings}
        self._answer(200, body=json.dumps(info).encode())

    def _send_file(self, hub: Hub, path: str) -> None:
        if path not in hub.files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        data = hub.files[path]
        heads = {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": COMMIT}
        status, size = 200, len(data)
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last or size) + 1]
            heads["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{size}"
            status = 206
        if self.command == "GET":
            hub.sent[path] = hub.sent.get(path, 0) + len(data)
        self._answer(status, heads, data)

    def _answer(self, status: int, heads: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for head, value in {"Content-Length": str(len(body)), **(heads or {})}.items():
            self.send_header(head, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
