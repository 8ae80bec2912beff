"""A policy whose passes are shared by several processes: each computes its rows, all hold the whole.

    generate · prepare · evaluate · evaluate_reference      rows of a batch, shared; the results gathered
    evaluate with gradients                                 the rows that the update gave to this process, alone

Every process holds log-probabilities and values of all rows, a few numbers a token, and so goes through the rooms with
the whole batch: whitening, reward moments, β's controller and the checks see what one process would see. What a row
costs, passes of the models, is paid once. Knows no room. Read next: `runtime/ranks.py`, `update.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tether.batch import Closing, Evaluation, Generation, Prompts, ReferenceEvaluation, Sequences
from tether.errors import RunError
from tether.models import LanguagePolicy
from tether.probes import fingerprint
from tether.runtime.ranks import Ranks
from tether.runtime.sharding import gathered, shard
from tether.snapshot import Snapshot


class RankedPolicy(LanguagePolicy):
    """One process's copy of a policy that several train."""

    def __init__(self, policy: LanguagePolicy, ranks: Ranks, sharded: bool = False) -> None:
        """`sharded`: the processes hold the layers' weights in shares."""
        self._pieces = shard(policy.mode.layers(), ranks) if sharded else []
        self._reference_pieces = shard(policy.mode.reference_layers(), ranks) if sharded else []
        super().__init__(policy.mode, policy.value, policy.tokenizer)
        self.ranks = ranks
        self._shared: tuple[weakref.ref[Sequences], Sequences] | None = None

    def generate(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """As `LanguagePolicy`, whose sampler gives a row the same response whatever else stands in its batch."""
        rows = len(prompts)
        if self.writer is not None:
            return self.ranks.ask_first(lambda: LanguagePolicy.generate(self, prompts, uniforms, temperature))
        with gathered(self._pieces):
            if not self._is_shared(rows):
                return super().generate(prompts, uniforms, temperature)
            mine = self.ranks.share(rows)
            written = super().generate(prompts.rows(mine), uniforms[mine], temperature)
        wide = uniforms.shape[1]
        return Generation(
            self.ranks.whole(_widened(written.responses, wide), rows),
            self.ranks.whole(_widened(written.response_mask, wide), rows),
            self.ranks.whole(_widened(written.sampler_logprobs, wide), rows),
            self.ranks.whole(written.finished, rows),
            written.origin,
        )

    def prepare(self, sequences: Sequences) -> Sequences:
        """As `LanguagePolicy`; every process then holds the trunk's states of all rows."""
        rows = len(sequences)
        with gathered(self._pieces):
            if not self._is_shared(rows):
                return super().prepare(sequences)
            prepared = super().prepare(self._share_of(sequences))
        self._shared = None  # the sequences below are others
        if prepared.states is None:
            return sequences
        wide = sequences.ids.shape[1]
        padded = F.pad(prepared.states, (0, 0, 0, wide - prepared.states.shape[1]))
        closing = prepared.closing
        if closing is not None:
            closing = Closing(closing.token, self.ranks.whole(closing.states, rows))
        return sequences.with_states(self.ranks.whole(padded, rows), closing)

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        """Without gradients all rows, shared; with gradients these rows are this process's own."""
        rows = len(sequences)
        if torch.is_grad_enabled():
            return super().evaluate(sequences, temperature)
        with gathered(self._pieces):
            if not self._is_shared(rows):
                return super().evaluate(sequences, temperature)
            said = super().evaluate(self._share_of(sequences), temperature)
        wide = sequences.response_mask.shape[1]
        return Evaluation(
            self._gathered(said.logprobs, rows, wide),
            self._gathered(said.values, rows, wide),
            self._gathered(said.entropy, rows, wide),
            None if said.kl_values is None else self._gathered(said.kl_values, rows, wide),
        )

    @torch.no_grad()
    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        """As `LanguagePolicy`; workers are asked by the first process, about all rows."""
        rows = len(sequences)
        if self.referee is not None:
            return self.ranks.ask_first(lambda: LanguagePolicy.evaluate_reference(self, sequences, temperature))
        share = self._share_of(sequences) if self._is_shared(rows) else sequences
        with gathered([*self._reference_pieces, *self._policy_pieces_for(share)]):
            said = super().evaluate_reference(share, temperature)
        if share is sequences:
            return said
        wide = sequences.response_mask.shape[1]
        return ReferenceEvaluation(*(self._gathered(numbers, rows, wide) for numbers in (said.logprobs, said.full_kl)))

    def _policy_pieces_for(self, sequences: Sequences) -> list[FSDPModule]:
        """The policy's layers, where the reference's pass runs through them: its own states are not remembered, or the
        two have layers in common.
        """
        alone = self._reference_pieces and (self.mode.trunk_end is None or sequences.states is not None)
        return [] if alone and self._last.knows(sequences, self._trained) else self._pieces

    @torch.no_grad()
    def logits_of(self, sequences: Sequences) -> Float[Tensor, "tokens vocab"]:
        """As `LanguagePolicy`; every process looks at all of the few rows."""
        with gathered(self._pieces):
            return super().logits_of(sequences)

    def _is_shared(self, rows: int) -> bool:
        """Fewer rows than processes are everybody's: a share must not be empty."""
        return self.ranks.count > 1 and rows >= self.ranks.count

    def _share_of(self, sequences: Sequences) -> Sequences:
        """This process's rows; the same object for the same sequences, by which states are remembered."""
        known = self._shared
        if known is not None and known[0]() is sequences:
            return known[1]
        mine = self.ranks.share(len(sequences))
        share = sequences.rows(torch.arange(len(sequences))[mine])
        self._shared = weakref.ref(sequences), share
        return share

    def _gathered(self, numbers: Tensor, rows: int, wide: int) -> Tensor:
        return self.ranks.whole(_widened(numbers, wide), rows)


def shared(policy: LanguagePolicy, ranks: Ranks, sharded: bool = False) -> LanguagePolicy:
    """The policy as one of several processes has it; itself where there is only one."""
    return policy if ranks.count == 1 else RankedPolicy(policy, ranks, sharded)


def shared_snapshot(read: Callable[[], Snapshot], ranks: Ranks) -> Snapshot:
    """The snapshot that the first process reads, on all: the others need not see its disk."""
    if ranks.count == 1:
        return read()
    kept: list[Snapshot] = []

    def described() -> tuple[Snapshot, list[dict[str, Tensor]]]:
        kept.append(read())
        parts = [kept[0].weights, kept[0].optimiser]
        empty = [{name: tensor.to("meta") for name, tensor in part.items()} for part in parts]
        return replace(kept[0], weights={}, optimiser={}), empty

    rest, parts = ranks.ask_first(described)
    own = [kept[0].weights, kept[0].optimiser] if kept else [_like(part) for part in parts]
    for part in own:
        ranks.spread([tensor.contiguous() for tensor in part.values()] if kept else list(part.values()))
    return replace(rest, weights=own[0], optimiser=own[1])


def _like(described: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in described.items()}


def require_one_course(policy: LanguagePolicy, ranks: Ranks) -> None:
    """Raise RunError where the processes no longer hold the same weights, bit by bit."""
    if ranks.count > 1:
        own = fingerprint(policy)
        if ranks.any(ranks.same(own) != own):
            raise RunError(
                f"the {ranks.count} processes no longer hold the same weights; wanted equal machines, libraries and "
                "threads for all. The last checkpoint is whole: resume from it"
            )


def _widened(numbers: Tensor, wide: int) -> Tensor:
    """[rows, width] → [rows, wide], 0 on the right."""
    missing = wide - numbers.shape[1]
    return numbers if missing == 0 else F.pad(numbers, (0, missing))
