"""Rung 2: the lesson's four-model loop in torch, with a real causal language model, in one file.

§1 the knobs · §2 a small language · §3 four models · §4 the PPO update · §5 the loop

Policy and reference start as one small Llama, trained for seconds on §2's grammar. The reward model starts from it
too, learns that people like cheerful answers, and is scaled to mean 0, standard deviation 1 on the reference's
samples. It is a proxy: `--beta 0` cuts the string and shows what it pays for. Names and order are the lesson's, the
mathematics is `tether.numerics`. The lesson's listing simplifies; each slip is a switch, `--as-in-the-lesson` sets
them all, `--compare` prints what each costs. Read next: `trainer.py`, the same loop, whose rooms leave nothing out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from json import dumps
from random import Random
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Linear, Module
from torch.optim import Adam, AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedModel as Model

from tether import numerics
from tether.errors import ConfigError

Scores = Float[Tensor, "batch"]
PerToken = Float[Tensor, "batch response"]
Mask = Bool[Tensor, "batch response"]  # True = a real response token, the EOS that ends it included
Inputs = dict[str, Tensor]  # input_ids, attention_mask, position_ids: what a Hugging Face model reads
Progress = Iterator[tuple[dict[str, float], str]]  # measurements, and a text that goes with them

# ── §1 the knobs ────────────────────────────────────────────────────────────────────────────────────────────────────
BETA, EPSILON, PPO_EPOCHS = 0.05, 0.2, 4
LEARNING_RATE = 2e-4  # of Adam; the lesson's 1e-6 suits models of billions of weights
BATCH = 64  # responses in one update
MINIBATCHES = [range(first, first + 16) for first in range(0, BATCH, 16)]  # rows of each optimiser step
RESPONSE = 24  # cap on a response's tokens, its EOS among them


@dataclass(frozen=True)
class Simplifications:
    """What the lesson's listing leaves out: True = done in full, False = as in the listing."""

    gae: bool = True  # GAE(λ); off: return-to-go over the columns (γ = λ = 1), minus the value
    mask: bool = True  # real tokens alone count; off: the padding after EOS is taxed, fitted and averaged too
    score_at_last_token: bool = True  # the EOS, or the token at the cap; off: the last column, `rewards[:, -1]`
    whiten: bool = True  # advantages of mean 0 and variance 1 over the batch; off: as they come
    clip_value: bool = True  # the clipped value loss; off: 0.5 × the plain mean squared error
    split_batch: bool = True  # several optimiser steps an epoch; off: one, on the full batch


@dataclass(frozen=True)
class Settings(Simplifications):
    """All that one PPO update is told. Raises ConfigError."""

    beta: float = BETA
    clip_range: float = EPSILON
    value_clip_range: float | None = 0.2  # in the score's unit; None = plain mean squared error, without the ½
    value_coef: float = 0.1
    epochs: int = PPO_EPOCHS
    minibatches: Sequence[Sequence[int]] = ()  # rows of each step, the same in every epoch; none = all rows at once
    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        if not (0 <= self.beta < math.inf and self.epochs >= 1):
            raise ConfigError(f"beta is {self.beta}, epochs is {self.epochs}; wanted a finite beta ≥ 0, epochs ≥ 1")


# ── §2 a language ───────────────────────────────────────────────────────────────────────────────────────────────────
ANIMALS = ("cat", "dog", "fox", "owl")
CHEERFUL, GLOOMY = ("happy", "kind", "calm", "bright"), ("sad", "cross", "dull", "tired")
WORDS = ("<pad>", "<eos>", "look", "at", "the", "and", ":", "is", ".", *ANIMALS, *CHEERFUL, *GLOOMY)
PAD, EOS = 0, 1


def ask(rng: Random, count: int) -> list[str]:
    return [f"look at the {' and the '.join(rng.sample(ANIMALS, rng.choice((1, 2))))} :" for _ in range(count)]


