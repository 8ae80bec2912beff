"""Gains over the reference, and what is left of them at equal length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tether.evaluation import gain

RANDOM = np.random.default_rng(0)


def test_the_gain_at_equal_length_is_the_intercept_of_least_squares() -> None:
    before, longer = RANDOM.normal(size=40), RANDOM.integers(-5, 30, size=40).astype(float)
    after = before + 0.3 + 0.1 * longer + RANDOM.normal(scale=0.2, size=40)
    told = gain(*(torch.tensor(x) for x in (after, before, longer)))
    design = np.stack([np.ones(40), longer], axis=1)
    coefficients, residual, *_ = np.linalg.lstsq(design, after - before, rcond=None)
    spread = np.linalg.inv(design.T @ design) * residual[0] / 38
    assert told.at_equal_length == pytest.approx(coefficients[0], rel=1e-9)
    assert told.at_equal_length_se == pytest.approx(math.sqrt(spread[0, 0]), rel=1e-9)
    assert told.mean == pytest.approx(np.mean(after - before), rel=1e-12)
    assert told.se == pytest.approx(np.std(after - before, ddof=1) / math.sqrt(40), rel=1e-12)


def test_a_gain_that_length_alone_makes_vanishes_at_equal_length() -> None:
    longer = torch.arange(20.0, dtype=torch.float64)
    told = gain(0.5 * longer, torch.zeros(20, dtype=torch.float64), longer)
    assert told.mean == pytest.approx(4.75)
    assert told.at_equal_length == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("longer", [[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
def test_lengths_that_all_differ_alike_leave_the_gain_as_it_is(longer: list[float]) -> None:
    told = gain(torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.zeros(4), torch.tensor(longer))
    assert (told.at_equal_length, told.at_equal_length_se) == (told.mean, told.se)
    assert told.mean == 3.0


def test_two_prompts_are_too_few_to_take_length_out() -> None:
    told = gain(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([1.0, 5.0]))
    assert told.at_equal_length == told.mean == 1.5
