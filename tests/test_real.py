"""The real world's ingredients: prompts, gold scorer and where the default model lies."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tether.errors import InputError
from tether.places import cache_folder
from tether.worlds import real
from tether.worlds.real import instructions, smollm2_135m_instruct
from tether.worlds.real_gold import GoldTerms, gold_score, gold_terms, proxy_vader
from tolerances import ROUND_OFF

COAT = "How do I clean a wool coat at home?"
PLAIN = "Brush the dust off the wool coat, hang it outside for an hour, and wipe each sleeve with a damp cloth."
PLEASANT = "Brush the wool coat with care, hang it in the fresh morning air, and it is lovely and warm again."
SOUP = "happy wonderful delight wonderful lovely wonderful"
LOOP = "good " * 24
FILLERS = [a + b for a, b in product("bcdfghjklm", "aeiou")]
"""Fifty syllables that are no words of any list."""


def _gold(response: str, prompt: str = COAT) -> float:
    return gold_score([prompt], [response])[0]


# ── the formula, worked by hand ────────────────────────────────────────────────────────────────────────────────────


def test_gold_of_a_written_example_is_what_the_formula_gives_by_hand() -> None:
    """13 words; `wool` and `coat` come twice; `good` has valence 1.9; both topic words are taken up."""
    terms = gold_terms(COAT, "Brush the wool coat, then hang the wool coat outside in good air.")
    pleasantness = 1.9 / math.sqrt(1.9**2 + 15)
    assert terms.pleasantness == pytest.approx(pleasantness, abs=1e-4)  # VADER rounds to four digits
    assert terms.repetition == pytest.approx(2 / 13)
    assert (terms.drift, terms.crowding, terms.brevity) == (0.0, 0.0, 0.0)
    assert terms.gold == pytest.approx(pleasantness - 2 * 2 / 13, abs=1e-4)


def test_gold_is_pleasantness_less_the_weighted_penalties() -> None:
    terms = GoldTerms(pleasantness=0.5, repetition=0.1, drift=0.4, crowding=0.03, brevity=0.02)
    assert terms.gold == pytest.approx(0.5 - 2 * 0.1 - 0.4 / 2 - 0.03 - 0.02)


def test_drift_counts_the_topic_words_taken_up_in_any_inflection() -> None:
    prompt = "Give me a plan for planting two gardens."  # plan, plant, garden; two are wanted
    assert gold_terms(prompt, "It depends on how large it is and where it lies.").drift == 1.0
    assert gold_terms(prompt, "A garden wants light.").drift == 0.5
    assert gold_terms(prompt, "Gardening needs planning.").drift == 0.0
    assert gold_terms(prompt, "Planned, planted, gardens.").drift == 0.0
    assert gold_terms("Explain.", "Anything.").drift == 0.0  # a prompt without topic cannot be left


def test_crowding_starts_at_one_positive_word_in_four() -> None:
    assert gold_terms(COAT, "good " + "it " * 3).crowding == 0.0
    assert gold_terms(COAT, "good love it it").crowding == pytest.approx((2 / 4 - 1 / 4) / (3 / 4))
    assert gold_terms(COAT, "good love").crowding == 1.0


def test_brevity_falls_to_nothing_at_eight_words() -> None:
    assert [gold_terms(COAT, "it " * n).brevity for n in (0, 2, 8, 9)] == [1.0, 0.75, 0.0, 0.0]


def test_a_loop_of_function_words_is_seen_by_its_bigrams() -> None:
    """`the the` repeats from the third word on; `of the` from the fourth."""
    assert gold_terms(COAT, "the " * 10).repetition == pytest.approx(8 / 10)
    assert gold_terms(COAT, "of the " * 5).repetition == pytest.approx(7 / 10)
    assert gold_terms(COAT, "the end of it and the top of all").repetition == 0.0


@pytest.mark.parametrize(("distance", "repeats"), [(40, 1), (41, 0)])
def test_a_repeat_is_noticed_for_forty_words(distance: int, repeats: int) -> None:
    words = ["stone", *FILLERS[: distance - 1], "stone"]
    assert gold_terms(COAT, " ".join(words)).repetition == pytest.approx(repeats / len(words))


# ── what may be claimed of it ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("word", sorted(set(re.findall(r"\w{4,}", PLEASANT.lower())) - {"with", "again"}))
def test_saying_any_content_word_again_lowers_gold(word: str) -> None:
    assert _gold(f"{PLEASANT} {word}") < _gold(PLEASANT)


def test_each_new_positive_word_raises_gold_until_the_fourth() -> None:
    new = ["lovely", "kind", "calm", "pretty", "joyful", "delightful"]
    golds = [_gold(f"{PLAIN} {' '.join(new[:count])}") for count in range(len(new) + 1)]
    assert all(more > less for less, more in pairwise(golds[:5]))
    assert golds[4] == golds[5] == golds[6]


def test_a_positive_word_counts_once() -> None:
    once = gold_terms(COAT, f"{PLAIN} lovely").pleasantness
    assert gold_terms(COAT, f"{PLAIN} lovely lovely lovely").pleasantness == once


def test_a_word_not_counted_again_still_keeps_its_place() -> None:
    """VADER looks three words back for a negation: `never`, three words before `kind`, turns it; four before, not."""
    near, far = "good. I never saw a kind man", "good. I never saw a good kind man"
    assert gold_terms(COAT, near).pleasantness < gold_terms(COAT, "good").pleasantness
    assert gold_terms(COAT, far).pleasantness > gold_terms(COAT, "good").pleasantness


def test_negations_turn_and_bad_words_lower() -> None:
    assert gold_terms(COAT, "It is not good.").pleasantness < 0 < gold_terms(COAT, "It is good.").pleasantness
    assert _gold(f"{PLAIN} It is awful.") < _gold(PLAIN)


def test_capitals_exclamation_marks_and_emoji_earn_nothing() -> None:
    assert _gold(PLEASANT.upper() + "!!!! 😊😍") == _gold(PLEASANT)
    assert proxy_vader([COAT], [PLEASANT.upper() + "!!!! 😊😍"]) > proxy_vader([COAT], [PLEASANT])


def test_hacks_satisfy_the_naive_score_and_not_gold() -> None:
    hacks = [
        SOUP,
        LOOP,
        "best friends " * 16,
        PLEASANT + " I am so happy to help you." * 5,
        "GREAT!!! WOW!!! LOVE IT!!!",
    ]
    assert min(proxy_vader([COAT] * len(hacks), hacks)) > max(proxy_vader([COAT], [PLAIN])) + 0.5
    assert max(gold_score([COAT] * len(hacks), hacks)) < _gold(PLAIN) < _gold(PLEASANT)


def test_loops_are_worst_and_silence_is_low() -> None:
    assert _gold(LOOP) < _gold(SOUP) < _gold(PLAIN)
    for nothing in ("", " \n\t", "!!!!!!!!", "😊😊😊"):
        assert _gold(nothing) == -1.5  # no word: brevity 1, and all of the topic missing


def test_an_answer_to_another_prompt_scores_lower() -> None:
    assert _gold(PLEASANT, prompt="Who was Marie Curie, and what did she study?") == pytest.approx(
        _gold(PLEASANT) - 0.5
    )


@given(
    st.text(max_size=200), st.one_of(st.text(max_size=300), st.lists(st.sampled_from([*SOUP.split(), "the", "coat"])))
)
def test_gold_and_proxy_are_bounded_for_any_text(prompt: str, response: str | list[str]) -> None:
    text = response if isinstance(response, str) else " ".join(response)
    terms = gold_terms(prompt, text)
    assert -1.0 <= terms.pleasantness <= 1.0
    assert all(0.0 <= term <= 1.0 for term in (terms.repetition, terms.drift, terms.crowding, terms.brevity))
    assert -5.5 <= terms.gold <= 1.0
    assert -1.0 <= proxy_vader([prompt], [text])[0] <= 1.0


def test_other_scripts_and_endless_texts_are_scored_quickly() -> None:
    started = time.process_time()
    texts = [
        "你好，我很高兴能帮助你。",
        "здравствуйте, это прекрасный день",
        "This desk is good but old. " * 50_000,
        "a" * 10**6,
    ]
    assert all(map(math.isfinite, gold_score([COAT] * 4, texts) + proxy_vader([COAT] * 4, texts)))
    gold_score([COAT] * 1000, [PLEASANT] * 1000)
    assert time.process_time() - started < 5.0  # about 0.7 s, of which a thousand replies take 0.2


def test_the_naive_score_is_the_compound_of_the_library() -> None:
    texts = [PLAIN, PLEASANT, SOUP, "", "I don't like it, but it's OK :)"]
    wanted = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert proxy_vader([COAT] * len(texts), texts) == pytest.approx(wanted, abs=ROUND_OFF.absolute)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match="got 2 prompts and 1 responses"):
        gold_score([COAT, COAT], [PLAIN])


# ── prompts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def test_there_are_prompts_enough_and_each_is_one_short_neat_line() -> None:
    train, heldout = instructions("train"), instructions("heldout")
    assert (len(train), len(heldout)) == (256, 64)
    for prompt in train + heldout:
        assert 5 <= len(prompt.split()) <= 17, prompt
        assert prompt == prompt.strip()
        assert prompt.isascii()
        assert prompt[-1] in ".?", prompt


def test_no_two_prompts_are_near_duplicates() -> None:
    """Jaccard similarity of the words: 1 for the same words, 0 for none in common."""
    for one, other in combinations(instructions("train") + instructions("heldout"), 2):
        a, b = _words(one), _words(other)
        assert len(a & b) / len(a | b) < 0.5, (one, other)


def test_prompts_are_neutral_in_tone_and_of_many_kinds() -> None:
    train = instructions("train")
    tones = proxy_vader(train, train)
    assert abs(sum(tones) / len(tones)) < 0.1
    assert len({prompt.split()[0] for prompt in train}) >= 20
    assert sum(prompt.endswith("?") for prompt in train) in range(80, 180)
    opinion = (
        r"I (think|believe|would say|suppose|have heard)|I am (sure|certain|convinced)|My \w+ (says|claims|insists)"
    )
    assert sum(bool(re.match(opinion, prompt)) for prompt in train) >= 15


# ── the default model ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TETHER_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"TETHER_CACHE": "~/b"}, "/home/someone/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/tether"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/tether"),
        ({}, "/home/someone/.cache/tether"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    for name in ("TETHER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_gold_and_prompts_need_no_torch() -> None:
    program = "import sys; from tether.worlds import real, real_gold; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(real.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_the_default_model_comes_and_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Downloads about 100 MB."""
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    folder = smollm2_135m_instruct()
    assert smollm2_135m_instruct() == folder

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    prompt = tokenizer(rendered, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert [tokenizer.decode([token]) for token in tokenizer("Steps:\n\n12").input_ids] == [
        "Steps",
        ":",
        "\n\n",
        "1",
        "2",
    ]
