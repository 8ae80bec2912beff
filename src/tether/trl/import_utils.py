"""Questions that scripts ask of their surroundings, under TRL's names."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def is_xpu_available() -> bool:
    """Whether an Intel GPU can be used."""
    return bool(torch.xpu.is_available())


def is_npu_available() -> bool:
    """Whether an Ascend NPU can be used."""
    return find_spec("torch_npu") is not None


def is_peft_available() -> bool:
    return find_spec("peft") is not None


def is_diffusers_available() -> bool:
    return find_spec("diffusers") is not None


def is_unsloth_available() -> bool:
    return find_spec("unsloth") is not None


def is_bitsandbytes_available() -> bool:
    return find_spec("bitsandbytes") is not None


def is_wandb_available() -> bool:
    return find_spec("wandb") is not None


def is_rich_available() -> bool:
    return find_spec("rich") is not None


def is_liger_kernel_available() -> bool:
    return find_spec("liger_kernel") is not None
