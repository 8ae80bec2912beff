"""What stands on top of the hidden states: the language-model head and the value head, on response positions only.

    hidden [tokens, dim] ─┬─ OutputHead → log π(y_t|s_t), entropy, full-vocabulary KL      [tokens]
                          └─ ValueHead  → V(s_t)                                           [tokens]

The axis `tokens` is the batch's real response tokens laid end to end. Logits live only in chunks of CHUNK_ELEMENTS
numbers, so no [batch, response, vocab] tensor in fp32 ever exists, forward or backward. The results are those of
`numerics.selected_logprobs`, `numerics.entropy` and `numerics.full_kl` on the whole logits, to round-off; statistics
are taken in float32 or better whatever the weights' precision. Knows no mode, mask or sampler. Read next: `models.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tether.errors import ModelError

CHUNK_ELEMENTS = 2**23  # logits of one chunk: 32 MiB in fp32; half of it costs a fifth more time (two Zen 4 cores)
WIDE_CHUNK_ELEMENTS = 2**24  # where the head trains: each chunk costs a pass over the gradient of its whole weight


@dataclass(frozen=True)
class OutputHead:
    """The language-model head as a linear map of the final hidden state: z = cap·tanh(s/cap), s = scale·(W h + b)."""

    linear: nn.Linear
    scale: float = 1.0
    """Constant factor of the logits (Cohere, Granite)."""
    softcap: float | None = None
    """Bound of the logits (Gemma 2); None where there is none."""

    @staticmethod
    def of(model: nn.Module) -> OutputHead:
        """The head of a Hugging Face causal LM, with the constant transforms of the logits that its config names.

        Raises ModelError where the model has no head, or one that is no plain linear map.
        """
        linear = model.get_output_embeddings()  # type: ignore[operator]
        if type(linear) is not nn.Linear:
            raise ModelError(
                f"{type(model).__name__} has {'no' if linear is None else type(linear).__name__ + ' as'} output head; "
                "wanted a causal LM whose head is a plain linear layer (with LoRA, leave the head out of the targets)"
            )
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return OutputHead(linear, float(scale) / float(divisor), getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens vocab"]:
        """z, in float32 or better."""
        raw: Tensor = self.linear(hidden)
        logits = raw if raw.dtype == torch.float64 else raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Float[Tensor, "tokens vocab"]) -> float | Float[Tensor, "tokens vocab"]:
        """∂z/∂(W h + b), given z."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (logits / self.softcap) ** 2)


