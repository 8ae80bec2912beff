"""The policy, its value head and its frozen reference, on any Hugging Face causal LM, without the four-model tax.

    mode    trained                          reference                               memory of the roles
    full    all weights                      a frozen copy                           2 models
    lora    PEFT adapters                    the same weights, adapters off          1 model
    top     the top k layers + final norm    frozen originals on the same trunk      1 model + k layers

`load_policy` → `LanguagePolicy`, which is the rooms' `Policy`. The reference runs the same steps in the same precision
as the policy, so that before the first update their log-probabilities are equal to the last bit and K is exactly 0.
Dropout is off everywhere. In `top` the output head is frozen, tied to the embeddings or not. Results lie on the device
of the sequences given. Knows no loss and no optimiser. Read next: `modes.py`, `heads.py`, `decode.py`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.batch import Evaluation, Generation, Prompts, ReferenceEvaluation, Sequences
from tether.decode import Recorder, Sampler
from tether.errors import InputError, ModelError
from tether.heads import ValueHead, reference_logprobs, selected_logprobs
from tether.loading import (
    Precision,
    Source,
    context_length,
    load_backbone,
    load_causal_lm,
    load_tokenizer,
    stop_tokens,
)
from tether.modes import FullMode, LoraMode, Mode, OtherReference, TopMode
from tether.trunk import run_backbone

TOKENS_AT_ONCE = 8192  # padded positions of one forward pass without gradients
VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_FOLDER = "value_model"


def load_policy(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mode: Literal["full", "lora", "top"] = "top",
    top_layers: int = 6,
    lora_rank: int = 16,
    dtype: Precision = "auto",
    value: Literal["head", "model"] = "head",
    value_source: Source | None = None,
    reference: Source | None = None,
    peft_config: object | None = None,
    device: str | torch.device | None = None,
) -> LanguagePolicy:
    """A policy that starts at `source`, with its value head and its frozen reference.

    `source`: a folder, a name on the hub, or a model, which is copied and stays as it was.
    `dtype`: "auto" is bfloat16 where CPU or GPU gain by it, and float32 for models below ten million parameters.
    `value`: "head" is a linear layer on the policy's final states, at 0 or read from the folder `value_source`;
    "model" is a model of its own that starts at `value_source` (a causal LM, or a reward model with its score; by
    default the policy's source).
    `reference`: where π_ref is not `source` itself, at the cost of one more model in memory.
    `peft_config`: the adapters of mode `lora`; by default LoRA of `lora_rank` on all linear layers but the head.

    Raises ModelError where a source is no causal LM, has no tokenizer or does not fit.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_causal_lm(source, dtype, place)
    words = load_tokenizer(source, tokenizer, model)
    other = None if reference is None else _load_reference(reference, dtype, model, place)
    if mode not in ("full", "lora", "top"):
        raise ModelError(f"mode is {mode!r}; wanted 'full', 'lora' or 'top'")
    baseline = _value_function(value, value_source, source, model, place)
    return LanguagePolicy(_build_mode(mode, model, other, top_layers, lora_rank, peft_config), baseline, words)


class LanguagePolicy:
    """A causal LM that trains, its value function, and its frozen reference; the rooms' `Policy`."""

    def __init__(self, mode: Mode, value: ValueFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mode, self.value, self.tokenizer = mode, value, tokenizer
        self._context = context_length(mode.model)
        recorder = None if mode.trunk_end is None else Recorder(mode.trunk_end)
        self._sampler = Sampler(mode.model.base_model, mode.head, stop_tokens(mode.model, tokenizer), recorder)
        self._heard: _Heard | None = None
        self._trained = mode.trained()
        self._last = _Remembered()

    @property
    def device(self) -> torch.device:
        return torch.device(self.mode.model.device)

    @property
    def context(self) -> int:
        """Positions the model can read; very many where it sets no bound."""
        return self._context or 1_000_000

    @property
    def pad(self) -> int:
        """A valid token id to fill padding with; it carries no meaning, lengths come from masks."""
        known = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if known is None else known)

    def generate(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """Sample one response a prompt, token t of row b by the inverse CDF at `uniforms[b, t]`.

        A response ends by EOS, which belongs to it, or at the width of `uniforms`. The same uniforms give the same
        responses, whatever else stands in the batch. Raises InputError where a prompt is empty or leaves no room.
        """
        self._check_room(prompts.lengths, uniforms.shape[1])
        generation, states = self._sampler.sample(prompts, uniforms, temperature)
        self._heard = None if states is None else _Heard(Sequences.join(prompts, generation, self.pad), states)
        return generation

    def prepare(self, sequences: Sequences) -> Sequences:
        """Compute once what every later forward pass of this rollout shares (mode `top`: the trunk's states).

        For the responses that `generate` gave last, the states are those that the sampler went through.
        """
        self._check_still()
        heard, self._heard = self._heard, None
        known = None if heard is None else heard.states_of(sequences)
        return self.mode.prepare(sequences) if known is None else sequences.with_states(known)

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        """log-probabilities, values and entropies of the responses under the policy as it stands."""
        hidden = self._response_hidden(sequences, self.mode.states)
        if not hidden.requires_grad:
            self._last.keep(sequences, self._trained, hidden)
        tokens = sequences.responses[sequences.response_mask].to(hidden.device)
        logprobs, entropy = selected_logprobs(self.mode.head, hidden, tokens, temperature)
        values = self.value(sequences, hidden, self._response_hidden)
        return Evaluation(*(_lay_out(flat, sequences.response_mask) for flat in (logprobs, values, entropy)))

    @torch.no_grad()
    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        """The same responses under the frozen reference, and the full-vocabulary KL to it."""
        hidden = self._last.recall(sequences, self._trained)
        if hidden is None:
            hidden = self._response_hidden(sequences, self.mode.states)
        reference_hidden = self._response_hidden(sequences, self.mode.reference_states)
        tokens = sequences.responses[sequences.response_mask].to(hidden.device)
        logprobs, divergence = reference_logprobs(
            self.mode.head, self.mode.reference_head, hidden, reference_hidden, tokens, temperature
        )
        return ReferenceEvaluation(*(_lay_out(flat, sequences.response_mask) for flat in (logprobs, divergence)))

    def decode(self, responses: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> list[str]:
        """The responses as text, special tokens left out."""
        rows = [row[real].tolist() for row, real in zip(responses, mask, strict=True)]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Parameters by group: `policy` and `value`; no parameter stands in two groups."""
        return {"policy": self._trained, "value": list(self.value.parameters())}

    def save_pretrained(self, folder: str | Path, *, merged: bool = False) -> None:
        """Write the policy as it stands as an ordinary Hugging Face folder, tokenizer included.

        Mode `lora` writes its adapters, or with `merged=True` the whole model with the adapters folded in. The value
        function goes beside it: `value_head.safetensors`, and `value_model/` where it is a model of its own.
        """
        if isinstance(self.mode, LoraMode) and merged:
            copy.deepcopy(self.mode.adapters).merge_and_unload().save_pretrained(folder)
        elif isinstance(self.mode, LoraMode):
            self.mode.adapters.save_pretrained(folder)
        else:
            self.mode.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.value.save(Path(folder))

    def _response_hidden(self, sequences: Sequences, run: Callable[[Sequences], Tensor]) -> Float[Tensor, "tokens dim"]:
        """The states that predict the real response tokens, rows one after the other."""
        if torch.is_grad_enabled():
            return _gather(sequences, run(sequences))
        return torch.cat([_gather(part, run(part)) for part in _parts(sequences)])

    def _check_room(self, lengths: Int[Tensor, "batch"], width: int) -> None:
        if int(lengths.min()) < 1:
            raise InputError(f"prompt {int(lengths.argmin())} is empty; wanted at least one token (a BOS, say)")
        if self._context is not None and int(lengths.max()) + width > self._context:
            raise InputError(
                f"prompt {int(lengths.argmax())} has {int(lengths.max())} tokens and its response may take {width}; "
                f"the model's context holds {self._context}: shorten the prompt or lower max_new_tokens"
            )

    def _check_still(self) -> None:
        """Dropout would make π differ from itself."""
        if any(module.training for module in self.mode.model.modules()):
            raise ModelError("the policy is in training mode, which turns dropout on; call .eval() on its model")


def shares_storage(policy: LanguagePolicy) -> bool:
    """Whether a trainable weight and a weight of the reference are the same memory: then the string ties to nothing."""
    trained = [parameter for group in policy.trainable().values() for parameter in group]
    return bool(_storages(trained) & _storages(policy.mode.reference()))


class ValueFunction(nn.Module):
    """V(s_t): a linear head on the policy's final states, or on those of a backbone of its own."""

    def __init__(self, dim: int, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.head = ValueHead(dim)
        self.backbone = backbone

    def forward(
        self,
        sequences: Sequences,
        hidden: Float[Tensor, "tokens dim"],
        gather: Callable[[Sequences, Callable[[Sequences], Tensor]], Tensor],
    ) -> Float[Tensor, "tokens"]:
        """One value a response token; `hidden` are the policy's states, `gather` takes those of another backbone."""
        backbone = self.backbone
        if backbone is not None:
            hidden = gather(sequences, lambda part: run_backbone(backbone, part.ids.to(hidden.device)))
        values: Tensor = self.head(hidden)
        return values

    def save(self, folder: Path) -> None:
        weights = {name: tensor.contiguous() for name, tensor in self.head.linear.state_dict().items()}
        save_file(weights, folder / VALUE_HEAD_FILE)
        if self.backbone is not None:
            self.backbone.save_pretrained(folder / VALUE_MODEL_FOLDER)


@dataclass(frozen=True)
class _Heard:
    """The states of a frozen trunk that the sampler went through, and the tokens they belong to."""

    sequences: Sequences
    states: Float[Tensor, "batch room dim"]

    def states_of(self, sequences: Sequences) -> Float[Tensor, "batch total dim"] | None:
        """The states, where these are the same tokens; else None. The last token of a row was never fed: 0 there."""
        known = self.sequences
        same = (
            torch.equal(known.prompt_lengths, sequences.prompt_lengths)
            and torch.equal(known.response_lengths, sequences.response_lengths)
            and known.ids.shape == sequences.ids.shape
            and torch.equal(known.ids[known.mask], sequences.ids[known.mask])
        )
        return self.states[:, : known.ids.shape[1]].clone() if same else None


class _Remembered:
    """The policy's states from the pass before, good while neither the sequences nor a weight have changed."""

    def __init__(self) -> None:
        self._sequences: weakref.ref[Sequences] | None = None
        self._versions: list[int] = []
        self._hidden: Tensor | None = None

    def keep(self, sequences: Sequences, weights: Sequence[Tensor], hidden: Tensor) -> None:
        self._sequences, self._hidden = weakref.ref(sequences), hidden
        self._versions = [weight._version for weight in weights]

    def recall(self, sequences: Sequences, weights: Sequence[Tensor]) -> Tensor | None:
        """The states kept, once; None where they are of other sequences or other weights."""
        known, hidden = self._sequences, self._hidden
        self._sequences = self._hidden = None
        if known is None or known() is not sequences or self._versions != [weight._version for weight in weights]:
            return None
        return hidden


def _gather(sequences: Sequences, hidden: Float[Tensor, "batch total dim"]) -> Float[Tensor, "tokens dim"]:
    """The states one place before each real response token."""
    places = sequences.response_positions - 1 + torch.arange(len(sequences))[:, None] * hidden.shape[1]
    chosen = places[sequences.response_mask].to(hidden.device)
    return hidden.flatten(0, 1).index_select(0, chosen)


def _lay_out(flat: Float[Tensor, "tokens"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """One number a real token → [batch, response], 0 where masked."""
    empty = torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device)
    return empty.masked_scatter(mask, flat.to(mask.device))


def _parts(sequences: Sequences) -> Iterator[Sequences]:
    """Runs of rows that fit into one pass without gradients; policy and reference see the same ones."""
    size = max(1, TOKENS_AT_ONCE // sequences.ids.shape[1])
    if size >= len(sequences):
        yield sequences
        return
    for index in torch.split(torch.arange(len(sequences)), size):
        yield sequences.rows(index)


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _build_mode(
    mode: str, model: PreTrainedModel, other: PreTrainedModel | None, top_layers: int, rank: int, peft: object | None
) -> Mode:
    if mode == "full":
        return FullMode(model, other)
    partial = LoraMode(model, rank, peft) if mode == "lora" else TopMode(model, top_layers)
    return partial if other is None else OtherReference(partial, other)


def _load_reference(source: Source, dtype: Precision, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    reference = load_causal_lm(source, dtype, device)
    if reference.get_output_embeddings().out_features != model.get_output_embeddings().out_features:
        raise ModelError(
            f"the reference has {reference.get_output_embeddings().out_features} tokens and the policy "
            f"{model.get_output_embeddings().out_features}; wanted one vocabulary for both"
        )
    return reference


def _value_function(
    kind: str, value_source: Source | None, source: Source, model: PreTrainedModel, device: torch.device
) -> ValueFunction:
    if kind not in ("head", "model"):
        raise ModelError(f"value is {kind!r}; wanted 'head' or 'model'")
    if kind == "head":
        value = ValueFunction(model.get_output_embeddings().in_features)
        if value_source is not None:
            value.head.linear.load_state_dict(load_file(Path(str(value_source)) / VALUE_HEAD_FILE))
        return value.to(device)
    backbone, score = load_backbone(source if value_source is None else value_source, model.dtype, device)
    backbone.requires_grad_(True)
    value = ValueFunction(backbone.config.get_text_config().hidden_size, backbone)
    if score is not None:
        value.head.linear.weight.data.copy_(score)
    return value.to(device)
