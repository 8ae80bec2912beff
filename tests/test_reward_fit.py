"""How many steps a reward model is given: as many as are said, or as many as pairs set aside call for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tether import reward_fit
from tether.compared import Compared, compare
from tether.config import UpdateSettings
from tether.data import read_preferences
from tether.errors import InputError
from tether.optimiser import Optimiser
from tether.preferences import Pairs
from tether.reward_fit import RewardTraining, fit
from tether.reward_model import RewardModel
from tether.reward_report import measure, report_on
from tether.reward_stage import report_on_pairs
from tether.reward_training import train_reward_model, untrained
from tether.streams import permutation
from tiny_models import build, build_tokenizer
from tolerances import Tolerance, assert_close

KNOBS = RewardTraining(top_layers=None, epochs=2, learning_rate=1e-3, batch_pairs=4)
ADAM = Tolerance(relative=0.0, absolute=1e-3)
"""Of losses in nats: Adam's first steps have the size of the rate however small the gradient is."""
CHOSEN = replace(KNOBS, epochs=12, validation=0.2)


USUAL_SPREAD = 0.02
"""Of the weights of a body that was never trained."""


def keyword_pairs(count: int, *, noise: float = 0.0, seed: int = 0) -> Pairs:
    """The chosen answer holds w40 among words drawn at random; a share `noise` of the labels is turned round."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        good, bad = ([f"w{draw.randrange(50, 90)}" for _ in range(4)] for _ in range(2))
        good[draw.randrange(4)] = "w40"
        sides = (good, bad) if draw.random() >= noise else (bad, good)
        chosen, rejected = (f" {' '.join(side)}" for side in sides)
        rows.append({"prompt": f"w{draw.randrange(5, 25)}", "chosen": chosen, "rejected": rejected})
    return read_preferences(rows)


def started(pairs: Pairs, architecture: str = "llama") -> tuple[RewardModel, Compared]:
    model = untrained(build(architecture), build_tokenizer(), top_layers=None, seed=0, dtype="float32")
    return model, compare(model, pairs)


def weights(model: RewardModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.trainable()])


def test_passes_as_said_are_adams_with_a_rate_that_falls_to_zero() -> None:
    """Oracle: torch's own Adam and log-sigmoid, pair by pair, in the order of the seeded permutation."""
    pairs = keyword_pairs(12)
    model, compared = started(pairs)
    told: list[float] = []
    fit(model, compared, replace(KNOBS, learning_rate=3e-3), lambda done, total, loss: told.append(loss))
    wanted = []
    twin, _ = started(pairs)
    body = twin.model.requires_grad_(True).model
    adam = torch.optim.Adam(twin.model.parameters(), lr=1.0, eps=1e-5)
    orders = [permutation(0, "pairs", 12, epoch).tolist() for epoch in range(2)]
    batches = [order[first : first + 4] for order in orders for first in range(0, 12, 4)]
    for step, batch in enumerate(batches):
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / len(batches))
        losses = []
        for place in batch:
            sides = [side[place] for side in (pairs.chosen, pairs.rejected)]
            rows = [torch.tensor([row]) for row in twin.encode([pairs.prompts[place]] * 2, sides)]
            good, bad = (twin.model.score(body(input_ids=row).last_hidden_state[0, -1])[0] for row in rows)
            losses.append(-torch.nn.functional.logsigmoid(good - bad))
        wanted.append(torch.stack(losses).mean().item())
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
        adam.step()
    assert_close(torch.tensor(told), wanted, ADAM)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "qwen2"])
def test_a_random_body_learns_a_keyword_from_a_hundred_pairs(architecture: str) -> None:
    pairs, unseen = keyword_pairs(100), keyword_pairs(60, seed=1)
    body = build(architecture)
    with torch.no_grad():
        for weight in body.parameters():
            weight.mul_(USUAL_SPREAD / 0.3 if weight.dim() > 1 else 1.0)
    knobs = {"top_layers": None, "learning_rate": 1e-3, "dtype": "float32", "epochs": 12, "validation": 0.2}
    model = train_reward_model(pairs, body, tokenizer=build_tokenizer(), **knobs)
    report = report_on(model, unseen, trained_on=pairs)
    assert report.accuracy >= report.floor_accuracy - 2 * max(report.floor_gap_se, 1 / 60)
    told = model.manifest.details["training"]
    assert isinstance(told, dict)
    assert (told["validation_pairs"], told["validation"]) == (20, 0.2)


def test_pairs_that_teach_nothing_are_seen_fewer_times_than_pairs_that_do() -> None:
    taught, confused = (
        fit(*started(keyword_pairs(60, noise=noise)), replace(CHOSEN, batch_pairs=8), None) for noise in (0.0, 0.5)
    )
    assert taught is not None
    assert confused is not None
    assert confused.passes < taught.passes
    assert taught.validation_loss < 0.5 < confused.validation_loss


