"""Demonstrations → token ids with the tokens that are learned, and many of them packed into one row.

    prompt, answer ─ chat template ─▶ Example: ids, learned    only what the assistant says and the token that ends it
    examples ─ bins, lay_out ─▶ Packed: ids, positions         positions begin anew with each example

A packed row is read as its examples alone would be: causal attention within an example, none between two. The library
builds that block-diagonal mask from positions that begin anew; `packs` sees on a model whether it does, since a model
without position ids, or with an attention of its own, may not. Knows no loss and no optimiser. Read next:
`finetune.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tether.batch import Message, Prompt
from tether.chat_templates import encode_open, write_chat
from tether.data import Demonstrations
from tether.errors import InputError
from tether.prompts import TooLong, shorten
from tether.trunk import agree, run_backbone

Answer = str | tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One demonstration as the model reads it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    """True on the tokens that the loss is taken on."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned_tokens(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True)
class Encoded:
    """All demonstrations that are learned from."""

    examples: tuple[Example, ...]
    dropped: int = 0
    """Demonstrations that were too long, left out."""
    shortened: int = 0
    """Demonstrations of which the end of the prompt was kept."""


@dataclass(frozen=True)
class Packed:
    """Examples laid out for one pass."""

    ids: Int[Tensor, "rows total"]
    positions: Int[Tensor, "rows total"] | None
    """From 0 in each example; None where each row holds one."""
    learned: Bool[Tensor, "rows total"]


# ── text → tokens ───────────────────────────────────────────────────────────────────────────────────────────────────
def encode_demonstrations(
    given: Demonstrations,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "error",
) -> Encoded:
    """Every demonstration in token ids, none longer than `max_tokens`.

    `stops`: the tokens that end a response; the tokenizer's own is put where the template ends an answer with none.
    A conversation becomes one example; several, one an answer, where its template writes a turn in another way once
    the conversation goes on.

    Raises InputError where a demonstration is too long and `too_long` is "error", where it cannot be shortened, where
    the chat template refuses it, or where it is a conversation and there is none.
    """
    kept: list[Example] = []
    dropped = shortened = 0
    for row, (prompt, answer) in enumerate(zip(given.prompts, given.answers, strict=True)):
        examples = _encode_one(prompt, answer, tokenizer, stops)
        if max_tokens is not None and max(map(len, examples)) > max_tokens:
            if too_long == "drop":
                dropped += 1
                continue
            examples = _shortened(row, prompt, answer, tokenizer, stops, max_tokens, too_long)
            shortened += 1
        kept += examples
    if not kept:
        raise InputError(f"all {dropped} demonstrations are longer than {max_tokens} tokens; nothing would be left")
    return Encoded(tuple(kept), dropped, shortened)


def _shortened(
    row: int,
    prompt: Prompt,
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_tokens: int,
    too_long: TooLong,
) -> list[Example]:
    def encoded(candidate: Prompt) -> list[Example]:
        return _encode_one(candidate, answer, tokenizer, stops)

    def fits(candidate: Prompt) -> bool:
        return max(map(len, encoded(candidate))) <= max_tokens

    end = shorten(prompt, fits) if too_long == "truncate_left" else None
    if end is None:
        length = max(map(len, encoded(prompt)))
        raise InputError(
            f"demonstration {row + 1} has {length} tokens; at most {max_tokens} fit. Leave such rows out with "
            "too_long='drop', keep the end of their prompts with 'truncate_left', or raise max_tokens"
        )
    return encoded(end)


def _encode_one(
    prompt: Prompt, answer: Answer, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> list[Example]:
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise InputError(
                "a demonstration is a conversation and the tokenizer has no chat template to write it with; pass "
                "chat_template=, or give prompt and completion as text"
            )
        return [_example([(prompt, False), (answer, True)], tokenizer, stops, special=True)]
    asked: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    said: list[Message] = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    turns = [*asked, *said]
    answers = [place for place in range(len(asked), len(turns)) if turns[place]["role"] == "assistant"]
    whole = _in_one(turns, answers, tokenizer)
    rows = [whole] if whole else [_alone(turns[: place + 1], tokenizer) for place in answers]
    return [_example(row, tokenizer, stops, special=False) for row in rows]


def _in_one(
    turns: list[Message], answers: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]] | None:
    """The conversation in pieces, learned and not; None where the template writes earlier turns in another way."""
    text, end = _written(turns, tokenizer), 0
    pieces: list[tuple[str, bool]] = []
    for place in answers:
        before, after = _opened(turns[:place], tokenizer), _written(turns[: place + 1], tokenizer)
        if not (after.startswith(before) and text.startswith(after)):
            return None
        pieces += [(text[end : len(before)], False), (text[len(before) : len(after)], True)]
        end = len(after)
    return pieces


