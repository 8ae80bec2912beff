"""Are the responses samples of the policy? Asked of every update, answered within a bounded rate of false alarms.

    rollout ──facts of tokens──▶ likelihood ratios of every transform, and the PIT ──▶ one wager ──▶ alarm, with a name

If y ~ π then for any distribution q that is known before y is drawn, E[q(y)/π(y)] = 1, so a product of such ratios is a
fair game: by Ville's inequality it ever exceeds 1/α with probability at most α, however long the run and however often
it is looked at. The wager is a mixture over all transforms of `tokens.py`, over every token of the vocabulary that may
be favoured or banned, over starting updates, and over the shape of the probability integral transform
(u = Σ_{v: π(v) > π(y)} π(v) + U·π(y), uniform if y ~ π), which sees transforms that nobody listed. The name is the
transform under which the tokens are most probable; it is said once the odds against the next are twenty to one.
Read next: `watch.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.alarms import Alarm
from tether.batch import Rollout, Sequences
from tether.checks import Tolerance
from tether.runtime.ranks import here
from tether.streams import stream
from tether.token_bias import DOUBT, TokenWager
from tether.tokens import FAMILIES, HYPOTHESES, RANKS, TEMPERATURES, Drawn, Facts, doubted, facts_of, repeats

FALSE_ALARMS = 1e-3
"""α: the probability that an honest run is ever alarmed, over all its updates."""
ODDS_TO_NAME = 20.0
"""How much more probable the tokens must be under one transform than under the next for its name to be said."""
PIT_BINS = 20
PIT_WEIGHTS = (30.0, 300.0, 3000.0)
"""Pseudo-counts of the uniform histogram that the wager on the PIT's shape starts from."""
PIT_SHARE = 0.2
"""Share of the wager that lies on the PIT."""
FULL_UPDATES = 4
"""Updates at the start whose every token is looked at."""
ELEMENTS_AT_ONCE, ELEMENTS_AT_START, ELEMENTS_LATER = 2**21, 2**23, 2**22
"""tokens × vocabulary: of one pass, of an update at the start, of a later one."""
LATER_EVERY = 2
"""After the start one update in so many is looked at."""
SUSPECT, PROVEN = 10.0, 1e12
"""Odds of one transform between which every update is looked at in full. What was won says whether to bet again, not
what is drawn, so the game stays fair. Nano runs with top-k 20 are named twice as early."""
NOTHING = -1e300
"""log of no wealth at all, as a plain number."""
BIAS = "token_biased"
"""The family of biases of one token, which has a hypothesis for each token and so no grid in `FAMILIES`."""
REMEMBERED = (
    "wealth", "pit_wealth", "histogram", "tokens", "surprise", "variance", "highest_rank", "ahead", "agreed", "looks",
    "updates", "kl_wealth",
)  # fmt: skip


