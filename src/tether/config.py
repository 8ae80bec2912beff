"""The knobs, one model a room; of every knob its default, bounds, help, usual range and who uses what; those of the
runtimes are in `runtime_settings.py`.

Sampling → RewardSettings → AdvantageSettings → UpdateSettings, joined in `PPOSettings`; a whole run, with its model,
its world or its own data and rewards, is `RunSettings`, and a recipe is one of those as YAML.
Knows no torch: the command line and the page read the same models. Read next: `knobs.py`, which finds knobs by name
and reports all faults of a configuration together, and `aliases.py`, the names that other libraries give them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError, model_validator

from tether.reward_spec import RewardPart, RewardSpec
from tether.runtime_settings import RuntimeSettings
from tether.settings import Settings, contradiction, knob


class SamplingSettings(Settings):
    """How responses are drawn. Sampling is pure: no top-k, top-p, repetition penalty or minimum length."""

    max_new_tokens: int = knob(
        32, "Cap on the tokens of a response", usual="24 to 1024", used="Ziegler 24, Stiennon 48, TRL 53", ge=1
    )
    temperature: float = knob(
        1.0, "T inside the policy: logits/T for sampler, old, new, reference",
        usual="0.7 to 1", used="InstructGPT 1, Ziegler, Stiennon and TRL .7", gt=0,
    )  # fmt: skip
    samples_per_prompt: int = knob(
        1, "Responses to each prompt of a batch", usual="1 to 8", used="PPO 1, GRPO-like recipes 4 to 16", ge=1
    )
    importance_cap: float | None = knob(
        2.0, "Cap of π/q, where another engine or older weights wrote the responses; null = no correction",
        usual="2 to 5", used="verl, OpenRLHF 2 where they correct", gt=0,
    )  # fmt: skip


class RewardSettings(Settings):
    """How a score becomes per-token rewards."""

    beta: float = knob(
        0.05, "β ≥ 0, the string: price of one nat of KL in units of the score", usual="0.01 to 0.2",
        used="TRL .05, Stiennon .05, InstructGPT .02, Ziegler .15 at the start, Bai .001",
    )  # fmt: skip
    allow_negative_beta: bool = knob(
        False, "Let β be below 0, which pays for drifting from the reference: to study the sign error", usual="false"
    )
    controller: Literal["fixed", "adaptive", "budget"] = knob(
        "fixed", "What moves β during a run", used="Ziegler and TRL before 0.12 adaptive, most others fixed"
    )
    target_kl: float = knob(
        6.0, "Nats per response that `adaptive` steers to or `budget` allows", usual="3 to 12",
        used="Ziegler 6 to 10, TRL before 0.12: 6", gt=0,
    )  # fmt: skip
    horizon: int = knob(
        10_000, "Responses over which `adaptive` or `budget` may move β by e-fold", usual="20 to 150 batches",
        used="Ziegler 10,000 with a batch of 512", gt=0,
    )  # fmt: skip
    missing_eos: Literal["replace", "subtract", "zero", "bootstrap", "keep"] = knob(
        "replace", "What happens to the score of a response that was cut before EOS",
        used="Ziegler, torchtune replace; TRL since 0.12 subtract",
    )  # fmt: skip
    missing_eos_score: float = knob(
        -1.0, "The score that `replace` sets, or minus what `subtract` takes", usual="-3 to -1",
        used="Ziegler -1, torchtune -3",
    )  # fmt: skip
    whiten: bool = knob(
        False, "Whiten per-token rewards (their mean is kept); off in the literature", used="Ziegler true, TRL false"
    )

    @model_validator(mode="after")
    def _pulls(self) -> RewardSettings:
        if self.beta < 0 and not self.allow_negative_beta:
            raise contradiction(
                ["beta", "allow_negative_beta"],
                f"beta is {self.beta:g}; below 0 it pays the policy for drifting from its reference. Use beta ≥ 0, "
                "or ask for it by name: allow_negative_beta: true",
            )
        if self.beta < 0 and self.controller != "fixed":
            raise contradiction(
                ["beta", "controller"], f"beta is {self.beta:g}; a controller moves a beta above 0, wanted fixed"
            )
        return self


class AdvantageSettings(Settings):
    """Generalised advantage estimation."""

    gamma: float = knob(1.0, "Discount γ per token", usual="1", used="all 1", ge=0, le=1)
    lam: float = knob(
        0.95, "GAE's λ: 1 = return minus value, 0 = one-step surprise", usual="0.95 to 1",
        used="Ziegler, Stiennon, TRL, torchtune .95; OpenRLHF and verl 1", ge=0, le=1,
    )  # fmt: skip
    whiten: bool = knob(True, "Whiten advantages once over the batch's real tokens", usual="true", used="all true")


class UpdateSettings(Settings):
    """The PPO update."""

    epochs: int = knob(
        4, "Passes over a rollout; more than 4 asks for collapse", usual="1 to 4",
        used="Ziegler, Stiennon, TRL 4; InstructGPT, OpenRLHF, verl 1", ge=1,
    )  # fmt: skip
    minibatches: int = knob(
        4, "Optimiser steps in one pass: a count, not a size", usual="1 to 8", used="InstructGPT 8, Ziegler 1", ge=1
    )
    clip_range: float = knob(0.2, "ε of the policy ratio", usual="0.1 to 0.3", used="all .2", gt=0)
    value_clip_range: float | None = knob(
        0.2, "ε of the value, in units of the score; null = off", usual="0.2 to 0.5",
        used="Ziegler, Stiennon, TRL .2; OpenRLHF, verl .5", gt=0,
    )  # fmt: skip
    value_coef: float = knob(
        0.1, "Weight of the value loss", usual="0.1 to 0.5", used="Ziegler, Stiennon, TRL .1", ge=0
    )
    learning_rate: float = knob(
        1e-5, "Adam's step size at the start", usual="1e-6 to 5e-5; 2e-4 with adapters or tiny models",
        used="Ziegler 1e-5 (124M), TRL 3e-6 (1B), OpenRLHF and verl 1e-6 (7B)", gt=0,
    )  # fmt: skip
    value_learning_rate: float | None = knob(
        None, "The value head's own step size; null = the same", usual="1 to 10 × learning_rate",
        used="OpenRLHF 9e-6, verl 1e-5", gt=0,
    )  # fmt: skip
    schedule: Literal["linear", "constant"] = knob(
        "linear", "Learning rate falls to 0, or stays", used="Stiennon, TRL linear; verl constant"
    )
    adam_epsilon: float = knob(1e-5, "Adam's ε", usual="1e-8 to 1e-5", used="Ziegler, Stiennon 1e-5; torch 1e-8", gt=0)
    adam_style: Literal["pytorch", "tensorflow"] = knob(
        "pytorch", "Where Adam's ε is added", used="Ziegler tensorflow, all others pytorch"
    )
    max_grad_norm: float | None = knob(
        1.0, "Clip of the gradient's global norm; null = off", usual="0.5 to 1", used="Hugging Face, OpenRLHF, verl 1",
        gt=0,
    )  # fmt: skip
    early_stop_kl: float | None = knob(
        0.02, "Per token; the update ends when k3(π_old, π) exceeds 1.5 × this; null = never", usual="0.01 to 0.05",
        used="Spinning Up .01", gt=0,
    )  # fmt: skip
    value_warmup: int = knob(
        0, "Updates at the start that train the value head alone", usual="0 to 50", used="verl's critic_warmup 0", ge=0
    )
    max_padding: float = knob(
        0.05, "Share of padding in one pass; 1 for models so small that passes cost, not tokens", usual="0.05; tiny 1",
        ge=0, le=1,
    )  # fmt: skip
    tokens_per_micro_batch: int = knob(
        4096, "Padded tokens in one forward and backward pass: memory, never results", usual="1024 to 32768",
        used="verl 16384 a GPU", ge=1,
    )  # fmt: skip


class PPOSettings(Settings):
    """All knobs of the algorithm."""

    sampling: SamplingSettings = SamplingSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    update: UpdateSettings = UpdateSettings()
    batch_size: int = knob(
        64, "Responses in one update", usual="16 to 1024", used="Ziegler, Stiennon, InstructGPT 512; verl 1024", ge=1
    )
    steps: int = knob(100, "Updates", usual="50 to 2000", used="Ziegler 4000 of 512 responses", ge=1)
    seed: int = knob(0, "Seed of every random stream", ge=0)

    @model_validator(mode="after")
    def _divisible(self) -> PPOSettings:
        size, parts, copies = self.batch_size, self.update.minibatches, self.sampling.samples_per_prompt
        faults, knobs = [], {"batch_size"}
        if size < parts:
            faults.append(f"batch_size {size} is smaller than {parts} minibatches; try minibatches={size}")
            knobs.add("update.minibatches")
        elif size % parts:
            faults.append(
                f"batch_size {size} is not divisible by {parts} minibatches; try batch_size={-(-size // parts) * parts}"
            )
            knobs.add("update.minibatches")
        if size % copies:
            faults.append(
                f"batch_size {size} is not a multiple of samples_per_prompt {copies}; "
                f"try batch_size={-(-size // copies) * copies}"
            )
            knobs.add("sampling.samples_per_prompt")
        if faults:
            raise contradiction(sorted(knobs), "; ".join(faults))
        return self


TOP_LAYERS = 6
"""Layers that mode `top` trains where the settings do not say."""


class ModelSettings(Settings):
    """What is trained, and how much of it."""

    source: str | None = knob(None, "Folder or hub name of the SFT checkpoint; null = the world's own")
    allow_base: bool = knob(
        False,
        "Start from, and be tied to, a model that was never fine-tuned: not what the string is for",
        usual="false",
    )
    mode: Literal["full", "lora", "top"] = knob(
        "top", "All weights, adapters, or the top k layers", used="InstructGPT full; small machines lora or top"
    )
    top_layers: int | None = knob(
        None, "k of mode `top`; null = 6, or all layers of a smaller model", usual="2 to half of the layers", ge=1
    )
    critic: Literal["single", "split"] = knob(
        "single", "One value of score and KL together, or one of each: then a β that moves leaves no stale baseline"
    )
    lora_rank: int = knob(16, "Rank of mode `lora`", usual="8 to 64", used="TRL's scripts 16", ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "Precision of the matrices", used="GPU recipes bfloat16"
    )
    gradient_checkpointing: bool = knob(
        False, "Compute activations again on the way back: less memory, a third more time, the same numbers",
        used="TRL true, OpenRLHF, verl false",
    )  # fmt: skip

    def trained_layers(self, layers: int) -> int:
        """k of mode `top` in a model of so many layers."""
        return self.top_layers or min(TOP_LAYERS, layers)


class PreferenceSettings(Settings):
    """The comparisons that a world's reward model and hold-out model are trained on."""

    pairs: int = knob(
        512, "Comparisons in all; each of the two models sees one half", usual="512 to 64,000", used="InstructGPT 33k",
        ge=8,
    )  # fmt: skip
    replies: int = knob(2, "Replies to a prompt, each compared with each", usual="2 to 9", used="InstructGPT 4–9", ge=2)
    epochs: int = knob(1, "Passes over the comparisons", usual="1", used="InstructGPT, Stiennon 1", ge=1)
    noise: float = knob(0.5, "Temperature of the Bradley–Terry labels, in units of the gold score", usual="0.25", gt=0)
    learning_rate: float = knob(
        1e-4, "Adam's step size at the start; falls to 0", usual="1e-5 to 1e-3", used="InstructGPT 9e-6 (6B)", gt=0
    )
    batch_pairs: int = knob(16, "Comparisons in one step", usual="8 to 64", used="InstructGPT, Stiennon 64", ge=1)
    top_layers: int | None = knob(6, "Layers trained above a frozen trunk; null = all weights", usual="null, 6", ge=1)


