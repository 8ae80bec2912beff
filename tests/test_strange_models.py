"""Models whose own code fails, or that cannot be cut in two: one ModelError, and no noise of a library."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from tether.errors import ModelError
from tether.models import load_policy
from tiny_models import build_tokenizer

SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_model_whose_config_does_not_fit_its_code_is_refused_with_its_words() -> None:
    experts = Qwen3MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=8, moe_intermediate_size=8, head_dim=8)
    with pytest.raises(ModelError, match=r"Qwen3MoeForCausalLM cannot read a row of 6 tokens: RuntimeError: The size"):
        load_policy(Qwen3MoeForCausalLM(experts), build_tokenizer())


def test_a_model_without_attention_cannot_be_cut_in_two_and_the_error_says_which_modes_can() -> None:
    model = RwkvForCausalLM(RwkvConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16))
    with pytest.raises(ModelError, match=r"RwkvModel do not run on the states .* mode='full' or mode='lora'"):
        load_policy(model, build_tokenizer(), mode="top", top_layers=1)


class Heard(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_rows_without_a_mask_are_no_news() -> None:
    """Token 1 opens every probe: as pad token it would make transformers ask for a mask that nobody needs."""
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, pad_token_id=1, bos_token_id=2, eos_token_id=2)
    model: PreTrainedModel = GPT2LMHeadModel(config)
    heard, log = Heard(), logging.getLogger("transformers.modeling_utils")
    log.addHandler(heard)
    try:
        policy = load_policy(model, build_tokenizer(), mode="full")
        with torch.no_grad():
            policy.mode.model(input_ids=torch.tensor([[1, 5, 6, 1]]))
    finally:
        log.removeHandler(heard)
    assert not [said for said in heard.said if "attention_mask" in said]


def test_adapters_on_a_mixture_of_experts_raise_no_warning_of_the_library() -> None:
    experts = Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = load_policy(Qwen3MoeForCausalLM(experts), build_tokenizer(), mode="lora")
    assert policy.trainable()["policy"]
