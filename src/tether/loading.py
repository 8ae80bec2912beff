"""Hugging Face models and tokenizers as the policy needs them: checked, in a chosen precision, on a chosen device.

A model that is given as an object is copied and stays as it was. What is checked is behaviour more than names: later
tokens must not change earlier states, and the head must be the linear map that `heads.py` takes it for. Every fault is
one ModelError that says what was got, what was wanted and what to do. Read next: `models.py`.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tether.attention import GROUPED
from tether.errors import InputError, ModelError
from tether.heads import OutputHead
from tether.trunk import agree, run_backbone

Source: TypeAlias = str | Path | PreTrainedModel
Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]

SMALL = 10_000_000  # parameters; below, dispatch costs more than arithmetic and bf16 gains nothing
PROBE_LENGTH = 6
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative round-off of one pass, its steps in the same order


def load_causal_lm(source: Source, precision: Precision, device: torch.device) -> PreTrainedModel:
    """A causal LM of one's own, in eval mode, all weights frozen, in the precision asked for.

    Raises ModelError where the source cannot be read or is no causal LM.
    """
    if isinstance(source, PreTrainedModel):
        _check_config(source.config)
        model = copy.deepcopy(source)
        dtype = choose_dtype(precision, model.num_parameters(), device)
    else:
        config = _read(AutoConfig, source)
        dtype = choose_dtype(precision, int(weightless(config).num_parameters()), device)
        model = _read(AutoModelForCausalLM, source, dtype=dtype)
    model = freeze(model, dtype, device)
    with forward_faults_told(model):
        choose_attention(model)
        check_causal_lm(model)
    return model


@contextmanager
def forward_faults_told(model: PreTrainedModel) -> Iterator[None]:
    """A forward pass over a few valid tokens that fails in the model's own code is the model's fault: a ModelError.

    What runs out of memory stays what it is.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as fault:
        if isinstance(fault, torch.OutOfMemoryError) or "memory" in str(fault):
            raise
        first = next(iter(str(fault).strip().split("\n")), "")
        raise ModelError(
            f"{type(model).__name__} cannot read a row of {PROBE_LENGTH} tokens: {type(fault).__name__}: {first}; "
            "wanted a decoder whose config fits its code: does it generate in transformers alone?"
        ) from fault


