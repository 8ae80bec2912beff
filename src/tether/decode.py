"""The sampler: one token after the other, each drawn by the inverse CDF at a number that belongs to its row and place.

    prompts → prefill (each distinct prompt once) → draw → stop or feed back → … → Generation

Why not the library's `generate`: it draws from one global random stream, so a response would depend on the batch it
stands in and on the number of processes; it draws one exponential per vocabulary entry where one uniform per row is
enough; and it keeps computing rows that have ended. Here the same uniforms give the same responses, rows that have
ended leave the batch, and the log-probabilities recorded are those the token was drawn with. Sampling is pure: no
top-k, top-p, penalty or minimum length. Knows no mode, reference or value. Read next: `models.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tether.attention import roomy_cache
from tether.batch import Generation, Prompts
from tether.errors import NonFiniteError
from tether.heads import OutputHead
from tether.packing import PackedLinears

SMALL_VOCAB = 2048  # up to here one search is as quick as two
BLOCK = 256  # vocabulary entries summed before the search; two short searches cost less than one of 50,000
TOKENS_AT_ONCE = 2**16  # places for prompt and response in one batch; more rows than that are sampled in turns
_FIELDS = ("responses", "mask", "logprobs", "finished")
SHRINK_AT = 0.25  # share of ended rows at which the batch is worth the copy that drops them


def draw(
    logits: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, "rows"], temperature: float
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """The token at each row's quantile of softmax(z/T), and its log-probability in nats.

    y = min{v : Σ_{w≤v} π(w) > u}, summed in float64, so that P(y) = π(y) for u uniform in [0, 1). A token whose
    probability is 0 in float32 is never drawn, at no u; u ≥ 1 gives the last possible token. Raises NonFiniteError.
    """
    weights = torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    if not bool(torch.isfinite(weights[:, 0]).all()):  # one NaN in a row makes all of its softmax NaN
        raise NonFiniteError("the policy's logits are not finite; it has diverged: go back to an earlier checkpoint "
                             "with a lower learning rate")  # fmt: skip
    tokens = _search(weights, uniforms.to(torch.float64))
    return tokens, weights.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log()


def _search(weights: Float[Tensor, "rows vocab"], quantile: Float[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """The entry at each row's quantile: in a large vocabulary first its block, then its place there."""
    if weights.shape[-1] <= SMALL_VOCAB:
        return _at_quantile(weights.double(), quantile)[0]
    missing = -weights.shape[-1] % BLOCK
    blocks = (F.pad(weights, (0, missing)) if missing else weights).view(len(weights), -1, BLOCK)
    block, rest = _at_quantile(blocks.sum(dim=-1, dtype=torch.float64), quantile)
    own = blocks[torch.arange(len(weights), device=weights.device), block].double()
    return block * BLOCK + _at_quantile(own, rest)[0]


