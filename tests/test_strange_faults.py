"""Errors that no `--fault` plants, put into whole runs of a tiny model: each is named, and by the right name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tether.rewards
import tether.task
import tether.trainer
from test_faults import complaints, shaken, trained
from tether.fault_models import replace_attribute
from tether.heads import OutputHead
from tether.models import LanguagePolicy
from tether.trainer import Run

Plant = Callable[[ExitStack], None]


def loaded(change: Callable[[LanguagePolicy], None]) -> Plant:
    """The policy with something done to it once it is loaded."""

    def wrap(original: Callable[..., LanguagePolicy]) -> Callable[..., LanguagePolicy]:
        def load(*rest: Any, **named: Any) -> LanguagePolicy:
            policy = original(*rest, **named)
            change(policy)
            return policy

        return load

    return lambda stack: replace_attribute(stack, tether.task, "load_policy", wrap)


def before_update(step: int, act: Callable[[LanguagePolicy], None]) -> Plant:
    def wrap(original: Callable[[Run], object]) -> Callable[[Run], object]:
        def advance(run: Run) -> object:
            if run.step == step:
                assert isinstance(run.policy, LanguagePolicy)
                act(run.policy)
            return original(run)

        return advance

    return lambda stack: replace_attribute(stack, tether.trainer, "advance", wrap)


def rewarded(make: Callable[..., Tensor]) -> Plant:
    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(scores: Tensor, policy: Tensor, reference: Tensor, mask: Tensor, beta: float, **_: bool) -> Tensor:
            return make(original, scores, policy, reference, mask, beta)

        return wrong

    return lambda stack: replace_attribute(stack, tether.rewards, "tethered_rewards", wrap)


def swap_layers(policy: LanguagePolicy) -> None:
    layers: Any = policy.mode._reference.base_model.layers  # type: ignore[attr-defined]
    layers[0], layers[1] = layers[1], layers[0]


def share_head(policy: LanguagePolicy) -> None:
    policy.mode.reference_head = policy.mode.head


def renew_reference(policy: LanguagePolicy) -> None:
    """The reference becomes a copy of the policy as it stands: another object, so that no weight of it was written."""
    mode: Any = policy.mode
    mode._reference = copy.deepcopy(mode.model).requires_grad_(False)
    mode.reference_head = OutputHead.of(mode._reference)


def round_reference(policy: LanguagePolicy) -> None:
    policy.mode._reference.to(torch.bfloat16).to(torch.float32)  # type: ignore[attr-defined]


def shift_reference(stack: ExitStack) -> None:
    """log π_ref of the place before."""
    from dataclasses import replace

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(*rest: Any) -> Any:
            said = original(*rest)
            return replace(said, logprobs=said.logprobs.roll(1, dims=1))

        return shifted

    replace_attribute(stack, LanguagePolicy, "evaluate_reference", wrap)


def on_the_last(original: Any, scores: Tensor, policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    kl = torch.where(mask, policy - reference, 0.0).sum(dim=1)
    return original(scores - beta * kl, policy, policy, mask, beta)  # type: ignore[no-any-return]


PLANTED: dict[str, tuple[Plant, str, str, int]] = {
    "layers swapped": (loaded(swap_layers), "wrong_reference", "weights differ", 0),
    "reference rounded": (loaded(round_reference), "wrong_reference", "weights differ", 0),
    "reference one place on": (shift_reference, "wrong_reference", "of other rows", 0),
    "head shared": (loaded(share_head), "reference_moves", "same memory|optimiser holds", 0),
    "reference renewed": (before_update(2, renew_reference), "reference_moves", "written to", 2),
    "whole KL on the last token": (rewarded(on_the_last), "wrong_kl_form", "stands on the last", 1),
    "score counted twice": (
        rewarded(lambda make, scores, *rest: make(2 * scores, *rest)), "score_misplaced", "carries 2 × the score", 0,
    ),
    "KL counted twice": (
        rewarded(lambda make, scores, *rest: make(scores, *rest[:-1], 2 * rest[-1])),
        "wrong_kl_form", "part is about", 1,
    ),
}  # fmt: skip


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    with ExitStack() as stack:
        plant(stack)
        yield


@pytest.mark.parametrize("what", PLANTED)
def test_an_error_that_nobody_listed_is_named(what: str, tmp_path: Path) -> None:
    plant, name, seen, step = PLANTED[what]
    with planted(plant):
        run = trained(tmp_path, shaken("full"))
    first = complaints(run)[0]
    assert (first.kind, first.step) == (name, step)

    assert re.search(seen, str(first.payload["seen"]))