@runtime_checkable
class Distributions(Protocol):
    """A policy that tells its full distributions."""

    @property
    def vocab(self) -> int: ...

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a response."""

    def logits_of(self, sequences: Sequences) -> Float[Tensor, "tokens vocab"]:
        """z before temperature at every real response token, rows one after the other, float32."""


@runtime_checkable
class Remembers(Protocol):
    """A policy that still has the states of its last pass."""

    def logits_kept(self, sequences: Sequences, rows: Int[Tensor, "rows"]) -> Float[Tensor, "tokens vocab"] | None:
        """`logits_of` these rows without another pass; None where it has to be made."""


@runtime_checkable
class Speaks(Protocol):
    """A policy that says its tokens as text."""

    def decode(self, responses: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> list[str]: ...


@dataclass
class Honesty:
    """The wager of one run."""

    seed: int
    temperature: float
    tolerance: Tolerance
    wealth: Float[Tensor, "hypotheses"] = field(
        default_factory=lambda: torch.full((len(HYPOTHESES),), -math.inf, dtype=torch.float64)
    )
    """log of the wager on each transform, over all starting updates."""
    pit_wealth: Float[Tensor, "weights"] = field(
        default_factory=lambda: torch.full((len(PIT_WEIGHTS),), -math.inf, dtype=torch.float64)
    )
    singles: TokenWager = field(default_factory=TokenWager)
    """The wager on the biases of each token."""
    histogram: Float[Tensor, "bins"] = field(default_factory=lambda: torch.zeros(PIT_BINS, dtype=torch.float64))
    tokens: int = 0
    surprise: float = 0.0
    variance: float = 0.0
    highest_rank: int = 0
    ahead: float = 0.0
    agreed: bool = False
    """Whether sampler and policy gave the same log-probabilities in some update."""
    looks: int = 0
    updates: int = 0
    kl_wealth: float = NOTHING

    def check(self, policy: object, rollout: Rollout, step: int) -> Iterator[Alarm]:
        """Look at one update's rollout, while the policy is still the one that sampled.

        Responses that say of themselves that older weights wrote them are no samples of the policy, and no wager is
        laid on them: their importance weights say how far off they are (`sampler/weight_mean`). Those of another engine
        are looked at as the policy's own: its round-off is within the tolerance, its transforms are not.
        """
        if rollout.origin.staleness:
            return
        if isinstance(policy, Distributions) and (self._looks_in_full() or step % LATER_EVERY == 0):
            self.add(facts_of_rollout(policy, rollout, self.temperature, self._rows(policy, rollout)), step)
        self._bet_on_the_reference(rollout)
        disagreement = _rms(rollout)
        disagrees = disagreement > self.tolerance.logprob
        if self.log_evidence() >= -math.log(FALSE_ALARMS) or disagrees:
            yield self._alarm(policy, disagreement, disagrees)
        elif self.kl_wealth >= -math.log(FALSE_ALARMS):
            kl = float(rollout.kl.mean())
            yield Alarm("negative_kl", f"K is {kl:.3g} nats, at odds of e^{self.kl_wealth:.1f} against K ≥ 0",
                        {"kl": kl, "log_evidence": self.kl_wealth})  # fmt: skip
        self.agreed |= not disagrees

    def _looks_in_full(self) -> bool:
        """At the start, and while some transform is suspect and not yet proven."""
        odds = max(float(self.wealth.max()), self.singles.best())
        return self.looks < FULL_UPDATES or math.log(SUSPECT) < odds < math.log(PROVEN)

    def _bet_on_the_reference(self, rollout: Rollout) -> None:
        """E_π[Π π_ref/π] = 1 for a whole response: where Σ log π − log π_ref stays below 0, y is not of π."""
        self.updates += 1
        gains = torch.log((1.0 - DOUBT) * (-rollout.kl.double()).clamp(max=700.0).exp() + DOUBT).sum()
        share = -math.log(self.updates * (self.updates + 1.0))
        self.kl_wealth = float(np.logaddexp(self.kl_wealth, share)) + float(gains)

    def add(self, facts: Facts, step: int) -> None:
        """Bet on these tokens: every wager is multiplied by the ratio that it was laid on."""
        ratios = doubted(facts.ratios).sum(dim=0)
        share = -math.log((self.looks + 1.0) * (self.looks + 2.0))  # Σ_n 1/((n+1)(n+2)) = 1: wagers laid from here on
        self.wealth = torch.logaddexp(self.wealth, torch.tensor(share, dtype=torch.float64)) + ratios
        counts = self._pit(facts, step)
        gains = torch.stack([_dirichlet_gain(self.histogram, counts, weight) for weight in PIT_WEIGHTS])
        self.pit_wealth = torch.logaddexp(self.pit_wealth, torch.tensor(share, dtype=torch.float64)) + gains
        self.singles.add(facts.tokens, facts.expected.sum(dim=0), facts.biased.sum(dim=0), share)
        self.looks += 1
        self.histogram = self.histogram + counts
        self.tokens += len(facts.logprobs)
        self.surprise += float(facts.surprise.double().sum())
        self.variance += float(facts.variance.double().clamp(min=0).sum())
        self.highest_rank = max(self.highest_rank, int(facts.rank.max()))
        self.ahead += float(facts.ahead.double().sum())

    def state(self) -> dict[str, object]:
        """All that was bet and won so far, as plain values."""
        found = {name: getattr(self, name) for name in REMEMBERED}
        plain = {name: v.clamp(min=NOTHING).tolist() if isinstance(v, Tensor) else v for name, v in found.items()}
        return plain | {"singles": self.singles.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        for name in REMEMBERED:
            value = state[name]
            setattr(self, name, torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value)
        if "singles" in state:
            self.singles.restore(state["singles"])

    def log_evidence(self) -> float:
        """log of the whole wager; it reaches log 1/α in an honest run with probability α at most."""
        family = (1.0 - PIT_SHARE) / (len(FAMILIES) + 1)
        sizes = [math.log(family / len(FAMILIES[name])) for name, _ in HYPOTHESES]
        named = self.wealth + torch.tensor(sizes, dtype=torch.float64)
        single = torch.tensor([self.singles.log_evidence() + math.log(family)], dtype=torch.float64)
        shaped = self.pit_wealth + math.log(PIT_SHARE / len(PIT_WEIGHTS))
        return float(torch.logsumexp(torch.cat([named, single, shaped]), dim=0)) if self.looks else -math.inf

    def z(self) -> float:
        """z of E[−log π(y)] = E[H]: below 0 the tokens are more probable than they should be."""
        return self.surprise / math.sqrt(self.variance) if self.variance > 0 else 0.0

    def diagnosis(self) -> tuple[str, float | None, dict[str, float]]:
        """The transform's name and value, and each family's best log-likelihood ratio; no name where two are close."""
        best = dict.fromkeys(FAMILIES, -math.inf)
        for (name, _), value in zip(HYPOTHESES, self.wealth.tolist(), strict=True):
            best[name] = max(best[name], value)
        best[BIAS] = self.singles.best()
        if self.ahead > 0.0 and self.ahead > max(best.values()):
            return "off_by_one", 1.0, best
        order = sorted(best, key=lambda name: -best[name])
        sure = best[order[0]] > 0.0 and best[order[0]] - best[order[1]] > math.log(ODDS_TO_NAME)
        if not sure:
            return "sampler_dishonest", None, best
        return order[0], self.singles.singled_out().bias if order[0] == BIAS else self._value(order[0]), best

    def _value(self, name: str) -> float | None:
        """The transform's parameter: where the likelihood is highest, between grid points where it is smooth."""
        chosen = [(value, float(self.wealth[place])) for place, (own, value) in enumerate(HYPOTHESES) if own == name]
        best = max(range(len(chosen)), key=lambda place: chosen[place][1])
        if name == "top_k" and RANKS[max(best - 1, 0)] <= self.highest_rank < RANKS[min(best + 1, len(RANKS) - 1)]:
            return float(self.highest_rank + 1)
        if name == "temperature_mismatch" and 0 < best < len(TEMPERATURES) - 1:
            return round(_vertex(chosen[best - 1 : best + 2]), 3)
        return chosen[best][0]

    def _alarm(self, policy: object, disagreement: float, disagrees: bool) -> Alarm:
        name, value, best = self.diagnosis()
        evidence = self.log_evidence()
        if name == "sampler_dishonest" and disagrees and evidence < -math.log(FALSE_ALARMS) and self.agreed:
            name = "stale_sampler"
        told = [f"{self.tokens} tokens give odds of e^{evidence:.1f} against an honest sampler"] if self.looks else []
        if disagrees:
            told.append(f"the log-probabilities that tokens were drawn with are off the policy's by {disagreement:.3g}")
        told.append(f"surprisal minus entropy has z = {self.z():+.1f}")
        shown = dict[str, object]()
        if name == BIAS:
            single = self.singles.singled_out()
            text = _text_of(policy, single.token)
            shown = {"token": single.token, "text": text, "drawn": single.seen, "expected": single.expected}
            told.append(single.told(text))
        elif value is not None:
            told.append(_parameter(name, value, self.temperature))
        return Alarm(name, "; ".join(told), shown | {
            "log_evidence": evidence, "z": self.z(), "value": value, "tokens": self.tokens, "rms": disagreement,
            "pit": self.histogram.tolist(), "log_odds": {family: round(ratio, 2) for family, ratio in best.items()},
        })  # fmt: skip

    def _pit(self, facts: Facts, step: int) -> Float[Tensor, "bins"]:
        """Counts of u in equal bins; the U are of a stream of their own."""
        spread = torch.from_numpy(stream(self.seed, "pit", step).random(len(facts.above))).to(facts.above.device)
        u = facts.above.double() + spread * facts.logprobs.double().exp()
        places = (u * PIT_BINS).long().clamp(0, PIT_BINS - 1)
        return torch.bincount(places.cpu(), minlength=PIT_BINS).double()

    def _rows(self, policy: Distributions, rollout: Rollout) -> Int[Tensor, "rows"]:
        """The rows to look at: all, or of a large vocabulary a few in turn; chosen before a token of them is seen."""
        size = len(rollout)
        row = max(1, int(rollout.sequences.response_lengths.max())) * policy.vocab
        full = self._looks_in_full()
        count = min(size, max(1, (ELEMENTS_AT_START if full else ELEMENTS_LATER) // row))
        return (torch.arange(count) + self.looks * count) % size


def facts_of_rollout(policy: Distributions, rollout: Rollout, temperature: float, rows: Int[Tensor, "rows"]) -> Facts:
    """The facts of these rows' tokens, a few rows at a time; of several processes each looks at its share of those."""
    ranks, parts = here(), list[Facts]()
    width = max(1, int(rollout.sequences.response_lengths[rows].max()))
    at_once = max(1, ELEMENTS_AT_ONCE // (width * policy.vocab))
    for index in torch.split(rows, at_once * ranks.count):
        is_shared = len(index) >= ranks.count
        mine = index[ranks.share(len(index))] if is_shared else index
        sequences = rollout.sequences.rows(mine)
        drawn = _drawn(sequences, rollout.ref_logprobs[mine])
        logits = _kept(policy, rollout, index) if ranks.count == 1 else None
        logits = policy.logits_of(sequences) if logits is None else logits
        found = facts_of(logits, drawn, temperature, policy.stops)
        if ranks.count > 1:
            found = found.to("cpu")  # a process says nothing of another one's GPU
        parts += ranks.said(found) if is_shared else [found]
    return Facts.join(parts)


def _kept(policy: Distributions, rollout: Rollout, rows: Int[Tensor, "rows"]) -> Float[Tensor, "tokens vocab"] | None:
    return policy.logits_kept(rollout.sequences, rows) if isinstance(policy, Remembers) else None


def _text_of(policy: object, token: int) -> str:
    only = torch.tensor([[token]])
    return policy.decode(only, torch.ones_like(only, dtype=torch.bool))[0] if isinstance(policy, Speaks) else ""


def _drawn(sequences: Sequences, ref_logprobs: Float[Tensor, "batch response"]) -> Drawn:
    mask = sequences.response_mask
    row, place = mask.nonzero(as_tuple=True)
    places = sequences.prompt_lengths[row] + place
    columns = torch.arange(sequences.ids.shape[1], device=mask.device)
    before = columns < places[:, None]
    return Drawn(
        tokens=sequences.responses[mask],
        place=place,
        seen=sequences.ids[row],
        known=before & _first_of_its_kind(sequences.ids)[row],
        repeats=repeats(sequences.ids)[row, places],
        ref_logprobs=ref_logprobs[:, : mask.shape[1]][mask],
    )


def _first_of_its_kind(ids: Int[Tensor, "batch total"]) -> Bool[Tensor, "batch total"]:
    """True where an id stands for the first time in its row."""
    same = ids[:, :, None] == ids[:, None, :]
    return ~same.tril(diagonal=-1).any(dim=2)


def _rms(rollout: Rollout) -> float:
    """Between the log-probabilities of sampler and policy, over tokens; 0 where the sampler kept none."""
    mask = rollout.response_mask
    if not bool(rollout.sampler_logprobs[mask].any()):
        return 0.0
    return float((rollout.sampler_logprobs - rollout.logprobs)[mask].double().pow(2).mean().sqrt())


def _dirichlet_gain(before: Float[Tensor, "bins"], counts: Float[Tensor, "bins"], weight: float) -> Float[Tensor, ""]:
    """log of what the histogram so far, with `weight` uniform pseudo-counts, gives to the new counts, over uniform."""
    prior = before + weight / PIT_BINS
    total, new = prior.sum(), counts.sum()
    gain = torch.lgamma(total) - torch.lgamma(total + new)
    return gain + (torch.lgamma(prior + counts) - torch.lgamma(prior)).sum() + new * math.log(PIT_BINS)


def _vertex(points: list[tuple[float, float]]) -> float:
    """Where the parabola through three points of (log τ, log-likelihood) is highest, as τ."""
    (a, b, c), heights = (math.log(value) for value, _ in points), [height for _, height in points]
    curve = np.polyfit([a, b, c], heights, 2)
    return math.exp(min(max(-curve[1] / (2 * curve[0]), a), c)) if curve[0] < 0 else math.exp(b)


def _parameter(name: str, value: float, temperature: float) -> str:
    return {
        "temperature_mismatch": f"it draws at about {value:.2f} of the policy's temperature, {value * temperature:.2f}",
        "top_k": f"it keeps about {value:.0f} tokens",
        "top_p": f"it keeps a nucleus of about {value:g}",
        "min_p": f"it keeps tokens above about {value:g} of the likeliest",
        "min_length": f"it bans the EOS on the first {value:.0f} tokens or so",
        "no_repeat_ngram": f"it says no {value:.0f} tokens in a row twice",
        "repetition_penalty": f"its penalty on seen tokens is about {value:g}",
        "off_by_one": f"the distributions stand {abs(value):.0f} place {'on' if value > 0 else 'back'}",
        "stale_sampler": "the tokens fit the reference's weights better than the policy's",
    }[name]
