"""The heads in chunks against `numerics` on whole logits, and what memory they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tether import heads, numerics
from tether.heads import OutputHead, ValueHead, reference_logprobs, selected_logprobs
from tolerances import EXACT, ROUND_OFF, assert_close

TOKENS, DIM, VOCAB = 23, 8, 31
HEADS = {
    "plain": {}, "bias": {"bias": True}, "scale": {"scale": 0.25}, "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 5.0},
}  # fmt: skip


def head_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> OutputHead:
    options = dict(HEADS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(DIM, VOCAB, bias=bool(options.pop("bias", False)), dtype=dtype)
        nn.init.normal_(linear.weight)
    return OutputHead(linear, **options)


def whole_logits(head: OutputHead, hidden: Tensor) -> Tensor:
    logits = hidden @ head.linear.weight.T * head.scale
    if head.linear.bias is not None:
        logits = logits + head.linear.bias * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, DIM, generator=draw, dtype=torch.float64).to(dtype)
    return hidden, torch.randint(VOCAB, (TOKENS,), generator=draw)


@pytest.fixture(params=[VOCAB, 4 * VOCAB, 10**6], ids=["single rows", "four rows", "all rows"])
def _chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(heads, "WIDE_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", HEADS)
def test_logprobs_and_their_gradients_are_those_of_the_whole_logits(kind: str, temperature: float) -> None:
    head, (hidden, tokens) = head_of(kind), inputs()
    hidden.requires_grad_(True)
    leaves = [hidden, *head.linear.parameters()]
    logprobs, entropy = selected_logprobs(head, hidden, tokens, temperature)
    logits = whole_logits(head, hidden)
    wanted = numerics.selected_logprobs(logits.unsqueeze(0), tokens.unsqueeze(0), temperature)[0]
    assert_close(logprobs, wanted.detach(), EXACT)
    assert_close(entropy, numerics.entropy(logits, temperature).detach(), EXACT)
    assert not entropy.requires_grad
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    got = torch.autograd.grad(logprobs, leaves, upstream)
    for ours, theirs in zip(got, torch.autograd.grad(wanted, leaves, upstream), strict=True):
        assert_close(ours, theirs, EXACT)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("kind", HEADS)
def test_the_kl_to_the_reference_is_that_of_the_whole_logits(kind: str) -> None:
    head, other, (hidden, tokens) = head_of(kind), head_of(kind, seed=1), inputs()
    moved = hidden + 0.1
    logprobs, divergence = reference_logprobs(head, other, hidden, moved, tokens, 0.6)
    policy, reference = whole_logits(head, hidden), whole_logits(other, moved)
    assert_close(divergence, numerics.full_kl(policy, reference, 0.6).detach(), EXACT)
    wanted = numerics.selected_logprobs(reference.unsqueeze(0), tokens.unsqueeze(0), 0.6)[0]
    assert_close(logprobs, wanted.detach(), EXACT)
    assert not reference_logprobs(head, head, hidden, hidden, tokens, 0.6)[1].any()


@pytest.mark.parametrize("frozen", [True, False])
def test_half_precision_keeps_its_statistics_in_float32(frozen: bool) -> None:
    head, (hidden, tokens) = head_of("bias", dtype=torch.bfloat16), inputs(torch.bfloat16)
    head.linear.requires_grad_(not frozen)
    hidden.requires_grad_(True)
    logprobs, entropy = selected_logprobs(head, hidden, tokens)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logits = head.linear(hidden).float()
    wanted = numerics.selected_logprobs(logits.unsqueeze(0), tokens.unsqueeze(0))[0]
    assert_close(logprobs, wanted.detach(), ROUND_OFF)
    logprobs.sum().backward()
    (expected,) = torch.autograd.grad(wanted.sum(), [hidden])
    assert float((hidden.grad - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert (head.linear.weight.grad is None) == frozen


def test_extreme_logits_give_no_nan() -> None:
    head = OutputHead(nn.Linear(1, 3, bias=False))
    head.linear.weight.data = torch.tensor([[200.0], [0.0], [-200.0]])
    hidden = torch.ones(2, 1, requires_grad=True)
    logprobs, entropy = selected_logprobs(head, hidden, torch.tensor([0, 2]))
    logprobs.sum().backward()
    assert_close(logprobs, [0.0, -400.0], ROUND_OFF)
    assert_close(entropy, [0.0, 0.0], ROUND_OFF)
    assert_close(hidden.grad, [[0.0], [-400.0]], ROUND_OFF)


class _Largest(TorchDispatchMode):
    """The most elements of any float32 tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False])
def test_no_float32_tensor_of_all_tokens_and_the_whole_vocabulary_exists(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 4 * VOCAB)
    monkeypatch.setattr(heads, "WIDE_CHUNK_ELEMENTS", 8 * VOCAB)
    head, (hidden, tokens) = head_of("plain", dtype=torch.float32), inputs(torch.float32)
    head.linear.requires_grad_(not frozen)
    hidden.requires_grad_(True)
    with _Largest() as seen:
        selected_logprobs(head, hidden, tokens)[0].sum().backward()
        reference_logprobs(head, head, hidden, hidden, tokens)
    assert 0 < seen.elements <= 8 * VOCAB < TOKENS * VOCAB


def test_the_value_head_is_zero_at_first_and_computes_in_float32() -> None:
    head, (hidden, _) = ValueHead(DIM), inputs(torch.bfloat16)
    values = head(hidden)
    assert values.dtype == torch.float32
    assert values.shape == (TOKENS, 1)
    assert not values.any()
    head.linear.weight.data.fill_(1.0)
    assert_close(head(hidden).detach()[:, 0], hidden.float().sum(dim=1), ROUND_OFF)
