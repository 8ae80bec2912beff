"""Who may do what: tokens, hosts, origins, sizes and rates, checked before any route is reached.

    Host        loopback names, what `--host` and `--allow-host` name; an IP address where bound to all
    token       one to look, one to steer: cookie (HttpOnly, SameSite=Strict) or `Authorization: Bearer`
    POST        the steer token, JSON, at most 16 KiB, of our own Origin, not too many
    answers     Content-Security-Policy, no sniffing, no framing, no referrer; no CORS header is ever sent

A foreign site can neither read (no cookie crosses sites, no CORS) nor steer (Origin), nor rebind a name to this
machine (Host). Knows no run. Read next: `app.py`.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Right = Literal["steer", "view"]
LARGEST_BODY = 16 * 1024  # bytes
RATE, BURST = 10.0, 30.0
"""Posts a second that are taken for long, and how many at once."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Tokens:
    """The two secrets of a server."""

    steer: str
    view: str

    def right_of(self, token: str) -> Right | None:
        """What its bearer may do; None for nothing. Takes as long for a wrong token as for a right one."""
        given = token.encode("utf-8", "replace")
        steers = hmac.compare_digest(given, self.steer.encode())
        views = hmac.compare_digest(given, self.view.encode())
        return "steer" if steers else "view" if views else None


@dataclass
class Bucket:
    """A rate limit: `burst` at once, `rate` a second for long."""

    rate: float = RATE
    burst: float = BURST
    clock: Callable[[], float] = time.monotonic
    _level: float = field(init=False)
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._level, self._last = self.burst, self.clock()

    def take(self) -> float:
        """Take one; 0 where there was one, else the seconds until there is."""
        now = self.clock()
        self._level = min(self.burst, self._level + (now - self._last) * self.rate)
        self._last = now
        if self._level < 1.0:
            return (1.0 - self._level) / self.rate
        self._level -= 1.0
        return 0.0


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, error: str, **more: object) -> None:
        super().__init__(error)
        self.status = status
        self.body: Mapping[str, object] = {"error": error, **more}


@dataclass(frozen=True)
class Hosts:
    """The names under which this server may be asked for."""

    names: frozenset[str] = LOOPBACK
    any_address: bool = False
    """Whether every IP address will do: a name that was rebound is none."""

    def allow(self, host: str) -> bool:
        """
        >>> Hosts().allow("localhost:9000"), Hosts().allow("evil.example"), Hosts(any_address=True).allow("10.0.0.2:80")
        (True, False, True)
        """
        name = _name_of(host)
        return name in self.names or (self.any_address and _is_address(name))


class Guard:
    """The middleware that stands before everything."""

    def __init__(self, app: ASGIApp, tokens: Tokens, hosts: Hosts, cookie: str, bucket: Bucket | None = None) -> None:
        self.app = app
        self.tokens = tokens
        self.hosts = hosts
        self.cookie = cookie
        self.bucket = bucket or Bucket()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sending = _with_headers(send, self._new_cookie(scope))
        try:
            scope["right"] = self._admit(scope, headers)
            body = await _whole_body(receive) if scope["method"] == "POST" else None
        except Refused as refused:
            await JSONResponse(dict(refused.body), refused.status)(scope, receive, sending)
            return
        await self.app(scope, receive if body is None else _again(body, receive), sending)

    def _admit(self, scope: Scope, headers: Headers) -> Right:
        if not self.hosts.allow(headers.get("host", "")):
            raise Refused(403, "this server is not called so; use the address that it printed, or --allow-host NAME")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(405, "wanted GET or POST")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _is_visit(scope, headers):
            raise Refused(403, "a page of another site asked; nothing is said to it")
        right, bearer = self._right(scope, headers)
        if right is None:
            raise Refused(401, "wanted the token; open the address that `tether ui` printed")
        if scope["method"] == "POST":
            self._admit_post(headers, right, bearer)
        return right

    def _right(self, scope: Scope, headers: Headers) -> tuple[Right | None, bool]:
        """What the request may do, and whether it bears its token itself, which no foreign page can make it do."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.tokens.right_of(token.strip()), True
        if (given := _token_in_address(scope)) is not None:
            return self.tokens.right_of(given), False
        rights = map(self.tokens.right_of, _cookies(headers, self.cookie))
        return next(filter(None, rights), None), False

    def _admit_post(self, headers: Headers, right: Right, bearer: bool) -> None:
        origin = headers.get("origin")
        ours = origin is not None and origin.partition("://")[2] == headers.get("host")
        if not (ours or (origin is None and bearer)):
            raise Refused(
                403, "the request comes from another origin; only this page, or a program with the token, may"
            )
        if right != "steer":
            raise Refused(403, "this token may look and not steer; open the address with the steer token")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "wanted Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            raise Refused(413, f"wanted at most {LARGEST_BODY} bytes")
        if wait := self.bucket.take():
            raise Refused(429, f"too many requests; try again in {wait:.1f} s", retry_seconds=round(wait, 2))

    def _new_cookie(self, scope: Scope) -> str | None:
        """The cookie that a visit with a good token in its address is given."""
        token = _token_in_address(scope)
        if token is None or self.tokens.right_of(token) is None or scope["method"] != "GET":
            return None
        path = scope.get("root_path", "") + "/"
        return f"{self.cookie}={token}; HttpOnly; SameSite=Strict; Path={path}"


def _token_in_address(scope: Scope) -> str | None:
    """`?token=` of the page's own address; no other route reads it."""
    if scope["path"].removeprefix(scope.get("root_path", "")) not in ("", "/"):
        return None
    found = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
    return found[0] if found else None


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Whether somebody follows a link to the page itself."""
    here = scope["path"].removeprefix(scope.get("root_path", "")) in ("", "/")
    return here and scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"


def _cookies(headers: Headers, name: str) -> list[str]:
    """The values of our cookie. Programs on other ports of this machine set theirs in the same jar: what is malformed
    there, or of our name and none of ours, is passed over.
    """
    pairs = (part.partition("=") for sent in headers.getlist("cookie") for part in sent.split(";"))
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def _name_of(host: str) -> str:
    """The name of a Host header, without its port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _whole_body(receive: Receive) -> bytes:
    """The body, however it is cut into pieces; never more than the limit."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the request broke off")
        body += bytes(message.get("body", b""))
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"wanted at most {LARGEST_BODY} bytes")
        if not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """What was received, once more."""
    told = False

    async def give() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


def _with_headers(send: Send, cookie: str | None) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if "cache-control" not in headers:
                headers["Cache-Control"] = "no-store"
            if cookie is not None and message["status"] < 400:
                headers.append("Set-Cookie", cookie)
        await send(message)

    return sending


def parse_object(body: bytes) -> Mapping[str, object]:
    """A JSON object. Raises Refused (400) for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, f"got {type(value).__name__}; wanted a JSON object")
    return value
