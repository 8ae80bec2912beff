"""Data as people have it: files of another shape than their name says, other libraries' messages, columns that hide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tether.data import read_demonstrations, read_preferences, read_prompts
from tether.errors import InputError
from tether.reward_stage import report_on_pairs

ASKED = {"role": "user", "content": "Hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_list_of_rows_is_read_whatever_the_file_is_called(tmp_path: Path, name: str, indent: int | None) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert read_prompts(written(tmp_path, name, json.dumps(rows, indent=indent))).prompts == ("a", "b")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_conversation_a_line_is_one_prompt_a_line(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps([ASKED | {"content": text}]) for text in ("a", "b"))
    assert read_prompts(written(tmp_path, name, lines)).prompts == ("a", "b")


def test_a_content_in_parts_is_their_texts() -> None:
    assert read_prompts([{"prompt": [PARTS]}]).prompts == ("a b",)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "content": None}, "row 1: the content of message 2 of prompt is null; wanted text"),
        ({"role": "user", "content": 5}, r"the content of message 2 of prompt is a int \(5\)"),
        (
            {"role": "user", "content": [{"type": "image"}]},
            "message 2 of prompt has parts of the types image; wanted text",
        ),
    ],
)
def test_a_message_that_is_no_text_is_named(message: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_prompts([{"prompt": [ASKED, message]}])


@pytest.mark.parametrize("value", ["a \ud83d", [ASKED | {"content": "a \ud83d"}]])
def test_half_a_character_is_found_before_a_tokenizer_meets_it(value: object) -> None:
    with pytest.raises(InputError, match=r"row 1: .*prompt holds '\\ud83d' at character 3, half of a character"):
        read_prompts([{"prompt": value}])


def test_an_object_without_replies_is_no_tree() -> None:
    with pytest.raises(InputError, match=r"row 1: prompt is an object with a; wanted text or messages$"):
        read_prompts([{"prompt": {"a": 1}}])


def test_texts_of_numpy_are_texts() -> None:
    assert [type(prompt) for prompt in read_prompts(np.array(["a", "b"])).prompts] == [str, str]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("https://a.b/c.jsonl", "https://a.b/c.jsonl is an address; wanted a file here"),
        ("What is a string?", r"a text by itself goes into a list: \['What is a string\?'\]"),
    ],
)
def test_what_is_no_file_says_what_to_pass(source: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_prompts(source)


def test_a_missing_file_is_not_taken_for_something_that_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "prompts.py").touch()
    with pytest.raises(InputError, match="check the name"):
        read_prompts(str(tmp_path / "prompts.jsonl"))


def test_two_responses_and_a_label_are_told_apart_from_chosen_and_rejected() -> None:
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    with pytest.raises(
        InputError, match="human_ref_A and human_ref_B look like two responses: write the better one as"
    ):
        read_preferences([row, row])


def test_a_conversation_of_another_convention_says_what_to_rename() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    said = "conversations holds a conversation: call that column messages; found from and value: rename"
    for read in (read_prompts, read_demonstrations):
        with pytest.raises(InputError, match=said):
            read([row])


def test_a_demonstration_with_half_of_its_columns_says_what_is_wanted_beside_them() -> None:
    with pytest.raises(InputError, match="Wanted messages, or prompt and completion; instruction may be the prompt"):
        read_demonstrations([{"instruction": "a"}])


def test_a_question_that_an_implied_prompt_leaves_unread_is_told() -> None:
    rows = [{"instruction": f"Add {n}.", "input": "", "chosen": f"It is {n}.", "rejected": "It is no."} for n in (1, 2)]
    pairs = read_preferences(rows)
    assert pairs.prompts == ("It is", "It is")
    assert pairs.origin["unread"] == "instruction+input"
    assert any("prompt_column='instruction+input'" in warning for warning in report_on_pairs(pairs).warnings)


def test_a_question_that_both_sides_repeat_is_read() -> None:
    rows = [{"question": "Add 1.", "chosen": "Add 1. It is 1.", "rejected": "Add 1. No."}] * 2
    assert "unread" not in read_preferences(rows).origin
