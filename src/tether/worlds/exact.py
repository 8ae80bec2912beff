"""A world small enough to know the truth in: every response can be written down.

Responses are `length` tokens from a vocabulary of `tokens` (default 4 of 8: 4,096 responses a prompt). The policy is a
table of logits, one row a prefix; so is the frozen reference. For any β the best that the tether allows is known:

    π*(y|x) = ρ(y|x)·e^{r(x,y)/β}/Z(x)      J* = E_x[β·log Z(x)]      J(π) = E[r] − β·K(π)
    regret  = J* − J(π) = β·KL(π‖π*) ≥ 0

so the distance of a trained policy from the optimum is a number, not an opinion. Scores have mean 0 and standard
deviation σ = 1 under the reference, for each prompt. Korbak et al. 2022; Rafailov et al. 2023, eq. 4–5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tether.batch import Evaluation, Generation, Prompt, Prompts, ReferenceEvaluation, Sequences, plain_text
from tether.errors import InputError
from tether.frontier import chord_bounds
from tether.numerics import entropy, full_kl, selected_logprobs
from tether.streams import stream

REFERENCE_SPREAD = 0.7
"""Standard deviation of the reference's logits: an entropy of about 1.85 of the 2.08 nats that 8 tokens allow."""


@dataclass(frozen=True)
class ExactWorld:
    """The world: what the reference says, and how good each response is."""

    tokens: int
    length: int
    reference_logits: Float[Tensor, "prompts prefixes tokens"]
    scores: Float[Tensor, "prompts responses"]
    """The score of every response; response number Σ_t y_t·tokens^(length−1−t)."""

    @staticmethod
    def create(tokens: int = 8, length: int = 4, prompts: int = 4, seed: int = 0) -> ExactWorld:
        """A world drawn at random: weights for each token at each place and for each pair of neighbours."""
        if tokens < 2 or length < 1 or prompts < 1 or tokens**length > 1_000_000:
            raise InputError(
                f"an exact world of {tokens} tokens × {length} and {prompts} prompts cannot be enumerated; "
                "wanted ≥ 2 tokens, ≥ 1 place, ≥ 1 prompt and at most 1,000,000 responses"
            )
        draw = stream(seed, "exact world")
        logits = torch.from_numpy(draw.normal(0.0, REFERENCE_SPREAD, (prompts, _prefixes(tokens, length), tokens)))
        place = torch.from_numpy(draw.normal(size=(prompts, length, tokens)))
        pair = torch.from_numpy(draw.normal(size=(prompts, tokens, tokens)))
        every = every_response(tokens, length)
        raw = place[:, torch.arange(length), every].sum(-1) + pair[:, every[:, :-1], every[:, 1:]].sum(-1)
        return ExactWorld(tokens, length, logits, _standardise(raw, response_logprobs(logits, tokens, length)))

    @property
    def prompts(self) -> int:
        return self.scores.shape[0]

    def score_text(
        self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]
    ) -> list[float]:
        """The reward as a function of texts; a prompt reads `p2`, a response `7 0 3 3`."""
        del columns
        rows = torch.tensor([int(plain_text(prompt)[1:]) for prompt in prompts])
        numbers = torch.tensor([self._number_of_text[response] for response in responses])
        scores: list[float] = self.scores[rows, numbers].tolist()
        return scores

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every response as text, in the order of their number."""
        return tuple(" ".join(map(str, row)) for row in every_response(self.tokens, self.length).tolist())

    @cached_property
    def _number_of_text(self) -> Mapping[str, int]:
        return {text: number for number, text in enumerate(self.texts)}


@dataclass(frozen=True)
class Optimum:
    """The best policy that a string of this β allows, averaged over prompts."""

    beta: float
    score: float
    """E_π*[r], in σ."""
    kl: float
    """K* = KL(π*‖ρ), nats per response."""
    objective: float
    """J* = β·log Z, in σ."""


@dataclass(frozen=True)
class Standing:
    """Where a policy stands against the optimum of its β. All exact, by enumeration."""

    beta: float
    score: float
    kl: float
    regret: float
    """J* − J(π), in σ."""
    kl_optimum: float
    score_optimum: float
    flatness: float
    """E_π-variance of r − β·log(π/ρ) within a prompt, over the variance of r under ρ: 1 at ρ, 0 at the optimum."""


def optimum(world: ExactWorld, beta: float) -> Optimum:
    """π* ∝ ρ·e^{r/β} by enumeration. Raises InputError where β ≤ 0: without a string the optimum has no K."""
    logprobs = optimal_logprobs(world, beta)
    reference = response_logprobs(world.reference_logits, world.tokens, world.length)
    score = float((logprobs.exp() * world.scores).sum(-1).mean())
    kl = float(_expected(logprobs, logprobs - reference).mean())
    log_z = torch.logsumexp(reference + world.scores / beta, dim=-1)
    return Optimum(beta, score, kl, beta * float(log_z.mean()))


def optimal_logprobs(world: ExactWorld, beta: float) -> Float[Tensor, "prompts responses"]:
    """log π*(y|x) of every response."""
    if not beta > 0:
        raise InputError(f"beta is {beta}; the exact optimum wants beta > 0")
    reference = response_logprobs(world.reference_logits, world.tokens, world.length)
    return torch.log_softmax(reference + world.scores / beta, dim=-1)


def standing(world: ExactWorld, logits: Float[Tensor, "prompts prefixes tokens"], beta: float) -> Standing:
    """Score, K, regret and flatness of the policy with these logits, under a string of this β."""
    logprobs = response_logprobs(logits.double(), world.tokens, world.length)
    reference = response_logprobs(world.reference_logits, world.tokens, world.length)
    best = optimum(world, beta)
    surplus = world.scores - beta * (logprobs - reference)
    score, kl = _expected(logprobs, world.scores), _expected(logprobs, logprobs - reference)
    spread = _expected(logprobs, (surplus - _expected(logprobs, surplus)[:, None]) ** 2)
    variance = _expected(reference, (world.scores - _expected(reference, world.scores)[:, None]) ** 2)
    return Standing(
        beta=beta,
        score=float(score.mean()),
        kl=float(kl.mean()),
        regret=float((best.objective - (score - beta * kl)).mean()),
        kl_optimum=best.kl,
        score_optimum=best.score,
        flatness=float((spread / variance).mean()),
    )


def frontier(world: ExactWorld, betas: Sequence[float]) -> list[Optimum]:
    """The whole reward–KL frontier: no policy reaches a higher score at the same K."""
    return [optimum(world, beta) for beta in betas]


def chord_law(
    points: Sequence[tuple[float, float, float]],
    tolerance: float = 0.0,
    errors: Sequence[tuple[float, float]] | None = None,
) -> list[str]:
    """What breaks β_a ≤ (r_a − r_b)/(K_a − K_b) ≤ β_b, K_a ≥ K_b among points (β, score, K); empty where it holds.

    It holds between the optima of any two strings β_a < β_b, in every world; a sweep that breaks it is unconverged or
    counts KL wrongly. For points that carry noise: `tolerance` is relative, `errors` are the standard errors of score
    and K, of which two are allowed.
    """
    broken = []
    known = errors if errors is not None else [(0.0, 0.0)] * len(points)
    rows = sorted(zip(points, known, strict=True))
    for ((low, score_low, kl_low), noise_low), ((high, score_high, kl_high), noise_high) in itertools.pairwise(rows):
        pair, nats, gain = f"between β = {low:g} and β = {high:g}", kl_low - kl_high, score_low - score_high
        scores, kls = (2.0 * math.hypot(*both) for both in zip(noise_low, noise_high, strict=True))
        least, most = chord_bounds(low * (1 - tolerance), high * (1 + tolerance), nats, kls, scores)
        if nats < -tolerance * kl_low - kls:
            broken.append(f"{pair} K rises from {kl_low:.4g} to {kl_high:.4g}, where a tighter string must lower it")
        elif not least <= gain <= most:
            slope = gain / nats if nats else math.nan
            more = "" if errors is None else " by more than two standard errors"
            broken.append(f"{pair} the slope Δr/ΔK is {slope:.4g}, outside [{low:g}, {high:g}]{more}")
    return broken


class TabularPolicy(nn.Module):
    """A table of logits and a table of values over every prefix; the reference is the world's own table.

    It answers the same questions as a language model (`batch.Policy`), so the trainer's rooms run on it unchanged.
    """

    def __init__(self, world: ExactWorld) -> None:
        super().__init__()
        self.world = world
        self.logits = nn.Parameter(world.reference_logits.float().clone())
        self.state_values = nn.Parameter(torch.zeros(self.logits.shape[:2]))
        self.register_buffer("reference", world.reference_logits.float().clone())

    def generate(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        rows = prompts.ids[:, -1] - self.world.tokens
        drawn: list[Tensor] = []
        logprobs: list[Tensor] = []
        for t in range(self.world.length):
            prefix = prefix_number(torch.stack(drawn, 1) if drawn else rows.new_zeros(len(rows), 0), self.world.tokens)
            distribution = torch.softmax(self.logits.detach()[rows, prefix].double() / temperature, dim=-1)
            token = (distribution.cumsum(-1) <= uniforms[:, t : t + 1]).sum(-1).clamp(max=self.world.tokens - 1)
            drawn.append(token)
            logprobs.append(distribution.gather(1, token[:, None]).squeeze(1).log().float())
        responses = torch.stack(drawn, dim=1)
        everything = torch.ones_like(responses, dtype=torch.bool)
        return Generation(responses, everything, torch.stack(logprobs, 1), everything[:, 0])

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        rows, prefixes = self._states(sequences)
        logits = self.logits[rows, prefixes]
        logprobs = selected_logprobs(logits, sequences.responses, temperature)
        return Evaluation(logprobs, self.state_values[rows, prefixes], entropy(logits.detach(), temperature))

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        rows, prefixes = self._states(sequences)
        reference = self.get_buffer("reference")[rows, prefixes]
        divergence = full_kl(self.logits.detach()[rows, prefixes], reference, temperature)
        return ReferenceEvaluation(selected_logprobs(reference, sequences.responses, temperature), divergence)

    def decode(self, responses: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> list[str]:
        del mask  # every response has the world's full length
        return [self.world.texts[number] for number in response_number(responses, self.world.tokens).tolist()]

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"policy": [self.logits], "value": [self.state_values]}

    def _states(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The table's row and column of every state, [batch, 1] and [batch, response]."""
        responses = sequences.responses
        prefixes = [prefix_number(responses[:, :t], self.world.tokens) for t in range(responses.shape[1])]
        return sequences.ids[:, :1] - self.world.tokens, torch.stack(prefixes, dim=1)


