"""The stream of what is new in runs: server-sent events whose ids are cursors, so that nothing is lost or told twice.

news      what one run has had since a cursor, in order, each with the cursor after it
Stream    several runs in one connection, each asked in its own thread
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NamedTuple
from urllib.parse import quote, unquote

import anyio
from sse_starlette import ServerSentEvent

from tether.database import to_json
from tether.errors import InputError, TetherError
from tether.page.facts import command_facts, heartbeat_facts, knob_moves, standing, update_seconds, verdict
from tether.page.library import Library, Shelf
from tether.page.reading import AT_ONCE, Cursor, Reader, Steps, rewound

POLL_SECONDS, POLL_OVER = 0.2, 2.0
"""Between two looks at a run that trains, and at one that is over."""
BEAT_SECONDS = 2.0
VERDICT_SECONDS = 2.0
MOST_RUNS = 16
END = "end"
WAITING = 64
"""Messages that wait for a slow browser before its runs are asked no more."""


class Message(NamedTuple):
    """One event of the stream."""

    event: str
    data: Mapping[str, object]
    cursor: Cursor | None = None
    """Where its run stands after it; None where it says nothing that could be missed."""
    run: str = ""


def news(reader: Reader, id: str, cursor: Cursor) -> Iterator[Message]:
    """What the run has had since the cursor."""
    with reader.snapshot():
        now, events = reader.cursor(), reader.events(cursor.event)
        if (back := rewound(cursor, now, events)) is not None:
            cursor = back
            yield Message("rewind", {"run": id, "after": back.update}, cursor, id)
        while steps := reader.updates(cursor.update):
            cursor = replace(cursor, update=steps.steps[-1])
            yield Message("updates", _columns(id, steps), cursor, id)
        while steps := reader.evaluations(cursor.evaluation):
            cursor = replace(cursor, evaluation=steps.steps[-1])
            yield Message("evaluations", _columns(id, steps), cursor, id)
        for part in (events[at : at + AT_ONCE] for at in range(0, len(events), AT_ONCE)):
            cursor = replace(cursor, event=part[-1].id)
            yield Message("events", {"run": id, "events": [asdict(event) for event in part]}, cursor, id)
        if moved := knob_moves(events):
            knobs = {path: {"value": value, "target": target} for path, (value, target) in moved.items()}
            yield Message("knobs", {"run": id, "knobs": knobs}, cursor, id)
        fresh = reader.new_samples(cursor.sample) if now.sample > cursor.sample else []
        cursor = replace(cursor, sample=now.sample)
        for split, step in fresh:
            yield Message("samples", {"run": id, "split": split, "step": step}, cursor, id)
        yield from _commands(reader, id, cursor)


def _columns(id: str, steps: Steps) -> Mapping[str, object]:
    return {"run": id, "steps": steps.steps, "metrics": steps.metrics}


def _commands(reader: Reader, id: str, cursor: Cursor) -> Iterator[Message]:
    """New wishes, and those on which something was ruled since."""
    fresh, outcomes = reader.commands(cursor.command), reader.outcomes(cursor.applied)
    if not fresh and not outcomes:
        return
    ruled = {one.command: one for one in reader.outcomes()}
    told = {command.id: command for command in fresh}
    if outcomes:
        first = min(one.command for one in outcomes)
        changed = {one.command for one in outcomes}
        told |= {command.id: command for command in reader.commands(first - 1) if command.id in changed}
    cursor = replace(
        cursor,
        command=max([cursor.command, *(command.id for command in fresh)]),
        applied=max([cursor.applied, *(one.row for one in outcomes)]),
    )
    facts = [command_facts(told[number], ruled.get(number)) for number in sorted(told)]
    yield Message("commands", {"run": id, "commands": facts}, cursor, id)


@dataclass
class Stream:
    """What one browser is told."""

    library: Library
    shelves: list[Shelf]
    cursors: dict[str, Cursor]
    """Where each run stands; one that is not in it begins now."""
    lists: Callable[[], tuple[int, list[object]]]
    """A number that changes with the list of runs, and the jobs."""
    ending: anyio.Event = field(default_factory=anyio.Event)
    """Set when the server ends."""
    _queue: asyncio.Queue[Message] = field(default_factory=lambda: asyncio.Queue(WAITING))

    async def messages(self) -> AsyncGenerator[ServerSentEvent, None]:
        """Until the browser goes or the server ends."""
        tasks = [asyncio.create_task(self._follow(shelf)) for shelf in self.shelves]
        tasks += [asyncio.create_task(self._follow_lists()), asyncio.create_task(self._end())]
        try:
            yield ServerSentEvent(comment="tether", retry=1000)
            while True:
                message = await self._queue.get()
                if message.event == END:
                    return
                if message.cursor is not None:
                    self.cursors[message.run] = message.cursor
                data = to_json(message.data).encode("utf-8", "replace").decode()  # half a surrogate pair is no text
                yield ServerSentEvent(data, event=message.event, id=write_cursors(self.cursors) or None)
        finally:
            for task in tasks:
                task.cancel()

    async def _end(self) -> None:
        await self.ending.wait()
        await self._queue.put(Message(END, {}))

    async def _follow(self, shelf: Shelf) -> None:
        """Tell one run's news for as long as the stream lasts."""
        told = _Told()
        cursor = self.cursors.get(shelf.id)
        while True:
            wait = POLL_SECONDS
            try:
                if cursor is None:
                    cursor = self.cursors[shelf.id] = await shelf.ask(lambda reader: reader.cursor())
                found, wait = await shelf.ask(partial(self._look, shelf, cursor, told))
                for message in found:
                    await self._queue.put(message)
                    cursor = message.cursor or cursor
                told.slow = ""
            except TetherError as error:
                wait = POLL_OVER
                if told.slow != str(error):
                    told.slow = str(error)
                    await self._queue.put(Message("slow", {"run": shelf.id, "error": str(error)}))
            await asyncio.sleep(wait)

    def _look(self, shelf: Shelf, cursor: Cursor, told: _Told, reader: Reader) -> tuple[list[Message], float]:
        """In the run's own thread: what is new, and how long until the next look."""
        now, version = self.library.clock(), reader.version()
        found: list[Message] = []
        if version != told.version:
            found += news(reader, shelf.id, cursor)
            told.version = version
        if any(message.event == "rewind" for message in found):
            told.verdict_at = -1.0
        found += self._beat(reader, shelf, told, now)
        found += self._verdict(reader, shelf, told, now)
        return found, POLL_SECONDS if told.state in ("running", "paused", "not started") else POLL_OVER

    def _beat(self, reader: Reader, shelf: Shelf, told: _Told, now: float) -> Iterator[Message]:
        if now - told.beat_at < BEAT_SECONDS and told.beat_version == told.version:
            return
        beat, seconds = reader.heartbeat(), update_seconds(reader)
        state = standing(beat, seconds, now)
        if now - told.beat_at >= BEAT_SECONDS or state != told.state:
            told.state, told.beat_at = state, now
            facts = heartbeat_facts(beat, state, now)
            yield Message("heartbeat", {"run": shelf.id, "state": state, "heartbeat": facts, "update_seconds": seconds})
        told.beat_version = told.version

    def _verdict(self, reader: Reader, shelf: Shelf, told: _Told, now: float) -> Iterator[Message]:
        if now - told.verdict_at < VERDICT_SECONDS or told.verdict_version == told.version:
            return
        told.verdict_at, told.verdict_version = now, told.version
        facts = shelf.once("verdict", reader.verdict_key(), lambda: verdict(reader))
        if facts["verdict"] != told.verdict:
            told.verdict = facts["verdict"]
            yield Message("verdict", {"run": shelf.id, "verdict": facts["verdict"], "reason": facts["reason"]})

    async def _follow_lists(self) -> None:
        known: tuple[int, list[object]] | None = None
        while True:
            now = self.lists()
            if known is None or now[0] != known[0]:
                await self._queue.put(Message("runs", {}))
            if known is None or now[1] != known[1]:
                await self._queue.put(Message("jobs", {"jobs": now[1]}))
            known = now
            await asyncio.sleep(POLL_SECONDS * 2)


@dataclass
class _Told:
    """What a browser was told last of a run, beside what cursors count."""

    version: tuple[int, int] | None = None
    state: str = ""
    beat_at: float = -1.0
    beat_version: tuple[int, int] | None = None
    verdict: object = ""
    verdict_at: float = -1.0
    verdict_version: tuple[int, int] | None = None
    slow: str = ""


def write_cursors(cursors: Mapping[str, Cursor]) -> str:
    """Cursors of several runs as one id.

    >>> write_cursors({"a": Cursor(), "b/c": Cursor(3)})
    'a@-1.-1.0.0.0.0;b%2Fc@3.-1.0.0.0.0'
    """
    return ";".join(f"{quote(run, safe='~=+,')}@{cursor}" for run, cursor in cursors.items())


def read_cursors(text: str) -> dict[str, Cursor]:
    """The inverse. Raises InputError for what the server did not write."""
    found: dict[str, Cursor] = {}
    for part in filter(None, text.split(";")[: 4 * MOST_RUNS]):
        run, at, cursor = part.rpartition("@")
        if not at or not run:
            raise InputError(f"got {part[:40]!r} as a cursor; wanted what the server gave")
        found[unquote(run)] = Cursor.parse(cursor)
    return found
