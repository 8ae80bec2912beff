"""`tether ui [RUNS]`: serves the page of a folder of runs.

The socket listens and its address is printed before anything heavy is imported. Bound to this machine alone unless
`--host` and an explicit token say otherwise. Ctrl-C closes open streams and ends; training goes on. Read next: app.py.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tether.errors import ConfigError, RunError
from tether.places import cache_folder

PORT = 8765
PORTS_TRIED = 20
LOOPBACK = "127.0.0.1"
TOKEN_BYTES = 24
SHORTEST_TOKEN = 16
GRACE_SECONDS = 2


def main(
    runs: Path = Path("runs"),
    /,
    port: int | None = None,
    host: str = LOOPBACK,
    token: str | None = None,
    view_token: str | None = None,
    allow_host: tuple[str, ...] = (),
    root_path: str = "",
    play: bool = False,
    browser: bool = True,
) -> None:
    """Serve the page of a folder of runs, live while they train and the same when they are over.

    Args:
        runs: The folder that holds the run folders, or one run's folder.
        port: Where to listen; by default 8765 or the next free one.
        host: Address to bind to; beyond this machine it wants a token of your own.
        token: Who bears it may steer; by default a random one.
        view_token: Who bears it may look; by default a random one.
        allow_host: Further names under which the server may be asked for, as behind a proxy.
        root_path: The path prefix below which a proxy serves the page.
        play: Start a live run of the nano world at once.
        browser: Open the page; `--no-browser` prints the address only.
    """
    check_host(host, token)
    sockets = [listen(host, port)]
    bound = sockets[0].getsockname()[1]
    keys = tokens_of(bound, token, view_token)
    address = f"http://{_shown(host)}:{bound}{root_path}/"
    print(f"{address}?token={keys[0]}\nto look only: {address}?token={keys[1]}", flush=True)
    serve(Serving(runs, host, bound, keys, allow_host, root_path, play), sockets, address if browser else None)


@dataclass(frozen=True)
class Serving:
    """What is served, and to whom."""

    runs: Path
    host: str
    port: int
    tokens: tuple[str, str]
    """To steer, and to look."""
    allow_host: tuple[str, ...] = ()
    root_path: str = ""
    play: bool = False


def serve(what: Serving, sockets: Sequence[socket.socket], address: str | None) -> None:
    """Serve until Ctrl-C; open `address` in a browser, if given."""
    import uvicorn

    from tether.page.app import Page
    from tether.page.jobs import Jobs
    from tether.page.library import Library
    from tether.page.security import LOOPBACK as LOCAL_NAMES
    from tether.page.security import Hosts, Tokens

    library = Library(what.runs)
    jobs = Jobs(library.root)
    names = LOCAL_NAMES | {what.host, socket.gethostname().lower(), *what.allow_host}
    hosts = Hosts(frozenset(names) if not is_loopback(what.host) else LOCAL_NAMES | set(what.allow_host),
                  any_address=not is_loopback(what.host))  # fmt: skip
    page = Page(library, jobs, Tokens(*what.tokens), hosts, f"tether-{what.port}")
    if what.play:
        jobs.play({})
    config = uvicorn.Config(
        page.app(), log_level="warning", access_log=False, server_header=False, root_path=what.root_path,
        timeout_graceful_shutdown=GRACE_SECONDS, proxy_headers=False,
    )  # fmt: skip
    if address is not None and _has_screen():
        webbrowser.open(f"{address}?token={what.tokens[0]}")
    with suppress(KeyboardInterrupt):  # uvicorn passes Ctrl-C on when all is closed
        uvicorn.Server(config).run(list(sockets))
    print("the page is closed; what trains goes on", file=sys.stderr)


def check_host(host: str, token: str | None) -> None:
    """Raise ConfigError where the server would be reached from elsewhere without a token of the user's own."""
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"the token has {len(token)} signs; wanted at least {SHORTEST_TOKEN}")
    if not is_loopback(host) and token is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines; choose a token for it: --token "
            f"{secrets.token_urlsafe(TOKEN_BYTES)}. Safer: keep it local and use ssh -L {PORT}:localhost:{PORT}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("box.example")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket; without a port the first free one from 8765 on. Raises RunError where none can be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for tried in (port,) if port is not None else range(PORT, PORT + PORTS_TRIED):
        one = socket.socket(family, socket.SOCK_STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, tried))
            one.listen(128)
        except OSError as error:
            one.close()
            last = error
        else:
            one.set_inheritable(False)
            return one
    wanted = port if port is not None else f"{PORT} to {PORT + PORTS_TRIED - 1}"
    raise RunError(f"{host} port {wanted}: {last.strerror or last}; choose another --port or --host")


def tokens_of(port: int, steer: str | None, view: str | None) -> tuple[str, str]:
    """The tokens of this port: those given, else those kept from the last time, so that open tabs go on, else new ones.

    They are kept in a file that only its owner can read.
    """
    kept = _kept(cache_folder() / "page" / f"{port}.json")
    tokens = (
        steer or kept.get("steer") or secrets.token_urlsafe(TOKEN_BYTES),
        view or kept.get("view") or secrets.token_urlsafe(TOKEN_BYTES),
    )
    if steer is None or view is None:
        _keep(cache_folder() / "page" / f"{port}.json", tokens)
    return tokens


def _kept(path: Path) -> dict[str, str]:
    """What was kept; nothing where somebody else could have read or written it."""
    try:
        seen = path.stat()
        if seen.st_mode & 0o077 or (hasattr(os, "getuid") and seen.st_uid != os.getuid()):
            return {}
        told = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    known = told if isinstance(told, dict) else {}
    return {key: text for key, text in known.items() if isinstance(text, str) and len(text) >= SHORTEST_TOKEN}


def _keep(path: Path, tokens: tuple[str, str]) -> None:
    text = json.dumps({"steer": tokens[0], "view": tokens[1]})
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(text)
    except OSError:
        return  # a cache that cannot be written costs an open tab its next visit, no more


def _shown(host: str) -> str:
    """The host as an address has it."""
    return f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host


def _has_screen() -> bool:
    """Whether a browser would open a window, and not take over the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
