"""Bring your own data: prompts, preferences and demonstrations from files, the hub or memory, in TRL's formats.

    read_prompts(source)        → PromptSet         what the policy answers
    read_preferences(source)    → Pairs             what the reward model learns from
    read_demonstrations(source) → Demonstrations    what an SFT checkpoint is made of

Where rows come from is `data_files.py`; what a row says is `data_rows.py`. All rows are checked before the first is
used, and every complaint names source and row. Knows no tokenizer: what is too long for a model is seen in
`prompts.py:fit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tether.batch import Message, Prompt
from tether.data_columns import Names
from tether.data_files import DataSource, Row, Rows, open_rows
from tether.data_rows import Comparison, comparison_of, demonstration_of, prompt_of
from tether.errors import InputError
from tether.preferences import Pairs
from tether.prompts import PromptSet

RESERVED = ("prompts", "responses")
"""What a reward function calls its first two arguments; columns of these names get a `_` behind."""


@dataclass(frozen=True)
class Demonstrations:
    """Prompts with the answers that an SFT model shall give."""

    prompts: tuple[Prompt, ...]
    answers: tuple[str | tuple[Message, ...], ...]
    """The assistant's text; or the turns from its first answer to its last, of which its own are learned."""
    origin: Mapping[str, object] = field(default_factory=dict)
    """Where they come from: goes into the checkpoint's manifest."""

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, places: Sequence[int]) -> Demonstrations:
        """The demonstrations at these places, in this order."""
        prompts = tuple(self.prompts[place] for place in places)
        return replace(self, prompts=prompts, answers=tuple(self.answers[place] for place in places))

    @property
    def digest(self) -> str:
        """A hash of prompts and answers, in their order."""
        text = json.dumps([self.prompts, self.answers], ensure_ascii=False, default=list)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def read_prompts(
    source: DataSource,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str = "prompt",
    limit: int | None = None,
) -> PromptSet:
    """Prompts, one a row: `prompt` as text or messages; a list of texts, or a .txt file of one a line.

    Preferences and demonstrations serve too: their prompt is what chosen and rejected begin with, or the messages
    before the last answer. Further columns are kept, None where a row has none, and reach the reward function by
    name. `prompt_column` may join several, as `instruction+input`. `limit`: rows to read at most.

    Raises InputError where the source is missing or empty or a row holds no prompt; the error names the row.
    """
    rows = open_rows(source, split=split, subset=subset, limit=limit)
    names = Names(prompt=prompt_column)
    read = [prompt_of(row, names) for row in _objects(rows, text_column=prompt_column)]
    if not read:
        raise InputError(f"{rows.name} holds no prompt; wanted at least one: a row with {prompt_column}, or a line")
    columns = dict.fromkeys(name for _, others in read for name in others)
    kept = {_free(name, columns): tuple(others.get(name) for _, others in read) for name in columns}
    return PromptSet(tuple(prompt for prompt, _ in read), kept)


def read_preferences(
    source: DataSource,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    limit: int | None = None,
) -> Pairs:
    """Comparisons: `prompt`, `chosen`, `rejected`, as text or messages; without `prompt`, what both sides begin with.

    Rows whose two sides are the same tell nothing: they are left out, and counted in `origin["identical"]`. Rows that
    stand twice are kept, and counted in `origin["duplicates"]`: the same comparison may then be learned from and
    measured on.

    Where a prompt is implied although a column looks like one, `origin["unread"]` names that column.

    Raises InputError where the source is missing, holds fewer than two comparisons, or a row is none.
    """
    rows = open_rows(source, split=split, subset=subset, limit=limit)
    names = Names(prompt=prompt_column, chosen=chosen_column, rejected=rejected_column)
    read = [comparison_of(row, names) for row in _objects(rows)]
    if len(read) < 2:
        raise InputError(
            f"{rows.name} holds {len(read)} comparison{'s' * (len(read) != 1)}; wanted at least 2, and hundreds to "
            "learn from: rows with prompt, chosen and rejected"
        )
    return _pairs(read, rows.name)


def _pairs(read: Sequence[Comparison], name: str) -> Pairs:
    """The comparisons whose sides differ, with what was read counted in `origin`."""
    kept = [row for row in read if row.chosen != row.rejected]
    if not kept:
        raise InputError(f"{name} holds no comparison of two different responses; wanted at least one")
    gold = not any(row.chosen_gold is None or row.rejected_gold is None for row in kept)
    different = len({json.dumps([row.prompt, row.chosen, row.rejected], default=list) for row in kept})
    origin: dict[str, object] = {
        "read": len(kept), "identical": len(read) - len(kept), "duplicates": len(kept) - different,
        "file": Path(name).name,
    }  # fmt: skip
    if unread := next((row.unread for row in kept if row.unread), None):
        origin["unread"] = unread
    return Pairs(
        tuple(row.prompt for row in kept),
        tuple(row.chosen for row in kept),
        tuple(row.rejected for row in kept),
        tuple(row.chosen_gold or 0.0 for row in kept) if gold else None,
        tuple(row.rejected_gold or 0.0 for row in kept) if gold else None,
        origin,
    )


def read_demonstrations(
    source: DataSource,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    limit: int | None = None,
) -> Demonstrations:
    """Demonstrations: `messages`, or `prompt` and `completion`, as text or messages.

    Of `messages`, every turn of the assistant is learned; of `prompt` and `completion`, the completion alone.
    `prompt_column` may join several, as `instruction+input`.

    Raises InputError where the source is missing or empty or a row demonstrates nothing.
    """
    rows = open_rows(source, split=split, subset=subset, limit=limit)
    names = Names(prompt=prompt_column, completion=completion_column)
    read = [demonstration_of(row, names) for row in _objects(rows)]
    if not read:
        raise InputError(f"{rows.name} holds no demonstration; wanted at least one: messages, or prompt and completion")
    prompts, answers = tuple(row.prompt for row in read), tuple(row.answer for row in read)
    return Demonstrations(prompts, answers, {"read": len(read), "file": Path(rows.name).name})


def _free(name: str, taken: Mapping[str, object]) -> str:
    """The name under which a column reaches the reward function."""
    wanted = name
    while wanted in RESERVED or (wanted != name and wanted in taken):
        wanted += "_"
    return wanted


def _objects(rows: Rows, text_column: str | None = None) -> Rows:
    """Rows as objects. Where the first is a text, or a list of messages, it stands for an object of one column."""
    if text_column is None:
        return rows
    several = iter(rows)
    first = next(several, None)
    if first is None:
        return replace(rows, content=())
    bare = type(first.content) if isinstance(first.content, str | list | tuple) else None
    every = (first, *several) if bare is None else (_wrapped(row, bare, text_column) for row in (first, *several))
    return replace(rows, content=every)


def _wrapped(row: Row, kind: type, column: str) -> Row:
    return replace(row, content={column: row.content}) if isinstance(row.content, kind) else row
