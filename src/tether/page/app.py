"""The routes of the page that read run folders; those that change something are in `asking.py`.

    Page(library, jobs, …).app()  →  a Starlette application behind `security.Guard`

Each question to a run is asked in the run's own thread. Every shape stands in docs/page-api.md. Read next: `facts.py`
(what a run is said to be), `stream.py` (what is new), `security.py` (who may).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from tether.database import to_json
from tether.errors import TetherError
from tether.page import facts
from tether.page.answers import HANDLERS, Json, number
from tether.page.asking import Asking, find
from tether.page.history import as_lists, pack, thin
from tether.page.jobs import Jobs
from tether.page.library import GLANCE, Library, Shelf, Slow
from tether.page.reading import Reader
from tether.page.samples import samples
from tether.page.security import Bucket, Guard, Hosts, Refused, Tokens
from tether.page.stream import MOST_RUNS, Stream, read_cursors
from tether.page.sweeps import gather, place
from tether.page.told import (
    cached_verdict,
    catch_up,
    chosen,
    failures_facts,
    ghost_of,
    last_word,
    learn_text,
    lengths,
    metrics_facts,
    session_facts,
    word_of,
)

STATIC = Path(__file__).with_name("static")
WIDTH, WIDEST = 800, 4000
"""Columns of pixels that a curve is thinned to."""
LAST_STEP = 2**62
MOST_STREAMS = 100
"""Tabs that listen at once; each looks at its runs five times a second."""
SCAN_SECONDS = 2.0
PING_SECONDS = 10
GRACE_SECONDS = 1.0
"""For a stream to end when the server does."""
NOT_BUILT = """<!doctype html><meta charset="utf-8"><title>tether</title>
<h1>The page is not built</h1><p>The server runs and answers: <a href="api/runs">api/runs</a>.</p>
<p>Build the page once: <code>python -m tether.page.build</code>, then load this address again.</p>"""


@dataclass
class Page:
    """One server's page."""

    library: Library
    jobs: Jobs
    tokens: Tokens
    hosts: Hosts
    cookie: str
    static: Path = STATIC
    can_play: bool = True
    bucket: Bucket = field(default_factory=Bucket)
    streams: int = 0
    """Those that are open."""
    _version: int = 0
    """Changes with the list of runs."""
    _seen: object = None

    def app(self) -> Guard:
        """The application, behind its guard."""
        routes = [
            Route("/", self.index),
            Route("/api/session", self.session),
            Route("/api/runs", self.runs),
            Route("/api/runs/{id}", self.run),
            Route("/api/runs/{id}/history", self.history),
            Route("/api/runs/{id}/samples", self.samples),
            Route("/api/runs/{id}/verdict", self.verdict),
            Route("/api/runs/{id}/events", self.events),
            Route("/api/runs/{id}/commands", self.commands, methods=["GET"]),
            Route("/api/runs/{id}/schedule.yaml", self.schedule),
            Route("/api/runs/{id}/ghost", self.ghost),
            Route("/api/sweeps", self.sweeps),
            Route("/api/learn", self.learn),
            Route("/api/metrics", self.metrics),
            Route("/api/failures", self.failures),
            Route("/api/jobs", self.all_jobs),
            Route("/api/stream", self.stream),
            *Asking(self.library, self.jobs, self.can_play).routes(),
            Route("/{name}", self.asset),
        ]
        app = Starlette(routes=routes, exception_handlers=dict(HANDLERS), lifespan=self._lifespan)
        return Guard(app, self.tokens, self.hosts, self.cookie, self.bucket)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        task = asyncio.create_task(self._scan())
        yield
        task.cancel()

    async def _scan(self) -> None:
        """Look for new runs every two seconds."""
        while True:
            await catch_up(await self.library.scan())
            await asyncio.sleep(SCAN_SECONDS)

    def _lists(self) -> tuple[int, list[object]]:
        jobs = self.jobs.facts()
        words = [(shelf.id, last_word(shelf)) for shelf in self.library.shelves()]
        seen = (words, [job["state"] for job in jobs if isinstance(job, dict)])
        if seen != self._seen:
            self._seen, self._version = seen, self._version + 1
        return self._version, jobs

    # ── the page itself ─────────────────────────────────────────────────────────────────────────────────────────────
    async def index(self, request: Request) -> Response:
        """The built page, or how to build it."""
        del request
        file = self.static / "index.html"
        return HTMLResponse(file.read_bytes() if file.is_file() else NOT_BUILT)

    async def asset(self, request: Request) -> Response:
        """The script or style sheet of the build, by its name alone."""
        name = request.path_params["name"]
        known = {path.name: path for path in self.static.glob("*.*") if path.is_file()}
        if name not in known:
            raise Refused(404, "there is no such file")
        return FileResponse(known[name], headers={"Cache-Control": "no-cache"})

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────
    async def session(self, request: Request) -> Response:
        """What this reader may do here."""
        may = request.scope["right"] == "steer"
        return Json(session_facts(self.library, may, may and self.can_play))

    async def runs(self, request: Request) -> Response:
        """All runs, the newest first; one whose disk does not answer holds up no other."""
        del request
        lines = await asyncio.gather(*(self._line(shelf) for shelf in await self.library.scan()))
        lines.sort(key=lambda line: -facts.seconds_of(line["created"]))
        return Json({"root": str(self.library.root), "runs": lines})

    async def _line(self, shelf: Shelf, patience: float = GLANCE) -> facts.Facts:
        try:
            shelf.known = await shelf.ask(lambda reader: self._summary(reader, shelf), patience)
        except Slow as error:
            return facts.unreadable(shelf.id, shelf.name, "slow", str(error), shelf.known)
        except TetherError as error:
            return facts.unreadable(shelf.id, shelf.name, "unreadable", str(error), {})
        return dict(shelf.known)

    def _summary(self, reader: Reader, shelf: Shelf) -> facts.Facts:
        line = facts.summary(reader, shelf.id, shelf.name, self.library.clock())
        return line | {"verdict": word_of(shelf, reader)}

    async def run(self, request: Request) -> Response:
        """Everything of a run that is small."""
        shelf = await find(self.library, request)

        def ask(reader: Reader) -> facts.Facts:
            return facts.whole(reader, self._summary(reader, shelf), self.library.clock())

        return Json(await shelf.ask(ask))

    async def history(self, request: Request) -> Response:
        """Curves, thinned to the pixels."""
        shelf, query = await find(self.library, request), request.query_params
        width = number(query.get("width"), WIDTH, 1, WIDEST)
        start, end = (
            number(query.get(key), default, 0, LAST_STEP) for key, default in (("from", 0), ("to", LAST_STEP))
        )
        wanted = [name for name in query.get("names", "").split(",") if name]
        as_json = query.get("format") == "json"

        def ask(reader: Reader) -> bytes:
            cursor, curves = reader.curves(chosen(reader.names(), wanted), start, end)
            thinned, of = {name: thin(curve, width) for name, curve in curves.items()}, lengths(curves)
            told = f"{shelf.id}@{cursor}"
            return to_json(as_lists(told, thinned, of)).encode() if as_json else pack(told, thinned, of)

        kind = "application/json" if as_json else "application/octet-stream"
        return Response(await shelf.ask(ask), media_type=kind)

    async def samples(self, request: Request) -> Response:
        """Samples of a step, or of a row through time."""
        shelf, query = await find(self.library, request), request.query_params
        split = query.get("split", "probe")
        if split not in ("probe", "train"):
            raise Refused(400, f"got {split[:20]!r} as a split; wanted probe or train")
        step, row = (None if key not in query else number(query[key], 0, 0, LAST_STEP) for key in ("step", "row"))
        return Json(await shelf.ask(lambda reader: samples(reader, split, step, row)))  # type: ignore[arg-type]

    async def verdict(self, request: Request) -> Response:
        """Is the string attached?"""
        shelf = await find(self.library, request)
        return Json(await shelf.ask(lambda reader: cached_verdict(shelf, reader)))

    async def events(self, request: Request) -> Response:
        """What happened."""
        shelf = await find(self.library, request)
        after = number(request.query_params.get("after"), 0, 0, LAST_STEP)
        found = await shelf.ask(lambda reader: reader.events(after))
        return Json({"events": [asdict(event) for event in found]})

    async def commands(self, request: Request) -> Response:
        """What was asked of the run, and what became of it."""
        return Json(await (await find(self.library, request)).ask(facts.ledger))

    async def schedule(self, request: Request) -> Response:
        """The steered knobs as YAML."""
        shelf = await find(self.library, request)
        told = await shelf.ask(facts.ledger)
        return PlainTextResponse(facts.schedule_yaml(shelf.name, told["schedule"]), media_type="text/yaml")  # type: ignore[arg-type]

    async def ghost(self, request: Request) -> Response:
        """The best that the reward model could give at each β."""
        shelf = await find(self.library, request)
        return Json(await shelf.ask(lambda reader: ghost_of(reader)))

    async def sweeps(self, request: Request) -> Response:
        """Runs that differ in β alone."""
        del request
        shelves = await self.library.scan()
        return Json({"sweeps": gather(await asyncio.gather(*(self._place(shelf) for shelf in shelves)))})

    async def _place(self, shelf: Shelf) -> facts.Facts | None:
        try:
            return await shelf.ask(
                lambda reader: shelf.once("place", reader.version(), lambda: place(reader, shelf.id))
            )
        except TetherError:
            return None

    async def learn(self, request: Request) -> Response:
        """What the lesson needs."""
        del request
        return Response(learn_text(), media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        """The catalogue of metrics."""
        del request
        return Json(metrics_facts())

    async def failures(self, request: Request) -> Response:
        """The catalogue of failures."""
        del request
        return Json(failures_facts())

    async def all_jobs(self, request: Request) -> Response:
        """What this page started."""
        del request
        return Json({"jobs": self.jobs.facts()})

    async def stream(self, request: Request) -> Response:
        """What is new, for as long as the browser listens."""
        wanted = [id for id in request.query_params.get("runs", "").split(",") if id]
        if self.streams >= MOST_STREAMS:
            raise Refused(503, f"{self.streams} tabs listen already; close some")
        if len(wanted) > MOST_RUNS:
            raise Refused(400, f"got {len(wanted)} runs; wanted at most {MOST_RUNS} in one stream")
        found = [await self.library.find(id) for id in wanted]
        shelves = [shelf for shelf in found if shelf is not None]
        cursors = read_cursors(request.headers.get("last-event-id") or request.query_params.get("cursor", ""))
        here = {shelf.id for shelf in shelves}
        told = Stream(self.library, shelves, {run: at for run, at in cursors.items() if run in here}, self._lists)
        return EventSourceResponse(
            self.heard(told), ping=PING_SECONDS, headers={"Cache-Control": "no-store"},
            shutdown_event=told.ending, shutdown_grace_period=GRACE_SECONDS,
        )  # fmt: skip

    async def heard(self, stream: Stream) -> AsyncIterator[ServerSentEvent]:
        """The stream's messages, counted among those that are open for as long as it lasts."""
        self.streams += 1
        try:
            async with aclosing(stream.messages()) as messages:
                async for message in messages:
                    yield message
        finally:
            self.streams -= 1
