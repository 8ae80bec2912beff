"""The learner's side of workers: it hands out shares of a batch and lays the answers together again.

    Published          the policy's weights, put where workers can fetch them, once a version
    RemoteWriter       a `Writer`: responses by rollout workers
    RemoteReferee      a `Referee`: the reference by scoring workers, at work while the learner evaluates the policy
    remote_scores      the raw scores of a reward model by scoring workers

Shares are neighbouring rows. A row's response depends on its prompt, its uniforms and the weights alone, so neither how
many workers there are nor which of them answers changes a token, up to the round-off of other batch shapes. Every
answer is stamped with the version of the weights that made it; one that is older than the bound is refused. Knows no
Ray: a crew is anything that begins and answers. Read next: `workers.py`, `runtime/ray_crew.py`, `ahead.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tether.batch import Generation, Origin, Prompts, ReferenceEvaluation, Sequences
from tether.errors import WorkerError
from tether.models import LanguagePolicy
from tether.weights import weights_version
from tether.workers import Referred, Weights, Written, trained_weights


@runtime_checkable
class Answers(Protocol):
    """An operation that workers are at."""

    def take(self) -> list[object]:
        """The answers in the order of the shares; waits for them."""


@runtime_checkable
class Workers(Protocol):
    """Workers of one role."""

    role: str

    def __len__(self) -> int: ...

    def begin(self, operation: str, shares: Sequence[Sequence[object]]) -> Answers:
        """Ask the first workers, one share each, and do not wait."""


class Published:
    """The policy's weights as workers can have them; deposited when they have moved and somebody asks."""

    def __init__(
        self,
        policy: LanguagePolicy,
        deposit: Callable[[Sequence[Tensor]], Callable[[], Sequence[Tensor]]],
        first: int = 0,
    ) -> None:
        """`deposit` keeps tensors as they are now and says how to fetch them; `first` is the version that they have."""
        self._policy, self._deposit = policy, deposit
        self._moved = weights_version(policy)
        self._version = first
        self._weights: Weights | None = None

    @property
    def version(self) -> int:
        """Of the policy as it stands: grows by one whenever an update has moved it."""
        moved = weights_version(self._policy)
        if moved != self._moved:
            self._moved, self._weights = moved, None
            self._version += 1
        return self._version

    def current(self) -> Weights:
        """The policy's weights as they stand."""
        version = self.version
        if self._weights is None:
            tensors = [weight.detach().cpu() for weight in trained_weights(self._policy)]
            self._weights = Weights(version, self._deposit(tensors))
        return self._weights


@dataclass(frozen=True)
class Writing:
    """Responses on their way."""

    answers: Answers
    weights: Weights
    published: Published
    bound: int

    def take(self) -> Generation:
        """All responses, in the order of the prompts; waits for them.

        Its origin says how many updates older than the policy the weights are that wrote it. Raises WorkerError where
        a share is older than the bound, or of other weights than were asked for.
        """
        shares = [share for share in self.answers.take() if isinstance(share, Written)]
        newest = self.published.version
        for worker, share in enumerate(shares):
            check_age(f"rollout worker {worker}", share.version, newest, self.bound)
        made = [share.generation for share in shares]
        version = min(share.version for share in shares)
        return Generation(
            torch.cat([one.responses for one in made]),
            torch.cat([one.response_mask for one in made]),
            torch.cat([one.sampler_logprobs for one in made]),
            torch.cat([one.finished for one in made]),
            Origin(staleness=newest - version, version=version),
        )


class RemoteWriter:
    """Responses by rollout workers; a `Writer`, and one that can begin and be asked later."""

    def __init__(self, crew: Workers, published: Published, bound: int = 0) -> None:
        """`bound`: updates that the policy may have moved since the weights that write."""
        self._crew, self._published, self._bound = crew, published, bound

    def begin(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Writing:
        """Have one response a prompt written by the weights as they stand, and do not wait."""
        weights = self._published.current()
        shares = [
            (weights, prompts.rows(rows), uniforms[rows], temperature)
            for rows in shares_of(len(prompts), len(self._crew))
        ]
        return Writing(self._crew.begin("write", shares), weights, self._published, self._bound)

    def write(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """Begin, and take."""
        return self.begin(prompts, uniforms, temperature).take()


@dataclass(frozen=True)
class _Expected:
    """What the scoring workers have been asked about."""

    sequences: Sequences
    temperature: float
    shares: list[slice]
    answers: Answers

    def is_of(self, sequences: Sequences, temperature: float) -> bool:
        known = self.sequences
        return (
            temperature == self.temperature
            and known.ids.shape == sequences.ids.shape
            and torch.equal(known.prompt_lengths, sequences.prompt_lengths)
            and torch.equal(known.response_lengths, sequences.response_lengths)
            and torch.equal(known.ids[known.mask], sequences.ids[known.mask])
        )


class RemoteReferee:
    """What the reference says, by scoring workers; a `Referee`."""

    def __init__(self, crew: Workers, published: Published) -> None:
        self._crew, self._published = crew, published
        self._expected: _Expected | None = None

    def expect(self, sequences: Sequences, temperature: float) -> None:
        """Have the workers begin with what they will be asked about; the learner goes on meanwhile."""
        weights, shares = self._published.current(), shares_of(len(sequences), len(self._crew))
        rows = torch.arange(len(sequences))
        plain = replace(sequences, states=None, closing=None)
        asked = [(weights, plain.rows(rows[share]), temperature) for share in shares]
        self._expected = _Expected(sequences, temperature, shares, self._crew.begin("refer", asked))

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        """log π_ref and the full KL of the response tokens, [batch, response]; equal to the learner's own to round-off.

        Raises WorkerError where an answer was made with other weights of the policy than it has.
        """
        if self._expected is None or not self._expected.is_of(sequences, temperature):
            self.expect(sequences, temperature)
        expected, self._expected = self._expected, None
        assert expected is not None
        said = [share for share in expected.answers.take() if isinstance(share, Referred)]
        for worker, share in enumerate(said):
            check_age(f"scoring worker {worker}", share.version, self._published.version, 0)
        width, home = sequences.response_mask.shape[1], sequences.ids.device
        return ReferenceEvaluation(
            _laid_together([share.evaluation.logprobs for share in said], width).to(home),
            _laid_together([share.evaluation.full_kl for share in said], width).to(home),
        )


def remote_scores(crew: Workers, reward: int, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows"]:
    """Raw scores of token ids by the reward model of this number, which every scoring worker holds."""
    if not rows:
        return torch.empty(0)
    shares = [(reward, rows[share]) for share in shares_of(len(rows), len(crew))]
    return torch.cat([share for share in crew.begin("score", shares).take() if isinstance(share, Tensor)])


def shares_of(rows: int, workers: int) -> list[slice]:
    """Neighbouring rows for each worker, none empty, and none with two rows more than another.

    >>> shares_of(5, 2), shares_of(1, 4)
    ([slice(0, 2, None), slice(2, 5, None)], [slice(0, 1, None)])
    """
    count = min(rows, workers)
    return [slice(number * rows // count, (number + 1) * rows // count) for number in range(count)]


def check_age(who: str, version: int, newest: int, bound: int) -> None:
    """Raise WorkerError where the weights are older, by updates, than the run allows."""
    if not 0 <= newest - version <= bound:
        raise WorkerError(
            f"the {who} answered by version {version} of the weights, and the policy stands at {newest}; at most "
            f"{bound} may lie between them, so its answer is refused"
        )


def _laid_together(parts: Sequence[Tensor], width: int) -> Float[Tensor, "batch response"]:
    """Shares, each as wide as its longest response, as one batch."""
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
