"""What runs in the processes of workers: models that answer a share of a batch, by weights that are sent along.

    WritingWorker    the policy's own sampler            prompts, uniforms → responses
    ScoringWorker    policy, reference, reward models    sequences → log π_ref and the full KL; token ids → raw scores

Each reads the run's SFT checkpoint on its own machine and takes the trained tensors over it: in `lora` the adapters
alone, in `top` the top layers, so what is sent is what trains and no more (another engine, which knows plain
checkpoints only, wants `weights.py`). An answer depends on its arguments alone and carries the version of the weights
that it was made by. A writer needs no reference; a scorer needs the policy beside it, because KL(π‖π_ref) over the
whole vocabulary is a sum over both distributions, which are far too large to send. Knows no Ray. Read next:
`remote.py`, which asks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from tether import __version__
from tether.batch import Generation, Prompts, ReferenceEvaluation, Sequences
from tether.errors import ModelError
from tether.models import LanguagePolicy
from tether.modes import FullMode
from tether.reward_model import Encoded, RewardModel


@dataclass(frozen=True)
class Weights:
    """The policy's trained weights of one moment, not yet fetched."""

    version: int
    fetch: Callable[[], Sequence[Tensor]]
    """The tensors of `trainable()["policy"]`, in its order; called where these are not at hand."""


@dataclass(frozen=True)
class Written:
    """Responses, and the version of the weights that wrote them."""

    generation: Generation
    version: int


@dataclass(frozen=True)
class Referred:
    """What the reference says of responses, and the version of the policy's weights in the KL."""

    evaluation: ReferenceEvaluation
    version: int


def versions() -> dict[str, str]:
    """What computes here; a worker and its learner must agree on it."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]), "tether": __version__, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


class _Holder:
    """A policy that follows the learner's."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy = policy
        self.version: int | None = None

    def hello(self) -> dict[str, str]:
        """Says that the models are read, and what reads them."""
        return versions()

    @torch.no_grad()
    def follow(self, weights: Weights) -> None:
        """Take these weights, unless they are here. Raises ModelError where they are of another model."""
        if self.version == weights.version:
            return
        own, sent = self.policy.trainable()["policy"], weights.fetch()
        if [tuple(one.shape) for one in own] != [tuple(one.shape) for one in sent]:
            raise ModelError(
                f"the learner sent {len(sent)} tensors that do not fit the {len(own)} that train here; wanted the "
                "same SFT checkpoint on every machine"
            )
        for mine, theirs in zip(own, sent, strict=True):
            mine.copy_(theirs)
        self.version = weights.version


class WritingWorker(_Holder):
    """Writes responses by the sampler of `decode.py`, as the learner's own process would."""

    def __init__(self, open_policy: Callable[[], LanguagePolicy]) -> None:
        super().__init__(_without_reference(open_policy()))

    def write(
        self, weights: Weights, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float
    ) -> Written:
        """One response a prompt, of the width of `uniforms`. Raises what `LanguagePolicy.generate` raises."""
        self.follow(weights)
        assert self.version is not None
        return Written(self.policy.generate(prompts, uniforms, temperature), self.version)


class ScoringWorker(_Holder):
    """Says what the reference and the reward models say."""

    def __init__(self, open_policy: Callable[[], LanguagePolicy], rewards: Sequence[RewardModel]) -> None:
        super().__init__(open_policy())
        device = self.policy.device
        for reward in rewards:
            reward.model.to(device)
        self._rewards = rewards

    @torch.no_grad()
    def refer(self, weights: Weights, sequences: Sequences, temperature: float) -> Referred:
        """log π_ref of each response token, and KL(π‖π_ref) over the vocabulary by the weights sent."""
        self.follow(weights)
        assert self.version is not None
        prepared = self.policy.prepare(sequences)
        return Referred(self.policy.evaluate_reference(prepared, temperature), self.version)

    @torch.no_grad()
    def score(self, reward: int, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows"]:
        """Raw scores of token ids by one of the reward models."""
        return self._rewards[reward].score_encoded(Encoded(rows))


def _without_reference(policy: LanguagePolicy) -> LanguagePolicy:
    """The same policy where a frozen copy of the whole model is given up; in `lora` and `top` there is none."""
    if not isinstance(policy.mode, FullMode):
        return policy
    model = policy.mode.model
    return LanguagePolicy(FullMode(model, model), policy.value, policy.tokenizer)


def trained_weights(policy: LanguagePolicy) -> list[nn.Parameter]:
    """What `Weights.fetch` gives, as the learner holds it."""
    return list(policy.trainable()["policy"])
