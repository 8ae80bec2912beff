"""Rung 1: the trace by hand. σ(½)/½ = 1.244919, σ(1)/½ = 1.462117, σ(−½)/½ = 0.755081."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tether.ladder.bandit import main, render, trace

PINNED = "  # pinned at 1+ε: gradient is zero"


def test_the_lessons_settings_overshoot_once_and_then_nothing_moves():
    assert [step.step for step in trace()] == [0, 1, 2, 3, 4]
    assert [step.logit for step in trace()] == [0.0, 0.5, 0.5, 0.5, 0.5]
    assert [step.ratio for step in trace()] == pytest.approx([1.0] + [1.2449186624037092] * 4, rel=1e-15)
    assert [step.clipped for step in trace()] == [1.0, 1.2, 1.2, 1.2, 1.2]
    assert [step.loss for step in trace()] == [-1.0, -1.2, -1.2, -1.2, -1.2]
    assert [step.gradient for step in trace()] == [-0.5, 0.0, 0.0, 0.0, 0.0]


def test_a_negative_advantage_is_pinned_at_one_minus_epsilon():
    steps = trace(advantage=-1.0)
    assert [step.logit for step in steps] == [0.0, -0.5, -0.5, -0.5, -0.5]
    assert [step.ratio for step in steps] == pytest.approx([1.0] + [0.7550813375962908] * 4, rel=1e-15)
    assert [step.clipped for step in steps] == [1.0, 0.8, 0.8, 0.8, 0.8]
    assert [step.loss for step in steps] == [1.0, 0.8, 0.8, 0.8, 0.8]
    assert [step.gradient for step in steps] == [0.5, 0.0, 0.0, 0.0, 0.0]


def test_without_the_clip_the_ratio_runs_on():
    steps = trace(clip=False)
    wanted = [1.0, 1.2449186624037092, 1.4621171572600098, 1.6351489523872873, 1.7615941559557649]
    assert [step.ratio for step in steps] == pytest.approx(wanted, rel=1e-15)
    assert [step.clipped for step in steps] == [step.ratio for step in steps]
    assert [step.loss for step in steps] == [-step.ratio for step in steps]
    assert all(step.gradient < 0 for step in steps)
    assert trace(clip=False, steps=100)[-1].ratio == pytest.approx(2.0)


def test_a_smaller_step_overshoots_less_and_is_pinned_later():
    steps = trace(learning_rate=0.05, steps=12)
    # σ(z)/½ = 1.2 at z = log(0.6/0.4) = 0.4055, which nine steps of 0.05 are the first to pass
    assert [step.is_pinned for step in steps] == [False] * 9 + [True] * 3
    assert steps[-1].logit == pytest.approx(0.45)
    assert steps[-1].clipped == 1.2 < steps[-1].ratio < 1.23


@pytest.mark.parametrize("advantage", [1.0, -1.0, 2.5, -0.3])
@pytest.mark.parametrize("clip", [True, False])
def test_the_gradient_is_what_torch_finds(advantage, clip):
    for step in trace(advantage=advantage, learning_rate=0.3, steps=6, clip=clip):
        logit = torch.tensor(step.logit, dtype=torch.float64, requires_grad=True)
        ratio = torch.sigmoid(logit) / 0.5
        clipped = ratio.clamp(0.8, 1.2) if clip else ratio
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        loss.backward()
        assert step.loss == pytest.approx(loss.item(), rel=1e-12)
        assert step.gradient == pytest.approx(logit.grad.item(), rel=1e-12)


def test_no_advantage_moves_nothing():
    assert {(step.logit, step.loss, step.gradient) for step in trace(advantage=0.0)} == {(0.0, 0.0, 0.0)}
    assert "-0.0" not in render(trace(advantage=0.0))


def test_the_lines_are_the_lessons_with_the_gradient_beside_the_loss():
    assert render(trace(steps=3)).split("\n") == [
        "step 00 advantage=+1.00 ratio=1.000 clipped=1.000 loss=-1.0000 gradient=-0.5000",
        "step 01 advantage=+1.00 ratio=1.245 clipped=1.200 loss=-1.2000 gradient=+0.0000" + PINNED,
        "step 02 advantage=+1.00 ratio=1.245 clipped=1.200 loss=-1.2000 gradient=+0.0000" + PINNED,
    ]
    assert render(trace(advantage=-1.0, steps=2)).endswith("# pinned at 1−ε: gradient is zero")


def test_main_prints_the_lines_or_one_json_object(capsys):
    main(advantage=-2.0, steps=2)
    assert capsys.readouterr().out == render(trace(advantage=-2.0, steps=2)) + "\n"
    main(steps=2, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [step["clipped"] for step in printed["steps"]] == [1.0, 1.2]
    assert set(printed["steps"][0]) == {"step", "advantage", "ratio", "clipped", "loss", "gradient", "logit"}


def test_huge_logits_do_not_overflow():
    for advantage, limit in ((1.0, 2.0), (-1.0, 0.0)):
        assert trace(advantage=advantage, learning_rate=5000.0, clip=False)[-1].ratio == limit


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"advantage": math.nan}, "advantage is nan"),
        ({"advantage": math.inf}, "advantage is inf"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"clip_range": 0.0}, "clip_range is 0.0"),
        ({"clip_range": -0.2}, "clip_range is -0.2"),
        ({"clip_range": math.nan}, "clip_range is nan"),
        ({"clip_range": math.inf}, "clip_range is inf"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_cannot_be_used_is_named(bad, named):
    with pytest.raises(ValueError, match=named):
        trace(**bad)
