"""Room 6: one whole update against the textbook's loop, and what stops, skips or splits it.

The oracle is written here from the formulas, without masks, padding or micro-batches: it walks the minibatches response
by response, divides by the number of tokens and steps torch's own Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rollout_of import VOCAB, rollout_of
from tether.batch import Evaluation, Experience, Outcome, Policy, Sequences
from tether.config import UpdateSettings
from tether.errors import NonFiniteError
from tether.numerics import entropy, selected_logprobs
from tether.optimiser import Optimiser
from tether.update import micro_batches, update
from tolerances import EXACT, assert_close

LENGTHS = [3, 1, 5, 2, 4, 4, 1, 3]
LENGTH = max(LENGTHS)
SETTINGS = UpdateSettings(
    epochs=3, minibatches=2, learning_rate=0.05, value_coef=0.3, early_stop_kl=None, max_grad_norm=None
)
ORDERS = torch.stack([torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(e)) for e in range(3)])


class PlaceTable(nn.Module, Policy):
    """A policy that knows nothing but the place in the response: logits and a value for each."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.logits = nn.Parameter(torch.randn(LENGTH, VOCAB, generator=draw, dtype=torch.float64))
        self.place_values = nn.Parameter(torch.randn(LENGTH, generator=draw, dtype=torch.float64))

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        size, width = sequences.response_mask.shape
        logits = self.logits[:width].expand(size, width, VOCAB)
        values = self.place_values[:width].expand(size, width)
        logprobs = selected_logprobs(logits, sequences.responses, temperature)
        return Evaluation(logprobs, values, entropy(logits.detach(), temperature))

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"policy": [self.logits], "value": [self.place_values]}


def experience_of(policy: PlaceTable, temperature: float = 1.0, stale: float = 0.0) -> Experience:
    """What the policy is to learn from; `stale` moves the old log-probabilities and values away from the policy."""
    rollout = rollout_of(LENGTHS)
    said = policy.evaluate(rollout.sequences, temperature)
    return Experience(
        sequences=rollout.sequences,
        old_logprobs=said.logprobs.detach() + stale * rollout.logprobs,
        old_values=said.values.detach() + stale * rollout.ref_logprobs,
        advantages=rollout.entropy,
        returns=rollout.values,
        metrics={},
    )


def updated(
    settings: UpdateSettings, experience: Experience | None = None, stale: float = 0.0, **options: object
) -> tuple[PlaceTable, Outcome]:
    policy = PlaceTable()
    temperature = float(options.get("temperature", 1.0))
    experience = experience_of(policy, temperature, stale) if experience is None else experience
    optimiser = Optimiser(policy.trainable(), settings)
    return policy, update(policy, experience, optimiser, ORDERS, settings, **options)


# ── the oracle ──────────────────────────────────────────────────────────────────────────────────────────────────────
def textbook_losses(
    policy: PlaceTable, experience: Experience, rows: Tensor, settings: UpdateSettings, temperature: float
) -> tuple[Tensor, Tensor]:
    """L^CLIP and the value loss of some responses, token by token."""
    policy_terms, value_terms = [], []
    for row in rows.tolist():
        for t in range(LENGTHS[row]):
            token = experience.sequences.responses[row, t]
            logprob = (policy.logits[t] / temperature).log_softmax(-1)[token]
            ratio, advantage = (logprob - experience.old_logprobs[row, t]).exp(), experience.advantages[row, t]
            low, high = 1 - settings.clip_range, 1 + settings.clip_range
            policy_terms.append(-torch.min(ratio * advantage, torch.clamp(ratio, low, high) * advantage))
            value, old, wanted = policy.place_values[t], experience.old_values[row, t], experience.returns[row, t]
            moved = torch.clamp(value, old - settings.value_clip_range, old + settings.value_clip_range)
            value_terms.append(torch.max((value - wanted) ** 2, (moved - wanted) ** 2) / 2)
    return torch.stack(policy_terms).mean(), torch.stack(value_terms).mean()


def textbook_update(settings: UpdateSettings, temperature: float = 1.0, stale: float = 0.0) -> PlaceTable:
    policy = PlaceTable()
    experience = experience_of(policy, temperature, stale)
    adam = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=settings.adam_epsilon)
    for order in ORDERS:
        for rows in order.chunk(settings.minibatches):
            policy_loss, value_loss = textbook_losses(policy, experience, rows, settings, temperature)
            adam.zero_grad()
            (policy_loss + settings.value_coef * value_loss).backward()
            adam.step()
    return policy


def assert_same_parameters(got: nn.Module, wanted: nn.Module) -> None:
    for name, parameter in wanted.named_parameters():
        assert_close(got.get_parameter(name), parameter.detach(), EXACT)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("budget", [1, 12, 4096], ids=lambda budget: f"{budget} tokens in a pass")
