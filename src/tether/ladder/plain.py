"""The whole of RLHF-PPO in the standard library: nine words, from demonstrations to a policy on a string.

    §1 the words           a vocabulary, demonstrations, and what people truly like
    §2 the policy          a tiny language model with a value head
    §3 the checkpoint      demonstrations → the SFT policy, which is also the frozen reference
    §4 the reward model    preferences between the reference's samples → one score for a response
    §5 the rollout         prompts → responses, log-probabilities under policy and reference, values
    §6 the update          scores + KL → rewards → advantages → clipped steps
    §7 the string          β, fixed or adaptive
    §8 the loop            §5, §6 and §7, over and over

It is the oracle of the project: slow, obvious and independent. Its formulas are in `formulas.py`, under the names of
`tether.numerics`, its gradients in `scalar.py`; the three import nothing else but the standard library. The tensor
programs are proved against it: every function, every gradient, and the parameters after one whole update.

`tether ladder plain` runs the loop in seconds. The mean of the last ten of 60 updates, over the seeds 0 to 4:

    β      score              K, nats     what people truly like, 0.7 to 1.1 at the start
    5      +0.1 to +0.3         0.1        0.9 to  1.1    too short: it does not rise
    0.3    +1.1 to +1.2       1.0 to 1.3   1.8 to  1.9    the string holds
    0.1    +3.3 to +4.6        15 to 22   −0.5 to −1.0    too long
    0      +3.4 to +5.1        16 to 27   −0.7 to −2.0    cut: "rises gently gently gently gently"

A response of five tokens holds fewer nats than one of fifty, so β is larger here than the usual 0.05. The reward model
counts words and cannot see repetition: where the string lets it, the policy floats there. Read next: `skeleton.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from json import dumps
from random import Random
from statistics import fmean, pstdev
from typing import TypeAlias

from tether.ladder.formulas import (  # noqa: F401  the whole list, so that `plain.f` is the oracle of `numerics.f`
    Grid,
    Mask,
    Row,
    Tokens,
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    full_kl,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    log_softmax,
    masked_mean,
    masked_whiten,
    require,
    selected_logprobs,
    tethered_rewards,
)
from tether.ladder.scalar import Adam, Number, Scalar, dot, gradients, tanh, total, value_of

# ── §1 the words ────────────────────────────────────────────────────────────────────────────────────────────────────
VOCABULARY = (".", "balloon", "string", "rises", "drifts", "holds", "gently", "up", "away")
EOS = 0
LENGTH = 5  # cap on a response's tokens, its EOS among them
DEMONSTRATIONS = (  # prompt: response
    "balloon: rises gently .",
    "balloon: rises up .",
    "balloon: rises up gently .",
    "balloon: drifts up .",
    "balloon: drifts away .",
    "string: holds .",
    "string: holds gently .",
    "string: drifts away .",
)


def encode(text: str) -> list[int]:
    """Words → tokens."""
    return [VOCABULARY.index(word) for word in text.split()]


def decode(tokens: Sequence[int]) -> str:
    """Tokens → words."""
    return " ".join(VOCABULARY[token] for token in tokens)


def pad(responses: Tokens) -> tuple[list[list[int]], list[list[bool]]]:
    """Responses filled up with EOS to LENGTH, and the mask of their real tokens: a response's own EOS is real."""
    padded = [[*response, *[EOS] * (LENGTH - len(response))] for response in responses]
    return padded, [[t < len(response) for t in range(LENGTH)] for response in responses]


PROMPTS = (encode("balloon"), encode("string"))
LIKED, DISLIKED = encode("gently rises holds"), encode("away")


def gold(response: Sequence[int]) -> float:
    """What people truly like: +1 for each liked word, once; −1 for each disliked word and for every repetition."""
    words = [token for token in response if token != EOS]
    repetitions = len(words) - len(set(words))
    return float(sum(word in words for word in LIKED) - sum(word in DISLIKED for word in words) - repetitions)


