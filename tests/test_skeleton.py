"""Rung 2: one update against a loop written by hand and against the lesson's listing, and what each switch changes.

The oracles are written here: response by response without padding, in plain Python where no gradient is needed, with
torch's autograd and Adam where one is. The learning runs train the file's own small Llama for a few seconds.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragged import poisoned
from tether.errors import ConfigError, NonFiniteError, TetherError
from tether.ladder import skeleton
from tether.ladder.skeleton import LISTING, MINIBATCHES, PAD, Rollout, Settings, estimate, ppo_update
from tolerances import EXACT, ROUND_OFF, assert_close

VOCAB, DIM = 7, 5
PROMPTS, RESPONSES = [2, 1, 3, 3, 1, 2], [3, 5, 1, 4, 2, 5]  # real tokens of each row
P, T, B = max(PROMPTS), max(RESPONSES), len(PROMPTS)
STEPS = 12


# ── a batch and a policy in float64 ─────────────────────────────────────────────────────────────────────────────────
def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


class ToyPolicy(nn.Module):
    """Speaks as Hugging Face's causal models do. A state sees the mean of all real tokens so far, and its own."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(11)
        shapes = (VOCAB, DIM), (P + T, DIM), (DIM, VOCAB)
        self.tokens, self.places, self.out = (nn.Parameter(normal(draw, *shape)) for shape in shapes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, output_hidden_states: bool
    ) -> SimpleNamespace:
        assert output_hidden_states
        seen = self.tokens[input_ids] * attention_mask.unsqueeze(-1)
        mean = seen.cumsum(1) / attention_mask.cumsum(1).clamp(min=1).unsqueeze(-1)
        hidden = torch.tanh(seen + mean + self.places[position_ids])
        return SimpleNamespace(logits=hidden @ self.out, hidden_states=(torch.zeros(()), hidden))


