"""What a server is told at its start: where it listens, and what it lets one client take."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits are per request, but for `parallel`, `queue` and `connections`."""

    name: str  # of the model, as clients call it
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    parallel: int = 4  # requests whose keys and values are kept at once
    queue: int = 64  # requests that may wait
    prompt_tokens: int = 4096
    new_tokens: int = 1024
    body_bytes: int = 1 << 20
    connections: int = 256
    header_seconds: float = 10  # for the head of a request to come
    body_seconds: float = 30  # for its body
    stall_seconds: float = 30  # for a client that takes none of its answer
    drain_seconds: float = 30  # for requests that run, once the server is to end

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty")
        if self.api_key is None and not self.is_local:
            raise ValueError(
                f"--host {self.host}: others can reach this address: give --api-key, or set "
                "MOEINF_API_KEY"
            )

    @property
    def is_local(self) -> bool:
        """Is the address of this machine alone?"""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def bind(settings: Settings) -> socket.socket:
    """Takes the address, so that one that cannot be had is known before a model is loaded.

    Nobody can connect before the server listens.
    """
    family, kind, proto, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM
    )[0]
    bound = socket.socket(family, kind, proto)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"{settings.host} port {settings.port}: {error.strerror}") from error
    return bound
