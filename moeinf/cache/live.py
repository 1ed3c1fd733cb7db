"""Statistics of a running process, for `moeinf top` and for the metrics of runtimes.

    process with a cache                    who asks
    a thread waits in accept()   <- connect -
    checks the user, reads counters - JSON ->    until the end of the stream

The socket is in the abstract namespace of Linux: it has no file, so nothing stays behind when a
process ends, and it costs nothing until someone asks. Others than the same user and root get no
answer. Processes of other network namespaces (containers) are not seen.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeinf.errors import UnsupportedError

SECONDS_TO_ANSWER = 5.0
_logger = logging.getLogger("moeinf.live")
_listening: socket.socket | None = None
_starting = threading.Lock()


def listen(caches: Mapping[str, Any]) -> None:
    """Answers for `caches` from now on, once per process. A machine without it is no error."""
    global _listening
    with _starting:
        if _listening is not None:
            return
        _listening = socket.socket(socket.AF_UNIX)
        try:
            _listening.bind(_address(os.getuid(), os.getpid()))
            _listening.listen(8)
        except OSError as error:
            _logger.info("`moeinf top` will not see this process: %s", error)
            return
        answering = threading.Thread(
            target=_answer_all, args=(_listening, caches), name="moeinf-live", daemon=True
        )
        answering.start()


def running(below: int | None = None) -> list[int]:
    """The processes of this user that answer, by their ids; or that one and those it started."""
    pattern = re.compile(rf"@moeinf-{os.getuid()}-(\d+)$", re.M)
    try:
        found = {int(pid) for pid in pattern.findall(Path("/proc/net/unix").read_text())}
        return sorted(pid for pid in found if below is None or below in _ancestors(pid))
    except OSError:
        return []


def _ancestors(pid: int) -> Iterator[int]:
    """The process itself, the one that started it, and so on."""
    while pid > 0:
        yield pid
        with suppress(OSError):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            continue
        return


def ask(pid: int) -> dict[str, Any]:
    """What that process says of itself and its caches. Raises OSError where it does not answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS_TO_ANSWER)
        connection.connect(_address(os.getuid(), pid))
        if _user_of(connection) != os.getuid():
            raise PermissionError(f"process {pid} is another user's")
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    if not parts:
        raise ConnectionError(f"process {pid} gave no answer")
    return dict(json.loads(b"".join(parts)))


def _address(user: int, pid: int) -> str:
    return f"\0moeinf-{user}-{pid}"


def _user_of(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(user)


def _answer_all(listening: socket.socket, caches: Mapping[str, Any]) -> None:
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(SECONDS_TO_ANSWER)
            try:
                if _user_of(connection) in (os.getuid(), 0):
                    connection.sendall(json.dumps(_report(caches)).encode())
            except Exception as error:  # the next one that asks is answered
                _logger.warning("a question of `moeinf top` failed: %s", error)


def _report(caches: Mapping[str, Any]) -> dict[str, Any]:
    found = []
    for cache in list(caches.values()):
        with suppress(UnsupportedError):  # made before this process was forked
            found.append(_describe(cache))
    return {
        "pid": os.getpid(),
        "command": sys.orig_argv,
        "seconds": time.monotonic(),
        "caches": found,
    }


def _describe(cache: Any) -> dict[str, Any]:
    """The counters of an `ExpertCache`, and which one it is."""
    store = cache.store
    path = store.checkpoint.path if hasattr(store, "checkpoint") else "experts in memory"
    return {
        "name": cache.name,
        "checkpoint": str(path),
        "nbytes": cache.nbytes,
        "experts": store.num_layers * store.num_experts,
        **cache.stats(),
    }


def _forget_after_fork() -> None:
    """The thread is the parent's. So is the name, which must end with the parent."""
    global _listening, _starting
    if _listening is not None:
        _listening.close()
    _listening, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
