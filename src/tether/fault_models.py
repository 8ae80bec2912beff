# ruff: noqa: ARG001, ARG005  (stand-ins keep the signature of what they stand in for)
"""Faults of models and samplers: see `faults.py`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tether.batch
import tether.decode
import tether.models
import tether.task
from tether.batch import Generation, Prompts, Sequences
from tether.decode import Sampler
from tether.loading import load_causal_lm
from tether.models import LanguagePolicy
from tether.modes import LoraMode
from tether.packing import PackedLinears

Plant = Callable[[ExitStack], None]
"""Plants a fault until the stack is closed."""
Original = Callable[..., Any]
NOISE = 0.05
"""Of perturbed weights, relative to their spread."""


def replace_attribute(stack: ExitStack, owner: object, name: str, wrap: Callable[[Original], Any]) -> None:
    """Put something else in the place of a function until the stack is closed."""
    kept = vars(owner)[name]
    original = kept.__func__ if isinstance(kept, staticmethod) else kept
    wrapped = wrap(original)
    setattr(owner, name, staticmethod(wrapped) if isinstance(kept, staticmethod) else wrapped)
    stack.callback(setattr, owner, name, kept)


def perturb(weights: Iterable[Tensor]) -> None:
    """Add noise of NOISE times each weight's own spread, always the same."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            noise = torch.randn(weight.shape, generator=draw).to(weight)
            weight.add_(NOISE * noise * (weight.float().std(correction=0).to(weight)))


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────────────
def _loaded(change: Callable[[Original, Any, dict[str, Any]], LanguagePolicy]) -> Plant:
    """Another way to load the policy: (load_policy, source, its other arguments) → policy."""

    def plant(stack: ExitStack) -> None:
        def wrap(original: Original) -> Original:
            return lambda source, *rest, **named: change(lambda *a, **k: original(*a, *rest, **k), source, named)

        replace_attribute(stack, tether.task, "load_policy", wrap)

    return plant


def _wrong_reference(load: Original, source: Any, named: dict[str, Any]) -> LanguagePolicy:
    """The base model that lies beside the SFT checkpoint, or the checkpoint with other weights."""
    base = Path(str(source)).parent / "base"
    if isinstance(source, str | Path) and base.is_dir():
        return load(source, **(named | {"reference": base}))  # type: ignore[no-any-return]
    other = load_causal_lm(source, "auto", torch.device("cpu"))
    perturb(other.parameters())
    return load(source, **(named | {"reference": other}))  # type: ignore[no-any-return]


def _reference_moves(load: Original, source: Any, named: dict[str, Any]) -> LanguagePolicy:
    """One layer of the reference is the policy's own; in mode `lora`, the adapters stay on for the reference."""
    policy: LanguagePolicy = load(source, **named)
    mode: Any = policy.mode
    if isinstance(mode, LoraMode):
        mode.adapters.disable_adapter = contextlib.nullcontext
        return policy
    if hasattr(mode, "_split"):
        frozen, trained = mode._split.originals[0], mode._split.trained[0]
    else:
        frozen, trained = _layer(mode._reference), _layer(mode.model)
    for mine, its in zip(frozen.parameters(), trained.parameters(), strict=True):
        mine.data = its.data
    return policy


