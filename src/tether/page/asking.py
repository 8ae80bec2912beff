"""What the page asks of runs and of this machine: wishes, written into `control.db`, and jobs.

    POST …/commands   a wish for the trainer         POST …/fork, …/resume, /api/play   a process (`jobs.py`)

All of it is judged here before anything is written or started; the trainer judges a wish again. Who may ask at all is
`security.py`'s. Read next: `steering.py` (how a wish is judged).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tether.config import RunSettings
from tether.errors import RunError
from tether.page import facts
from tether.page.answers import Json, conflict
from tether.page.jobs import Jobs
from tether.page.library import Library, Shelf
from tether.page.reading import Reader
from tether.page.security import Refused, parse_object
from tether.steering import submit

MOST_PENDING = 200
SAVE_SECONDS = 60.0
"""How long a fork waits for the run to save itself."""


async def find(library: Library, request: Request) -> Shelf:
    """The run that a route names. Raises Refused (404) where there is none."""
    shelf = await library.find(request.path_params["id"])
    if shelf is None:
        raise Refused(404, "there is no such run")
    return shelf


@dataclass(frozen=True)
class Asking:
    """The routes that change something."""

    library: Library
    jobs: Jobs
    can_play: bool

    def routes(self) -> list[Route]:
        """All of them are POST."""
        return [
            Route("/api/runs/{id}/commands", self.command, methods=["POST"]),
            Route("/api/runs/{id}/fork", self.fork, methods=["POST"]),
            Route("/api/runs/{id}/resume", self.resume, methods=["POST"]),
            Route("/api/play", self.play, methods=["POST"]),
        ]

    async def command(self, request: Request) -> Response:
        """Write a wish down for the trainer."""
        shelf, wish = await find(self.library, request), parse_object(await request.body())
        if strange := sorted(wish.keys() - {"kind", "payload", "actor", "base"}):
            raise Refused(400, f"got {strange[0][:40]!r}; wanted kind, payload, actor, base")
        kind, actor, payload, base = (wish.get(key) for key in ("kind", "actor", "payload", "base"))
        actor, payload = "page" if actor is None else actor, {} if payload is None else payload
        if not isinstance(kind, str) or not isinstance(actor, str) or not isinstance(payload, dict):
            raise Refused(400, "wanted kind and actor as text, and payload as an object")
        if base is not None and (isinstance(base, bool) or not isinstance(base, int)):
            raise Refused(400, "wanted base as a whole number: the last command whose outcome was seen")

        def ask(reader: Reader) -> int:
            self._require_room(reader)
            return submit(reader.path, actor, kind, payload, facts.settings_now(reader), base=base)

        return Json({"id": await shelf.ask(conflict(ask)), "state": "pending"}, 202)

    def _require_room(self, reader: Reader) -> None:
        facts.require_alive(reader, self.library.clock())
        ruled = {one.command for one in reader.outcomes()}
        waiting = [command for command in reader.commands() if command.id not in ruled]
        if len([one for one in waiting if not one.has_expired(self.library.clock())]) >= MOST_PENDING:
            raise Refused(429, f"{MOST_PENDING} wishes wait for the trainer; wait for its next update", retry_seconds=5)

    async def fork(self, request: Request) -> Response:
        """Another run from here; a run that trains is saved first."""
        shelf, wish = await find(self.library, request), parse_object(await request.body())
        step = wish.get("step")
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise Refused(400, "wanted step as a whole number")
        if step is None:
            await self._save(shelf)
        return _started(lambda: self.jobs.fork(shelf.id, shelf.path, step, wish))

    async def _save(self, shelf: Shelf) -> None:
        """Ask a run that trains for a checkpoint and wait for it; one that is over has one."""

        def ask(reader: Reader) -> int | None:
            try:
                facts.require_alive(reader, self.library.clock())
            except RunError:
                return None
            return submit(reader.path, "page", "checkpoint", {}, RunSettings())

        command = await shelf.ask(ask)
        end = asyncio.get_running_loop().time() + SAVE_SECONDS
        while command is not None:
            if any(one.command == command for one in await shelf.ask(lambda reader: reader.outcomes())):
                return
            if asyncio.get_running_loop().time() > end:
                raise Refused(409, "the run did not save itself in time; try again, or name the step of a checkpoint")
            await asyncio.sleep(0.1)

    async def resume(self, request: Request) -> Response:
        """Go on with a run that was stopped or killed."""
        shelf = await find(self.library, request)
        state = await shelf.ask(self._state)
        if state not in ("stopped", "failed", "stale"):
            raise Refused(409, f"the run is {state}; only one that was stopped or killed can be gone on with")
        return _started(lambda: self.jobs.resume(shelf.id, shelf.path))

    async def play(self, request: Request) -> Response:
        """A run of the nano world, to play with."""
        if not self.can_play:
            raise Refused(403, "this server starts no runs")
        wish = parse_object(await request.body())
        return _started(lambda: self.jobs.play(wish))

    def _state(self, reader: Reader) -> str:
        return facts.standing(reader.heartbeat(), facts.update_seconds(reader), self.library.clock())


def _started(start: Callable[[], facts.Facts]) -> Response:
    try:
        return Json(start(), 202)
    except RunError as error:
        raise Refused(409, str(error)) from error
