"""What a trainer is put together from: its arguments checked, accelerate, the data's columns, trackers, a clock."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tether.errors import ConfigError, InputError
from tether.trl.models import SUPPORTED_ARCHITECTURES, PreTrainedModelWrapper
from tether.trl.trainer.ppo_config import PPOConfig

READ_BY_FORWARD = frozenset({"input_ids", "past_key_values", "attention_mask", "return_past_key_values"})
KEPT_COLUMNS = READ_BY_FORWARD | {"label", "query", "response"}
"""Columns of a `datasets.Dataset` that survive `remove_unused_columns`."""


def checked(
    config: object, model: object, ref_model: object, tokenizer: object, dataset: object, lr_scheduler: object
) -> tuple[PPOConfig, PreTrainedModelWrapper, PreTrainedTokenizerBase]:
    """The three that must be there. Raises ValueError where an argument is of another kind; warns of no dataset."""
    if not isinstance(config, PPOConfig):
        raise ConfigError(f"config is a {type(config).__name__}; wanted a PPOConfig")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}; wanted a tokenizer of transformers")
    for name, given in {"model": model, "ref_model": ref_model}.items():
        if not isinstance(given, SUPPORTED_ARCHITECTURES) and not (name == "ref_model" and given is None):
            raise InputError(
                f"{name} is a {type(given).__name__}; wanted AutoModelForCausalLMWithValueHead.from_pretrained(…)"
            )
    if dataset is not None and not isinstance(dataset, torch.utils.data.Dataset | Dataset):
        raise InputError(f"dataset is a {type(dataset).__name__}; wanted a torch or Hugging Face dataset")
    if lr_scheduler is not None and not isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise InputError(f"lr_scheduler is a {type(lr_scheduler).__name__}; wanted one of torch.optim.lr_scheduler")
    if dataset is None:
        warnings.warn("no dataset was given: batches are yours, of config.batch_size each", stacklevel=3)
    if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
        raise ConfigError("push_to_hub_if_best_kwargs has no repo_id; wanted the repository to push to")
    assert isinstance(model, PreTrainedModelWrapper)
    return config, model, tokenizer


def accelerator(config: PPOConfig) -> Any:
    """Accelerate with the tracker that the config names."""
    made = Accelerator(
        log_with=config.log_with,
        gradient_accumulation_plugin=accumulation(config.gradient_accumulation_steps),
        project_config=ProjectConfiguration(**config.project_kwargs),
        **config.accelerator_kwargs,
    )
    if config.log_with is not None:
        flat = config.to_dict()
        knobs = {name: value for name, value in flat.items() if isinstance(value, int | float | str | bool)}
        told = knobs if config.log_with == "tensorboard" else {"trl_ppo_trainer_config": flat}
        made.init_trackers(config.tracker_project_name, config=told, init_kwargs=config.tracker_kwargs)
    return made


def accumulation(steps: int) -> GradientAccumulationPlugin:
    """Accumulate over `steps` minibatches, whether or not they come from a data loader's last batch."""
    return GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False)


def accumulate_over(accelerator: Any, steps: int) -> None:
    """Begin a new accumulation; accelerate's state is one for the whole process, and scripts make their own."""
    accelerator.gradient_state.plugin_kwargs = accumulation(steps).to_kwargs()
    accelerator.step = 0


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def used_columns(dataset: Dataset) -> Dataset:
    """The data set without the columns that neither the model nor the log reads."""
    return dataset.remove_columns([name for name in dataset.column_names if name not in KEPT_COLUMNS])


@dataclass
class Clock:
    """Seconds of the parts of a step, under TRL's names."""

    started: float = field(default_factory=time.perf_counter)
    marks: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def mark(self, part: str) -> None:
        """A part ends here."""
        now = time.perf_counter()
        self.marks[f"time/ppo/{part}"], self._last = now - self._last, now

    def total(self) -> float:
        return time.perf_counter() - self.started


def log(
    accelerator: Any, config: PPOConfig, stats: Mapping[str, Any], batch: Mapping[str, Any],
    rewards: Sequence[Tensor] | Tensor, columns: Sequence[str], step: int | None,
) -> None:  # fmt: skip
    """Hand the numbers of a step to the tracker, with the scores as `env/*`; texts go to wandb as a table."""
    scores = rewards if isinstance(rewards, Tensor) else torch.tensor([float(reward) for reward in rewards])
    scores = accelerator.gather(scores.detach().to(accelerator.device)).flatten().float().cpu()
    if not accelerator.is_main_process:
        return
    missing = [column for column in columns if column not in batch]
    logs = {name: value.float() if isinstance(value, Tensor) else value for name, value in stats.items()}
    if missing and config.log_with == "wandb":
        raise InputError(f"columns_to_log names {', '.join(missing)}, which the batch has not: {', '.join(batch)}")
    if "query" not in batch and "response" not in batch:
        warnings.warn("texts are not logged: the batch has no 'query' and no 'response'", stacklevel=3)
    elif config.log_with == "wandb":
        logs["game_log"] = _table([batch[column] for column in columns], scores, columns)
    logs |= {
        "env/reward_mean": float(scores.mean()),
        "env/reward_std": float(scores.std()) if len(scores) > 1 else float("nan"),
        "env/reward_dist": np.asarray(scores),
    }
    accelerator.log(logs, step=step)


def _table(columns: Sequence[Sequence[Any]], scores: Tensor, names: Sequence[str]) -> Any:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    rows = [list(row) for row in zip(*columns, scores.tolist(), strict=True)]
    return wandb.Table(columns=[*names, "reward"], rows=rows)
