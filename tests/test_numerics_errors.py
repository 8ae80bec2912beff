"""Bad input to `tether.numerics`: one error of tether's own tree, which says what was got and what to do."""

from __future__ import annotations

from collections.abc import Callable

import jaxtyping
import pytest
import torch
from torch import Tensor

from tether import numerics
from tether.errors import EmptyMaskError, InputError, NonFiniteError, ShapeError, TetherError

NAN, INFINITY = float("nan"), float("inf")
ROWS, WIDE, MASK = torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool)
LOGITS, TOKENS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
NOTHING = torch.zeros(2, 3, dtype=torch.bool)
ONE_EMPTY_ROW = torch.tensor([[True, True, False], [False, False, False]])


def rewards(scores: Tensor | None = None, mask: Tensor = MASK, beta: float | Tensor = 0.1) -> Tensor:
    return numerics.tethered_rewards(torch.zeros(2) if scores is None else scores, ROWS, ROWS, mask, beta)


def token(number: int) -> Tensor:
    return torch.tensor([[0, number, 0], [0, 0, 0]])


Case = tuple[Callable[[], object], type[TetherError], str, str]

SHAPES: dict[str, Case] = {
    name: (call, ShapeError, got, "wanted one shape for all")
    for name, call, got in [
        ("masked_mean", lambda: numerics.masked_mean(WIDE, MASK), "x [2, 4], mask [2, 3]"),
        ("masked_whiten", lambda: numerics.masked_whiten(ROWS, MASK[:1]), "x [2, 3], mask [1, 3]"),
        ("kl_k1", lambda: numerics.kl_k1(ROWS, WIDE), "logprobs [2, 3], ref_logprobs [2, 4]"),
        ("kl_k2", lambda: numerics.kl_k2(ROWS, WIDE), "logprobs [2, 3], ref_logprobs [2, 4]"),
        ("kl_k3", lambda: numerics.kl_k3(ROWS, WIDE), "logprobs [2, 3], ref_logprobs [2, 4]"),
        ("full_kl", lambda: numerics.full_kl(LOGITS, LOGITS[..., :4]), "logits [2, 3, 5], ref_logits [2, 3, 4]"),
        ("gae", lambda: numerics.gae(ROWS, WIDE, MASK), "rewards [2, 3], values [2, 4], mask [2, 3]"),
        ("gae, mask", lambda: numerics.gae(ROWS, ROWS, MASK[:, :1]), "mask [2, 1]"),
        ("policy loss", lambda: numerics.clipped_policy_loss(ROWS, ROWS, ROWS[:1], MASK), "advantages [1, 3]"),
        ("policy loss, mask", lambda: numerics.clipped_policy_loss(WIDE, WIDE, WIDE, MASK), "mask [2, 3]"),
        ("value loss", lambda: numerics.clipped_value_loss(ROWS, WIDE, ROWS, MASK), "old_values [2, 4]"),
        ("value loss, unclipped", lambda: numerics.clipped_value_loss(ROWS, WIDE, ROWS, MASK, None), "[2, 4]"),
        ("explained_variance", lambda: numerics.explained_variance(ROWS, WIDE, MASK), "returns [2, 4]"),
        (
            "bradley_terry",
            lambda: numerics.bradley_terry_loss(ROWS[0], WIDE[0]),
            "chosen_scores [3], rejected_scores [4]",
        ),
        ("rewards", lambda: numerics.tethered_rewards(torch.zeros(2), ROWS, WIDE, MASK, 0.1), "ref_logprobs [2, 4]"),
        ("rewards, mask", lambda: rewards(mask=MASK[:1]), "mask [1, 3]"),
    ]
} | {
    "tokens": (
        lambda: numerics.selected_logprobs(LOGITS, TOKENS[:, :2]),
        ShapeError,
        "tokens [2, 2]",
        "[batch, response, vocab]",
    ),
    "logits of one row": (
        lambda: numerics.selected_logprobs(LOGITS[0], TOKENS[0]),
        ShapeError,
        "logits [3, 5]",
        "[batch, response, vocab]",
    ),
    "scores": (lambda: rewards(torch.zeros(3)), ShapeError, "scores [3]", "one score a response: [2]"),
    "scores a token": (lambda: rewards(torch.zeros(2, 3)), ShapeError, "scores [2, 3]", "one score a response: [2]"),
    "rewards of one row": (
        lambda: numerics.tethered_rewards(ROWS[0], ROWS[0], ROWS[0], MASK[0], 0.1),
        ShapeError,
        "[3]",
        "[batch, response]",
    ),
    "gae of one row": (lambda: numerics.gae(ROWS[0], ROWS[0], MASK[0]), ShapeError, "[3]", "[batch, response]"),
}

EMPTY: dict[str, Case] = {
    name: (call, EmptyMaskError, got, why)
    for name, call, got, why in [
        ("masked_mean", lambda: numerics.masked_mean(ROWS, NOTHING), "mask [2, 3]", "mean over no token"),
        ("masked_whiten", lambda: numerics.masked_whiten(ROWS, NOTHING), "mask [2, 3]", "mean over no token"),
        (
            "policy loss",
            lambda: numerics.clipped_policy_loss(ROWS, ROWS, ROWS, NOTHING),
            "[2, 3]",
            "mean over no token",
        ),
        ("value loss", lambda: numerics.clipped_value_loss(ROWS, ROWS, ROWS, NOTHING), "[2, 3]", "mean over no token"),
        (
            "explained_variance",
            lambda: numerics.explained_variance(ROWS, ROWS, NOTHING),
            "[2, 3]",
            "mean over no token",
        ),
        (
            "a row without a token",
            lambda: rewards(mask=ONE_EMPTY_ROW),
            "row 1 of the mask",
            "still has one action, its EOS",
        ),
        ("no pair", lambda: numerics.bradley_terry_loss(ROWS[0, :0], ROWS[0, :0]), "no pair", "at least one"),
    ]
}

