"""What columns are called, and what to say where the right ones are not there: the nearest right form.

    lacking(row, fields, names, roles) → the complaint: the columns found, and which of them was probably meant

Knows no value of a row beyond its kind. Read next: `data_rows.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from tether.data_files import Row

TREE = ("replies", "children")
ASKS = ("prompts", "question", "instruction", "query", "problem", "history", "post")
"""Columns that hold the prompt wherever they stand."""
TWINS = (("a", "b"), ("0", "1"), ("1", "2"), ("j", "k"))
"""How columns end that hold two responses of which another says which is better."""
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


def lacking(row: Row, fields: Mapping[str, object], names: Names, roles: tuple[str, ...]) -> str:
    """The complaint about a row without these columns."""
    null = [column for role in roles if (column := getattr(names, role)) in fields and fields[column] is None]
    if null:
        return f"{row.where}: {' and '.join(null)} {'is' if len(null) == 1 else 'are'} null; wanted text or messages"
    missing = [getattr(names, role) for role in roles if _absent(fields, getattr(names, role))]
    return (
        f"{row.where} has no {' and no '.join(missing)}; found the columns {listed(fields) or '(none)'}. "
        f"{_nearest(fields, names, roles)}"
    )


def _absent(fields: Mapping[str, object], column: str) -> bool:
    return all(fields.get(part) is None for part in (column, *column.split("+")))


def _nearest(fields: Mapping[str, object], names: Names, roles: tuple[str, ...]) -> str:
    """The right form that is nearest to these columns."""
    nodes = [fields, *(value for value in fields.values() if isinstance(value, Mapping))]
    if any(isinstance(node.get(key), list) for node in nodes for key in TREE):
        return "That is a tree of replies; wanted flat rows: write one for each pair of replies to the same message"
    if "prompt" in roles and (talk := _conversation_in(fields)):
        return f"{talk} holds a conversation: call that column messages{named_otherwise(fields[talk])}"
    missing = [role for role in roles if _absent(fields, getattr(names, role))]
    found: dict[str, str] = {}
    for role in missing:
        if near := _like(role, fields, set(found.values())):
            found[role] = near
    if found.get("prompt") == "instruction" and fields.get("input") is not None:
        found["prompt"] = "instruction+input"
    if found and len(found) == len(missing):
        return f"Did you mean {', '.join(names.option(role, column) for role, column in found.items())}?"
    hints = [f"{column} may be the {role}" for role, column in found.items()]
    if "chosen" in missing and (pair := _twins(fields)):
        hints = [f"{' and '.join(pair)} look like two responses: write the better one as chosen, the other as rejected"]
    return f"Wanted {FORMS[roles]}{_belongs_elsewhere(fields, roles)}" + "".join(f"; {hint}" for hint in hints)


def _conversation_in(fields: Mapping[str, object]) -> str | None:
    """A column of messages under another name."""
    for name in ALIASES["messages"]:
        value = fields.get(name)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return name
    return None


def _twins(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """Two columns of text whose names differ in their last letter alone, as `response_a` and `response_b`."""
    texts = {name.lower(): name for name, value in fields.items() if isinstance(value, str)}
    for first, second in TWINS:
        for name in texts:
            other = name[: -len(first)] + second
            if name.endswith(first) and other in texts:
                return texts[name], texts[other]
    return None


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


def listed(names: Mapping[str, object]) -> str:
    return ", ".join(map(str, names))


def named_otherwise(value: object) -> str:
    """A hint where messages have the keys of another convention."""
    first = value[0] if isinstance(value, Sequence) and value else None
    if isinstance(first, Mapping) and {"from", "value"} <= set(first):
        return "; found from and value: rename them to role and content, human to user and gpt to assistant"
    return ""


def unread_prompt(fields: Mapping[str, object], implied: str) -> str | None:
    """The column that most probably holds the question, where what both sides begin with does not repeat it."""
    near = _like("prompt", {name: value for name, value in fields.items() if str(name) in ASKS}, set())
    asked = None if near is None else fields[near]
    if not isinstance(asked, str) or not asked.strip() or asked.strip() in implied:
        return None
    return "instruction+input" if near == "instruction" and "input" in fields else near