class EvaluationSettings(Settings):
    """What is measured on held-out prompts."""

    every: int = knob(25, "Updates between evaluations; the start and the end always count", usual="10 to 100", ge=1)
    prompts: int = knob(64, "Held-out prompts", usual="64 to 512", ge=1)
    best_of: tuple[int, ...] = knob((4, 16, 64), "n of the best-of-n baselines", usual="4 to 64", used="Stiennon, Gao")
    best_of_prompts: int = knob(16, "Held-out prompts that best-of-n is drawn for", usual="16 to 64", ge=1)

    @model_validator(mode="after")
    def _draws(self) -> EvaluationSettings:
        if wrong := [n for n in self.best_of if n < 1]:
            raise contradiction(["best_of"], f"best_of holds {wrong[0]}; wanted whole numbers ≥ 1, or [] for none")
        return self


class CheckpointSettings(Settings):
    """When the state of a run is saved, and what is kept of it."""

    every: int = knob(
        25, "Updates between checkpoints; the last update and a stop always save", usual="10 to 200", ge=1
    )
    keep: int = knob(2, "The last so many checkpoints are kept", usual="1 to 3", used="OpenRLHF 3", ge=1)
    milestones: int | None = knob(None, "Checkpoints at multiples of this are kept for good", ge=1)
    best: str | None = knob(None, "A metric, as eval/gold: the checkpoint where it was highest is kept too")