def _alone(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The last answer after all that stands before it, as a sampler would have it written."""
    before, after = _opened(turns[:-1], tokenizer), _written(turns, tokenizer)
    answer = after[len(before) :] if after.startswith(before) else turns[-1]["content"]
    return [(before, False), (answer, True)]


def _written(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    return write_chat(turns, tokenizer)


def _opened(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    return write_chat(turns, tokenizer, ask=True)


def _example(
    pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], special: bool
) -> Example:
    """Token ids of the pieces: of the whole text where no token reaches over a seam, else piece by piece.

    An answer is learned up to the token that ends it; what a template writes behind that, as a line end, is not. The
    last answer gets the stop token where it has none.
    """
    parts = _tokens_of(pieces, tokenizer, special)
    ids: list[int] = []
    learned: list[bool] = []
    for tokens, answer in parts:
        last = max((place for place, token in enumerate(tokens) if token in stops), default=len(tokens) - 1)
        ids += tokens
        learned += [answer and place <= last for place in range(len(tokens))]
    if not any(token in stops for token in parts[-1][0]):
        ending = stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        ids, learned = [*ids, ending], [*learned, True]
    end = len(ids) - learned[::-1].index(True)
    learned[0] = False  # nothing stands before it that could predict it
    return Example(tuple(ids[:end]), tuple(learned[:end]))


def _tokens_of(
    pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, special: bool
) -> list[tuple[list[int], bool]]:
    """Each piece in token ids. `special`: whether the tokenizer adds its own, as at a plain text's beginning."""
    whole = _ids("".join(text for text, _ in pieces), tokenizer, special)
    seams, before = [0], ""
    for text, _ in pieces[:-1]:
        before += text
        start = _ids(before, tokenizer, special)
        if whole[: len(start)] != start:
            return [
                (_ids(text, tokenizer, special and place == 0), answer) for place, (text, answer) in enumerate(pieces)
            ]
        seams.append(len(start))
    ends = [*seams[1:], len(whole)]
    return [(whole[start:end], answer) for start, end, (_, answer) in zip(seams, ends, pieces, strict=True)]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    return encode_open(text, tokenizer) if special else list(tokenizer(text, add_special_tokens=False)["input_ids"])


# ── packing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the lengths, in bins that hold at most `capacity`; one that is longer has a bin of its own.

    First fit, longest first: at most 11/9 of the fewest bins possible, and 2/3. Johnson 1973.

    >>> bins([3, 9, 4, 6], 10)
    [[1], [3, 2], [0]]
    """
    filled: list[int] = []
    chosen: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = (number for number, used in enumerate(filled) if used + lengths[place] <= capacity)
        number = next(fitting, len(filled))
        if number == len(filled):
            filled.append(0)
            chosen.append([])
        filled[number] += lengths[place]
        chosen[number].append(place)
    return chosen


def lay_out(rows: Sequence[Sequence[Example]], device: torch.device) -> Packed:
    """Rows of examples end to end, padded with 0 on the right; the padding is an example that nobody reads."""
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions, learned = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[number, start:end] = torch.tensor(example.ids)
            positions[number, start:end] = torch.arange(len(example))
            learned[number, start:end] = torch.tensor(example.learned)
            start = end
        positions[number, start:] = torch.arange(width - start)
    single = all(len(row) == 1 for row in rows)
    return Packed(ids.to(device), None if single else positions.to(device), learned.to(device))


def read_packed(backbone: nn.Module, packed: Packed) -> Float[Tensor, "rows total dim"]:
    """Final hidden states of the rows."""
    if packed.positions is None:
        return run_backbone(backbone, packed.ids)
    hidden: Tensor = backbone(input_ids=packed.ids, position_ids=packed.positions, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def packs(backbone: nn.Module, ids: Int[Tensor, "1 total"], tolerance: float) -> bool:
    """Whether the states of examples in one row are those of each alone, seen on these tokens in three pieces."""
    tokens = ids[0].tolist()
    examples = [Example(tuple(piece), (False,) * len(piece)) for piece in (tokens[:3], tokens[2:], tokens[::-1])]
    try:
        together = read_packed(backbone, lay_out([examples], ids.device))[0]
    except (TypeError, RuntimeError, IndexError, ValueError):
        return False
    alone = [run_backbone(backbone, lay_out([[example]], ids.device).ids)[0] for example in examples]
    return agree(together, torch.cat(alone), tolerance)