def test_one_update_ends_where_the_textbook_loop_ends_however_it_is_split(budget: int) -> None:
    policy, outcome = updated(SETTINGS.model_copy(update={"tokens_per_micro_batch": budget}))
    assert_same_parameters(policy, textbook_update(SETTINGS))
    assert (outcome.epochs_used, outcome.skipped_steps) == (3, 0)


def test_the_knobs_of_both_losses_reach_them() -> None:
    settings = SETTINGS.model_copy(
        update={"clip_range": 0.05, "value_clip_range": 0.4, "value_coef": 1.7, "minibatches": 4}
    )
    policy, _ = updated(settings, stale=0.3, temperature=0.7)
    assert_same_parameters(policy, textbook_update(settings, temperature=0.7, stale=0.3))


def test_a_frozen_policy_stands_still_while_its_values_are_fitted() -> None:
    policy, _ = updated(SETTINGS, policy_frozen=True)
    assert torch.equal(policy.logits, PlaceTable().logits)
    assert_close(policy.place_values, textbook_update(SETTINGS).place_values.detach(), EXACT)


def test_old_policy_advantages_and_returns_are_not_changed() -> None:
    experience = experience_of(PlaceTable())
    tensors = [experience.old_logprobs, experience.old_values, experience.advantages, experience.returns]
    versions = [x._version for x in tensors]
    updated(SETTINGS, experience)
    assert [x._version for x in tensors] == versions


# ── stopping early ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_update_that_drifts_ends_before_its_next_step() -> None:
    """At a target of nearly nothing the first step already goes too far: one step, and no second."""
    policy, outcome = updated(SETTINGS.model_copy(update={"early_stop_kl": 1e-9, "minibatches": 1}))
    one_step = SETTINGS.model_copy(update={"minibatches": 1})
    wanted = PlaceTable()
    update(wanted, experience_of(wanted), Optimiser(wanted.trainable(), one_step), ORDERS[:1], one_step)
    assert outcome.epochs_used == 2
    assert_same_parameters(policy, wanted)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_update_ends_at_one_and_a_half_times_the_target() -> None:
    settings = SETTINGS.model_copy(update={"minibatches": 1})
    drift = updated(settings)[1].metrics["ppo/approx_kl"]
    just_reached = settings.model_copy(update={"early_stop_kl": drift / 1.5 * 1.001})
    just_missed = settings.model_copy(update={"early_stop_kl": drift / 1.5 * 0.999})
    assert_same_parameters(updated(just_reached)[0], updated(settings)[0])
    assert not torch.equal(updated(just_missed)[0].logits, updated(settings)[0].logits)


class CountingTable(PlaceTable):
    """Counts its forward passes."""

    passes = 0

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        self.passes += 1
        return super().evaluate(sequences, temperature)


def passes_of(settings: UpdateSettings) -> int:
    policy = CountingTable()
    update(policy, experience_of(PlaceTable()), Optimiser(policy.trainable(), settings), ORDERS, settings)
    return policy.passes


def test_nothing_is_computed_after_the_pass_that_finds_the_drift() -> None:
    drifts_at_once = SETTINGS.model_copy(
        update={"minibatches": 4, "early_stop_kl": 1e-9, "learning_rate": 0.5, "max_padding": 1.0}
    )
    assert passes_of(drifts_at_once) == 2  # one step, and the pass that sees what it did


def test_padding_is_allowed_as_far_as_its_knob_says() -> None:
    assert passes_of(SETTINGS.model_copy(update={"max_padding": 1.0})) == 3 * 2  # epochs × minibatches
    assert passes_of(SETTINGS.model_copy(update={"max_padding": 0.0})) > 3 * 2


# ── what is not finite ──────────────────────────────────────────────────────────────────────────────────────────────
def broken(field: str, row: int) -> Experience:
    """Experience with one NaN in a real place."""
    experience = experience_of(PlaceTable())
    tensor = getattr(experience, field).clone()
    tensor[row, 0] = math.nan
    return replace(experience, **{field: tensor})


