"""The knobs, one model a room; every knob with its bounds, its default and one line of help.

Sampling → RewardSettings → AdvantageSettings → UpdateSettings, joined in `PPOSettings`; a whole run, with its model,
world and preferences, is `RunSettings`, and a recipe is one of those as YAML.
Knows no torch: the command line and the page read the same models.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of all knobs: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingSettings(Settings):
    """How responses are drawn. Sampling is pure: no top-k, top-p, repetition penalty or minimum length."""

    max_new_tokens: int = Field(32, ge=1, description="Cap on the tokens of a response")
    temperature: float = Field(1.0, gt=0, description="T inside the policy: logits/T for sampler, old, new, reference")
    samples_per_prompt: int = Field(1, ge=1, description="Responses to each prompt of a batch")


class RewardSettings(Settings):
    """How a score becomes per-token rewards."""

    beta: float = Field(0.05, ge=0, description="β, the string: price of one nat of KL in units of the score")
    controller: Literal["fixed", "adaptive", "budget"] = Field("fixed", description="What moves β during a run")
    target_kl: float = Field(6.0, gt=0, description="Nats per response that `adaptive` steers to or `budget` allows")
    horizon: int = Field(10_000, gt=0, description="Responses over which `adaptive` or `budget` may move β by e-fold")
    missing_eos: Literal["replace", "subtract", "zero", "bootstrap", "keep"] = Field(
        "replace", description="What happens to the score of a response that was cut before EOS"
    )
    missing_eos_score: float = Field(-1.0, description="The score that `replace` sets, or minus what `subtract` takes")
    whiten: bool = Field(False, description="Whiten per-token rewards (their mean is kept); off in the literature")


class AdvantageSettings(Settings):
    """Generalised advantage estimation."""

    gamma: float = Field(1.0, ge=0, le=1, description="Discount γ per token")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's λ: 1 = return minus value, 0 = one-step surprise")
    whiten: bool = Field(True, description="Whiten advantages once over the batch's real tokens")


class UpdateSettings(Settings):
    """The PPO update."""

    epochs: int = Field(4, ge=1, description="Passes over a rollout; more than 4 asks for collapse")
    minibatches: int = Field(4, ge=1, description="Optimiser steps in one pass")
    clip_range: float = Field(0.2, gt=0, description="ε of the policy ratio")
    value_clip_range: float | None = Field(0.2, gt=0, description="ε of the value, in units of the score; null = off")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss")
    learning_rate: float = Field(1e-5, gt=0, description="Adam's step size at the start")
    value_learning_rate: float | None = Field(None, gt=0, description="The value head's own step size; null = the same")
    schedule: Literal["linear", "constant"] = Field("linear", description="Learning rate falls to 0, or stays")
    adam_epsilon: float = Field(1e-5, gt=0, description="Adam's ε")
    adam_style: Literal["pytorch", "tensorflow"] = Field("pytorch", description="Where Adam's ε is added")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip of the gradient's global norm; null = off")
    early_stop_kl: float | None = Field(
        0.02, gt=0, description="Per token; the update ends when k3(π_old, π) exceeds 1.5 × this; null = never"
    )
    value_warmup: int = Field(0, ge=0, description="Updates at the start that train the value head alone")
    max_padding: float = Field(
        0.05, ge=0, le=1, description="Share of padding in one pass; 1 for models so small that passes cost, not tokens"
    )
    tokens_per_micro_batch: int = Field(4096, ge=1, description="Padded tokens in one forward and backward pass")


class PPOSettings(Settings):
    """All knobs of the algorithm."""

    sampling: SamplingSettings = SamplingSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    update: UpdateSettings = UpdateSettings()
    batch_size: int = Field(64, ge=1, description="Responses in one update")
    steps: int = Field(100, ge=1, description="Updates")
    seed: int = Field(0, ge=0, description="Seed of every random stream")

    @model_validator(mode="after")
    def _divisible(self) -> PPOSettings:
        if self.batch_size < self.update.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} is smaller than {self.update.minibatches} minibatches; "
                f"try minibatches={self.batch_size}"
            )
        if self.batch_size % self.update.minibatches:
            nearest = -(-self.batch_size // self.update.minibatches) * self.update.minibatches
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by {self.update.minibatches} minibatches; "
                f"try batch_size={nearest}"
            )
        if self.batch_size % self.sampling.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of samples_per_prompt "
                f"{self.sampling.samples_per_prompt}; try batch_size="
                f"{-(-self.batch_size // self.sampling.samples_per_prompt) * self.sampling.samples_per_prompt}"
            )
        return self


class ModelSettings(Settings):
    """What is trained, and how much of it."""

    source: str | None = Field(None, description="Folder or hub name of the SFT checkpoint; null = the world's own")
    mode: Literal["full", "lora", "top"] = Field("top", description="All weights, adapters, or the top k layers")
    top_layers: int = Field(6, ge=1, description="k of mode `top`")
    lora_rank: int = Field(16, ge=1, description="Rank of mode `lora`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Precision of the matrices")


class PreferenceSettings(Settings):
    """The comparisons that the reward model and the hold-out model are trained on."""

    pairs: int = Field(512, ge=8, description="Comparisons in all; each of the two models sees one half")
    noise: float = Field(0.5, gt=0, description="Temperature of the Bradley–Terry labels, in units of the gold score")
    learning_rate: float = Field(1e-4, gt=0, description="Adam's step size at the start; falls to 0")
    batch_pairs: int = Field(16, ge=1, description="Comparisons in one step")
    top_layers: int | None = Field(6, ge=1, description="Layers trained above a frozen trunk; null = all weights")


class EvaluationSettings(Settings):
    """What is measured on held-out prompts."""

    every: int = Field(25, ge=1, description="Updates between evaluations; the start and the end always count")
    prompts: int = Field(64, ge=1, description="Held-out prompts")
    best_of: tuple[int, ...] = Field((4, 16, 64), description="n of the best-of-n baselines")
    best_of_prompts: int = Field(16, ge=1, description="Held-out prompts that best-of-n is drawn for")


class CheckpointSettings(Settings):
    """When the state of a run is saved, and what is kept of it."""

    every: int = Field(25, ge=1, description="Updates between checkpoints; the last update and a stop always save")
    keep: int = Field(2, ge=1, description="The last so many checkpoints are kept")
    milestones: int | None = Field(None, ge=1, description="Checkpoints at multiples of this are kept for good")
    best: str | None = Field(
        None, description="A metric, as eval/gold: the checkpoint where it was highest is kept too"
    )


class RunSettings(Settings):
    """A whole run: what a recipe holds."""

    world: Literal["smollm2", "nano"] = Field("smollm2", description="Where model, prompts and gold scorer come from")
    model: ModelSettings = ModelSettings()
    preferences: PreferenceSettings = PreferenceSettings()
    ppo: PPOSettings = PPOSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    keep_samples: int = Field(8, ge=0, description="Responses kept of each update, with their per-token arrays")

    def with_beta(self, beta: float) -> RunSettings:
        """The same run on another string, all other knobs and seeds equal."""
        reward = self.ppo.reward.model_copy(update={"beta": beta})
        return self.model_copy(update={"ppo": self.ppo.model_copy(update={"reward": reward})})

    def with_seed(self, seed: int) -> RunSettings:
        """The same run from another seed."""
        return self.model_copy(update={"ppo": self.ppo.model_copy(update={"seed": seed})})

    def with_steps(self, steps: int) -> RunSettings:
        """The same run with another number of updates."""
        return RunSettings.model_validate(self.dump() | {"ppo": self.ppo.model_dump(mode="json") | {"steps": steps}})

    def dump(self) -> dict[str, object]:
        """As plain values, for YAML and JSON."""
        return self.model_dump(mode="json")
