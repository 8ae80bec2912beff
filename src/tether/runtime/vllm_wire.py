"""JSON over HTTP to one server, by TCP or by a socket in a private folder: what vLLM's own routes are spoken to with.

    Wire("http://host:8000") · Wire("unix:/run/folder/vllm.sock")
    wire.ask("POST", "/inference/v1/generate", {…}, seconds) → dict

Every fault is a WireError that tells whether the server was reached and what it said. Knows no vLLM and no model.
Read next: `vllm_server.py`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from tether.errors import ConfigError

UNIX = "unix:"
SAID = 300
"""Characters of a refusal that are repeated."""
KEY = "VLLM_API_KEY"
"""Environment variable that vLLM itself reads its key from."""


class WireError(Exception):
    """A question that was not answered; `status` is None where no server was there."""

    def __init__(self, told: str, status: int | None = None) -> None:
        super().__init__(told)
        self.status = status


class SilentError(WireError):
    """A server that is there, or may be, and did not answer in time."""


class _UnixConnection(HTTPConnection):
    """HTTP over a socket file, which only those who may enter its folder can speak to."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Wire:
    """Where a server listens. Any number of threads may ask at once; each question is a connection of its own."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError where this is no address."""
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if not self.address.startswith(UNIX) and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ConfigError(f"{address!r} is no address of a server; wanted http://host:port")

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None, seconds: float = 60.0) -> Any:
        """The server's answer, None where it is empty. Raises WireError."""
        connection = self._connect(seconds)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), _headers())
            reply = connection.getresponse()
            text = reply.read()
        except TimeoutError as fault:
            raise SilentError(f"{self.address}{path} gave no answer within {seconds:g} s") from fault
        except (OSError, HTTPException) as fault:
            raise WireError(f"{self.address} cannot be reached: {fault or type(fault).__name__}") from fault
        finally:
            connection.close()
        if reply.status >= 400:
            raise WireError(f"{path} was refused with HTTP {reply.status}: {_said(text)}", reply.status)
        try:
            return json.loads(text) if text else None
        except ValueError as fault:
            raise WireError(f"{path} answered with no JSON: {_said(text)}", reply.status) from fault

    def _connect(self, seconds: float) -> HTTPConnection:
        if self.address.startswith(UNIX):
            return _UnixConnection(self.address.removeprefix(UNIX), seconds)
        parts = urlsplit(self.address)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(str(parts.hostname), parts.port, timeout=seconds)


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _said(text: bytes) -> str:
    """A refusal in the server's words: vLLM's own form, or the body."""
    try:
        found = json.loads(text)
        said = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = text.decode(errors="replace").strip()
    return said if len(said) <= SAID else f"{said[:SAID]}…"
