"""What must change nothing: padding, poison in it, the order of a batch, micro-batches, ranks, the number type.

Every masked function of `tether.numerics` goes through the same transformations of its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ragged import Ragged, poisoned, ragged_batches
from tether import numerics
from tolerances import EXACT, ROUND_OFF, assert_close


@dataclass(frozen=True)
class Inputs:
    """What any masked function may be called on."""

    a: Tensor
    b: Tensor
    c: Tensor
    """Three `[batch, response]` tensors."""
    scores: Tensor
    """`[batch]`"""
    mask: Tensor
    denominator: Tensor | float | None = None

    @staticmethod
    def of(batch: Ragged) -> Inputs:
        return Inputs(*[batch.numbers(name) for name in "abc"], batch.scores(), batch.mask)

    def change(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with a change made to each of the three tensors."""
        return replace(self, a=change(self.a), b=change(self.b), c=change(self.c))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.a, self.b, self.c]


PER_TOKEN: dict[str, Callable[[Inputs], Tensor]] = {
    "masked_whiten": lambda x: numerics.masked_whiten(x.a, x.mask),
    "masked_whiten keeping the mean": lambda x: numerics.masked_whiten(x.a, x.mask, shift_mean=False),
    "tethered_rewards": lambda x: numerics.tethered_rewards(x.scores, x.a, x.b, x.mask, 0.3),
    "gae advantages": lambda x: numerics.gae(x.a, x.b, x.mask, 0.9, 0.8)[0],
    "gae returns": lambda x: numerics.gae(x.a, x.b, x.mask, 0.9, 0.8)[1],
}
LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "masked_mean": lambda x: numerics.masked_mean(x.a, x.mask, denominator=x.denominator),
    "clipped_policy_loss": lambda x: numerics.clipped_policy_loss(*x.tensors, x.mask, denominator=x.denominator),
    "clipped_value_loss": lambda x: numerics.clipped_value_loss(*x.tensors, x.mask, denominator=x.denominator),
    "mean squared error": lambda x: numerics.clipped_value_loss(*x.tensors, x.mask, None, denominator=x.denominator),
}
ALL = {**PER_TOKEN, **LOSSES, "explained_variance": lambda x: numerics.explained_variance(x.a, x.b, x.mask)}

every_function = pytest.mark.parametrize("name", ALL)
every_loss = pytest.mark.parametrize("name", LOSSES)
TWO_TOKENS = ragged_batches().filter(lambda batch: int(batch.mask.sum()) > 1)  # explained variance wants a variance


def value_and_gradients(name: str, inputs: Inputs) -> list[Tensor]:
    """The result (real entries in row order, or the scalar), and the gradients of Σ result² at the real entries.

    Fails where a masked entry of a per-token result, or of a gradient, is anything but 0.
    """
    leaves = inputs.change(lambda x: x.clone().requires_grad_())
    result = ALL[name](leaves)
    (result**2).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.tensors]
    for tensor in [*gradients, result] if result.ndim else gradients:
        assert (tensor[~inputs.mask] == 0.0).all()
    return [x.detach()[inputs.mask] if x.ndim else x.detach() for x in (result, *gradients)]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert_close(x, y, EXACT)


@every_function
@given(batch=TWO_TOKENS)
def test_what_stands_in_the_padding_reaches_no_result_and_no_gradient(name: str, batch: Ragged) -> None:
    inputs = Inputs.of(batch)
    clean = inputs.change(lambda x: torch.where(batch.mask, x, 0.0))
    assert_same(value_and_gradients(name, inputs), value_and_gradients(name, clean))


@every_function
@given(batch=TWO_TOKENS, left=st.integers(0, 3), right=st.integers(0, 3))
def test_side_and_amount_of_padding_change_nothing(name: str, batch: Ragged, left: int, right: int) -> None:
    inputs = Inputs.of(batch)
    wide_mask = F.pad(batch.mask, (left, right))
    wide = inputs.change(lambda x: poisoned(F.pad(x, (left, right)), wide_mask))
    assert_same(value_and_gradients(name, replace(wide, mask=wide_mask)), value_and_gradients(name, inputs))


@every_function
@given(batch=TWO_TOKENS, data=st.data())
def test_the_order_of_the_batch_permutes_the_result_and_no_more(name: str, batch: Ragged, data: st.DataObject) -> None:
    inputs = Inputs.of(batch)
    order = torch.tensor(data.draw(st.permutations(range(len(batch.mask)))))
    shuffled = replace(inputs.change(lambda x: x[order]), scores=inputs.scores[order], mask=inputs.mask[order])
    place = torch.zeros(batch.mask.shape, dtype=torch.long)
    place[batch.mask] = torch.arange(int(batch.mask.sum()))  # where each real token stands in the original order
    place = place[order][batch.mask[order]]
    wanted = [x[place] if x.ndim else x for x in value_and_gradients(name, inputs)]
    assert_same(value_and_gradients(name, shuffled), wanted)


