"""The scalar autograd and its optimiser against torch and against central differences."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from tether.ladder.scalar import Adam, Scalar, dot, exp, gradients, log, logsumexp, tanh, total, value_of

FORMULAS = [
    "x + y",
    "x - y",
    "x * y",
    "x / y",
    "-x",
    "2 + x",
    "2 - x",
    "x - 2",
    "2 * x",
    "2 / x",
    "x / 2",
    "x ** 3",
    "x ** -0.5",
    "x ** 0 + 0 * x",
    "x * x * x",
    "exp(x * y)",
    "log(x * y)",
    "tanh(x - y)",
    "max(x * y, x + y)",
    "min(x * y, x + y)",
    "max(1.3, min(x * y, 2.5))",
    "total([x, y, x * y])",
    "dot([x, y, x], [y, y, x * y])",
    "dot([x, y], [3.0, -2.0]) * dot([0.5, 2.0], [y, x])",
    "logsumexp([x, 3 * y, x * y])",
]
PLAIN = {
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "total": total,
    "dot": dot,
    "logsumexp": logsumexp,
    "max": max,
    "min": min,
}


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


TORCH = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "total": lambda xs: torch.stack(xs).sum(),
    "dot": lambda xs, ys: sum(x * y for x, y in zip(xs, ys, strict=True)),
    "logsumexp": lambda xs: torch.stack(xs).logsumexp(0),
    "max": lambda x, y: torch.maximum(tensor(x), tensor(y)),
    "min": lambda x, y: torch.minimum(tensor(x), tensor(y)),
}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("x", "y"), [(0.7, 1.9), (2.2, 0.4), (1.1, 1.7)])
def test_every_operation_has_torchs_value_and_gradient(formula, x, y):
    mine = {"x": Scalar(x), "y": Scalar(y)}
    theirs = {"x": tensor(x).requires_grad_(), "y": tensor(y).requires_grad_()}
    result, wanted = eval(formula, PLAIN | mine), eval(formula, TORCH | theirs)
    assert value_of(result) == pytest.approx(wanted.item(), rel=1e-12)
    assert value_of(eval(formula, PLAIN | {"x": x, "y": y})) == pytest.approx(wanted.item(), rel=1e-12)
    if wanted.requires_grad:
        wanted.backward()
    slopes = [0.0 if leaf.grad is None else leaf.grad.item() for leaf in theirs.values()]
    assert gradients(result, mine.values()) == pytest.approx(slopes, rel=1e-12, abs=1e-15)


def test_a_long_formula_agrees_with_central_differences():
    def formula(numbers):
        a, b, c, d = numbers
        inner = tanh(a * b - c) + log(1 + exp(d)) / (2 + b**2)
        return max(inner, a) * logsumexp([a, b * inner, c]) - dot([inner, d], [d, c]) ** 2

    random = Random(1)
    for _ in range(20):
        point = [random.uniform(-1.5, 1.5) for _ in range(4)]
        leaves = [Scalar(number) for number in point]
        slopes = gradients(formula(leaves), leaves)
        for index, slope in enumerate(slopes):
            h = 1e-6
            up, down = (formula([x + (i == index) * s * h for i, x in enumerate(point)]) for s in (1, -1))
            assert slope == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-7)


def test_a_number_used_twice_adds_up_its_shares():
    x = Scalar(3.0)
    shared = x * 2
    (shared * shared + shared).backward()  # 4x² + 2x
    assert x.gradient == 8 * 3.0 + 2
    assert shared.gradient == 2 * 6.0 + 1


def test_backward_twice_is_backward_once():
    x = Scalar(2.0)
    y = x * x * x
    y.backward()
    y.backward()
    assert x.gradient == 12.0


def test_a_computation_of_any_depth_fits():
    x = y = Scalar(1.0)
    for _ in range(20_000):  # Python's own stack holds a thousand
        y = y + x
    y.backward()
    assert (y.value, x.gradient) == (20_001.0, 20_001.0)


def test_the_larger_one_alone_gets_the_gradient():
    x, y = Scalar(2.0), Scalar(1.0)
    assert gradients(max(x, y), [x, y]) == [1.0, 0.0]
    x, y = Scalar(2.0), Scalar(1.0)
    assert gradients(min(x, y), [x, y]) == [0.0, 1.0]


def test_comparisons_look_at_values():
    assert Scalar(1.0) < Scalar(2.0) <= 2.0
    assert Scalar(3.0) > 2.0 >= Scalar(2.0)
    assert not Scalar(2.0) < 2.0
    assert repr(Scalar(2.0)) == "Scalar(2.0)"


def test_logsumexp_takes_what_exp_cannot():
    assert logsumexp([1000.0, 1000.0]) == pytest.approx(1000 + math.log(2))
    assert logsumexp([-1000.0, -1000.0]) == pytest.approx(-1000 + math.log(2))
    impossible, certain = Scalar(-math.inf), Scalar(5.0)
    assert gradients(logsumexp([impossible, certain]), [impossible, certain]) == [0.0, 1.0]


def test_numbers_without_scalars_stay_numbers():
    for result in (exp(1.0), log(2.0), tanh(0.5), total([1.0, 2.0]), dot([1.0], [2.0]), logsumexp([1.0, 2.0])):
        assert type(result) is float


def test_vectors_of_different_lengths_have_no_product():
    with pytest.raises(ValueError, match="shorter"):
        dot([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("betas", "epsilon"), [((0.9, 0.999), 1e-5), ((0.8, 0.95), 1e-2)])
def test_adam_walks_as_torchs_adam_does(betas, epsilon):
    start, random = [0.3, -1.2, 2.0], Random(2)
    theirs = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    torchs = torch.optim.Adam([theirs], lr=0.05, betas=betas, eps=epsilon)
    mine, optimizer = start, Adam(0.05, betas, epsilon)
    for _ in range(30):
        slopes = [random.gauss(0, 1) * 10 ** random.uniform(-6, 1) for _ in start]
        theirs.grad = torch.tensor(slopes, dtype=torch.float64)
        torchs.step()
        mine = optimizer.step(mine, slopes)
        assert mine == pytest.approx(theirs.tolist(), rel=1e-12)
    assert Adam(0.05).epsilon == 1e-5