def _at_quantile(
    weights: Float[Tensor, "rows entries"], quantile: Float[Tensor, "rows"]
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """The entry at each row's quantile of weights that need not sum to 1, and the quantile within that entry."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    mark = torch.minimum(quantile.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, mark, right=True)
    own = weights.gather(-1, chosen)
    within = (mark - (cumulative.gather(-1, chosen) - own)) / own
    return chosen.squeeze(-1), within.clamp(0.0, 1.0).squeeze(-1)


@dataclass
class _Rows:
    """The rows still being written, and what the model needs to go on with them."""

    index: Int[Tensor, "rows"]
    """Where each stands in the batch."""
    open: Bool[Tensor, "rows"]
    """False once the row has ended, until it is dropped."""
    mask: Bool[Tensor, "rows width"]
    """Real tokens of the prompt, then True for every place a response may fill."""
    positions: Int[Tensor, "rows"]
    """Position of the next token to be fed."""
    cache: DynamicCache
    padded: bool
    """Whether any prompt is padded; without padding no mask is needed."""

    def shrink(self, tokens: Int[Tensor, "rows"]) -> Int[Tensor, "rows_left"]:
        """Drop the rows that have ended, once there are enough of them to pay for the copy."""
        if int(self.open.sum()) >= (1.0 - SHRINK_AT) * len(self.open):
            return tokens
        keep = self.open.nonzero().squeeze(1)
        self.cache.reorder_cache(keep)
        self.index, self.mask, self.positions = self.index[keep], self.mask[keep], self.positions[keep]
        self.open = self.open[keep]
        return tokens[keep]


class _Draft:
    """The responses of a batch as they are written, right-padded."""

    def __init__(self, uniforms: Float[Tensor, "batch response"]) -> None:
        self.responses = torch.zeros_like(uniforms, dtype=torch.long)
        self.mask = torch.zeros_like(uniforms, dtype=torch.bool)
        self.logprobs = torch.zeros_like(uniforms, dtype=torch.float32)
        self.finished = torch.zeros_like(self.mask[:, 0])

    def write(self, t: int, rows: _Rows, tokens: Tensor, logprobs: Tensor, stops: Tensor) -> None:
        """Put down one token a row that is still open, and close the rows whose token is a stop."""
        self.responses[rows.index, t] = torch.where(rows.open, tokens, 0)
        self.logprobs[rows.index, t] = torch.where(rows.open, logprobs.float(), 0.0)
        self.mask[rows.index, t] = rows.open
        ended = rows.open & torch.isin(tokens, stops)
        self.finished[rows.index] |= ended
        rows.open = rows.open & ~ended


class Recorder:
    """Keeps what one layer receives while the sampler runs, laid out as `Sequences`: the states of a frozen trunk."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._inputs: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        hook = self._layer.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._inputs = None

    def start(self, mask: Bool[Tensor, "batch prompt"], inverse: Int[Tensor, "batch"], width: int) -> None:
        """Lay out the states of the prompts just run, with room for `width` tokens more."""
        prompts = self._take()[inverse]
        self.states = prompts.new_zeros(len(mask), mask.shape[1] + width, prompts.shape[2])
        places = torch.arange(self.states.shape[1], device=mask.device) < mask.sum(dim=1, keepdim=True)
        self.states[places] = prompts[mask]

    def add(self, rows: _Rows) -> None:
        """Put the states of the tokens just fed in their places."""
        self.states[rows.index, rows.positions] = self._take()[:, 0]

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = args[0] if args else kwargs["hidden_states"]

    def _take(self) -> Tensor:
        assert self._inputs is not None, "the recorded layer did not run"
        return self._inputs


class Sampler:
    """Draws responses from a backbone and a head that share the policy's weights as they stand."""

    def __init__(
        self, backbone: PreTrainedModel, head: OutputHead, stops: tuple[int, ...], recorder: Recorder | None = None
    ) -> None:
        self.backbone, self.head, self.stops, self.recorder = backbone, head, stops, recorder
        self.takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        self._packed = PackedLinears(backbone, head.linear)

    def sample(
        self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float
    ) -> tuple[Generation, Float[Tensor, "batch total dim"] | None]:
        """One response a prompt, and what the recorder heard; `uniforms` is as wide as the longest response allowed."""
        home, device = prompts.ids.device, self.head.linear.weight.device
        ids, mask, draws = (tensor.to(device) for tensor in (prompts.ids, prompts.mask, uniforms))
        size = max(1, TOKENS_AT_ONCE // (prompts.ids.shape[1] + uniforms.shape[1]))
        with torch.inference_mode(), self._packed.in_use(*uniforms.shape), ExitStack() as stack:
            if self.recorder is not None:
                stack.enter_context(self.recorder.listening())
            turns = [
                self._write(ids[rows], mask[rows], draws[rows], temperature)
                for rows in (slice(first, first + size) for first in range(0, len(prompts), size))
            ]
        drafts = [draft for draft, _ in turns]
        fields = (torch.cat([getattr(draft, name) for draft in drafts]) for name in _FIELDS)
        heard = [states for _, states in turns if states is not None]
        return Generation(*(field.to(home, copy=True) for field in fields)), torch.cat(heard) if heard else None

    def _write(
        self, ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float
    ) -> tuple[_Draft, Tensor | None]:
        """The responses of one batch, and the states heard."""
        rows, hidden = self._prefill(ids, prompt_mask, uniforms.shape[1])
        draft, stops = _Draft(uniforms), torch.tensor(self.stops, device=ids.device)
        for t in range(uniforms.shape[1]):
            tokens, logprobs = draw(self.head.logits(hidden), uniforms[rows.index, t], temperature)
            draft.write(t, rows, tokens, logprobs, stops)
            if t + 1 == uniforms.shape[1] or not bool(rows.open.any()):
                break
            hidden = self._step(rows, rows.shrink(tokens))
        return draft, None if self.recorder is None else self.recorder.states

    def _prefill(self, ids: Tensor, mask: Tensor, width: int) -> tuple[_Rows, Float[Tensor, "rows dim"]]:
        """Run each distinct prompt once; then one row a response, several rows sharing a prompt's cache by copy."""
        distinct, inverse = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
        real = distinct >= 0
        cache = roomy_cache(self.backbone.config, ids.shape[1] + width)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        padded = not bool(real.all())
        hidden = self._forward(distinct.clamp(min=0), real if padded else None, positions, cache)[:, -1]
        cache.reorder_cache(inverse)
        if self.recorder is not None:
            self.recorder.start(mask, inverse, width)
        room = torch.ones(len(ids), width, dtype=torch.bool, device=ids.device)
        rows = _Rows(
            index=torch.arange(len(ids), device=ids.device),
            open=torch.ones(len(ids), dtype=torch.bool, device=ids.device),
            mask=torch.cat([mask, room], dim=1),
            positions=mask.sum(dim=1),
            cache=cache,
            padded=padded,
        )
        return rows, hidden[inverse]

    def _step(self, rows: _Rows, tokens: Int[Tensor, "rows"]) -> Float[Tensor, "rows dim"]:
        """Feed one token a row; the hidden state that predicts the next."""
        seen = rows.cache.get_seq_length() + 1
        mask = rows.mask[:, :seen] if rows.padded else None
        hidden = self._forward(tokens.unsqueeze(1), mask, rows.positions.unsqueeze(1), rows.cache)
        if self.recorder is not None:
            self.recorder.add(rows)
        rows.positions = rows.positions + 1
        return hidden[:, 0]

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        extra = {"position_ids": positions} if self.takes_positions else {}
        hidden: Tensor = self.backbone(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        ).last_hidden_state
        return hidden
