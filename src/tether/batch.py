"""The nouns that the rooms hand to each other, and what a policy must be able to do.

    Prompts → Generation → Rollout → Scores → Rewards → Experience → Outcome
              (Sequences: prompt and response as one row, what a forward pass reads)

The axes' legend, for every shape in the project:
    batch     one row a response (an episode)          prompt    prompt tokens, left-padded
    response  response tokens, right-padded            total     prompt + response, padded on the right only
    vocab     the policy's vocabulary                  dim       width of a hidden state
    pairs     preference pairs

All are frozen; tensors in them are never edited in place. Each room's noun carries the room's own measurements in
`metrics`, under names of the catalogue (`metrics.py`). `response_mask` is True on real response tokens, the EOS
that ends a response included. This module knows no settings, model or log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.errors import InputError

KL_UNIT = 0.05
"""Score per nat, a usual β: a value of the KL is learned in this unit, so that it is of the score's order."""
Message: TypeAlias = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""
Prompt: TypeAlias = str | Sequence[Message]
"""What people write: text, or a conversation up to the turn that the policy shall say."""


def plain_text(prompt: Prompt) -> str:
    """The prompt as text to show or to read: a single message is its content, a longer conversation one turn a line.

    >>> plain_text([{"role": "user", "content": "2 + 2?"}])
    '2 + 2?'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Prompts:
    """A batch of tokenised prompts."""

    ids: Int[Tensor, "batch prompt"]
    """Token ids, left-padded."""
    mask: Bool[Tensor, "batch prompt"]
    """True on prompt tokens, False on the padding."""
    texts: tuple[Prompt, ...]
    """The prompts as people wrote them, before any chat template; what reward functions receive."""
    keys: tuple[int, ...]
    """One number a row that names its random stream: the prompt's place in the data, and the sample's number."""
    columns: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Further columns of the data set, one entry a row, handed to reward functions by name."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        return self.mask.sum(dim=1)

    def rows(self, part: slice) -> Prompts:
        """Neighbouring rows, as wide as before."""
        columns = {name: entries[part] for name, entries in self.columns.items()}
        return Prompts(self.ids[part], self.mask[part], self.texts[part], self.keys[part], columns)


@dataclass(frozen=True)
class Origin:
    """Who wrote a batch of responses, and how old its weights were."""

    engine: str = "tether"
    """`tether` for the policy's own sampler; another engine's kernels round otherwise, so its q is not quite π."""
    staleness: int = 0
    """Updates between the weights that wrote the responses and those that stand when the update begins."""
    version: int = 0
    """Of the weights that wrote them, as the engine says: how often they have changed since it was opened."""

    @property
    def is_exact(self) -> bool:
        """Whether q, which the tokens were drawn from, is the policy's own π, up to round-off of one program."""
        return self.engine == "tether" and self.staleness == 0


@dataclass(frozen=True)
class Generation:
    """What a sampler yields for a batch of prompts."""

    responses: Int[Tensor, "batch response"]
    """Token ids, right-padded; the EOS that ends a response belongs to it."""
    response_mask: Bool[Tensor, "batch response"]
    """True on response tokens."""
    sampler_logprobs: Float[Tensor, "batch response"]
    """log-probabilities under which the sampler drew the tokens; 0 where masked."""
    finished: Bool[Tensor, "batch"]
    """True where the response ended by EOS (or in a world of fixed length), False where it was cut."""
    origin: Origin = Origin()

    def trimmed(self) -> Generation:
        """Without the columns on the right that hold padding only."""
        width = int(self.response_mask.sum(dim=1).max())
        return replace(
            self,
            responses=self.responses[:, :width],
            response_mask=self.response_mask[:, :width],
            sampler_logprobs=self.sampler_logprobs[:, :width],
        )