def piece(inputs: Inputs, rows: list[int]) -> Inputs:
    """These rows, trimmed to the longest of them, with the token count of the whole batch."""
    width = int(inputs.mask[rows].any(dim=0).nonzero().max()) + 1
    cut = inputs.change(lambda x: x[rows, :width])
    return replace(cut, scores=inputs.scores[rows], mask=inputs.mask[rows, :width], denominator=inputs.mask.sum())


def assert_pieces_add_up(name: str, batch: Ragged, groups: list[list[int]]) -> None:
    in_pieces, whole = (Inputs.of(batch).change(lambda x: x.clone().requires_grad_()) for _ in range(2))
    got = torch.stack([LOSSES[name](piece(in_pieces, rows)) for rows in groups]).sum()
    wanted = LOSSES[name](whole)
    got.backward()
    wanted.backward()
    assert_close(got, wanted, EXACT)
    for x, y in zip(in_pieces.tensors, whole.tensors, strict=True):
        if y.grad is not None:
            assert_close(x.grad, y.grad, EXACT)


@every_loss
@given(batch=ragged_batches(max_batch=6), size=st.integers(1, 6))
def test_micro_batches_with_the_global_denominator_add_up_to_the_whole(name: str, batch: Ragged, size: int) -> None:
    rows = list(range(len(batch.mask)))
    assert_pieces_add_up(name, batch, [rows[i : i + size] for i in range(0, len(rows), size)])


@every_loss
@given(batch=ragged_batches(max_batch=6), ranks=st.integers(1, 4))
def test_ranks_with_the_global_denominator_add_up_to_the_whole(name: str, batch: Ragged, ranks: int) -> None:
    rows = list(range(len(batch.mask)))
    assert_pieces_add_up(name, batch, [mine for rank in range(ranks) if (mine := rows[rank::ranks])])


@every_loss
def test_a_piece_without_a_real_token_adds_nothing(name: str) -> None:
    x, nothing = torch.full((1, 3), float("nan"), requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    result = LOSSES[name](Inputs(x, x, x, torch.zeros(1), nothing, denominator=7.0))
    result.backward()
    assert result == 0.0
    assert (x.grad == 0.0).all()


def test_the_mean_of_micro_batch_means_is_something_else() -> None:
    """Why the denominator must be global: rows of one and of three tokens."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    x = torch.tensor([[4.0, float("nan"), float("nan")], [0.0, 0.0, 0.0]])
    assert numerics.masked_mean(x, mask) == 1.0
    assert torch.stack([numerics.masked_mean(x[i], mask[i]) for i in (0, 1)]).mean() == 2.0


# ── number types, purity ────────────────────────────────────────────────────────────────────────────────────────────
def free_of_mask(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The functions that take no mask, on finite numbers."""
    tokens = torch.zeros(a.shape, dtype=torch.long)
    logits, ref_logits = torch.stack([a, b, a], dim=-1), torch.stack([b, a, a], dim=-1)
    return {
        "selected_logprobs": numerics.selected_logprobs(logits, tokens, 0.7),
        "entropy": numerics.entropy(logits, 0.7),
        "kl_k1": numerics.kl_k1(a, b),
        "kl_k2": numerics.kl_k2(a, b),
        "kl_k3": numerics.kl_k3(a, b),
        "full_kl": numerics.full_kl(logits, ref_logits, 0.7),
        "bradley_terry_loss": numerics.bradley_terry_loss(a[:, 0], b[:, 0]),
    }


def every_result(batch: Ragged, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The result of each function on numbers of a changed type."""
    inputs = replace(Inputs.of(batch).change(change), scores=change(batch.scores()))
    finite = inputs.change(lambda x: torch.where(batch.mask, x, 0.25))
    return {name: call(inputs) for name, call in ALL.items()} | free_of_mask(finite.a, finite.b)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@given(batch=TWO_TOKENS)
def test_half_precision_is_computed_in_float32(half: torch.dtype, batch: Ragged) -> None:
    halves = every_result(batch, lambda x: x.to(half))
    singles = every_result(batch, lambda x: x.to(half).float())
    for name, result in halves.items():
        assert result.dtype == torch.float32, name
        assert torch.equal(result, singles[name]), name


@given(TWO_TOKENS)
def test_float64_stays_float64_and_float32_agrees_with_it(batch: Ragged) -> None:
    doubles = every_result(batch, lambda x: x.float().double())
    singles = every_result(batch, lambda x: x.float())
    for name, result in doubles.items():
        assert (result.dtype, singles[name].dtype) == (torch.float64, torch.float32), name
        if "whiten" not in name and name != "explained_variance":  # these divide by a deviation that may be tiny
            assert_close(singles[name], result, ROUND_OFF)


@given(TWO_TOKENS)
def test_no_argument_is_changed_and_no_random_number_is_drawn(batch: Ragged) -> None:
    inputs = Inputs.of(batch)
    finite = inputs.change(lambda x: torch.where(batch.mask, x, 0.25))
    arguments = [*inputs.tensors, *finite.tensors, inputs.scores, inputs.mask]
    versions, random_state = [x._version for x in arguments], torch.get_rng_state()
    for call in ALL.values():
        call(inputs)
    free_of_mask(finite.a, finite.b)
    assert [x._version for x in arguments] == versions
    assert torch.equal(torch.get_rng_state(), random_state)
