"""Preference pairs: which of two responses is better, sampled from a policy and labelled, or read from a file.

    policy ─ K samples a prompt ─ gold scores g ─ P(a ≻ b) = σ((g_a − g_b)/noise) ─┐
    a file of prompt / chosen / rejected, plain or conversational ──────────────────┴─▶ Pairs ─▶ halves

Knows no reward model. Read next: `reward_training.py`, which learns from them; `data.py`, which reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from tether.batch import Policy, Prompt, Reward, check_rows
from tether.config import SamplingSettings
from tether.errors import InputError, NonFiniteError
from tether.prompts import PromptSource
from tether.streams import permutation, stream, uniforms

Entry = TypeVar("Entry")

BARREN_BATCHES = 8
"""Batches in a row without one pair of different responses after which sampling gives up."""


@dataclass(frozen=True)
class Pairs:
    """Comparisons: for each prompt the response that was preferred, and the other one."""

    prompts: tuple[Prompt, ...]
    """As people wrote them, before any chat template: texts, or messages of a conversation."""
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    chosen_gold: tuple[float, ...] | None = None
    """The gold score of each chosen response; None where no gold scorer is known."""
    rejected_gold: tuple[float, ...] | None = None
    origin: Mapping[str, object] = field(default_factory=dict)
    """Where they come from and how they were labelled: goes into the reward model's manifest."""
    groups: tuple[int, ...] | None = None
    """A number a pair: those that compare the same K responses share it. None where every pair stands alone."""

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected", "chosen_gold", "rejected_gold", "groups"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.prompts):
                raise InputError(f"got {len(self.prompts)} prompts and {len(column)} in {name}; wanted one a pair")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def margins(self) -> tuple[float, ...] | None:
        """Gold score of the chosen response less that of the rejected one; below 0 where the label is wrong."""
        if self.chosen_gold is None or self.rejected_gold is None:
            return None
        return tuple(good - bad for good, bad in zip(self.chosen_gold, self.rejected_gold, strict=True))

    @property
    def units(self) -> list[list[int]]:
        """The places of the pairs, those of one group together, in the order in which groups begin."""
        if self.groups is None:
            return [[place] for place in range(len(self))]
        found: dict[int, list[int]] = {}
        for place, group in enumerate(self.groups):
            found.setdefault(group, []).append(place)
        return list(found.values())

    @property
    def digest(self) -> str:
        """A hash of prompts, responses and labels, in their order."""
        text = json.dumps([self.prompts, self.chosen, self.rejected], ensure_ascii=False, default=list)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def take(self, places: Sequence[int]) -> Pairs:
        """The pairs at these places, in this order."""
        return replace(
            self,
            prompts=_some(self.prompts, places),
            chosen=_some(self.chosen, places),
            rejected=_some(self.rejected, places),
            chosen_gold=None if self.chosen_gold is None else _some(self.chosen_gold, places),
            rejected_gold=None if self.rejected_gold is None else _some(self.rejected_gold, places),
            groups=None if self.groups is None else _some(self.groups, places),
        )

    def save(self, path: Path) -> None:
        """Write them as JSON lines with the columns of TRL's preference format, and the gold scores where known."""
        names = ("prompt", "chosen", "rejected", "chosen_gold", "rejected_gold")
        columns = (self.prompts, self.chosen, self.rejected, self.chosen_gold, self.rejected_gold)
        known = {name: column for name, column in zip(names, columns, strict=True) if column is not None}
        rows = (dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True))
        aside = path.with_name(f".{path.name}.part")
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        aside.replace(path)


