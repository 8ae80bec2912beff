"""Samples for the page: tokens with what the tints need, the reference's answer beside, the most suspicious first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, pstdev

from tether.page.reading import Reader
from tether.records import Sample, Split

FAR = 1.5
"""Standard deviations from the others from which on a sample is told to stand out."""
REPEATS = 0.6
"""Share of distinct pairs of tokens below which a text repeats itself."""

Facts = dict[str, object]


def samples(reader: Reader, split: Split, step: int | None = None, row: int | None = None) -> Facts:
    """The samples of one step, by default the last; or one row through time."""
    steps = {kind: reader.sample_steps(kind) for kind in ("probe", "train")}
    if step is None and row is None:
        step = steps[split][-1] if steps[split] else None
    found = [] if step is None and row is None else reader.samples(split, step, row)
    first = references(reader, steps) if split == "probe" else {}
    beta = reader.beta_at(step if step is not None else max(steps[split], default=0))
    told = [facts(sample, _beta(reader, sample, beta, row), first, found) for sample in found]
    if row is None:
        told.sort(key=lambda one: -float(str(one["suspicion"])))
    return {"steps": steps, "step": step, "split": split, "beta": beta, "samples": told}


def _beta(reader: Reader, sample: Sample, beta: float, row: int | None) -> float:
    return beta if row is None else reader.beta_at(sample.step)


def references(reader: Reader, steps: Mapping[str, Sequence[int]]) -> dict[int, Sample]:
    """The probes' answers of update 0, where the policy was the reference; none in a fork."""
    first = steps["probe"][0] if steps["probe"] else None
    return {} if first != 0 else {sample.row: sample for sample in reader.samples("probe", first)}


def facts(sample: Sample, beta: float, first: Mapping[int, Sample], others: Sequence[Sample]) -> Facts:
    """One sample; `total` is score − β·KL."""
    suspicion, why = suspicions(sample, others)
    before = first.get(sample.row)
    return {
        "step": sample.step, "row": sample.row, "prompt": sample.prompt, "response": sample.response,
        "score": sample.score, "total": sample.score - beta * sample.kl, "kl": sample.kl,
        "scores": {name: value for name, value in sample.columns.items() if name != "score"},
        "suspicion": suspicion, "why": why, "tokens": tokens(sample),
        "reference": before and {
            "response": before.response, "score": before.score, "kl": before.kl, "tokens": tokens(before),
        },
    }  # fmt: skip


def tokens(sample: Sample) -> list[Facts]:
    """What each token cost and was worth; its text is None in runs that kept none."""
    texts = sample.pieces or [None] * len(sample.tokens)
    empty = [None] * len(sample.tokens)
    values = sample.values.tolist() if len(sample.values) else empty
    advantages = sample.advantages.tolist() if len(sample.advantages) else empty
    logprobs, ref_logprobs = sample.logprobs.tolist(), sample.ref_logprobs.tolist()
    return [
        {"text": text, "kl": own - ref, "logprob": own, "ref_logprob": ref, "value": value, "advantage": advantage}
        for text, own, ref, value, advantage in zip(texts, logprobs, ref_logprobs, values, advantages, strict=True)
    ]


def suspicions(sample: Sample, others: Sequence[Sample]) -> tuple[float, list[str]]:
    """How far a sample stands out from the others of its step, in standard deviations, and by what.

    It spends more KL than they do, the score is further above gold or the hold-out model, it repeats itself.
    """
    told: list[tuple[float, str]] = []
    spent = _z(sample.kl, [other.kl for other in others])
    told.append((spent, f"spends {sample.kl:.3g} nats, {spent:.1f} s.d. above the others"))
    for judge in ("gold", "holdout"):
        gap = _gap(sample, judge)
        if gap is not None and gap > 0:
            z = _z(gap, [other for one in others if (other := _gap(one, judge)) is not None])
            told.append((z, f"{judge} is {gap:.2g} below the score, {z:.1f} s.d. more than for the others"))
    repeats = distinct_pairs(sample.tokens.tolist())
    if repeats < REPEATS:
        told.append(
            (4.0 * (REPEATS - repeats) + FAR, f"repeats itself: {repeats:.0%} of its pairs of tokens are distinct")
        )
    return sum(max(0.0, z) for z, _ in told), [text for z, text in told if z >= FAR]


def _gap(sample: Sample, judge: str) -> float | None:
    value = sample.columns.get(judge)
    return sample.score - value if isinstance(value, float | int) and math.isfinite(sample.score) else None


def _z(value: float, others: Sequence[float]) -> float:
    known = [other for other in others if math.isfinite(other)]
    spread = pstdev(known) if len(known) > 1 else 0.0
    return (value - fmean(known)) / spread if spread > 0 and math.isfinite(value) else 0.0


def distinct_pairs(tokens: Sequence[int]) -> float:
    """Share of distinct pairs of neighbouring tokens; 1 for texts of fewer than three.

    >>> distinct_pairs([1, 2, 1, 2, 1]), distinct_pairs([1, 2])
    (0.5, 1.0)
    """
    pairs = list(pairwise(tokens))
    return len(set(pairs)) / len(pairs) if len(pairs) > 1 else 1.0
