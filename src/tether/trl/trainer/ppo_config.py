"""The knobs of the classic trainer, with TRL's names and defaults; read at call time, so scripts may change them."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tether.errors import ConfigError
from tether.trl.core import flatten_dict

KL_PENALTIES = ("kl", "abs", "mse", "full")


@dataclass
class PPOConfig:
    """What a `PPOTrainer` is told. Raises ValueError where the batch sizes do not fit."""

    exp_name: str = Path(sys.argv[0]).stem
    """Name of the experiment; for trackers."""
    seed: int = 0
    log_with: str | None = None
    """A tracker that accelerate knows: "tensorboard", "wandb" …"""
    task_name: str | None = None
    model_name: str = "gpt2"
    """Where scripts load the model from."""
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = True
    """Drop the columns of a `datasets.Dataset` that neither the model's forward nor the log reads."""
    tracker_kwargs: dict = field(default_factory=dict)
    accelerator_kwargs: dict = field(default_factory=dict)
    project_kwargs: dict = field(default_factory=dict)
    """Of accelerate's ProjectConfiguration, as `logging_dir`."""
    tracker_project_name: str = "trl"
    push_to_hub_if_best_kwargs: dict = field(default_factory=dict)
    """With a `repo_id`: put the model onto the hub whenever a batch's mean score is the highest so far."""
    steps: int = 20000
    """Samples in the whole run; only `total_ppo_epochs` reads it."""
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    """β follows the KL (Ziegler et al. 2019); off: it stays."""
    init_kl_coef: float = 0.2
    """β, the string: the price of a nat of KL, in units of the score."""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """k1, |k1|, ½·k1² or the full-vocabulary KL. Of the sampled ones only "kl" is a tether: docs/lesson.md."""
    target: float = 6.0
    """KL that the adaptive controller steers to, nats per response."""
    horizon: float = 10000.0
    gamma: float = 1
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128
    """Responses in one call of `step`."""
    forward_batch_size: int | None = None
    """The old name of `mini_batch_size`, which it overwrites."""
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    """Minibatches in one optimiser step."""
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    optimize_cuda_cache: bool | None = None
    """The old name of `optimize_device_cache`."""
    optimize_device_cache: bool = False
    early_stopping: bool = False
    """Leave the remaining epochs out once the policy's KL to its own start exceeds 1.5·`target_kl`."""
    target_kl: float = 1.0
    """Nats per token, for early stopping. The adaptive controller's target is `target`."""
    compare_steps: int = 1
    ratio_threshold: float = 10.0
    """A minibatch whose mean ratio exceeds it is left out."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """With scaling: subtract their running mean first."""
    score_clip: float | None = None
    whiten_rewards: bool = False
    gradient_checkpointing: bool = False
    dataset_num_proc: int | None = None

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn(
                "`forward_batch_size` is the old name of `mini_batch_size`, which it overwrites", stacklevel=3
            )
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        if self.kl_penalty not in KL_PENALTIES:
            raise ConfigError(f"kl_penalty is {self.kl_penalty!r}; wanted one of {', '.join(KL_PENALTIES)}")
        if self.target_kl > 1.0 and not self.early_stopping:
            warnings.warn(
                f"target_kl={self.target_kl:g} does nothing here: it is the threshold of early stopping, which is off. "
                "The KL that β steers to is `target`: "
                f"if that was meant, write target={self.target_kl:g} (it is {self.target:g})",
                stacklevel=3,
            )
        self.check_batches()

    def check_batches(self) -> None:
        """Raise ConfigError, a ValueError, unless a batch is a whole number of optimiser steps."""
        if self.backward_batch_size < 1 or self.batch_size % self.backward_batch_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}; wanted a multiple of mini_batch_size × gradient_accumulation_steps "
                f"= {self.mini_batch_size} × {self.gradient_accumulation_steps} = {self.backward_batch_size}"
            )

    @property
    def backward_batch_size(self) -> int:
        """Responses in one optimiser step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def total_ppo_epochs(self) -> int:
        """Calls of `step` in the whole run."""
        return math.ceil(self.steps / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Every knob under one flat name."""
        return flatten_dict(self.__dict__)
