"""Tokens that were added to a tokenizer and not to its model: harmless until a text holds one."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from test_reward_model import classifier
from tether.data import read_demonstrations
from tether.errors import InputError, ModelError
from tether.finetune import finetune
from tether.models import load_policy
from tether.prompts import PromptSource, encode
from tether.reward_model import RewardModel
from tiny_models import EOS, VOCAB, build, build_tokenizer, prompts_of

UNKNOWN = r"{} 0 holds '<image>', a token that was added to the tokenizer and that the model has no embedding for"


def uniform(rows: int, width: int) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(0))


def with_token(token: str = "<image>") -> PreTrainedTokenizerFast:
    """As Gemma 3's tokenizer, which has one token more than its text models."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    assert len(tokenizer) == VOCAB + 1
    return tokenizer


def test_a_token_that_no_text_holds_changes_nothing() -> None:
    prompts, draws = prompts_of([7, 8, 9], [11]), uniform(2, 5)
    ours = load_policy(build("llama"), with_token(), mode="full").generate(prompts, draws, 1.0)
    theirs = load_policy(build("llama"), build_tokenizer(), mode="full").generate(prompts, draws, 1.0)
    assert torch.equal(ours.responses, theirs.responses)


def test_a_prompt_that_holds_one_is_named_before_the_model_reads_it() -> None:
    tokenizer = with_token()
    policy = load_policy(build("llama"), tokenizer, mode="full")
    ids = encode(["w5 <image>", "w6"], tokenizer)
    with pytest.raises(InputError, match=UNKNOWN.format("prompt")):
        policy.require_embedded(ids)
    batch = PromptSource(("w5 <image>",), ids[:1], 1, pad=policy.pad).batch(0)
    with pytest.raises(InputError, match=UNKNOWN.format("prompt")):
        policy.generate(batch, uniform(1, 2), 1.0)


def test_so_are_demonstrations_and_what_a_reward_model_reads() -> None:
    rows = [{"prompt": "w5 <image>", "completion": "w6"}, {"prompt": "w5", "completion": "w6"}]
    with pytest.raises(InputError, match=UNKNOWN.format("demonstration")):
        finetune(build("llama"), read_demonstrations(rows), tokenizer=with_token())
    with pytest.raises(InputError, match=UNKNOWN.format("prompt and response")):
        RewardModel.load(classifier("llama"), with_token())(["w5 <image>"], ["w7"])


def test_a_pad_token_without_embedding_is_never_read() -> None:
    """`tokenizer.add_special_tokens({"pad_token": "[PAD]"})`, as many recipes have it, and no resizing."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = load_policy(build("llama"), tokenizer, mode="full")
    assert tokenizer.pad_token_id == VOCAB
    assert policy.pad == EOS


def test_without_pad_and_eos_padding_takes_a_token_of_the_generation_config() -> None:
    model, tokenizer = build("llama"), build_tokenizer()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = [9, 7]
    policy = load_policy(model, tokenizer, mode="full")
    assert (policy.pad, policy.stops) == (7, {7, 9})
    generation = policy.generate(prompts_of([5], [6, 8]), uniform(2, 4), 1.0)
    assert generation.responses.shape[0] == 2


def test_a_vocabulary_or_an_eos_beyond_the_embeddings_is_refused() -> None:
    with pytest.raises(ModelError, match=f"tokenizer has {VOCAB + 1} tokens and the model {VOCAB} embeddings"):
        load_policy(build("llama"), build_tokenizer(VOCAB + 1), mode="full")
    tokenizer = with_token()
    tokenizer.eos_token = "<image>"
    with pytest.raises(ModelError, match=r"call model\.resize_token_embeddings"):
        load_policy(build("llama"), tokenizer, mode="full")