class CheckSettings(Settings):
    """What is done about an alarm; the checks themselves are always on."""

    on_alarm: Literal["log", "pause", "stop", "rollback"] = knob(
        "log", "Note it and go on; save and end; end; or end with the policy back at its last checkpoint", usual="log"
    )
    same_start: bool = knob(True, "Policy and reference are one model at the start; false where they differ on purpose")
    words: str | None = knob(
        None, "Folder with your own hedges.txt and opinions.jsonl, in the language of the replies; null = those shipped"
    )


class DataSettings(Settings):
    """Your own prompts, in place of a world's."""

    prompts: str | tuple[str, ...] | None = knob(
        None, "A JSONL, JSON, CSV, Parquet or text file, a hub data set, or the prompts themselves; null = the world's"
    )
    heldout: str | tuple[str, ...] | None = knob(
        None, "Prompts of the evaluation, in any of these forms; null = a share of `prompts` is split off"
    )
    heldout_share: float = knob(
        0.1, "Share of `prompts` held out for the evaluation, chosen by the seed", usual="0.05 to 0.2", gt=0, le=0.5
    )
    split: str | None = knob(None, "Split of a hub data set, as train")
    subset: str | None = knob(None, "Subset (configuration) of a hub data set")
    prompt_column: str = knob("prompt", "Column that holds the prompt; `instruction+input` joins two")
    limit: int | None = knob(None, "Rows to read at most", ge=1)
    too_long: Literal["error", "drop", "truncate_left"] = knob(
        "error", "What happens to a prompt that leaves no room for the response", used="OpenRLHF, verl drop"
    )