# ── §2 the policy ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class TinyPolicy:
    """A language model and its value head, small enough to be read. The state s_t is the prompt and y_0 … y_{t−1}.

        h_i = tanh(embedding[last token of s_t][i] + position[t][i])     hidden
        z_v = Σ_i output[v][i]·h_i + output_bias[v]                      logits of y_t
        V   = Σ_i value_weight[i]·h_i + value_bias                       value, before y_t is emitted

    The parameters are floats, and change in place. `lifted()` is the same policy on Scalars, to be differentiated.
    """

    embedding: list[list[Number]]  # [vocab][hidden]
    position: list[list[Number]]  # [response][hidden]
    output: list[list[Number]]  # [vocab][hidden]
    output_bias: list[Number]  # [vocab]
    value_weight: list[Number]  # [hidden], the value head
    value_bias: Number

    @classmethod
    def untrained(cls, vocab: int, length: int, hidden: int, random: Random) -> TinyPolicy:
        """Embeddings, positions and output drawn from N(0, ½²); biases and value head 0."""

        def matrix(rows: int) -> list[list[Number]]:
            return [[random.gauss(0.0, 0.5) for _ in range(hidden)] for _ in range(rows)]

        return cls(matrix(vocab), matrix(length), matrix(vocab), [0.0] * vocab, [0.0] * hidden, 0.0)

    def read(self, last: int, t: int) -> tuple[list[Number], Number]:
        """Logits `[vocab]` of y_t and the value before it, where `last` is the last token of s_t."""
        hidden = [tanh(word + place) for word, place in zip(self.embedding[last], self.position[t], strict=True)]
        logits = [dot(row, hidden) + bias for row, bias in zip(self.output, self.output_bias, strict=True)]
        return logits, dot(self.value_weight, hidden) + self.value_bias

    def forward(self, prompts: Tokens, responses: Tokens) -> tuple[list[list[list[Number]]], list[list[Number]]]:
        """Logits `[batch][response][vocab]` and values `[batch][response]`; padding may hold any token."""
        seen: dict[tuple[int, int], tuple[list[Number], Number]] = {}  # a batch visits the same few states many times
        logits, values = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            states = [(last, t) for t, last in enumerate([prompt[-1], *response[:-1]])]
            seen.update({state: self.read(*state) for state in states if state not in seen})
            logits.append([seen[state][0] for state in states])
            values.append([seen[state][1] for state in states])
        return logits, values

    def respond(self, prompt: Sequence[int], random: Random) -> list[int]:
        """One episode: tokens drawn from the policy until EOS or the cap."""
        response: list[int] = []
        while len(response) < LENGTH and EOS not in response:
            logits, _ = self.read([*prompt, *response][-1], len(response))
            response += random.choices(range(len(logits)), [math.exp(value_of(p)) for p in log_softmax(logits)])
        return response

    def numbers(self) -> list[Number]:
        """All parameters in one row, in the order of the fields."""
        return _flat([getattr(self, field.name) for field in fields(self)])

    def assign(self, numbers: Sequence[Number]) -> None:
        """Put these in the place of all parameters, in the order of `numbers()`."""
        supply = iter(numbers)
        for field in fields(self):
            setattr(self, field.name, _shaped_like(getattr(self, field.name), supply))

    def lifted(self) -> TinyPolicy:
        """A copy whose parameters are fresh Scalars."""
        copy = replace(self)
        copy.assign([Scalar(value_of(number)) for number in self.numbers()])
        return copy


Nested: TypeAlias = Number | list  # a number, or a list of Nested


def _flat(nested: Nested) -> list[Number]:
    return [number for part in nested for number in _flat(part)] if isinstance(nested, list) else [nested]


def _shaped_like(nested: Nested, supply: Iterator[Number]) -> Nested:
    return [_shaped_like(part, supply) for part in nested] if isinstance(nested, list) else next(supply)


# ── §3 the checkpoint ───────────────────────────────────────────────────────────────────────────────────────────────
def finetune(policy: TinyPolicy, steps: int = 60, learning_rate: float = 0.05) -> None:
    """Supervised steps on the demonstrations, in place; the loss is minus the mean log-probability of their tokens."""
    pairs = [demonstration.split(": ") for demonstration in DEMONSTRATIONS]
    prompts = [encode(prompt) for prompt, _ in pairs]
    responses, mask = pad([encode(response) for _, response in pairs])
    optimizer = Adam(learning_rate)
    for _ in range(steps):
        live = policy.lifted()
        logits, _ = live.forward(prompts, responses)
        loss = -masked_mean(selected_logprobs(logits, responses), mask)
        policy.assign(optimizer.step(policy.numbers(), gradients(loss, live.numbers())))