NUMBERS: dict[str, Case] = (
    {
        "negative beta": (lambda: rewards(beta=-0.1), InputError, "beta is -0.1;", "allow_negative_beta=True"),
        "negative beta, tensor": (
            lambda: rewards(beta=torch.tensor([[0.5], [-0.5]])),
            InputError,
            "beta is -0.5;",
            "allow_negative_beta=True",
        ),
        "NaN beta": (lambda: rewards(beta=NAN), NonFiniteError, "beta is nan", "finite number ≥ 0"),
        "infinite beta": (lambda: rewards(beta=INFINITY), NonFiniteError, "beta is inf", "finite number ≥ 0"),
        "NaN score": (lambda: rewards(torch.tensor([0.0, NAN])), NonFiniteError, "score 1 is nan", "finite number"),
        "infinite score": (
            lambda: rewards(torch.tensor([-INFINITY, 0.0])),
            NonFiniteError,
            "score 0 is -inf",
            "finite number",
        ),
        "NaN in a pair": (
            lambda: numerics.bradley_terry_loss(torch.tensor([0.0, NAN]), ROWS[0, :2]),
            NonFiniteError,
            "pair 1",
            "check scores",
        ),
        "infinite in a pair": (
            lambda: numerics.bradley_terry_loss(torch.tensor([INFINITY]), ROWS[0, :1]),
            NonFiniteError,
            "pair 0",
            "check scores",
        ),
        "token −100": (
            lambda: numerics.selected_logprobs(LOGITS, token(-100)),
            InputError,
            "-100…0",
            "any valid token",
        ),
        "token too large": (
            lambda: numerics.selected_logprobs(LOGITS, token(5)),
            InputError,
            "0…5; wanted 0…4",
            "any valid token",
        ),
    }
    | {
        f"temperature {t} in {name}": (lambda t=t, call=call: call(t), InputError, f"temperature is {t}", "above 0")
        for t in (0.0, -1.0, NAN)
        for name, call in [
            ("selected_logprobs", lambda t: numerics.selected_logprobs(LOGITS, TOKENS, t)),
            ("entropy", lambda t: numerics.entropy(LOGITS, t)),
            ("full_kl", lambda t: numerics.full_kl(LOGITS, LOGITS, t)),
        ]
    }
    | {
        f"clip {clip} in the {name} loss": (
            lambda clip=clip, loss=loss: loss(ROWS, ROWS, ROWS, MASK, clip),
            InputError,
            f"clip_range is {clip}",
            "usually 0.2",
        )
        for clip in (0.0, -0.2, NAN)
        for name, loss in [("policy", numerics.clipped_policy_loss), ("value", numerics.clipped_value_loss)]
    }
    | {
        f"{name} {number}": (
            lambda name=name, number=number: numerics.gae(ROWS, ROWS, MASK, **{name: number}),
            InputError,
            f"{name} is {number}",
            "in [0, 1]",
        )
        for name in ("gamma", "lam")
        for number in (-0.1, 1.1, NAN)
    }
    | {
        f"denominator {number}": (
            lambda number=number: numerics.masked_mean(ROWS, MASK, denominator=number),
            InputError,
            f"denominator is {float(number)}",
            "number of real tokens of the whole batch",
        )
        for number in (0.0, -1.0, NAN, INFINITY, torch.tensor(0))
    }
)

FLOAT_MASKS: dict[str, Case] = {
    name: (call, InputError, "mask has dtype torch.float32", "try mask.bool()")
    for name, call in [
        ("masked_mean", lambda: numerics.masked_mean(ROWS, MASK.float())),
        ("masked_whiten", lambda: numerics.masked_whiten(ROWS, MASK.float())),
        ("tethered_rewards", lambda: rewards(mask=MASK.float())),
        ("gae", lambda: numerics.gae(ROWS, ROWS, MASK.float())),
        ("policy loss", lambda: numerics.clipped_policy_loss(ROWS, ROWS, ROWS, MASK.float())),
        ("value loss", lambda: numerics.clipped_value_loss(ROWS, ROWS, ROWS, MASK.float())),
        ("explained_variance", lambda: numerics.explained_variance(ROWS, ROWS, MASK.float())),
    ]
}

CASES = [
    pytest.param(*case, id=f"{group}: {name}")
    for group, cases in {"shape": SHAPES, "empty": EMPTY, "number": NUMBERS, "float mask": FLOAT_MASKS}.items()
    for name, case in cases.items()
]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("call", "error", "got", "remedy"), CASES)
def test_bad_input_is_one_clear_error(
    call: Callable[[], object], error: type[TetherError], got: str, remedy: str
) -> None:
    with pytest.raises(error) as complaint:
        call()
    assert type(complaint.value) is error
    assert isinstance(complaint.value, ValueError)
    assert got in str(complaint.value)
    assert remedy in str(complaint.value)


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_numbers_at_the_edge_of_what_is_allowed_are_allowed() -> None:
    assert rewards(beta=0.0).tolist() == ROWS.tolist()
    for edge in (0.0, 1.0):
        numerics.gae(ROWS, ROWS, MASK, edge, edge)
    numerics.selected_logprobs(LOGITS, token(4), 1e-3)
    numerics.masked_mean(ROWS, NOTHING, denominator=1e-9)
    numerics.clipped_value_loss(ROWS, ROWS, ROWS, NOTHING, None, denominator=torch.tensor(3))


def test_a_wrong_shape_fails_at_the_annotation_in_every_test_run() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        numerics.gae(ROWS, WIDE, MASK)
