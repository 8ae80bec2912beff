"""Rewards made of others: sums and ensembles against plain loops, lists by look-up, numbers for tokens and steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rollout_of import rollout_of
from tether.batch import JudgesRollouts, Prompt, Rollout, ScoresRollouts, Sequences
from tether.config import RewardSettings
from tether.errors import InputError, NonFiniteError, RewardError
from tether.metrics import CATALOGUE
from tether.probes import RewardProbe
from tether.reward_model import RewardModel
from tether.reward_sources import Ensemble, Listed, WeightedSum
from tether.rewards import tether
from tether.scores import score
from tether.token_rewards import StepRewards, TokenRewards
from tiny_models import build_tokenizer
from tolerances import EXACT, ROUND_OFF, assert_close

P, R = ("p0", "p1", "p2"), ("a", "bb", "ccc")


def rollout(texts: tuple[str, ...] = R, lengths: tuple[int, ...] = (3, 1, 2), **columns: tuple[object, ...]) -> Rollout:
    made = rollout_of(list(lengths))
    return replace(made, texts=texts, prompts=replace(made.prompts, texts=P[: len(texts)], columns=columns))


def constant(numbers: list[float]) -> Callable[..., list[float]]:
    return lambda prompts, responses: numbers


def length(prompts, responses):
    return [float(len(response)) for response in responses]


def known(prompts, responses, answer):
    return [float(len(word)) for word in answer]


class Reader:
    """A reward that must be given the rollout."""

    def __call__(self, prompts, responses, **columns):
        raise AssertionError("asked by texts")

    def score_rollout(self, rollout: Rollout) -> list[float]:
        return rollout.sequences.response_lengths.tolist()


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────────
NUMBERS = st.lists(st.floats(-100, 100), min_size=3, max_size=3)


@given(st.lists(st.tuples(NUMBERS, st.floats(-3, 3)), min_size=1, max_size=4))
def test_a_weighted_sum_is_the_sum_of_its_parts_and_logs_their_means(parts: list[tuple[list[float], float]]) -> None:
    reward = WeightedSum({f"part_{k}": (constant(numbers), weight) for k, (numbers, weight) in enumerate(parts)})
    wanted = [math.fsum(weight * numbers[row] for numbers, weight in parts) for row in range(3)]
    assert reward(P, R) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    got = score(reward, rollout())
    assert_close(got.scores, wanted, ROUND_OFF)
    for k, (numbers, _) in enumerate(parts):
        assert got.metrics[f"score/part/part_{k}"] == pytest.approx(sum(numbers) / 3, abs=1e-9)
        assert f"score/part/part_{k}" in CATALOGUE


def test_each_part_gets_the_columns_that_it_takes_and_reads_rollouts_where_it_can() -> None:
    reward = WeightedSum({"reader": (Reader(), 10), "known": (known, 1.0), "length": length})
    assert isinstance(reward, ScoresRollouts)
    assert isinstance(reward, JudgesRollouts)
    batch = rollout(answer=("x", "yy", "zzz"), other=(0, 0, 0))
    assert score(reward, batch).scores.tolist() == [10 * 3 + 1 + 1, 10 * 1 + 2 + 2, 10 * 2 + 3 + 3]
    assert reward.score_rollout(batch) == [32.0, 14.0, 26.0]
    texts = WeightedSum({"known": (known, 2.0), "length": (length, -0.5)})
    assert texts(P, R, answer=("x", "yy", "zzz"), other=(0, 0, 0)) == [1.5, 3.0, 4.5]


def test_a_reward_model_inside_a_sum_scores_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=97, num_labels=1, max_position_embeddings=32, **sizes)
    model = RewardModel.load(LlamaForSequenceClassification(config), build_tokenizer())
    batch = rollout(("w5", "w6 w7", "w8"))
    alone, asked = model(batch.prompts.texts, batch.texts), []
    whole = RewardModel.score_rollout

    def score_rollout(self: RewardModel, rollout: Rollout) -> list[float]:
        asked.append(rollout)
        return whole(self, rollout)

    monkeypatch.setattr(RewardModel, "score_rollout", score_rollout)
    got = score(WeightedSum({"model": (model, 2.0), "length": (length, 1.0)}), batch)
    assert asked == [batch]
    wanted = [2 * a + len(text) for a, text in zip(alone, batch.texts, strict=True)]
    assert_close(got.scores, wanted, ROUND_OFF)


def test_a_users_function_is_not_called_for_a_check_wherever_it_stands() -> None:
    calls = []

    def counted(prompts, responses):
        calls.append(len(responses))
        return length(prompts, responses)

    batch = rollout()
    tokens = TokenRewards(lambda prompts, responses, response_ids: [[0.0] * len(ids) for ids in response_ids])
    for reward in (counted, WeightedSum({"a": counted, "b": tokens}), Ensemble([counted, length]), tokens):
        probe = RewardProbe(reward, batch)
        assert list(probe.check(batch, score(constant([1.0, 2.0, 3.0]), batch))) == []
    assert calls == []


def test_sums_and_ensembles_nest_and_keep_their_names_apart() -> None:
    pair = Ensemble([constant([1.0, 2.0, 3.0]), constant([3.0, 2.0, 1.0])])
    inner = WeightedSum({"tone": constant([1.0, 1.0, 4.0]), "pair": pair})
    got = score(WeightedSum({"style": (inner, 0.5), "pair": (pair, 1.0), "length": length}), rollout())
    assert got.scores.tolist() == [0.5 * 3 + 2 + 1, 0.5 * 3 + 2 + 2, 0.5 * 6 + 2 + 3]
    shown = {name: number for name, number in got.metrics.items() if name.count("/") > 1}
    assert shown == pytest.approx(
        {
            "score/part/style": 4.0, "score/part/style/tone": 2.0, "score/part/style/pair": 2.0,
            "score/part/pair": 2.0, "score/part/length": 2.0,
            "score/spread/pair": 2 / 3, "score/spread/style/pair": 2 / 3,
        }
    )  # fmt: skip
    assert all(name in CATALOGUE for name in shown)


def test_a_part_that_fails_is_named() -> None:
    def broken(prompts, responses):
        raise ValueError("out of order")

    for bad, error, said in [
        (broken, RewardError, "the reward function broken failed"),
        (constant([1.0, math.nan, 2.0]), NonFiniteError, "nan for response 1"),
        (constant([1.0]), InputError, "1 entries for 3 responses"),
        (lambda p, r: [[1.0, 2.0]] * 3, InputError, "TokenRewards"),
    ]:
        for reward in (WeightedSum({"fine": length, "bad": bad}), Ensemble([length, bad])):
            with pytest.raises(error, match=said):
                score(reward, rollout())
            with pytest.raises(error, match=said):
                reward(P, R)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "got no reward"),
        ({"a/b": length}, "called 'a/b'"),
        ({"": length}, "called ''"),
        ({"a": (length, math.nan)}, "weight of 'a' is nan"),
        ({"a": (length, "1")}, "weight of 'a' is '1'"),
        ({"a": 3.0}, r"'a' is 3\.0; wanted a reward"),
        ({"a": ("org/model", 1.0)}, "as_reward makes one of a path"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_parts_that_make_no_sum_are_refused(parts: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        WeightedSum(parts)


# ── ensembles ───────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.lists(NUMBERS, min_size=2, max_size=5), st.floats(0, 2))
def test_an_ensemble_is_the_mean_the_least_or_the_mean_less_the_variance(
    members: list[list[float]], penalty: float
) -> None:
    columns = list(zip(*members, strict=True))
    means = [sum(column) / len(column) for column in columns]
    variances = [
        sum((x - mean) ** 2 for x in column) / len(column) for column, mean in zip(columns, means, strict=True)
    ]
    wanted = {
        "mean": means,
        "min": [min(column) for column in columns],
        "variance": [mean - penalty * variance for mean, variance in zip(means, variances, strict=True)],
    }
    judges = [constant(numbers) for numbers in members]
    for by, numbers in wanted.items():
        reward = Ensemble(judges, by, penalty)
        assert_close(torch.tensor(reward(P, R), dtype=torch.float64), numbers, ROUND_OFF)
        got = score(reward, rollout())
        assert_close(got.scores, numbers, ROUND_OFF)
        spread = sum(math.sqrt(variance) for variance in variances) / 3
        assert got.metrics["score/spread"] == pytest.approx(spread, abs=1e-6)


def test_an_ensemble_reads_rollouts_where_its_members_can() -> None:
    assert score(Ensemble([Reader(), length]), rollout()).scores.tolist() == [2.0, 1.5, 2.5]


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_makes_no_ensemble_is_refused() -> None:
    for arguments, said in [
        (([length],), "1 member; wanted two or more"),
        (([length, length], "max"), "by is 'max'; wanted 'mean', 'min' or 'variance'"),
        (([length, length], "variance", -1.0), "penalty is -1"),
        (([length, length], "variance", math.nan), "penalty is nan"),
        (([length, "org/model"],), "'1' is 'org/model'; wanted a reward"),
    ]:
        with pytest.raises(InputError, match=said):
            Ensemble(*arguments)
    tokens = TokenRewards(lambda prompts, responses, response_ids: [[0.0] * len(ids) for ids in response_ids])
    with pytest.raises(InputError, match="one score a response from each"):
        score(Ensemble([tokens, length]), rollout())


# ── lists ───────────────────────────────────────────────────────────────────────────────────────────────────────────
CHAT = [{"role": "user", "content": "p1"}]


def test_a_list_scores_the_pairs_that_it_holds(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p0", "response": "a", "score": 1},
        {"prompt": CHAT, "response": "bb", "score": -2.5, "source": "hand"},
        {"prompt": "p0", "response": "bb", "score": 0.0},
        {"prompt": "p0", "response": "a", "score": 1.0},  # the same again
    ]
    file = tmp_path / "scores.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    prompts: list[Prompt] = ["p0", [dict(reversed(CHAT[0].items()))], "p0"]
    columns = {name: [row[name] for row in rows] for name in ("prompt", "response", "score")}
    for listed in (Listed(rows), Listed(file), Listed(str(file)), Listed(iter(rows)), Listed(columns)):
        assert listed(prompts, ["bb", "bb", "a"], answer=["x"] * 3) == [0.0, -2.5, 1.0]
    assert Listed({("p0", "a"): 3, ("p1", "bb"): 4.5})(["p1", "p0"], ["bb", "a"]) == [4.5, 3.0]
    assert score(Listed({("p0", "a"): 3, ("p1", "bb"): 4.5, ("p2", "ccc"): 0}), rollout()).scores.tolist() == [
        3,
        4.5,
        0,
    ]


def test_a_pair_that_is_not_listed_is_named() -> None:
    listed = Listed({("p0", "a"): 3.0, ("p1", "bb"): 4.5})
    with pytest.raises(InputError, match=r"another response to this prompt: row 1 is \('p1', 'b'\), and 2 pairs"):
        listed(["p0", "p1"], ["a", "b"])
    with pytest.raises(InputError, match=r"nothing to this prompt: row 2 is \('p2', 'ccc'\).*PPO samples new ones"):
        score(listed, rollout())


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([{"prompt": "p", "score": 1.0}], InputError, "row 1 lacks response; .* found: prompt, score"),
        ([{"prompt": "p", "response": None, "score": 1.0}], InputError, "row 1 has None as response to 'p'"),
        ([{"prompt": None, "response": "r", "score": 1.0}], InputError, "row 1 has 'r' as response to None"),
        ([{"prompt": "p", "response": "r", "score": None}], InputError, "row 1 gave None"),
        ([{"prompt": "p", "response": "r", "score": math.nan}], NonFiniteError, "row 1 gave nan"),
        ({("p", "r"): math.inf}, NonFiniteError, "gave inf"),
        ({("p", "r", "s"): 1.0}, InputError, r"the key \('p', 'r', 's'\); wanted \(prompt, response\)"),
        (["p"], InputError, "row 1 lacks prompt, response, score"),
        (
            [{"prompt": "p", "response": "r", "score": number} for number in (1, 2)],
            InputError,
            r"\('p', 'r'\) twice: 1 and 2",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_list_that_cannot_be_used_is_one_complaint(given: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Listed(given)  # type: ignore[arg-type]


def test_a_file_that_is_no_list_is_one_complaint(tmp_path: Path) -> None:
    (tmp_path / "word.jsonl").write_text('"word"', encoding="utf-8")
    with pytest.raises(InputError, match="wanted prompt, response, score"):
        Listed(tmp_path / "word.jsonl")
    with pytest.raises(InputError, match="there is no file"):
        Listed(tmp_path / "none.jsonl")


# ── tokens and steps ────────────────────────────────────────────────────────────────────────────────────────────────
def per_token(prompts, responses, response_ids):
    return [[0.1 * (row + 1) * (place + 1) for place in range(len(ids))] for row, ids in enumerate(response_ids)]


def test_token_rewards_stand_on_their_tokens_where_they_are_asked_for_by_name() -> None:
    batch = rollout()
    seen = []

    def function(prompts, responses, response_ids, answer):
        seen.append((prompts, responses, response_ids, answer))
        return per_token(prompts, responses, response_ids)

    got = score(TokenRewards(function), replace(batch, prompts=replace(batch.prompts, columns={"answer": (1, 2, 3)})))
    ids = [batch.sequences.responses[row][batch.response_mask[row]].tolist() for row in range(3)]
    assert seen == [(P, R, ids, (1, 2, 3))]
    assert got.token_rewards is not None
    assert_close(got.token_rewards, [[0.1, 0.2, 0.3], [0.2, 0.0, 0.0], [0.3, 0.6, 0.0]], ROUND_OFF)
    assert got.scores.tolist() == [0.0, 0.0, 0.0]
    assert got.metrics["score/mean"] == pytest.approx(1.7 / 3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 1000))
def test_what_a_sum_of_scores_and_token_rewards_pays_is_conserved(lengths: list[int], beta: float, seed: int) -> None:
    made = rollout_of(lengths, seed)
    batch = replace(made, texts=R[: len(lengths)], prompts=replace(made.prompts, texts=P[: len(lengths)]))
    reward = WeightedSum({"tokens": (TokenRewards(per_token), 2.0), "length": (length, -0.5), "more": per_step_like()})
    paid = tether(score(reward, batch), batch, beta, RewardSettings(missing_eos="keep")).rewards
    for row, tokens in enumerate(lengths):
        numbers = [0.1 * (row + 1) * (place + 1) for place in range(tokens)]
        kl = sum(float(batch.logprobs[row, t] - batch.ref_logprobs[row, t]) for t in range(tokens))
        wanted = 2.0 * sum(numbers) - 0.5 * len(R[row]) + 7.0 * tokens - beta * kl
        assert float(paid[row].sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        ell = float(batch.logprobs[row, 0] - batch.ref_logprobs[row, 0])
        if tokens > 1:
            assert float(paid[row, 0]) == pytest.approx(2.0 * numbers[0] + 7.0 - beta * ell, rel=1e-5, abs=1e-5)


def per_step_like() -> TokenRewards:
    return TokenRewards(lambda prompts, responses, response_ids: [[7.0] * len(ids) for ids in response_ids])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([1.0, 2.0, 3.0], InputError, "gave 1.0; wanted a list of numbers for response 0, one a token"),
        ([[1.0, 2.0, 3.0], [1.0], [1.0]], InputError, "gave 1 numbers for response 2, which has 2 tokens"),
        ([[1.0, 2.0, 3.0], [1.0]], InputError, "2 entries for 3 responses"),
        ([[1.0, 2.0, 3.0], [1.0], [1.0, None]], InputError, "gave None for token 1 of response 2"),
        ([[1.0, math.nan, 3.0], [1.0], [1.0, 2.0]], NonFiniteError, "gave nan for token 1 of response 0"),
        (None, InputError, "gave None; wanted a list of 3 lists"),
    ],
)
def test_token_rewards_that_do_not_fit_the_tokens_are_one_complaint(
    given: object, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        score(TokenRewards(lambda prompts, responses: given), rollout())


def test_by_texts_alone_token_rewards_are_their_sum() -> None:
    function = TokenRewards(lambda prompts, responses: [[1.0] * len(response) for response in responses])
    assert function(P, R) == [1.0, 2.0, 3.0]
    assert WeightedSum({"tokens": (function, 2.0)})(P, R) == [2.0, 4.0, 6.0]
    with pytest.raises(InputError, match="wants the column 'response_ids'"):
        TokenRewards(per_token)(P, R)


def word_tokenizer(eos: str = "$") -> PreTrainedTokenizerFast:
    """Characters as tokens; `/` and `//` are tokens too, `$` the end unless told."""
    vocab = {token: number for number, token in enumerate("$abc/")} | {"//": 5, "a/": 6}
    words = Tokenizer(models.WordLevel(vocab, unk_token="c"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.decoders import Fuse

    words.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos)


def steps_rollout(*rows: list[int]) -> Rollout:
    lengths = torch.tensor([len(row) for row in rows])
    width = 1 + int(lengths.max())
    ids = torch.tensor([[1, *row, *[3] * (width - 1 - len(row))] for row in rows])
    sequences = Sequences(ids, torch.ones_like(lengths), lengths)
    tokenizer = word_tokenizer()
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    made = rollout_of(lengths.tolist())
    return replace(made, sequences=sequences, texts=texts, prompts=replace(made.prompts, texts=P[: len(rows)]))


def test_step_rewards_stand_at_the_token_that_completes_the_step() -> None:
    #       a  b  // c  $        a/ /  b  /  /  /  c      b          //  a  // $
    rows = [1, 2, 5, 3, 0], [6, 4, 2, 4, 4, 4, 3], [2], [5, 1, 5, 0]
    batch = steps_rollout(*rows)
    assert batch.texts == ("ab//c", "a//b///c", "b", "//a//")
    batch = replace(batch, prompts=replace(batch.prompts, texts=("p",) * 4))
    seen = []

    def function(prompts, responses):
        seen.extend(response.split("//") for response in responses)
        return [
            [10.0 * (row + 1) + step for step in range(len(response.split("//")))]
            for row, response in enumerate(responses)
        ]

    got = score(StepRewards(function, word_tokenizer(), "//"), batch)
    assert seen == [["ab", "c"], ["a", "b", "/c"], ["b"], ["", "a", ""]]
    wanted = [[0, 0, 10, 0, 11, 0, 0], [0, 20, 0, 0, 21, 0, 22], [30, 0, 0, 0, 0, 0, 0], [40, 0, 41, 42, 0, 0, 0]]
    assert got.token_rewards is not None
    assert_close(got.token_rewards, wanted, EXACT)
    by_texts = StepRewards(function, word_tokenizer(), "//")
    assert by_texts(["p"] * 4, batch.texts) == [21.0, 63.0, 30.0, 123.0]
    assert by_texts.score_rollout(batch) == [21.0, 63.0, 30.0, 123.0]
    both = WeightedSum({"steps": (by_texts, 2.0), "length": length})
    assert both.score_rollout(batch) == [42.0 + 5, 126.0 + 8, 60.0 + 1, 246.0 + 5]
    assert score(both, batch).metrics["score/part/steps"] == (21 + 63 + 30 + 123) / 4


def test_two_steps_that_end_in_one_token_both_count() -> None:
    batch = steps_rollout([1, 5, 5, 2])
    got = score(
        StepRewards(lambda prompts, responses: [[1.0, 2.0, 4.0]], word_tokenizer(), "/"), steps_rollout([1, 5, 2])
    )
    assert got.token_rewards is not None
    assert got.token_rewards.tolist() == [[0.0, 3.0, 4.0]]
    assert batch.texts == ("a////b",)


def test_an_end_that_is_written_as_the_separator_ends_no_step() -> None:
    batch = replace(steps_rollout([1, 2, 5]), texts=("ab",))
    got = score(StepRewards(lambda prompts, responses: [[4.0]], word_tokenizer(eos="//"), "//"), batch)
    assert got.token_rewards is not None
    assert got.token_rewards.tolist() == [[0.0, 0.0, 4.0]]


def test_steps_that_do_not_fit_are_refused() -> None:
    batch = steps_rollout([1, 5, 2])
    with pytest.raises(InputError, match="gave 3 numbers for response 0, which has 2 steps"):
        score(StepRewards(lambda prompts, responses: [[1.0, 2.0, 3.0]], word_tokenizer(), "//"), batch)
    with pytest.raises(InputError, match="wanted the policy's tokenizer"):
        score(
            StepRewards(lambda prompts, responses: [[1.0, 2.0]], word_tokenizer(), "//"), replace(batch, texts=("ab",))
        )
    with pytest.raises(InputError, match="separator of steps is empty"):
        StepRewards(lambda prompts, responses: [], word_tokenizer(), "")
