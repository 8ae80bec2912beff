"""One whole update, from the same rollout, three times: in the standard library, in the skeleton, in the rooms.

The plain rung is the oracle: scalar autograd, its own Adam, nested lists. All parameters must agree afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tether import numerics
from tether.advantages import estimate
from tether.batch import Evaluation, Generation, Prompts, ReferenceEvaluation, Rollout, Scores, Sequences
from tether.config import AdvantageSettings, RewardSettings, UpdateSettings
from tether.ladder import plain, skeleton
from tether.optimiser import Optimiser
from tether.rewards import tether
from tether.update import update
from tolerances import Tolerance

VOCAB, LENGTH, HIDDEN, ROWS = 5, 4, 3, 6
LEARNING_RATE = 0.01
MINIBATCHES = [[0, 3, 5], [1, 2, 4]]
FLOAT64 = Tolerance(relative=1e-9, absolute=1e-10)
"""Sixteen Adam steps in float64: m/√v amplifies the round-off of a gradient that is nearly zero."""


class TinyTorch(nn.Module):
    """plain.TinyPolicy as a torch module with a Hugging Face face; prompts of one token, so that t = position."""

    def __init__(self, twin: plain.TinyPolicy) -> None:
        super().__init__()
        for name in ("embedding", "position", "output", "output_bias"):
            self.register_parameter(name, nn.Parameter(torch.tensor(getattr(twin, name), dtype=torch.float64)))
        self.value_head = nn.Linear(HIDDEN, 1, dtype=torch.float64)
        self.value_head.weight.data = torch.tensor([twin.value_weight], dtype=torch.float64)
        self.value_head.bias.data = torch.tensor([twin.value_bias], dtype=torch.float64)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: object) -> SimpleNamespace:
        hidden = torch.tanh(self.embedding[input_ids] + self.position[position_ids.clamp(max=LENGTH - 1)])
        return SimpleNamespace(logits=hidden @ self.output.T + self.output_bias, hidden_states=[hidden])

    def language_model(self) -> list[nn.Parameter]:
        return [self.embedding, self.position, self.output, self.output_bias]

    def numbers(self) -> Tensor:
        parts = [*self.language_model(), self.value_head.weight, self.value_head.bias]
        return torch.cat([part.detach().flatten() for part in parts])

    # ── batch.Policy, as far as an update asks for it ──
    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        positions = torch.arange(sequences.ids.shape[1]).expand_as(sequences.ids)
        outputs = self(sequences.ids, positions)
        reads = sequences.response_positions - 1
        logits = outputs.logits.gather(1, reads[..., None].expand(*reads.shape, VOCAB))
        values = self.value_head(outputs.hidden_states[-1]).squeeze(-1).gather(1, reads)
        logprobs = numerics.selected_logprobs(logits, sequences.responses, temperature)
        return Evaluation(logprobs, values, numerics.entropy(logits.detach()))

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"policy": self.language_model(), "value": list(self.value_head.parameters())}

    def generate(self, prompts: Prompts, uniforms: Tensor, temperature: float) -> Generation:
        raise AssertionError("an update samples nothing")

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        raise AssertionError("an update asks the reference nothing")

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def decode(self, responses: Tensor, mask: Tensor) -> list[str]:
        return [""] * len(responses)


def start() -> tuple[plain.TinyPolicy, plain.Rollout, list[float]]:
    """A policy that has left its reference, one ragged rollout of it, and scores."""
    random = Random(3)
    reference = plain.TinyPolicy.untrained(VOCAB, LENGTH, HIDDEN, random)
    policy = deepcopy(reference)
    policy.assign([number + random.gauss(0.0, 0.1) for number in policy.numbers()])
    prompts = [[random.randrange(VOCAB)] for _ in range(ROWS)]
    lengths = [4, 1, 3, 2, 4, 2]
    responses = [[random.randrange(VOCAB) for _ in range(LENGTH)] for _ in range(ROWS)]
    mask = [[t < length for t in range(LENGTH)] for length in lengths]
    logits, values = policy.forward(prompts, responses)
    ref_logits, _ = reference.forward(prompts, responses)
    logprobs = plain.selected_logprobs(logits, responses)
    ref_logprobs = plain.selected_logprobs(ref_logits, responses)
    rollout = plain.Rollout(prompts, responses, mask, logprobs, ref_logprobs, values)
    return policy, rollout, [random.gauss(0.0, 1.0) for _ in range(ROWS)]


KNOBS = [
    {"beta": 0.1},
    {"beta": 0.0, "clip_range": 0.05, "epochs": 8},
    {"beta": 2.0, "value_clip_range": None, "value_coef": 0.5, "gamma": 0.9, "lam": 0.7},
    {"beta": 0.1, "whiten": False},
]


def after_plain(knobs: Mapping[str, object], max_grad_norm: float | None = None) -> Tensor:
    policy, rollout, scores = start()
    optimiser = plain.Adam(LEARNING_RATE)
    plain.update(policy, optimiser, rollout, scores, minibatches=MINIBATCHES, max_grad_norm=max_grad_norm, **knobs)
    return torch.tensor(policy.numbers(), dtype=torch.float64)


def after_skeleton(knobs: Mapping[str, object]) -> Tensor:
    policy, rollout, scores = start()
    module = TinyTorch(policy)
    mask = torch.tensor(rollout.mask)
    ids = torch.cat([torch.tensor(rollout.prompts), torch.tensor(rollout.responses)], 1)
    real = torch.cat([torch.ones(ROWS, 1, dtype=torch.bool), mask], 1)
    inputs = {"input_ids": ids, "attention_mask": real, "position_ids": torch.arange(LENGTH + 1).expand_as(ids)}
    arrays = (torch.tensor(a, dtype=torch.float64) for a in (rollout.logprobs, rollout.ref_logprobs, rollout.values))
    optimiser = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, eps=1e-5, weight_decay=0.0)
    settings = skeleton.Settings(minibatches=MINIBATCHES, **knobs)  # type: ignore[arg-type]
    skeleton.ppo_update(
        module, module.value_head, optimiser, skeleton.Rollout(inputs, mask, *arrays),
        torch.tensor(scores, dtype=torch.float64), settings,
    )  # fmt: skip
    return module.numbers()


def after_rooms(knobs: Mapping[str, object], max_grad_norm: float | None = None, tokens: int = 4096) -> Tensor:
    policy, rollout, scores = start()
    module = TinyTorch(policy)
    settings = {"clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.1, "epochs": 4} | {
        name: value for name, value in knobs.items() if name in UpdateSettings.model_fields
    }
    update_settings = UpdateSettings(
        learning_rate=LEARNING_RATE, schedule="constant", early_stop_kl=None, max_grad_norm=max_grad_norm,
        minibatches=len(MINIBATCHES), tokens_per_micro_batch=tokens, **settings,
    )  # type: ignore[arg-type]  # fmt: skip
    advantage = AdvantageSettings(**{name: knobs[name] for name in ("gamma", "lam", "whiten") if name in knobs})
    room_rollout = as_room_rollout(rollout)
    beta = float(knobs["beta"])  # type: ignore[arg-type]
    rewards = tether(Scores(torch.tensor(scores, dtype=torch.float64)), room_rollout, beta, RewardSettings())
    experience = estimate(rewards, room_rollout, advantage)
    optimiser = Optimiser(module.trainable(), update_settings)
    order = torch.tensor([row for rows in MINIBATCHES for row in rows])
    update(module, experience, optimiser, order.repeat(update_settings.epochs, 1), update_settings)
    return module.numbers()


def as_room_rollout(rollout: plain.Rollout) -> Rollout:
    prompts = torch.tensor(rollout.prompts)
    mask = torch.tensor(rollout.mask)
    everything = torch.ones_like(prompts, dtype=torch.bool)
    names = Prompts(prompts, everything, ("",) * ROWS, tuple(range(ROWS)))
    logprobs, ref_logprobs, values = (
        torch.tensor(grid, dtype=torch.float64).masked_fill(~mask, torch.nan)
        for grid in (rollout.logprobs, rollout.ref_logprobs, rollout.values)
    )
    generation = Generation(torch.tensor(rollout.responses), mask, logprobs.float(), everything[:, 0])
    sequences = Sequences.join(names, generation, pad=0)
    return Rollout(
        names, sequences, ("",) * ROWS, logprobs, logprobs, ref_logprobs, values, logprobs, logprobs, everything[:, 0]
    )


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_plain_skeleton_and_rooms_end_in_the_same_parameters(knobs: Mapping[str, object]) -> None:
    oracle = after_plain(knobs)
    before = torch.tensor(start()[0].numbers(), dtype=torch.float64)
    assert (oracle - before).abs().max() > LEARNING_RATE  # the update moved something
    torch.testing.assert_close(after_skeleton(knobs), oracle, rtol=FLOAT64.relative, atol=FLOAT64.absolute)
    torch.testing.assert_close(after_rooms(knobs), oracle, rtol=FLOAT64.relative, atol=FLOAT64.absolute)


def test_a_clipped_gradient_norm_changes_the_rooms_as_it_changes_the_plain_rung() -> None:
    knobs = {"beta": 0.1}
    oracle = after_plain(knobs, max_grad_norm=1e-4)
    assert (oracle - after_plain(knobs)).abs().max() > 1e-3  # ε of Adam makes the norm matter
    torch.testing.assert_close(
        after_rooms(knobs, max_grad_norm=1e-4), oracle, rtol=FLOAT64.relative, atol=FLOAT64.absolute
    )


@pytest.mark.parametrize("tokens", [1, 6, 12])
def test_micro_batches_change_nothing(tokens: int) -> None:
    knobs = {"beta": 0.1}
    whole, parts = after_rooms(knobs), after_rooms(knobs, tokens=tokens)
    torch.testing.assert_close(parts, whole, rtol=FLOAT64.relative, atol=FLOAT64.absolute)
