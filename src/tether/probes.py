"""What models must keep to, whatever is trained: fixed rows, fixed texts and fixed weights, looked at again and again.

    ReferenceProbe   the reference says the same of the same rows, its weights stay, nothing trained is its memory
    PassProbe        two passes over the same rows agree, with any amount of padding, and with the rollout
    RewardProbe      the reward gives the same texts the same scores, and the update's texts the update's scores

A policy of another kind than `LanguagePolicy` is known by what it says alone. Draws nothing at random, keeps no
gradient and changes no weight. Read next: `watch.py`, which says when each is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.alarms import Alarm
from tether.batch import JudgesRollouts, Policy, Reward, Rollout, Scores, ScoresRollouts, Sequences
from tether.checks import Tolerance
from tether.models import LanguagePolicy, shares_storage
from tether.runtime.ranks import here
from tether.runtime.sharding import is_sharded, local

PROBE_ROWS, PROBE_TOKENS = 2, 16
"""Of the reference's probe: short, so that it can be asked in every update."""
APART = 10.0
"""Times the difference that padding makes, from which one to the rollout has another cause."""
MOST_PADS, FEW_PADS = 31, 7
"""Columns of padding that rows are asked with; with the fewer only where the more made a difference."""
SUMMED_AT_ONCE = 2**21
"""Weights read anew in one update: a few milliseconds."""
SAME_SCORE = 1e-4
"""Relative: two scores of one text in the same batch."""
SAME_PATH = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.3}
"""In the score's unit: one text scored in two batches of another shape."""


class ReferenceProbe:
    """The anchor: fixed rows under the reference, and every weight that it is computed from."""

    def __init__(self, policy: Policy, rollout: Rollout, temperature: float, tolerance: Tolerance) -> None:
        self._policy, self._temperature, self._tolerance = policy, temperature, tolerance
        self._rows = _short_rows(rollout.sequences)
        self._said = self._ask()
        self._weights = reference_weights(policy)
        self._sums = [_sum(weight) for weight in self._weights]
        self._versions = [_version(weight) for weight in self._weights]
        self._next = 0

    def check(self, ask: bool = True) -> Iterator[Alarm]:
        """Reads some of the weights again, the next ones at each call; with `ask`, has the same rows said again."""
        moved = float((self._ask() - self._said).abs().max()) if ask else 0.0
        changed = self._changed()
        if moved > 0.1 * self._tolerance.start or changed:
            seen = f"log π_ref of fixed rows has changed by up to {moved:.3g} nats a token"
            if changed:
                seen += f", and {len(changed)} of its weights have been written to"
            yield Alarm("reference_moves", seen, {"largest_change": moved, "weights": changed[:8]})

    def _ask(self) -> Tensor:
        return self._policy.evaluate_reference(self._rows, self._temperature).logprobs.double()

    def _changed(self) -> list[str]:
        """Weights whose sum of bits has changed: those written to since the last call, and the next few in turn."""
        weights = reference_weights(self._policy)
        if len(weights) != len(self._weights):
            return [f"all of them: there are {len(weights)} now and were {len(self._weights)}"]
        self._weights = weights  # where a module took another's place, its weights are looked at
        now = [_version(weight) for weight in weights]
        suspects = {place for place, version in enumerate(now) if version != self._versions[place]}
        self._versions = now
        suspects |= set(self._turn())
        bad = [place for place in sorted(suspects) if _sum(self._weights[place]) != self._sums[place]]
        return [f"{place} {list(self._weights[place].shape)}" for place in bad]

    def _turn(self) -> Iterator[int]:
        read = 0
        for _ in self._weights:
            if read >= SUMMED_AT_ONCE:
                return
            place, self._next = self._next, (self._next + 1) % len(self._weights)
            read += self._weights[place].numel()
            yield place


def reference_weights(policy: Policy) -> list[Tensor]:
    """Every weight that the reference is computed from, its output head among them; none where the policy does not
    tell.
    """
    if not isinstance(policy, LanguagePolicy):
        return []
    weights, head = list(policy.mode.reference()), policy.mode.reference_head.linear.weight
    return weights if any(weight is head for weight in weights) else [*weights, head]


