"""A conversation as its tokenizer's chat template writes it, as text or as token ids, or why the template refuses it.

Templates are programs that other people wrote: many take no system turn, or turns in one order only, and say so by
raising. A text without a template is here too: where it goes on, it must not be ended. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tether.errors import InputError

SHOWN = 60
"""Characters of the first message in an error."""


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
