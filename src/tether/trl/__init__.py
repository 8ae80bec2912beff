"""Rung 3: the classic surface of TRL 0.11, `PPOTrainer.generate` and `.step`, on today's transformers and our formulas.

    from tether.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

Names, modules, arguments, shapes and statistics are TRL's, so that a script moves over by its import lines alone:
`trl.core`, `trl.extras`, `trl.models`, `trl.trainer` and `trl.import_utils` are here under the same names. The
mathematics is `tether.numerics`. What is mended and what is not here: `docs/trl.md`. Read next:
`trainer/ppo_trainer.py`.
"""

from __future__ import annotations

from tether.trl.core import LengthSampler, set_seed
from tether.trl.extras import BestOfNSampler
from tether.trl.import_utils import is_diffusers_available, is_liger_kernel_available
from tether.trl.missing import complain
from tether.trl.models import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from tether.trl.trainer import (
    AdaptiveKLController,
    FixedKLController,
    ModelConfig,
    PPOConfig,
    PPOTrainer,
    RunningMoments,
    TrainingWarning,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "FixedKLController",
    "LengthSampler",
    "ModelConfig",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RunningMoments",
    "TrainingWarning",
    "create_reference_model",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
    "is_diffusers_available",
    "is_liger_kernel_available",
    "set_seed",
]


def __getattr__(name: str) -> object:
    raise complain(name)
