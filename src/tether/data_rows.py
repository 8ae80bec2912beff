"""What a row says: a prompt, a comparison or a demonstration, in TRL's formats, plain or conversational.

    {"prompt": "2 + 2?"}                                                                       a prompt
    {"prompt": [{"role": "user", "content": "2 + 2?"}]}                                        … conversational
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}                                       a comparison
    {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"}                                             … its prompt implied
    {"prompt": "2 + 2?", "completion": "4"}, {"messages": [{"role": "user", …}, …]}            a demonstration

An implied prompt is what both sides begin with: whole words of a text, the turns of a transcript
(`\\n\\nHuman: …\\n\\nAssistant:`) up to the last answer, whole messages of a conversation. Gold scores of a comparison
are read where `chosen_gold` and `rejected_gold` stand. Columns may be named otherwise, and several joined by `+` make
one text. A row that cannot be used is an InputError that names it, lists the columns found and says the nearest right
form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeAlias

from tether.batch import Message, Prompt
from tether.data_files import Row
from tether.errors import InputError

GOLD = ("chosen_gold", "rejected_gold")
TURN = "\n\nAssistant:"
"""What opens an answer in a transcript."""
JOINT = "\n\n"
"""What stands between the texts of columns that make one prompt."""
TREE = ("replies", "children")
ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        "prompts", "question", "instruction", "query", "input", "problem", "user", "post", "context", "history",
        "goal", "text", "content", "act",
    ),
    "chosen": ("accepted", "preferred", "better", "winner", "good", "response_chosen", "answer_chosen", "positive"),
    "rejected": ("dispreferred", "worse", "loser", "bad", "response_rejected", "answer_rejected", "negative"),
    "completion": ("response", "output", "answer", "target", "reply", "solution", "demonstration", "summary"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
}  # fmt: skip
"""What other data sets call a column."""

Text: TypeAlias = str | list[Message]
"""A value that is a text or the messages of a conversation."""


@dataclass(frozen=True)
class Names:
    """What the columns are called in a source."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    messages: str = "messages"

    def option(self, role: str, column: str) -> str:
        """How a caller names this column."""
        return f"{role}_column={column!r}"


@dataclass(frozen=True)
class Comparison:
    """One row of preferences."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_gold: float | None
    rejected_gold: float | None


@dataclass(frozen=True)
class Demonstration:
    """One row of demonstrations."""

    prompt: Prompt
    answer: str | tuple[Message, ...]
    """The assistant's text, or the turns from its first answer on."""


# ── the three readers ───────────────────────────────────────────────────────────────────────────────────────────────
def prompt_of(row: Row, names: Names) -> tuple[Prompt, dict[str, object]]:
    """The prompt of this row, and the columns that are no part of it.

    A text or a conversation in the prompt's column; else what chosen and rejected begin with; else the messages up to
    the last answer. Raises InputError where there is none, it is empty, or its last message is the assistant's.
    """
    fields = _fields(row, "prompt")
    found = _value(fields, names.prompt, row)
    used: tuple[str, ...] = ("prompt",)
    if found is None and all(fields.get(side) is not None for side in (names.chosen, names.rejected)):
        prompt, used = comparison_of(row, names).prompt, ("chosen", "rejected")
    elif found is None and fields.get(names.messages) is not None:
        prompt, used = _before_last_answer(_messages(fields[names.messages], names.messages, row)), ("messages",)
    elif found is None:
        raise InputError(_lacking(row, fields, names, ("prompt",)))
    else:
        prompt = _simplest(_text_or_messages(found, names.prompt, row))
    _check_asks(prompt, row)
    spent = {part for role in used for part in getattr(names, role).split("+")}
    return prompt, {str(name): value for name, value in fields.items() if name not in spent}


def comparison_of(row: Row, names: Names) -> Comparison:
    """Prompt, chosen and rejected of this row, with their gold scores."""
    fields = _fields(row, "prompt, chosen and rejected")
    if any(fields.get(side) is None for side in (names.chosen, names.rejected)):
        raise InputError(_lacking(row, fields, names, ("chosen", "rejected")))
    chosen, rejected = (
        _text_or_messages(_value(fields, side, row), side, row) for side in (names.chosen, names.rejected)
    )
    given = _value(fields, names.prompt, row)
    prompt = None if given is None else _text_or_messages(given, names.prompt, row)
    gold = tuple(_number(fields.get(column), column, row) for column in GOLD)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
        return Comparison(_simplest(prompt), chosen, rejected, *gold)
    if isinstance(chosen, list) and isinstance(rejected, list):
        context, good, bad = _split_conversations(prompt, chosen, rejected, row)
        return Comparison(_simplest(context), good, bad, *gold)
    raise InputError(f"{row.where}: chosen and rejected are of two kinds; wanted both as text, or both as messages")


