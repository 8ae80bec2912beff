"""Runs for the page's tests, made without training: curves of a known shape, samples that would do harm as markup."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tether.config import RunSettings
from tether.records import Sample
from tether.store import RunStore

EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> &amp; berries"
"""What a model may say: it is shown as it stands."""


def settings(beta: float, steps: int) -> dict[str, object]:
    return RunSettings(world="nano").with_beta(beta).with_steps(steps).dump()


def numbers(step: int, beta: float) -> dict[str, float]:
    """Curves of a run that learns: the score levels off, K settles, a little noise that is always the same."""
    wave = 0.05 * math.sin(step * 1.7)
    rise = 1 - math.exp(-step / 40)
    return {
        "score/mean": 1.8 * rise + wave, "score/gold": 0.5 * rise - wave, "score/holdout": 1.3 * rise,
        "kl/mean": 5.0 * rise + wave, "beta": beta, "entropy/per_token": 1 - 0.3 * rise, "length/mean": 14 + wave,
        "ppo/clip_fraction": 0.1, "value/explained_variance": 0.5 * rise, "distinct_2": 0.6, "tokens/per_second": 400.0,
        "seconds/checks": 0.1, "seconds/total": 1.0, "seconds/generate": 0.3, "seconds/update": 0.5,
    }  # fmt: skip


def sample(step: int, row: int, split: str = "train") -> Sample:
    logprobs = np.array([-0.5, -1.0, -0.1], np.float32)
    reply = EVIL if row == 0 else f"the fox eats berries {step}."
    train = split == "train"
    credit = np.array([0.2, 0.4, -0.3], np.float32) if train else np.empty(0, np.float32)
    return Sample(
        step=step, row=row, prompt=f"what does the fox eat? ({row})", response=reply, score=1.5 - row * 0.1,
        reward_total=1.2 - row * 0.1, kl=3.0 - row, tokens=np.arange(3), logprobs=logprobs,
        ref_logprobs=logprobs - np.float32(min(step, 1)), values=credit, advantages=credit,
        split="train" if train else "probe", pieces=(reply, " said", "."), columns={"gold": 0.2} if not train else {},
    )  # fmt: skip


def make_run(root: Path, name: str, *, updates: int = 60, beta: float = 0.2, ended: bool = True) -> Path:
    """A run folder with curves, samples of both splits at its start and end, and one alarm that ended."""
    with RunStore.create(root, name, settings(beta, updates)) as store:
        for step in range(updates):
            with store.update(step) as update:
                update.metrics(numbers(step, beta))
                if step in (0, updates - 1):
                    for row in range(4):
                        update.sample(sample(step, row))
                        update.sample(sample(step, row, "probe"))
                if step == updates // 2:
                    told = {
                        "seen": "0.5 of the tokens are at the clip",
                        "why": "w",
                        "remedy": "r",
                        "evidence": {"x": 1.0},
                    }
                    update.event("too_many_epochs", told, "warning")
        store.heartbeat(updates - 1, "done", "finished" if ended else "running")
    return root / name
