"""The sampler: one token after the other, each drawn by the inverse CDF at a number that belongs to its row and place.

    prompts → prefill (each distinct prompt once) → draw → stop or feed back → … → Generation

Why not the library's `generate`: it draws from one global random stream, so a response would depend on the batch it
stands in and on the number of processes; it draws one exponential per vocabulary entry where one uniform per row is
enough; and it keeps computing rows that have ended. Here the same uniforms give the same responses, rows that have
ended leave the batch, and the log-probabilities recorded are those the token was drawn with. Sampling is pure: no
top-k, top-p, penalty or minimum length. Knows no mode, reference or value. Read next: `models.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tether.batch import Generation, Prompts
from tether.errors import NonFiniteError
from tether.feeding import CachedText, Recorder, Text, WholeText, listening
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


class _Draft:
    """The responses of a batch as they are written, right-padded, and the rows that are still written on."""

    def __init__(self, uniforms: Float[Tensor, "batch response"]) -> None:
        self.responses = torch.zeros_like(uniforms, dtype=torch.long)
        self.mask = torch.zeros_like(uniforms, dtype=torch.bool)
        self.logprobs = torch.zeros_like(uniforms, dtype=torch.float32)
        self.finished = torch.zeros_like(self.mask[:, 0])
        self.rows = torch.arange(len(uniforms), device=uniforms.device)
        self.open = torch.ones_like(self.finished)
        """For each of `rows`: False once it has ended, until it is dropped."""

    def write(
        self, t: int, tokens: Int[Tensor, "rows"], logprobs: Float[Tensor, "rows"], stops: Int[Tensor, "stops"]
    ) -> None:
        """Put down one token a row that is still open, and close the rows whose token is a stop."""
        self.responses[self.rows, t] = torch.where(self.open, tokens, 0)
        self.logprobs[self.rows, t] = torch.where(self.open, logprobs.float(), 0.0)
        self.mask[self.rows, t] = self.open
        ended = self.open & torch.isin(tokens, stops)
        self.finished[self.rows] |= ended
        self.open = self.open & ~ended

    def shrink(self) -> Int[Tensor, "rows_left"] | None:
        """Drop the rows that have ended, once there are enough to pay for the copy; which of the rows stay, or None."""
        if int(self.open.sum()) >= (1.0 - SHRINK_AT) * len(self.open):
            return None
        kept = self.open.nonzero().squeeze(1)
        self.rows, self.open = self.rows[kept], self.open[kept]
        return kept


class Sampler:
    """Draws responses from a backbone and a head that share the policy's weights as they stand."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: OutputHead,
        stops: tuple[int, ...],
        *,
        cached: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        self.backbone, self.head, self.stops, self.cached = backbone, head, stops, cached
        self.recorder = recorder if cached else None
        self._packed = PackedLinears(backbone, head.linear)

    def sample(
        self,
        prompts: Prompts,
        uniforms: Float[Tensor, "batch response"],
        temperature: float,
        closing: int | None = None,
    ) -> tuple[Generation, Float[Tensor, "batch total dim"] | None]:
        """One response a prompt, and what the recorder heard; `uniforms` is as wide as the longest response allowed.

        `closing`: a token for the recorder to hear after each response that was cut.
        """
        home, device = prompts.ids.device, self.head.linear.weight.device
        ids, mask, draws = (tensor.to(device) for tensor in (prompts.ids, prompts.mask, uniforms))
        size = max(1, TOKENS_AT_ONCE // (prompts.ids.shape[1] + uniforms.shape[1]))
        with torch.inference_mode(), self._packed.in_use(*uniforms.shape), listening(self.recorder):
            turns = [
                self._write(ids[rows], mask[rows], draws[rows], temperature, closing)
                for rows in (slice(first, first + size) for first in range(0, len(prompts), size))
            ]
        drafts = [draft for draft, _ in turns]
        responses, mask, logprobs, finished = (
            torch.cat([getattr(draft, name) for draft in drafts]).to(home, copy=True) for name in _FIELDS
        )
        heard = [states for _, states in turns if states is not None]
        return Generation(responses, mask, logprobs, finished), torch.cat(heard) if heard else None

    def _write(
        self, ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float, closing: int | None
    ) -> tuple[_Draft, Tensor | None]:
        """The responses of one batch, and the states heard."""
        width = uniforms.shape[1]
        room = width if closing is None else width + 1
        text: Text = (
            CachedText(self.backbone, ids, prompt_mask, room, self.recorder)
            if self.cached
            else WholeText(self.backbone, ids, prompt_mask, room)
        )
        draft, stops = _Draft(uniforms), torch.tensor(self.stops, device=ids.device)
        for t in range(width):
            tokens, logprobs = draw(self.head.logits(text.hidden), uniforms[draft.rows, t], temperature)
            draft.write(t, tokens, logprobs, stops)
            if t + 1 == width or not bool(draft.open.any()):
                break
            self._read_on(text, draft, tokens)
        if self.recorder is None:
            return draft, None
        text.feed(tokens)
        if closing is not None:
            text.feed(torch.full_like(tokens, closing))
        return draft, self.recorder.states

    def _read_on(self, text: Text, draft: _Draft, tokens: Int[Tensor, "rows"]) -> None:
        """Read the tokens and drop the rows that have ended; where there is a recorder, it hears their EOS first."""
        if self.recorder is not None:
            text.feed(tokens)
        if (kept := draft.shrink()) is not None:
            text.keep(kept)
            tokens = tokens[kept]
        if self.recorder is None:
            text.feed(tokens)
