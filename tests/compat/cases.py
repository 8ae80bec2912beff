"""What both sides are fed: configurations, tiny models and batches, the same in every library and version.

Weights, queries, responses, scores and masks are drawn by numpy's legacy generator, whose stream never changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

VOCAB, EOS, STEPS = 23, 0, 5
FIVE_STEPS = ("seed_0", "gpt2", "peft")
"""Cases whose goldens hold all five steps; the others hold two."""
QUERY, RESPONSE = (2, 6), (1, 8)
"""Lengths are drawn from these ranges, the upper end left out."""


@dataclass(frozen=True)
class Case:
    """One run of five steps, on both sides."""

    name: str
    config: dict = field(default_factory=dict)
    seed: int = 0
    model: str = "llama"
    optimizer: str = "adam"
    lr: float = 1e-3
    ragged: bool = True
    masks: bool = False
    padding_side: str = "right"
    peft: bool = False
    shared_layers: int | None = None
    schedule: bool = False
    distinct_reference: bool = False
    steps: int = STEPS
    mended: str = ""
    """The mended fault by which the original differs from here on; the two are run and not compared."""
    noise: tuple[str, ...] = ()
    """Weights whose gradient is 0 but for round-off, which Adam scales to full steps."""


BATCH = 8
KEY_BIAS = ("c_attn.bias",)

CASES: tuple[Case, ...] = (
    *(Case(f"seed_{seed}", seed=seed) for seed in (0, 1, 2)),
    Case("gpt2", model="gpt2", optimizer="sgd", lr=0.05),
    Case("gpt2_adam", model="gpt2", noise=KEY_BIAS),
    Case("one_length", ragged=False),
    Case("left_padded_rotary", padding_side="left"),
    *(
        Case(f"penalty_{kind}", {"kl_penalty": kind}, seed=3, distinct_reference=True)
        for kind in ("kl", "abs", "mse", "full")
    ),
    Case("whitened", {"whiten_rewards": True}, seed=4),
    Case("whitened_one_length", {"whiten_rewards": True}, seed=4, ragged=False),
    Case("whitened_full", {"whiten_rewards": True, "kl_penalty": "full"}, seed=5, distinct_reference=True),
    Case("masks", masks=True, seed=6),
    Case("masks_whitened", {"whiten_rewards": True}, masks=True, seed=7),
    *(Case(f"minibatch_{size}", {"mini_batch_size": size}, seed=8) for size in (1, 2, 8)),
    Case("accumulated", {"mini_batch_size": 2, "gradient_accumulation_steps": 2}, seed=9, ragged=False),
    Case("peft", peft=True, seed=10),
    Case("peft_masks_whitened", {"whiten_rewards": True}, peft=True, masks=True, seed=11),
    Case("peft_full", {"kl_penalty": "full", "mini_batch_size": 2}, peft=True, seed=12, lr=2e-4),
    Case("fixed_beta", {"adap_kl_ctrl": False, "init_kl_coef": 0.05}, seed=13, distinct_reference=True),
    Case("target", {"target": 0.5, "horizon": 100}, seed=13, distinct_reference=True),
    Case("discounted", {"gamma": 0.9, "lam": 0.7, "vf_coef": 1.0}, seed=14),
    Case("narrow_clips", {"cliprange": 0.02, "cliprange_value": 0.02}, seed=15, lr=5e-3),
    Case("score_clip", {"score_clip": 0.5}, seed=16),
    Case("early_stop", {"early_stopping": True, "target_kl": 1e-4}, seed=17, lr=5e-3),
    Case("shared_layers", model="gpt2", shared_layers=1, optimizer="sgd", lr=0.05, seed=18),
    Case("scheduled", optimizer="sgd", lr=0.01, schedule=True, seed=19),
    Case(
        "clipped_once",
        {"max_grad_norm": 0.1, "ppo_epochs": 1, "mini_batch_size": 8},
        optimizer="sgd",
        steps=1,
        seed=20,
    ),
)
"""Compared number by number. Steps are small enough that five updates do not amplify round-off."""

MENDED: tuple[Case, ...] = (
    Case("clipped_always", {"max_grad_norm": 0.1}, optimizer="sgd", lr=0.05, seed=20,
         mended="max_grad_norm clipped on the first call only"),
    Case("score_scaling", {"use_score_scaling": True}, seed=21, mended="use_score_scaling crashed"),
    Case("ratio_threshold", {"ratio_threshold": 1.0001}, seed=22, lr=5e-3,
         mended="a minibatch over ratio_threshold was stepped on stale momentum"),
    Case("accumulated_ragged", {"mini_batch_size": 2, "gradient_accumulation_steps": 2}, seed=9,
         mended="accumulation weighted each minibatch alike, whatever its number of tokens"),
    Case("left_padded_learned", model="gpt2", optimizer="sgd", lr=0.05, padding_side="left",
         mended="rows padded on the left were read at wrong positions"),
    Case("empty_response", seed=23, mended="an empty response crashed"),
)  # fmt: skip
"""Run on both sides, to show that they differ and why."""


@dataclass(frozen=True)
class Fed:
    """What one call of `step` gets."""

    queries: list[torch.Tensor]
    responses: list[torch.Tensor]
    scores: list[torch.Tensor]
    masks: list[torch.Tensor] | None


def batches(case: Case) -> list[Fed]:
    """The batches of a case's steps."""
    draw = np.random.RandomState(100 + case.seed)
    return [_batch(case, draw) for _ in range(case.steps)]


def _batch(case: Case, draw: np.random.RandomState) -> Fed:
    lengths = [(draw.randint(*QUERY), draw.randint(*RESPONSE)) for _ in range(BATCH)]
    if not case.ragged:
        lengths = [(4, 6)] * BATCH
    if case.name == "empty_response":
        lengths[2] = (lengths[2][0], 0)
    rows = [[torch.tensor(draw.randint(1, VOCAB, size=length)) for length in pair] for pair in lengths]
    masks = [torch.tensor(draw.randint(0, 2, size=response)) for _, response in lengths]
    for mask in masks:
        mask[:1] = 1
    scores = [torch.tensor(score) for score in draw.randn(BATCH).astype(np.float32)]
    return Fed([q for q, _ in rows], [r for _, r in rows], scores, masks if case.masks else None)


def build(case: Case, seed: int) -> torch.nn.Module:
    """A tiny causal LM with weights from numpy."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ids = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "attn_implementation": "eager"}
    if case.model == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**ids, n_embd=8, n_layer=2, n_head=2, n_positions=32))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**ids, **sizes, max_position_embeddings=32))
    fill(model, seed)
    return model


def fill(module: torch.nn.Module, seed: int) -> None:
    """Draw every weight anew, in the order of names: norms around 1, all else of spread 0.3."""
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            drawn = 0.3 * draw.randn(*weight.shape).astype(np.float32)
            is_norm = "norm" in name or "ln_" in name
            weight.copy_(torch.tensor(drawn) + (1.0 if is_norm and name.endswith("weight") else 0.0))
