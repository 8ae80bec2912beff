"""A conversation as its tokenizer's chat template writes it, as text or as token ids, or why the template refuses it.

Templates are programs that other people wrote: many take no system turn, or turns in one order only, and say so by
raising. A text without a template is here too: where it goes on, it must not be ended, and what goes on with it keeps
its first space. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tether.errors import InputError

SHOWN = 60
"""Characters of the first message in an error."""
SPACE = "▁"
"""How SentencePiece writes the space before a word."""


def write_chat(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    """The conversation as text; with `ask` it ends where the assistant's answer begins. Raises as `refusals_told`."""
    with refusals_told(turns):
        return str(tokenizer.apply_chat_template([dict(t) for t in turns], tokenize=False, add_generation_prompt=ask))


def encode_chat(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of the conversation up to where the assistant's answer begins. Raises as `refusals_told`."""
    with refusals_told(turns):
        asked = [dict(turn) for turn in turns]
        return tuple(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))


def encode_open(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that somebody goes on with: with what the tokenizer puts before it, as a BOS, and without the
    EOS that it may put behind it (`add_eos_token`), after which a model begins another text.
    """
    ids = list(tokenizer(text)["input_ids"])
    if ids[-1:] != [tokenizer.eos_token_id]:
        return ids
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[:-1] if ids[-1 - len(bare) : -1] == bare else ids


def read_replies(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each reply's ids, special tokens left out.

    Without a chat template a reply goes on in its prompt's text; then it keeps the space that it begins with, which
    tokenizers of SentencePiece's kind (Llama 2, Mistral, Gemma) take for the beginning of a text and leave out.
    """
    texts: list[str] = tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)
    if tokenizer.chat_template is not None:
        return texts
    special = frozenset(tokenizer.all_special_ids)
    firsts = [next((token for token in row if token not in special), None) for row in rows]
    return [
        f" {text}" if _begins_word(first, tokenizer) and text[:1] != " " else text
        for first, text in zip(firsts, texts, strict=True)
    ]


def _begins_word(token: int | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the token's piece begins with SentencePiece's space."""
    return token is not None and str(tokenizer.convert_ids_to_tokens(token)).startswith(SPACE)


@contextmanager
def refusals_told(turns: Sequence[Mapping[str, str]]) -> Iterator[None]:
    """Raise InputError with the template's own words and the roles that it was given, where it fails."""
    try:
        yield
    except (TemplateError, TypeError, ValueError) as fault:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        first = str(turns[0].get("content"))[:SHOWN] if turns else ""
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0].rstrip(".")
        raise InputError(
            f"the chat template cannot write a conversation of {roles or 'no message'} ({first!r}): {reason}; wanted "
            "messages that it takes: change their roles and order, or set another tokenizer.chat_template"
        ) from fault