def test_the_pairs_set_aside_are_whole_groups_that_are_not_learned() -> None:
    pairs = replace(keyword_pairs(60), groups=tuple(place // 2 for place in range(60)))
    _, compared = started(pairs)
    learned, aside = reward_fit._set_aside(compared, CHOSEN)
    assert (len(learned.pairs), len(aside.pairs)) == (48, 12)
    assert learned.pairs.groups is not None
    assert aside.pairs.groups is not None
    assert not set(learned.pairs.groups) & set(aside.pairs.groups)


def test_the_steps_that_were_best_are_made_again_on_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-loss of the pairs set aside is fed in: best at the second look, then worse to the end."""
    told: list[tuple[int, int]] = []
    looks = iter([0.6, 0.5, *[0.9] * 50])
    monkeypatch.setattr(reward_fit, "PATIENT_STEPS", 30)
    monkeypatch.setattr(reward_fit, "RATES", (1.0,))
    monkeypatch.setattr(reward_fit._Run, "look", lambda *_: next(looks))
    monkeypatch.setattr(reward_fit, "_log_loss", lambda *_: 0.4)
    chosen = fit(*started(keyword_pairs(40)), CHOSEN, lambda done, total, loss: told.append((done, total)))
    # 32 pairs learned in the trial, 8 steps a pass and 12 passes: looks at 5, 10, …; best at 10, given up at 30.
    assert chosen is not None
    assert (chosen.validation_loss, chosen.passes, chosen.learned_all) == (0.5, 1.25, True)
    assert told[29] == (30, 192)
    assert told[-1] == (42, 42)  # 10 of 96 steps are 12 of 120, the steps of all pairs


def test_another_rate_is_tried_where_a_bag_of_words_does_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-loss of the pairs set aside is fed in: three times the rate is the best of all."""
    rates: list[float] = []

    class Noting(Optimiser):
        def __init__(self, groups: dict[str, list[torch.nn.Parameter]], settings: UpdateSettings) -> None:
            super().__init__(groups, settings)
            rates.append(self.adam.param_groups[0]["lr"])

    monkeypatch.setattr(reward_fit, "Optimiser", Noting)
    monkeypatch.setattr(reward_fit._Run, "look", lambda *_: 0.3 if rates[-1] == 3e-3 else 0.6)
    monkeypatch.setattr(reward_fit, "_log_loss", lambda *_: 0.2)
    slow, usual, fast = 1e-3 / 3, 1e-3, 3e-3
    for floor, tried, best in ((0.1, [usual, fast, slow], fast), (0.5, [usual, fast], fast), (0.7, [usual], usual)):
        monkeypatch.setattr(reward_fit, "_floor", lambda *_, floor=floor: floor)
        rates.clear()
        told: list[int] = []
        chosen = fit(
            *started(keyword_pairs(40)), replace(CHOSEN, epochs=1), lambda done, *_, told=told: told.append(done)
        )
        assert chosen is not None
        assert (chosen.chosen_rate, chosen.validation_floor) == (best, floor)
        assert rates == pytest.approx([*tried, best])  # the last is that of the steps on all pairs
        assert told == list(range(1, len(told) + 1))
        assert len(tried) * 8 <= len(told) < len(tried) * 8 + 10


def test_a_second_training_that_went_astray_is_left_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(reward_fit, "_log_loss", lambda reward, _: (seen.append(weights(reward)), float(len(seen)))[1])
    model, compared = started(keyword_pairs(40))
    chosen = fit(model, compared, replace(CHOSEN, epochs=1), None)
    assert chosen is not None
    assert not chosen.learned_all
    assert torch.equal(weights(model), seen[0])  # the look that was best
    assert not torch.equal(weights(model), seen[-1])


def test_of_too_few_pairs_none_is_set_aside() -> None:
    assert fit(*started(keyword_pairs(reward_fit.FEWEST_GROUPS - 1)), replace(CHOSEN, epochs=1), None) is None


def test_a_model_below_a_bag_of_words_is_said_to_be_below_the_floor() -> None:
    """The bag of words knows w40 after forty pairs; scores are made up, right on 97 % or on half of sixty others."""
    learned, heldout = keyword_pairs(40), keyword_pairs(60, seed=1)
    for wrong, told in ((0, None), (2, "which may be chance"), (30, "below the floor: a bag of words reaches 1.000")):
        margins = torch.ones(60)
        margins[:wrong] = -1.0
        report = measure(margins, torch.zeros(60), heldout, learned)
        gap = (margins > 0).double()
        assert report.floor_accuracy == 1.0
        assert report.floor_gap_se == pytest.approx(float(gap.std(correction=0)) / 60**0.5)
        warnings = [warning for warning in report.warnings if "bag of words" in warning]
        assert bool(warnings) == (told is not None)
        assert told is None or told in warnings[0]


def test_signs_of_scripts_without_spaces_count_as_words() -> None:
    """Chosen and rejected have one run of signs each; 好 stands in every chosen one."""
    draw = random.Random(0)
    signs = "天地人山水火木金土日月星"
    rows = []
    for _ in range(60):
        good, bad = ([draw.choice(signs) for _ in range(5)] for _ in range(2))
        good[draw.randrange(5)] = "好"
        rows.append({"prompt": "问", "chosen": "".join(good), "rejected": "".join(bad)})
    pairs = read_preferences(rows)
    margins = torch.zeros(60)
    assert measure(margins, margins, pairs, pairs).floor_accuracy > 0.95
    longer = read_preferences([row | {"chosen": row["chosen"] + "天地人"} for row in rows])
    assert any("longer answers win" in warning for warning in report_on_pairs(longer).warnings)


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_share_that_leaves_too_little_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"wanted a share from 0 to 0\.5"):
        replace(KNOBS, validation=share)
