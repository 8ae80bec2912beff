"""Room 1: where prompts come from: seeded, resumable, chat or plain.

    PromptSet ─ fit: chat template, token ids, the rule for long ones ─▶ PromptSource ─ batch(n) ─▶ Prompts

A `PromptSource` is a pure function of the update's number: batch(n) is the same whenever and wherever it is asked for,
so a resumed run needs no position but n. Each pass over the data has an order of its own. How prompts are read from
files is `data.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from tether.batch import Message, Prompt, Prompts, plain_text
from tether.chat_templates import encode_chat, encode_open
from tether.errors import InputError
from tether.streams import permutation

TooLong: TypeAlias = Literal["error", "drop", "truncate_left"]
"""What happens to a prompt that leaves no room for a response: complain, leave it out, or keep its end."""
NEXT_WORD = 24  # characters within which a cut moves on to the beginning of a word


@dataclass(frozen=True)
class PromptSet:
    """Prompts as people wrote them, with the further columns of their data set."""

    prompts: tuple[Prompt, ...]
    columns: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> PromptSet:
        """The first `count` of them."""
        return self.take(range(min(count, len(self))))

    def take(self, places: Sequence[int]) -> PromptSet:
        """Those at these places, in this order."""
        columns = {name: tuple(column[place] for place in places) for name, column in self.columns.items()}
        return PromptSet(tuple(self.prompts[place] for place in places), columns)


@dataclass(frozen=True)
class PromptSource:
    """Tokenised prompts in a seeded order."""

    texts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt, without padding, chat template applied."""
    prompts_per_batch: int
    samples_per_prompt: int = 1
    seed: int = 0
    pad: int = 0
    columns: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    note: str | None = None
    """What was done to prompts that were too long, in words."""

    def __post_init__(self) -> None:
        if not self.texts:
            raise InputError("got no prompt; wanted at least one: is the file empty?")
        for row, tokens in enumerate(self.ids):
            if not tokens:
                raise InputError(f"prompt {row} is empty after tokenising; remove it, or use a chat template")

    def batch(self, update: int) -> Prompts:
        """The prompts of this update, each repeated `samples_per_prompt` times, left-padded."""
        first = update * self.prompts_per_batch
        places = [self._place(first + k) for k in range(self.prompts_per_batch)]
        copies = range(self.samples_per_prompt)
        keys = [(first + k) * self.samples_per_prompt + c for k in range(len(places)) for c in copies]
        return collate([place for place in places for _ in copies], keys, self)

    def in_equal_batches(self, most: int) -> PromptSource:
        """The same in batches of `most` prompts or fewer, which hold each prompt once.

        The last prompts, fewer than there are batches, are left out where the batches would not be equal otherwise.
        """
        batches = math.ceil(len(self.texts) / most)
        size = len(self.texts) // batches
        kept = slice(batches * size)
        columns = {name: column[kept] for name, column in self.columns.items()}
        return replace(self, texts=self.texts[kept], ids=self.ids[kept], columns=columns, prompts_per_batch=size)

    def _place(self, position: int) -> int:
        """Which prompt stands at this position of the endless stream."""
        size = len(self.texts)
        return _order_of_pass(self.seed, size, position // size)[position % size]


@lru_cache(maxsize=8)
def _order_of_pass(seed: int, size: int, number: int) -> list[int]:
    order: list[int] = permutation(seed, "prompts", size, number).tolist()
    return order


def encode(
    texts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool | None = None,
    max_tokens: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each prompt by the tokenizer's chat template, text being one user turn; plain where it has none.

    `chat`: True wants the template, False leaves it out, None uses it where there is one.
    `max_tokens`: the longest prompt that leaves room for a response.

    Raises InputError where a prompt is too long, naming the row, where the template refuses one, or where a template is
    asked for, or a prompt is a conversation, and there is none.
    """
    templated = tokenizer.chat_template is not None if chat is None else chat
    if templated and tokenizer.chat_template is None:
        raise InputError("this tokenizer has no chat template; pass chat=False for plain prompts, or set one")
    encoded = [_encode_one(text, tokenizer, templated) for text in texts]
    for row, tokens in enumerate(encoded):
        if max_tokens is not None and len(tokens) > max_tokens:
            raise InputError(
                f"prompt {row} has {len(tokens)} tokens; at most {max_tokens} leave room for the response. "
                f"Shorten it, or lower max_new_tokens: {plain_text(texts[row])[:60]!r}…"
            )
    return tuple(encoded)


@dataclass(frozen=True)
class Fitted:
    """Prompts that leave room for a response, tokenised."""

    prompts: PromptSet
    ids: tuple[tuple[int, ...], ...]
    dropped: int = 0
    """Prompts that were left out."""
    shortened: int = 0
    """Prompts of which the end was kept."""

    @property
    def note(self) -> str | None:
        """What was done to long prompts, in words; None where nothing was."""
        done = [(self.dropped, "left out"), (self.shortened, "cut on the left")]
        parts = [f"{count} of {len(self.ids) + self.dropped} prompts {words}" for count, words in done if count]
        return f"{' and '.join(parts)}: too long" if parts else None


def fit(
    given: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None,
    too_long: TooLong = "error",
    chat: bool | None = None,
) -> Fitted:
    """The prompts in token ids as `encode` writes them, none longer than `max_tokens`.

    `too_long`: "error" complains about the first that is longer, "drop" leaves such prompts out, "truncate_left" keeps
    their end by `shorten`. Raises InputError as `encode` does, where nothing would be left, or where a prompt cannot be
    shortened.
    """
    if too_long not in ("error", "drop", "truncate_left"):
        raise InputError(f"too_long is {too_long!r}; wanted 'error', 'drop' or 'truncate_left'")
    if too_long == "error" or max_tokens is None:
        return Fitted(given, encode(given.prompts, tokenizer, chat=chat, max_tokens=max_tokens))
    ids = encode(given.prompts, tokenizer, chat=chat)
    long = [row for row, tokens in enumerate(ids) if len(tokens) > max_tokens]
    if too_long == "drop":
        kept = sorted(set(range(len(ids))) - set(long))
        if long and not kept:
            raise InputError(f"all {len(long)} prompts are longer than {max_tokens} tokens; nothing would be left")
        return Fitted(given.take(kept), tuple(ids[row] for row in kept), dropped=len(long))
    prompts = list(given.prompts)
    for row in long:
        prompts[row] = _shortened(prompts[row], row, tokenizer, chat, max_tokens)
    fitted = replace(given, prompts=tuple(prompts))
    return Fitted(fitted, encode(prompts, tokenizer, chat=chat, max_tokens=max_tokens), shortened=len(long))


def _shortened(
    prompt: Prompt, row: int, tokenizer: PreTrainedTokenizerBase, chat: bool | None, max_tokens: int
) -> Prompt:
    shorter = shorten(prompt, lambda candidate: len(encode([candidate], tokenizer, chat=chat)[0]) <= max_tokens)
    if shorter is None:
        raise InputError(
            f"prompt {row} cannot be shortened to {max_tokens} tokens: template and system message leave no room; "
            "lower max_new_tokens, or use too_long='drop'"
        )
    return shorter


def shorten(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """The longest end of the prompt that fits; None where none does. What a template writes is never cut.

    Of a text: its end, from the beginning of a word. Of a conversation: the leading system message and the newest
    whole turns, beginning with one of the user's; where the last turn alone is too long, the end of its text.
    """
    if fits(prompt):
        return prompt
    if isinstance(prompt, str):
        return _longest_end(prompt, fits)
    kept = [message for message in prompt[:1] if message["role"] == "system"]
    turns = list(prompt[len(kept) :])
    while len(turns) > 1:
        turns = turns[1:]
        while len(turns) > 1 and turns[0]["role"] != "user":
            turns = turns[1:]
        if fits([*kept, *turns]):
            return (*kept, *turns)
    if not turns:
        return None

    def with_text(text: str) -> tuple[Message, ...]:
        return (*kept, {**turns[0], "content": text})

    end = _longest_end(turns[0]["content"], lambda text: fits(with_text(str(text))))
    return None if end is None else with_text(end)


def _longest_end(text: str, fits: Callable[[str], bool]) -> str | None:
    """The longest end that fits, moved on to the next word where one begins nearby."""
    too_early, start = 0, len(text)  # longer ends have more tokens, so a bisection finds where they begin to fit
    while start - too_early > 1:
        middle = (too_early + start) // 2
        too_early, start = (too_early, middle) if fits(text[middle:]) else (middle, start)
    nearby = text[start - 1 : start + NEXT_WORD]
    words = [place for place in range(1, len(nearby)) if nearby[place - 1].isspace() and not nearby[place].isspace()]
    for place in words[:1]:
        if fits(text[start - 1 + place :]):
            return text[start - 1 + place :]
    return text[start:] if text[start:].strip() else None


def _encode_one(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, templated: bool) -> tuple[int, ...]:
    if not templated:
        if not isinstance(prompt, str):
            raise InputError(
                f"a prompt is a conversation of {len(prompt)} messages and there is no chat template to write it with; "
                "set tokenizer.chat_template, or give prompts as text"
            )
        return tuple(encode_open(prompt, tokenizer))
    turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return encode_chat(turns, tokenizer)


def collate(places: Sequence[int], keys: Sequence[int], source: PromptSource) -> Prompts:
    """The prompts at these places as one left-padded batch."""
    distinct = {place: row for row, place in enumerate(dict.fromkeys(places))}
    width = max(len(source.ids[place]) for place in distinct)
    padded = [[source.pad] * (width - len(source.ids[place])) + list(source.ids[place]) for place in distinct]
    lengths = torch.tensor([len(source.ids[place]) for place in distinct])
    rows = torch.tensor([distinct[place] for place in places])
    return Prompts(
        ids=torch.tensor(padded)[rows],
        mask=(torch.arange(width) >= width - lengths[:, None])[rows],
        texts=tuple(source.texts[place] for place in places),
        keys=tuple(keys),
        columns={name: tuple(column[place] for place in places) for name, column in source.columns.items()},
    )
