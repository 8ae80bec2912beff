"""What is looked at beside `step`, and said in plain words: what makes KL negative, and what a script got wrong.

A warning names the failure as `docs/failures/` has it, what was seen, and what to do. Nothing of the run is changed.
KL is an expectation under the policy, so it is never negative for its own samples: where it is, the responses are not
samples of the policy. The cause is looked for in this order: options that `generate` was given, the prompt inside the
responses, tokens after their EOS, and last what the tokens themselves say (`tether.honesty`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.alarms import Alarm
from tether.batch import Generation, Prompts, Rollout, Sequences
from tether.checks import Tolerance
from tether.honesty import Honesty, facts_of_rollout
from tether.trl.trainer.generation import pad_left, pad_token

NEGATIVE_KL = -1.0
"""Nats per response: below, it is no noise. TRL's threshold."""
LOOKED_AT = 8
"""Rows whose full distributions are looked at for a cause."""
SURE_PROMPT = 4
"""Tokens that must coincide before responses are said to begin with their queries."""
PURE = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "do_sample": True,
}  # fmt: skip
"""Options of `generate` under which responses are samples of the policy."""


class TrainingWarning(UserWarning):
    """Something beside `step` that is wrong with the run."""


@dataclass
class Watch:
    """The checks of one trainer. Each thing is said once."""

    tokenizer: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `generate` was given last."""
    said: set[str] = field(default_factory=set)

    def start(self, model: nn.Module, ref_model: nn.Module | None, beta: float) -> None:
        """Look at a new trainer: the string must hold on to something, and pull the right way."""
        if ref_model is not None and _storages(model, trained=True) & _storages(ref_model):
            self.say(Alarm("reference_moves", "the reference's weights are the policy's own, which train: load a "
                           "second model, or pass ref_model=None for a frozen copy"))  # fmt: skip
        if beta < 0:
            self.say(Alarm("kl_sign", f"init_kl_coef is {beta:g}: a negative β pays for drifting"))

    def look(self, model: nn.Module, queries: Sequence[Tensor], responses: Sequence[Tensor], kl: float,
             ref_logprobs: Tensor, masks: Tensor) -> None:  # fmt: skip
        """Look at a batch before the policy moves. `kl`: mean Σ log π − log π_ref, nats per response."""
        repeated = begins_with_query(queries, responses)
        if repeated:
            self.say(Alarm("prompt_in_mask", repeated))
        if kl < NEGATIVE_KL:
            seen = f"KL is {kl:.2f} nats per response"
            cause = repeated or self.impure() or self._after_the_end(responses)
            cause = cause or _measured(model, self.tokenizer, queries, responses, ref_logprobs, masks)
            self.say(Alarm("negative_kl", f"{seen}, and {cause}"), once=False)

    def impure(self) -> str:
        """What `generate` was told that makes responses other than samples of the policy; empty where nothing."""
        strange = [f"{name}={self.options[name]}" for name, pure in PURE.items()
                   if self.options.get(name) is not None and self.options[name] != pure]  # fmt: skip
        strange += [f"{name}={self.options[name]}" for name in ("min_length", "min_new_tokens")
                    if (self.options.get(name) or 0) > 0]  # fmt: skip
        if self.options and "do_sample" not in self.options:
            strange.append("do_sample unset, which may mean greedy decoding")
        if not strange:
            return ""
        return (
            f"generate was told {', '.join(strange)}: PPO's ratios are of another policy than the one that spoke; use "
            "do_sample=True, top_k=0, top_p=1.0, min_length=-1, temperature=1"
        )

    def _after_the_end(self, responses: Sequence[Tensor]) -> str:
        end = self.tokenizer.eos_token_id
        rows = [row for row, response in enumerate(responses) if end is not None and bool((response[:-1] == end).any())]
        if not rows:
            return ""
        return (
            f"{len(rows)} of {len(responses)} responses go on after an EOS: that is padding or another text, which the "
            "policy never said; cut each response after its first EOS, as generate does"
        )

    def say(self, alarm: Alarm, once: bool = True) -> None:
        """Warn of a failure: its title, what was seen, what to do."""
        if once and alarm.reason in self.said:
            return
        self.said.add(alarm.reason)
        warnings.warn(f"{alarm.failure.title}: {alarm.seen}. {alarm.remedy}", TrainingWarning, stacklevel=4)


def begins_with_query(queries: Sequence[Tensor], responses: Sequence[Tensor]) -> str:
    """What to say where every response begins with its query, as `generate` gives them by default; else empty."""
    pairs = list(zip(queries, responses, strict=True))
    same = all(len(r) > len(q) and torch.equal(r[: len(q)], q.to(r.device)) for q, r in pairs)
    if not same or sum(len(query) for query in queries) < SURE_PROMPT:
        return ""
    return "every response begins with its query, so the prompt is trained as if the policy had said it: pass " \
           "return_prompt=False to generate"  # fmt: skip


# ── what the tokens say ─────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Distributions:
    """A wrapped model as `tether.honesty` asks for it."""

    model: Any
    vocab: int
    stops: frozenset[int]

    def logits_of(self, sequences: Sequences) -> Float[Tensor, "tokens vocab"]:
        logits = self.model(input_ids=sequences.ids, attention_mask=sequences.mask.long())[0]
        places = (sequences.response_positions - 1)[:, :, None].expand(-1, -1, logits.shape[2])
        kept: Tensor = logits.gather(1, places)[sequences.response_mask].float()
        return kept


@torch.no_grad()
def _measured(model: Any, tokenizer: Any, queries: Sequence[Tensor], responses: Sequence[Tensor],
              ref_logprobs: Tensor, masks: Tensor) -> str:  # fmt: skip
    """What the tokens of some rows say of how they were drawn."""
    rows = [row for row, response in enumerate(responses) if len(response)][:LOOKED_AT]
    unknown = (
        "no cause was found in how responses were drawn: is the reference the checkpoint that training starts from, "
        "and are these tokens the ones that generate gave, not decoded and encoded again?"
    )
    if not rows:
        return unknown
    asked, given = [queries[row] for row in rows], [responses[row] for row in rows]
    rollout = _rollout(asked, given, ref_logprobs[rows], masks[rows], pad_token(tokenizer))
    wrapped = getattr(model, "module", model)
    head = wrapped.pretrained_model.get_output_embeddings()
    stops = frozenset(token for token in (tokenizer.eos_token_id,) if token is not None)
    policy = _Distributions(model, int(head.weight.shape[0]), stops)
    wager = Honesty(seed=0, temperature=1.0, tolerance=Tolerance.of(torch.float32))
    wager.add(facts_of_rollout(policy, rollout, 1.0, torch.arange(len(rows))), 0)
    return next((alarm.seen for alarm in _named(wager)), unknown)


def _named(wager: Honesty) -> Iterator[Alarm]:
    """The transform that the tokens were drawn under, where one is far likelier than the next."""
    name, value, _ = wager.diagnosis()
    if value is not None:
        yield Alarm(name, f"the tokens were drawn otherwise than the policy says ({Alarm(name, '').failure.title})")


def _rollout(queries: Sequence[Tensor], responses: Sequence[Tensor], ref_logprobs: Tensor, masks: Tensor,
             pad: int) -> Rollout:  # fmt: skip
    ids, mask = pad_left(queries, pad)
    prompts = Prompts(ids, mask.bool(), ("",) * len(ids), tuple(range(len(ids))))
    lengths = torch.tensor([len(response) for response in responses], device=ids.device)
    padded = torch.nn.utils.rnn.pad_sequence(list(responses), True, pad)
    real = torch.arange(padded.shape[1], device=ids.device) < lengths[:, None]
    zeros = torch.zeros(real.shape, device=ids.device)
    sequences = Sequences.join(prompts, Generation(padded, real, zeros, torch.ones_like(lengths).bool()), pad)
    said = zeros.clone()
    for row, response in enumerate(responses):
        told = ref_logprobs[row][masks[row].bool()]
        said[row, : len(told)] = told[: len(response)]
    return Rollout(
        prompts, sequences, ("",) * len(ids), zeros, zeros, said, zeros, zeros, zeros, torch.ones_like(lengths).bool()
    )


def _storages(model: nn.Module, trained: bool = False) -> set[int]:
    """The memory of the base model's weights; with `trained` of those that train."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad or not trained]
    return {weight.untyped_storage().data_ptr() for weight in weights if weight.numel()}
