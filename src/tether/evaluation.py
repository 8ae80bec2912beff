"""What held-out prompts say of a policy: scores by every judge, K, diversity, win rate, and best-of-n.

All evaluations of a run draw with the same uniform numbers, so that two policies differ by what they learned and not
by luck; a policy is compared with its reference prompt by prompt. It changes nothing and knows no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tether.batch import Policy, Prompt, Reward, Rollout
from tether.config import SamplingSettings
from tether.prompts import PromptSource
from tether.rollouts import distinct_2, sample
from tether.scores import score
from tether.streams import uniforms

WILSON_Z = 1.96
"""Normal quantile of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Judged:
    """Responses to held-out prompts, one each, with what every judge gives them."""

    rollouts: tuple[Rollout, ...]
    scores: Mapping[str, Float[Tensor, "batch"]]
    """By judge; `score` is the reward that is optimised."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(text for rollout in self.rollouts for text in rollout.prompts.texts)

    @property
    def responses(self) -> tuple[str, ...]:
        return tuple(text for rollout in self.rollouts for text in rollout.texts)

    @property
    def kl(self) -> Float[Tensor, "batch"]:
        """Σ_t log π − log π_ref, nats per response."""
        return torch.cat([rollout.kl for rollout in self.rollouts])

    @property
    def lengths(self) -> Float[Tensor, "batch"]:
        """Tokens."""
        return torch.cat([rollout.sequences.response_lengths for rollout in self.rollouts]).float()

    @property
    def distinct_2(self) -> float:
        """distinct-2 of each batch, weighted by its tokens."""
        sizes = [float(rollout.response_mask.sum()) for rollout in self.rollouts]
        parts = [distinct_2(rollout.sequences.responses, rollout.response_mask) for rollout in self.rollouts]
        return sum(part * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)


def evaluate(
    policy: Policy, source: PromptSource, judges: Mapping[str, Reward], settings: SamplingSettings, seed: int
) -> Judged:
    """One response to each prompt of the source, scored by every judge."""
    rollouts = tuple(_rollouts(policy, source, settings, seed))
    scores = {name: torch.cat([score(judge, rollout).totals for rollout in rollouts]) for name, judge in judges.items()}
    return Judged(rollouts, scores)


def _rollouts(policy: Policy, source: PromptSource, settings: SamplingSettings, seed: int) -> Iterator[Rollout]:
    for part in range(math.ceil(len(source.texts) / source.prompts_per_batch)):
        prompts = source.batch(part)
        draws = uniforms(seed, "evaluation", 0, prompts.keys, settings.max_new_tokens)
        yield sample(policy, prompts, draws, settings)


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the policy's response is the better one, with Wilson's 95 % interval."""

    rate: float
    low: float
    high: float


def win_rate(challenger: Float[Tensor, "batch"], champion: Float[Tensor, "batch"]) -> WinRate:
    """How often the challenger's score is the higher one, prompt by prompt; a tie counts one half.

    Wilson 1927; the interval is of a binomial share, at n = the number of prompts.
    """
    n = len(challenger)
    rate = float(((challenger > champion).double() + 0.5 * (challenger == champion).double()).mean())
    centre = rate + WILSON_Z**2 / (2 * n)
    reach = WILSON_Z * math.sqrt(rate * (1 - rate) / n + WILSON_Z**2 / (4 * n * n))
    scale = 1 + WILSON_Z**2 / n
    return WinRate(rate, max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale))


@dataclass(frozen=True)
class Gain:
    """What a policy gained over its reference, prompt by prompt, in the judge's unit."""

    mean: float
    se: float
    at_equal_length: float
    """The gain that is left where the responses are as long as the reference's."""
    at_equal_length_se: float


def gain(scores: Float[Tensor, "batch"], before: Float[Tensor, "batch"], longer: Float[Tensor, "batch"]) -> Gain:
    """Mean difference of the scores, and the same with the length taken out.

    Least squares of g_i = a + b·l_i + e_i over the prompts, g the difference of the scores and l that of the lengths
    in tokens; a is the gain at equal length, s.e.(a) = √(s²·(1/n + l̄²/Σ(l − l̄)²)), s² = Σe²/(n − 2). Where all
    differences of length are equal, or there are fewer than three prompts, length cannot be told apart: a is the mean.
    """
    g, x, n = (scores - before).double(), longer.double(), len(longer)
    mean, se = float(g.mean()), standard_error(g)
    spread = float(((x - x.mean()) ** 2).sum())
    if n < 3 or spread == 0.0:
        return Gain(mean, se, mean, se)
    slope = float(((x - x.mean()) * (g - g.mean())).sum()) / spread
    level = mean - slope * float(x.mean())
    noise = float(((g - level - slope * x) ** 2).sum()) / (n - 2)
    return Gain(mean, se, level, math.sqrt(noise * (1 / n + float(x.mean()) ** 2 / spread)))