def selected_logprobs(
    head: OutputHead,
    hidden: Float[Tensor, "tokens dim"],
    tokens: Int[Tensor, "tokens"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """log softmax(z/T)[y] and H(softmax(z/T)), both in nats per token; the entropy carries no gradient.

    The gradient with respect to `hidden` costs one more matrix product and no stored probabilities, since
    ∂log π(y)/∂h = (W_y − Σ_v π(v)·W_v)·scale/T is known as soon as the chunk's softmax is. Where the head itself is
    trained, its logits are computed again in the backward pass.
    """
    result: tuple[Tensor, Tensor] = _SelectedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.linear.weight, head.linear.bias, tokens, head, temperature
    )
    return result


@torch.no_grad()
def reference_logprobs(
    head: OutputHead,
    reference_head: OutputHead,
    hidden: Float[Tensor, "tokens dim"],
    reference_hidden: Float[Tensor, "tokens dim"],
    tokens: Int[Tensor, "tokens"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """log ρ(y) and KL(π‖ρ) = Σ_v π(v)·(z_v − z'_v)/T − log Z + log Z', nats per token, the vocabulary in chunks.

    Both are computed by the same steps as the policy's log-probabilities, so equal states give a KL of exactly 0.
    """
    logprobs, divergence = _empty_results(hidden)
    for rows in _chunks(len(hidden), head.linear.out_features, CHUNK_ELEMENTS):
        policy = _distribution(head.logits(hidden[rows]), temperature)
        reference = _distribution(reference_head.logits(reference_hidden[rows]), temperature)
        logprobs[rows] = reference.logprobs(tokens[rows])
        divergence[rows] = policy.mean_of(policy.scaled - reference.scaled) - policy.log_total + reference.log_total
    return logprobs, divergence


class ValueHead(nn.Module):
    """V(s_t) = w·h_t + b in float32, from the final hidden state before y_t is emitted. Starts at V ≡ 0.

    One output, or one for each of two critics.
    """

    def __init__(self, dim: int, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, outputs, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens outputs"]:
        values: Tensor = self.linear(hidden.float())
        return values


class _SelectedLogprobs(torch.autograd.Function):
    """Forward and backward of `selected_logprobs`; the arguments after `bias` carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        head: OutputHead,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _empty_results(hidden)
        pull = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), weight.shape[0], CHUNK_ELEMENTS):
            logits = head.logits(hidden[rows])
            policy = _distribution(logits, temperature)
            logprobs[rows] = policy.logprobs(tokens[rows])
            entropy[rows] = policy.log_total - policy.mean_of(policy.scaled)
            if pull is not None:
                gradient = _logit_gradient(head, logits, policy, tokens[rows])
                pull[rows] = (gradient.to(weight.dtype) @ weight).div_(-temperature)
        ctx.save_for_backward(hidden, weight, bias, tokens, pull)
        ctx.head, ctx.temperature = head, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, pull = ctx.saved_tensors
        upstream = gradients[0].unsqueeze(-1)
        grad_hidden = None if pull is None else (pull * upstream).to(hidden.dtype)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_hidden, None, None, None, None, None
        grad_weight, grad_bias = _Sum(weight.dtype), _Sum(weight.dtype)
        for rows in _chunks(len(hidden), weight.shape[0], WIDE_CHUNK_ELEMENTS):
            logits = ctx.head.logits(hidden[rows])
            policy = _distribution(logits, ctx.temperature)
            gradient = _logit_gradient(ctx.head, logits, policy, tokens[rows])
            gradient = gradient.mul_(upstream[rows] / -ctx.temperature)
            grad_weight.add(gradient.to(weight.dtype).T @ hidden[rows])
            grad_bias.add(gradient.sum(dim=0))
        return grad_hidden, grad_weight.total(), None if bias is None else grad_bias.total(), None, None, None


@dataclass(frozen=True)
class _Distribution:
    """softmax(z/T) of a chunk of rows."""

    scaled: Float[Tensor, "tokens vocab"]
    """z/T."""
    probabilities: Float[Tensor, "tokens vocab"]
    log_total: Float[Tensor, "tokens"]
    """log Σ_v e^{z_v/T}."""

    def logprobs(self, tokens: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        return self.scaled.gather(1, tokens.unsqueeze(-1)).squeeze(-1) - self.log_total

    def mean_of(self, x: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens"]:
        """Σ_v π(v)·x_v."""
        return (self.probabilities * x).sum(dim=-1)


def _distribution(logits: Float[Tensor, "tokens vocab"], temperature: float) -> _Distribution:
    """One fused softmax; the normaliser is read off the likeliest token, log Σ e^x = max x − log max π."""
    scaled = logits if temperature == 1.0 else logits / temperature
    probabilities = torch.softmax(scaled, dim=-1)
    return _Distribution(scaled, probabilities, scaled.amax(dim=-1) - probabilities.amax(dim=-1).log())


def _logit_gradient(
    head: OutputHead, logits: Tensor, policy: _Distribution, tokens: Tensor
) -> Float[Tensor, "tokens vocab"]:
    """−T·∂log π(y)/∂(W h + b) = (π(v) − 1[v = y])·slope; takes the memory of the probabilities."""
    gradient = policy.probabilities
    gradient.scatter_add_(1, tokens.unsqueeze(-1), gradient.new_full((len(tokens), 1), -1.0))
    slope = head.slope(logits)
    return gradient if not isinstance(slope, Tensor) and slope == 1.0 else gradient.mul_(slope)


class _Sum:
    """A sum of chunks, in float32 or better once there is more than one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sum: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self._sum is None:
            self._sum = part
        else:
            self._sum = self._sum.to(torch.promote_types(part.dtype, torch.float32)).add_(part)

    def total(self) -> Tensor | None:
        return None if self._sum is None else self._sum.to(self._dtype)


def _empty_results(hidden: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    empty = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    return empty, torch.empty_like(empty)


def _chunks(count: int, vocab: int, elements: int) -> Iterator[slice]:
    """As few as fit, of about equal length: a short one at the end would multiply at half the rate."""
    parts = -(-count // max(1, elements // vocab))
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)
