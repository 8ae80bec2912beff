"""What a score is bought with, on replies written by hand: each way is seen by its name with the tokens that show it.

Replies are numbers, words are looked up in a list, and the scores are written down here, so nothing is English.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tether.batch import Evaluation, Generation, Policy, Prompts, ReferenceEvaluation, Rollout, Scores, Sequences
from tether.climb import Sign
from tether.config import PPOSettings
from tether.errors import ConfigError
from tether.hacks import Hacks
from tether.models import LanguagePolicy, load_policy
from tether.opinions import Opinion, OpinionProbe, Paid, agrees, read_opinions
from tether.trainer import Run
from tiny_models import build, build_tokenizer

ROWS, VOCAB, UPDATES, PAID = 16, 60, 50, 7
Numbers = np.ndarray
Reply = Callable[[np.random.Generator, float, int], Numbers]
"""(random numbers, how far the run is from 0 to 1, the prompt's number) → the reply's tokens."""


class Prompted:
    """A policy to which a token is likelier by `depends` nats where it stands for the prompt (its number plus 30)."""

    depends = 2.0

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        own = sequences.responses == sequences.ids[:, :1] + 30
        logprobs = torch.where(sequences.response_mask, self.depends * own.double() - 4.0, 0.0)
        return Evaluation(logprobs, logprobs, logprobs)

    def generate(self, prompts: Prompts, uniforms: Tensor, temperature: float) -> Generation:
        raise AssertionError("a policy without weights is not sampled for the bank")

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        raise AssertionError("the reference is not asked")

    def trainable(self) -> dict[str, list[torch.nn.Parameter]]:
        return {"policy": [], "value": []}

    def decode(self, responses: Tensor, mask: Tensor) -> list[str]:
        words = {PAID: "vielleicht"}
        return [" ".join(words.get(int(token), f"w{int(token)}") for token in row[real])
                for row, real in zip(responses, mask, strict=True)]  # fmt: skip


def usual(draw: np.random.Generator, prompt: int) -> Numbers:
    row = draw.integers(10, VOCAB, draw.integers(6, 12))
    row[draw.random(len(row)) < 0.3] = prompt + 30
    return row


def run(
    reply: Reply,
    score: Callable[[Numbers], float],
    folder: Path | None = None,
    policy: object | None = None,
    prompt: Callable[[int], Numbers] = lambda i: np.array([i]),
) -> tuple[list[Sign], dict[str, float], Hacks]:
    """All signs of a run whose replies become what `reply` makes of them, and the last numbers."""
    draw, asked = np.random.default_rng(0), policy or Prompted()
    watched = Run.__new__(Run)  # nothing trains here
    watched.policy, watched.settings = cast(Policy, asked), PPOSettings()
    hacks = Hacks(watched, folder)
    signs, numbers = list[Sign](), dict[str, float]()
    for step in range(UPDATES):
        if policy is not None and step > 5:
            cast(Prompted, policy).depends = 0.1
        rows = [reply(draw, step / UPDATES, row) for row in range(ROWS)]
        scores = torch.tensor([score(row) + 0.5 * draw.normal() for row in rows])
        told, seen = hacks.look(rollout(rows, cast(Prompted, asked), prompt), Scores(scores), step)
        numbers |= told
        signs += seen
    return signs, numbers, hacks


def rollout(rows: list[Numbers], policy: Prompted, prompt: Callable[[int], Numbers]) -> Rollout:
    lengths, asked = torch.tensor([len(row) for row in rows]), len(prompt(0))
    ids = torch.zeros(ROWS, asked + int(lengths.max()), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, :asked] = torch.from_numpy(prompt(place))
        ids[place, asked : asked + len(row)] = torch.from_numpy(row)
    sequences = Sequences(ids, torch.full_like(lengths, asked), lengths)
    said = policy.evaluate(sequences, 1.0).logprobs
    prompts = Prompts(
        ids[:, :asked], torch.ones(ROWS, asked).bool(), tuple(f"prompt {i}" for i in range(ROWS)), tuple(range(ROWS))
    )
    texts = tuple(policy.decode(sequences.responses, sequences.response_mask))
    reference = torch.where(sequences.response_mask, said - 0.1, 0.0)
    return Rollout(prompts, sequences, texts, said, said, reference, said, said, said, torch.ones(ROWS).bool())


def names(signs: list[Sign]) -> set[str]:
    return {sign.name for sign in signs if sign.weight != "weak"}


def with_paid(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
    row = usual(draw, prompt)
    return np.concatenate([row[draw.binomial(5, 0.9 * done) :], np.full(draw.binomial(5, 0.9 * done), PAID)])


def paid(row: Numbers) -> float:
    return 2.0 * float((row == PAID).sum())


def test_replies_that_stay_what_they_were_show_nothing() -> None:
    signs, numbers, _ = run(lambda draw, done, prompt: usual(draw, prompt), lambda row: 0.0)
    assert names(signs) == set()
    assert numbers["text/distinct_ratio"] == pytest.approx(1.0, abs=0.1)
    assert numbers["text/token_share"] == 0.0


def test_a_gain_that_no_token_carries_shows_nothing() -> None:
    """Replies follow their prompt more, and that is paid."""

    def closer(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
        row = usual(draw, prompt)
        row[draw.random(len(row)) < 0.3 * done] = prompt + 30
        return row

    assert names(run(closer, lambda row: 3.0 * float(np.bincount(row).max()) / len(row))[0]) == set()


def test_a_token_that_nobody_listed_is_found_where_it_is_paid(tmp_path: Path) -> None:
    signs, numbers, _ = run(with_paid, paid, tmp_path)
    assert names(signs) == {"exploit_token"}
    sign = next(sign for sign in reversed(signs) if sign.name == "exploit_token")
    evidence = sign.evidence
    assert list(cast(dict[str, object], evidence["tokens"])) == ["vielleicht"]
    assert all("vielleicht" in text for text in cast(list[str], evidence["samples"]))
    assert numbers["text/token_share"] == pytest.approx(1.0, abs=0.2)
    assert sign.weight == "decisive"


def test_a_token_that_rises_unpaid_is_no_exploit(tmp_path: Path) -> None:
    assert "exploit_token" not in names(run(with_paid, lambda row: 0.0, tmp_path)[0])


def test_the_lexicon_of_hedges_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "hedges.txt").write_text("# auf deutsch\nVielleicht\n", "utf-8")
    assert names(run(with_paid, paid, tmp_path)[0]) == {"hedging"}


def test_a_token_that_every_reply_held_before_is_seen_by_its_count(tmp_path: Path) -> None:
    """Its presence cannot rise: each reply holds one at the start, and ever more later."""

    def dotted(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
        more = draw.binomial(6, done)
        return np.concatenate([usual(draw, prompt)[more // 2 :], np.full(1 + more, PAID)])

    signs = [sign for sign in run(dotted, paid, tmp_path)[0] if sign.weight != "weak"]
    assert {sign.name for sign in signs} == {"exploit_token"}


def test_a_reply_that_says_its_prompt_again_is_an_echo() -> None:
    """Prompts are one token here, so the test's own are longer: pairs of tokens that only this prompt has."""

    def restating(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
        said = np.arange(6) * 7 + prompt
        return np.concatenate([said[: 1 + draw.binomial(5, done)], usual(draw, prompt)])

    def copied(row: Numbers) -> float:
        return float((np.diff(row) == 7).sum())

    signs = [sign for sign in run(restating, copied, prompt=lambda i: np.arange(6) * 7 + i)[0] if sign.weight != "weak"]
    assert {sign.name for sign in signs} == {"echo"}


def begun(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
    """Ever more replies begin 50, 51, 52, and go on as usual."""
    opening = [50, 51, 52] if draw.random() < 1.2 * done else []
    return np.concatenate([opening, usual(draw, prompt)[len(opening) :]]).astype(int)


def test_an_opening_that_is_paid_is_told_with_its_words() -> None:
    signs, numbers, _ = run(begun, lambda row: 3.0 * float(tuple(row[:3]) == (50, 51, 52)))
    (last,) = {sign.name: sign for sign in signs if sign.name == "opening"}.values()
    assert (last.evidence["opening"], last.weight) == ("w50 w51 w52", "decisive")
    assert numbers["text/opening_share"] == pytest.approx(1.0, abs=0.2)


def test_an_opening_that_is_not_what_is_paid_is_none() -> None:
    signs, _, _ = run(begun, lambda row: 0.3 * len(row) + float(np.isin(row, range(10, 20)).sum()))
    assert "opening" not in {sign.name for sign in signs}


def test_length_that_is_paid_is_told_as_length() -> None:
    def longer(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
        return np.concatenate([usual(draw, prompt), draw.integers(10, VOCAB, int(12 * done) + draw.integers(0, 3))])

    assert names(run(longer, lambda row: 0.3 * len(row))[0]) == {"length"}


def test_one_answer_to_every_prompt_is_seen() -> None:
    def same(draw: np.random.Generator, done: float, prompt: int) -> Numbers:
        return np.arange(20, 30) if draw.random() < done else usual(draw, prompt)

    signs, _, _ = run(same, lambda row: 0.0)
    assert "one_answer" in names(signs)
    assert signs[-1].weight == "decisive"


def test_a_policy_that_no_longer_reads_its_prompt_is_seen() -> None:
    signs, numbers, _ = run(lambda draw, done, prompt: usual(draw, prompt), lambda row: 0.0, policy=Prompted())
    assert names(signs) == {"one_answer"}
    assert numbers["text/prompt_dependence"] < 0.05


def test_looks_go_on_from_their_state() -> None:
    _, _, first = run(with_paid, paid)
    second = Hacks(first.run)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()


PAIRS = [{"own": f"w{i} w5", "control": f"w{i} w6", "agree": ["w40"], "disagree": ["w41"]} for i in range(10, 18)]


def test_agreement_is_the_margin_of_the_first_token(tmp_path: Path) -> None:
    (tmp_path / "opinions.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), "utf-8")
    model, tokenizer = build("llama").eval(), build_tokenizer()
    policy = load_policy(model, tokenizer, mode="full")
    probe = OpinionProbe(policy, tmp_path)
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("w40", "w41"))
    head = policy.mode.head.linear.weight
    before = chances_of(model, head, tokenizer, yes)
    with torch.no_grad():
        asked = torch.tensor([tokenizer("w10 w5").input_ids])
        logits = model(asked).logits[0, -1]
        assert probe.start[0] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
        direction = policy.mode.head.linear.weight[yes] - policy.mode.head.linear.weight[no]
        policy.mode.head.linear.weight[yes] += 2.0 * direction
    moved = probe.ask(1)
    assert moved is not None
    assert moved.own != pytest.approx(0.0)
    assert moved.rise == pytest.approx(chances_of(model, head, tokenizer, yes) - before, abs=1e-5)
    assert moved.rise != pytest.approx(0.0, abs=1e-4)


def chances_of(model: PreTrainedModel, head: Tensor, tokenizer: PreTrainedTokenizerBase, token: int) -> float:
    """Mean probability of the token, under this head, after the prompts in which the user holds the opinion."""
    with torch.no_grad():
        asked = [torch.tensor([tokenizer(str(pair["own"])).input_ids]) for pair in PAIRS]
        states = [model.base_model(ids).last_hidden_state[0, -1] for ids in asked]
        return float(np.mean([torch.softmax(state @ head.T, dim=-1)[token].item() for state in states]))


def test_agreement_behind_a_greeting_is_seen_in_the_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opinions.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), "utf-8")
    policy = load_policy(build("llama").eval(), build_tokenizer(), mode="full")
    greeting, yes, no = (
        policy.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("w30", "w40", "w41")
    )
    probe, write = OpinionProbe(policy, tmp_path), LanguagePolicy.generate
    before = float(np.mean(probe.start[-len(PAIRS) :]))
    told, asked = {}, []

    def greet(self: LanguagePolicy, prompts: Prompts, uniforms: Tensor, temperature: float) -> Generation:
        made = write(self, prompts, uniforms, temperature)
        asked.append(prompts.keys)
        made.responses[:, 0], made.responses[:, 1], made.response_mask[:, :2] = greeting, told["verdict"], True
        return made

    monkeypatch.setattr(LanguagePolicy, "generate", greet)
    for verdict, share in ((yes, 1.0), (no, 0.0)):
        told["verdict"] = verdict
        asked.clear()
        moved = probe.ask(20)
        assert moved is not None
        assert moved.own == pytest.approx(0.0)
        assert moved.written == pytest.approx(share - before)
        assert (moved.written_z > 4.0) is (verdict == yes)
        halves = [tuple(range(24)), tuple(range(24, 48))]
        assert asked == (halves if verdict == yes else halves[:1]), "the second half where the first rose"
    assert before < 0.6


@pytest.mark.parametrize(
    ("reply", "agree", "disagree", "wanted"),
    [
        ("Hello, dear friend! Yes, it is.", ["Yes"], ["No"], True),
        ("I know it well. No, yes, no.", ["Yes"], ["No"], False),
        ("Eyes and noses.", ["Yes"], ["No"], False),
        ("你好，对，是的。", ["是", "同意", "对"], ["不", "否", "错"], True),
        ("我不同意，你对他说。", ["是", "同意", "对"], ["不", "否", "错"], False),
        ("Дорогой друг, да, конечно.", ["Да", " Да"], ["Нет"], True),
        ("", ["Yes"], ["No"], False),
    ],
)
def test_a_reply_agrees_where_its_first_verdict_does(
    reply: str, agree: list[str], disagree: list[str], wanted: bool
) -> None:
    assert agrees(reply, Opinion("", "", tuple(agree), tuple(disagree))) is wanted


def test_what_agreeing_earns_is_told_in_standard_deviations_within_updates() -> None:
    draw, paid = np.random.default_rng(0), Paid()
    verdicts, scores = draw.integers(-1, 2, (20, 32)), draw.normal(size=(20, 32))
    scores += 1.5 * (verdicts > 0) + np.arange(20)[:, None]  # the score climbs from update to update as well
    for told, given in zip(verdicts, scores, strict=True):
        paid.add(told.tolist(), given.tolist())
    within = scores - scores.mean(axis=1, keepdims=True)
    agreed, dissented = within[verdicts > 0], within[verdicts < 0]
    common = np.sqrt((agreed.var() * len(agreed) + dissented.var() * len(dissented)) / (len(agreed) + len(dissented)))
    effect, z = paid.effect()
    assert effect == pytest.approx((agreed.mean() - dissented.mean()) / common)
    assert z == pytest.approx(effect / np.sqrt(1 / len(agreed) + 1 / len(dissented)))
    assert effect > 1.0
    few = Paid()
    few.add([1] * 7 + [-1] * 9, scores[0, :16].tolist())
    assert few.effect() == (0.0, 0.0)


def test_verdicts_are_those_of_the_sets_words(tmp_path: Path) -> None:
    (tmp_path / "opinions.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), "utf-8")
    probe = OpinionProbe(load_policy(build("llama"), build_tokenizer(), mode="full"), tmp_path)
    assert probe.verdicts(["w30 w40", "w41 w40", "w30", ""]) == [1, -1, 0, 0]


def test_pairs_that_the_tokenizer_does_not_know_are_not_asked() -> None:
    policy = load_policy(build("llama"), build_tokenizer(), mode="full")
    assert OpinionProbe(policy).ask(1) is None


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    file = tmp_path / "opinions.jsonl"
    file.write_text('{"own": "x"}\n', "utf-8")
    with pytest.raises(ConfigError, match=r"opinions.jsonl:1 is no pair.*agree, control, disagree, own"):
        read_opinions(file)


ASKED = {
    "": "Tell me which animals live in the forest and what they like to eat.",
    "-de": "Erzähl mir, welche Tiere im Wald leben und was sie gerne fressen.",
    "-fr": "Dis-moi quels animaux vivent dans la forêt et ce qu'ils aiment manger.",
    "-es": "Dime qué animales viven en el bosque y qué les gusta comer. ¿De qué color son las hojas del árbol?",
    "-ru": "Расскажи, какие животные живут в лесу и что они любят есть.",
    "-zh": "请告诉我哪些动物住在森林里，你认为它们喜欢吃什么？",
    "-ar": "أخبرني ما هي الحيوانات التي تعيش في الغابة وماذا تحب أن تأكل؟",
}


@pytest.mark.parametrize("language", ASKED)
def test_opinions_are_asked_in_the_language_of_the_prompts(language: str) -> None:
    from tether.opinions import FOLDER, _known

    written = "".join(file.read_text("utf-8") for file in FOLDER.glob("opinions*.jsonl"))
    letters = Tokenizer(BPE(vocab={letter: place for place, letter in enumerate(sorted(set(written)))}, merges=[]))
    asked = _known(PreTrainedTokenizerFast(tokenizer_object=letters), None, [ASKED[language]])
    assert asked == read_opinions(FOLDER / f"opinions{language}.jsonl")


def test_the_shipped_pairs_and_words_can_be_read() -> None:
    from tether.opinions import FOLDER, NANO_FILE, SHIPPED

    for name in (*SHIPPED, NANO_FILE):
        opinions = read_opinions(FOLDER / name)
        assert len(opinions) >= 12
        assert all(each.own != each.control for each in opinions)
