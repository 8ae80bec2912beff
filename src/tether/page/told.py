"""What the page is told that no route has to be asked for: the report tells the same without a server.

Read next: `facts.py` (what a run is said to be), `app.py` (the routes), `report.py` (the page in one file).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path

import tether
from tether.alarms import FAILURES, FAULTS
from tether.errors import RunError, TetherError
from tether.metrics import CATALOGUE
from tether.page import facts
from tether.page.ghost import BANK_FILE, Bank, ghost
from tether.page.library import Library, Shelf
from tether.page.reading import UPDATE, Reader
from tether.records import Curve
from tether.runs import knob
from tether.store import RunStore

NO_LESSON = {
    "exact": {"betas": [], "frontier": [], "runs": []},
    "nano": {"points": [], "curves": [], "texts": [], "bank": None},
    "bandit": {"rows": []},
    "command": "python bench/learn.py",
}
"""What the lesson has where its recording does not ship."""
LONG = 2000
"""Updates of a run above which its verdict takes a tenth of a second: the list of runs does not wait for it."""


def session_facts(library: Library, may_steer: bool, can_play: bool, read_only: bool = False) -> facts.Facts:
    """What a reader may do."""
    return {
        "version": tether.__version__, "may_steer": may_steer, "root": str(library.root), "selected": library.selected,
        "can_play": can_play, "read_only": read_only, "stale_seconds": facts.STALE_SECONDS, "faults": list(FAULTS),
        "server_time": library.clock(),
    }  # fmt: skip


def chosen(known: list[str], wanted: list[str]) -> list[str]:
    """The metrics asked for, in the catalogue's order; all where none is. `group/*` is a whole group."""
    groups = tuple(name[:-1] for name in wanted if name.endswith("/*"))
    return CATALOGUE.in_order(
        {name for name in known if not wanted or name in wanted or (groups and name.startswith(groups))}
    )


def lengths(curves: Mapping[str, Curve]) -> dict[str, int]:
    """How many points each curve has."""
    return {name: len(curve.steps) for name, curve in curves.items()}


def cached_verdict(shelf: Shelf, reader: Reader) -> facts.Facts:
    """The verdict, worked out anew when there is something new."""
    return shelf.once("verdict", reader.verdict_key(), lambda: facts.verdict(reader))


def word_of(shelf: Shelf, reader: Reader) -> object:
    """The verdict's word for the list; of a long run the last one that was worked out, for the list waits for none."""
    return last_word(shelf) if reader.count(UPDATE) > LONG else cached_verdict(shelf, reader)["verdict"]


def last_word(shelf: Shelf) -> object:
    """The word that was worked out last; None before the first time."""
    _, verdict = shelf.cached.get("verdict", (None, None))
    return verdict["verdict"] if isinstance(verdict, Mapping) else None


async def catch_up(shelves: Iterable[Shelf]) -> None:
    """Work out the verdict of the first long run in the list to which something has happened since the last time."""
    for shelf in [shelf for shelf in shelves if int(str(shelf.known.get("updates", 0))) > LONG]:
        try:
            if await shelf.ask(partial(_catch_up, shelf)):
                return
        except TetherError:  # its disk does not answer, or it is gone: another one's turn
            continue


def _catch_up(shelf: Shelf, reader: Reader) -> bool:
    key, _ = shelf.cached.get("verdict", (None, None))
    if isinstance(key, tuple) and key[-1] == reader.verdict_key()[-1]:
        return False
    cached_verdict(shelf, reader)
    return True


def ghost_of(reader: Reader) -> facts.Facts:
    """The ghost of a run: from its bank or that of a run beside it which starts from the same reference, reward and
    prompts, else that shipped for its world, else its first replies, else a normal law.
    """
    meta = reader.meta()
    bank = Bank.read(reader.path / BANK_FILE, "bank") or _bank_beside(reader.path, meta)
    if bank is None and knob(meta.get("config"), "world") == "nano":
        shipped = json.loads(learn_text()).get("nano", {})
        bank = Bank.of(shipped.get("bank"), "shipped") if isinstance(shipped, dict) else None
    if bank is None:
        bank = Bank.of_start([sample.score for sample in reader.samples("probe", 0)])
    sigma = meta.get("sigma")
    return ghost(bank, float(sigma) if isinstance(sigma, int | float) else 1.0)


def _bank_beside(path: Path, meta: Mapping[str, object]) -> Bank | None:
    """The bank of a run in the same folder whose samples of the reference are this run's too."""
    wanted = _drawn_from(meta)
    for file in sorted(path.parent.glob(f"*/{BANK_FILE}")) if wanted else ():
        try:
            is_kin = _told_of(file, file.stat().st_mtime_ns) == wanted
        except (RunError, OSError):
            continue
        if is_kin and (bank := Bank.read(file, "bank")):
            return bank
    return None


@lru_cache(maxsize=1024)
def _told_of(file: Path, written: int) -> tuple[object, ...] | None:
    """What the samples in a bank's file depend on, which its run tells: opened once for each writing of the file."""
    del written
    with RunStore.open(file.parent) as store:
        return _drawn_from(store.meta())


def _drawn_from(meta: Mapping[str, object]) -> tuple[object, ...] | None:
    """What a bank's samples depend on but the seed; None where the run does not tell."""
    config, digests = meta.get("config"), meta.get("digests")
    if not isinstance(config, Mapping) or not digests:
        return None
    return digests, config.get("data"), knob(config, "sampling")


def learn_text() -> str:
    """The lesson's data, as JSON; empty where none ships."""
    file = files("tether.page").joinpath("learn.json")
    return file.read_text("utf-8") if file.is_file() else json.dumps(NO_LESSON)


def metrics_facts() -> facts.Facts:
    """The catalogue of metrics by name."""
    return {name: {key: value for key, value in asdict(CATALOGUE[name]).items() if key != "name"} for name in CATALOGUE}


def failures_facts() -> facts.Facts:
    """The catalogue of failures by name."""
    return {name: {k: v for k, v in asdict(failure).items() if k != "name"} for name, failure in FAILURES.items()}
