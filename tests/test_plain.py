"""The loop in the standard library: its policy, its update against a torch version of it, its learning, its output."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F

import tether
from tether.ladder import plain
from tether.ladder.plain import (
    LENGTH,
    VOCABULARY,
    Adam,
    Report,
    RewardModel,
    TinyPolicy,
    adapted_beta,
    compare,
    decode,
    encode,
    estimate,
    finetune,
    fit_reward_model,
    gold,
    losses,
    pad,
    roll_out,
    shorten,
    update,
)
from tether.ladder.scalar import Scalar, gradients, value_of

PROMPTS = [[1], [2], [0, 2], [1, 1], [3], [2]]
LADDER = Path(tether.__file__).parent / "ladder"


def drawn(seed, vocab=5, hidden=3):
    """A policy whose every parameter is drawn, biases and value head included."""
    random = Random(seed)
    policy = TinyPolicy.untrained(vocab, LENGTH, hidden, random)
    policy.assign([random.gauss(0.0, 0.7) for _ in policy.numbers()])
    return policy


def in_torch(policy):
    """The parameters as float64 leaves, by name."""
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in vars(policy).items()}


def torch_forward(p, prompts, responses):
    before = torch.tensor([[prompt[-1], *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)])
    hidden = torch.tanh(F.embedding(before, p["embedding"]) + p["position"][: before.shape[1]])
    return F.linear(hidden, p["output"], p["output_bias"]), hidden @ p["value_weight"] + p["value_bias"]


@pytest.fixture(scope="module")
def rollout():
    return roll_out(drawn(1), drawn(2), PROMPTS, Random(3))


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_forward_pass_and_its_gradient_are_torchs():
    policy, responses = drawn(1), [[4, 0, 2, 1, 3], [1, 1, 0, 0, 0]]
    live, p = policy.lifted(), in_torch(policy)
    logits, values = live.forward(PROMPTS[:2], responses)
    wanted_logits, wanted_values = torch_forward(p, PROMPTS[:2], responses)
    assert [[[z.value for z in row] for row in rows] for rows in logits] == [
        [pytest.approx(row, rel=1e-12) for row in rows] for rows in wanted_logits.tolist()
    ]
    assert [[v.value for v in row] for row in values] == [pytest.approx(r, rel=1e-12) for r in wanted_values.tolist()]
    (wanted_logits.logsumexp(-1).sum() * wanted_values.square().sum()).backward()
    mine = plain.total(plain.log_softmax(row)[0] * -1 + row[0] for rows in logits for row in rows)
    mine = mine * plain.total(v * v for row in values for v in row)
    slopes = [slope for leaf in p.values() for slope in leaf.grad.flatten().tolist()]
    assert gradients(mine, live.numbers()) == pytest.approx(slopes, rel=1e-10, abs=1e-12)


def test_the_parameters_go_out_in_a_row_and_come_back():
    policy = drawn(1)
    copy = deepcopy(policy)
    assert len(policy.numbers()) == 5 * 3 + LENGTH * 3 + 5 * 3 + 5 + 3 + 1
    copy.assign(range(len(policy.numbers())))
    assert copy.embedding[0] == [0, 1, 2]
    assert copy.value_bias == len(policy.numbers()) - 1
    copy.assign(policy.numbers())
    assert copy == policy


def test_a_lifted_policy_is_a_copy():
    policy = drawn(1)
    live = policy.lifted()
    assert all(isinstance(number, Scalar) for number in live.numbers())
    assert [number.value for number in live.numbers()] == policy.numbers() == drawn(1).numbers()


def test_a_response_ends_with_its_first_eos_or_at_the_cap():
    policy, random = drawn(1), Random(0)
    responses = [policy.respond([1], random) for _ in range(200)]
    assert {len(response) for response in responses} == {1, 2, 3, 4, 5}
    assert all(plain.EOS not in response[:-1] for response in responses)
    assert all(len(response) == LENGTH or response[-1] == plain.EOS for response in responses)


@pytest.mark.usefixtures("unchecked_shapes")
def test_tokens_are_drawn_with_the_policys_probabilities():
    policy, random = drawn(1), Random(0)
    drawn_first = [policy.respond([1], random)[0] for _ in range(2000)]
    logits, _ = torch_forward(in_torch(policy), [[1]], [[0]])
    for token, probability in enumerate(logits.softmax(-1)[0, 0].tolist()):
        error = math.sqrt(probability * (1 - probability) / 2000)
        assert drawn_first.count(token) / 2000 == pytest.approx(probability, abs=4 * error)


# ── the checkpoint and the reward model ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("unchecked_shapes")
def test_finetuning_makes_the_demonstrations_likely():
    policy = TinyPolicy.untrained(len(VOCABULARY), LENGTH, 8, Random(0))
    finetune(policy)
    demonstrations = {line.split(": ")[1] for line in plain.DEMONSTRATIONS}
    random = Random(1)
    said = [decode(policy.respond(encode("string"), random)) for _ in range(200)]
    assert sum(line in demonstrations for line in said) > 150


@pytest.mark.parametrize(
    ("response", "liked"),
    [
        ("rises up .", 1),
        ("holds gently .", 2),
        ("drifts away .", -1),
        ("gently gently gently gently gently", -3),
        (".", 0),
    ],
)
def test_people_like_a_word_once_and_no_repetition(response, liked):
    assert gold(encode(response)) == liked


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_reward_model_learns_the_taste_and_is_scaled_to_mean_zero_and_deviation_one():
    reference = TinyPolicy.untrained(len(VOCABULARY), LENGTH, 8, Random(0))
    chosen, rejected = compare(reference, Random(1))
    model = fit_reward_model(chosen, rejected)
    scores = torch.tensor([model.score(response) for response in [*chosen, *rejected]], dtype=torch.float64)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert scores.std(correction=0).item() == pytest.approx(1.0, rel=1e-12)
    liked, disliked = encode("gently rises holds"), encode("away")
    assert min(model.weights[word] for word in liked) > max(model.weights[word] for word in disliked)


def test_a_score_counts_words_and_leaves_out_the_eos():
    model = RewardModel([100.0, 1.0, 2.0], gain=3.0, centre=0.5)
    assert model.score([1, 2, 2, plain.EOS]) == 3.0 * (1.0 + 2.0 + 2.0 - 0.5)


# ── the rollout ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_eos_is_real_and_the_padding_is_not():
    responses, mask = pad([[3, 0], [1, 2, 3, 4, 1]])
    assert responses == [[3, 0, 0, 0, 0], [1, 2, 3, 4, 1]]
    assert mask == [[True, True, False, False, False], [True] * 5]


def test_a_rollout_holds_what_both_policies_think_of_its_tokens(rollout):
    tokens = torch.tensor(rollout.responses)
    for seed, got in ((1, rollout.logprobs), (2, rollout.ref_logprobs)):
        logits, values = torch_forward(in_torch(drawn(seed)), rollout.prompts, rollout.responses)
        wanted = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        assert got == [pytest.approx(row, rel=1e-12) for row in wanted.tolist()]
        if seed == 1:
            assert rollout.values == [pytest.approx(row, rel=1e-12) for row in values.tolist()]
    mask = torch.tensor(rollout.mask)
    drift = (torch.tensor(rollout.logprobs) - torch.tensor(rollout.ref_logprobs)).masked_fill(~mask, 0.0)
    assert rollout.mean_kl() == pytest.approx(drift.sum(1).mean().item(), rel=1e-6)
    assert [len(answer) for answer in rollout.answers()] == mask.sum(1).tolist()


def test_a_policy_that_is_its_reference_has_not_drifted():
    assert roll_out(drawn(1), drawn(1), PROMPTS, Random(3)).mean_kl() == 0.0


# ── the update ──────────────────────────────────────────────────────────────────────────────────────────────────────
SCORES = [1.0, -0.5, 2.0, 0.3, -1.2, 0.0]
MINIBATCHES = [[4, 0, 2], [5, 1, 3]]


def torch_update(policy, rollout, scores, beta, minibatches, settings):
    """One whole update in torch, written for this test: loops over rows for the advantages, torch for the rest."""
    p, mask = in_torch(policy), torch.tensor(rollout.mask)
    grids = rollout.logprobs, rollout.ref_logprobs, rollout.values
    old, ref, old_values = (torch.tensor(grid, dtype=torch.float64) for grid in grids)
    advantages = torch.zeros_like(old)
    for row in range(len(mask)):
        rewards = -beta * (old[row] - ref[row])
        last = int(mask[row].nonzero().max())
        rewards[last] += scores[row]
        after = torch.zeros(2, dtype=torch.float64)  # value and advantage of the next token
        for t in range(last, -1, -1):
            delta = rewards[t] + settings["gamma"] * after[0] - old_values[row, t]
            advantages[row, t] = delta + settings["gamma"] * settings["lam"] * after[1]
            after = torch.stack([old_values[row, t], advantages[row, t]])
    returns = advantages + old_values
    if settings["whiten"]:
        real = advantages[mask]
        advantages = (advantages - real.mean()) / (real.var(correction=0) + 1e-8).sqrt()
    optimizer = torch.optim.Adam(p.values(), lr=0.01, eps=1e-5)
    for rows in minibatches * settings["epochs"]:
        m, tokens = mask[rows], torch.tensor([rollout.responses[row] for row in rows])
        logits, values = torch_forward(p, [rollout.prompts[row] for row in rows], tokens.tolist())
        logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ratio, a, epsilon = (logprobs - old[rows]).exp()[m], advantages[rows][m], settings["clip_range"]
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a)
        error = (values - returns[rows])[m] ** 2
        value_loss = error.mean()
        if settings["value_clip_range"] is not None:
            radius = settings["value_clip_range"]
            near = old_values[rows] + (values - old_values[rows]).clamp(-radius, radius)
            value_loss = 0.5 * torch.maximum(error, (near - returns[rows])[m] ** 2).mean()
        optimizer.zero_grad()
        (settings["value_coef"] * value_loss - surrogate.mean()).backward()
        if settings["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(p.values(), settings["max_grad_norm"])
        optimizer.step()
    return [number for leaf in p.values() for number in leaf.detach().flatten().tolist()]


DEFAULTS = {
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "epochs": 4,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten": True,
    "max_grad_norm": None,
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"value_clip_range": None, "value_coef": 0.5, "whiten": False},
        {"clip_range": 0.05, "value_clip_range": 0.01, "gamma": 0.9, "lam": 0.6},
        {"max_grad_norm": 0.05, "epochs": 2},
    ],
)
def test_one_whole_update_ends_in_the_parameters_that_torch_ends_in(rollout, changed):
    policy = drawn(1)
    update(policy, Adam(0.01), rollout, SCORES, beta=0.3, minibatches=MINIBATCHES, **changed)
    wanted = torch_update(drawn(1), rollout, SCORES, 0.3, MINIBATCHES, DEFAULTS | changed)
    assert policy.numbers() == pytest.approx(wanted, rel=1e-9, abs=1e-11)
    assert max(abs(a - b) for a, b in zip(policy.numbers(), drawn(1).numbers(), strict=True)) > 0.01


def filled(x, mask, filling):
    """x with this filling in the place of padding."""
    return [
        [entry if is_real else filling for entry, is_real in zip(row, real, strict=True)]
        for row, real in zip(x, mask, strict=True)
    ]


def test_padding_never_changes_an_update(rollout):
    first, second = drawn(1), drawn(1)
    grids = ("logprobs", "ref_logprobs", "values")
    poison = {name: filled(getattr(rollout, name), rollout.mask, math.nan) for name in grids}
    spoilt = replace(rollout, responses=filled(rollout.responses, rollout.mask, 4), **poison)
    for policy, batch in ((first, rollout), (second, spoilt)):
        update(policy, Adam(0.01), batch, SCORES, beta=0.3, minibatches=MINIBATCHES, epochs=2)
    assert not all(map(all, rollout.mask))
    assert first == second


def test_before_the_first_step_every_ratio_is_one(rollout):
    """So the policy loss is minus the mean advantage: zero, once whitened."""
    experience = estimate(rollout, SCORES, beta=0.3)
    policy_loss, value_loss = losses(drawn(1).lifted(), experience, range(6))
    mask = torch.tensor(rollout.mask)
    errors = torch.tensor(rollout.values, dtype=torch.float64) - torch.tensor(experience.returns, dtype=torch.float64)
    assert value_of(policy_loss) == pytest.approx(0.0, abs=1e-14)
    assert value_of(value_loss) == pytest.approx(0.5 * errors[mask].square().mean().item(), rel=1e-13)


def test_the_outcome_holds_the_mean_losses_and_the_reference_does_not_move(rollout):
    policy, reference = drawn(1), drawn(2)
    outcome = update(policy, Adam(1e-9), rollout, SCORES, beta=0.3, minibatches=[range(6)])
    assert outcome.policy_loss == pytest.approx(0.0, abs=1e-7)
    assert outcome.experience.rollout is rollout
    assert reference == drawn(2)


def test_an_update_needs_a_minibatch(rollout):
    with pytest.raises(ValueError, match="got 4 epochs of 0 minibatches"):
        update(drawn(1), Adam(0.01), rollout, SCORES, beta=0.3, minibatches=[])


def test_a_long_gradient_is_shortened_and_a_short_one_is_left():
    assert shorten([3.0, 4.0], 1.0) == pytest.approx([0.6, 0.8], rel=1e-6)
    assert shorten([3.0, 4.0], 10.0) == shorten([3.0, 4.0], None) == [3.0, 4.0]


# ── the string ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 512 / 10_000), (60.0, 1.01024), (5.7, 1 - 0.05 * 512 / 10_000), (0.0, 1 - 0.01024)],
)
def test_beta_grows_where_the_drift_is_beyond_the_target_and_shrinks_below(kl, factor):
    assert adapted_beta(0.1, kl, 6.0, 512, 10_000) == pytest.approx(0.1 * factor, rel=1e-12)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────
def started(*arguments):
    """A run in a process of its own, at full speed: without the type checks of the test run."""
    program = f"from tether.ladder.plain import main; main({', '.join(arguments)})"
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def runs():
    """Three runs of thirty updates: the string as it comes, cut, and very short."""
    programs = {beta: started("steps=30", f"beta={beta}", "json=True") for beta in (0.3, 0.0, 5.0)}
    return {beta: json.loads(program.communicate()[0])["steps"] for beta, program in programs.items()}


def late(run, name):
    return sum(step[name] for step in run[-10:]) / 10


def test_on_the_string_the_reward_rises_and_the_kl_stays_in_a_band(runs):
    run = runs[0.3]
    assert run[0]["kl"] == 0.0
    assert late(run, "reward") > run[0]["reward"] + 0.5
    assert late(run, "gold") > run[0]["gold"] + 0.5
    assert 0.5 < late(run, "kl") < 2.0


def test_with_the_string_cut_the_reward_goes_to_the_moon_and_people_like_it_less(runs):
    run = runs[0.0]
    assert late(run, "reward") > late(runs[0.3], "reward") + 1.5
    assert late(run, "kl") > 10.0
    assert late(run, "gold") < run[0]["gold"] - 1.0


def test_on_a_very_short_string_the_policy_stays_where_it_was(runs):
    assert late(runs[5.0], "kl") < late(runs[0.3], "kl") / 4
    assert late(runs[5.0], "reward") < late(runs[0.3], "reward") - 0.5


def test_main_prints_the_lessons_lines_and_repeats_itself_exactly(runs):
    lines = started("steps=12").communicate()[0].splitlines()
    form = r"step \d{3} reward=[+-]\d\.\d\d kl=-?\d+\.\d{3} policy_loss=[+-]\d\.\d{3} value_loss=\d\.\d\d"
    assert all(re.fullmatch(form, line) for line in lines[:3])
    assert lines[:3] == [str(Report(**runs[0.3][step])) for step in (0, 10, 11)]
    assert [line.split()[0] for line in lines[3:]] == ["what", "reference", "policy"]


def test_with_a_target_beta_answers_the_drift_of_each_update():
    steps = json.loads(started("steps=5", "target_kl=0.2", "json=True").communicate()[0])["steps"]
    for before, after in pairwise(steps):
        assert after["beta"] == pytest.approx(adapted_beta(before["beta"], before["kl"], 0.2, 32, 320), rel=1e-12)
    assert len({step["beta"] for step in steps}) == 5


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"beta": -0.1}, "beta is -0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta": math.inf}, "beta is inf"),
        ({"target_kl": 0.0}, "target_kl is 0"),
    ],
)
def test_what_cannot_be_used_is_named(bad, complaint):
    with pytest.raises(ValueError, match=complaint):
        plain.main(**bad)


@pytest.mark.parametrize("name", ["bandit", "plain", "formulas", "scalar"])
def test_nothing_but_the_standard_library_is_imported(name):
    imported = set()
    for node in ast.walk(ast.parse((LADDER / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    others = {module for module in imported if module.split(".")[0] not in sys.stdlib_module_names}
    assert others <= {"tether.ladder.formulas", "tether.ladder.scalar"}