def summarise(judged: Judged, reference: Judged) -> dict[str, float]:
    """The catalogue's `eval/` metrics; the win rate is by gold against the reference's responses."""
    metrics = {
        "eval/kl": float(judged.kl.mean()),
        "eval/kl_se": standard_error(judged.kl),
        "eval/distinct_2": judged.distinct_2,
        "eval/length": float(judged.lengths.mean()),
    }
    for name, scores in judged.scores.items():
        metrics[f"eval/{name}"] = float(scores.mean())
        metrics[f"eval/{name}_se"] = standard_error(scores)
    best = "gold" if "gold" in judged.scores else "score"
    told = gain(judged.scores[best], reference.scores[best], judged.lengths - reference.lengths)
    metrics |= {"eval/gain_at_equal_length": told.at_equal_length}
    if "gold" in judged.scores:
        wins = win_rate(judged.scores["gold"], reference.scores["gold"])
        metrics |= {"eval/win_rate": wins.rate, "eval/win_rate_low": wins.low, "eval/win_rate_high": wins.high}
    return metrics


def standard_error(x: Float[Tensor, "batch"]) -> float:
    """std/√n with the unbiased variance; 0 for a single value."""
    return float(x.double().std(correction=1)) / math.sqrt(len(x)) if len(x) > 1 else 0.0


@dataclass(frozen=True)
class BestOf:
    """The best of n samples by the reward, averaged over prompts."""

    n: int
    score: float
    """E[max of n], by the reward."""
    gold: float
    """What gold gives to the responses so chosen; NaN where there is no gold."""

    @property
    def kl(self) -> float:
        """K = log n − (n − 1)/n, nats per response. Stiennon et al. 2020."""
        return math.log(self.n) - (self.n - 1) / self.n


def best_of_n(scores: Float[Tensor, "prompts samples"], gold: Float[Tensor, "prompts samples"], n: int) -> BestOf:
    """Expected best of n by `scores` from the samples at hand, over all subsets of n: no sampling noise is added.

    With the N samples in ascending order, the i-th (from 0) is the best of a random subset of n with probability
    C(i, n−1)/C(N, n).
    """
    samples = scores.shape[1]
    chances = [math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)]
    weights = torch.tensor(chances, dtype=torch.float64)
    order = scores.argsort(dim=1)
    best = (scores.gather(1, order).double() * weights).sum(1).mean()
    return BestOf(n, float(best), float((gold.gather(1, order).double() * weights).sum(1).mean()))


def draw_best_of_n(
    policy: Policy,
    source: PromptSource,
    judges: Mapping[str, Reward],
    settings: SamplingSettings,
    ns: Sequence[int],
    seed: int,
    tick: Callable[[int], None],
) -> list[BestOf]:
    """Best-of-n of the policy as it stands, on every prompt of the source, for each n; as `draw_scores`."""
    scores, gold = draw_scores(policy, source, judges, settings, seed, tick)
    return [best_of_n(scores, gold, n) for n in ns]


def draw_scores(
    policy: Policy,
    source: PromptSource,
    judges: Mapping[str, Reward],
    settings: SamplingSettings,
    seed: int,
    tick: Callable[[int], None],
) -> tuple[Float[Tensor, "prompts samples"], Float[Tensor, "prompts samples"]]:
    """Scores and gold (NaN where there is none) of responses of the policy as it stands, to every prompt of the source.

    The source repeats each prompt, one prompt a batch; `tick` is called with the number of prompts done.
    """
    scores: list[Tensor] = []
    gold: list[Tensor] = []
    for part in range(len(source.texts)):
        prompts = source.batch(part)
        draws = uniforms(seed, "best of n", 0, prompts.keys, settings.max_new_tokens)
        rollout = sample(policy, prompts, draws, settings)
        scores.append(score(judges["score"], rollout).totals)
        known = "gold" in judges
        gold.append(score(judges["gold"], rollout).totals if known else torch.full_like(scores[-1], torch.nan))
        tick(part + 1)
    return torch.stack(scores), torch.stack(gold)
