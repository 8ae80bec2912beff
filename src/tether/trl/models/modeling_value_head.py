"""A causal LM with a value head: logits, loss and V(s_t) from one pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tether.errors import InputError, ModelError
from tether.trl.models.modeling_base import PreTrainedModelWrapper

DROPOUT = 0.1
"""TRL's default before the value head; off whenever the trainer computes."""


class ValueHead(nn.Module):
    """V = w·dropout(h) + b, in the precision of w."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__()
        rate = getattr(config, "summary_dropout_prob", None)
        rate = kwargs.get("summary_dropout_prob", DROPOUT) if rate is None else rate
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()
        self.summary = nn.Linear(_width(config), 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, tokens, dim] → [batch, tokens, 1]."""
        values: Tensor = self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))
        return values


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """Any Hugging Face causal LM with a value head on its final hidden states."""

    v_head: ValueHead
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_layer"]
    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy",
    )  # fmt: skip

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        """`v_head_init_strategy="normal"` draws w from N(0, `v_head_initializer_range`²) with b = 0.

        Raises ValueError where the model has no language-model head.
        """
        super().__init__(pretrained_model, **kwargs)
        if pretrained_model.get_output_embeddings() is None:
            raise InputError(f"{type(pretrained_model).__name__} has no language-model head; wanted a causal LM")
        self.v_head = ValueHead(self.config, **kwargs)
        if kwargs.get("v_head_init_strategy") == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=kwargs.get("v_head_initializer_range", 0.2))
            nn.init.zeros_(self.v_head.summary.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(logits float32 [batch, tokens, vocab], the library's loss or None, values [batch, tokens]).

        With `return_past_key_values` the cache comes as a fourth; otherwise none is kept.
        """
        kwargs |= {"output_hidden_states": True, "past_key_values": past_key_values, "return_dict": True}
        if not return_past_key_values and past_key_values is None:
            kwargs.setdefault("use_cache", False)
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = output.hidden_states[-1].to(next(self.v_head.parameters()).device)
        values = self.v_head(hidden).squeeze(-1)
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        if return_past_key_values:
            return logits, output.loss, values, output.past_key_values
        return logits, output.loss, values


class NoSeq2SeqError(ModelError, NotImplementedError):
    """An encoder-decoder model was asked for."""


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """Not here: every way to make one raises NoSeq2SeqError. The name is, so that scripts which import both run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise NoSeq2SeqError(
            "tether trains causal (decoder-only) language models; encoder-decoder (seq2seq) models, as T5, are out of "
            "its scope. Use AutoModelForCausalLMWithValueHead, or TRL 0.11.4 with transformers 4.45 for seq2seq PPO"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModelWrapper:
        return cls(*args, **kwargs)


def _width(config: Any) -> int:
    """Of the final hidden states; OPT's smaller models project them."""
    text = config.get_text_config()
    projected = getattr(text, "word_embed_proj_dim", None)
    return int(projected or text.hidden_size)