@dataclass
class Batch:
    """Six ragged rows, policy and value head, and numbers of an older policy that are far enough off to be clipped."""

    policy: ToyPolicy
    value_head: nn.Linear
    rollout: Rollout
    rm_scores: Tensor

    def parameters(self) -> list[nn.Parameter]:
        return [*self.policy.parameters(), *self.value_head.parameters()]

    def said(self, row: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of one response, from a forward pass over its real tokens and nothing else."""
        inputs = self.rollout.completions
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
        outputs = self.policy(ids[None], torch.ones_like(ids)[None], torch.arange(len(ids))[None], True)
        size = RESPONSES[row]
        logprobs = outputs.logits[0].log_softmax(-1)[-size - 1 : -1].gather(1, ids[-size:, None])[:, 0]
        return logprobs, self.value_head(outputs.hidden_states[-1][0, -size - 1 : -1])[:, 0]

    def real(self, numbers: Tensor, row: int) -> list[float]:
        return numbers[row, : RESPONSES[row]].tolist()


def batch(poison: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(5)
    policy, value_head = ToyPolicy(), nn.Linear(DIM, 1, dtype=torch.float64)
    with torch.no_grad():
        value_head.weight.copy_(normal(draw, 1, DIM))
        value_head.bias.fill_(0.1)
    mask = torch.arange(T) < torch.tensor(RESPONSES)[:, None]
    real = torch.cat([torch.arange(P) >= P - torch.tensor(PROMPTS)[:, None], mask], 1).long()
    ids = torch.randint(VOCAB, real.shape, generator=draw)
    inputs = {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        outputs = policy(**inputs, output_hidden_states=True)
        logprobs = outputs.logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
        values = value_head(outputs.hidden_states[-1][:, P - 1 : -1])[..., 0]
    off = [0.3 * normal(draw, B, T), normal(draw, B, T), 0.5 * normal(draw, B, T)]
    stale = [x + error for x, error in zip((logprobs, logprobs, values), off, strict=True)]
    stale = [poisoned(x, mask) for x in stale] if poison else stale
    return Batch(policy, value_head, Rollout(inputs, mask, *stale), normal(draw, B))


def step_with_adam(parameters: list[nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.05, eps=1e-5)


# ── the oracle: response by response ────────────────────────────────────────────────────────────────────────────────
def by_hand(data: Batch, row: int, beta: float, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages (not whitened) and returns of one response, by the sums that define them."""
    old, ref, values = (
        data.real(x, row) for x in (data.rollout.old_logprobs, data.rollout.ref_logprobs, data.rollout.values)
    )
    size = RESPONSES[row]
    rewards = [-beta * (old[t] - ref[t]) + (data.rm_scores[row].item() if t == size - 1 else 0.0) for t in range(size)]
    surprises = [rewards[t] + gamma * (values[t + 1] if t + 1 < size else 0.0) - values[t] for t in range(size)]
    advantages = [sum((gamma * lam) ** (k - t) * surprises[k] for k in range(t, size)) for t in range(size)]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def update_by_hand(data: Batch, settings: Settings, steps: list[list[int]]) -> None:
    """The same PPO update, from the formulas, without padding, masks or batches."""
    estimates = [by_hand(data, row, settings.beta, settings.gamma, settings.lam) for row in range(B)]
    pooled = torch.tensor([advantage for advantages, _ in estimates for advantage in advantages], dtype=torch.float64)
    centre, spread = pooled.mean(), (pooled.var(correction=0) + 1e-8).sqrt()
    optimizer, eps, value_eps = step_with_adam(data.parameters()), settings.clip_range, settings.value_clip_range
    for rows in steps:
        policy_terms, value_terms = [], []
        for row in rows:
            logprobs, values = data.said(row)
            for t in range(RESPONSES[row]):
                advantage, goal = (estimates[row][0][t] - centre) / spread, estimates[row][1][t]
                ratio = (logprobs[t] - data.rollout.old_logprobs[row, t]).exp()
                policy_terms.append(-torch.min(ratio * advantage, ratio.clip(1 - eps, 1 + eps) * advantage))
                error = (values[t] - goal) ** 2
                if value_eps is not None:
                    old = data.rollout.values[row, t]
                    held = old + (values[t] - old).clip(-value_eps, value_eps)
                    error = 0.5 * torch.max(error, (held - goal) ** 2)
                value_terms.append(error)
        loss = sum(policy_terms) / len(policy_terms) + settings.value_coef * sum(value_terms) / len(value_terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("value_clip_range", [0.2, None])
def test_one_update_equals_the_formulas_applied_response_by_response(value_clip_range: float | None) -> None:
    minibatches = [[4, 0, 2], [5, 1, 3]]
    settings = Settings(
        beta=0.3, value_clip_range=value_clip_range, value_coef=0.7, minibatches=minibatches, gamma=0.9, lam=0.8
    )
    ours, oracle = batch(), batch()
    ppo_update(ours.policy, ours.value_head, step_with_adam(ours.parameters()), ours.rollout, ours.rm_scores, settings)
    update_by_hand(oracle, settings, minibatches * settings.epochs)
    for got, wanted, start in zip(ours.parameters(), oracle.parameters(), batch().parameters(), strict=True):
        assert_close(got, wanted, EXACT)
        assert (got - start).abs().max() > 0.05  # both have moved


def test_the_losses_told_are_those_of_the_steps() -> None:
    settings, data = Settings(beta=0.3, epochs=1), batch()
    told = ppo_update(
        data.policy, data.value_head, step_with_adam(data.parameters()), data.rollout, data.rm_scores, settings
    )
    fresh = batch()
    estimates = [by_hand(fresh, row, 0.3, settings.gamma, settings.lam) for row in range(B)]
    pooled = torch.tensor([a for advantages, _ in estimates for a in advantages], dtype=torch.float64)
    whitened = iter(((pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-8).sqrt()).tolist())
    policy_terms, value_terms = [], []
    for row, (_, returns) in enumerate(estimates):
        logprobs, values = (x.tolist() for x in fresh.said(row))
        for t, goal in enumerate(returns):
            ratio = math.exp(logprobs[t] - fresh.rollout.old_logprobs[row, t].item())
            advantage, old = next(whitened), fresh.rollout.values[row, t].item()
            policy_terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
            held = old + min(max(values[t] - old, -0.2), 0.2)
            value_terms.append(0.5 * max((values[t] - goal) ** 2, (held - goal) ** 2))
    assert told["policy_loss"] == pytest.approx(sum(policy_terms) / len(policy_terms), rel=1e-12)
    assert told["value_loss"] == pytest.approx(sum(value_terms) / len(value_terms), rel=1e-12)


# ── the lesson's listing ────────────────────────────────────────────────────────────────────────────────────────────
def the_listing(data: Batch, optimizer: torch.optim.Optimizer, beta: float, epsilon: float, epochs: int) -> None:
    """Steps 2 to 4 of the lesson's listing as it stands, but for the squeeze that its `values` want."""

    def policy_says() -> tuple[Tensor, Tensor]:
        outputs = data.policy(**data.rollout.completions, output_hidden_states=True)
        ids = data.rollout.completions["input_ids"][:, P:]
        logprobs = outputs.logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return logprobs, outputs.hidden_states[-1][:, P - 1 : -1]

    old_logprobs, ref_logprobs, values = data.rollout.old_logprobs, data.rollout.ref_logprobs, data.rollout.values
    kl_per_tok = old_logprobs - ref_logprobs
    rewards = -beta * kl_per_tok
    rewards[:, -1] += data.rm_scores
    returns = torch.cumsum(rewards.flip(-1), -1).flip(-1)
    advantages = returns - values.detach()
    for _ in range(epochs):
        new_logprobs, hidden = policy_says()
        ratio = (new_logprobs - old_logprobs).exp()
        unclipped = ratio * advantages
        clipped = torch.clamp(ratio, 1 - epsilon, 1 + epsilon) * advantages
        policy_loss = -torch.min(unclipped, clipped).mean()
        new_values = data.value_head(hidden).squeeze(-1)
        value_loss = F.mse_loss(new_values, returns)
        loss = policy_loss + 0.5 * value_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_with_all_switches_off_the_update_is_the_lessons_listing() -> None:
    ours, theirs = batch(poison=False), batch(poison=False)
    settings = Settings(beta=0.3, epochs=3, minibatches=[[0, 1, 2], [3, 4, 5]], **LISTING)
    ppo_update(ours.policy, ours.value_head, step_with_adam(ours.parameters()), ours.rollout, ours.rm_scores, settings)
    the_listing(theirs, step_with_adam(theirs.parameters()), beta=0.3, epsilon=0.2, epochs=3)
    for got, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(got, wanted, EXACT)


def test_the_listings_values_do_not_fit_its_returns() -> None:
    values = nn.Linear(DIM, 1)(torch.randn(B, T, DIM))  # as in the listing, without a squeeze
    with pytest.raises(RuntimeError, match="must match"):
        torch.randn(B, T) - values
    assert (torch.randn(T, T) - values[:T]).shape == (T, T, T)  # B = T: it runs, on the wrong thing


# ── what each switch changes ────────────────────────────────────────────────────────────────────────────────────────
def test_each_switch_alone_changes_the_update() -> None:
    full = Settings(minibatches=[[0, 1, 2], [3, 4, 5]])
    ends = []
    for settings in [full, *(replace(full, **{name: False}) for name in LISTING)]:
        data = batch(poison=False)
        optimizer = step_with_adam(data.parameters())
        ppo_update(data.policy, data.value_head, optimizer, data.rollout, data.rm_scores, settings)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in data.parameters()]))
    assert len(ends) == 7
    for i, end in enumerate(ends):
        assert all((end - other).abs().max() > 1e-4 for other in ends[:i])