def freeze(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same module in eval mode without gradients; weights are cast, buffers (rotary frequencies) are not."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    model.base_model.warn_if_padding_and_no_attention_mask = _no_mask_is_needed
    return model.to(device).eval()


def _no_mask_is_needed(*_: object) -> None:
    """In place of transformers' warning: rows are padded on the right, where causal attention never looks."""


def choose_dtype(precision: Precision, parameters: int, device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products gain by it: on CUDA, and on CPUs with AVX512-BF16 or AMX; not for tiny models."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise ModelError(f"dtype is {precision!r}; wanted 'auto', 'float32' or 'bfloat16'")
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if parameters < SMALL:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


@torch.no_grad()
def choose_attention(model: PreTrainedModel) -> None:
    """On a CPU, plain matrix products in place of fused attention, whose backward pass is the slow part there.

    The grouped form is kept only where the model's states come out the same under it.
    """
    if model.device.type != "cpu":
        return
    ids, tolerance = probe(model), AGREEMENT[next(model.parameters()).dtype]
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    if not model._supports_attention_backend:
        return  # the form is written into the layers
    own = run_backbone(model.base_model, ids)
    model.set_attn_implementation(GROUPED)
    try:
        same = agree(run_backbone(model.base_model, ids), own, tolerance)
    except ModelError:
        same = False
    if not same:
        model.set_attn_implementation("eager")


def load_tokenizer(
    source: Source, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the source's own.

    Tokens that were added beyond the model's embeddings may stay unused, as a pad token or Gemma 3's mark of an image
    do; `require_embedded` refuses texts that hold one. Raises ModelError where there is no tokenizer, or where its own
    vocabulary or its EOS goes beyond the embeddings.
    """
    if tokenizer is None:
        if isinstance(source, PreTrainedModel):
            raise ModelError("the model was given as an object without a tokenizer; pass tokenizer=")
        tokenizer = _read(AutoTokenizer, source)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows or tokenizer.eos_token_id in lacking(tokenizer, model):
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings; wanted a tokenizer that "
            "belongs to the model (after adding tokens, call model.resize_token_embeddings and save both)"
        )
    return tokenizer


def lacking(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[int, str]:
    """Added tokens that the model has no embedding for, by id."""
    rows = model.get_input_embeddings().weight.shape[0]
    return {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if number >= rows}


def require_embedded(texts: Iterable[Sequence[int]], unknown: Mapping[int, str], what: str) -> None:
    """Raise InputError, naming the first, where a text in token ids holds one of these `lacking` tokens."""
    if not unknown:
        return
    for row, ids in enumerate(texts):
        if strange := unknown.keys() & set(ids):
            raise InputError(
                f"{what} {row} holds {unknown[min(strange)]!r}, a token that was added to the tokenizer and that the "
                "model has no embedding for; call model.resize_token_embeddings(len(tokenizer)), train it, and save "
                "both, or leave it out"
            )


def check_causal_lm(model: PreTrainedModel) -> None:
    """Raise ModelError unless the model is causal and its logits are its head's linear map of its final states."""
    head, tolerance = OutputHead.of(model), AGREEMENT[next(model.parameters()).dtype]
    ids = probe(model)
    with torch.no_grad():
        hidden = run_backbone(model.base_model, ids)
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % head.linear.out_features
        if not agree(hidden[:, :-1], run_backbone(model.base_model, other)[:, :-1], tolerance):
            raise ModelError(
                f"{type(model).__name__} is no causal LM: a later token changes the states of earlier ones; "
                "wanted a decoder (for BERT-like models that would be is_decoder=True)"
            )
        if not agree(head.logits(hidden[0]), model(input_ids=ids, use_cache=False).logits[0], tolerance):
            raise ModelError(
                f"{type(model).__name__} transforms its logits in a way that tether does not know; "
                "wanted scale·(W h + b), with a soft cap or without"
            )


def probe(model: PreTrainedModel) -> Tensor:
    """A short row of valid tokens, [1, 6]."""
    rows = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(PROBE_LENGTH, device=model.device) * 7 + 1).unsqueeze(0) % int(rows)


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a row may have; None where the architecture sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def read_config(source: Source) -> PreTrainedConfig:
    """The configuration of a model that may not be loaded yet. Raises ModelError where the source cannot be read."""
    return source.config if isinstance(source, PreTrainedModel) else _read(AutoConfig, source)


def layer_count(source: Source) -> int:
    """Decoder layers of a model that may not be loaded yet. Raises ModelError where it is no causal LM."""
    config = read_config(source)
    _check_config(config)
    return int(config.get_text_config().num_hidden_layers)


def parameter_count(source: Source) -> int:
    """Weights of a causal LM, from its configuration alone. Raises ModelError where the source is none."""
    return int(weightless(read_config(source)).num_parameters())


def weightless(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM of this configuration that takes no memory. Raises ModelError where it is another kind of model."""
    _check_config(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's EOS and those that the model's generation config lists."""
    listed = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    several = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    stops = {tokenizer.eos_token_id, *several} - {None}
    if not stops:
        raise ModelError(
            "neither the tokenizer nor the generation config names an EOS token; wanted one that ends a "
            "response: set tokenizer.eos_token"
        )
    return tuple(sorted(stops))


def load_backbone(source: Source, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, Tensor | None]:
    """A backbone of its own for a value model, and the score's weight [1, dim] where the source is a reward model."""
    if isinstance(source, PreTrainedModel):
        weight = getattr(getattr(source, "score", None), "weight", None)
        backbone = freeze(copy.deepcopy(source.base_model), dtype, device)
        choose_attention(backbone)
        return backbone, None if weight is None else weight.detach().float()
    if any("ForSequenceClassification" in name for name in _architectures(_read(AutoConfig, source))):
        from transformers import AutoModelForSequenceClassification

        return load_backbone(_read(AutoModelForSequenceClassification, source, dtype=dtype), dtype, device)
    return load_backbone(_read(AutoModel, source, dtype=dtype), dtype, device)


def _read(kind: type, source: str | Path, **options: object) -> Any:
    """kind.from_pretrained, with the library's many kinds of failure as one."""
    require_there(source)
    try:
        return kind.from_pretrained(str(source), **options)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, ImportError) as fault:
        first = str(fault).strip().split("\n")[0]
        raise ModelError(
            f"{kind.__name__} cannot read {str(source)!r}: {first} Wanted a folder written by save_pretrained or the "
            "name of a model on the hub"
        ) from fault


def require_there(source: str | Path) -> None:
    """Raise ModelError at once where the source is no folder here, not in the hub's cache, and the hub has no address:
    its library would try for minutes.
    """
    name = str(source)
    if Path(name).is_dir():
        return
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path, or no name that the hub could have
        cached, reason = False, "is no folder"
    else:
        reason = "is no folder here, and the hub cannot be reached"
    if not cached and (reason == "is no folder" or not _hub_has_an_address()):
        raise ModelError(
            f"{name!r} {reason}; wanted a folder written by save_pretrained or the name of a model on the hub"
        )


def _hub_has_an_address() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _check_config(config: PreTrainedConfig) -> None:
    """Raise ModelError where the config is of another kind of model."""
    names = _architectures(config)
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.is_encoder_decoder or wanted is None:
        raise ModelError(f"{names[0] if names else type(config).__name__} is no causal LM; wanted a decoder-only model")
    classes = wanted if isinstance(wanted, tuple) else (wanted,)
    expected = [kind.__name__ for kind in classes]
    if names and not set(names) & set(expected):
        raise ModelError(f"the checkpoint holds a {names[0]}, which is no causal LM; wanted a {' or '.join(expected)}")


def _architectures(config: PreTrainedConfig) -> list[str]:
    return list(config.architectures or [])