def sample_pairs(
    policy: Policy,
    prompts: PromptSource,
    gold: Reward,
    pairs: int,
    *,
    noise: float,
    settings: SamplingSettings,
    seed: int,
    replies: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """K = `replies` samples a prompt, each compared with each, by the gold scorer: P(a ≻ b) = σ((g_a − g_b)/noise).

    K(K − 1)/2 comparisons for the price of K samples; they belong to one group. Ouyang et al. 2022, §3.5 (K = 4 to 9).
    `noise` is in the gold score's unit: at a margin of one `noise` the better response wins 73 % of the time; 0 labels
    without error, and ties by a coin. Two samples that are the same text tell nothing and are passed over.
    `progress` is called with the pairs found and the pairs wanted.

    Raises InputError where fewer than two pairs or replies are asked for, `noise` is below 0, the gold scorer gives no
    number for a response, or the policy keeps giving the same answer.
    """
    if pairs < 2:
        raise InputError(f"asked for {pairs} preference pairs; wanted at least 2, and hundreds to learn from")
    if replies < 2:
        raise InputError(f"asked for {replies} replies a prompt; wanted at least 2 to compare")
    _check_noise(noise)
    found = []
    source = replace(prompts, samples_per_prompt=replies)
    for both in islice(_comparisons(policy, source, gold, settings, seed), pairs):
        found.append(both)
        if progress is not None:
            progress(len(found), pairs)
    groups, asked, left, right, left_gold, right_gold = zip(*found, strict=True)
    origin = {
        "sampled": pairs, "replies": replies, "noise": noise, "seed": seed, "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
    }  # fmt: skip
    labelled = label(asked, left, right, left_gold, right_gold, noise=noise, seed=seed)
    return replace(labelled, origin=origin, groups=None if replies == 2 else groups)


def label(
    prompts: Sequence[Prompt],
    left: Sequence[str],
    right: Sequence[str],
    left_gold: Sequence[float],
    right_gold: Sequence[float],
    *,
    noise: float,
    seed: int,
) -> Pairs:
    """Choose between left and right by Bradley and Terry's law: P(left ≻ right) = σ((g_left − g_right)/noise)."""
    _check_noise(noise)
    margin = np.asarray(left_gold, dtype=np.float64) - np.asarray(right_gold, dtype=np.float64)
    wins = stream(seed, "label").random(len(margin)) < preference(margin, noise)
    rows = list(zip(left, right, left_gold, right_gold, strict=True))
    ordered = [(a, b, g, h) if won else (b, a, h, g) for (a, b, g, h), won in zip(rows, wins, strict=True)]
    chosen, rejected, chosen_gold, rejected_gold = zip(*ordered, strict=True) if ordered else ((), (), (), ())
    return Pairs(tuple(prompts), chosen, rejected, chosen_gold, rejected_gold, {"noise": noise, "seed": seed})


def preference(margin: np.ndarray, noise: float) -> np.ndarray:
    """σ(margin/noise); at noise 0 the step function, ½ at a tie.

    >>> preference(np.array([0.0, 1.0, -1.0]), 1.0).round(3).tolist()
    [0.5, 0.731, 0.269]
    """
    if noise == 0.0:
        return np.asarray(np.heaviside(margin, 0.5))
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * margin / noise)))  # σ without overflow


def split_halves(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs]:
    """Two random halves without a comparison or a group in common: one for the reward model, one for the hold-out.

    A prompt may occur in both, with other responses. Raises InputError where there are fewer than four pairs, or one
    group.
    """
    first, second = halves(pairs, seed)
    return pairs.take(first), pairs.take(second)


def halves(pairs: Pairs, seed: int) -> tuple[list[int], list[int]]:
    """The places of the two halves of the pairs, each in ascending order; a group is never torn."""
    units = pairs.units
    if len(pairs) < 4 or len(units) < 2:
        raise InputError(
            f"got {len(pairs)} preference pairs in {len(units)} groups; wanted at least 4 in 2 groups to split, and "
            "hundreds to learn from"
        )
    order: list[int] = permutation(seed, "halves", len(units)).tolist()
    parts = (order[: len(units) // 2], order[len(units) // 2 :])
    first, second = (sorted(place for unit in part for place in units[unit]) for part in parts)
    return first, second


def _comparisons(
    policy: Policy, source: PromptSource, gold: Reward, settings: SamplingSettings, seed: int
) -> Iterator[tuple[int, Prompt, str, str, float, float]]:
    """Group, prompt, two different responses to it and their gold scores, without end."""
    replies, barren = source.samples_per_prompt, 0
    for number in count():
        batch = source.batch(number)
        draws = uniforms(seed, "preference", number, batch.keys, settings.max_new_tokens)
        with torch.no_grad():
            generation = policy.generate(batch, draws, settings.temperature)
        texts = policy.decode(generation.responses, generation.response_mask)
        scores = _gold_scores(gold, batch.texts, texts, batch.columns)
        different = [
            (batch.keys[a] // replies, batch.texts[a], texts[a], texts[b], scores[a], scores[b])
            for first in range(0, len(texts), replies)
            for a, b in combinations(range(first, first + replies), 2)
            if texts[a] != texts[b]
        ]
        yield from different
        barren = 0 if different else barren + 1
        if barren == BARREN_BATCHES:
            raise InputError(
                f"the policy gave the same response again to each prompt of {barren} batches; wanted responses "
                "that can be compared: raise the temperature, or check that it is no finished PPO policy"
            )


def _check_noise(noise: float) -> None:
    if not noise >= 0.0:
        raise InputError(f"noise is {noise}; wanted 0 (labels without error) or more, in the gold score's unit")


def _some(column: tuple[Entry, ...], places: Sequence[int]) -> tuple[Entry, ...]:
    return tuple(column[place] for place in places)


def _gold_scores(
    gold: Reward, prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, tuple[object, ...]]
) -> list[float]:
    scores = [float(number) for number in gold(prompts, texts, **columns)]
    check_rows("the gold scorer", len(scores), len(texts))
    for row, number in enumerate(scores):
        if not np.isfinite(number):
            raise NonFiniteError(f"the gold scorer gave {number} for {texts[row][:60]!r}; wanted a finite number")
    return scores
