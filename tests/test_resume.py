"""Resume equals never having stopped, bit for bit; what is another run is refused; Ctrl-C saves.

The oracle is the same run without an interruption: its metrics (timings apart), samples, weights, moments and β.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from resumable import STEPS, count_words, left_behind, prefer_short, settings_of, task_of
from tether.batch import Prompt
from tether.checkpoint import Checkpoints
from tether.config import RunSettings
from tether.errors import ConfigError, RunError
from tether.prompts import PromptSet
from tether.session import Judges, Task, fork_run, resume_run, train_run
from tether.store import RunStore
from tiny_models import build, build_tokenizer


class PowerCut(BaseException):
    """Nobody catches it."""


@dataclass
class AtCall:
    """A reward that counts words, and does something at one of its calls."""

    call: int
    act: Callable[[], None]
    calls: int = 0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        if self.calls == self.call:
            self.act()
        self.calls += 1
        return count_words(prompts, responses)

    def digest(self) -> str:
        return "words"


def cut() -> None:
    raise PowerCut


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "sft"


def words(sft: Path, call: int = 10_000, act: Callable[[], None] = cut) -> Task:
    task = task_of(sft)
    return replace(task, judges=Judges(AtCall(call, act), {"gold": prefer_short}))


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def whole(sft: Path, root: Path, settings: RunSettings) -> dict[str, object]:
    return left_behind(train_run(words(sft), settings, root, "whole", silent()))


def stopped(sft: Path, root: Path, settings: RunSettings, call: int, act: Callable[[], None] = cut) -> Path:
    with pytest.raises((PowerCut, KeyboardInterrupt)):
        train_run(words(sft, call, act), settings, root, "run", silent())
    return root / "run"


def resumed(run: Path, sft: Path) -> dict[str, object]:
    return left_behind(resume_run(run, lambda _: words(sft), silent()))


# ── equal to the last bit ───────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_a_resumed_run_is_the_run_that_never_stopped(mode: str, sft: Path, tmp_path: Path) -> None:
    settings = settings_of(mode)
    wanted = whole(sft, tmp_path, settings)
    run = stopped(sft, tmp_path, settings, call=5)
    assert RunStore.open(run).last_step() not in (None, STEPS)
    assert resumed(run, sft) == wanted


@pytest.mark.parametrize("call", range(10))
def test_it_may_stop_anywhere(call: int, sft: Path, tmp_path: Path) -> None:
    settings = settings_of(checkpoint={"every": 2})
    wanted = whole(sft, tmp_path, settings)
    assert resumed(stopped(sft, tmp_path, settings, call), sft) == wanted
