"""What the checks cost, in passes of a model: tokens that they send through it, over those of the updates they watch.

Tokens are counted and not seconds, so that the test says the same on a busy machine; `seconds/checks` over
`seconds/total` of a run is the same share in time, of every layer's work and the head's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tether.hacks
from resumable import settings_of, task_of
from tether.config import RunSettings
from tether.models import LanguagePolicy
from tether.session import train_run
from tether.watch import Watch

STEPS, MOST, MOST_AT_FIRST = 40, 0.03, 0.25
BACKWARD = 3.0
"""Passes that one with gradients costs, its way back counted."""


class Meter:
    """Tokens through the model, by whether the checks sent them and in which update."""

    def __init__(self) -> None:
        self.checking, self.update = False, 0
        self.sent: dict[tuple[bool, int], float] = {}

    def count(self, original: Callable[..., Any], tokens: Callable[..., float]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            key = (self.checking, self.update)
            self.sent[key] = self.sent.get(key, 0.0) + tokens(*arguments) * (BACKWARD if torch.is_grad_enabled() else 1)
            return original(*arguments)

        return counted

    def watched(self, original: Callable[..., Any], begins: bool) -> Callable[..., Any]:
        """What is asked before the policy moves begins an update of this count; what is asked after belongs to it."""

        def asked(*arguments: Any) -> Any:
            self.checking, self.update = True, self.update + begins
            told = original(*arguments)
            self.checking = False
            return told

        return asked

    def share(self, updates: range) -> float:
        """Tokens of the checks in these updates, over as many updates' own tokens."""
        checks = sum(self.sent.get((True, update + 1), 0.0) for update in updates)
        own = sum(sent for (checking, _), sent in self.sent.items() if not checking)
        return checks / len(updates) / (own / self.update)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    made = Meter()
    monkeypatch.setattr(tether.hacks, "SMALL", 0)  # as for a large model: no further responses for the bank
    monkeypatch.setattr(Watch, "before", made.watched(Watch.before, begins=True))
    monkeypatch.setattr(Watch, "after", made.watched(Watch.after, begins=False))
    for name in ("evaluate", "evaluate_reference", "logits_of"):
        counted = made.count(getattr(LanguagePolicy, name), lambda _, sequences, *rest: sequences.ids.numel())
        monkeypatch.setattr(LanguagePolicy, name, counted)
    generated = made.count(
        LanguagePolicy.generate, lambda _, prompts, uniforms, *rest: prompts.ids.numel() + uniforms.numel()
    )
    monkeypatch.setattr(LanguagePolicy, "generate", generated)
    return made


def test_the_checks_send_less_than_three_percent_of_the_tokens_of_a_run(meter: Meter, tmp_path: Path) -> None:
    values = settings_of(
        "full", steps=STEPS, checkpoint={"every": 1000}, evaluation={"every": 1000, "prompts": 1}
    ).dump()
    values["ppo"] |= {"batch_size": 16, "sampling": {"max_new_tokens": 12}}
    values["ppo"]["update"] |= {"epochs": 4, "minibatches": 4}
    train_run(task_of(tmp_path / "sft"), RunSettings.model_validate(values), tmp_path, "run", Console(quiet=True))
    assert meter.share(range(STEPS)) < MOST
    assert meter.share(range(1)) < MOST_AT_FIRST