def every_response(tokens: int, length: int) -> Int[Tensor, "responses length"]:
    """All responses, in the order of their number."""
    return torch.cartesian_prod(*[torch.arange(tokens)] * length).reshape(-1, length)


def response_number(responses: Int[Tensor, "*batch length"], tokens: int) -> Int[Tensor, "*batch"]:
    """Σ_t y_t·tokens^(length−1−t): where a response stands in `every_response`."""
    weights = tokens ** torch.arange(responses.shape[-1] - 1, -1, -1)
    return (responses * weights).sum(-1)


def prefix_number(prefix: Int[Tensor, "batch t"], tokens: int) -> Int[Tensor, "batch"]:
    """Where the state after this prefix stands in the tables: shorter prefixes first."""
    return _prefixes(tokens, prefix.shape[1]) + response_number(prefix, tokens)


def response_logprobs(
    logits: Float[Tensor, "prompts prefixes tokens"], tokens: int, length: int
) -> Float[Tensor, "prompts responses"]:
    """log π(y|x) of every response under a table of logits."""
    table = torch.log_softmax(logits, dim=-1)
    every = every_response(tokens, length)
    steps = [table[:, prefix_number(every[:, :t], tokens), every[:, t]] for t in range(length)]
    return torch.stack(steps).sum(0)


def _prefixes(tokens: int, length: int) -> int:
    """How many prefixes are shorter than `length`: 1 + tokens + tokens² + …"""
    return sum(tokens**shorter for shorter in range(length))


def _expected(logprobs: Tensor, x: Tensor) -> Float[Tensor, "prompts"]:
    return (logprobs.exp() * x).sum(-1)


def _standardise(raw: Tensor, reference: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 under the reference, for each prompt."""
    mean = _expected(reference, raw)[:, None]
    deviation = _expected(reference, (raw - mean) ** 2)[:, None].sqrt()
    return (raw - mean) / deviation
