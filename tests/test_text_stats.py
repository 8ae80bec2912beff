"""Statistics of token sequences against counts by hand, and shares of a gain against a score that was written down."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tether.text_stats import (
    Corpus,
    compression,
    distinct_pairs,
    gain_shares,
    lifts,
    of_equal_size,
    overlap,
    top_share,
)

Rows = list[np.ndarray]


def rows(*texts: str) -> Rows:
    return [np.array([ord(letter) for letter in text], np.int64) for text in texts]


def corpus(texts: Rows, scores: list[float], size: int = 8, most: int = 10_000) -> Corpus:
    made = Corpus(most)
    for update, start in enumerate(range(0, len(texts), size)):
        made.add(texts[start : start + size], scores[start : start + size], update, {})
    return made


def random_rows(count: int, seed: int, length: int = 12, vocab: int = 30) -> Rows:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab, draw.integers(4, length)) for _ in range(count)]


def test_distinct_pairs_are_counted_over_the_group() -> None:
    assert distinct_pairs(rows("abab", "ab")) == 2 / 4  # ab, ba, ab | ab
    assert distinct_pairs(rows("a")) == 1.0


def test_overlap_leaves_out_replies_to_the_same_prompt() -> None:
    assert overlap(rows("abc", "bcd", "xyz"), ["one", "two", "two"]) == pytest.approx((2 / 4 + 0) / 2)


def test_a_loop_compresses() -> None:
    assert compression(rows("ab" * 100)) < 0.3 * compression(random_rows(17, 0))


def test_the_top_types_carry_their_part_of_the_kl() -> None:
    gains = [np.array([3.0, 1.0, -1.0])]
    assert top_share(rows("abc"), gains, most=1) == 1.0
    assert math.isnan(top_share(rows("abc"), [np.array([-1.0, 0.0, 0.0])]))


def test_the_lift_of_a_type_is_the_two_proportion_z() -> None:
    bank, now = (
        corpus(rows(*["ab"] * 9, *["cb"] * 90), [0.0] * 99),
        corpus(rows(*["ab"] * 49, *["cb"] * 50), [0.0] * 99),
    )
    lift = lifts(bank, now)[0]
    p, q = 9.5 / 100, 49.5 / 100
    mean = (p + q) / 2
    assert lift.token == ord("a")
    assert lift.z == pytest.approx((q - p) / math.sqrt(mean * (1 - mean) * 2 / 100))


def test_what_everybody_says_is_not_lifted() -> None:
    assert all(
        abs(lift.z) < 4.0
        for lift in lifts(corpus(random_rows(400, 1), [0.0] * 400), corpus(random_rows(200, 2), [0.0] * 200))
    )


@pytest.fixture
def climb() -> tuple[Corpus, Corpus]:
    """A bank without 7, and a climb in which ever more 7s are said: the score is 2 × their count, and noise."""
    draw = np.random.default_rng(3)
    bank = [row[row != 7] for row in random_rows(64, 4)]
    later = []
    for i, row in enumerate(random_rows(256, 5)):
        later.append(np.concatenate([row[row != 7], np.full(draw.binomial(6, min(0.9, i / 200)), 7)]))
    scores = [2.0 * float((row == 7).sum()) + float(draw.normal()) for row in [*bank, *later]]
    return corpus(bank, scores[:64]), corpus(later, scores[64:])


def test_the_token_that_is_paid_for_carries_the_gain(climb: tuple[Corpus, Corpus]) -> None:
    bank, seen = climb
    now = seen.last(64)
    found = lifts(bank, now)
    shares = gain_shares(bank, now, seen, [lift.token for lift in found[:5]])
    assert found[0].token == 7
    assert shares.types[7] == pytest.approx(1.0, abs=0.1)
    assert abs(shares.length) < 0.1
    assert shares.gain == pytest.approx(np.mean(now.scores) - np.mean(bank.scores))


def test_responses_that_nobody_scored_hide_no_gain() -> None:
    """The bank of a small model is filled up with responses that no reward was asked of."""
    before, after = random_rows(40, 0), [np.append(row, 99) for row in random_rows(40, 1)]
    seen = corpus(before + after, [0.0] * 40 + [1.0] * 40)
    bank = corpus(before + random_rows(20, 2), [0.0] * 40 + [math.nan] * 20)
    shares = gain_shares(bank, seen.last(40), seen, [99])
    assert shares.gain == pytest.approx(1.0)
    assert all(math.isfinite(share) for share in (*shares.types.values(), shares.length))


def test_what_rises_beside_the_score_but_not_with_it_carries_nothing() -> None:
    """Token and score both rise from update to update; within an update they have nothing to do with each other."""
    draw, bank = np.random.default_rng(11), [row[row != 7] for row in random_rows(64, 12)]
    later = [np.concatenate([row[row != 7], np.full(draw.binomial(3, i / 256), 7)]) for i, row in
             enumerate(random_rows(256, 13))]  # fmt: skip
    scores = [3.0 * (i // 8) / 32 + 0.3 * float(draw.normal()) for i in range(256)]
    start, seen = corpus(bank, [0.0] * 64), corpus(later, scores)
    assert abs(gain_shares(start, seen.last(64), seen, [7]).types[7]) < 0.2


def test_length_that_is_paid_for_carries_the_gain_and_no_token_does() -> None:
    draw = np.random.default_rng(6)
    bank, later = random_rows(64, 7), [draw.integers(0, 30, 6 + i // 16 + draw.integers(0, 4)) for i in range(256)]
    scores = [0.3 * len(row) + 0.1 * float(draw.normal()) for row in [*bank, *later]]
    start, seen = corpus(bank, scores[:64]), corpus(later, scores[64:])
    now = seen.last(64)
    shares = gain_shares(start, now, seen, [lift.token for lift in lifts(start, now)[:5]])
    assert shares.length == pytest.approx(1.0, abs=0.1)
    assert abs(shares.together) < 0.1


def test_the_oldest_give_way() -> None:
    kept = corpus(random_rows(20, 8), [float(i) for i in range(20)], most=5)
    assert kept.scores == [15.0, 16.0, 17.0, 18.0, 19.0]
    assert [len(kept.rows), len(kept.updates)] == [5, 5]


def test_a_corpus_comes_back_from_its_state() -> None:
    kept = corpus(random_rows(9, 9), [0.5 * i for i in range(9)])
    back = Corpus.of(kept.state())
    assert back.state() == kept.state()
    assert all(np.array_equal(a, b) for a, b in zip(back.rows, kept.rows, strict=True))
    assert Corpus.of(Corpus(3).state()).rows == []


def test_a_score_that_nobody_gave_comes_back_from_the_null_of_json() -> None:
    kept = corpus(random_rows(2, 10), [math.nan, 1.0])
    state = {**kept.state(), "scores": [None, 1.0]}
    assert math.isnan(Corpus.of(state).scores[0])


def test_groups_of_equal_size_hold_as_many_tokens() -> None:
    groups = list(of_equal_size(corpus(rows(*["abcde"] * 10), [0.0] * 10), tokens=15))
    assert [len(group) for group in groups] == [3, 3, 3]