def demonstration_of(row: Row, names: Names) -> Demonstration:
    """Prompt and answer of this row.

    Of `messages`, the prompt is what stands before the assistant's first turn. Raises InputError where the assistant
    says nothing, or speaks first.
    """
    fields = _fields(row, "messages, or prompt and completion")
    given = _value(fields, names.prompt, row)
    answer = _value(fields, names.completion, row)
    if given is None and fields.get(names.messages) is not None:
        return _conversation_shown(_messages(fields[names.messages], names.messages, row), row)
    if given is None or answer is None:
        raise InputError(_lacking(row, fields, names, ("prompt", "completion")))
    prompt = _text_or_messages(given, names.prompt, row)
    reply = _text_or_messages(answer, names.completion, row)
    if isinstance(reply, list):
        asked = prompt if isinstance(prompt, list) else [_said("user", prompt)]
        if not reply or reply[0]["role"] != "assistant":
            raise InputError(f"{row.where}: completion does not begin with the assistant's turn; wanted its answer")
        return _shown(asked, reply[: _last_answer(reply) + 1], row)
    if not reply.strip():
        raise InputError(f"{row.where}: {names.completion} is empty; wanted the assistant's answer")
    return Demonstration(_simplest(prompt), reply)


def split_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What both texts begin with, up to an answer's opening or the end of a word, and the rest of each.

    >>> split_prompt("The sky is blue.", "The sky is black.")
    ('The sky is', ' blue.', ' black.')
    >>> split_prompt("\\n\\nHuman: Hi\\n\\nAssistant: I do.", "\\n\\nHuman: Hi\\n\\nAssistant: I see.")[1:]
    (' I do.', ' I see.')
    """
    shorter = min(len(chosen), len(rejected))
    end = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    opening = chosen[:end].rfind(TURN)
    if opening >= 0:  # a transcript: both answers whole, whatever words they share
        end = opening + len(TURN)
        return chosen[:end], chosen[end:], rejected[end:]
    if any(len(text) > end and not text[end].isspace() for text in (chosen, rejected)):
        while end and not chosen[end - 1].isspace():
            end -= 1
    while end and chosen[end - 1] == " ":  # tokenizers want the space with the word that follows
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _fields(row: Row, wanted: str) -> Mapping[str, object]:
    if isinstance(row.content, Mapping):
        return row.content
    raise InputError(
        f"{row.where} is a {type(row.content).__name__} ({str(row.content)[:40]!r}); wanted an object with {wanted}"
    )


def _value(fields: Mapping[str, object], column: str, row: Row) -> object:
    """The value of a column, None where there is none; of several joined by `+`, the texts that are not empty."""
    if column in fields or "+" not in column:
        return fields.get(column)
    parts = [fields.get(part) for part in column.split("+")]
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise InputError(f"{row.where}: {column} joins columns of text; one of them is none")
    return JOINT.join(part for part in parts if isinstance(part, str) and part.strip()) or None


def _text_or_messages(value: object, column: str, row: Row) -> Text:
    return value if isinstance(value, str) else _messages(value, column, row)


def _messages(value: object, column: str, row: Row) -> list[Message]:
    if isinstance(value, Sequence) and not isinstance(value, str) and all(_is_message(entry) for entry in value):
        return [{"role": entry["role"], "content": entry["content"]} for entry in value]
    if isinstance(value, Mapping):
        raise InputError(
            f"{row.where}: {column} is an object with {_listed(value)}, a node of a tree; wanted text or messages: "
            "write one row for each pair of replies to the same message"
        )
    raise InputError(
        f"{row.where}: {column} is a {type(value).__name__} ({str(value)[:40]}); wanted text, or a list of messages "
        '{"role": …, "content": …} with text in both' + _named_otherwise(value)
    )


def _named_otherwise(value: object) -> str:
    """A hint where messages have the keys of another convention."""
    first = value[0] if isinstance(value, Sequence) and value else None
    if isinstance(first, Mapping) and {"from", "value"} <= set(first):
        return "; found from and value: rename them to role and content, human to user and gpt to assistant"
    return ""


def _is_message(entry: object) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(entry.get(key), str) for key in ("role", "content"))


def _number(value: object, column: str, row: Row) -> float | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except ValueError:
        raise InputError(
            f"{row.where}: {column} is a {type(value).__name__} ({str(value)[:40]}); wanted a number"
        ) from None


def _simplest(prompt: Text) -> Prompt:
    """A conversation of one user message is the same as its text."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────────
def _split_conversations(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], row: Row
) -> tuple[list[Message], str, str]:
    """The messages before the last, which both sides must share, and the last of each, which the assistant says."""
    asked = [_said("user", prompt)] if isinstance(prompt, str) else list(prompt or [])
    before, good = _side(asked, chosen, "chosen", row)
    before_rejected, bad = _side(asked, rejected, "rejected", row)
    if before != before_rejected:
        raise InputError(
            f"{row.where}: chosen and rejected part before their last message; wanted one answer to compare"
        )
    if not before:
        raise InputError(f"{row.where} has no prompt; wanted a prompt column, or messages before the assistant's last")
    return before, good, bad


