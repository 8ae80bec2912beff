"""From a run's settings to its workers on Ray, for the length of the run.

    with ray_roles(settings, policy, open_policy, rewards, note, first) as roles: …

The learner is the process that calls: it holds policy, value and optimiser, runs the loop and writes the run folder,
and everything that cannot be computed again is in its checkpoints. Of several learners the first alone calls, and the
others hear from it (`elsewhere.py`). Workers hold nothing that could be lost. They end
with it, so a learner that was killed is resumed like any run: `tether resume`, which starts workers of its own.

Nothing of this is imported in a run that does not ask for it. Read next: `remote.py`, `runtime/ray_cluster.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tether.batch import Reward
from tether.config import RunSettings
from tether.elsewhere import Elsewhere
from tether.errors import ConfigError, WorkerError
from tether.models import LanguagePolicy
from tether.remote import Published, RemoteReferee, RemoteWriter, remote_scores
from tether.reward_model import RewardModel
from tether.reward_sources import Joined
from tether.runtime.ranks import here
from tether.runtime.ray_cluster import Cluster, connected
from tether.runtime.ray_crew import Crew, collect, deposit
from tether.workers import ScoringWorker, WritingWorker, trained_weights, versions

Scorer = Callable[[Sequence[Sequence[int]]], Tensor]
"""Token ids → raw scores."""


@dataclass(frozen=True)
class Roles:
    """What workers do in place of the learner."""

    writer: RemoteWriter | Elsewhere
    referee: RemoteReferee | Elsewhere | None
    scorers: Sequence[tuple[RewardModel, Scorer]]
    """Reward models, and who gives their raw scores."""


@contextmanager
def ray_roles(
    settings: RunSettings,
    policy: LanguagePolicy,
    open_policy: Callable[[], LanguagePolicy],
    rewards: Iterable[Reward],
    note: Callable[[str, object], None],
    first: int = 0,
) -> Iterator[Roles]:
    """Workers that have read their models and wait; they end with the block.

    `open_policy` opens the policy at its start, on any machine; `note` keeps the fact `workers`: who works where, and
    how often workers were started anew. `first` is the version of the policy's weights. Raises ConfigError where
    learners hold the weights in shares, MissingExtraError without Ray, WorkerError where there is no Ray, no room in
    it, or other versions on its machines, and what opening the policy raises there.
    """
    _refuse_shares(settings)
    knobs, overlap, models = settings.runtime.ray, settings.runtime.overlap, reward_models(rewards)
    with connected(knobs) as cluster:
        cluster.require_store(stored_bytes(policy, models), "two versions of the weights, and the reward models,")
        cluster.reserve(knobs.rollout_workers + knobs.scoring_workers)
        crews = [cluster.crew("rollout", partial(WritingWorker, open_policy), knobs.rollout_workers)]
        if knobs.scoring_workers:
            crews.append(cluster.crew("scoring", partial(ScoringWorker, open_policy, models), knobs.scoring_workers))
        _greet(crews)

        def tell() -> None:
            note("workers", facts(cluster, crews, overlap))

        tell()
        for crew in crews:
            crew.on_restart = tell
        published = Published(policy, partial(_lay_down, knobs.answer_seconds), first)
        writer = RemoteWriter(crews[0], published, bound=int(overlap))
        if not knobs.scoring_workers:
            yield Roles(writer, None, [])
            return
        judges = [(model, partial(remote_scores, crews[1], number)) for number, model in enumerate(models)]
        yield Roles(writer, RemoteReferee(crews[1], published), judges)


def roles_elsewhere(settings: RunSettings, rewards: Iterable[Reward]) -> Roles:
    """What stands in a process whose first talks to the workers."""
    nobody = Elsewhere()
    if not settings.runtime.ray.scoring_workers:
        return Roles(nobody, None, [])
    return Roles(nobody, nobody, [(model, nobody.score) for model in reward_models(rewards)])


def _refuse_shares(settings: RunSettings) -> None:
    runtime = settings.runtime
    if max(runtime.processes, here().count) > 1 and runtime.sharding == "fsdp":
        raise ConfigError(
            "runtime.writer is ray and runtime.sharding fsdp; the weights of one learner must be whole to be sent: "
            "sharding: replicate"
        )


def stored_bytes(policy: LanguagePolicy, models: Sequence[RewardModel]) -> int:
    """What lies in the object store at once: the weights as they stand and those before, and the reward models."""
    weights = 2 * sum(weight.numel() * weight.itemsize for weight in trained_weights(policy))
    rewards = sum(int(weight.numel() * weight.itemsize) for one in models for weight in one.model.parameters())
    return weights + rewards


def _greet(crews: Sequence[Crew]) -> None:
    """Have all workers read their models, at the same time."""
    greetings = [crew.begin("hello", [()] * len(crew)) for crew in crews]
    for crew, greeting in zip(crews, greetings, strict=True):
        require_same_versions(crew.role, greeting.take())


def require_same_versions(role: str, said: Sequence[object]) -> None:
    """Raise WorkerError where a worker computes with other versions than the learner."""
    own = versions()
    for worker, theirs in enumerate(said):
        assert isinstance(theirs, Mapping)
        other = [f"{name} {theirs.get(name)} (here {own[name]})" for name in own if theirs.get(name) != own[name]]
        if other:
            raise WorkerError(f"the {role} worker {worker} has {', '.join(other)}; install the same on every machine")


def facts(cluster: Cluster, crews: Sequence[Crew], overlap: bool) -> dict[str, object]:
    """Who works where, for the run folder."""
    told: dict[str, object] = {
        "runtime": "ray", "version": cluster.version, "address": cluster.address, "overlap": overlap,
    }  # fmt: skip
    for crew in crews:
        places = [{"host": host, "process": process} for _, (host, process) in sorted(crew.processes.items())]
        told[crew.role] = {"workers": places, "restarts": crew.restarts}
    return told


def reward_models(rewards: Iterable[Reward]) -> list[RewardModel]:
    """Every reward model among these, those inside sums and ensembles included, each once."""
    found: list[RewardModel] = []
    for reward in rewards:
        inner = reward_models(reward.parts.values()) if isinstance(reward, Joined) else [reward]
        found += [one for one in inner if isinstance(one, RewardModel) and all(one is not known for known in found)]
    return found


def _lay_down(limit_seconds: float, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Put tensors into Ray's object store; how to fetch them from there."""
    return partial(collect, [deposit(list(tensors), "send weights")], limit_seconds)
