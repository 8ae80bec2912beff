"""What the policy's full distribution says of each drawn token: the facts that sampler honesty is judged by.

    logits [tokens, vocab] + drawn tokens ──▶ Facts: for every transform h of the sampler, log q_h(y) − log π(y)

q_h is what y would have been drawn from, had the sampler applied h: a temperature, a cut by rank, nucleus or share, a
ban of the EOS, a penalty on what was said before, a ban of n-grams that stand there, a bias of one token
(`token_bias.py`), or the distribution one place back. Each is a probability that is known before y is drawn, so the
ratio q_h/π has expectation 1 under an honest sampler. Read next: `honesty.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.token_bias import DOUBT, bias_gains

COLD = (0.01, 0.3, 0.5, 0.6, 0.7, 0.8)
WARM = (8 / 9, 16 / 17, 16 / 15, 8 / 7, 4 / 3, 2.0)
"""π^(1/τ) is a product of square roots of π."""
TEMPERATURES = COLD + WARM
"""The sampler's over the policy's."""
RANKS = (2, 3, 5, 8, 10, 15, 20, 30, 40, 50, 64, 100, 128, 200, 256)
MASSES = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 10**9)
PENALTIES = (1.02, 1.05, 1.1, 1.2, 1.3, 1.5)
SIZES = (2, 3, 4)
"""n of the n-grams that may not come again."""
BIASED_AMONG = 64
"""Of each token's distribution, the likeliest that a bias is reckoned on exactly."""
IMPOSSIBLE = -1e4

FAMILIES: dict[str, tuple[float, ...]] = {
    "temperature_mismatch": TEMPERATURES,
    "top_k": RANKS,
    "top_p": MASSES,
    "min_p": SHARES,
    "min_length": LENGTHS,
    "repetition_penalty": PENALTIES,
    "no_repeat_ngram": SIZES,
    "off_by_one": (-1.0,),
    "stale_sampler": (0.0,),
}
"""The transforms that are told apart, by the failure's name, each with its grid of values."""
HYPOTHESES: tuple[tuple[str, float], ...] = tuple((name, value) for name, grid in FAMILIES.items() for value in grid)


@dataclass(frozen=True)
class Drawn:
    """The real response tokens of some rows, laid end to end, and where each stands."""

    tokens: Int[Tensor, "tokens"]
    place: Int[Tensor, "tokens"]
    """t, counted from the response's first token."""
    seen: Int[Tensor, "tokens total"]
    """The ids of the token's row."""
    known: Bool[Tensor, "tokens total"]
    """True on the ids before the token, each id once."""
    repeats: Bool[Tensor, "tokens sizes total"]
    """True on the ids that followed, earlier in the row, the n − 1 ids that the token follows; n of SIZES."""
    ref_logprobs: Float[Tensor, "tokens"]


@dataclass(frozen=True)
class Facts:
    """What is known of each drawn token."""

    logprobs: Float[Tensor, "tokens"]
    """log π(y)."""
    surprise: Float[Tensor, "tokens"]
    """−log π(y) − H(π): mean 0 under an honest sampler."""
    variance: Float[Tensor, "tokens"]
    """Of the surprise, under π."""
    above: Float[Tensor, "tokens"]
    """Probability of all tokens likelier than y."""
    rank: Int[Tensor, "tokens"]
    """How many are likelier than y."""
    ratios: Float[Tensor, "tokens hypotheses"]
    """log q_h(y) − log π(y), without doubt."""
    ahead: Float[Tensor, "tokens"]
    """log of y's probability one place on, minus log π(y); 0 at the end of a row. No wager: that place has seen y."""
    tokens: Int[Tensor, "tokens"]
    expected: Float[Tensor, "groups vocab"]
    """Σ π(v) over a group's tokens: how often v should have been drawn."""
    biased: Float[Tensor, "groups biases vocab"]
    """log of the wager on each bias of each token of the vocabulary, over a group's tokens."""

    @staticmethod
    def join(parts: list[Facts]) -> Facts:
        return Facts(*(torch.cat([getattr(part, name) for part in parts]) for name in Facts.__dataclass_fields__))

    def to(self, device: str) -> Facts:
        """The same on another device."""
        return Facts(*(getattr(self, name).to(device) for name in Facts.__dataclass_fields__))


