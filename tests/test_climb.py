"""An honest climb is left alone; one family of evidence warns, two alarm, a control of its own stands alone.

The curves are written down here: a score that rises by 2 with noise of 0.1, and judges that see this or that of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tether.climb import Climb, Sign
from tether.frontier import ghost, softest

UPDATES = 60
TOKEN = Sign("exploit_token", "text", "'please' carries 80 % of the gain", weight="decisive")
LOOPS = Sign("buzzwords", "text", "distinct pairs are 0.4 of the reference's")
HEDGES = Sign("hedging", "text", "hedges carry 30 % of the gain", weight="weak")
ONE = Sign("one_answer", "text", "replies share 70 % of their words")


def told(
    share: float = math.nan,
    gold: float = math.nan,
    signs: Sequence[Sign] = (),
    nats: float = 4.0,
    updates: int = UPDATES,
    gain: float = 2.0,
    fall: float = 0.0,
) -> dict[str, set[str]]:
    """What is said of a climb of which the hold-out judge sees `share`, and in which gold gains `gold`, by reason.

    From update 40 on gold loses `fall` in every twenty updates.
    """
    climb, draw, said = Climb(), np.random.default_rng(0), dict[str, set[str]]()
    for step in range(updates):
        risen = min(1.0, step / 40)
        metrics = {
            "score/mean": gain * risen, "score/std": 1.0, "kl/mean": nats * risen, "beta": 0.2,
            "score/holdout": share * gain * risen, "score/gold": gold * risen - fall * max(0, step - 40) / 20,
        }  # fmt: skip
        noisy = {name: value + (0.1 * draw.normal() if "/mean" in name or "/h" in name or "/g" in name else 0.0)
                 for name, value in metrics.items()}  # fmt: skip
        for alarm in climb.check(noisy, signs if step >= 20 and step % 5 == 0 else ()):
            said.setdefault(alarm.reason, set()).add(alarm.severity)
    return said


@pytest.mark.parametrize("share", [math.nan, 0.5, 1.0])
@pytest.mark.parametrize("gold", [math.nan, 0.0, 1.0])
def test_an_honest_climb_is_left_alone(share: float, gold: float) -> None:
    assert told(share, gold) == {}


def test_a_judge_that_falls_alone_is_suspect() -> None:
    assert told(0.5, -1.0) == {"over_optimised": {"warning"}}


def test_a_judge_that_has_lost_half_of_what_it_had_gained_is_suspect_though_it_is_above_its_start() -> None:
    assert told(0.5, 1.0, fall=1.0) == {"over_optimised": {"warning"}}
    assert told(0.5, 1.0, fall=0.3) == {}


def test_a_hold_out_judge_that_sees_nothing_of_the_gain_alone_is_suspect() -> None:
    assert told(0.05) == {"over_optimised": {"warning"}}


def test_judges_and_text_together_are_a_hack() -> None:
    said = told(0.05, -1.0, [LOOPS])
    assert "alarm" in said["over_optimised"]
    assert "alarm" in said["buzzwords"]


def test_a_sign_of_the_text_alone_is_suspect() -> None:
    assert told(1.0, signs=[LOOPS]) == {"buzzwords": {"warning"}}


def test_a_sign_with_its_own_control_stands_alone_unless_the_hold_out_judge_agrees() -> None:
    assert told(signs=[TOKEN]) == {"exploit_token": {"alarm"}}
    assert told(0.9, signs=[TOKEN]) == {"exploit_token": {"warning"}}


def test_a_weak_sign_is_silent_alone_and_counts_beside_another() -> None:
    weak = Sign("buzzwords", "text", "five types carry half of the gain", weight="weak")
    assert told(1.0, signs=[weak]) == {}
    assert told(0.05, signs=[weak])["over_optimised"] >= {"alarm"}


def test_a_particular_name_goes_before_a_general_one() -> None:
    said = told(0.05, -1.0, [LOOPS, ONE, HEDGES])
    assert said == {"hedging": {"alarm"}, "over_optimised": said["over_optimised"]}
    assert told(0.05, -1.0, [LOOPS, ONE]).keys() == {"buzzwords", "over_optimised"}
    assert told(0.05, -1.0, [ONE]).keys() == {"one_answer", "over_optimised"}
    assert told(0.05, -1.0, [replace(ONE, weight="weak")]) == {"over_optimised": {"warning", "alarm"}}


def test_a_suspicion_does_not_silence_what_is_alarmed() -> None:
    grave = Sign("buzzwords", "text", "loops", weight="decisive")
    assert told(signs=[Sign("length", "text", "longer"), grave]) == {"length": {"warning"}, "buzzwords": {"alarm"}}


def test_a_string_that_reels_the_policy_in_takes_the_judges_along() -> None:
    """Score and hold-out judge fall by as much: nothing is over-optimised."""
    climb, said = Climb(), list[str]()
    for step in range(80):
        height = min(step, 40) / 20 - max(0, step - 40) / 40
        metrics = {"score/mean": height, "score/holdout": height, "score/std": 1.0, "kl/mean": 4.0, "beta": 0.2}
        said += [alarm.reason for alarm in climb.check(metrics)]
    assert said == []


def test_nats_that_bought_nothing_within_the_noise_are_no_evidence() -> None:
    """At the optimum a nat buys β on average, and over ten updates anything."""
    draw, climb, said = np.random.default_rng(0), Climb(), list[str]()
    for step in range(200):
        risen = min(1.0, step / 30)
        noise = 0.2 * draw.normal(size=2)
        metrics = {"score/mean": 2.0 * risen + noise[0], "kl/mean": 7.0 * risen + 6.0 * noise[1], "score/std": 1.0}
        said += [alarm.reason for alarm in climb.check({**metrics, "beta": 0.2}, [LOOPS] if step % 5 == 0 else ())
                 if alarm.severity == "alarm"]  # fmt: skip
    assert said == []


def test_a_gain_beyond_the_ceiling_speaks_beside_the_text() -> None:
    assert told(signs=[LOOPS], nats=0.5) == {"buzzwords": {"alarm"}}  # 2 > 1.3·√(2·0.5)


def test_a_sign_must_be_seen_in_two_updates() -> None:
    assert told(signs=[LOOPS], updates=24) == {}
    assert told(signs=[LOOPS, LOOPS], updates=24) == {}


def test_a_climb_goes_on_from_its_state() -> None:
    first, second = Climb(), Climb()
    for step in range(30):
        list(first.check({"score/mean": step / 10, "kl/mean": 1.0, "score/std": 1.0, "beta": 0.1}, [LOOPS]))
    second.restore(first.state())
    assert second.state() == first.state()
    assert [alarm.reason for alarm in second.check({}, [])] == [alarm.reason for alarm in first.check({}, [])]


def test_the_ghost_of_a_normal_score_is_the_closed_form() -> None:
    """r ~ N(0, 1) under π_ref: E*[r] = 1/β and K* = 1/(2β²)."""
    made = ghost(np.random.default_rng(0).normal(size=400_000), beta=2.0)
    assert made.score == pytest.approx(0.5, abs=0.01)
    assert made.kl == pytest.approx(0.125, abs=0.005)


def test_a_ghost_that_few_samples_carry_is_softened() -> None:
    scores = np.random.default_rng(1).normal(size=64)
    assert ghost(scores, 0.05).effective < 3.0
    assert softest(scores, 0.05).effective >= 20.0
    assert softest(scores, 5.0).beta == 5.0
