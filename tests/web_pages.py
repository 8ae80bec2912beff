"""A page in a real Chromium over a real server, and a run that goes on: what the browser's tests stand on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from page_runs import numbers
from tether.control import Control
from tether.store import RunStore

ROOT = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
WAIT_MS = 60_000
MARKS = [
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="wants Debian's chromium"),
    pytest.mark.skipif(
        not (ROOT / "src/tether/page/static/index.html").is_file(), reason="wants the built page: make page"
    ),
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where playwright is not installed."""
    api: Any = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


def is_idle() -> bool:
    """Whether a speed means anything here: the machine has a core to spare for the browser."""
    return os.getloadavg()[0] < (os.cpu_count() or 1) + 1


@contextmanager
def served(root: Path, code: str = "", *flags: str) -> Iterator[str]:
    """`tether ui` over a folder, after some `code`; yields the address with its token."""
    code += "import sys; from tether.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "ui", str(root), "--port", "0", "--no-browser", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield line.split()[0]
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def opened(browser: Any, address: str, screen: str, **options: Any) -> Iterator[Any]:
    """A page at a screen; that nothing is written to its console as an error is part of every test."""
    options = {"viewport": {"width": 1280, "height": 900}} | options
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.wait_for_selector("main h1", state="attached")
    page.goto(f"{page.url.split('#')[0]}#/{screen}")
    page.wait_for_selector("main h1", state="attached")
    page.wait_for_timeout(600)
    yield page
    context.close()
    assert complaints == []


def until(page: Any, claim: Callable[[], bool]) -> None:
    """Wait until it is so. The page's policy forbids code made from text, so the waiting is done here."""
    for _ in range(WAIT_MS // 100):
        if claim():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen within a minute")


def updates_of(page: Any) -> int:
    return int(re.search(r"update (\d+)", page.inner_text(".standing"))[1])  # type: ignore[index]


class Trainer(threading.Thread):
    """Writes updates into a run as a trainer would, and answers commands that set β."""

    def __init__(self, path: Path, start: int, every: float):
        super().__init__(daemon=True)
        self.path, self.step, self.every = path, start, every
        self.beta, self.done = 0.2, threading.Event()

    def run(self) -> None:
        heard = 0
        with RunStore.open(self.path, readonly=False) as store, Control.open(self.path) as control:
            while not self.done.wait(self.every):
                with store.update(self.step) as update:
                    for command in control.commands(heard):
                        heard = command.id
                        before, self.beta = self.beta, float(str(command.payload.get("beta", self.beta)))
                        update.applied(command.id, {"changes": {"ppo.reward.beta": [before, self.beta, self.beta]}})
                    update.metrics(numbers(self.step, self.beta))
                self.step += 1
