"""tether: RLHF with PPO on the string of a KL penalty. Importing it loads nothing heavy.

import tether
run = tether.train(policy="my-sft-checkpoint", reward=my_function, prompts=my_prompts, beta=0.05, steps=100)
run.save_pretrained("my-ppo-checkpoint")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["TrainedRun", "__version__", "train"]

if TYPE_CHECKING:
    from tether.api import TrainedRun, train


def __getattr__(name: str) -> object:
    """`train` and `TrainedRun` are imported when they are first asked for: they bring torch."""
    if name in ("train", "TrainedRun"):
        return getattr(import_module("tether.api"), name)
    raise AttributeError(f"module 'tether' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
