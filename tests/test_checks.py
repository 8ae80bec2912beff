"""The invariants of an update: silent on what the rooms make, and each error of the rooms seen by its own name.

What is right is made by the rooms; what is wrong is written here by hand, not by the code under test.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rollout_of import rollout_of
from tether.advantages import estimate
from tether.batch import Outcome, Rewards, Rollout, Scores
from tether.checks import Moment, Tolerance, check, check_outcome, check_start
from tether.config import PPOSettings
from tether.rewards import tether

BETA = 0.3
LENGTHS = [3, 1, 5, 2, 4, 7]
EXACTLY = Tolerance.of(torch.float32)


def clean(rollout: Rollout) -> Rollout:
    """The same numbers with lengths that agree with the prompts."""
    lengths = rollout.sequences.prompt_lengths
    mask = torch.arange(int(lengths.max())) >= int(lengths.max()) - lengths[:, None]
    return replace(rollout, prompts=replace(rollout.prompts, ids=torch.zeros_like(mask, dtype=torch.long), mask=mask))


def moment_of(seed: int = 0, finished: list[bool] | None = None, **reward: object) -> Moment:
    settings = PPOSettings.model_validate({"reward": {"beta": BETA} | reward})
    rollout = clean(rollout_of(LENGTHS, seed, finished))
    scores = Scores(torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(seed)))
    rewards = tether(scores, rollout, BETA, settings.reward)
    experience = estimate(rewards, rollout, settings.advantage)
    return Moment(3, settings, BETA, rollout, scores, rewards, experience, EXACTLY)


def with_rewards(moment: Moment, rewards: Tensor) -> Moment:
    """Another room 4, and a room 5 that is right about it."""
    made = Rewards(torch.where(moment.rollout.response_mask, rewards, 0.0), moment.scores.scores, BETA)
    return replace(moment, rewards=made, experience=estimate(made, moment.rollout, moment.settings.advantage))


def parts(moment: Moment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ℓ, where the last token is, where the first is, and the scores as a column."""
    rollout = moment.rollout
    kl = torch.where(rollout.response_mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    places = torch.arange(kl.shape[1])
    last = (places == rollout.sequences.response_lengths[:, None] - 1).double()
    return kl, last, (places == 0).double().expand_as(last), moment.scores.scores.double()[:, None]


def reasons(moment: Moment) -> set[str]:
    return {alarm.reason for alarm in check(moment)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["replace", "subtract", "zero", "bootstrap", "keep"])
@pytest.mark.parametrize("whiten", [False, True])
def test_what_the_rooms_make_is_never_alarmed(seed: int, rule: str, whiten: bool) -> None:
    finished = [True, False, True, True, False, True]
    assert check(moment_of(seed, finished, missing_eos=rule, whiten=whiten)) == []


WRONG = {
    "kl_sign": lambda kl, last, first, score: BETA * kl + last * score,
    "both_signs": lambda kl, last, first, score: BETA * kl - last * score,
    "dense_reward": lambda kl, last, first, score: -BETA * kl + score,
    "kl_averaged": lambda kl, last, first, score: -BETA * kl / torch.tensor(LENGTHS)[:, None] + last * score,
    "wrong_kl_form": lambda kl, last, first, score: -BETA * (torch.exp(-kl) - 1 + kl) + last * score,
    "score_misplaced": lambda kl, last, first, score: -BETA * kl + first * score,
}


@pytest.mark.parametrize("reason", WRONG)
def test_rewards_that_are_not_on_the_string_are_named(reason: str) -> None:
    moment = moment_of()
    assert reasons(with_rewards(moment, WRONG[reason](*parts(moment)))) == {reason}


UNLISTED = {
    "half the score on the token before the last": (
        "dense_reward", lambda kl, last, first, score: -BETA * kl + last * score + 0.5 * score * first
    ),
    "a string at twice β": ("wrong_kl_form", lambda kl, last, first, score: -2 * BETA * kl + last * score),
    "a string clamped at 0": (
        "wrong_kl_form", lambda kl, last, first, score: -BETA * kl.clamp(min=0) + last * score
    ),
    "the mean of the score": ("score_misplaced", lambda kl, last, first, score: -BETA * kl + last * score.mean()),
    "a slingshot of half the strength": ("kl_sign", lambda kl, last, first, score: 0.5 * BETA * kl + last * score),
}  # fmt: skip


@pytest.mark.parametrize("what", UNLISTED)
def test_rewards_that_nobody_listed_are_alarmed_too(what: str) -> None:
    reason, make = UNLISTED[what]
    moment = moment_of()
    assert reasons(with_rewards(moment, make(*parts(moment)))) == {reason}


def test_a_beta_that_is_not_the_controllers_is_alarmed() -> None:
    assert reasons(replace(moment_of(), beta=2 * BETA)) == {"wrong_kl_form"}


def test_whitening_over_padding_is_alarmed() -> None:
    moment = moment_of()
    plain = moment.experience.returns - torch.where(moment.rollout.response_mask, moment.rollout.values, 0.0)
    wrong = (plain - plain.mean()) / plain.std(correction=0)
    assert "whiten_over_pads" in reasons(replace(moment, experience=replace(moment.experience, advantages=wrong)))


def test_credit_off_by_one_is_alarmed() -> None:
    moment = moment_of()
    shifted = moment.experience.returns.roll(1, dims=1)
    assert "wrong_advantages" in reasons(replace(moment, experience=replace(moment.experience, returns=shifted)))


def test_advantages_of_other_rows_are_alarmed() -> None:
    moment = moment_of()
    swapped = moment.experience.advantages[[1, 0, 2, 3, 4, 5]]
    fits = torch.where(moment.rollout.response_mask, swapped, 0.0)
    assert reasons(replace(moment, experience=replace(moment.experience, advantages=fits)))


@pytest.mark.parametrize("tensor", ["logprobs", "ref_logprobs", "values"])
def test_a_number_that_is_not_finite_is_named(tensor: str) -> None:
    moment = moment_of()
    numbers = getattr(moment.rollout, tensor).clone()
    numbers[2, 1] = torch.nan
    (alarm,) = check(replace(moment, rollout=replace(moment.rollout, **{tensor: numbers})))
    assert (alarm.reason, alarm.evidence["count"]) == ("nan", 1)


def test_padding_is_never_looked_at() -> None:
    moment = moment_of()
    assert bool(moment.rollout.logprobs[~moment.rollout.response_mask].isnan().any())  # rollout_of poisons it
    assert check(moment) == []


def test_a_response_that_begins_in_its_prompt_is_alarmed() -> None:
    moment = moment_of()
    sequences = moment.rollout.sequences
    early = replace(sequences, prompt_lengths=(sequences.prompt_lengths - 1).clamp(min=0))
    assert reasons(replace(moment, rollout=replace(moment.rollout, sequences=early))) == {"prompt_in_mask"}


@pytest.mark.parametrize(("finished", "stops"), [(True, {99}), (False, {99}), (False, {0, 1, 2, 3, 4})])
def test_responses_end_with_a_stop_token_or_fill_their_room(finished: bool, stops: set[int]) -> None:
    moment = moment_of(finished=[finished] * len(LENGTHS), missing_eos="keep")
    assert reasons(replace(moment, stops=frozenset(stops))) == {"no_eos_credit"}


def test_a_start_off_the_reference_is_alarmed_and_one_at_it_is_not() -> None:
    moment = moment_of()
    (alarm,) = check_start(moment)
    assert (alarm.reason, alarm.verdict) == ("wrong_reference", "NOT ATTACHED")
    same = replace(
        moment.rollout, ref_logprobs=moment.rollout.logprobs, full_kl=torch.zeros_like(moment.rollout.values)
    )
    assert list(check_start(replace(moment, rollout=same))) == []


def test_a_first_ratio_off_one_and_a_skipped_step_are_alarmed() -> None:
    assert list(check_outcome(Outcome(4, 0, {"ppo/ratio_first": 1e-6}), EXACTLY)) == []
    assert [a.reason for a in check_outcome(Outcome(4, 0, {"ppo/ratio_first": 0.05}), EXACTLY)] == ["first_ratio"]
    assert [a.reason for a in check_outcome(Outcome(4, 2, {"ppo/ratio_first": 0.0}), EXACTLY)] == ["nan"]
