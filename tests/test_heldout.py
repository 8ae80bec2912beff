"""The held-out prompts of an evaluation: as many as were asked for, each once."""

from __future__ import annotations

import pytest

from tether.config import RunSettings
from tether.models import LanguagePolicy, load_policy
from tether.prompts import PromptSet, PromptSource
from tether.task import heldout_source
from tiny_models import CONTEXT, build, build_tokenizer

ROOM = 8
"""Tokens of a response."""


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return load_policy(build("llama"), build_tokenizer(), mode="top", top_layers=1)


def asked(policy: LanguagePolicy, texts: list[str], count: int) -> tuple[PromptSource, list[str]]:
    """The source of an evaluation on so many prompts, and the text of each row that it evaluates."""
    settings = RunSettings.model_validate(
        {"evaluation": {"prompts": count}, "data": {"too_long": "drop"}, "ppo": {"sampling": {"max_new_tokens": ROOM}}}
    )
    columns = {"name": tuple(f"about {text}" for text in texts)}
    source = heldout_source(PromptSet(tuple(texts), columns), policy, settings)
    batches = [source.batch(part) for part in range(-(-len(source.texts) // source.prompts_per_batch))]
    for batch in batches:
        assert list(batch.columns["name"]) == [f"about {text}" for text in batch.texts]
    return source, [str(text) for batch in batches for text in batch.texts]


def texts(count: int) -> list[str]:
    return [f"w{number // 60 + 5} w{number % 60 + 20}" for number in range(count)]


@pytest.mark.parametrize(
    ("count", "batches", "evaluated"),
    [(5, 1, 5), (64, 1, 64), (65, 2, 64), (100, 2, 100), (128, 2, 128), (131, 3, 129)],
)
def test_an_evaluation_has_as_many_prompts_as_were_asked_for_in_batches_of_one_size(
    count: int, batches: int, evaluated: int, policy: LanguagePolicy
) -> None:
    source, rows = asked(policy, texts(140), count)
    assert len(rows) == evaluated == batches * source.prompts_per_batch
    assert source.prompts_per_batch <= 64
    assert len(set(rows)) == evaluated
    assert set(rows) == set(texts(evaluated))


def test_no_prompt_is_evaluated_twice_where_some_are_too_long_and_left_out(policy: LanguagePolicy) -> None:
    long = " ".join(["w7"] * (CONTEXT - ROOM + 1))
    source, rows = asked(policy, [*texts(50), *[f"{long} w{number}" for number in range(10, 20)]], 60)
    assert sorted(rows) == sorted(texts(50))
    assert source.note == "10 of 60 prompts left out: too long"
