"""Sampler honesty: every transform is named from samples of it, and an honest sampler is left alone.

The policy is a table of logits; what is drawn from it is drawn here, with the transform written out in numpy, so that
neither the likelihoods nor the sampler under test are their own oracle. Batches are those of the recipes: 32 responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tether.batch import Prompts, Rollout, Sequences
from tether.checks import Tolerance
from tether.honesty import FALSE_ALARMS, Honesty

ROWS, WIDTH, VOCAB, EOS = 32, 16, 80, 3
FAVOURITE = 37
UPDATES = 12
Numbers = np.ndarray


class Table:
    """A policy whose next-token logits depend on the place and on the token before: [place, before, vocab]."""

    vocab, stops = VOCAB, frozenset({EOS})

    def __init__(self, seed: int, loops: bool = False) -> None:
        """`loops`: the same at every place, and sharp, so that what was said comes again."""
        draw = torch.Generator().manual_seed(seed)
        self.logits = 2.0 * torch.randn(WIDTH + 1, VOCAB, VOCAB, generator=draw)
        if loops:
            self.logits = 1.6 * self.logits[:1].expand_as(self.logits)
        self.logits[:, :, EOS] += 1.0
        self.old = self.logits + 0.8 * torch.randn(WIDTH + 1, VOCAB, VOCAB, generator=draw)

    def logits_of(self, sequences: Sequences) -> Tensor:
        rows, places = sequences.response_mask.nonzero(as_tuple=True)
        before = sequences.ids[rows, sequences.prompt_lengths[rows] + places - 1]
        return self.logits[places, before]


Transform = Callable[[Numbers, "Row"], Numbers]


class Row:
    """A response while it is written."""

    def __init__(self, prompt: list[int]) -> None:
        self.ids, self.start = list(prompt), len(prompt)

    @property
    def place(self) -> int:
        return len(self.ids) - self.start


def chances(logits: Numbers) -> Numbers:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def kept(logits: Numbers, keep: Numbers) -> Numbers:
    return chances(np.where(keep, logits, -np.inf))


def nucleus(logits: Numbers, p: float) -> Numbers:
    order = np.argsort(-logits)
    sums = np.cumsum(chances(logits)[order])
    keep = np.zeros(VOCAB, bool)
    keep[order[: int((sums < p).sum()) + 1]] = True
    return kept(logits, keep)


def penalised(logits: Numbers, row: Row, penalty: float) -> Numbers:
    seen = np.isin(np.arange(VOCAB), row.ids)
    return chances(np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits))


def unended(logits: Numbers, row: Row, least: int) -> Numbers:
    return chances(logits) if row.place >= least else kept(logits, np.arange(VOCAB) != EOS)


def biased(logits: Numbers, bias: float) -> Numbers:
    return chances(logits + bias * (np.arange(VOCAB) == FAVOURITE))


def unrepeated(logits: Numbers, row: Row, size: int) -> Numbers:
    """No `size` ids in a row may come again, of prompt or response."""
    ids, last = row.ids, row.ids[len(row.ids) - size + 1 :]
    banned = {ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last}
    return kept(logits, ~np.isin(np.arange(VOCAB), list(banned)))


TRANSFORMS: dict[str, tuple[str, float, Transform]] = {
    "temperature .7": ("temperature_mismatch", 0.7, lambda z, row: chances(z / 0.7)),
    "temperature .85": ("temperature_mismatch", 0.85, lambda z, row: chances(z / 0.85)),
    "temperature 1.3": ("temperature_mismatch", 1.3, lambda z, row: chances(z / 1.3)),
    "top-k 20": ("top_k", 20, lambda z, row: kept(z, z >= np.sort(z)[-20])),
    "top-k 9": ("top_k", 9, lambda z, row: kept(z, z >= np.sort(z)[-9])),
    "top-p .95": ("top_p", 0.95, lambda z, row: nucleus(z, 0.95)),
    "top-p .97": ("top_p", 0.97, lambda z, row: nucleus(z, 0.97)),
    "min-p .05": ("min_p", 0.05, lambda z, row: kept(z, z >= z.max() + math.log(0.05))),
    "minimum length 8": ("min_length", 8, lambda z, row: unended(z, row, 8)),
    "no EOS at all": ("min_length", 10**9, lambda z, row: unended(z, row, 10**9)),
    "repetition penalty 1.3": ("repetition_penalty", 1.3, lambda z, row: penalised(z, row, 1.3)),
    "a bonus of 1": ("token_biased", 1.0, lambda z, row: biased(z, 1.0)),
    "a bonus of 3": ("token_biased", 3.0, lambda z, row: biased(z, 3.0)),
    "a malus of 1 on the EOS": ("token_biased", -1.0, lambda z, row: chances(z - 1.0 * (np.arange(VOCAB) == EOS))),
}


def rollout_of(table: Table, rng: np.random.Generator, transform: Transform | None, logits: Tensor) -> Rollout:
    """Responses drawn by hand from the transformed distribution; the policy's own log-probabilities beside them."""
    source, written = logits.numpy().astype(float), []
    for _ in range(ROWS):
        row = Row([int(token) for token in rng.integers(4, VOCAB, size=3)])
        while row.place < WIDTH and (row.place == 0 or row.ids[-1] != EOS):
            z = source[row.place, row.ids[-1]]
            row.ids.append(int(rng.choice(VOCAB, p=chances(z) if transform is None else transform(z, row))))
        written.append(row)
    return told(table, written)