@pytest.mark.parametrize("off", [(), ("gae", "whiten"), ("clip_value",), ("score_at_last_token", "gae", "whiten")])
def test_padding_never_changes_an_update_that_has_its_mask(off: tuple[str, ...]) -> None:
    settings = replace(Settings(minibatches=[[0, 1, 2], [3, 4, 5]]), **dict.fromkeys(off, False))
    clean, poisonous = batch(poison=False), batch(poison=True)
    for data in (clean, poisonous):
        optimizer = step_with_adam(data.parameters())
        ppo_update(data.policy, data.value_head, optimizer, data.rollout, data.rm_scores, settings)
    for got, wanted in zip(poisonous.parameters(), clean.parameters(), strict=True):
        assert_close(got, wanted, EXACT)


def test_a_score_at_the_columns_end_misses_every_response_that_is_shorter() -> None:
    data, settings = batch(), Settings(whiten=False, score_at_last_token=False)
    before = estimate(data.rollout, data.rm_scores, settings)
    after = estimate(data.rollout, data.rm_scores + 1.0, settings)
    moved = (after.advantages - before.advantages).abs().amax(1) > 1e-9
    assert moved.tolist() == [size == T for size in RESPONSES]


def test_the_share_of_the_scores_that_lies_on_padding_is_told() -> None:
    data = batch()
    sizes = [abs(score) for score in data.rm_scores.tolist()]
    on_padding = sum(size for size, length in zip(sizes, RESPONSES, strict=True) if length < T) / sum(sizes)
    for mask in (True, False):
        data = batch(poison=mask)
        lost = skeleton.measure(data.rollout, data.rm_scores, Settings(score_at_last_token=False, mask=mask))
        assert lost["score_on_padding"] == pytest.approx(on_padding, rel=1e-9)
        kept = skeleton.measure(data.rollout, data.rm_scores, Settings(mask=mask))
        assert kept["score_on_padding"] == pytest.approx(0.0, abs=1e-12)
        assert kept["padding_in_losses"] == pytest.approx(0.0 if mask else 1 - sum(RESPONSES) / (B * T))