def answer(prompt: str, rng: Random) -> str:
    animals = [word for word in prompt.split() if word in ANIMALS]
    moods = [" and ".join(rng.choices(CHEERFUL + GLOOMY, k=rng.choice((1, 1, 2, 3)))) for _ in animals]
    return f"{prompt} {' . '.join(f'the {a} is {m}' for a, m in zip(animals, moods, strict=True))} . <eos>"


def encode(texts: Sequence[str], padding_side: str = "right") -> Inputs:
    rows = [torch.tensor([WORDS.index(word) for word in text.split()]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=padding_side)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


# ── §3 four models ──────────────────────────────────────────────────────────────────────────────────────────────────
def load_models(seed: int = 0, sft_steps: int = 300, rm_steps: int = 150) -> tuple[Model, Model]:
    """Demonstrations → sft_checkpoint, preferences → reward_model; both are trained here, in seconds."""
    ids = {"vocab_size": len(WORDS), "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS, "num_labels": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config, rng = LlamaConfig(**ids, **sizes, initializer_range=0.1), Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sft_checkpoint, reward_model = LlamaForCausalLM(config).eval(), LlamaForSequenceClassification(config).eval()
        reward_model.score = Linear(config.hidden_size, 1)
    fit(sft_checkpoint, lambda: sft_checkpoint(**demonstrations(rng)).loss, sft_steps, 5e-3)
    reward_model.model.load_state_dict(sft_checkpoint.model.state_dict())
    fit(reward_model, lambda: preference_loss(reward_model, rng), rm_steps, 1e-3)
    with torch.no_grad():
        deviation, mean = torch.std_mean(reward_model(**generate(sft_checkpoint, ask(rng, 512), seed)[0]).logits)
        reward_model.score.weight.div_(deviation)
        reward_model.score.bias.sub_(mean).div_(deviation)
    return sft_checkpoint, reward_model


def fit(model: Module, loss: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    optimizer = Adam(model.parameters(), lr=learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def demonstrations(rng: Random) -> Inputs:
    inputs = encode([answer(prompt, rng) for prompt in ask(rng, 32)])
    return inputs | {"labels": inputs["input_ids"].where(inputs["attention_mask"] == 1, -100)}


def preference_loss(reward_model: Model, rng: Random) -> Tensor:
    def appeal(text: str) -> float:  # people's taste; Gumbel noise on it makes their choices Bradley's and Terry's
        return sum((word in CHEERFUL) - (word in GLOOMY) for word in text.split()) - math.log(rng.expovariate(1.0))

    pairs = [sorted((answer(prompt, rng), answer(prompt, rng)), key=appeal) for prompt in ask(rng, 32)]
    scores = reward_model(**encode([text for pair in pairs for text in pair])).logits.view(-1, 2)
    return numerics.bradley_terry_loss(chosen_scores=scores[:, 1], rejected_scores=scores[:, 0])


def generate(policy: Model, prompts: Sequence[str], seed: int) -> tuple[Inputs, Mask]:
    """Pure samples: no top-k, no top-p, temperature 1. A response ends with its first EOS, and nowhere else."""
    left = encode(prompts, "left")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = policy.generate(**left, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=RESPONSE)
    is_eos = (ids[:, left["input_ids"].shape[1] :] == EOS).long()
    response_mask = is_eos.cumsum(-1) - is_eos == 0
    real = torch.cat([left["attention_mask"], response_mask], 1)
    return {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}, response_mask


def forward(model: Module, completions: Inputs, T: int) -> tuple[PerToken, Float[Tensor, "batch response dim"]]:
    """log π(y_t|s_t) of the last T tokens, and the hidden state of s_t, before y_t: what the value head reads."""
    outputs = model(**completions, output_hidden_states=True)
    logprobs = numerics.selected_logprobs(outputs.logits[:, -T - 1 : -1], completions["input_ids"][:, -T:])
    return logprobs, outputs.hidden_states[-1][:, -T - 1 : -1]


# ── §4 the update ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Rollout:
    """Left-padded prompts with right-padded responses, and what was thought of them when they were sampled."""

    completions: Inputs  # the responses are the last columns
    response_mask: Mask
    old_logprobs: PerToken
    ref_logprobs: PerToken
    values: PerToken


@dataclass(frozen=True)
class Experience:
    rewards: PerToken
    returns: PerToken
    advantages: PerToken
    mask: Mask  # what the losses average over


def estimate(rollout: Rollout, rm_scores: Scores, settings: Settings) -> Experience:
    """Scores and KL → rewards r_t = −β·log(π_θ/π_ref) + RM·1[t = T] → returns and advantages."""
    real, everywhere = rollout.response_mask, torch.ones_like(rollout.response_mask)
    mask = real if settings.mask else everywhere
    old_logprobs, ref_logprobs = rollout.old_logprobs.where(mask, 0.0), rollout.ref_logprobs.where(mask, 0.0)
    kl_per_tok = numerics.kl_k1(old_logprobs, ref_logprobs)  # log π_θ_old − log π_ref
    carrier = real if settings.score_at_last_token else everywhere  # its last token bears the score
    rewards = numerics.tethered_rewards(rm_scores, old_logprobs, ref_logprobs, carrier, settings.beta)
    rewards = rewards.where(carrier, -settings.beta * kl_per_tok)  # padding pays too, where no mask has cleared it
    if settings.gae:
        advantages, returns = numerics.gae(rewards, rollout.values, mask, settings.gamma, settings.lam)
    else:
        returns = torch.cumsum(rewards.flip(-1), -1).flip(-1)  # naïve return-to-go
        advantages = returns - rollout.values.where(mask, 0.0)
    advantages = numerics.masked_whiten(advantages, mask) if settings.whiten else advantages
    return Experience(rewards, returns, advantages, mask)


def ppo_update(
    policy: Module, value_head: Module, optimizer: Optimizer, rollout: Rollout, rm_scores: Scores, settings: Settings
) -> dict[str, float]:
    """L^CLIP and value fitting: epochs on one rollout, a step a minibatch. Yields both losses as means over steps."""
    experience, losses = estimate(rollout, rm_scores, settings), []
    clip, coef = (settings.value_clip_range, settings.value_coef) if settings.clip_value else (None, 0.5)
    minibatches = settings.minibatches if settings.minibatches and settings.split_batch else [range(len(rm_scores))]
    for rows in [list(rows) for _ in range(settings.epochs) for rows in minibatches]:
        mask, advantages, returns = experience.mask[rows], experience.advantages[rows], experience.returns[rows]
        completions = {name: inputs[rows] for name, inputs in rollout.completions.items()}
        new_logprobs, hidden = forward(policy, completions, mask.shape[1])  # fresh under π_θ
        ratio = (new_logprobs - rollout.old_logprobs[rows].where(mask, 0.0)).exp()
        unclipped = ratio * advantages
        clipped = torch.clamp(ratio, 1 - settings.clip_range, 1 + settings.clip_range) * advantages
        policy_loss = -numerics.masked_mean(torch.min(unclipped, clipped), mask)  # PPO-Clip
        new_values = value_head(hidden).squeeze(-1)
        value_loss = numerics.clipped_value_loss(new_values, rollout.values[rows], returns, mask, clip)
        loss = policy_loss + coef * value_loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append((policy_loss.item(), value_loss.item()))
    return dict(zip(("policy_loss", "value_loss"), map(fmean, zip(*losses, strict=True)), strict=True))


# ── §5 the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────
LINE = "step {step:03d} reward={reward:+.2f} kl={kl:.3f} policy_loss={policy_loss:+.3f} value_loss={value_loss:.2f}"
COLUMNS = ("reward", "kl", "explained_variance", "score_on_padding", "padding_in_losses")
LISTING: dict[str, Any] = {field.name: False for field in fields(Simplifications)}  # the lesson's, as it stands


def train(sft_checkpoint: Model, reward_model: Model, settings: Settings, steps: int = 60, seed: int = 0) -> Progress:
    """Yield the measurements of each step, and one of its completions. The arguments stay as they are."""
    policy = deepcopy(sft_checkpoint).requires_grad_(True)  # π_θ
    ref_model = deepcopy(sft_checkpoint).requires_grad_(False)  # π_ref (frozen SFT copy)
    value_head = Linear(policy.config.hidden_size, 1)  # small scalar head, 0 at the start
    value_head.load_state_dict({"weight": torch.zeros(1, value_head.in_features), "bias": torch.zeros(1)})
    optimizer = AdamW([*policy.parameters(), *value_head.parameters()], lr=LEARNING_RATE, eps=1e-5, weight_decay=0.0)
    rng = Random(seed)
    for step in range(steps):
        prompts = ask(rng, BATCH)
        with torch.no_grad():
            completions, response_mask = generate(policy, prompts, rng.getrandbits(32))
            old_logprobs, hidden = forward(policy, completions, response_mask.shape[1])
            ref_logprobs, _ = forward(ref_model, completions, response_mask.shape[1])
            rm_scores = reward_model(**completions).logits[:, 0]  # [B]
            # The listing has no squeeze here. Its [B, T, 1] cannot be taken from the returns' [B, T], unless B = T:
            # then [B, B, T] is the result, every return minus the values of all the other responses.
            values = value_head(hidden).squeeze(-1)  # [B, T]
        rollout = Rollout(completions, response_mask, old_logprobs, ref_logprobs, values)
        losses = ppo_update(policy, value_head, optimizer, rollout, rm_scores, settings)
        text = " ".join(WORDS[token] for token in completions["input_ids"][0] if token != PAD)
        yield {"step": step, "reward": rm_scores.mean().item(), **losses, **measure(rollout, rm_scores, settings)}, text


def measure(rollout: Rollout, rm_scores: Scores, settings: Settings) -> dict[str, float]:
    """K in nats per response, and what the switches cost, on real tokens."""
    experience, real = estimate(rollout, rm_scores, settings), rollout.response_mask
    kl_per_tok = numerics.kl_k1(rollout.old_logprobs, rollout.ref_logprobs).where(experience.mask, 0.0)
    destination = (experience.rewards + settings.beta * kl_per_tok).abs()
    return {
        "kl": kl_per_tok[real].sum().item() / len(real),
        "explained_variance": numerics.explained_variance(rollout.values, experience.returns, real).item(),
        "score_on_padding": (destination[~real].sum() / destination.sum()).item(),  # share of the scores' size
        "padding_in_losses": 1 - real.sum().item() / experience.mask.sum().item(),  # share of the tokens averaged over
    }


def costs(sft_checkpoint: Model, reward_model: Model, settings: Settings, steps: int = 60, seed: int = 0) -> Progress:
    """A run in full, one with each switch off, one with all off: means over the last third of the steps, and a name."""
    for name, off in [("in full", {}), *((f"no {key}", {key: False}) for key in LISTING), ("as listed", LISTING)]:
        run = list(train(sft_checkpoint, reward_model, replace(settings, **off), steps, seed))
        yield {key: fmean(numbers[key] for numbers, _ in run[2 * steps // 3 :]) for key in run[0][0]}, name


def main(
    steps: int = 60,
    beta: float = BETA,
    seed: int = 0,
    gae: bool = True,
    mask: bool = True,
    score_at_last_token: bool = True,
    as_in_the_lesson: bool = False,
    compare: bool = False,
    json: bool = False,
) -> None:
    """Print every tenth step and the last, each with one completion; or what each simplification costs."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}; wanted at least 1")
    settings = Settings(gae, mask, score_at_last_token, beta=beta, minibatches=MINIBATCHES)
    settings = replace(settings, **LISTING) if as_in_the_lesson else settings
    results = []
    for numbers, text in (costs if compare else train)(*load_models(seed), settings, steps, seed):
        results.append(numbers | {"simplified" if compare else "completion": text})
        if compare and not json:
            print(f"{text:22}", *(f"{name}={numbers[name]:+.2f}" for name in COLUMNS), flush=True)
        elif not json and (numbers["step"] % 10 == 0 or numbers["step"] == steps - 1):
            print(LINE.format(**numbers), text, sep="\n         ", flush=True)
    if json:
        print(dumps({"runs" if compare else "steps": results}))
