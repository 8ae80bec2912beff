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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tether.attention import roomy_cache
from tether.batch import Generation, Prompts
from tether.heads import OutputHead

BLOCK = 256  # vocabulary entries summed before the search; two short searches cost less than one of 50,000
SHRINK_AT = 0.25  # share of ended rows at which the batch is worth the copy that drops them


def draw(
    logits: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, "rows"], temperature: float
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """The token at each row's quantile of softmax(z/T), and its log-probability in nats.

    y = min{v : Σ_{w≤v} π(w) > u}, summed in float64, so that P(y) = π(y) for u uniform in [0, 1). A token whose
    probability is 0 in float32 is never drawn, at no u; u ≥ 1 gives the last possible token.
    """
    weights = torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    missing = -weights.shape[-1] % BLOCK
    blocks = (F.pad(weights, (0, missing)) if missing else weights).view(len(weights), -1, BLOCK)
    uniforms = uniforms.to(torch.float64)
    block, rest = _at_quantile(blocks.sum(dim=-1, dtype=torch.float64), uniforms)
    place, _ = _at_quantile(blocks[torch.arange(len(weights), device=weights.device), block].double(), rest)
    tokens = block * BLOCK + place
    return tokens, weights.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log()


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


class Sampler:
    """Draws responses from a backbone and a head that share the policy's weights as they stand."""

    def __init__(self, backbone: PreTrainedModel, head: OutputHead, stops: tuple[int, ...]) -> None:
        self.backbone, self.head, self.stops = backbone, head, stops
        self.takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    def sample(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """One response a prompt; `uniforms` is as wide as the longest response allowed."""
        device = self.head.linear.weight.device
        with torch.inference_mode():
            inputs = (prompts.ids.to(device), prompts.mask.to(device), uniforms.to(device))
            results = self._sample(*inputs, temperature)
        return Generation(*(result.to(prompts.ids.device, copy=True) for result in results))

    def _sample(
        self, ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, hidden = self._prefill(ids, prompt_mask, uniforms.shape[1])
        stops = torch.tensor(self.stops, device=hidden.device)
        responses = torch.zeros(uniforms.shape, dtype=torch.long, device=hidden.device)
        logprobs = torch.zeros(uniforms.shape, device=hidden.device)
        mask = torch.zeros(uniforms.shape, dtype=torch.bool, device=hidden.device)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=hidden.device)
        for t in range(uniforms.shape[1]):
            tokens, chosen = draw(self.head.logits(hidden), uniforms[rows.index, t], temperature)
            writing = rows.index[rows.open]
            responses[writing, t], logprobs[writing, t] = tokens[rows.open], chosen[rows.open].to(logprobs.dtype)
            mask[writing, t] = True
            ended = rows.open & torch.isin(tokens, stops)
            finished[rows.index[ended]] = True
            rows.open = rows.open & ~ended
            if t + 1 == uniforms.shape[1] or not bool(rows.open.any()):
                break
            tokens = _shrink(rows, tokens)
            hidden = self._step(rows, tokens)
        return responses, mask, logprobs, finished

    def _prefill(self, ids: Tensor, mask: Tensor, width: int) -> tuple[_Rows, Float[Tensor, "rows dim"]]:
        """Run each distinct prompt once; then one row a response, several rows sharing a prompt's cache by copy."""
        distinct, inverse = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
        real = distinct >= 0
        cache = roomy_cache(self.backbone.config, ids.shape[1] + width)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        padded = not bool(real.all())
        hidden = self._forward(distinct.clamp(min=0), real if padded else None, positions, cache)[:, -1]
        cache.reorder_cache(inverse)
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
        rows.positions = rows.positions + 1
        return hidden[:, 0]

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        extra = {"position_ids": positions} if self.takes_positions else {}
        hidden: Tensor = self.backbone(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        ).last_hidden_state
        return hidden


def _shrink(rows: _Rows, tokens: Int[Tensor, "rows"]) -> Int[Tensor, "rows_left"]:
    """Drop the rows that have ended, once there are enough of them to pay for the copy."""
    ended = len(rows.open) - int(rows.open.sum())
    if ended <= SHRINK_AT * len(rows.open):
        return tokens
    keep = rows.open.nonzero().squeeze(1)
    rows.cache.reorder_cache(keep)
    rows.index, rows.mask, rows.positions = rows.index[keep], rows.mask[keep], rows.positions[keep]
    rows.open = rows.open[keep]
    return tokens[keep]