def told(table: Table, written: list[Row]) -> Rollout:
    lengths = torch.tensor([row.place for row in written])
    total = max(len(row.ids) for row in written)
    ids = torch.tensor([row.ids + [0] * (total - len(row.ids)) for row in written])
    sequences = Sequences(ids, torch.full_like(lengths, 3), lengths)
    mask = sequences.response_mask
    every = torch.log_softmax(table.logits_of(sequences), dim=-1)
    own = every.gather(1, sequences.responses[mask][:, None])[:, 0]
    before = sequences.ids.gather(1, sequences.response_positions - 1)[mask]
    old = torch.log_softmax(table.old[mask.nonzero(as_tuple=True)[1], before], dim=-1)
    reference = old.gather(1, sequences.responses[mask][:, None])[:, 0]
    zeros = torch.zeros(mask.shape)
    logprobs, ref_logprobs = zeros.masked_scatter(mask, own), zeros.masked_scatter(mask, reference)
    prompts = Prompts(ids[:, :3], torch.ones(ROWS, 3).bool(), ("",) * ROWS, tuple(range(ROWS)))
    return Rollout(
        prompts, sequences, ("",) * ROWS, logprobs, logprobs, ref_logprobs, zeros, zeros, zeros, lengths < WIDTH
    )


def first_name(
    seed: int, transform: Transform | None, stale: bool = False, loops: bool = False
) -> tuple[str, float | None, int] | None:
    """The first failure that is named, its value, and the update; `sampler_dishonest` waits for a better name."""
    table, rng, honesty = (
        Table(seed, loops),
        np.random.default_rng(seed),
        Honesty(seed, 1.0, Tolerance.of(torch.float32)),
    )
    for step in range(UPDATES):
        for alarm in honesty.check(
            table, rollout_of(table, rng, transform, table.old if stale else table.logits), step
        ):
            if alarm.reason != "sampler_dishonest":
                return alarm.reason, alarm.evidence["value"], step  # type: ignore[return-value]
    return None


@pytest.mark.parametrize("what", TRANSFORMS)
def test_a_transform_is_named_with_its_value(what: str) -> None:
    name, value, transform = TRANSFORMS[what]
    found = [first_name(seed, transform) for seed in range(3)]
    assert [one and one[0] for one in found] == [name] * 3
    for one in found:
        assert one is not None
        got = one[1]
        assert got is not None
        assert got == pytest.approx(value, rel=0.35) or (name == "min_length" and got >= min(value, WIDTH))


@pytest.mark.parametrize("size", [2, 3])
def test_a_ban_of_ngrams_is_named_with_their_size(size: int) -> None:
    found = [first_name(seed, lambda z, row: unrepeated(z, row, size), loops=True) for seed in range(3)]
    assert [one and one[:2] for one in found] == [("no_repeat_ngram", size)] * 3


def test_a_policy_that_repeats_itself_is_left_alone() -> None:
    assert [first_name(seed, None, loops=True) for seed in range(3)] == [None] * 3


def test_a_banned_token_is_told_with_what_was_seen_and_expected() -> None:
    table, rng, honesty = Table(0), np.random.default_rng(0), Honesty(0, 1.0, Tolerance.of(torch.float32))
    banned, expected = np.arange(VOCAB) == FAVOURITE, 0.0
    for step in range(UPDATES):
        rollout = rollout_of(table, rng, lambda z, row: kept(z, ~banned), table.logits)
        expected += float(torch.softmax(table.logits_of(rollout.sequences), dim=-1)[:, FAVOURITE].sum())
        for alarm in honesty.check(table, rollout, step):
            assert (alarm.reason, alarm.evidence["token"], alarm.evidence["drawn"]) == ("token_biased", FAVOURITE, 0.0)
            assert alarm.evidence["expected"] == pytest.approx(expected, rel=0.01) if step < 4 else True
            assert "banned" in alarm.seen
            return
    raise AssertionError("nothing was said")


