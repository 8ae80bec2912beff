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
from typing import TypeAlias

from tether.batch import Message, Prompt
from tether.data_columns import TREE, Names, lacking, listed, named_otherwise, unread_prompt
from tether.data_files import Row
from tether.errors import InputError

GOLD = ("chosen_gold", "rejected_gold")
TURN = "\n\nAssistant:"
"""What opens an answer in a transcript."""
JOINT = "\n\n"
"""What stands between the texts of columns that make one prompt."""
SHOWN = 40
"""Characters of a wrong value that a complaint repeats."""

Text: TypeAlias = str | list[Message]
"""A value that is a text or the messages of a conversation."""


@dataclass(frozen=True)
class Comparison:
    """One row of preferences."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_gold: float | None
    rejected_gold: float | None
    unread: str | None = None
    """A column that looks like the prompt, where another text was taken for it."""


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
        raise InputError(lacking(row, fields, names, ("prompt",)))
    else:
        prompt = _simplest(_text_or_messages(found, names.prompt, row))
    _check_asks(prompt, row)
    spent = {part for role in used for part in getattr(names, role).split("+")}
    return prompt, {str(name): value for name, value in fields.items() if name not in spent}


def comparison_of(row: Row, names: Names) -> Comparison:
    """Prompt, chosen and rejected of this row, with their gold scores."""
    fields = _fields(row, "prompt, chosen and rejected")
    if any(fields.get(side) is None for side in (names.chosen, names.rejected)):
        raise InputError(lacking(row, fields, names, ("chosen", "rejected")))
    chosen, rejected = (
        _text_or_messages(_value(fields, side, row), side, row) for side in (names.chosen, names.rejected)
    )
    given = _value(fields, names.prompt, row)
    prompt = None if given is None else _text_or_messages(given, names.prompt, row)
    good_gold, bad_gold = (_number(fields.get(column), column, row) for column in GOLD)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return Comparison(_simplest(prompt), chosen, rejected, good_gold, bad_gold)
        implied, good, bad = split_prompt(chosen, rejected)
        return Comparison(implied, good, bad, good_gold, bad_gold, unread=unread_prompt(fields, implied))
    if isinstance(chosen, list) and isinstance(rejected, list):
        context, good, bad = _split_conversations(prompt, chosen, rejected, row)
        return Comparison(_simplest(context), good, bad, good_gold, bad_gold)
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
        raise InputError(lacking(row, fields, names, ("prompt", "completion")))
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
        f"{row.where} is a {type(row.content).__name__} ({_short(row.content)!r}); wanted an object with {wanted}"
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
    return _sound(str(value), column, row) if isinstance(value, str) else _messages(value, column, row)


def _messages(value: object, column: str, row: Row) -> list[Message]:
    if isinstance(value, Mapping):
        node = any(isinstance(value.get(key), list) for key in TREE)
        raise InputError(
            f"{row.where}: {column} is an object with {listed(value)}{', a node of a tree' * node}; wanted text or "
            f"messages{': write one row for each pair of replies to the same message' * node}"
        )
    if not isinstance(value, Sequence) or isinstance(value, str) or _is_talk(value) is False:
        raise InputError(
            f"{row.where}: {column} is a {type(value).__name__} ({_short(value)}); wanted text, or a list of messages "
            '{"role": …, "content": …} with text in both' + named_otherwise(value)
        )
    return [_message(entry, f"message {place} of {column}", row) for place, entry in enumerate(value, start=1)]


def _is_talk(value: Sequence[object]) -> bool:
    """Whether these are messages, whatever they say."""
    return all(isinstance(entry, Mapping) and {"role", "content"} <= set(entry) for entry in value)


def _message(entry: Mapping[str, object], what: str, row: Row) -> Message:
    """One message; a content of several parts is their texts, joined."""
    role, content = entry["role"], entry["content"]
    if isinstance(content, Sequence) and not isinstance(content, str) and content:
        content = _joined(content, what, row)
    for key, text in (("role", role), ("content", content)):
        if not isinstance(text, str):
            found = "null" if text is None else f"a {type(text).__name__} ({_short(text)})"
            raise InputError(f"{row.where}: the {key} of {what} is {found}; wanted text")
    return {"role": str(role), "content": _sound(str(content), what, row)}


def _joined(parts: Sequence[object], what: str, row: Row) -> object:
    """The text of a content that is a list of `{"type": "text", "text": …}`."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    kinds = sorted({str(part.get("type", "?")) if isinstance(part, Mapping) else "?" for part in parts})
    raise InputError(f"{row.where}: {what} has parts of the types {', '.join(kinds)}; wanted text alone")


def _sound(text: str, what: str, row: Row) -> str:
    """The text, unless it holds half of a surrogate pair, which no tokenizer and no file can take."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise InputError(
            f"{row.where}: {what} holds {text[fault.start]!a} at character {fault.start + 1}, half of a character that "
            "was cut in two; write the whole one, or leave it out"
        ) from None
    return text


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _number(value: object, column: str, row: Row) -> float | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except ValueError:
        raise InputError(
            f"{row.where}: {column} is a {type(value).__name__} ({_short(value)}); wanted a number"
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
