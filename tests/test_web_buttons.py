"""The page's buttons that ask this machine for a process: a new run, a fork, a run that goes on. In a real Chromium."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from page_runs import make_run
from tether.store import RunStore
from web_pages import MARKS, ROOT, Trainer, chromium, opened, served, until

pytestmark = MARKS
STAND_IN = f"""
import functools, tether.page.jobs as jobs
jobs.Jobs = functools.partial(jobs.Jobs, program=[{sys.executable!r}, {str(ROOT / "tests/page_stand_in.py")!r}])
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def state_of(page: Any) -> str:
    return str(page.inner_text(".standing"))


def test_an_empty_folder_tells_of_the_run_that_starts_and_goes_to_it(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path / "empty", STAND_IN, "--play") as address, opened(browser, address, "play") as page:
        until(page, lambda: page.locator(".standing").count() == 1 and "update 5 " in state_of(page))
        assert "play-1" in page.inner_text(".bar select")


def test_a_new_run_is_started_by_a_button_and_gone_to(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    with served(tmp_path, STAND_IN) as address, opened(browser, address, "runs") as page:
        page.get_by_role("button", name="Start a live nano run").click()
        until(page, lambda: "run=play-1" in page.url)
        until(page, lambda: "running" in state_of(page))
        assert state_of(page).startswith("update 5 of 5")
        assert page.get_by_role("button", name="cut the string").is_enabled()
        assert sorted(path.parent.name for path in tmp_path.glob("*/run.db")) == ["old", "play-1"]


def test_a_run_is_forked_by_a_button_and_the_fork_is_gone_to(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    with served(tmp_path, STAND_IN) as address, opened(browser, address, "play?run=old&beta=0.5") as page:
        page.get_by_role("button", name="fork at β = 0.5").click()
        until(page, lambda: "run=old-fork-1" in page.url)
        until(page, lambda: "update 8 " in state_of(page))
    words = (tmp_path / ".page" / "old-fork-1.log").read_text()
    assert words.startswith(f"fork {tmp_path / 'old'} --name old-fork-1 --beta 0.5")


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_that_ended_early_goes_on_by_a_button(browser: Any, tmp_path: Path, status: Any) -> None:
    with RunStore.open(make_run(tmp_path, "old"), readonly=False) as store:
        store.heartbeat(59, "recorded", status)
    with served(tmp_path, STAND_IN) as address, opened(browser, address, "play?run=old") as page:
        assert status in state_of(page)
        page.get_by_role("button", name="go on with this run").click()
        until(page, lambda: "running" in state_of(page))
        assert page.get_by_role("button", name="pause").is_visible()


def test_a_process_that_fails_says_why_beside_the_button(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    with served(tmp_path, STAND_IN) as address, opened(browser, address, "learn") as page:
        page.get_by_role("button", name="The slingshot", exact=True).click()
        page.get_by_role("button", name="Plant it in a real run").click()
        until(page, lambda: page.locator("[role=alert]").count() == 1)
        assert "no such fault can be planted today" in page.inner_text("[role=alert]")


def test_stopping_asks_for_a_second_press(browser: Any, tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, "live", updates=20, ended=False), 20, 0.2)
    trainer.start()
    try:
        with served(tmp_path, STAND_IN) as address, opened(browser, address, "play?run=live") as page:
            page.get_by_role("button", name=re.compile("^stop$")).click()
            page.wait_for_timeout(500)
            assert page.locator(".chips li").count() == 0
            page.get_by_role("button", name="press again to stop it").click()
            until(page, lambda: "stop" in page.inner_text(".chips"))
    finally:
        trainer.done.set()
        trainer.join(10)
