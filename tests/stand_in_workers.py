"""Workers in this process, in place of those of a cluster: what is asked is answered at once, by the weights sent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from tether.batch import Reward
from tether.config import RunSettings
from tether.models import LanguagePolicy
from tether.ray_run import Roles, reward_models
from tether.remote import Published, RemoteReferee, RemoteWriter, remote_scores
from tether.workers import ScoringWorker, WritingWorker


@dataclass(frozen=True)
class There:
    """Answers that have come."""

    answers: list[object]

    def take(self) -> list[object]:
        return self.answers


@dataclass
class Local:
    """A crew of things in this process."""

    role: str
    things: Sequence[object]
    asked: list[tuple[str, int]] = field(default_factory=list)
    """Operations, each with its number of shares."""

    def __len__(self) -> int:
        return len(self.things)

    def begin(self, operation: str, shares: Sequence[Sequence[object]]) -> There:
        self.asked.append((operation, len(shares)))
        pairs = zip(self.things, shares, strict=False)
        return There([getattr(thing, operation)(*share) for thing, share in pairs])


def keep(tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Deposits copies."""
    kept = [tensor.clone() for tensor in tensors]
    return lambda: kept


@contextmanager
def local_roles(
    settings: RunSettings,
    policy: LanguagePolicy,
    open_policy: Callable[[], LanguagePolicy],
    rewards: Iterable[Reward],
    note: Callable[[str, object], None],
    first: int = 0,
) -> Iterator[Roles]:
    """`ray_run.ray_roles` without Ray."""
    knobs, models = settings.runtime.ray, reward_models(rewards)
    published = Published(policy, keep, first)
    writing = Local("rollout", [WritingWorker(open_policy) for _ in range(knobs.rollout_workers)])
    scorers = [ScoringWorker(open_policy, copy.deepcopy(models)) for _ in range(knobs.scoring_workers)]
    scoring = Local("scoring", scorers)
    note("workers", {"runtime": "stand-in"})
    yield Roles(
        RemoteWriter(writing, published, bound=int(settings.runtime.overlap)),
        RemoteReferee(scoring, published),
        [(model, lambda rows, n=number: remote_scores(scoring, n, rows)) for number, model in enumerate(models)],
    )
