"""What TRL 0.11 exports and this surface leaves out, and what to use instead: said where the name is asked for."""

from __future__ import annotations

from tether.errors import MissingExtraError

_SFT = "use `tether sft` (docs/stages.md) or today's TRL, whose SFTTrainer lives on: pip install trl"
_REWARD = "use `tether reward` (docs/stages.md) or today's TRL, whose RewardTrainer lives on: pip install trl"
_OTHER = "it is no PPO; today's TRL has its successor: pip install trl"
_TEXT = "tools and turns belong to the script: generate, call the tool, and mask its tokens with response_masks"
_PPO_V2 = "use tether.train (docs/running.md), which takes the same models and trains to the end by itself"

INSTEAD: dict[str, str] = {
    **dict.fromkeys(("SFTTrainer", "SFTConfig", "SFTScriptArguments", "DataCollatorForCompletionOnlyLM"), _SFT),
    **dict.fromkeys(("RewardTrainer", "RewardConfig"), _REWARD),
    **dict.fromkeys(("TextEnvironment", "TextHistory"), _TEXT),
    **dict.fromkeys(("PPOv2Trainer", "PPOv2Config"), _PPO_V2),
    **dict.fromkeys(
        (
            "DPOTrainer", "DPOConfig", "DPOScriptArguments", "KTOTrainer", "KTOConfig", "ORPOTrainer", "ORPOConfig",
            "CPOTrainer", "CPOConfig", "BCOTrainer", "BCOConfig", "RLOOTrainer", "RLOOConfig", "GKDTrainer",
            "GKDConfig", "OnlineDPOTrainer", "OnlineDPOConfig", "XPOTrainer", "XPOConfig", "NashMDTrainer",
            "NashMDConfig", "DDPOTrainer", "DDPOConfig", "AlignPropTrainer", "AlignPropConfig", "IterativeSFTTrainer",
            "TrlParser", "setup_chat_format",
        ),
        _OTHER,
    ),
}  # fmt: skip


def complain(name: str) -> Exception:
    """The error for a name that is not here: with what to use instead, where TRL had it."""
    if name in INSTEAD:
        return MissingExtraError(f"tether.trl has no {name}: {INSTEAD[name]}")
    return AttributeError(f"module 'tether.trl' has no attribute {name!r}")
