"""Preference pairs from files in TRL's format: `prompt`, `chosen`, `rejected`, plain or conversational.

    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}                                         plain
    {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"}                                               prompt implied
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": [{"role": "assistant", …}], …}  conversational

JSON lines, or one JSON list. An implied prompt is what both sides begin with: whole words of a text, whole messages of
a conversation. Gold scores are read where `chosen_gold` and `rejected_gold` stand. Further columns are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tether.batch import Message, Prompt
from tether.errors import InputError
from tether.preferences import Pairs

GOLD = ("chosen_gold", "rejected_gold")


def read_pairs(path: str | Path) -> Pairs:
    """The pairs of a JSON or JSONL file. Rows whose two sides are the same text tell nothing and are left out.

    Raises InputError where the file is missing, is no JSON, holds fewer than two comparisons, lacks a column, or has
    something else than text in one; each names the row, counted from 1 as lines are.
    """
    path = Path(path)
    rows = _rows(path)
    if len(rows) < 2:
        raise InputError(
            f"{path} holds {len(rows)} comparison{'s' * (len(rows) != 1)}; wanted at least 2, and hundreds to learn "
            "from: one JSON object a line, with prompt, chosen and rejected"
        )
    return pairs_of(rows, name=str(path))


def pairs_of(rows: Iterable[object], name: str = "the data set") -> Pairs:
    """The same from rows in memory: a list, or an iterable data set. `name` is what errors call it."""
    read = [_read_row(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    kept = [row for row in read if row[1] != row[2]]
    if not kept:
        raise InputError(f"{name} holds no comparison of two different responses; wanted at least one")
    prompts, chosen, rejected, chosen_gold, rejected_gold = zip(*kept, strict=True)
    gold_known = not any(score is None for score in (*chosen_gold, *rejected_gold))
    return Pairs(
        prompts,
        chosen,
        rejected,
        chosen_gold if gold_known else None,
        rejected_gold if gold_known else None,
        {"read": len(kept), "identical": len(read) - len(kept), "file": Path(name).name},
    )


def _rows(path: Path) -> list[object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"cannot read {path}: {fault}; wanted a JSON or JSONL file of comparisons") from fault
    if text.lstrip().startswith("["):
        return list(_parse(text, str(path)))  # type: ignore[call-overload, no-any-return]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_parse(line, f"{path}, line {number}") for number, line in lines]


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as fault:
        raise InputError(f"{where} is no JSON ({fault}); wanted one JSON object a line, or one list of them") from fault


def _read_row(row: object, where: str) -> tuple[Prompt, str, str, float | None, float | None]:
    """Prompt, chosen, rejected and their gold scores."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is a {type(row).__name__}; wanted an object with prompt, chosen and rejected")
    missing = [column for column in ("chosen", "rejected") if column not in row]
    if missing:
        raise InputError(
            f"{where} has no {' and no '.join(missing)}; found the columns {', '.join(map(str, row)) or '(none)'}. "
            "Wanted prompt, chosen and rejected, or chosen and rejected that begin with the prompt"
        )
    prompt, chosen, rejected = (_text_or_messages(row.get(c), c, where) for c in ("prompt", "chosen", "rejected"))
    chosen_gold, rejected_gold = (_number(row.get(column), column, where) for column in GOLD)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
        return _simplest(prompt), chosen, rejected, chosen_gold, rejected_gold
    if isinstance(chosen, list) and isinstance(rejected, list):
        context, good, bad = _split_conversations(prompt, chosen, rejected, where)
        return _simplest(context), good, bad, chosen_gold, rejected_gold
    raise InputError(f"{where}: chosen and rejected are of two kinds; wanted both as text, or both as messages")


def split_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What both texts begin with, up to the end of a word, and the rest of each.

    >>> split_prompt("The sky is blue.", "The sky is black.")
    ('The sky is', ' blue.', ' black.')
    """
    shorter = min(len(chosen), len(rejected))
    end = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    if any(len(text) > end and not text[end].isspace() for text in (chosen, rejected)):
        while end and not chosen[end - 1].isspace():
            end -= 1
    while end and chosen[end - 1] == " ":  # tokenizers want the space with the word that follows
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _split_conversations(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], str, str]:
    """The messages before the last, which both sides must share, and the last of each, which the assistant says."""
    asked: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    before, good = _conversation(asked, chosen, "chosen", where)
    before_rejected, bad = _conversation(asked, rejected, "rejected", where)
    if before != before_rejected:
        raise InputError(f"{where}: chosen and rejected part before their last message; wanted one answer to compare")
    if not before:
        raise InputError(f"{where} has no prompt; wanted a prompt column, or messages before the assistant's last")
    return before, good, bad


def _conversation(asked: list[Message], side: list[Message], name: str, where: str) -> tuple[list[Message], str]:
    messages = side if side[: len(asked)] == asked else [*asked, *side]
    if not messages or messages[-1]["role"] != "assistant":
        role = messages[-1]["role"] if messages else "nobody"
        raise InputError(f"{where}: the last message of {name} is by {role}; wanted the assistant's answer")
    return messages[:-1], messages[-1]["content"]


def _text_or_messages(value: object, column: str, where: str) -> str | list[Message] | None:
    if isinstance(value, str) or (value is None and column == "prompt"):
        return value
    if isinstance(value, Sequence) and all(_is_message(entry) for entry in value):
        return [{"role": entry["role"], "content": entry["content"]} for entry in value]
    raise InputError(
        f"{where}: {column} is a {type(value).__name__} ({str(value)[:40]}); wanted text, or a list of messages "
        '{"role": …, "content": …} with text in both'
    )


def _is_message(entry: object) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(entry.get(key), str) for key in ("role", "content"))


def _number(value: object, column: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {column} is a {type(value).__name__}; wanted a number")
    return float(value)


def _simplest(prompt: str | list[Message] | None) -> Prompt:
    """A conversation of one user message is the same as its text."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "" if prompt is None else prompt if isinstance(prompt, str) else tuple(prompt)