@runtime_checkable
class Writer(Protocol):
    """Who writes the responses in place of the policy's own sampler: another engine, or workers elsewhere."""

    def write(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """One response a prompt, at most as long as `uniforms` is wide, by the policy's weights as they stand, or by
        older ones within the bound that the user declared; the generation's `origin` says which.
        """


@runtime_checkable
class Referee(Protocol):
    """Who says what the reference says of responses, in place of the policy's own process: workers elsewhere."""

    def expect(self, sequences: Sequences, temperature: float) -> None:
        """What will be asked soon; whoever works elsewhere may begin."""

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        """The same numbers as the policy's own process gives, up to round-off."""


@dataclass(frozen=True)
class Closing:
    """What the trunk says of a token read after each response that has no end of its own."""

    token: int
    """The EOS."""
    states: Float[Tensor, "batch dim"]
    """Its states; of no meaning where the response ended by itself."""


@dataclass(frozen=True)
class Sequences:
    """Prompt and response as one row each, `[prompt … response … padding]`: what a forward pass reads."""

    ids: Int[Tensor, "batch total"]
    prompt_lengths: Int[Tensor, "batch"]
    response_lengths: Int[Tensor, "batch"]
    states: Float[Tensor, "batch total dim"] | None = None
    """The frozen trunk's hidden states, where the policy keeps them for the whole update (mode `top`)."""
    closing: Closing | None = None
    """The same for an EOS after cut responses, which a reward model on this trunk wants to read."""

    @staticmethod
    def join(prompts: Prompts, generation: Generation, pad: int) -> Sequences:
        """Lay the real tokens of each prompt and response end to end; the rest is `pad`."""
        prompt_lengths, response_lengths = prompts.lengths, generation.response_mask.sum(dim=1)
        total = int((prompt_lengths + response_lengths).max())
        ids = torch.full((len(prompts), total), pad, dtype=torch.long, device=prompts.ids.device)
        columns = torch.arange(total, device=ids.device)
        in_prompt = columns < prompt_lengths[:, None]
        in_response = ~in_prompt & (columns < (prompt_lengths + response_lengths)[:, None])
        ids[in_prompt] = prompts.ids[prompts.mask]
        ids[in_response] = generation.responses[generation.response_mask]
        return Sequences(ids, prompt_lengths, response_lengths)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @cached_property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Real tokens a row, prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def mask(self) -> Bool[Tensor, "batch total"]:
        """True on real tokens of prompt and response."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @cached_property
    def response_mask(self) -> Bool[Tensor, "batch response"]:
        """True on real response tokens."""
        width = int(self.response_lengths.max())
        return torch.arange(width, device=self.ids.device) < self.response_lengths[:, None]

    @cached_property
    def response_positions(self) -> Int[Tensor, "batch response"]:
        """Where in `ids` each response token stands; padding points at the row's last column (a valid index)."""
        width = self.response_mask.shape[1]
        positions = self.prompt_lengths[:, None] + torch.arange(width, device=self.ids.device)
        return positions.clamp(max=self.ids.shape[1] - 1)

    @cached_property
    def responses(self) -> Int[Tensor, "batch response"]:
        """The response tokens, right-padded with any valid token."""
        return self.ids.gather(1, self.response_positions)

    def rows(self, index: Int[Tensor, "rows"]) -> Sequences:
        """The rows named, trimmed to the longest of them."""
        total = int(self.lengths[index].max())
        return Sequences(
            self.ids[index, :total],
            self.prompt_lengths[index],
            self.response_lengths[index],
            None if self.states is None else self.states[index, :total],
            None if self.closing is None else Closing(self.closing.token, self.closing.states[index]),
        )

    def with_states(self, states: Float[Tensor, "batch total dim"], closing: Closing | None = None) -> Sequences:
        return replace(self, states=states, closing=closing)


@dataclass(frozen=True)
class Evaluation:
    """What the policy says of given responses; carries gradients where they are enabled. 0 where masked."""

    logprobs: Float[Tensor, "batch response"]
    """log π(y_t|s_t) at the policy's temperature, nats per token."""
    values: Float[Tensor, "batch response"]
    """V(s_t), the expected return before y_t is emitted, in the score's unit; with two critics V_r(s_t), without KL."""
    entropy: Float[Tensor, "batch response"]
    """H(π(·|s_t)), nats per token; detached."""
    kl_values: Float[Tensor, "batch response"] | None = None
    """V_KL(s_t), the KL still to be spent from y_t on, nats; None where one critic values score and KL together."""


@dataclass(frozen=True)
class ReferenceEvaluation:
    """What the frozen reference says of the same responses. Never carries gradients. 0 where masked."""

    logprobs: Float[Tensor, "batch response"]
    """log π_ref(y_t|s_t), nats per token, at the policy's temperature."""
    full_kl: Float[Tensor, "batch response"]
    """KL(π(·|s_t)‖π_ref(·|s_t)) over the whole vocabulary, nats per token."""


@runtime_checkable
class Policy(Protocol):
    """A policy with a value head and a frozen reference: what the rooms ask of any model."""

    def generate(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """Sample one response a prompt, token t of row b by the inverse CDF at `uniforms[b, t]`.

        The width of `uniforms` caps the response. The same uniforms give the same responses, whatever the batch.
        """

    def prepare(self, sequences: Sequences) -> Sequences:
        """Compute once what every later forward pass of this rollout shares (mode `top`: the trunk's states)."""

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        """log-probabilities, values and entropies of the responses under the policy as it stands."""

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        """The same responses under the frozen reference, and the full-vocabulary KL to it."""

    def decode(self, responses: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> list[str]:
        """The responses as text, special tokens left out."""

    def trainable(self) -> Mapping[str, Sequence[torch.nn.Parameter]]:
        """Parameters by group: `policy` and `value`; no parameter stands in two groups."""


@dataclass(frozen=True)
class Rollout:
    """Responses with all that is known of them before any score: the data of one update."""

    prompts: Prompts
    sequences: Sequences
    texts: tuple[str, ...]
    """The responses as text, special tokens left out."""
    logprobs: Float[Tensor, "batch response"]
    """log π_θold(y_t|s_t), recomputed by the policy that sampled."""
    sampler_logprobs: Float[Tensor, "batch response"]
    """The same as the sampler saw them; equal up to round-off where the sampler is honest."""
    ref_logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    entropy: Float[Tensor, "batch response"]
    full_kl: Float[Tensor, "batch response"]
    finished: Bool[Tensor, "batch"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    kl_values: Float[Tensor, "batch response"] | None = None
    """As in `Evaluation`."""
    origin: Origin = Origin()
    weights: Float[Tensor, "batch response"] | None = None
    """min(π_θold/q, cap) of each token where q is not π (`origin`), 0 where masked; None where it is."""

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, part: slice) -> Rollout:
        """Neighbouring rows, trimmed to the longest of them, without metrics."""
        sequences = self.sequences.rows(torch.arange(len(self))[part])
        width = sequences.response_mask.shape[1]
        numbers = {
            name: getattr(self, name)[part, :width]
            for name in ("logprobs", "sampler_logprobs", "ref_logprobs", "values", "entropy", "full_kl")
        }
        return Rollout(
            prompts=self.prompts.rows(part),
            sequences=sequences,
            texts=self.texts[part],
            finished=self.finished[part],
            kl_values=None if self.kl_values is None else self.kl_values[part, :width],
            origin=self.origin,
            weights=None if self.weights is None else self.weights[part, :width],
            **numbers,
        )

    def values_at(self, beta: float) -> Float[Tensor, "batch response"]:
        """V(s_t) on a string of this β: V_r − β·V_KL, or the one critic's own V."""
        return self.values if self.kl_values is None else self.values - beta * self.kl_values

    @property
    def response_mask(self) -> Bool[Tensor, "batch response"]:
        return self.sequences.response_mask

    @property
    def kl(self) -> Float[Tensor, "batch"]:
        """Σ_t log π_θold − log π_ref, nats per response; its mean is the estimate of K."""
        return torch.where(self.response_mask, self.logprobs - self.ref_logprobs, 0.0).sum(dim=1)


@runtime_checkable
class Reward(Protocol):
    """What scores responses: one number a response, higher is better."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]
    ) -> Iterable[float]: ...


@runtime_checkable
class ScoresRollouts(Protocol):
    """A reward that can read a whole rollout, token ids and cached trunk states included, and so does less work."""

    def score_rollout(self, rollout: Rollout) -> Iterable[float]:
        """The same numbers as the reward gives to the rollout's texts, up to round-off."""


@runtime_checkable
class JudgesRollouts(Protocol):
    """A reward that says more of a rollout than one number a response: its parts' numbers, rewards of single tokens."""

    def judge_rollout(self, rollout: Rollout) -> Scores: ...


@dataclass(frozen=True)
class Scores:
    """One score a response, as the reward gave them."""

    scores: Float[Tensor, "batch"]
    """What stands on the last token."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Float[Tensor, "batch response"] | None = None
    """What stands on each token besides, where the reward was asked for it by name; 0 where masked."""

    @property
    def totals(self) -> Float[Tensor, "batch"]:
        """Σ_t token reward + score: all that the reward gave to a response."""
        return self.scores if self.token_rewards is None else self.scores + self.token_rewards.sum(dim=1)


@dataclass(frozen=True)
class Rewards:
    """Per-token rewards on the string: −β·KL everywhere, plus the score on the last token, plus any token rewards."""

    rewards: Float[Tensor, "batch response"]
    scores: Float[Tensor, "batch"]
    """The scores that went in: after the rule for responses that did not end by EOS."""
    beta: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Float[Tensor, "batch response"] | None = None
    """The reward's own token rewards that went in, where there are any."""


@dataclass(frozen=True)
class Experience:
    """All that the PPO update reads. Advantages are whitened where the settings say so; returns never are."""

    sequences: Sequences
    old_logprobs: Float[Tensor, "batch response"]
    old_values: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]
    """What `old_values` should have been: G_t, or with two critics G_r,t, without KL."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    old_kl_values: Float[Tensor, "batch response"] | None = None
    kl_returns: Float[Tensor, "batch response"] | None = None
    """What `old_kl_values` should have been, nats."""
    weights: Float[Tensor, "batch response"] | None = None
    """As in `Rollout`."""

    def __len__(self) -> int:
        return len(self.sequences)

    def returns_at(self, beta: float) -> Float[Tensor, "batch response"]:
        """G_t on a string of this β: G_r − β·G_KL, or the one critic's own G."""
        return self.returns if self.kl_returns is None else self.returns - beta * self.kl_returns

    def rows(self, index: Int[Tensor, "rows"]) -> Experience:
        """The rows named, trimmed to the longest of them."""
        sequences = self.sequences.rows(index)
        width = sequences.response_mask.shape[1]
        return Experience(
            sequences,
            self.old_logprobs[index, :width],
            self.old_values[index, :width],
            self.advantages[index, :width],
            self.returns[index, :width],
            old_kl_values=None if self.old_kl_values is None else self.old_kl_values[index, :width],
            kl_returns=None if self.kl_returns is None else self.kl_returns[index, :width],
            weights=None if self.weights is None else self.weights[index, :width],
        )


@dataclass(frozen=True)
class Outcome:
    """What one update did, as numbers of the metrics catalogue."""

    epochs_used: int
    """Epochs begun; fewer than asked for where the update stopped early."""
    skipped_steps: int
    """Optimiser steps left out because a loss or a gradient was not finite."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def check_rows(name: str, got: int, wanted: int) -> None:
    """Raise InputError unless there is one entry a response."""
    if got != wanted:
        raise InputError(f"{name} gave {got} entries for {wanted} responses; wanted exactly one each, in order")
