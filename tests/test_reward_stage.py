"""What `tether reward` is made of: pairs held out, fitted and reported on, the reference's own replies, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from stage_data import comparisons, saved_model
from tether.data import read_preferences
from tether.errors import InputError
from tether.loading import parameter_count
from tether.preferences import Pairs
from tether.reward_fit import RewardTraining
from tether.reward_stage import fit_pairs, learn_preferences, own_replies, report_on_pairs, split_off
from tiny_models import build, build_tokenizer

KNOBS = RewardTraining(top_layers=2, learning_rate=3e-3, batch_pairs=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_set_whose_longer_answers_win_is_said_to_be_one() -> None:
    pairs = read_preferences(comparisons(60, longer_wins=True))
    learned = learn_preferences(pairs, build("llama"), KNOBS, tokenizer=build_tokenizer(), heldout=0.5)
    assert learned.data.longer_wins == 1.0
    assert any("longer answers win in these comparisons" in warning for warning in learned.warnings)
    assert any("score and length correlate" in warning for warning in learned.warnings)
    fair = report_on_pairs(read_preferences(comparisons(60)))
    assert (fair.longer_wins, fair.unequal, fair.warnings) == (None, 0, ())


def test_reference_samples_that_are_all_the_same_are_refused_before_anything_is_learned() -> None:
    pairs = read_preferences(comparisons(20))
    with pytest.raises(InputError, match="got 3 reference samples, none different from the others"):
        learn_preferences(pairs, build("llama"), KNOBS, tokenizer=build_tokenizer(), reference=(["w5"] * 3, ["w6"] * 3))


def test_a_small_excess_of_longer_answers_is_no_warning() -> None:
    rows = [("p", "a b", "a")] * 7 + [("p", "a", "a b")] * 3
    pairs = Pairs(*zip(*rows, strict=True))
    assert report_on_pairs(pairs).longer_wins == 0.7
    assert report_on_pairs(pairs).warnings == ()
    many = Pairs(*zip(*rows * 10, strict=True))
    assert "70% of them" in report_on_pairs(many).warnings[0]


def test_comparisons_that_stand_twice_are_warned_of() -> None:
    row = comparisons(1)[0]
    report = report_on_pairs(read_preferences([row, row, *comparisons(5, seed=1)]))
    assert report.duplicates == 1
    assert "1 comparisons stand in the data more than once" in report.warnings[0]


def test_what_is_measured_was_not_learned() -> None:
    pairs = read_preferences(comparisons(50))
    learned, measured = split_off(pairs, 0.2, seed=3)
    assert (len(learned), len(measured)) == (40, 10)
    keys = [set(zip(half.prompts, half.chosen, half.rejected, strict=True)) for half in (learned, measured)]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == set(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True))
    assert [len(half) for half in split_off(pairs.take([0, 1]), 0.01, seed=0)] == [1, 1]
    with pytest.raises(InputError, match="wanted at least 2 groups and 0 < heldout < 1"):
        split_off(pairs, 1.0, seed=0)


def test_comparisons_of_the_same_replies_are_learned_or_measured_together() -> None:
    pairs = replace(read_preferences(comparisons(30)), groups=tuple(number // 3 for number in range(30)))
    learned, measured = split_off(pairs, 0.2, seed=0)
    assert learned.groups is not None
    assert measured.groups is not None
    assert (len(learned), len(measured)) == (24, 6)
    assert not set(learned.groups) & set(measured.groups)


def test_pairs_that_are_too_long_go_by_the_rule() -> None:
    base, tokenizer = build("llama"), build_tokenizer()  # 64 positions
    story = " ".join(f"w{n % 80 + 5}" for n in range(62))
    rows = [comparisons(1)[0], {"prompt": story, "chosen": " w1 w2 w3", "rejected": " w4"}]
    pairs = read_preferences(rows)
    assert fit_pairs(pairs, base, tokenizer=tokenizer) is pairs
    with pytest.raises(InputError, match="tokens together; the reward model reads 1 to 64"):
        learn_preferences(pairs, base, KNOBS, tokenizer=tokenizer, heldout=0.5)
    dropped = fit_pairs(pairs, base, "drop", tokenizer=tokenizer)
    assert dropped.prompts == pairs.prompts[:1]
    assert (dropped.origin["dropped"], dropped.origin["shortened"]) == (1, 0)
    cut = fit_pairs(pairs, base, "truncate_left", tokenizer=tokenizer)
    assert cut.prompts[0] == pairs.prompts[0]
    assert story.endswith(f" {cut.prompts[1]}")
    assert 60 <= len(str(cut.prompts[1]).split()) <= 61  # 64 less three words, and a stop where one is read
    learn_preferences(cut, base, KNOBS, tokenizer=tokenizer, heldout=0.5)
    assert (cut.chosen, cut.origin["dropped"], cut.origin["shortened"]) == (pairs.chosen, 0, 1)
    with pytest.raises(InputError, match="all 1 pairs are too long"):
        fit_pairs(pairs.take([1]), base, "drop", tokenizer=tokenizer)
    talk = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    with pytest.raises(InputError, match="no chat template"):
        fit_pairs(Pairs((tuple(talk),), ("a",), ("b",)), base, "drop", tokenizer=tokenizer)


def test_own_replies_are_the_checkpoints_and_go_round_the_prompts(model: Path) -> None:
    told: list[tuple[int, int]] = []
    prompts, replies = own_replies(
        model, ["w5", "w6", "w5", " ".join(["w7"] * 70)], 5, max_new_tokens=3, progress=lambda *now: told.append(now)
    )
    assert len(prompts) == len(replies) == 5
    assert set(prompts) == {"w5", "w6"}  # the fourth leaves no room for a reply
    assert all(1 <= len(reply.split()) <= 3 or reply == "" for reply in replies)
    assert told[-1] == (5, 5)
    assert own_replies(model, ["w5", "w6"], 5, max_new_tokens=3)[1] == replies


def test_the_size_of_a_body_is_that_of_its_weights(model: Path) -> None:
    assert parameter_count(model) == AutoModelForCausalLM.from_pretrained(model).num_parameters()


@pytest.mark.parametrize(("replies", "tokens"), [(0, 3), (2, 0), (2, -3)])
def test_replies_of_no_length_are_refused(replies: int, tokens: int, model: Path) -> None:
    with pytest.raises(InputError, match=f"got replies={replies} and max_new_tokens={tokens}; wanted at least 1 of"):
        own_replies(model, ["w5"], replies, max_new_tokens=tokens)