# ── §4 the reward model ─────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class RewardModel:
    """score = gain·(Σ weight[word] − centre), over a response's words. It counts, so repetition is invisible to it."""

    weights: Row  # [vocab]
    gain: float = 1.0
    centre: float = 0.0

    def score(self, response: Sequence[int]) -> Number:
        """One score for a response."""
        return self.gain * (total(self.weights[token] for token in response if token != EOS) - self.centre)


def compare(reference: TinyPolicy, random: Random, pairs: int = 128) -> tuple[Tokens, Tokens]:
    """Chosen and rejected responses: two samples of the reference for a prompt, P(a ≻ b) = σ(gold_a − gold_b)."""
    chosen, rejected = [], []
    for number in range(pairs):
        prompt = PROMPTS[number % len(PROMPTS)]
        first, second = reference.respond(prompt, random), reference.respond(prompt, random)
        prefers_first = random.random() < 1 / (1 + math.exp(gold(second) - gold(first)))
        chosen.append(first if prefers_first else second)
        rejected.append(second if prefers_first else first)
    return chosen, rejected


def fit_reward_model(chosen: Tokens, rejected: Tokens, steps: int = 60, learning_rate: float = 0.1) -> RewardModel:
    """Bradley–Terry on the pairs, then mean 0 and standard deviation 1 on them: β means nothing without that scale.

    A small ridge, 0.01·Σw², keeps a word that one pair happened to hold from carrying the highest weight of all.
    """
    weights: list[Number] = [0.0] * len(VOCABULARY)
    optimizer = Adam(learning_rate)
    for _ in range(steps):
        live = RewardModel([Scalar(value_of(weight)) for weight in weights])
        loss = bradley_terry_loss([live.score(response) for response in chosen], [live.score(r) for r in rejected])
        loss = loss + 0.01 * dot(live.weights, live.weights)
        weights = optimizer.step(weights, gradients(loss, live.weights))
    scores = [value_of(RewardModel(weights).score(response)) for response in [*chosen, *rejected]]
    return RewardModel(weights, gain=1 / pstdev(scores), centre=fmean(scores))


# ── §5 the rollout ──────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Rollout:
    """One batch of episodes as the policy made them; `[batch][response]`, but for the prompts."""

    prompts: Tokens
    responses: Tokens  # filled up with EOS
    mask: Mask  # True = a real response token
    logprobs: Grid  # log π of the policy that sampled: the old policy of the update
    ref_logprobs: Grid  # log π_ref
    values: Grid  # V_t, before y_t was emitted

    def answers(self) -> list[list[int]]:
        """The responses without their padding."""
        pairs = zip(self.responses, self.mask, strict=True)
        return [[token for token, is_real in zip(*pair, strict=True) if is_real] for pair in pairs]

    def mean_kl(self) -> float:
        """K = E[Σ_t (log π − log π_ref)], nats per response, on the policy's own samples; the mean over responses."""
        drift = masked_mean(kl_k1(self.logprobs, self.ref_logprobs), self.mask, denominator=len(self.mask))
        return value_of(drift)


def roll_out(policy: TinyPolicy, reference: TinyPolicy, prompts: Tokens, random: Random) -> Rollout:
    """A response for each prompt, what policy and reference think of each token, and what return was expected."""
    responses, mask = pad([policy.respond(prompt, random) for prompt in prompts])
    logits, values = policy.forward(prompts, responses)
    ref_logits, _ = reference.forward(prompts, responses)
    logprobs, ref_logprobs = selected_logprobs(logits, responses), selected_logprobs(ref_logits, responses)
    return Rollout(prompts, responses, mask, logprobs, ref_logprobs, values)


