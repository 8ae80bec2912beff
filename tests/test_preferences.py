"""Pairs: how they are sampled, labelled, split, kept and read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tether.batch import Generation, Policy, Prompts
from tether.config import SamplingSettings
from tether.data import read_preferences
from tether.data_rows import split_prompt
from tether.errors import InputError, NonFiniteError
from tether.preferences import Pairs, label, sample_pairs, split_halves
from tether.prompts import PromptSource
from tether.streams import uniforms

SETTINGS = SamplingSettings(max_new_tokens=4)
SOURCE = PromptSource(("red", "green", "blue"), ((1,), (2,), (3,)), prompts_per_batch=2)


class Digits(Policy):
    """A policy of digits: each token is the first digit of its uniform number; `same` answers 0000 to all."""

    def __init__(self, same: bool = False) -> None:
        self.same = same

    def generate(self, prompts: Prompts, draws: torch.Tensor, temperature: float) -> Generation:
        tokens = (draws * (0 if self.same else 10)).long()
        return Generation(
            tokens, torch.ones_like(tokens).bool(), torch.zeros(tokens.shape), torch.ones(len(prompts)).bool()
        )

    def decode(self, responses: torch.Tensor, mask: torch.Tensor) -> list[str]:
        return ["".join(map(str, row)) for row in responses.tolist()]


def digit_sum(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
    return [float(sum(map(int, response))) for response in responses]


def some_pairs(count: int, **columns: object) -> Pairs:
    names = [str(number) for number in range(count)]
    return Pairs(tuple(f"p{n}" for n in names), tuple(f"c{n}" for n in names), tuple(f"r{n}" for n in names), **columns)


def test_pairs_are_two_samples_of_one_prompt_with_their_own_gold_scores() -> None:
    pairs = sample_pairs(Digits(), SOURCE, digit_sum, 5, noise=3.0, settings=SETTINGS, seed=7)
    asked = [text for number in range(3) for text in SOURCE.batch(number).texts][:5]
    assert list(pairs.prompts) == asked
    assert list(pairs.chosen_gold) == digit_sum((), pairs.chosen)
    assert list(pairs.rejected_gold) == digit_sum((), pairs.rejected)
    assert list(pairs.margins) == [a - b for a, b in zip(pairs.chosen_gold, pairs.rejected_gold, strict=True)]
    draws = uniforms(7, "preference", 0, (0, 1, 2, 3), 4)
    drawn = ["".join(str(int(u * 10)) for u in row) for row in draws.tolist()]
    assert {pairs.chosen[0], pairs.rejected[0]} == set(drawn[:2])
    assert {pairs.chosen[1], pairs.rejected[1]} == set(drawn[2:])


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others() -> None:
    def digest(seed: int) -> str:
        return sample_pairs(Digits(), SOURCE, digit_sum, 6, noise=1.0, settings=SETTINGS, seed=seed).digest

    assert digest(1) == digest(1) != digest(2)


def test_how_the_labels_were_made_is_declared() -> None:
    pairs = sample_pairs(Digits(), SOURCE, digit_sum, 4, noise=2.5, settings=SETTINGS, seed=3)
    declared = {"sampled": 4, "replies": 2, "noise": 2.5, "seed": 3, "temperature": 1.0, "max_new_tokens": 4}
    assert dict(pairs.origin) == dict(split_halves(pairs, 0)[0].origin) == declared


def test_progress_counts_the_pairs_found() -> None:
    seen: list[tuple[int, int]] = []
    sample_pairs(
        Digits(), SOURCE, digit_sum, 3, noise=1.0, settings=SETTINGS, seed=0, progress=lambda *now: seen.append(now)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("margin", "noise"), [(0.5, 1.0), (-2.0, 1.0), (0.3, 0.2), (0.0, 1.0), (5.0, 2.0)])
def test_labels_follow_the_law_of_bradley_and_terry(margin: float, noise: float) -> None:
    count = 20_000
    zeros, ones = [0.0] * count, [margin] * count
    pairs = label(("p",) * count, ("left",) * count, ("right",) * count, ones, zeros, noise=noise, seed=11)
    wanted = 1.0 / (1.0 + math.exp(-margin / noise))
    got = pairs.chosen.count("left") / count
    assert abs(got - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / count)


def test_without_noise_the_better_response_always_wins_and_ties_fall_by_a_coin() -> None:
    gold = [float(number % 3) for number in range(3000)]  # against 1: worse, tied, better
    pairs = label(("p",) * 3000, ("l",) * 3000, ("r",) * 3000, gold, (1.0,) * 3000, noise=0.0, seed=0)
    assert [pairs.chosen[row] for row in range(0, 3000, 3)] == ["r"] * 1000
    assert [pairs.chosen[row] for row in range(2, 3000, 3)] == ["l"] * 1000
    ties = [pairs.chosen[row] for row in range(1, 3000, 3)].count("l")
    assert 437 < ties < 563  # 500 ± 4 s.e.


def test_equal_answers_are_passed_over_and_a_policy_of_one_answer_is_refused() -> None:
    class Often(Digits):
        def decode(self, responses: torch.Tensor, mask: torch.Tensor) -> list[str]:
            return [text if row == 2 else "1" for row, text in enumerate(super().decode(responses, mask))]

    pairs = sample_pairs(Often(), SOURCE, digit_sum, 3, noise=1.0, settings=SETTINGS, seed=0)
    assert len(pairs) == 3
    assert all(a != b for a, b in zip(pairs.chosen, pairs.rejected, strict=True))
    with pytest.raises(InputError, match="same response again"):
        sample_pairs(Digits(same=True), SOURCE, digit_sum, 3, noise=1.0, settings=SETTINGS, seed=0)


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_an_impossible_noise_is_refused_before_anything_is_sampled(noise: float) -> None:
    class Mute(Digits):
        generate = None

    with pytest.raises(InputError, match="noise is"):
        sample_pairs(Mute(), SOURCE, digit_sum, 3, noise=noise, settings=SETTINGS, seed=0)


def test_gold_scores_must_be_one_finite_number_a_response() -> None:
    def sample(gold: object) -> Pairs:
        return sample_pairs(Digits(), SOURCE, gold, 3, noise=1.0, settings=SETTINGS, seed=0)

    with pytest.raises(InputError, match="gave 1 entries for 4 responses"):
        sample(lambda prompts, responses: [1.0])
    with pytest.raises(NonFiniteError, match="gold scorer gave nan"):
        sample(lambda prompts, responses: [float("nan")] * len(responses))


def test_each_of_k_replies_is_compared_with_each_other_in_one_group() -> None:
    pairs = sample_pairs(Digits(), SOURCE, digit_sum, 12, noise=1.0, settings=SETTINGS, seed=7, replies=4)
    assert [len(unit) for unit in pairs.units] == [6, 6]
    for unit in pairs.units:
        group = pairs.take(unit)
        assert len(set(group.prompts)) == 1
        assert len({*group.chosen, *group.rejected}) == 4
        assert len({frozenset(both) for both in zip(group.chosen, group.rejected, strict=True)}) == 6
        for reply in {*group.chosen, *group.rejected}:
            assert (*group.chosen, *group.rejected).count(reply) == 3
    with pytest.raises(InputError, match="1 replies a prompt"):
        sample_pairs(Digits(), SOURCE, digit_sum, 4, noise=1.0, settings=SETTINGS, seed=0, replies=1)


def test_halves_never_tear_a_group() -> None:
    pairs = some_pairs(10, groups=(0, 0, 0, 1, 1, 2, 3, 3, 4, 4))
    for seed in range(20):
        first, second = split_halves(pairs, seed)
        assert not set(first.groups) & set(second.groups)
        assert sorted([*first.prompts, *second.prompts]) == sorted(pairs.prompts)
        assert len(set(first.groups)) == 2
    with pytest.raises(InputError, match="in 1 groups"):
        split_halves(some_pairs(6, groups=(0,) * 6), 0)


def test_halves_hold_every_pair_once_and_depend_on_the_seed() -> None:
    pairs = some_pairs(11, chosen_gold=tuple(map(float, range(11))), rejected_gold=(0.0,) * 11)
    first, second = split_halves(pairs, 5)
    assert (len(first), len(second)) == (5, 6)
    assert sorted((*first.prompts, *second.prompts)) == sorted(pairs.prompts)
    for half in (first, second):
        for prompt, chosen, gold in zip(half.prompts, half.chosen, half.chosen_gold, strict=True):
            assert prompt[1:] == chosen[1:] == str(int(gold))
    assert split_halves(pairs, 5)[0] == first != split_halves(pairs, 6)[0]
    with pytest.raises(InputError, match="got 3 preference pairs"):
        split_halves(some_pairs(3), 0)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match="2 prompts and 1 in rejected"):
        Pairs(("a", "b"), ("c", "d"), ("e",))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def written(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_saved_pairs_are_read_back_with_their_gold_scores(tmp_path: Path) -> None:
    pairs = some_pairs(3, chosen_gold=(1.0, 2.5, -3.0), rejected_gold=(0.0, 0.5, 4.0))
    pairs.save(tmp_path / "pairs.jsonl")
    back = read_preferences(tmp_path / "pairs.jsonl")
    assert back.digest == pairs.digest
    assert back.margins == pairs.margins
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_one_comparison_is_the_same_in_all_of_trls_forms(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
        {"prompt": [user("2 + 2 =")], "chosen": [assistant(" 4")], "rejected": [assistant(" 5")]},
        {"chosen": [user("2 + 2 ="), assistant(" 4")], "rejected": [user("2 + 2 ="), assistant(" 5")]},
        {"prompt": "2 + 2 =", "chosen": [assistant(" 4")], "rejected": [assistant(" 5")]},
        {
            "prompt": "2 + 2 =",
            "chosen": [user("2 + 2 ="), assistant(" 4")],
            "rejected": [user("2 + 2 ="), assistant(" 5")],
        },
    ]
    for pairs in (read_preferences(written(tmp_path, *rows)), read_preferences(rows)):
        assert set(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)) == {("2 + 2 =", " 4", " 5")}
    listed = tmp_path / "pairs.json"
    listed.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    assert read_preferences(listed).digest == pairs.digest


def test_a_longer_conversation_stays_one(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("2 + 2?")]
    row = {"chosen": [*before, assistant("4")], "rejected": [*before, assistant("5")]}
    pairs = read_preferences(written(tmp_path, row, row))
    assert pairs.prompts[0] == tuple(before)
    assert (pairs.chosen[0], pairs.rejected[0]) == ("4", "5")


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("yes", "no", ("", "yes", "no")),
        ("Say yes", "Say", ("Say", " yes", "")),
        ("Say yesterday", "Say yes", ("Say", " yesterday", " yes")),
        ("A:\nyes", "A:\nno", ("A:\n", "yes", "no")),
    ],
)
def test_an_implied_prompt_ends_with_a_word(chosen: str, rejected: str, wanted: tuple[str, str, str]) -> None:
    assert split_prompt(chosen, rejected) == wanted
    assert (wanted[0] + wanted[1], wanted[0] + wanted[2]) == (chosen, rejected)


def test_comparisons_of_equal_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    good, same = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}
    pairs = read_preferences(written(tmp_path, good, same, good))
    assert len(pairs) == 2
    assert pairs.origin["identical"] == 1
    with pytest.raises(InputError, match="no comparison of two different responses"):
        read_preferences(written(tmp_path, same, same))


def test_gold_scores_count_only_where_every_row_has_them(tmp_path: Path) -> None:
    scored = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_gold": 1, "rejected_gold": 0.5}
    assert read_preferences(written(tmp_path, scored, scored)).margins == (0.5, 0.5)
    assert read_preferences(written(tmp_path, scored, {"prompt": "p", "chosen": "a", "rejected": "b"})).margins is None


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "holds 0 comparisons; wanted at least 2"),
        ([GOOD], "holds 1 comparison; wanted at least 2"),
        ([GOOD, {"prompt": "p", "better": "a"}], "no chosen and no rejected; found the columns prompt, better"),
        ([GOOD, ["p", "a", "b"]], "row 2 is a list"),
        ([GOOD, GOOD | {"chosen": 3}], r"row 2: chosen is a int \(3\); wanted text"),
        ([GOOD, GOOD | {"prompt": 3}], r"row 2: prompt is a int"),
        ([GOOD, GOOD | {"chosen": None}], "row 2: chosen is null"),
        ([GOOD, GOOD | {"chosen": [assistant("a")]}], "row 2: chosen and rejected are of two kinds"),
        ([GOOD, GOOD | {"chosen": [{"role": "assistant"}], "rejected": [assistant("b")]}], "row 2: chosen is a list"),
        ([GOOD, GOOD | {"chosen": [user("a")], "rejected": [user("b")]}], "last message of chosen is by user"),
        ([GOOD, GOOD | {"chosen": [], "rejected": []}], "last message of chosen is by user"),
        ([GOOD, {"chosen": [assistant("a")], "rejected": [assistant("b")]}], "row 2 has no prompt"),
        ([GOOD, {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]}], "part before"),
        ([GOOD, GOOD | {"chosen_gold": "high", "rejected_gold": 1}], "row 2: chosen_gold is a str"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_clear_complaint(rows: list, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        read_preferences(written(tmp_path, *rows))


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    path.write_text(path.read_text() + "\n" + '{"prompt": "p", "cho')
    with pytest.raises(InputError, match=r"line 3 is no JSON"):
        read_preferences(path)