def test_without_gae_the_advantage_is_the_sum_of_what_is_still_to_come_minus_the_value() -> None:
    data, settings = batch(), Settings(beta=0.3, gae=False, whiten=False, gamma=0.9, lam=0.5)
    got = estimate(data.rollout, data.rm_scores, settings)
    for row in range(B):
        _, returns = by_hand(data, row, beta=0.3, gamma=1.0, lam=1.0)
        values = torch.tensor(data.real(data.rollout.values, row))
        assert_close(got.returns[row, : RESPONSES[row]], returns, EXACT)
        assert_close(got.advantages[row, : RESPONSES[row]], torch.tensor(returns).double() - values, ROUND_OFF)


def test_without_a_mask_padding_pays_the_string_and_is_averaged_over() -> None:
    data = batch(poison=False)
    got = estimate(data.rollout, data.rm_scores, Settings(beta=0.3, mask=False))
    padding = ~data.rollout.response_mask
    drift = data.rollout.old_logprobs - data.rollout.ref_logprobs
    assert_close(got.rewards[padding], -0.3 * drift[padding], EXACT)
    assert got.mask.all()
    assert_close(got.advantages.mean(), 0.0, EXACT)  # whitened over B·T places, B·T − Σ lengths of them unreal


def test_advantages_are_whitened_over_real_tokens_unless_switched_off() -> None:
    data = batch()
    white, raw = (estimate(data.rollout, data.rm_scores, Settings(whiten=on)) for on in (True, False))
    real = white.advantages[data.rollout.response_mask]
    assert_close(real.mean(), 0.0, EXACT)
    assert_close(real.var(correction=0), 1.0, ROUND_OFF)
    wanted = [advantage for row in range(B) for advantage in by_hand(data, row, skeleton.BETA, 1.0, 0.95)[0]]
    assert_close(raw.advantages[data.rollout.response_mask], wanted, EXACT)


