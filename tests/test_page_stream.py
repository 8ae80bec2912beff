"""The stream and the curves: nothing is lost, nothing is told twice, and a spike is seen at any width."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from page_site import make_run, record
from tether.control import Control
from tether.errors import InputError, RunError
from tether.page.history import pack, thin
from tether.page.library import Library, Slow
from tether.page.reading import Cursor, Reader
from tether.page.stream import Message, Stream, news, read_cursors, write_cursors
from tether.records import Curve
from tether.store import RunStore


class Tab:
    """A browser's tab: it keeps what it was told as the front end does."""

    def __init__(self) -> None:
        self.updates: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self.events: list[int] = []
        self.commands: dict[int, str] = {}
        self.cursor = Cursor()

    def hear(self, message: Message) -> None:
        data = json.loads(json.dumps(message.data))
        if message.event == "rewind":
            self.updates = {step: x for step, x in self.updates.items() if step <= data["after"]}
            self.evaluations = {step: x for step, x in self.evaluations.items() if step <= data["after"]}
        for kind, kept, name in (("updates", self.updates, "kl/mean"), ("evaluations", self.evaluations, "eval/kl")):
            if message.event == kind:
                assert not kept.keys() & set(data["steps"]), "told twice"
                kept.update(zip(data["steps"], data["metrics"][name], strict=True))
        if message.event == "events":
            self.events += [event["id"] for event in data["events"]]
        if message.event == "commands":
            self.commands.update({one["id"]: one["state"] for one in data["commands"]})
        self.cursor = message.cursor or self.cursor


def whole(run: Path) -> tuple[dict[int, float], dict[int, float], list[int], dict[int, str]]:
    with RunStore.open(run) as store, Control.open(run) as control:
        curves = [store.curve(name) for name in ("kl/mean", "eval/kl")]
        updates, evaluations = (dict(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for c in curves)
        ruled = {one.command_id: one.outcome for one in store.applied()}
        commands = {one.id: ruled.get(one.id, "pending") for one in control.commands()}
        return updates, evaluations, [event.id for event in store.events()], commands


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_that_breaks_anywhere_loses_nothing_and_tells_nothing_twice(tmp_path: Path, seed: int) -> None:
    """A trainer writes, is killed and goes on; the connection breaks after any message; the server begins anew."""
    draw, run, tab = random.Random(seed), make_run(tmp_path, updates=0), Tab()
    reader, step = Reader(run), 0
    with RunStore.open(run, readonly=False) as store, Control.open(run, readonly=False) as control:
        for _ in range(40):
            act = draw.choice(["update", "update", "update", "event", "wish", "kill"])
            if act == "update":
                record(store, step)
                step += 1
            elif act == "event":
                store.event("noted", {"step": step})
            elif act == "wish":
                number = control.command("ann", "pause", {})
                if draw.random() < 0.5:
                    store.rule(number, step, {}, "applied")
            else:
                step = draw.randint(max(0, step - 5), step)
                store.truncate_after(step - 1)
            if draw.random() < 0.4:
                heard = list(news(reader, "run", tab.cursor))
                for message in heard[: draw.randint(0, len(heard))]:  # the connection breaks somewhere in between
                    tab.hear(message)
            if draw.random() < 0.2:
                reader.close()
                reader = Reader(run)
                tab.cursor = read_cursors(write_cursors({"run": tab.cursor}))["run"]
        for message in news(reader, "run", tab.cursor):
            tab.hear(message)
    reader.close()
    updates, evaluations, events, commands = whole(run)
    assert tab.updates == updates
    assert tab.evaluations == evaluations
    assert [id for id in events if id not in tab.events] == []
    assert len(tab.events) == len(set(tab.events))
    dropped = {number for number, state in tab.commands.items() if commands[number] != state}
    assert all(commands[number] == "pending" for number in dropped)  # what became of it was rewound with its update


def test_many_updates_come_in_parts_of_one_size(tmp_path: Path) -> None:
    run = make_run(tmp_path, updates=600)
    reader = Reader(run)
    sizes = [len(m.data["steps"]) for m in news(reader, "run", Cursor()) if m.event == "updates"]  # type: ignore[arg-type]
    assert sizes == [256, 256, 88]
    reader.close()


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(-1, 10**9), min_size=6, max_size=6)))
def test_cursors_of_any_names_come_back_from_an_id(found: dict[str, list[int]]) -> None:
    cursors = {name: Cursor(*numbers) for name, numbers in found.items()}
    text = write_cursors(cursors)
    assert read_cursors(text) == cursors
    assert text.isascii()
    assert "\n" not in text


