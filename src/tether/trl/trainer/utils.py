"""What stays between calls of `step`: the controller of β and the running moments of the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.rewards import AdaptiveBeta


class AdaptiveKLController:
    """β ← β·(1 + clip(K/target − 1, ±0.2)·n/horizon), as `tether.rewards.AdaptiveBeta` has it."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        """Answer to a KL of `current` nats per response, over `n_steps` responses."""
        self.value = (
            AdaptiveBeta(float(self.value), self.target, int(self.horizon)).after(float(current), n_steps).value
        )


class FixedKLController:
    """β stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Nothing."""


@dataclass
class RunningMoments:
    """Mean and standard deviation of all scores so far, batches merged exactly (Chan et al. 1979)."""

    accelerator: Any = None
    mean: float = 0.0
    std: float = 1.0
    """With Bessel's correction; 1 until two scores were seen."""
    var: float = 1.0
    """Without it."""
    count: float = 0.0

    def update(self, xs: Tensor) -> tuple[float, float]:
        """Take a batch in; returns its own mean and standard deviation."""
        batch = self._gather(xs.detach().double())
        count, mean = batch.numel(), float(batch.mean())
        squares = float(((batch - mean) ** 2).sum())
        total, delta = self.count + count, mean - self.mean
        merged = (self.var * self.count if self.count else 0.0) + squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var, self.count = merged / total, total
        self.std = (merged / (total - 1)) ** 0.5 if total > 1 else 1.0
        return mean, (squares / (count - 1)) ** 0.5 if count > 1 else 1.0

    def _gather(self, xs: Tensor) -> Tensor:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return xs
        gathered: Tensor = self.accelerator.gather(xs)
        return gathered

    def scale(self, scores: Tensor, center: bool) -> Tensor:
        """score/std, or (score − mean)/std."""
        moved = scores - self.mean if center else scores
        return moved / (self.std + torch.finfo(scores.dtype).eps)

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "std": self.std, "var": self.var, "count": self.count}

    def restore(self, state: Mapping[str, float]) -> None:
        self.mean, self.std, self.var, self.count = (float(state[name]) for name in ("mean", "std", "var", "count"))

    def save_to_json(self, json_path: str) -> None:
        Path(json_path).write_text(json.dumps(self.state(), indent=2, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def load_from_json(cls, accelerator: Any, json_path: str) -> RunningMoments:
        return cls(accelerator=accelerator, **json.loads(Path(json_path).read_text("utf-8")))