def differing_weights(policy: Policy) -> str:
    """In which weights policy and reference differ, for a message; empty where they are not of one form."""
    if not isinstance(policy, LanguagePolicy):
        return ""
    mine, theirs = dict(policy.mode.model.named_parameters()), list(policy.mode.reference())
    if [weight.shape for weight in mine.values()] != [weight.shape for weight in theirs]:
        return ""
    pairs = list(zip(mine.items(), theirs, strict=True))
    kinds = {(own.dtype, other.dtype) for (_, own), other in pairs if own.dtype != other.dtype}
    if kinds:
        own, other = (str(dtype).removeprefix("torch.") for dtype in kinds.pop())
        return f"the reference's weights are {other} and the policy's {own}"
    names = [name for (name, own), other in pairs if not torch.equal(local(own), local(other))]
    named = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"{len(names)} of {len(pairs)} weights differ ({named})" if names else "their weights are equal"


def fingerprint(policy: Policy) -> list[int]:
    """A sum of the bits of what trains, group by group; of weights held in pieces, over all of them."""
    return [sum(_sums(group)) for group in policy.trainable().values()]


def _sums(weights: Sequence[Tensor]) -> list[int]:
    """Each weight's sum of bits."""
    own = torch.tensor([_sum(weight) for weight in weights], dtype=torch.int64)
    pieces = torch.tensor([is_sharded(weight) for weight in weights])
    if bool(pieces.any()):
        own[pieces] = here().sum(own[pieces])
    sums: list[int] = own.tolist()
    return sums


def check_storage(policy: Policy, optimised: Sequence[Tensor]) -> Iterator[Alarm]:
    """Neither a trainable weight nor one that the optimiser holds shares memory with the reference."""
    if isinstance(policy, LanguagePolicy) and shares_storage(policy):
        yield Alarm("reference_moves", "a trained weight and a weight of the reference are the same memory", {})
        return
    anchored = _storages(reference_weights(policy))
    held = [tensor for tensor in optimised if _storages([tensor]) & anchored]
    if held:
        yield Alarm(
            "reference_moves",
            f"the optimiser holds {len(held)} weights that the reference is computed from",
            {"weights": [list(tensor.shape) for tensor in held[:8]]},
        )


class PassProbe:
    """The shortest responses of a rollout, evaluated again: twice as they are, and with more padding."""

    def __init__(self, policy: Policy, rollout: Rollout, temperature: float, tolerance: Tolerance) -> None:
        self._policy, self._temperature, self._tolerance = policy, temperature, tolerance
        self._index = rollout.sequences.lengths.argsort()[:PROBE_ROWS]
        self._rows = replace(rollout.sequences.rows(self._index), states=None)
        width = self._rows.response_mask.shape[1]
        self._rollout = rollout.logprobs[self._index, :width]
        self._rollout_reference = rollout.ref_logprobs[self._index, :width]

    @torch.no_grad()
    def check(self) -> Iterator[Alarm]:
        """Dropout first: where two equal passes differ, nothing can be said of padding."""
        once, again, padded = self._ask(0), self._ask(0), {MOST_PADS: self._ask(MOST_PADS)}
        for who, rollout in (("π", self._rollout), ("π_ref", self._rollout_reference)):
            repeated = _rms(once[who] - again[who], self._rows)
            if repeated > 0.1 * self._tolerance.logprob:
                yield Alarm("dropout_on", f"two passes over the same rows differ by {repeated:.3g} nats in log {who}",
                            {"who": who, "rms": repeated})  # fmt: skip
                continue
            distances = {pads: _rms(once[who] - said[who], self._rows) for pads, said in padded.items()}
            distances[0] = _rms(once[who] - rollout, self._rows)
            worst = max(distances, key=lambda pads: distances[pads])
            if who == "π_ref" and distances[0] > max(self._tolerance.logprob, APART * distances[MOST_PADS]):
                yield Alarm(
                    "wrong_reference",
                    f"the rollout's log π_ref is {distances[0]:.3g} nats a token from what the reference says of the "
                    "same responses: it is another model's, or of other rows",
                    {"rms": distances[0]},
                )
            elif distances[worst] > self._tolerance.logprob:
                distances[FEW_PADS] = _rms(once[who] - self._ask(FEW_PADS)[who], self._rows)
                what = f"with {worst} more columns of padding" if worst else "outside of their batch"
                yield Alarm(
                    "padding_leak",
                    f"log {who} of the same responses differs by {distances[worst]:.3g} nats a token {what}",
                    {"who": who} | {f"rms_{pads}_pads": distance for pads, distance in distances.items()},
                )

    def _ask(self, pads: int) -> dict[str, Tensor]:
        """log π and log π_ref of the rows with this much padding, on one pass of the trunk that they share."""
        rows = self._policy.prepare(_padded(self._rows, pads))
        said = self._policy.evaluate(rows, self._temperature).logprobs
        return {"π": said, "π_ref": self._policy.evaluate_reference(rows, self._temperature).logprobs}


