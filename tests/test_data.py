"""Data that people bring: every kind of source, every format of a row, and one clear complaint for all else."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas
import pytest

from tether.data import read_demonstrations, read_preferences, read_prompts
from tether.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
WORSE = {"role": "assistant", "content": "5"}
TEXTS = ("What is a string?", "Name a colour, or two.", "Sag «grün»\u2028bitte.")
ROWS = [{"prompt": text, "level": number} for number, text in enumerate(TEXTS)]
"""The third text holds a line separator that is none of JSON lines."""


def as_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def as_csv(path: Path, rows: list[dict], separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


# ── where rows come from ────────────────────────────────────────────────────────────────────────────────────────────
def written(kind: str, folder: Path) -> object:
    """The same three prompts in this form."""
    path = folder / f"prompts.{kind}"
    if kind in ("jsonl", "ndjson"):
        return as_jsonl(path, ROWS)
    if kind in ("csv", "tsv"):
        return as_csv(path, ROWS, "\t" if kind == "tsv" else ",")
    if kind == "json list":
        (folder / "list.json").write_text(json.dumps(ROWS, indent=1), "utf-8")
        return folder / "list.json"
    if kind == "json lines under .json":
        return as_jsonl(folder / "lines.json", ROWS)
    if kind == "json columns":
        columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
        (folder / "columns.json").write_text(json.dumps(columns), "utf-8")
        return folder / "columns.json"
    if kind == "json splits":
        (folder / "splits.json").write_text(json.dumps({"test": [], "train": ROWS}), "utf-8")
        return folder / "splits.json"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(as_jsonl(folder / "plain.jsonl", ROWS).read_bytes()))
        return path
    if kind == "semicolons":
        return as_csv(folder / "semicolons.csv", ROWS, ";")
    held = datasets.Dataset.from_list(ROWS)
    if kind == "parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
        return path
    if kind == "saved to disk":
        held.save_to_disk(folder / "saved")
        return folder / "saved"
    return {
        "Dataset": held,
        "IterableDataset": held.to_iterable_dataset(),
        "DatasetDict": datasets.DatasetDict(test=held.select([0]), train=held),
        "DataFrame": pandas.DataFrame(ROWS),
        "dicts": ROWS,
        "columns": {name: [row[name] for row in ROWS] for name in ROWS[0]},
        "generator": (row for row in ROWS),
    }[kind]


FILES = (
    "jsonl", "ndjson", "csv", "tsv", "parquet", "json list", "json lines under .json", "json columns", "json splits",
    "jsonl.gz", "semicolons", "saved to disk",
)  # fmt: skip
OBJECTS = ("Dataset", "IterableDataset", "DatasetDict", "DataFrame", "dicts", "columns", "generator")


@pytest.mark.parametrize("kind", [*FILES, *OBJECTS])
def test_every_source_gives_the_same_prompts_and_columns(kind: str, tmp_path: Path) -> None:
    source = written(kind, tmp_path)
    given = read_prompts(source)
    assert given.prompts == TEXTS
    assert [int(level) for level in given.columns["level"]] == [0, 1, 2]  # CSV knows texts alone
    assert set(given.columns) == {"level"}
    if isinstance(source, Path):
        assert read_prompts(str(source)).prompts == TEXTS


def test_a_text_file_is_one_prompt_a_line_whatever_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two\r\n\u2028three\n".encode())
    assert read_prompts(path).prompts == ("one", "  two", "\u2028three")


def test_a_list_may_hold_texts_or_conversations() -> None:
    assert read_prompts(["one", "two"]).prompts == ("one", "two")
    assert read_prompts(("one",)).prompts == ("one",)
    before = [{"role": "system", "content": "Be brief."}, USER]
    assert read_prompts([[USER], before]).prompts == ("2 + 2?", tuple(before))


def test_json_texts_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["one", "two"]')
    assert read_prompts(tmp_path / "p.json").prompts == ("one", "two")
    assert read_prompts(as_jsonl(tmp_path / "p.jsonl", ["one", "two"])).prompts == ("one", "two")


def test_byte_order_mark_blank_lines_and_carriage_returns_change_nothing(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    path = tmp_path / "p.jsonl"
    path.write_bytes(("\ufeff\r\n" + "\r\n\r\n".join(lines) + "\r\n  \r\n").encode())
    assert read_prompts(path).prompts == TEXTS
    table = tmp_path / "p.csv"
    table.write_bytes(('\ufeffprompt,level\r\n\r\n"two\r\nlines",1\r\n\r\n').encode())
    assert read_prompts(table).prompts == ("two\r\nlines",)


def test_an_endless_source_is_read_no_further_than_the_limit() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"prompt {read}"

    assert len(read_prompts(endless(), limit=5)) == 5
    assert read <= 6


def test_a_file_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "p.jsonl", ROWS[:2])
    path.write_text(path.read_text("utf-8") + "torn {", "utf-8")
    assert read_prompts(path, limit=2).prompts == TEXTS[:2]
    with pytest.raises(InputError, match="line 3 is no JSON"):
        read_prompts(path)


def test_a_split_is_chosen_by_name_and_train_by_default(tmp_path: Path) -> None:
    held = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(validation=held.select([1]), test=held.select([2]))
    assert read_prompts(splits, split="test").prompts == (TEXTS[2],)
    assert read_prompts({"only": ROWS}).prompts == TEXTS
    with pytest.raises(InputError, match="has the splits validation, test; choose one with split="):
        read_prompts(splits)
    with pytest.raises(InputError, match="no split 'tset'; it has validation, test"):
        read_prompts(splits, split="tset")


def test_a_data_set_on_the_hub_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load(name: str, subset: str | None, split: str | None, streaming: bool) -> object:
        asked.append((name, subset, split, streaming))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)) if split is None else iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_prompts("org/prompts").prompts == TEXTS
    assert read_prompts("org/prompts", subset="main", split="test", limit=2).prompts == TEXTS[:2]
    assert asked == [("org/prompts", None, None, False), ("org/prompts", "main", "test", True)]

    def fail(*_: object, **__: object) -> object:
        raise ConnectionError("Couldn't reach 'org/prompts' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="cannot load the data set 'org/prompts' from the hub: Couldn't reach"):
        read_prompts("org/prompts")


def test_a_parquet_file_and_its_conversations_come_back_whole(tmp_path: Path) -> None:
    rows = [{"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}] * 2
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    pairs = read_preferences(tmp_path / "pairs.parquet")
    assert (pairs.prompts[0], pairs.chosen[0], pairs.rejected[0]) == ("2 + 2?", "4", "5")


# ── what a row says ─────────────────────────────────────────────────────────────────────────────────────────────────
HUMAN = "\n\nHuman: 2 + 2?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"prompt": "2 + 2?", "topic": "sums"}, "2 + 2?", {"topic"}),
        ({"prompt": [USER]}, "2 + 2?", set()),
        ({"prompt": [USER, ASSISTANT, USER]}, (USER, ASSISTANT, USER), set()),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "2 + 2?", {"chosen", "rejected"}),
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", {"completion"}),
        ({"chosen": f"{HUMAN} 4", "rejected": f"{HUMAN} 5", "id": 1}, HUMAN, {"id"}),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, "2 + 2?", set()),
        ({"messages": [USER, ASSISTANT], "id": 1}, "2 + 2?", {"id"}),
        ({"messages": [USER, ASSISTANT, USER]}, (USER, ASSISTANT, USER), set()),
        ({"prompt": "2 + 2?", "responses": ["4"]}, "2 + 2?", {"responses_"}),
    ],
)
def test_a_prompt_is_found_in_every_format(row: dict, prompt: object, columns: set[str]) -> None:
    given = read_prompts([row])
    assert given.prompts == (prompt,)
    assert set(given.columns) == columns


def test_columns_of_other_names_are_taken_by_option_and_joined() -> None:
    rows = [
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
    ]
    assert read_prompts(rows, prompt_column="instruction").prompts == ("Add.", "Say hi.")
    joined = read_prompts(rows, prompt_column="instruction+input")
    assert joined.prompts == ("Add.\n\n2 + 2", "Say hi.")
    assert set(joined.columns) == {"output"}
    shown = read_demonstrations(rows, prompt_column="instruction+input", completion_column="output")
    assert (shown.prompts, shown.answers) == (("Add.\n\n2 + 2", "Say hi."), ("4", "Hi"))
    ranked = [{"q": "2 + 2?", "good": "4", "bad": "5"}] * 2
    pairs = read_preferences(ranked, prompt_column="q", chosen_column="good", rejected_column="bad")
    assert (pairs.prompts[0], pairs.chosen[0], pairs.rejected[0]) == ("2 + 2?", "4", "5")


def test_a_column_that_only_some_rows_have_is_none_in_the_others() -> None:
    given = read_prompts([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}])
    assert given.columns == {"x": (1, None), "y": (None, 2)}


def test_a_transcript_is_split_before_its_last_answer() -> None:
    before = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant:"
    pairs = read_preferences([{"chosen": f"{before} I say 4", "rejected": f"{before} I say 5"}] * 2)
    assert (pairs.prompts[0], pairs.chosen[0], pairs.rejected[0]) == (before, " I say 4", " I say 5")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"messages": [USER, ASSISTANT]}, "2 + 2?", "4"),
        ({"messages": [USER, ASSISTANT, USER]}, "2 + 2?", "4"),
        ({"messages": [USER, ASSISTANT, USER, WORSE]}, (USER,), (ASSISTANT, USER, WORSE)),
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", "4"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "2 + 2?", "4"),
        ({"prompt": "2 + 2?", "completion": [ASSISTANT]}, "2 + 2?", "4"),
        ({"prompt": [USER, WORSE, USER], "completion": "4"}, (USER, WORSE, USER), "4"),
    ],
)
def test_a_demonstration_is_found_in_every_format(row: dict, prompt: object, answer: object) -> None:
    shown = read_demonstrations([row])
    assert (shown.prompts, shown.answers) == ((prompt,), (answer,))


def test_rows_that_stand_twice_are_kept_and_counted() -> None:
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    pairs = read_preferences([row, row, row | {"prompt": "4?"}])
    assert len(pairs) == 3
    assert pairs.origin["duplicates"] == 1
    assert read_prompts(["a", "a"]).prompts == ("a", "a")


# ── what cannot be used ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "the data|list holds no prompt; wanted at least one"),
        (["a", ""], "row 2: the prompt is empty"),
        ([{"prompt": "a"}, {"prompt": " \n"}], "row 2: the prompt is empty"),
        ([{"prompt": "a"}, "b"], r"row 2 is a str \('b'\); wanted an object with prompt"),
        ([{"prompt": "a"}, 3], "row 2 is a int"),
        ([{"prompt": "a"}, ["b"]], "row 2 is a list"),
        (["a", 3], "row 2 is a int"),
        ([3], "row 1 is a int"),
        ([None], "row 1 is a NoneType"),
        ([{"prompt": 3}], "row 1: prompt is a int"),
        ([{"prompt": None}], "row 1: prompt is null"),
        ([{}], r"row 1 has no prompt; found the columns \(none\)"),
        ([{"question": "a", "answer": "b"}], "columns question, answer. Did you mean prompt_column='question'?"),
        ([{"promt": "a"}], "Did you mean prompt_column='promt'?"),
        ([{"Prompt": "a"}], "Did you mean prompt_column='Prompt'?"),
        ([{"instruction": "a", "input": "b", "output": "c"}], "prompt_column='instruction\\+input'?"),
        ([{"colour": "a"}], "found the columns colour. Wanted prompt: a text, or a list of messages"),
        ([{"prompt": []}], "the prompt leaves nothing to answer: it has no message"),
        ([{"prompt": [USER, ASSISTANT]}], "its last message is the assistant's"),
        ([{"prompt": [{"role": "user"}]}], "row 1: prompt is a list"),
        ([{"prompt": [{"from": "human", "value": "a"}]}], "rename them to role and content"),
        ([{"prompt": {"text": "a", "replies": []}}], "prompt is an object with text, replies, a node of a tree"),
        ([{"body": "a", "replies": [{"body": "b", "replies": []}]}], "That is a tree of replies; wanted flat rows"),
    ],
)
def test_a_prompt_that_is_none_is_one_clear_complaint(rows: list, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_prompts(rows)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a"}, "no chosen and no rejected; found the columns prompt. Wanted .* These are prompts alone"),
        ({"messages": []}, "These are demonstrations, which `tether sft` reads"),
        ({"prompt": "a", "accepted": "b", "rejected": "c"}, "has no chosen; .* Did you mean chosen_column='accepted'?"),
        (
            {"prompt": {"text": "a", "replies": [{"text": "b"}]}, "message_tree_id": "x"},
            "found the columns prompt, message_tree_id. That is a tree of replies",
        ),
        (
            {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1},
            "found the columns history, human_ref_A, human_ref_B, labels. Wanted prompt, chosen and rejected",
        ),
    ],
)
def test_a_comparison_that_is_none_says_the_nearest_form(row: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_preferences([row, row])


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "holds no demonstration; wanted at least one"),
        ([{"messages": [USER]}], "row 1: the assistant says nothing"),
        ([{"messages": [ASSISTANT, USER]}], "row 1: the assistant speaks first"),
        ([{"prompt": "a", "completion": " "}], "row 1: completion is empty"),
        ([{"messages": [USER, ASSISTANT, USER, WORSE | {"content": ""}]}], "a turn of the assistant is empty"),
        ([{"prompt": "a", "completion": [USER]}], "completion does not begin with the assistant's turn"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "These are preferences, which `tether reward` reads"),
        (
            [{"instruction": "a", "input": "b", "output": "c"}],
            "Did you mean prompt_column='instruction\\+input', completion_column='output'?",
        ),
    ],
)
def test_a_demonstration_that_is_none_is_one_clear_complaint(rows: list, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_demonstrations(rows)


def test_the_row_that_a_complaint_names_is_counted_without_blank_lines_and_found_with_them(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n\n{"prompt": 3}\n')
    with pytest.raises(InputError, match=r"p\.jsonl, row 2 \(line 4\): prompt is a int"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.jsonl", b"", "empty.jsonl holds no prompt"),
        ("empty.json", b"", "empty.json holds no prompt"),
        ("empty.csv", b"", "empty.csv holds no prompt"),
        ("empty.txt", b"\n \n", "empty.txt holds no prompt"),
        ("header.csv", b"prompt,level\n", "header.csv holds no prompt"),
        ("latin.jsonl", '{"prompt": "a"}\n{"prompt": "grün"}\n'.encode("latin1"), r"line 2 is no UTF-8 \(byte 0xfc"),
        ("latin.csv", "prompt\ngrün\n".encode("latin1"), "line 2 is no UTF-8"),
        ("wide.txt", "a\nb\n".encode("utf-16"), "begins as UTF-16 text does; save the file as UTF-8"),
        ("torn.jsonl", b'{"prompt": "a"}\n{"prompt": "b', "line 2 is no JSON"),
        ("torn.json", b'[{"prompt": "a"}, ', "torn.json is no JSON"),
        ("ragged.csv", b"prompt,level\na,1\nb, or c,2\n", "row 2 has 3 fields and the first line names 2 columns"),
        ("twice.csv", b"prompt,prompt\na,b\n", "names a column twice"),
        ("headless.csv", b"What is a string?\nWhat is a bow?\n", r"found the columns What is a string\?"),
        ("quote.csv", b'prompt\n"open\n', "is no CSV near line"),
        ("text.parquet", b"no parquet", "cannot be read as Parquet"),
        ("torn.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-20], "cannot read"),
        ("prompts.doc", b"a", "cannot tell what .*prompts.doc holds; wanted a name that ends in .jsonl"),
        ("object.json", b'{"version": 1, "data": []}', "found the columns version, data"),
    ],
)
def test_a_file_that_is_broken_is_one_clear_complaint(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_prompts(tmp_path / name)


def test_a_missing_file_names_those_nearby(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(InputError, match=r"there is no file .*promts\.jsonl; did you mean .*prompts\.jsonl\?"):
        read_prompts(tmp_path / "promts.jsonl")
    with pytest.raises(InputError, match=r"nor a folder .*nowhere"):
        read_prompts(tmp_path / "nowhere" / "prompts.jsonl")
    with pytest.raises(InputError, match=r"is a folder; wanted one file .*did you mean .*prompts\.jsonl\?"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (3, "the data is a int; wanted a file"),
        (None, "the data is a NoneType"),
        (b"prompts.txt", "the data is a bytes"),
        ({"prompt": "a"}, "the data is one row with the columns prompt; wanted a list of rows"),
        ({"prompt": ["a", "b"], "level": [1]}, r"differ in length \(prompt 2, level 1\)"),
        ({}, r"has the splits \(none\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_an_object_that_holds_no_rows_is_one_clear_complaint(source: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_prompts(source)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="limit is 0; wanted 1 or more"):
        read_prompts(["a"], limit=0)
