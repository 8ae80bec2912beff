"""The exact world against its own definition, written out in plain loops, and PPO against its optimum."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from tether.errors import InputError
from tether.ladder.exact import main, train_exact
from tether.worlds.exact import ExactWorld, TabularPolicy, chord_law, frontier, optimum, standing
from tolerances import EXACT

SMALL = ExactWorld.create(tokens=3, length=3, prompts=2, seed=7)


def by_hand(world: ExactWorld, logits: torch.Tensor, prompt: int) -> dict[tuple[int, ...], float]:
    """Probability of every response, prefix by prefix, in plain Python."""
    tables = {}
    number = 0
    for length in range(world.length):
        for prefix in itertools.product(range(world.tokens), repeat=length):
            weights = [math.exp(z) for z in logits[prompt, number].tolist()]
            tables[prefix] = [w / sum(weights) for w in weights]
            number += 1
    return {
        response: math.prod(tables[response[:t]][token] for t, token in enumerate(response))
        for response in itertools.product(range(world.tokens), repeat=world.length)
    }


@pytest.mark.parametrize("beta", [0.1, 0.7, 3.0])
def test_the_optimum_is_the_reference_tilted_by_the_score(beta: float) -> None:
    score = kl = objective = 0.0
    for prompt in range(SMALL.prompts):
        reference = by_hand(SMALL, SMALL.reference_logits, prompt)
        scores = dict(zip(reference, SMALL.scores[prompt].tolist(), strict=True))
        z = sum(p * math.exp(scores[y] / beta) for y, p in reference.items())
        tilted = {y: p * math.exp(scores[y] / beta) / z for y, p in reference.items()}
        score += sum(p * scores[y] for y, p in tilted.items()) / SMALL.prompts
        kl += sum(p * math.log(p / reference[y]) for y, p in tilted.items()) / SMALL.prompts
        objective += beta * math.log(z) / SMALL.prompts
    best = optimum(SMALL, beta)
    assert (best.score, best.kl, best.objective) == pytest.approx((score, kl, objective), rel=1e-9)
    assert best.objective == pytest.approx(best.score - beta * best.kl, rel=1e-9)


def test_scores_have_mean_zero_and_deviation_one_under_the_reference() -> None:
    for prompt in range(SMALL.prompts):
        reference = by_hand(SMALL, SMALL.reference_logits, prompt)
        scores = SMALL.scores[prompt].tolist()
        mean = sum(p * s for p, s in zip(reference.values(), scores, strict=True))
        square = sum(p * s * s for p, s in zip(reference.values(), scores, strict=True))
        assert mean == pytest.approx(0.0, abs=EXACT.absolute)
        assert square == pytest.approx(1.0, abs=EXACT.absolute)


def test_regret_is_beta_times_the_divergence_from_the_optimum() -> None:
    beta, logits = (
        0.4,
        SMALL.reference_logits + torch.linspace(-1, 1, SMALL.reference_logits.numel()).view_as(SMALL.reference_logits),
    )
    expected = 0.0
    for prompt in range(SMALL.prompts):
        reference, policy = by_hand(SMALL, SMALL.reference_logits, prompt), by_hand(SMALL, logits, prompt)
        tilt = {
            y: p * math.exp(s / beta)
            for (y, p), s in zip(reference.items(), SMALL.scores[prompt].tolist(), strict=True)
        }
        z = sum(tilt.values())
        expected += beta * sum(p * math.log(p * z / tilt[y]) for y, p in policy.items()) / SMALL.prompts
    assert standing(SMALL, logits, beta).regret == pytest.approx(expected, rel=1e-9)


def test_at_the_reference_flatness_is_one_and_kl_zero_and_at_the_optimum_both_regret_and_flatness_vanish() -> None:
    start = standing(SMALL, SMALL.reference_logits, 0.5)
    assert (start.flatness, start.kl) == pytest.approx((1.0, 0.0), abs=EXACT.absolute)
    best = standing(SMALL, optimal_logits(SMALL, 0.5), 0.5)
    assert (best.flatness, best.regret) == pytest.approx((0.0, 0.0), abs=EXACT.absolute)
    assert best.kl == pytest.approx(optimum(SMALL, 0.5).kl, rel=1e-9)


def optimal_logits(world: ExactWorld, beta: float) -> torch.Tensor:
    """π* as a table: log of the tilted mass that each next token leads to."""
    logits = torch.zeros_like(world.reference_logits)
    for prompt in range(world.prompts):
        reference = by_hand(world, world.reference_logits, prompt)
        tilt = {
            y: p * math.exp(s / beta)
            for (y, p), s in zip(reference.items(), world.scores[prompt].tolist(), strict=True)
        }
        number = 0
        for length in range(world.length):
            for prefix in itertools.product(range(world.tokens), repeat=length):
                for token in range(world.tokens):
                    step = (*prefix, token)
                    logits[prompt, number, token] = math.log(sum(m for y, m in tilt.items() if y[: length + 1] == step))
                number += 1
    return logits


def test_the_frontier_keeps_the_chord_law_and_a_swapped_pair_breaks_it() -> None:
    points = [(best.beta, best.score, best.kl) for best in frontier(SMALL, [0.1, 0.2, 0.5, 1.0, 5.0])]
    assert chord_law(points) == []
    (a, score_a, kl_a), (b, score_b, kl_b), *rest = points
    broken = chord_law([(a, score_b, kl_b), (b, score_a, kl_a), *rest])
    assert broken
    assert "between β = 0.1 and β = 0.2 K rises" in broken[0]


def test_a_slope_outside_the_two_strings_breaks_the_chord_law() -> None:
    assert chord_law([(0.1, 2.0, 10.0), (0.2, 1.3, 5.0)]) == []
    assert "slope Δr/ΔK is 0.3" in chord_law([(0.1, 2.0, 10.0), (0.2, 0.5, 5.0)])[0]
    assert chord_law([(0.1, 2.0, 10.0), (0.2, 0.99, 5.0)], tolerance=0.02) == []
    noisy = [(0.1, 2.0, 10.0), (0.2, 0.9, 5.0)]  # a slope of 0.22: 0.1 points too much gain
    assert chord_law(noisy, errors=[(0.04, 0.0), (0.04, 0.0)]) == []  # two standard errors of a difference: 0.113
    assert chord_law(noisy, errors=[(0.03, 0.0), (0.03, 0.0)]) != []
    assert chord_law([(0.1, 1.0, 5.0), (0.2, 1.0, 5.2)], errors=[(0.1, 0.1), (0.1, 0.1)]) == []
    assert "K rises" in chord_law([(0.1, 1.0, 5.0), (0.2, 1.0, 5.2)], errors=[(0.1, 0.05), (0.1, 0.05)])[0]


def test_a_tabular_policy_samples_what_its_table_says() -> None:
    policy = TabularPolicy(SMALL)
    from tether.batch import Prompts

    draws = torch.rand(20_000, SMALL.length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.full((20_000, 1), SMALL.tokens + 1)
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), ("p1",) * 20_000, tuple(range(20_000)))
    texts = policy.decode(*(lambda g: (g.responses, g.response_mask))(policy.generate(prompts, draws, 1.0)))
    expected = by_hand(SMALL, SMALL.reference_logits, 1)
    chi_square = sum((texts.count(" ".join(map(str, y))) - 20_000 * p) ** 2 / (20_000 * p) for y, p in expected.items())
    assert chi_square < 50  # 26 degrees of freedom: P(> 50) ≈ 0.003, and the draw is fixed


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ppo_reaches_the_optimum_of_its_string(beta: float) -> None:
    world = ExactWorld.create(tokens=4, length=3, prompts=2, seed=1)
    trained = train_exact(world, beta, steps=150)
    assert trained.regret < 0.02
    assert trained.kl == pytest.approx(trained.kl_optimum, rel=0.03)
    assert trained.flatness < 0.05


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(beta=0.5, steps=2, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {"regret", "kl", "kl_optimum", "flatness"} <= set(printed)
    assert printed["kl_optimum"] == pytest.approx(optimum(ExactWorld.create(), 0.5).kl)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_a_string_that_has_no_optimum_is_refused(beta: float) -> None:
    with pytest.raises(InputError, match="beta > 0"):
        main(beta=beta)


def test_a_world_too_large_to_enumerate_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be enumerated"):
        ExactWorld.create(tokens=100, length=4)