# ── §6 the update ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Experience:
    """A rollout and what its rewards make of it."""

    rollout: Rollout
    rewards: Grid  # per token: the string everywhere, the score at the end
    advantages: Grid  # whitened over all real tokens, where that was asked for
    returns: Grid  # never whitened


@dataclass(frozen=True)
class Outcome:
    """What one update worked on, and its two losses, each the mean over the optimiser's steps."""

    experience: Experience
    policy_loss: float
    value_loss: float


def estimate(
    rollout: Rollout, scores: Row, beta: float, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True
) -> Experience:
    """Scores and KL → rewards per token → advantages and returns."""
    rewards = tethered_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, beta)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, gamma, lam)
    return Experience(rollout, rewards, masked_whiten(advantages, rollout.mask) if whiten else advantages, returns)


def losses(
    live: TinyPolicy,
    experience: Experience,
    rows: Sequence[int],
    clip_range: float = 0.2,
    value_clip_range: float | None = 0.2,
) -> tuple[Number, Number]:
    """Policy loss and value loss of these rows, each the mean over their real tokens."""
    old = experience.rollout
    prompts, responses = [old.prompts[row] for row in rows], [old.responses[row] for row in rows]
    mask = [old.mask[row] for row in rows]
    old_logprobs, old_values = [old.logprobs[row] for row in rows], [old.values[row] for row in rows]
    advantages, returns = [experience.advantages[row] for row in rows], [experience.returns[row] for row in rows]
    logits, values = live.forward(prompts, responses)
    logprobs = selected_logprobs(logits, responses)
    policy_loss = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)
    return policy_loss, clipped_value_loss(values, old_values, returns, mask, value_clip_range)


def update(
    policy: TinyPolicy,
    optimizer: Adam,
    rollout: Rollout,
    scores: Row,
    *,
    beta: float,
    minibatches: Sequence[Sequence[int]],
    clip_range: float = 0.2,
    value_clip_range: float | None = 0.2,
    value_coef: float = 0.1,
    epochs: int = 4,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    max_grad_norm: float | None = None,
) -> Outcome:
    """PPO epochs on one rollout; policy and value head change in place.

    Each epoch walks the `minibatches`, lists of rows, in the order given. One minibatch is one Adam step on
    policy_loss + value_coef·value_loss. The advantages are estimated and whitened once, before the first step.
    """
    require(epochs > 0 and len(minibatches) > 0, f"got {epochs} epochs of {len(minibatches)} minibatches; wanted ≥ 1")
    experience = estimate(rollout, scores, beta, gamma, lam, whiten)
    seen = []
    for rows in [rows for _ in range(epochs) for rows in minibatches]:
        live = policy.lifted()
        policy_loss, value_loss = losses(live, experience, rows, clip_range, value_clip_range)
        slopes = gradients(policy_loss + value_coef * value_loss, live.numbers())
        policy.assign(optimizer.step(policy.numbers(), shorten(slopes, max_grad_norm)))
        seen.append((value_of(policy_loss), value_of(value_loss)))
    return Outcome(
        experience, fmean(policy_loss for policy_loss, _ in seen), fmean(value_loss for _, value_loss in seen)
    )


def shorten(slopes: list[float], max_norm: float | None) -> list[float]:
    """The gradient, scaled down to max_norm where it is longer; 1e-6 in the divisor, as `clip_grad_norm_` has it."""
    scale = 1.0 if max_norm is None else min(1.0, max_norm / (math.hypot(*slopes) + 1e-6))
    return [slope * scale for slope in slopes]


# ── §7 the string ───────────────────────────────────────────────────────────────────────────────────────────────────
def adapted_beta(beta: float, kl: float, target_kl: float, batch: int, horizon: float) -> float:
    """β·(1 + e·batch/horizon), e = clip(K/target − 1, ±0.2): drift beyond the target makes the string shorter.

    Ziegler et al. 2019, §2.2. K and target in nats per response; the horizon counts episodes.
    """
    error = max(-0.2, min(kl / target_kl - 1, 0.2))
    return beta * (1 + error * batch / horizon)


# ── §8 the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────
HIDDEN, BATCH, MINIBATCH = 8, 32, 16
LEARNING_RATE = 0.005
HORIZON = 10 * BATCH  # episodes; adaptive β moves by 2 % an update at most, a factor of 3 in 60 updates