@pytest.mark.parametrize("row", [2, 6], ids=["the first pass of its minibatch", "the last"])
@pytest.mark.parametrize("field", ["advantages", "returns"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(field: str, row: int) -> None:
    policy, outcome = updated(SETTINGS.model_copy(update={"tokens_per_micro_batch": 1}), broken(field, row))
    assert outcome.skipped_steps == outcome.metrics["ppo/skipped_steps"] == 3.0
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    wanted = PlaceTable()
    experience = experience_of(wanted)
    adam = torch.optim.Adam(wanted.parameters(), lr=SETTINGS.learning_rate, eps=SETTINGS.adam_epsilon)
    for rows in (rows for order in ORDERS for rows in order.chunk(2) if row not in rows):
        policy_loss, value_loss = textbook_losses(wanted, experience, rows, SETTINGS, 1.0)
        adam.zero_grad()
        (policy_loss + SETTINGS.value_coef * value_loss).backward()
        adam.step()
    assert_same_parameters(policy, wanted)


@pytest.mark.parametrize(("field", "name"), [("advantages", "policy loss"), ("returns", "value loss")])
def test_eight_skipped_steps_stop_the_run_and_name_the_tensor(field: str, name: str) -> None:
    settings = SETTINGS.model_copy(update={"minibatches": 1})
    policy, experience = PlaceTable(), broken(field, row=0)
    orders = ORDERS[:1].repeat(8, 1)
    assert update(policy, experience, Optimiser(policy.trainable(), settings), orders[:7], settings).skipped_steps == 7
    with pytest.raises(NonFiniteError, match=f"8 optimiser steps .* the first in the {name}"):
        update(policy, experience, Optimiser(policy.trainable(), settings), orders, settings)


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_first_minibatch_has_ratio_one_and_no_drift() -> None:
    _, outcome = updated(SETTINGS.model_copy(update={"minibatches": 1}))
    assert outcome.metrics["ppo/ratio_first"] == 0.0
    assert outcome.metrics["ppo/approx_kl_first"] == 0.0
    assert outcome.metrics["ppo/approx_kl"] > 0.0


def test_the_metrics_are_means_over_the_tokens_of_the_update() -> None:
    settings = SETTINGS.model_copy(update={"minibatches": 1, "learning_rate": 1e-30, "tokens_per_micro_batch": 12})
    policy = PlaceTable()
    experience = experience_of(policy, stale=0.3)
    _, outcome = updated(settings, experience)
    mask, everything = experience.sequences.response_mask, torch.arange(len(LENGTHS))
    losses = textbook_losses(policy, experience, everything, settings, 1.0)
    policy_loss, value_loss = (loss.item() for loss in losses)
    said = policy.evaluate(experience.sequences, 1.0)
    ratio = (said.logprobs - experience.old_logprobs)[mask].exp().detach()
    moved = (said.values - experience.old_values)[mask].detach()
    wanted = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/total": policy_loss + settings.value_coef * value_loss,
        "ppo/approx_kl": float((ratio - 1 - ratio.log()).mean()),
        "ppo/approx_kl_first": float((ratio - 1 - ratio.log()).mean()),
        "ppo/clip_fraction": float(((ratio - 1).abs() > 0.2).double().mean()),
        "ppo/value_clip_fraction": float((moved.abs() > 0.2).double().mean()),
        "ppo/ratio_max": float((ratio - 1).abs().max()),
        "ppo/ratio_first": float((ratio - 1).abs().max()),
        "ppo/epochs_used": 3.0,
        "ppo/skipped_steps": 0.0,
    }
    assert {name: outcome.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert 0.0 < wanted["ppo/clip_fraction"] < 1.0
    assert 0.0 < wanted["ppo/value_clip_fraction"] < 1.0


def test_the_gradient_norm_is_that_of_policy_and_values_together() -> None:
    settings = SETTINGS.model_copy(update={"minibatches": 1, "learning_rate": 1e-30})
    policy = PlaceTable()
    losses = textbook_losses(policy, experience_of(policy), torch.arange(len(LENGTHS)), settings, 1.0)
    (losses[0] + settings.value_coef * losses[1]).backward()
    norm = sum(float((parameter.grad**2).sum()) for parameter in policy.parameters()) ** 0.5
    assert updated(settings)[1].metrics["grad/norm"] == pytest.approx(norm, rel=1e-9)


# ── micro-batches ───────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_micro_batches_hold_each_row_once_within_budget_and_waste(lengths: list[int], tokens: int) -> None:
    groups = micro_batches(torch.tensor(lengths), tokens)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[row] for row in group.tolist()]
        positions = max(sizes) * len(sizes)
        assert len(sizes) == 1 or positions <= tokens
        assert sum(sizes) >= 0.95 * positions


def test_rows_of_one_length_share_a_pass_as_far_as_the_budget_goes() -> None:
    assert [len(group) for group in micro_batches(torch.full((8,), 10), 80)] == [8]
    assert [len(group) for group in micro_batches(torch.full((8,), 10), 79)] == [7, 1]


def test_the_padding_waste_is_the_share_of_positions_without_a_token() -> None:
    settings = SETTINGS.model_copy(update={"minibatches": 1, "tokens_per_micro_batch": 24})
    lengths = experience_of(PlaceTable()).sequences.lengths
    groups = [lengths[group] for group in micro_batches(lengths, 24)]
    positions = sum(int(group.max()) * len(group) for group in groups)
    assert updated(settings)[1].metrics["padding/waste"] == pytest.approx(1.0 - float(lengths.sum()) / positions)