# ── the four models, trained ────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Step:
    """One step as it stood before its update."""

    rollout: Rollout
    rm_scores: Tensor
    first_ratio: Tensor
    numbers: dict[str, float]


@pytest.fixture(scope="module")
def models() -> tuple:
    return skeleton.load_models(seed=0, sft_steps=150, rm_steps=60)


@pytest.fixture(scope="module")
def sft_weights(models: tuple) -> dict[str, Tensor]:
    """The checkpoint's weights before any run."""
    return {name: weights.clone() for name, weights in models[0].state_dict().items()}


def watched(models: tuple, steps: int, **settings: float) -> list[Step]:
    """A run of the file's own loop, with a look at each update's arguments before it is made."""
    seen = []

    def look_first(policy: nn.Module, head: nn.Module, optimizer: object, rollout: Rollout, *rest: object) -> dict:
        rows = list(MINIBATCHES[0])
        with torch.no_grad():
            outputs = policy(**{name: x[rows] for name, x in rollout.completions.items()})
        width = rollout.response_mask.shape[1]
        tokens = rollout.completions["input_ids"][rows, -width:]
        logprobs = outputs.logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ratio = (logprobs - rollout.old_logprobs[rows]).exp()[rollout.response_mask[rows]]
        seen.append((rollout, rest[0], ratio))
        return ppo_update(policy, head, optimizer, rollout, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "ppo_update", look_first)
        numbers = [row for row, _ in skeleton.train(*models, Settings(minibatches=MINIBATCHES, **settings), steps)]
    return [Step(*before, row) for before, row in zip(seen, numbers, strict=True)]


@pytest.fixture(scope="module")
def tethered(models: tuple, sft_weights: dict[str, Tensor]) -> list[Step]:
    return watched(models, STEPS, beta=0.2)


@pytest.fixture(scope="module")
def cut(models: tuple) -> list[Step]:
    return watched(models, STEPS, beta=0.0)


def late(run: list[Step], name: str) -> float:
    return sum(step.numbers[name] for step in run[-5:]) / 5


def test_the_score_rises_on_the_string_and_kl_stays_below_that_of_a_cut_string(
    tethered: list[Step], cut: list[Step]
) -> None:
    assert abs(tethered[0].numbers["reward"]) < 0.4  # σ of the reference's scores is 1, their mean 0
    assert late(tethered, "reward") > 0.6
    assert 0.1 < late(tethered, "kl") < 0.7 * late(cut, "kl")


def test_kl_is_exactly_zero_before_the_first_update(tethered: list[Step]) -> None:
    assert torch.equal(tethered[0].rollout.old_logprobs, tethered[0].rollout.ref_logprobs)
    assert tethered[0].numbers["kl"] == 0.0
    assert tethered[1].numbers["kl"] != 0.0


def test_the_first_ratio_of_every_update_is_one(tethered: list[Step]) -> None:
    for step in tethered:
        assert_close(step.first_ratio, torch.ones_like(step.first_ratio), ROUND_OFF)


def test_rewards_sum_to_the_score_minus_beta_times_kl(tethered: list[Step]) -> None:
    for step in tethered:
        rewards = estimate(step.rollout, step.rm_scores, Settings(beta=0.2)).rewards
        for row, mask in enumerate(step.rollout.response_mask):
            drift = (step.rollout.old_logprobs[row, mask] - step.rollout.ref_logprobs[row, mask]).double().sum()
            assert_close(rewards[row].sum(), step.rm_scores[row].double() - 0.2 * drift, ROUND_OFF)


