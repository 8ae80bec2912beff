"""Prompts that leave no room for a response: refused, left out, or cut by a rule that never touches the template."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tether.errors import InputError
from tether.prompts import PromptSet, encode, fit, shorten
from tiny_models import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w92 ' if m.role == 'system' else 'w91 ' }}"
    "{{ m.content }}{{ ' </s> ' }}{% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)
SHORT, LONG = "w5 w6", "w10 w11 w12 w13 w14 w15 w16 w17"
GIVEN = PromptSet((SHORT, LONG, "w7"), {"level": (0, 1, 2)})


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = build_tokenizer()
    words.chat_template = TEMPLATE
    return words


def ids(tokenizer: PreTrainedTokenizerFast, *words: str) -> tuple[int, ...]:
    vocab = tokenizer.get_vocab()
    return tuple(vocab[word] for word in words)


def test_by_default_a_long_prompt_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="prompt 1 has 11 tokens; at most 8 leave room"):
        fit(GIVEN, tokenizer, max_tokens=8)
    assert fit(GIVEN, tokenizer, max_tokens=11).note is None


def test_dropped_prompts_take_their_columns_along_and_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    fitted = fit(GIVEN, tokenizer, max_tokens=8, too_long="drop")
    assert fitted.prompts == PromptSet((SHORT, "w7"), {"level": (0, 2)})
    assert fitted.ids == encode((SHORT, "w7"), tokenizer)
    assert (fitted.dropped, fitted.shortened) == (1, 0)
    assert fitted.note == "1 of 3 prompts left out: too long"
    with pytest.raises(InputError, match="all 3 prompts are longer than 2 tokens"):
        fit(GIVEN, tokenizer, max_tokens=2, too_long="drop")


def test_a_shortened_text_keeps_its_end_within_a_whole_template(tokenizer: PreTrainedTokenizerFast) -> None:
    fitted = fit(GIVEN, tokenizer, max_tokens=8, too_long="truncate_left")
    assert fitted.prompts.prompts == (SHORT, "w13 w14 w15 w16 w17", "w7")
    assert fitted.prompts.columns == GIVEN.columns
    assert fitted.ids[1] == ids(tokenizer, "w90", "w13", "w14", "w15", "w16", "w17", "</s>", "w91")
    assert (fitted.dropped, fitted.shortened) == (0, 1)
    assert fitted.note == "1 of 3 prompts cut on the left: too long"


def test_a_conversation_loses_its_oldest_turns_whole_and_keeps_its_system_message(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = [said("user", "w20"), said("assistant", "w21"), said("user", "w22 w23"), said("assistant", "w24")]
    asked = (said("system", "w40"), *turns, said("user", "w25 w26"))
    wanted = {
        21: asked,
        20: (asked[0], *asked[3:]),
        15: (asked[0], *asked[3:]),
        14: (asked[0], asked[5]),
        8: (asked[0], asked[5]),
        7: (asked[0], said("user", "w26")),
    }
    for room, left in wanted.items():
        (got,) = fit(PromptSet((asked,)), tokenizer, max_tokens=room, too_long="truncate_left").prompts.prompts
        assert tuple(got) == left, room
        assert len(encode([got], tokenizer)[0]) <= room


def test_a_conversation_that_begins_in_the_middle_begins_with_the_user(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = (said("user", "w20"), said("assistant", "w21"), said("assistant", "w22"), said("user", "w23"))
    (got,) = fit(PromptSet((asked,)), tokenizer, max_tokens=10, too_long="truncate_left").prompts.prompts
    assert tuple(got) == (asked[3],)


def test_a_prompt_that_no_cut_makes_short_enough_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = (said("system", "w40 w41 w42 w43"), said("user", "w20"))
    with pytest.raises(InputError, match=r"prompt 1 cannot be shortened to 6 tokens: template and system message"):
        fit(PromptSet(("w1", asked)), tokenizer, max_tokens=6, too_long="truncate_left")


@given(words=st.lists(st.integers(0, 999), min_size=1, max_size=40), room=st.integers(1, 40))
def test_what_is_kept_of_a_text_is_its_longest_end_of_whole_words(words: list[int], room: int) -> None:
    text = " ".join(map(str, words))
    got = shorten(text, lambda end: len(str(end).split()) <= room)
    assert got == " ".join(map(str, words[-room:]))


def test_a_text_without_spaces_is_cut_between_characters() -> None:
    assert shorten("零一二三四五六七八九" * 5, lambda end: len(str(end)) <= 7) == "三四五六七八九"
    assert shorten("abc", lambda end: not end) is None


def test_a_rule_of_another_name_is_refused(tokenizer: PreTrainedTokenizerFast, unchecked_shapes: None) -> None:
    with pytest.raises(InputError, match="too_long is 'cut'; wanted 'error', 'drop' or 'truncate_left'"):
        fit(GIVEN, tokenizer, max_tokens=8, too_long="cut")
