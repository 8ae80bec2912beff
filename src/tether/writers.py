"""Who does the rooms' work in place of the learner's own process: opened for a run, and closed after it.

    runtime.writer: own      nobody: the policy's sampler, its reference and the reward models stand here
    runtime.writer: vllm     vLLM writes, in an engine of its own
    runtime.writer: ray      rollout workers write; scoring workers say what reference and reward models say

Of several processes the first alone has help, and tells the others what it heard.

Help is put where the work is done, `policy.writer`, `policy.referee` and `RewardModel.scorer`, so the loop, the checks
and the evaluations ask as they always do, and what a run is (`identity.py`) does not change. A user's own reward
function stays with the learner: it may count its calls, or hold a connection. Read next: `remote.py`, `ahead.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

from tether.ahead import Ahead
from tether.batch import Reward
from tether.config import RunSettings
from tether.models import LanguagePolicy
from tether.runtime.ranks import here

Note = Callable[[str, object], None]
"""Keeps a fact of the run."""


@runtime_checkable
class Lags(Protocol):
    """A writer that may write by older weights than it could have."""

    def catch_up(self) -> None:
        """Take over the policy's weights as they stand."""


def catch_up(writer: object) -> None:
    """Before an evaluation, which is of the policy as it stands."""
    if isinstance(writer, Lags):
        writer.catch_up()


@contextmanager
def helped(
    settings: RunSettings,
    policy: LanguagePolicy,
    open_policy: Callable[[], LanguagePolicy],
    rewards: Iterable[Reward],
    note: Note,
    first: int = 0,
) -> Iterator[None]:
    """For the length of a run, the help that its settings ask for.

    `open_policy` opens the policy at its start, wherever it is called; `first` is the version of its weights, the
    updates that have moved them. Raises MissingExtraError where the extra is not installed, WorkerError where the help
    cannot be had, and what opening the policy elsewhere raises.
    """
    with ExitStack() as stack:
        if settings.runtime.writer == "own":
            note("workers", {"runtime": "own"})  # a run that is resumed may have had some before
        if settings.runtime.writer == "vllm":
            stack.enter_context(_vllm(settings, policy, note, first))
        if settings.runtime.writer == "ray":
            stack.enter_context(_ray(settings, policy, open_policy, rewards, note, first))
        yield


@contextmanager
def _vllm(settings: RunSettings, policy: LanguagePolicy, note: Note, first: int) -> Iterator[None]:
    from tether.vllm_run import facts, vllm_writing

    with vllm_writing(settings, policy, first) as writer:
        note("workers", facts(writer, settings.runtime.overlap))
        policy.writer = Ahead(writer) if settings.runtime.overlap else writer
        try:
            yield
        finally:
            policy.writer = None


@contextmanager
def _ray(
    settings: RunSettings,
    policy: LanguagePolicy,
    open_policy: Callable[[], LanguagePolicy],
    rewards: Iterable[Reward],
    note: Note,
    first: int,
) -> Iterator[None]:
    from tether.ray_run import ray_roles, roles_elsewhere

    ranks, known = here(), list(rewards)
    with ExitStack() as stack:
        roles = ranks.together(
            lambda: (
                stack.enter_context(ray_roles(settings, policy, open_policy, known, note, first))
                if ranks.is_first
                else roles_elsewhere(settings, known)
            )
        )
        policy.writer = Ahead(roles.writer) if settings.runtime.overlap else roles.writer
        policy.referee = roles.referee
        for model, scorer in roles.scorers:
            model.scorer = scorer
        try:
            yield
        finally:
            policy.writer = policy.referee = None
            for model, _ in roles.scorers:
                model.scorer = None