def test_kl_is_told_in_nats_per_response_summed_over_its_tokens(tethered: list[Step]) -> None:
    for step in tethered:
        drift = (step.rollout.old_logprobs - step.rollout.ref_logprobs).double()
        sums = [drift[row, mask].sum().item() for row, mask in enumerate(step.rollout.response_mask)]
        assert step.numbers["kl"] == pytest.approx(sum(sums) / len(sums), abs=1e-5)


def test_the_reference_never_changes(models: tuple, tethered: list[Step], sft_weights: dict[str, Tensor]) -> None:
    sft_checkpoint, _ = models
    for step in tethered:
        width = step.rollout.response_mask.shape[1]
        with torch.no_grad():
            now, _ = skeleton.forward(sft_checkpoint, step.rollout.completions, width)
        assert torch.equal(now, step.rollout.ref_logprobs)
    assert all(torch.equal(sft_weights[name], weights) for name, weights in sft_checkpoint.state_dict().items())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(models: tuple, tethered: list[Step]) -> None:
    torch.rand(3)  # the global random state does not matter
    settings = Settings(minibatches=MINIBATCHES, beta=0.2)
    again = [row for row, _ in skeleton.train(*models, settings, steps=2)]
    assert again == [step.numbers for step in tethered[:2]]
    assert next(skeleton.train(*models, settings, steps=1, seed=1))[0] != again[0]


def test_the_reward_model_prefers_cheerful_answers_and_is_measured_on_the_references_samples(models: tuple) -> None:
    sft_checkpoint, reward_model = models
    with torch.no_grad():
        samples, _ = skeleton.generate(sft_checkpoint, skeleton.ask(Random(9), 512), seed=9)
        scores = reward_model(**samples).logits[:, 0]
        pair = skeleton.encode([f"look at the owl : the owl is {mood} . <eos>" for mood in ("happy", "sad")])
        happy, sad = reward_model(**pair).logits[:, 0].tolist()
    assert scores.mean().item() == pytest.approx(0.0, abs=0.15)
    assert scores.std().item() == pytest.approx(1.0, abs=0.15)
    assert happy > sad + 1


# ── the rollout ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_sampling_is_pure(models: tuple) -> None:
    """If y ~ π then E[−log π(y_t)] = E[H(π(·|s_t))]; a top-k or a temperature in the sampler would break it."""
    sft_checkpoint, _ = models
    completions, mask = skeleton.generate(sft_checkpoint, skeleton.ask(Random(3), 512), seed=3)
    with torch.no_grad():
        logits = sft_checkpoint(**completions).logits[:, -mask.shape[1] - 1 : -1].double()
    logprobs = logits.log_softmax(-1)
    taken = logprobs.gather(-1, completions["input_ids"][:, -mask.shape[1] :, None])[..., 0]
    surplus = (-taken - (-(logprobs.exp() * logprobs).sum(-1))).where(mask, 0.0).sum(1)
    z = surplus.mean() / (surplus.std() / len(surplus) ** 0.5)
    assert abs(z) < 4


def test_logprobs_do_not_depend_on_the_padding(models: tuple) -> None:
    sft_checkpoint, _ = models
    completions, mask = skeleton.generate(sft_checkpoint, skeleton.ask(Random(4), 8), seed=4)
    with torch.no_grad():
        together, _ = skeleton.forward(sft_checkpoint, completions, mask.shape[1])
        for row in range(8):
            ids = completions["input_ids"][row][completions["attention_mask"][row] == 1]
            alone = sft_checkpoint(ids[None]).logits[0].log_softmax(-1)
            size = int(mask[row].sum())
            wanted = alone[-size - 1 : -1].gather(1, ids[-size:, None])[:, 0]
            torch.testing.assert_close(together[row, :size], wanted, rtol=0, atol=1e-4)


