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

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.batch import KL_UNIT, Evaluation, Generation, Prompts, Referee, ReferenceEvaluation, Sequences, Writer
from tether.chat_templates import read_replies
from tether.decode import Sampler
from tether.errors import InputError, ModelError
from tether.feeding import Recorder, understands_cache
from tether.heads import ValueHead, reference_logprobs, selected_logprobs
from tether.loading import (
    Precision,
    Source,
    context_length,
    lacking,
    load_backbone,
    load_causal_lm,
    load_tokenizer,
    probe,
    require_embedded,
    stop_tokens,
)
from tether.modes import FullMode, LoraMode, Mode, OtherReference, TopMode
from tether.runtime.sharding import local
from tether.states import Heard, Remembered, gather, lay_out, parts_of
from tether.trunk import run_backbone

CACHE_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative, over all layers, steps in another order
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
    critic: Literal["single", "split"] = "single",
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
    `critic`: "single" is one value of score and KL together, "split" one of the score and one of the KL.
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
    baseline = _value_function(value, value_source, source, model, place, _outputs(critic))
    return LanguagePolicy(_build_mode(mode, model, other, top_layers, lora_rank, peft_config), baseline, words)


class LanguagePolicy:
    """A causal LM that trains, its value function, and its frozen reference; the rooms' `Policy`."""

    def __init__(self, mode: Mode, value: ValueFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mode, self.value, self.tokenizer = mode, value, tokenizer
        self._context, self._lacking = context_length(mode.model), lacking(tokenizer, mode.model)
        self._sampler = Sampler(
            mode.model.base_model,
            mode.head,
            stop_tokens(mode.model, tokenizer),
            cached=understands_cache(mode.model.base_model, probe(mode.model), CACHE_AGREEMENT[mode.model.dtype]),
            recorder=None if mode.trunk_end is None else Recorder(mode.trunk_end),
        )
        self._heard: Heard | None = None
        self._trained = mode.trained()
        self._last = Remembered()
        self.writer: Writer | None = None
        """Who writes the responses; None is the policy's own sampler."""
        self.referee: Referee | None = None
        """Who says what the reference says; None is the policy's own process."""

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
        return min(self.stops) if known is None or known in self._lacking else int(known)

    def generate(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """Sample one response a prompt, token t of row b by the inverse CDF at `uniforms[b, t]`.

        A response ends by EOS, which belongs to it, or at the width of `uniforms`. The same uniforms give the same
        responses, whatever else stands in the batch. Raises InputError where a prompt is empty or leaves no room, and
        NonFiniteError where the policy has diverged.
        """
        _check_temperature(temperature)
        self.require_embedded(row[real].tolist() for row, real in zip(prompts.ids, prompts.mask, strict=True))
        self._check_room(prompts.lengths, uniforms.shape[1])
        if self.writer is not None:
            generation = self.writer.write(prompts, uniforms, temperature)
            if self.referee is not None:
                self.referee.expect(Sequences.join(prompts, generation.trimmed(), self.pad), temperature)
            return generation
        full = int(prompts.lengths.max()) + uniforms.shape[1] >= self.context
        closing = None if full else self.tokenizer.eos_token_id
        generation, states = self._sampler.sample(prompts, uniforms, temperature, closing)
        joined = Sequences.join(prompts, generation, self.pad)
        self._heard = None if states is None else Heard(joined, states, closing)
        return generation

    def prepare(self, sequences: Sequences) -> Sequences:
        """Compute once what every later forward pass of this rollout shares (mode `top`: the trunk's states).

        For the responses that `generate` gave last, the states are those that the sampler went through.
        """
        self._check_still()
        heard, self._heard = self._heard, None
        known = None if heard is None else heard.joined_to(sequences)
        return self.mode.prepare(sequences) if known is None else known

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        """log-probabilities, values and entropies of the responses under the policy as it stands."""
        _check_temperature(temperature)
        hidden = self._response_hidden(sequences, self.mode.states)
        if hidden.requires_grad:
            self._last.forget()
        else:
            self._last.keep(sequences, self._trained, hidden)
        tokens = sequences.responses[sequences.response_mask].to(hidden.device)
        logprobs, entropy = selected_logprobs(self.mode.head, hidden, tokens, temperature)
        values, *others = self.value(sequences, hidden, self._response_hidden).unbind(dim=1)
        kl_values = lay_out(others[0] / KL_UNIT, sequences.response_mask) if others else None
        laid_out = [lay_out(flat, sequences.response_mask) for flat in (logprobs, values, entropy)]
        return Evaluation(laid_out[0], laid_out[1], laid_out[2], kl_values)

    @torch.no_grad()
    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        """The same responses under the frozen reference, and the full-vocabulary KL to it."""
        _check_temperature(temperature)
        if self.referee is not None:
            return self.referee.evaluate_reference(sequences, temperature)
        hidden = self._last.recall(sequences, self._trained)
        if hidden is None:
            hidden = self._response_hidden(sequences, self.mode.states)
        reference_hidden = self._response_hidden(sequences, self.mode.reference_states)
        tokens = sequences.responses[sequences.response_mask].to(hidden.device)
        logprobs, divergence = reference_logprobs(
            self.mode.head, self.mode.reference_head, hidden, reference_hidden, tokens, temperature
        )
        return ReferenceEvaluation(*(lay_out(flat, sequences.response_mask) for flat in (logprobs, divergence)))

    def require_embedded(self, prompts: Iterable[Sequence[int]]) -> None:
        """Raise InputError where a prompt holds a token that was added to the tokenizer and not to the model."""
        require_embedded(prompts, self._lacking, "prompt")

    @property
    def vocab(self) -> int:
        return self.mode.head.linear.out_features

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a response."""
        return frozenset(self._sampler.stops)

    @torch.no_grad()
    def logits_of(self, sequences: Sequences) -> Float[Tensor, "tokens vocab"]:
        """z before temperature at every real response token, rows one after the other; for looking at a few rows."""
        return self.mode.head.logits(self._response_hidden(sequences, self.mode.states)).to(sequences.ids.device)

    @torch.no_grad()
    def logits_kept(self, sequences: Sequences, rows: Int[Tensor, "rows"]) -> Float[Tensor, "tokens vocab"] | None:
        """`logits_of` these rows from the states that `evaluate` went through; None once they are gone."""
        hidden = self._last.recall(sequences, self._trained)
        if hidden is None:
            return None
        parts = torch.split(hidden, sequences.response_lengths.tolist())
        return self.mode.head.logits(torch.cat([parts[row] for row in rows.tolist()])).to(sequences.ids.device)

    def decode(self, responses: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> list[str]:
        """The responses as text, special tokens left out, as they read on after a plain prompt."""
        rows = [row[real].tolist() for row, real in zip(responses, mask, strict=True)]
        return read_replies(rows, self.tokenizer)

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Parameters by group: `policy` and `value`; no parameter stands in two groups."""
        return {"policy": self._trained, "value": list(self.value.parameters())}

    def save_pretrained(self, folder: str | Path, *, merged: bool = False) -> None:
        """Write the policy as it stands as an ordinary Hugging Face folder, tokenizer included.

        Mode `lora` writes its adapters, or with `merged=True` the whole model with the adapters folded in. The value
        function goes beside it: `value_head.safetensors`, and `value_model/` where it is a model of its own.
        """
        self.mode.save(Path(folder), merged)
        self.tokenizer.save_pretrained(folder)
        self.value.save(Path(folder))

    def _response_hidden(self, sequences: Sequences, run: Callable[[Sequences], Tensor]) -> Float[Tensor, "tokens dim"]:
        """The states that predict the real response tokens, rows one after the other."""
        if torch.is_grad_enabled():
            return gather(sequences, run(sequences))
        return torch.cat([gather(part, run(part)) for part in parts_of(sequences)])

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
    """V(s_t): a linear head on the policy's final states, or on those of a backbone of its own.

    With two outputs V_r, and V_KL in units of 1/KL_UNIT nats.
    """

    def __init__(self, dim: int, backbone: PreTrainedModel | None = None, outputs: int = 1) -> None:
        super().__init__()
        self.head = ValueHead(dim, outputs)
        self.backbone = backbone

    def forward(
        self,
        sequences: Sequences,
        hidden: Float[Tensor, "tokens dim"],
        gather: Callable[[Sequences, Callable[[Sequences], Tensor]], Tensor],
    ) -> Float[Tensor, "tokens outputs"]:
        """Each critic's value of each token; `hidden` are the policy's states, `gather` takes another backbone's."""
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


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {local(tensor.detach()).untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; wanted a number above 0 (greedy decoding has no policy ratio)")


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


def _outputs(critic: str) -> int:
    if critic not in ("single", "split"):
        raise ModelError(f"critic is {critic!r}; wanted 'single' or 'split'")
    return 2 if critic == "split" else 1


def _read_value_head(folder: Source, head: nn.Linear) -> dict[str, Tensor]:
    file = Path(str(folder)) / VALUE_HEAD_FILE
    if isinstance(folder, PreTrainedModel) or not file.is_file():
        raise ModelError(
            f"value_source has no {VALUE_HEAD_FILE}; wanted a folder that save_pretrained of a policy wrote "
            "(or value='model' for a value model of its own)"
        )
    weights = dict(load_file(file))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if shapes != wanted:
        raise ModelError(
            f"{file} holds {shapes}; wanted {wanted}: the head of a model of the same width, with the same critic"
        )
    return weights


def _value_function(
    kind: str,
    value_source: Source | None,
    source: Source,
    model: PreTrainedModel,
    device: torch.device,
    outputs: int,
) -> ValueFunction:
    if kind not in ("head", "model"):
        raise ModelError(f"value is {kind!r}; wanted 'head' or 'model'")
    if kind == "head":
        value = ValueFunction(model.get_output_embeddings().in_features, outputs=outputs)
        if value_source is not None:
            value.head.linear.load_state_dict(_read_value_head(value_source, value.head.linear))
        return value.to(device)
    backbone, score = load_backbone(source if value_source is None else value_source, model.dtype, device)
    backbone.requires_grad_(True)
    value = ValueFunction(backbone.config.get_text_config().hidden_size, backbone, outputs)
    if score is not None:
        value.head.linear.weight.data[:1] = score  # of the KL it knows nothing: that critic starts at 0
    return value.to(device)