@dataclass(frozen=True)
class Models:
    """The four models; the value head is the policy's own."""

    policy: TinyPolicy
    reference: TinyPolicy
    reward_model: RewardModel


@dataclass(frozen=True)
class Report:
    """One line of the run, measured on the rollout before its update."""

    step: int
    reward: float  # mean score of the reward model, in standard deviations of the reference's scores
    gold: float  # mean of what people truly like; the learner never sees it
    kl: float  # K, nats per response
    policy_loss: float
    value_loss: float
    beta: float  # of this update

    def __str__(self) -> str:
        return (
            f"step {self.step:03d} reward={self.reward:+.2f} kl={self.kl:.3f} "
            f"policy_loss={self.policy_loss:+.3f} value_loss={self.value_loss:.2f}"
        )


def prepare(random: Random) -> Models:
    """Demonstrations → the checkpoint, its frozen copy, and a reward model from comparisons of its samples."""
    policy = TinyPolicy.untrained(len(VOCABULARY), LENGTH, HIDDEN, random)
    finetune(policy)
    reference = deepcopy(policy)  # a copy: a reference that moves along is no tether
    return Models(policy, reference, fit_reward_model(*compare(reference, random)))


def train(
    models: Models, random: Random, steps: int = 60, beta: float = 0.3, target_kl: float | None = None
) -> Iterator[Report]:
    """The loop: roll out, score, tether, estimate, update. With `target_kl` β adapts after each update."""
    optimizer = Adam(LEARNING_RATE)
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(BATCH)]
    for step in range(steps):
        rollout = roll_out(models.policy, models.reference, prompts, random)
        scores = [value_of(models.reward_model.score(answer)) for answer in rollout.answers()]
        order = random.sample(range(BATCH), BATCH)
        minibatches = [order[start : start + MINIBATCH] for start in range(0, BATCH, MINIBATCH)]
        outcome = update(models.policy, optimizer, rollout, scores, beta=beta, minibatches=minibatches)
        liked, kl = fmean(gold(answer) for answer in rollout.answers()), rollout.mean_kl()
        yield Report(step, fmean(scores), liked, kl, outcome.policy_loss, outcome.value_loss, beta)
        if target_kl is not None:
            beta = adapted_beta(beta, kl, target_kl, BATCH, HORIZON)


def main(steps: int = 60, beta: float = 0.3, seed: int = 0, target_kl: float | None = None, json: bool = False) -> None:
    """The whole of RLHF-PPO on nine words: every tenth line and the last, then what reference and policy say.

    Args:
        steps: updates, each on a fresh batch of 32 responses.
        beta: length of the string: 0 cuts it, 0.1 is too long to hold, 5 is too short to rise.
        seed: of everything that is drawn.
        target_kl: nats per response; β adapts to it after each update.
        json: print one JSON object with all steps and the samples.
    """
    require(steps >= 1, f"steps is {steps}; wanted at least 1")
    require(0 <= beta < math.inf, f"beta is {beta}; wanted a finite number ≥ 0: 0 cuts the string")
    require(target_kl is None or target_kl > 0, f"target_kl is {target_kl}; wanted nats per response above 0")
    random = Random(seed)
    models = prepare(random)
    reports = []
    for report in train(models, random, steps, beta, target_kl):
        reports.append(report)
        if not json and (report.step % 10 == 0 or report.step == steps - 1):
            print(report, flush=True)
    said = {name: _samples(getattr(models, name), seed) for name in ("reference", "policy")}
    if json:
        print(dumps({"steps": [asdict(report) for report in reports], "samples": said}))
    else:
        print(f"what people truly like: {reports[0].gold:+.2f} at the start, {reports[-1].gold:+.2f} at the end")
        print("\n".join(f"{name:9} says: {' | '.join(lines)}" for name, lines in said.items()))


def _samples(policy: TinyPolicy, seed: int) -> list[str]:
    random = Random(seed)
    return [f"{decode(prompt)}: {decode(policy.respond(prompt, random))}" for prompt in PROMPTS for _ in range(3)]
