"""Whether scores belong to their rows: on replies drawn here, and scores that are written down here."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from tether.alarms import Alarm
from tether.pairing import Pairing

ROWS, VOCAB = 16, 60
Texts = list[np.ndarray]
Scoring = Callable[[Texts, Texts, np.random.Generator], np.ndarray]


def texts(draw: np.random.Generator, length: int) -> Texts:
    """Zipf-like, as words are."""
    chances = 1.0 / np.arange(1, VOCAB + 1)
    return [draw.choice(VOCAB, size=length, p=chances / chances.sum()) for _ in range(ROWS)]


def of_words(rows: Texts) -> np.ndarray:
    """A reward that likes the words 3 to 12."""
    return np.array([float(np.isin(row, np.arange(3, 13)).sum()) for row in rows])


def told(scores: Scoring, updates: int = 40, seed: int = 0, pairing: Pairing | None = None) -> list[Alarm]:
    pairing, draw, alarms = pairing or Pairing(seed), np.random.default_rng(seed), list[Alarm]()
    for step in range(updates):
        prompts, replies = texts(draw, 6), texts(draw, 14)
        alarms += pairing.check(prompts, replies, scores(prompts, replies, draw).tolist(), step)
    return alarms


RIGHT: dict[str, Scoring] = {
    "reads the reply": lambda prompts, replies, draw: of_words(replies),
    "reads the prompt": lambda prompts, replies, draw: of_words(prompts),
    "is noise": lambda prompts, replies, draw: draw.normal(size=ROWS),
    "is mostly noise": lambda prompts, replies, draw: of_words(replies) + 5.0 * draw.normal(size=ROWS),
    "wins and loses": lambda prompts, replies, draw: (of_words(replies) > 6.0).astype(float),
    "compares with the batch": lambda prompts, replies, draw: of_words(replies) - of_words(replies).mean(),
    "drifts along the rows": lambda prompts, replies, draw: np.arange(ROWS) + 0.1 * draw.normal(size=ROWS),
    "is constant": lambda prompts, replies, draw: np.ones(ROWS),
}


@pytest.mark.parametrize("what", RIGHT)
def test_a_reward_in_its_own_order_is_left_alone(what: str) -> None:
    for seed in range(4):
        assert told(RIGHT[what], seed=seed) == []


@pytest.mark.parametrize("shift", [1, -1, 5])
@pytest.mark.parametrize("of", ["prompt", "reply"])
def test_scores_of_other_rows_are_named_with_their_shift(of: str, shift: int) -> None:
    """Row r holds the score of row r + shift."""
    alarms = told(lambda prompts, replies, draw: np.roll(of_words(replies if of == "reply" else prompts), -shift))
    assert {(alarm.reason, alarm.evidence["shift"], alarm.evidence["of"]) for alarm in alarms} == {
        ("reward_shifted", shift, of)
    }


def test_replies_handed_over_in_another_order_are_named_though_the_prompts_are_right() -> None:
    alarms = told(lambda prompts, replies, draw: np.roll(of_words(replies), 1) + 0.3 * of_words(prompts))
    assert {alarm.evidence["of"] for alarm in alarms} == {"reply"}


def test_what_is_known_goes_on_from_its_state() -> None:
    late = RIGHT["reads the reply"]
    first, again = Pairing(0), Pairing(0)
    assert told(lambda *rows: np.roll(late(*rows), 1), updates=3, pairing=first) == []
    again.restore(json.loads(json.dumps(first.state())))
    assert again.state() == first.state()


def test_another_batch_size_begins_anew() -> None:
    pairing = Pairing(0)
    told(RIGHT["is noise"], updates=5, pairing=pairing)
    draw = np.random.default_rng(1)
    half = texts(draw, 6)[:8]
    assert list(pairing.check(half, half, of_words(half).tolist(), 5)) == []
    assert pairing.state()["looks"] == 1
