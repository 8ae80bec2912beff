"""`tether.numerics` against `ladder/plain.py`: the same call on tensors and on nested lists, in value and in gradient.

The plain rung has its own formulas and its own autograd, on the standard library. Each function is called with the same
arguments in the same order; masked places hold NaN and infinities in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ragged import Ragged, ragged_batches
from tether import numerics
from tether.ladder import plain
from tether.ladder.scalar import Scalar, gradients, total
from tolerances import EXACT, assert_close

Nested = object  # numbers, or lists of Nested
Call = Callable[[ModuleType, list, object], object]

# Each is called with the module, three grids (and the scores), and the mask, as tensors or as lists.
MASKED: dict[str, Call] = {
    "masked_mean": lambda f, x, mask: f.masked_mean(x[0], mask),
    "masked_mean of a piece": lambda f, x, mask: f.masked_mean(x[0], mask, denominator=17.0),
    "masked_whiten": lambda f, x, mask: f.masked_whiten(x[0], mask),
    "masked_whiten keeping the mean": lambda f, x, mask: f.masked_whiten(x[0], mask, False),
    "tethered_rewards": lambda f, x, mask: f.tethered_rewards(x[3], x[0], x[1], mask, 0.3),
    "tethered_rewards of a slingshot": lambda f, x, mask: f.tethered_rewards(
        x[3], x[0], x[1], mask, -0.3, allow_negative_beta=True
    ),
    "advantages": lambda f, x, mask: f.gae(x[0], x[1], mask, 0.9, 0.8)[0],
    "returns": lambda f, x, mask: f.gae(x[0], x[1], mask, 0.9, 0.8)[1],
    "advantages by default": lambda f, x, mask: f.gae(x[0], x[1], mask)[0],
    "clipped_policy_loss": lambda f, x, mask: f.clipped_policy_loss(x[0], x[1], x[2], mask),
    "clipped_policy_loss of a piece": lambda f, x, mask: f.clipped_policy_loss(
        x[0], x[1], x[2], mask, 0.4, denominator=17.0
    ),
    "clipped_policy_loss of another sampler's tokens": lambda f, x, mask: f.clipped_policy_loss(
        x[0], x[1], x[2], mask, weights=x[1]
    ),
    "clipped_value_loss": lambda f, x, mask: f.clipped_value_loss(x[0], x[1], x[2], mask),
    "clipped_value_loss of a piece": lambda f, x, mask: f.clipped_value_loss(
        x[0], x[1], x[2], mask, 0.4, denominator=17.0
    ),
    "mean squared error": lambda f, x, mask: f.clipped_value_loss(x[0], x[1], x[2], mask, None),
    "explained_variance": lambda f, x, mask: f.explained_variance(x[0], x[1], mask),
}
# Each is called with the module, two grids, two grids of logits, the scores twice, and tokens.
UNMASKED: dict[str, Call] = {
    "kl_k1": lambda f, x, _: f.kl_k1(x[0], x[1]),
    "kl_k2": lambda f, x, _: f.kl_k2(x[0], x[1]),
    "kl_k3": lambda f, x, _: f.kl_k3(x[0], x[1]),
    "selected_logprobs": lambda f, x, tokens: f.selected_logprobs(x[2], tokens, 0.7),
    "selected_logprobs by default": lambda f, x, tokens: f.selected_logprobs(x[2], tokens),
    "entropy": lambda f, x, _: f.entropy(x[2], 0.7),
    "full_kl": lambda f, x, _: f.full_kl(x[2], x[3], 0.7),
    "bradley_terry_loss": lambda f, x, _: f.bradley_terry_loss(x[4], x[5]),
}


def lifted(numbers: Nested) -> Nested:
    """The same lists with a Scalar in each number's place."""
    return [lifted(part) for part in numbers] if isinstance(numbers, list) else Scalar(numbers)


def leaves(numbers: Nested) -> Iterator[object]:
    """All numbers of nested lists, in order."""
    if isinstance(numbers, list):
        for part in numbers:
            yield from leaves(part)
    else:
        yield numbers


def assert_agrees(call: Call, tensors: list[Tensor], last: Tensor) -> None:
    """Value of each entry, and the gradient of a weighted sum of the entries for each number that went in."""
    live = [x.clone().requires_grad_() for x in tensors]
    result = call(numerics, live, last)
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).reshape(result.shape)
    (weights * result).sum().backward()

    lists = [lifted(x.tolist()) for x in tensors]
    plain_result = list(leaves(call(plain, lists, last.tolist())))
    assert_close(result.flatten(), [plain.value_of(number) for number in plain_result], EXACT)
    loss = total(weight * number for weight, number in zip(weights.flatten().tolist(), plain_result, strict=True))
    wanted = iter(gradients(loss, leaves(lists)))
    for x in live:
        got = torch.zeros_like(x) if x.grad is None else x.grad
        assert_close(got.flatten(), [next(wanted) for _ in range(x.numel())], EXACT)


@pytest.mark.parametrize("name", MASKED)
@given(batch=ragged_batches(max_batch=3, max_response=5).filter(lambda batch: int(batch.mask.sum()) > 1))
def test_numerics_is_the_plain_rung_where_there_is_a_mask(name: str, batch: Ragged) -> None:
    grids = [batch.numbers(name, spread=0.5) for name in "abc"]
    assert_agrees(MASKED[name], [*grids, batch.scores()], batch.mask)


@pytest.mark.parametrize("name", UNMASKED)
@given(batch=st.integers(1, 3), response=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_numerics_is_the_plain_rung_where_there_is_none(name: str, batch: int, response: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, response)] * 2 + [(batch, response, 4)] * 2 + [(batch,)] * 2
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    assert_agrees(UNMASKED[name], tensors, torch.randint(4, (batch, response), generator=draw))