def _layer(model: Any) -> Any:
    """The first list of equal layers, its last one."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return lists[0][-1]


# ── the value head ──────────────────────────────────────────────────────────────────────────────────────────────────
def _value_too_big(load: Original, source: Any, named: dict[str, Any]) -> LanguagePolicy:
    policy: LanguagePolicy = load(source, **named)
    draw = torch.Generator().manual_seed(0)
    weight = policy.value.head.linear.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=draw))
    return policy


# ── the sampler ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _drawn_from(transform: Callable[[Tensor, _Place], Tensor]) -> Plant:
    """The sampler draws from other logits than the policy's, and records the policy's log-probabilities."""

    def plant(stack: ExitStack) -> None:
        place = _Place()
        replace_attribute(stack, Sampler, "_write", place.wrap_write)
        replace_attribute(stack, tether.decode._Draft, "__init__", place.wrap_draft)

        def wrap(original: Original) -> Original:
            def wrong(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
                tokens, _ = original(transform(logits, place), uniforms, temperature)
                place.step += 1
                return tokens, torch.log_softmax(logits / temperature, dim=-1).gather(1, tokens[:, None])[:, 0]

            return wrong

        replace_attribute(stack, tether.decode, "draw", wrap)

    return plant


class _Place:
    """Where the sampler is: which responses are written, after which prompts, and how far."""

    def __init__(self) -> None:
        self.step = 0
        self.stops: tuple[int, ...] = ()
        self.favourite: int | None = None

    def wrap_write(self, original: Original) -> Original:
        def write(sampler: Sampler, ids: Tensor, prompt_mask: Tensor, *rest: Any) -> Any:
            self.step, self.stops = 0, sampler.stops
            self.prompts = torch.where(prompt_mask, ids, ids[:, -1:])
            return original(sampler, ids, prompt_mask, *rest)

        return write

    def wrap_draft(self, original: Original) -> Original:
        def init(draft: Any, *rest: Any) -> None:
            original(draft, *rest)
            self.draft = draft

        return init

    def seen(self) -> Tensor:
        """Every id that a row has read or written, [rows, total]."""
        rows = self.draft.rows
        said = self.draft.responses[rows, : self.step]
        return torch.cat([self.prompts[rows], said], dim=1)


def _top_k(logits: Tensor, place: _Place, k: int = 20) -> Tensor:
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def _top_p(logits: Tensor, place: _Place, p: float = 0.95) -> Tensor:
    chances, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    kept = (chances.cumsum(dim=-1) - chances) < p
    return logits.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -torch.inf)


def _min_p(logits: Tensor, place: _Place, share: float = 0.1) -> Tensor:
    chances = torch.softmax(logits, dim=-1)
    return logits.masked_fill(chances < share * chances.amax(dim=-1, keepdim=True), -torch.inf)


def _min_length(logits: Tensor, place: _Place, least: int = 12) -> Tensor:
    if place.step >= least:
        return logits
    return logits.index_fill(1, torch.tensor(place.stops), -torch.inf)


def _repetition_penalty(logits: Tensor, place: _Place, penalty: float = 1.3) -> Tensor:
    seen = place.seen()
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def _no_repeat_ngram(logits: Tensor, place: _Place) -> Tensor:
    seen = place.seen()
    followed = seen[:, :-1] == seen[:, -1:]
    banned = torch.zeros_like(logits).scatter_add_(1, seen[:, 1:], followed.to(logits.dtype)) > 0
    return logits.masked_fill(banned, -torch.inf)


def _token_biased(logits: Tensor, place: _Place, bias: float = 1.0) -> Tensor:
    """Of the token that is likeliest at the start of the first responses, from then on."""
    if place.favourite is None:
        chances = torch.softmax(logits, dim=-1).mean(dim=0)
        place.favourite = int(chances.index_fill(0, torch.tensor(place.stops), 0.0).argmax())
    return logits.index_add(1, torch.tensor([place.favourite]), logits.new_full((len(logits), 1), bias))


def _stale_sampler(stack: ExitStack) -> None:
    """The sampler keeps copies of the weights that it was first asked with."""
    old: dict[int, Sampler] = {}

    def wrap(original: Original) -> Original:
        def sample(sampler: Sampler, *rest: Any) -> Any:
            if id(sampler) not in old:
                twin = copy.copy(sampler)
                twin.backbone, linear = copy.deepcopy((sampler.backbone, sampler.head.linear))
                twin.head, twin.recorder = replace(sampler.head, linear=linear), None
                twin._packed = PackedLinears(twin.backbone, linear)
                old[id(sampler)] = twin
            return original(old[id(sampler)], *rest)

        return sample

    replace_attribute(stack, Sampler, "sample", wrap)


# ── the passes ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _off_by_one(stack: ExitStack) -> None:
    def gather(sequences: Sequences, hidden: Tensor) -> Tensor:
        places = sequences.response_positions + torch.arange(len(sequences))[:, None] * hidden.shape[1]
        return hidden.flatten(0, 1).index_select(0, places[sequences.response_mask])

    replace_attribute(stack, tether.models, "gather", lambda original: gather)


def _dropout_on(stack: ExitStack) -> None:
    def wrap(original: Original) -> Original:
        def hidden(policy: LanguagePolicy, sequences: Sequences, run: Original) -> Tensor:
            states: Tensor = original(policy, sequences, run)
            return F.dropout(states, 0.1) if run == policy.mode.states else states

        return hidden

    replace_attribute(stack, LanguagePolicy, "_response_hidden", wrap)


def _padding_leak(stack: ExitStack) -> None:
    """Rows are padded on the left, to a width that depends on the batch, and read without mask or positions."""

    def wrap(original: Original) -> Original:
        def hidden(policy: LanguagePolicy, sequences: Sequences, run: Original) -> Tensor:
            pads = sequences.ids.shape[1] % 7 + 1
            ids = F.pad(sequences.ids, (pads, 0), value=int(sequences.ids[0, 0]))
            moved = replace(sequences, ids=ids, prompt_lengths=sequences.prompt_lengths + pads, states=None)
            states: Tensor = original(policy, moved, run)
            return states

        return hidden

    replace_attribute(stack, LanguagePolicy, "_response_hidden", wrap)


# ── the mask ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _no_eos_credit(stack: ExitStack) -> None:
    def wrap(original: Original) -> Original:
        def generate(policy: LanguagePolicy, *rest: Any) -> Generation:
            made: Generation = original(policy, *rest)
            last = torch.arange(made.response_mask.shape[1]) == made.response_mask.sum(dim=1, keepdim=True) - 1
            ends = last & made.finished[:, None] & (made.response_mask.sum(dim=1, keepdim=True) > 1)
            return replace(made, response_mask=made.response_mask & ~ends)

        return generate

    replace_attribute(stack, LanguagePolicy, "generate", wrap)


def _prompt_in_mask(stack: ExitStack) -> None:
    """The last prompt token is taken for the response's first."""

    def wrap(original: Original) -> Original:
        def generate(policy: LanguagePolicy, prompts: Prompts, *rest: Any) -> Generation:
            made: Generation = original(policy, prompts, *rest)
            return replace(
                made,
                responses=torch.cat([prompts.ids[:, -1:], made.responses], dim=1),
                response_mask=F.pad(made.response_mask, (1, 0), value=True),
                sampler_logprobs=F.pad(made.sampler_logprobs, (1, 0)),
            )

        return generate

    def wrap_join(original: Original) -> Original:
        def join(prompts: Prompts, generation: Generation, pad: int) -> Sequences:
            shorter = replace(prompts, ids=prompts.ids[:, :-1], mask=prompts.mask[:, :-1])
            cut = bool((generation.responses[:, 0] == prompts.ids[:, -1]).all())  # not the sampler's own bookkeeping
            sequences: Sequences = original(shorter if cut else prompts, generation, pad)
            return sequences

        return join

    replace_attribute(stack, LanguagePolicy, "generate", wrap)
    replace_attribute(stack, tether.batch.Sequences, "join", wrap_join)


PLANTS: dict[str, Plant] = {
    "wrong_reference": _loaded(_wrong_reference),
    "reference_moves": _loaded(_reference_moves),
    "value_too_big": _loaded(_value_too_big),
    "temperature_mismatch": _drawn_from(lambda logits, place: logits / 0.7),
    "top_k": _drawn_from(_top_k),
    "top_p": _drawn_from(_top_p),
    "min_p": _drawn_from(_min_p),
    "min_length": _drawn_from(_min_length),
    "repetition_penalty": _drawn_from(_repetition_penalty),
    "no_repeat_ngram": _drawn_from(_no_repeat_ngram),
    "token_biased": _drawn_from(_token_biased),
    "stale_sampler": _stale_sampler,
    "off_by_one": _off_by_one,
    "dropout_on": _dropout_on,
    "padding_leak": _padding_leak,
    "no_eos_credit": _no_eos_credit,
    "prompt_in_mask": _prompt_in_mask,
}
