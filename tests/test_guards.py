"""Guards over curves that are written down here: what moves by design is left alone, what a fault does is told.

The controllers are played by their own recursion on a K that answers to β after a while, as it does in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from tether.config import PPOSettings
from tether.guards import Trends

Numbers = Mapping[str, float]


def told(curve: Callable[[int], Numbers], updates: int, settings: PPOSettings | None = None) -> dict[str, int]:
    """The update in which each failure is first alarmed."""
    trends, first = Trends(settings or PPOSettings()), dict[str, int]()
    for step in range(updates):
        for alarm in trends.check({"learning_rate": 1e-4, **curve(step)}):
            if alarm.severity == "alarm":
                first.setdefault(alarm.reason, step)
    return first


def steered(horizon: float, target: float, updates: int = 120, **knobs: object) -> dict[str, int]:
    """An adaptive controller over a K that lags: K moves by a tenth of the way to what β would hold it at, 1/β."""
    settings = PPOSettings.model_validate(
        {"batch_size": 16, "reward": {"controller": "adaptive", "target_kl": target, "horizon": horizon, **knobs}}
    )
    draw, state = np.random.default_rng(0), {"beta": settings.reward.beta, "kl": 0.0}

    def curve(_: int) -> Numbers:
        state["kl"] += 0.1 * (1.0 / state["beta"] - state["kl"])
        seen = max(0.0, state["kl"] * (1.0 + 0.2 * draw.normal()))
        now = {"kl/mean": seen, "beta": state["beta"]}
        state["beta"] *= 1.0 + min(max(seen / target - 1.0, -0.2), 0.2) * 16 / horizon
        return now

    return told(curve, updates, settings)


def test_a_controller_with_a_long_horizon_is_left_alone() -> None:
    assert steered(horizon=400, target=4.0, beta=0.2) == {}


def test_a_controller_that_overshoots_for_a_while_is_left_alone() -> None:
    assert steered(horizon=800, target=4.0, beta=0.12) == {}


def test_a_controller_that_had_no_time_to_answer_is_left_alone() -> None:
    """With the horizon of the paper and 16 responses, β doubles in 2166 updates."""
    assert steered(horizon=10_000, target=4.0, beta=0.14) == {}


def test_a_noisy_k_within_its_budget_is_left_alone() -> None:
    """Three of five updates above 1.5 × the target, and the mean at 1.4 ×."""
    settings = PPOSettings.model_validate({"reward": {"controller": "budget", "target_kl": 4.0, "horizon": 3000}})
    noisy = (2.0, 2.0, 8.0, 8.0, 8.0)
    assert told(lambda step: {"kl/mean": noisy[step % 5], "beta": 0.2}, 120, settings) == {}
    assert told(lambda step: {"kl/mean": noisy[step % 5] + 1.0, "beta": 0.2}, 120, settings).keys() == {
        "budget_exceeded"
    }


def test_a_controller_that_chases_its_own_tail_is_told() -> None:
    first = steered(horizon=32, target=4.0, beta=0.2)
    assert first.keys() == {"controller_hunts"}
    assert first["controller_hunts"] < 60


def test_a_budget_that_is_left_far_behind_is_told_however_slow_the_controller() -> None:
    assert steered(horizon=10_000, target=1.0, beta=0.05).keys() == {"budget_exceeded"}


def test_an_overshoot_that_comes_down_is_left_alone() -> None:
    settings = PPOSettings.model_validate(
        {"batch_size": 16, "reward": {"controller": "adaptive", "target_kl": 4.0, "horizon": 200}}
    )
    assert told(lambda step: {"kl/mean": 20.0 * math.exp(-step / 80), "beta": 0.2}, 120, settings) == {}
    assert told(lambda _: {"kl/mean": 8.0, "beta": 0.2}, 120, settings).keys() == {"budget_exceeded"}


@pytest.mark.parametrize(
    ("beta", "reasons"),
    [
        (lambda step: 0.2 * 1.06**step, set()),
        (lambda step: 0.2 * 1.1**step, {"controller_hunts"}),
        (lambda step: 0.2 * 1.4 ** math.sin(step / 6), {"controller_hunts"}),
        (lambda step: 0.2 * 1.1 ** math.sin(step / 6), set()),
    ],
    ids=["a steady climb", "twofold within ten updates", "swings", "ripples"],
)
def test_beta_hunts_by_its_haste_or_by_its_turns(beta: Callable[[int], float], reasons: set[str]) -> None:
    settings = PPOSettings.model_validate({"reward": {"controller": "adaptive", "target_kl": 4.0}})
    assert told(lambda step: {"kl/mean": 4.0, "beta": beta(step)}, 80, settings).keys() == reasons


def test_a_budget_controller_at_its_stop_is_told() -> None:
    settings = PPOSettings.model_validate({"reward": {"controller": "budget", "target_kl": 4.0}})
    assert told(lambda _: {"kl/mean": 3.0, "beta": 10.0}, 5, settings) == {"controller_hunts": 2}


@pytest.mark.parametrize(("spikes", "reasons"), [(1, set()), (2, set()), (4, {"adam_spike"})])
def test_first_updates_are_a_spike_where_most_of_them_stand_out(spikes: int, reasons: set[str]) -> None:
    """approx-KL has a long tail: one or two of five are chance."""
    assert told(lambda step: {"ppo/approx_kl": 0.2 if step < spikes else 0.02}, 40).keys() == reasons


@pytest.mark.parametrize(
    ("share", "reasons"),
    [(0.4, set()), (1.9, set()), (0.2, {"entropy_collapse"}), (2.2, {"entropy_explosion"})],
)
def test_entropy_is_alarmed_far_from_its_start_alone(share: float, reasons: set[str]) -> None:
    assert told(lambda step: {"entropy/per_token": 1.0 + (share - 1.0) * min(1.0, step / 40)}, 60).keys() == reasons


def test_numbers_that_were_not_logged_trip_no_guard() -> None:
    assert told(lambda _: {"kl/mean": math.nan}, 60) == {}


def said_of_scores(means: Callable[[int], float], updates: int = 30, texts: int = 16) -> list[tuple[int, str, str]]:
    """(update, name, severity) of all that is said of scores with these means and deviation 0.9."""
    trends = Trends(PPOSettings())
    return [
        (step, alarm.reason, alarm.severity)
        for step in range(updates)
        for alarm in trends.check({"learning_rate": 1e-4, "score/mean": means(step), "score/std": 0.9}, texts)
    ]


def test_scores_that_are_centred_in_each_update_are_told_as_a_warning_from_the_tenth_on() -> None:
    told_of = said_of_scores(lambda step: 3e-8 * (-1) ** step)  # what round-off leaves of a mean that was taken off
    assert told_of == [(step, "score_normalised", "warning") for step in range(9, 30)]


@pytest.mark.parametrize(
    "means", [lambda step: 0.0 if step % 10 else 0.125, lambda step: 1e-3, lambda step: 0.1 * step]
)
def test_scores_whose_mean_is_not_always_zero_are_left_alone(means: Callable[[int], float]) -> None:
    """Wins and losses that balance nine times of ten; a mean near 0; a climb."""
    assert said_of_scores(means) == []


def test_few_replies_with_mean_zero_are_left_alone() -> None:
    """Four scores of ±1 have mean 0 in three updates of eight."""
    assert said_of_scores(lambda step: 0.0, texts=4) == []
