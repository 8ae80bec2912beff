"""A page over made-up runs, and a browser that asks it: what the tests of the page stand on."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from tether.config import RunSettings
from tether.page.app import Page
from tether.page.jobs import Jobs
from tether.page.library import Library
from tether.page.security import Bucket, Hosts, Tokens
from tether.records import Sample
from tether.store import RunStore

STEER, VIEW = "steer-token-for-tests", "view-token-for-tests"
HOME = "http://127.0.0.1:8765"
ORIGIN = {"Origin": HOME}
SETTINGS = RunSettings.model_validate({"world": "nano", "ppo": {"steps": 100, "reward": {"beta": 0.2}}}).dump()


def site(root: Path, *, rate: float = 1000.0, burst: float = 1000.0, static: Path | None = None,
         program: tuple[str, ...] = ("true",), clock: Callable[[], float] | None = None) -> Page:  # fmt: skip
    """A page whose limits are out of the way unless a test is about them."""
    page = Page(Library(root), Jobs(root, program=program), Tokens(STEER, VIEW), Hosts(), "tether-8765",
                bucket=Bucket(rate, burst, clock or time.monotonic))  # fmt: skip
    page.static = static or root / "no build"
    return page


def browser(page: Page, token: str | None = STEER) -> TestClient:
    """A browser that opened the printed address, or, without a token, one that did not."""
    client = TestClient(page.app(), base_url=HOME, raise_server_exceptions=False)
    if token is not None:
        assert client.get("/", params={"token": token}).status_code == 200
    return client


def post(client: TestClient, path: str, body: object, headers: Mapping[str, str] | None = None) -> Any:
    return client.post(path, content=json.dumps(body), headers={**ORIGIN, "Content-Type": "application/json",
                                                                **(headers or {})})  # fmt: skip


def make_run(root: Path, name: str = "run", updates: int = 6, status: str = "running", beta: float = 0.2) -> Path:
    """A run folder with plausible numbers; by default this very process seems to train it."""
    settings = RunSettings.model_validate(SETTINGS).with_beta(beta).dump()
    with RunStore.create(root, name, settings) as store:
        for step in range(updates):
            record(store, step)
        store.heartbeat(max(0, updates - 1), "recorded", status)  # type: ignore[arg-type]
        return store.path


def record(store: RunStore, step: int, every: int = 3) -> None:
    """One update, before it an evaluation where its turn is."""
    if step % every == 0:
        with store.update(step) as entry:
            entry.metrics({"eval/score": 0.1 * step, "eval/kl": float(step)})
            for row in range(2):
                entry.sample(sample(step, row, "probe"))
    with store.update(step) as entry:
        entry.metrics({"score/mean": 0.1 * step, "kl/mean": float(step), "beta": 0.2, "seconds/total": 0.5})
        entry.sample(sample(step, 0, "train"))


def sample(step: int, row: int, split: Any, text: str = "two words") -> Sample:
    values = {} if split == "probe" else {"values": np.array([0.1, 0.2]), "advantages": np.array([1.0, -1.0])}
    return Sample(
        step, row, f"prompt {row}", text, score=0.5 * step + row, reward_total=0.0, kl=float(step),
        tokens=np.array([3, 4]), logprobs=np.array([-1.0, -0.5]), ref_logprobs=np.array([-1.5, -0.25]),
        split=split, pieces=("two", " words"), columns={"score": 0.5 * step + row, "gold": 0.0}, **values,
    )  # fmt: skip


def process_of_another_machine(store: RunStore) -> None:
    """A heartbeat such as a run that was copied here has."""
    store.put("heartbeat", {"wall": 0.0, "step": 5, "phase": "recorded", "status": "running",
                            "process": os.getpid(), "host": f"not-{socket.gethostname()}"})  # fmt: skip
