"""Room 1: where prompts come from: seeded, resumable, chat or plain.

A `PromptSource` is a pure function of the update's number: batch(n) is the same whenever and wherever it is asked for,
so a resumed run needs no position but n. Each pass over the data has an order of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase

from tether.batch import Message, Prompt, Prompts, plain_text
from tether.errors import InputError
from tether.streams import permutation


@dataclass(frozen=True)
class PromptSet:
    """Prompts as people wrote them, with the further columns of their data set."""

    prompts: tuple[Prompt, ...]
    columns: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> PromptSet:
        """The first `count` of them."""
        return PromptSet(self.prompts[:count], {name: column[:count] for name, column in self.columns.items()})


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

    Raises InputError where a prompt is too long, naming the row, or where a template is asked for, or a
    prompt is a conversation, and there is none.
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


def _encode_one(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, templated: bool) -> tuple[int, ...]:
    if not templated:
        if not isinstance(prompt, str):
            raise InputError(
                f"a prompt is a conversation of {len(prompt)} messages and there is no chat template to write it with; "
                "set tokenizer.chat_template, or give prompts as text"
            )
        return tuple(tokenizer(prompt)["input_ids"])
    turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


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