class JudgeSettings(Settings):
    """Something that scores responses; at most one of `source`, `parts` and `ensemble`. See `reward_spec.py`."""

    source: str | None = knob(
        None, "Classifier by folder or hub name, function as FILE.py:NAME or MODULE:NAME, http address or .jsonl"
    )
    parts: dict[str, RewardPart] = knob({}, "Several by name, as {quality: {source: org/model, weight: 0.7}, …}")
    ensemble: tuple[str, ...] = knob((), "Several sources that judge the same thing", usual="3 to 5")
    ensemble_by: Literal["mean", "min", "variance"] = knob("mean", "How an ensemble becomes one score")
    ensemble_penalty: float = knob(0.1, "λ of `variance`: mean − λ·variance, in 1/score", usual="0.1 to 1", ge=0)
    per_token: bool = knob(False, "The function gives a list a response: one number a token", usual="false")
    timeout_seconds: float | None = knob(
        None, "Limit of a function's call or of one try at an address; null = none, and 60 for an address",
        usual="30 to 600", gt=0,
    )  # fmt: skip
    retries: int = knob(4, "Further tries at an address that does not answer", usual="0 to 8", ge=0)

    @property
    def is_given(self) -> bool:
        return bool(self.source or self.parts or self.ensemble)

    @property
    def spec(self) -> RewardSpec | None:
        """What `open_reward` reads; None where nothing was said."""
        return RewardSpec.model_validate(self.model_dump()) if self.is_given else None

    @property
    def classifiers(self) -> list[str]:
        """The sources among all named that can only be classifiers: no function, address or list."""
        named = [self.source or "", *self.ensemble, *(part.source for part in self.parts.values())]
        return [source for source in named if source and ":" not in source and not source.endswith((".jsonl", ".py"))]

    @model_validator(mode="after")
    def _one(self) -> JudgeSettings:
        try:
            _ = self.spec
        except ValidationError as error:
            raise contradiction(["source", "parts", "ensemble"], error.errors()[0]["msg"]) from error
        return self


class RunSettings(Settings):
    """A whole run: what a recipe holds."""

    world: Literal["smollm2", "nano"] | None = knob(
        None, "Where model, prompts and judges come from, unless they are given; null = all are given"
    )
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    reward: JudgeSettings = JudgeSettings()
    """What PPO climbs."""
    holdout: JudgeSettings = JudgeSettings()
    """A second reward model, of other comparisons, that is only watched: `score/holdout`, `eval/holdout`."""
    judge: JudgeSettings = JudgeSettings()
    """What decides who is better, never optimised: `score/gold`, `eval/gold`, `eval/win_rate`."""
    preferences: PreferenceSettings = PreferenceSettings()
    ppo: PPOSettings = PPOSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    checks: CheckSettings = CheckSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    keep_samples: int = knob(8, "Responses kept of each update, with their per-token arrays", usual="0 to 16", ge=0)
    report_to: tuple[str, ...] = knob(
        (), "Trackers beside the run's own store: tensorboard, wandb, trackio, mlflow, …", used="TRL all installed"
    )

    @model_validator(mode="after")
    def _linear(self) -> RunSettings:
        if self.model.critic == "split" and self.ppo.reward.whiten:
            raise contradiction(
                ["model.critic", "ppo.reward.whiten"],
                "critic is split and rewards are whitened, which mixes score and KL again; wanted one of the two: "
                "critic: single, or whiten: false",
            )
        return self

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

    def with_processes(self, processes: int) -> RunSettings:
        """The same run shared by so many processes."""
        return self.model_copy(update={"runtime": self.runtime.model_copy(update={"processes": processes})})

    def dump(self) -> dict[str, object]:
        """As plain values, for YAML and JSON."""
        return self.model_dump(mode="json")
