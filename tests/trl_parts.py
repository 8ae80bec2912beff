"""A tiny model with a value head, its tokenizer and a trainer of two responses, for the tests of `tether.trl`."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from compat.cases import Case, build, fill
from compat.side import tokenizer
from tether.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

QUERIES = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 5, 6, 7])]
RESPONSES = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([8, 9, 10, 11, 12, 13])]
SCORES = [torch.tensor(1.0), torch.tensor(0.0)]


def wrapped(architecture: str = "gpt2", seed: int = 0, **options: Any) -> Any:
    """A model with a value head, its weights drawn by seed."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(build(Case("", model=architecture), seed), **options)
    fill(model.v_head, seed + 1)
    return model


def lora(**options: Any) -> Any:
    """The same with LoRA adapters that are not zero."""
    from peft import LoraConfig

    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = wrapped("llama", peft_config=settings, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    return model


def made(
    model: Any = None, ref_model: Any = None, side: str = "right", extras: dict | None = None, **knobs: Any
) -> Any:
    """A trainer; `extras` go to PPOTrainer, all else to PPOConfig."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no dataset")
        config = PPOConfig(**{"batch_size": 2, "mini_batch_size": 1, "learning_rate": 1e-3} | knobs)
        return PPOTrainer(config, model or wrapped(), ref_model, tokenizer(side), **(extras or {}))


def step(trainer: Any, **changed: Any) -> dict[str, Any]:
    """One update on the two responses."""
    given = {"queries": QUERIES, "responses": RESPONSES, "scores": SCORES} | changed
    stats: dict[str, Any] = trainer.step(**given)
    return stats


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    """Names of the weights that are not what they were."""
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
