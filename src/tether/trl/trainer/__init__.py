"""The trainer, its knobs and its controllers, under TRL's names."""

from tether.trl.trainer.model_config import (
    ModelConfig,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from tether.trl.trainer.ppo_config import PPOConfig
from tether.trl.trainer.ppo_trainer import PPOTrainer
from tether.trl.trainer.utils import AdaptiveKLController, FixedKLController, RunningMoments
from tether.trl.trainer.watching import TrainingWarning

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "ModelConfig",
    "PPOConfig",
    "PPOTrainer",
    "RunningMoments",
    "TrainingWarning",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
]