def _side(asked: list[Message], side: list[Message], name: str, row: Row) -> tuple[list[Message], str]:
    messages = side if side[: len(asked)] == asked else [*asked, *side]
    if not messages or messages[-1]["role"] != "assistant":
        role = messages[-1]["role"] if messages else "nobody"
        raise InputError(f"{row.where}: the last message of {name} is by {role}; wanted the assistant's answer")
    return messages[:-1], messages[-1]["content"]


def _last_answer(messages: Sequence[Message]) -> int:
    """Place of the assistant's last turn, -1 where it has none."""
    return max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


def _before_last_answer(messages: list[Message]) -> Prompt:
    """The conversation up to the assistant's last turn, or whole where the last turn is another's."""
    ends_with_answer = bool(messages) and messages[-1]["role"] == "assistant"
    return _simplest(messages[:-1] if ends_with_answer else messages)


def _conversation_shown(messages: list[Message], row: Row) -> Demonstration:
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise InputError(f"{row.where}: the assistant says nothing; wanted a conversation with its answers")
    return _shown(messages[:first], messages[first : _last_answer(messages) + 1], row)


def _shown(asked: list[Message], turns: list[Message], row: Row) -> Demonstration:
    if not asked:
        raise InputError(f"{row.where}: the assistant speaks first; wanted the user's turn before its answer")
    if len(turns) == 1 and turns[0]["content"].strip():
        return Demonstration(_simplest(asked), turns[0]["content"])
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        raise InputError(f"{row.where}: a turn of the assistant is empty; wanted its answer")
    return Demonstration(tuple(asked), tuple(turns))


def _check_asks(prompt: Prompt, row: Row) -> None:
    """Raise InputError where the prompt leaves nothing to answer."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{row.where}: the prompt is empty; remove the row, or write what the policy shall answer")
    elif not prompt or prompt[-1]["role"] == "assistant":
        said = "it has no message" if not prompt else "its last message is the assistant's"
        raise InputError(f"{row.where}: the prompt leaves nothing to answer: {said}; wanted it to end with the user's")


# ── what is wrong with the columns ──────────────────────────────────────────────────────────────────────────────────
def _lacking(row: Row, fields: Mapping[str, object], names: Names, roles: tuple[str, ...]) -> str:
    """The complaint about a row without these columns."""
    null = [column for role in roles if (column := getattr(names, role)) in fields and fields[column] is None]
    if null:
        return f"{row.where}: {' and '.join(null)} {'is' if len(null) == 1 else 'are'} null; wanted text or messages"
    missing = [getattr(names, role) for role in roles if _absent(fields, getattr(names, role))]
    return (
        f"{row.where} has no {' and no '.join(missing)}; found the columns {_listed(fields) or '(none)'}. "
        f"{_nearest(fields, names, roles)}"
    )


def _absent(fields: Mapping[str, object], column: str) -> bool:
    return all(fields.get(part) is None for part in (column, *column.split("+")))


def _nearest(fields: Mapping[str, object], names: Names, roles: tuple[str, ...]) -> str:
    """The right form that is nearest to these columns."""
    nodes = [fields, *(value for value in fields.values() if isinstance(value, Mapping))]
    if any(isinstance(node.get(key), list) for node in nodes for key in TREE):
        return "That is a tree of replies; wanted flat rows: write one for each pair of replies to the same message"
    found: dict[str, str] = {}
    for role in roles:
        if _absent(fields, getattr(names, role)) and (near := _like(role, fields, set(found.values()))):
            found[role] = near
    if found:
        if found.get("prompt") == "instruction" and fields.get("input") is not None:
            found["prompt"] = "instruction+input"
        return f"Did you mean {', '.join(names.option(role, column) for role, column in found.items())}?"
    return f"Wanted {FORMS[roles]}{_belongs_elsewhere(fields, roles)}"


def _like(role: str, fields: Mapping[str, object], taken: set[str]) -> str | None:
    """The column that most probably holds this: by another name in use, or by a slip of the pen."""
    free = {str(name).lower(): str(name) for name, value in fields.items() if value is not None and name not in taken}
    usual = [free[alias] for alias in (role, *ALIASES[role]) if alias in free]
    close = [free[name] for name in get_close_matches(role, free, n=1, cutoff=0.75)]
    return next(iter([*usual, *close]), None)


FORMS: Mapping[tuple[str, ...], str] = {
    ("prompt",): "prompt: a text, or a list of messages",
    ("chosen", "rejected"): "prompt, chosen and rejected, or chosen and rejected that begin with the prompt",
    ("prompt", "completion"): "messages, or prompt and completion",
}


def _belongs_elsewhere(fields: Mapping[str, object], roles: tuple[str, ...]) -> str:
    """A hint where the columns are those of another of the three formats."""
    if "chosen" not in roles and {"chosen", "rejected"} <= set(fields):
        return ". These are preferences, which `tether reward` reads"
    if "completion" not in roles and ("messages" in fields or "completion" in fields):
        return ". These are demonstrations, which `tether sft` reads"
    return ". These are prompts alone" if set(fields) == {"prompt"} else ""


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(map(str, names))