def facts_of(logits: Float[Tensor, "tokens vocab"], drawn: Drawn, temperature: float, stops: frozenset[int]) -> Facts:
    """The facts of one group of rows. `logits` are the policy's, before temperature, float32."""
    every = torch.log_softmax(logits / temperature, dim=-1).clamp_(min=IMPOSSIBLE)
    chances = every.exp()
    own = every.gather(1, drawn.tokens[:, None])
    table, likeliest = chances.topk(min(max(RANKS), chances.shape[1]), dim=1)
    expected, among = chances.sum(dim=0), slice(min(BIASED_AMONG, table.shape[1]))
    biased = bias_gains(expected, table[:, among], likeliest[:, among], drawn.tokens, own[:, 0].exp())
    biased[0, sorted(stops)] = IMPOSSIBLE  # a ban of the EOS has a name of its own
    likelier = chances > own.exp()
    above, rank = _dot(chances, likelier.to(chances.dtype)), likelier.sum(dim=1)
    entropy = -_dot(chances, every)
    back, ahead = _shifted(every, drawn)
    ratios = [
        _tempered(chances, own, table),
        _cut(table, own.exp(), above[:, None], rank[:, None]),
        _unended(chances, drawn, stops),
        _penalised(logits, own, drawn, temperature),
        _unrepeated(chances, drawn),
        (back - own[:, 0])[:, None],
        (drawn.ref_logprobs - own[:, 0])[:, None],
    ]
    return Facts(
        logprobs=own[:, 0],
        surprise=-own[:, 0] - entropy,
        variance=_dot(chances * every, every) - entropy**2,
        above=above,
        rank=rank,
        ratios=torch.cat(ratios, dim=1),
        ahead=ahead - own[:, 0],
        tokens=drawn.tokens,
        expected=expected[None],
        biased=biased[None],
    )


def doubted(ratios: Float[Tensor, "tokens hypotheses"]) -> Float[Tensor, "tokens hypotheses"]:
    """log((1 − ε)·q_h/π + ε): still a ratio of probabilities, and never far below 0."""
    return torch.log((1.0 - DOUBT) * ratios.double().clamp(max=700.0).exp() + DOUBT)


def _tempered(chances: Tensor, own: Tensor, table: Tensor) -> Tensor:
    """log π(y)^a/Σ π^a − log π(y) for each temperature τ = 1/a.

    Below 0.8 the sum runs over the likeliest tokens, and the others are bounded by their mass times the least of these
    to the power a − 1: q is then no more than the tempered distribution, and the wager on it stays fair.
    """
    most, rest = table[:, :1], (1.0 - table.sum(dim=1)).clamp(min=0.0)
    shares = (table / most).clamp(min=1e-37).log()
    cold = [
        (((shares / tau).exp().sum(dim=1) + rest / most[:, 0] * (shares[:, -1] * (1 / tau - 1)).exp()).log()
        + most[:, 0].log() / tau)
        for tau in COLD
    ]  # fmt: skip
    half = chances.sqrt()
    quarter = half.sqrt()
    eighth = quarter.sqrt()
    sixteenth = eighth.sqrt()
    three = half * quarter
    warm = [
        _dot(chances, eighth), _dot(chances, sixteenth), _dot(three * eighth, sixteenth), _dot(three, eighth),
        _dot(half, quarter), half.sum(dim=1),
    ]  # fmt: skip
    exponents = torch.tensor([1.0 / tau for tau in TEMPERATURES], device=own.device)
    return (exponents - 1.0) * own - torch.stack(cold + [sums.log() for sums in warm], dim=1)