class RewardProbe:
    """A reward model asked again. A user's own function is never called for a check: a call may cost or count.

    A sum or an ensemble may hold such a function, and token rewards cannot be asked by texts, so neither is probed.
    """

    def __init__(self, reward: Reward, rollout: Rollout) -> None:
        asked = isinstance(reward, ScoresRollouts) and not isinstance(reward, JudgesRollouts)
        self._reward = reward if asked else None
        self._prompts, self._texts = rollout.prompts.texts[:PROBE_ROWS], rollout.texts[:PROBE_ROWS]
        self._columns = {name: values[:PROBE_ROWS] for name, values in rollout.prompts.columns.items()}
        self._scores = self._ask()

    def check_replies(self) -> Iterator[Alarm]:
        """Whether each prompt's reply matters: the fixed replies behind one another's prompts."""
        swapped = self._ask(self._texts[::-1])
        texts = [text.strip() for text in self._texts]
        told = [abs(a - b) > 1e-6 * (1.0 + abs(b)) for a, b in zip(swapped, self._scores, strict=True)]
        if swapped and texts != texts[::-1] and not any(told):
            yield Alarm("reward_reads_prompt_only",
                        f"other replies to the same prompts score the same, {_few(self._scores)}",
                        {"scores": self._scores})  # fmt: skip

    def check(self, rollout: Rollout, scores: Scores) -> Iterator[Alarm]:
        """The fixed texts, and the first of this update's."""
        now = self._ask()
        drift = max((abs(a - b) / (1.0 + abs(b)) for a, b in zip(now, self._scores, strict=True)), default=0.0)
        if drift > SAME_SCORE:
            yield Alarm("reward_drift", f"the same texts scored {_few(self._scores)} at the start and {_few(now)} now",
                        {"start": self._scores, "now": now})  # fmt: skip
        elif self._reward is not None:
            first = (rollout.prompts.texts[:PROBE_ROWS], rollout.texts[:PROBE_ROWS])
            fresh = now if first == (self._prompts, self._texts) else RewardProbe(self._reward, rollout)._scores
            yield from self._check_path(fresh, scores)

    def _check_path(self, fresh: list[float], scores: Scores) -> Iterator[Alarm]:
        given: list[float] = scores.scores[: len(fresh)].tolist()
        distance = max((abs(a - b) for a, b in zip(fresh, given, strict=True)), default=0.0)
        dtype = getattr(getattr(self._reward, "model", None), "dtype", torch.float32)
        if distance > SAME_PATH.get(dtype, 0.02):
            yield Alarm(
                "reward_skew",
                f"the update scored its first responses {_few(given)}; the reward says {_few(fresh)} of their texts",
                {"update": given, "asked_again": fresh},
            )

    def _ask(self, texts: Sequence[str] | None = None) -> list[float]:
        if self._reward is None:
            return []
        return [float(score) for score in self._reward(self._prompts, texts or self._texts, **self._columns)]


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _short_rows(sequences: Sequences) -> Sequences:
    """The first tokens of the longest rows, half of them as if they were a response."""
    index = sequences.lengths.argsort(descending=True)[:PROBE_ROWS]
    length = min(PROBE_TOKENS, int(sequences.lengths[index].min()))
    prompt = max(1, length // 2)
    lengths = torch.full((len(index),), prompt, device=sequences.ids.device)
    return Sequences(sequences.ids[index, :length].clone(), lengths, torch.full_like(lengths, length - prompt))


def _padded(rows: Sequences, pads: int) -> Sequences:
    """The same rows with more columns on the right, holding a token that means something."""
    return replace(rows, ids=torch.nn.functional.pad(rows.ids, (0, pads), value=int(rows.ids[0, 0])))


def _rms(difference: Float[Tensor, "batch response"], rows: Sequences) -> float:
    return float(difference[rows.response_mask].double().pow(2).mean().sqrt())


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum(weight: Tensor) -> int:
    """Σ of the weight's bits as integers: a write that changes a bit changes the sum, but for a permutation."""
    bits: Int[Tensor, "numbers"] = local(weight.detach()).contiguous().view(-1).view(_BITS[weight.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _version(weight: Tensor) -> tuple[int, int]:
    """Where the weight lies, and how often it was written to in place, as autograd counts; −1 where it does not."""
    return local(weight.detach()).data_ptr(), -1 if weight.is_inference() else weight._version


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {local(tensor.detach()).untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _few(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)