@pytest.mark.parametrize(
    "text", ["x", "run@", "@1.2.3.4.5.6", "run@1.2", "run@1.2.3.4.5.x", "run@" + "9" * 99 + ".1.1.1.1.1"]
)
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="what the server gave"):
        read_cursors(text)


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=400), st.integers(1, 40))
def test_a_thinned_curve_keeps_its_ends_and_every_extreme(values: list[float], width: int) -> None:
    curve = Curve(np.arange(10, 10 + len(values)), np.array(values))
    thinned = thin(curve, width)
    assert len(thinned.steps) <= 2 * width + 2
    assert list(thinned.steps) == sorted(set(thinned.steps.tolist()))
    kept = dict(zip(curve.steps.tolist(), values, strict=True))
    for step, value in zip(thinned.steps.tolist(), thinned.values.tolist(), strict=True):
        assert value == kept[step] or (np.isnan(value) and np.isnan(kept[step]))
    assert (thinned.steps[0], thinned.steps[-1]) == (curve.steps[0], curve.steps[-1])
    finite = [value for value in values if not np.isnan(value)]
    if finite:
        assert np.nanmax(thinned.values) == max(finite)
        assert np.nanmin(thinned.values) == min(finite)


def test_a_column_without_a_number_stays_a_gap() -> None:
    values = np.arange(100.0)
    values[40:60] = np.nan
    thinned = thin(Curve(np.arange(100), values), 10)
    assert np.isnan(thinned.values[(thinned.steps >= 40) & (thinned.steps < 60)]).all()
    assert ((thinned.steps >= 40) & (thinned.steps < 60)).any()


def test_the_binary_form_is_what_its_description_says() -> None:
    curves = {"kl/mean": Curve(np.array([0, 5]), np.array([0.5, np.nan])), "ε": Curve(np.array([7]), np.array([1.0]))}
    packed = pack("run@1.2.3.4.5.6", curves, {"kl/mean": 9, "ε": 1})
    assert packed[:4] == b"TTH1"
    (length,) = struct.unpack("<I", packed[4:8])
    assert length % 8 == 0
    header = json.loads(packed[8 : 8 + length].decode("utf-8"))
    assert header["series"] == [{"name": "kl/mean", "points": 2, "of": 9}, {"name": "ε", "points": 1, "of": 1}]
    columns = np.frombuffer(packed[8 + length :], "<f8")
    assert columns[[0, 1, 2, 4, 5]].tolist() == [0.0, 5.0, 0.5, 7.0, 1.0]
    assert np.isnan(columns[3])


# ── runs in threads of their own ────────────────────────────────────────────────────────────────────────────────────
def test_a_run_on_a_disk_that_hangs_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "quick")
    make_run(tmp_path, "slow")

    async def ask() -> None:
        library = Library(tmp_path)
        shelves = {shelf.id: shelf for shelf in await library.scan()}
        hung = asyncio.create_task(shelves["slow"].ask(lambda reader: time.sleep(1.5), patience=0.2))
        begun = time.monotonic()
        assert (await shelves["quick"].ask(lambda reader: reader.cursor())).update == 5
        assert time.monotonic() - begun < 1.0
        with pytest.raises(Slow, match="did not answer within"):
            await hung
        monkeypatch.setattr("tether.page.library.PATIENCE", 0.1)
        with pytest.raises(Slow, match="does not answer"):  # at once, without waiting again
            await shelves["slow"].ask(lambda reader: reader.cursor(), patience=1000.0)
        await asyncio.sleep(1.6)
        assert (await shelves["slow"].ask(lambda reader: reader.cursor())).update == 5

    asyncio.run(ask())


def test_a_run_that_was_deleted_or_replaced_is_seen(tmp_path: Path) -> None:
    import shutil

    run = make_run(tmp_path, updates=3)

    async def ask() -> None:
        library = Library(tmp_path)
        (shelf,) = await library.scan()
        assert (await shelf.ask(lambda reader: reader.cursor())).update == 2
        shutil.rmtree(run)
        with pytest.raises(RunError, match="is it still there"):
            await shelf.ask(lambda reader: reader.cursor())
        make_run(tmp_path, updates=5)
        assert (await shelf.ask(lambda reader: reader.cursor())).update == 4

    asyncio.run(ask())


def test_a_tab_hears_of_an_update_within_a_second_and_of_several_runs_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path, name, updates=2)

    async def listen() -> dict[str, int]:
        library = Library(tmp_path)
        stream = Stream(library, await library.scan(), {}, lambda: (0, []))
        heard: dict[str, int] = {}
        begun = time.monotonic()

        async def collect() -> None:
            async for sent in stream.messages():
                if sent.event == "updates":
                    data = json.loads(sent.data)
                    heard[data["run"]] = data["steps"][-1]
                    assert set(read_cursors(str(sent.id))) >= {data["run"]}
                    if len(heard) == 2:
                        return

        task = asyncio.create_task(collect())
        await asyncio.sleep(0.5)
        for name in ("one", "two"):
            with RunStore.open(tmp_path / name, readonly=False) as store:
                record(store, 2)
        await asyncio.wait_for(task, 20)
        assert time.monotonic() - begun < 15
        return heard

    assert asyncio.run(listen()) == {"one": 2, "two": 2}
