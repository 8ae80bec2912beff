"""Small causal LMs of several architectures with random weights, and a tokenizer of whole words for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tether.batch import Generation, Prompts, Sequences

VOCAB = 97
LAYERS = 3
CONTEXT = 64
EOS = 2

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": EOS,
    "initializer_range": 0.3,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED, tie_word_embeddings=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_SIZES, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
    # Beyond the four: alternating windows with capped logits, a bias in the head, learned positions with an offset, and
    # distances in place of positions.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=3.0, pad_token_id=0)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**(_SIZES | {"n_head": 4}), hidden_dropout=0.0)),
}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "neox")
MORE_ARCHITECTURES = ("gemma2", "phi", "opt", "bloom")


def build(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model with weights of spread 0.3, so that its distributions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BUILDERS[architecture]().eval()


def build_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words w0 … ; word 2 is the EOS; there is no pad token."""
    vocab = {"</s>" if i == EOS else f"w{i}": i for i in range(size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


def prompts_of(*rows: list[int], padding: int = 0) -> Prompts:
    """Left-padded prompts, with more padding where asked for."""
    width = max(map(len, rows)) + padding
    ids = torch.tensor([[5] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Prompts(ids, mask, tuple(f"prompt {i}" for i in range(len(rows))), tuple(range(len(rows))))


def ragged_sequences(seed: int = 0) -> Sequences:
    """Five rows with prompts of 1–6 tokens and responses of 1–7."""
    draw = torch.Generator().manual_seed(seed)
    prompts = prompts_of([7, 8, 9], [11], [3, 4, 5, 6, 7, 8], [7, 8, 9], [50, 60])
    lengths = torch.tensor([7, 3, 5, 1, 6])
    responses = torch.randint(3, VOCAB, (5, 7), generator=draw)
    mask = torch.arange(7) < lengths[:, None]
    return Sequences.join(prompts, Generation(responses, mask, torch.zeros(5, 7), torch.ones(5).bool()), pad=0)


def row_logits(model: nn.Module, sequences: Sequences, row: int) -> Tensor:
    """The logits that predict a row's response, [response, vocab]: the library's own forward pass on that row alone."""
    start, length = int(sequences.prompt_lengths[row]), int(sequences.lengths[row])
    logits: Tensor = model(input_ids=sequences.ids[row : row + 1, :length], use_cache=False).logits
    return logits[0, start - 1 : length - 1]
