"""What a trainer has beside its algorithm: reference, data loader, trackers, saved models and states.

Read next: `ppo_trainer.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.trl.core import PPODecorators
from tether.trl.models import PreTrainedModelWrapper, create_reference_model
from tether.trl.models.checkpoint_files import upload
from tether.trl.trainer import setup, state
from tether.trl.trainer.ppo_config import PPOConfig
from tether.trl.trainer.utils import AdaptiveKLController, FixedKLController, RunningMoments


class BaseTrainer:
    """The attributes that scripts read from a trainer, and what is kept of a run."""

    config: PPOConfig
    model: Any
    ref_model: Any
    tokenizer: PreTrainedTokenizerBase
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    dataloader: Any
    is_peft_model: bool
    current_device: torch.device
    current_step: int
    kl_ctl: AdaptiveKLController | FixedKLController
    running: RunningMoments
    highest_reward: float
    compare_step: int

    def _reference(self, ref_model: PreTrainedModelWrapper | None, shared: int | None) -> PreTrainedModelWrapper | None:
        if self.is_peft_model:
            if ref_model is not None:
                warnings.warn("ref_model is not used: with PEFT the reference is the model with its adapters off",
                              stacklevel=3)  # fmt: skip
            return None
        if ref_model is not None and shared is not None:
            warnings.warn("num_shared_layers is not used: a ref_model was given, and it shares no layer", stacklevel=3)
        return ref_model or create_reference_model(self.model, num_shared_layers=shared)

    def _prepare(self) -> None:
        prepare = self.accelerator.prepare
        self.model, self.optimizer = prepare(self.model, self.optimizer)
        self.dataloader = self.dataloader and prepare(self.dataloader)
        self.lr_scheduler = self.lr_scheduler and prepare(self.lr_scheduler)
        self.ref_model = self.ref_model and prepare(self.ref_model)
        PPODecorators.optimize_device_cache = self.config.optimize_device_cache

    def prepare_dataloader(
        self, dataset: torch.utils.data.Dataset | Dataset, data_collator: Callable[[list[Any]], Any] | None = None
    ) -> Any:
        """Shuffled batches of `batch_size`; the rest that fills none is dropped."""
        if isinstance(dataset, Dataset) and self.config.remove_unused_columns:
            dataset = setup.used_columns(dataset)
        return torch.utils.data.DataLoader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )

    # ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────
    def log_stats(
        self,
        stats: dict[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Hand the numbers, the scores and (to wandb) the texts to the tracker that `log_with` names."""
        self.current_step += 1
        step = self.current_step if self.config.log_with == "tensorboard" else None
        setup.log(self.accelerator, self.config, stats, batch, rewards, list(columns_to_log), step)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Model, value head and tokenizer as a Hugging Face folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    _save_pretrained = save_pretrained

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """The same folder on the hub; returns its address."""
        return upload(self.save_pretrained, repo_id, **kwargs)

    def _push_if_best(self, scores: Tensor) -> None:
        options = dict(self.config.push_to_hub_if_best_kwargs)
        if not options:
            return
        if self.compare_step % self.config.compare_steps == 0 and float(scores.mean()) > self.highest_reward:
            self.highest_reward = float(scores.mean())
            self.push_to_hub(**options)
        self.compare_step += 1

    def save_state(self, folder: str | Path) -> Path:
        """All that training needs to go on as if it had never stopped; returns the file."""
        return state.save(self, folder)

    def load_state(self, folder: str | Path) -> None:
        """Go on from what `save_state` wrote."""
        state.load(self, folder)

    def gather_stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Single numbers as means over all processes; arrays stay this process's."""
        means = {name: self.accelerator.reduce(value.to(self.current_device), "mean") for name, value in stats.items()
                 if isinstance(value, Tensor) and value.ndim == 0}  # fmt: skip
        return stats | means