def test_old_weights_are_named() -> None:
    assert [(first_name(seed, None, stale=True) or ("",))[0] for seed in range(3)] == ["stale_sampler"] * 3


def test_an_honest_sampler_is_left_alone() -> None:
    assert [first_name(seed, None) for seed in range(6)] == [None] * 6


@pytest.mark.parametrize(("odds", "looks"), [(2.0, 0), (100.0, 3), (1e15, 0)], ids=["honest", "suspect", "proven"])
def test_a_suspect_sampler_is_looked_at_in_every_update(odds: float, looks: int) -> None:
    table, rng, honesty = Table(1), np.random.default_rng(1), Honesty(1, 1.0, Tolerance.of(torch.float32))
    for step in range(4):
        list(honesty.check(table, rollout_of(table, rng, None, table.logits), step))
    for step in (5, 7, 9):
        honesty.wealth[:] = math.log(odds)
        list(honesty.check(table, rollout_of(table, rng, None, table.logits), step))
    assert honesty.looks == 4 + looks


def test_the_wager_on_an_honest_sampler_is_fair() -> None:
    """Ville: over many runs the wager exceeds 1/α in a share α of them at most; here at α = 5 %, of 40 runs."""
    highest = []
    for seed in range(40):
        table, rng, honesty = (
            Table(0),
            np.random.default_rng(1000 + seed),
            Honesty(seed, 1.0, Tolerance.of(torch.float32)),
        )
        evidence = []
        for step in range(3):
            list(honesty.check(table, rollout_of(table, rng, None, table.logits), step))
            evidence.append(honesty.log_evidence())
        highest.append(max(evidence))
    assert sum(one >= math.log(20.0) for one in highest) <= 5  # P(more than 5 of 40 at 5 %) < 2 %
    assert max(highest) < -math.log(FALSE_ALARMS)


def test_a_transform_that_nobody_listed_is_alarmed() -> None:
    """A sampler that never says the likeliest token but for want of another is none of the families."""

    def odd(z: Numbers, row: Row) -> Numbers:
        p = chances(z)
        return chances(np.log(p) + 0.8 * ((p > 0.02) & (p < 0.1)))

    table, rng, honesty = Table(0), np.random.default_rng(0), Honesty(0, 1.0, Tolerance.of(torch.float32))
    alarms = [
        alarm for step in range(8) for alarm in honesty.check(table, rollout_of(table, rng, odd, table.logits), step)
    ]
    assert alarms
    assert alarms[0].verdict == "NOT ATTACHED"


def test_a_fault_that_begins_late_is_still_seen() -> None:
    table, rng, honesty = Table(1), np.random.default_rng(1), Honesty(1, 1.0, Tolerance.of(torch.float32))
    for step in range(60):
        assert list(honesty.check(table, rollout_of(table, rng, None, table.logits), step)) == []
    cold = TRANSFORMS["temperature .7"][2]
    found = [
        alarm.reason
        for step in range(60, 76)
        for alarm in honesty.check(table, rollout_of(table, rng, cold, table.logits), step)
    ]
    assert "temperature_mismatch" in found


def test_log_probabilities_that_are_not_the_policys_are_alarmed() -> None:
    table, rng = Table(2), np.random.default_rng(2)
    rollout = rollout_of(table, rng, None, table.logits)
    object.__setattr__(rollout, "sampler_logprobs", rollout.logprobs - 0.2)
    (alarm,) = Honesty(2, 1.0, Tolerance.of(torch.float32)).check(table, rollout, 0)
    assert alarm.reason == "sampler_dishonest"


def test_a_kl_that_stays_below_zero_is_alarmed_of_any_policy() -> None:
    """A policy that tells no distributions, and samples that the reference likes better than the policy does."""
    honest, cold = Honesty(0, 1.0, Tolerance.of(torch.float32)), Honesty(0, 1.0, Tolerance.of(torch.float32))
    rng, found = np.random.default_rng(3), []
    for step in range(20):
        table = Table(3)
        rollout = rollout_of(table, rng, None, table.logits)
        assert list(honest.check(object(), rollout, step)) == []
        found += list(cold.check(object(), rollout_of(table, rng, None, table.old), step))
    assert {alarm.reason for alarm in found} == {"negative_kl"}