class Parrot:
    """A policy that answers with tokens given beforehand."""

    def __init__(self, *responses: str) -> None:
        self.responses = torch.tensor([[skeleton.WORDS.index(word) for word in text.split()] for text in responses])

    def generate(self, input_ids: Tensor, **_: object) -> Tensor:
        return torch.cat([input_ids, self.responses], 1)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_response_ends_with_its_first_eos_and_nowhere_else() -> None:
    parrot = Parrot("<pad> cat <eos> <eos>", "cat <pad> dog <pad>", "<eos> <pad> <pad> <pad>")
    prompts = ["look at the cat :", "look at the cat and the dog :", "look at the owl :"]
    completions, mask = skeleton.generate(parrot, prompts, seed=0)
    assert mask.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]
    assert completions["attention_mask"].tolist()[0] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert completions["position_ids"].tolist()[0] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert (completions["input_ids"][0, :3] == PAD).all()


def test_answers_are_about_the_animals_of_the_question() -> None:
    rng = Random(0)
    for prompt in skeleton.ask(rng, 50):
        asked, said = (
            [word for word in text.split() if word in skeleton.ANIMALS]
            for text in (prompt, skeleton.answer(prompt, rng).removeprefix(prompt))
        )
        assert asked == said


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def quick(models: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "load_models", lambda _: models)


@pytest.mark.usefixtures("quick")
def test_the_lessons_lines_are_printed(capsys: pytest.CaptureFixture) -> None:
    skeleton.main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    form = r"step 00[01] reward=[+-]\d\.\d\d kl=-?\d\.\d{3} policy_loss=[+-]\d\.\d{3} value_loss=\d\.\d\d"
    assert [bool(re.fullmatch(form, line)) for line in lines] == [True, False, True, False]
    assert all(line.strip().startswith("look at the") for line in lines[1::2])


@pytest.mark.usefixtures("quick")
def test_flags_reach_the_update_and_json_is_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []
    monkeypatch.setattr(skeleton, "ppo_update", lambda *args: seen.append(args[-1]) or ppo_update(*args))
    skeleton.main(steps=1, beta=0.3, gae=False, json=True)
    skeleton.main(steps=1, mask=False, score_at_last_token=False, json=True)
    skeleton.main(steps=1, as_in_the_lesson=True, json=True)
    outputs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(len(output["steps"]) == 1 and math.isfinite(output["steps"][0]["kl"]) for output in outputs)
    assert seen[0] == Settings(beta=0.3, gae=False, minibatches=MINIBATCHES)
    assert seen[1] == Settings(mask=False, score_at_last_token=False, minibatches=MINIBATCHES)
    assert seen[2] == Settings(minibatches=MINIBATCHES, **LISTING)


@pytest.mark.usefixtures("quick")
def test_compare_runs_each_switch_once(capsys: pytest.CaptureFixture) -> None:
    skeleton.main(steps=1, compare=True, json=True)
    runs = {run["simplified"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert list(runs) == ["in full", *(f"no {name}" for name in LISTING), "as listed"]
    assert runs["in full"]["score_on_padding"] == 0.0 < 0.5 < runs["no score_at_last_token"]["score_on_padding"]
    assert runs["in full"]["padding_in_losses"] == 0.0 < runs["no mask"]["padding_in_losses"]
    assert runs["as listed"]["padding_in_losses"] == runs["no mask"]["padding_in_losses"]


@pytest.mark.parametrize("wrong", [{"beta": -0.1}, {"beta": math.nan}, {"beta": math.inf}, {"steps": 0}])
def test_a_knob_out_of_bounds_is_one_clear_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}.*wanted"):
        skeleton.main(**wrong)


def test_no_epoch_and_nan_scores_are_errors() -> None:
    with pytest.raises(ConfigError, match="epochs is 0"):
        Settings(epochs=0)
    data = batch()
    with pytest.raises(NonFiniteError, match="score 2"):
        estimate(data.rollout, data.rm_scores.index_fill(0, torch.tensor(2), math.nan), Settings())
    assert issubclass(ConfigError, TetherError)