def _dot(a: Float[Tensor, "tokens vocab"], b: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens"]:
    """Σ_v a·b of each token, in one pass."""
    summed: Tensor = torch.linalg.vecdot(a, b)
    return summed


def _cut(table: Tensor, chance: Tensor, above: Tensor, rank: Tensor) -> Tensor:
    """−log(kept mass) where y is kept, for each cut by rank, nucleus and share of the likeliest.

    `table` holds the likeliest tokens; where a cut would keep more than those, it is taken for one that keeps all.
    """
    width, cumulative = table.shape[1], table.cumsum(dim=1)
    ranks, masses, shares = (torch.tensor(grid, device=table.device) for grid in (RANKS, MASSES, SHARES))
    by_rank = cumulative[:, ranks.clamp(max=width) - 1]
    enough = torch.searchsorted(cumulative, masses.expand(len(table), -1).contiguous())
    by_mass = torch.where(enough < width, cumulative.gather(1, enough.clamp(max=width - 1)), masses)
    floors = shares * table[:, :1]
    among = torch.searchsorted(-table, -floors, right=True)
    by_share = torch.where(among < width, cumulative.gather(1, (among - 1).clamp(min=0)), 1.0)
    kept = torch.cat([by_rank, by_mass, by_share], dim=1).clamp(max=1.0)
    stays = torch.cat([rank < ranks, above < masses, chance >= floors], dim=1)
    return torch.where(stays, -kept.log(), IMPOSSIBLE)


def _unended(chances: Tensor, drawn: Drawn, stops: frozenset[int]) -> Tensor:
    """−log(1 − π(EOS)) on the first m tokens, unless y is the EOS."""
    ends = torch.tensor(sorted(stops), dtype=torch.long, device=chances.device)
    mass = chances[:, ends].sum(dim=1).clamp(max=1.0 - 1e-6)
    banned = torch.where(torch.isin(drawn.tokens, ends), IMPOSSIBLE, -torch.log1p(-mass))
    return torch.stack([torch.where(drawn.place < m, banned, 0.0) for m in LENGTHS], dim=1)


def _penalised(logits: Tensor, own: Tensor, drawn: Drawn, temperature: float) -> Tensor:
    """Logits of tokens seen before are divided by θ where positive and multiplied where negative (Keskar 2019)."""
    total = torch.logsumexp(logits / temperature, dim=1)
    before = logits.gather(1, drawn.seen)
    said = ((drawn.seen == drawn.tokens[:, None]) & drawn.known).any(dim=1)
    raw = logits.gather(1, drawn.tokens[:, None])[:, 0]
    old = torch.where(drawn.known, (before / temperature - total[:, None]).exp(), 0.0).sum(dim=1)
    columns = []
    for theta in PENALTIES:
        new = torch.where(drawn.known, (_punish(before, theta) / temperature - total[:, None]).exp(), 0.0).sum(dim=1)
        mine = torch.where(said, _punish(raw, theta), raw) / temperature - total
        columns.append(mine - torch.log((1.0 - old + new).clamp(min=1e-9)) - own[:, 0])
    return torch.stack(columns, dim=1)


def repeats(ids: Int[Tensor, "rows total"]) -> Bool[Tensor, "rows total sizes total"]:
    """[row, t, n, s]: ids[s] followed, before place t, the same n − 1 ids as stand before t; n of SIZES."""
    same = ids[:, :, None] == ids[:, None, :]
    alike = torch.ones_like(same).tril(diagonal=-1)
    found = list[Tensor]()
    for back in range(1, max(SIZES)):
        alike = alike & torch.nn.functional.pad(same[:, :-back, :-back], (back, 0, back, 0))
        found.append(alike)
    return torch.stack([found[size - 2] for size in SIZES], dim=2)


def _unrepeated(chances: Tensor, drawn: Drawn) -> Tensor:
    """−log(1 − π(B)) unless y is of B, the tokens that would make an n-gram of the row a second time."""
    columns = []
    for size in range(len(SIZES)):
        banned = torch.zeros_like(chances)
        banned.scatter_add_(1, drawn.seen, drawn.repeats[:, size].to(chances.dtype))
        banned.clamp_(max=1.0)
        mass = _dot(chances, banned).clamp(max=1.0 - 1e-6)
        is_banned = banned.gather(1, drawn.tokens[:, None])[:, 0] > 0
        columns.append(torch.where(is_banned, IMPOSSIBLE, -torch.log1p(-mass)))
    return torch.stack(columns, dim=1)


def _punish(logits: Tensor, theta: float) -> Tensor:
    return torch.where(logits > 0, logits / theta, logits * theta)


def _shifted(every: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """log-probability of y at the place before and at the place after, within its row; its own at the row's ends."""
    here = torch.arange(len(drawn.tokens), device=every.device)
    is_first = drawn.place == 0
    is_last = torch.cat([is_first[1:], is_first.new_ones(1)])
    before, after = torch.where(is_first, here, here - 1), torch.where(is_last, here, here + 1)
    return every[before, drawn.tokens], every[after, drawn.tokens]
