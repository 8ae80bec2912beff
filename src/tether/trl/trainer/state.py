"""A trainer's whole state in one folder: a run that goes on from it is the run that never stopped.

    trainer_state.pt   trained weights, optimiser, scheduler, β, running moments, step, random states

`save_pretrained` writes a model for use; this writes what training needs. The file is written aside and renamed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tether.errors import RunError

if TYPE_CHECKING:
    from tether.trl.trainer.base import BaseTrainer

STATE_FILE = "trainer_state.pt"


def save(trainer: BaseTrainer, folder: str | Path) -> Path:
    """Write the state; returns the file. Raises RunError where it cannot be written."""
    target = Path(folder) / STATE_FILE
    aside = target.with_suffix(".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_state(trainer), aside)
        os.replace(aside, target)
    except OSError as error:
        raise RunError(f"the trainer's state could not be written to {folder}: {error}") from error
    return target


def load(trainer: BaseTrainer, folder: str | Path) -> None:
    """Go on from what `save` wrote, with the same model, optimiser and config. Raises RunError where they differ."""
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise RunError(f"{folder} holds no {STATE_FILE}; wanted a folder that trainer.save_state wrote")
    state = torch.load(file, map_location="cpu", weights_only=False)
    weights = _trained(trainer)
    if weights.keys() != state["weights"].keys():
        strange = sorted(weights.keys() ^ state["weights"].keys())
        raise RunError(
            f"the state is of another model: {strange[0]} and {len(strange) - 1} more stand in one of them only"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.lr_scheduler is not None and state["lr_scheduler"] is not None:
        trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    trainer.kl_ctl.value, trainer.current_step = state["kl_coef"], state["current_step"]
    trainer.running.restore(state["running"])
    _restore_random(state["random"])


def _state(trainer: BaseTrainer) -> dict[str, Any]:
    scheduler = trainer.lr_scheduler
    return {
        "weights": {name: weight.detach().cpu() for name, weight in _trained(trainer).items()},
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "kl_coef": float(trainer.kl_ctl.value),
        "running": trainer.running.state(),
        "current_step": trainer.current_step,
        "random": _random(),
    }


def _trained(trainer: BaseTrainer) -> dict[str, torch.nn.Parameter]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _random() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
