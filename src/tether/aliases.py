"""The names that TRL, OpenRLHF, verl and torchtune give to the knobs, in one table.

`TRANSLATED`: names that mean the same here, number for number. `REFUSED`: names whose meaning differs, with what to
write instead; they are never guessed. The command line, YAML files, `tether.train` and `docs/moving.md` read this
table. Knows nothing of how a configuration is read: that is `knobs.py`.

Read off TRL 0.11.4 (`trl/trainer/ppo_config.py`) and 1.12.0 (`trl/experimental/ppo/ppo_config.py`), OpenRLHF
(`openrlhf/cli/train_ppo_ray.py`), verl (`verl/trainer/config/ppo_trainer.yaml`) and torchtune
(`recipes/configs/mistral/7B_full_ppo_low_memory.yaml`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Library = Literal["TRL", "OpenRLHF", "verl", "torchtune"]
LIBRARIES: tuple[Library, ...] = ("TRL", "OpenRLHF", "verl", "torchtune")


@dataclass(frozen=True)
class Translated:
    """Another library's name of a knob: the same meaning, the same unit."""

    name: str
    path: str
    """The knob here."""
    libraries: tuple[Library, ...]
    note: str = ""
    """What to know beside the name."""


@dataclass(frozen=True)
class Refused:
    """A name that means something else than any knob here."""

    name: str
    libraries: tuple[Library, ...]
    instead: str
    """Why it is not taken over, and what to write."""


_BETA, _UPDATE, _SAMPLING = "ppo.reward.beta", "ppo.update", "ppo.sampling"

TRANSLATED = (
    Translated("kl_coef", _BETA, ("TRL", "verl")),
    Translated("init_kl_coef", _BETA, ("TRL", "OpenRLHF")),
    Translated("kl_coeff", _BETA, ("torchtune",)),
    Translated(
        "kl_loss_coef",
        _BETA,
        ("verl",),
        "verl adds the KL to the loss, here it is in the reward: the same price of a nat; it enters once",
    ),
    Translated("target", "ppo.reward.target_kl", ("TRL",), "nats per response in both"),
    Translated("reward_penalty", "ppo.reward.missing_eos_score", ("torchtune",), "with missing_eos: replace"),
    Translated("lambd", "ppo.advantage.lam", ("OpenRLHF",)),
    Translated("lmbda", "ppo.advantage.lam", ("torchtune",)),
    Translated("cliprange", f"{_UPDATE}.clip_range", ("TRL",)),
    Translated("eps_clip", f"{_UPDATE}.clip_range", ("OpenRLHF",)),
    Translated("clip_ratio", f"{_UPDATE}.clip_range", ("verl",)),
    Translated("epsilon", f"{_UPDATE}.clip_range", ("torchtune",)),
    Translated("cliprange_value", f"{_UPDATE}.value_clip_range", ("TRL", "verl")),
    Translated("value_clip", f"{_UPDATE}.value_clip_range", ("OpenRLHF",)),
    Translated("vf_coef", f"{_UPDATE}.value_coef", ("TRL",), "both losses carry the ½"),
    Translated("value_coeff", f"{_UPDATE}.value_coef", ("torchtune",)),
    Translated("num_ppo_epochs", f"{_UPDATE}.epochs", ("TRL",)),
    Translated("ppo_epochs", f"{_UPDATE}.epochs", ("TRL", "verl", "torchtune")),
    Translated("max_epochs", f"{_UPDATE}.epochs", ("OpenRLHF",)),
    Translated("num_mini_batches", f"{_UPDATE}.minibatches", ("TRL",)),
    Translated("lr", f"{_UPDATE}.learning_rate", ("verl", "torchtune")),
    Translated("actor_learning_rate", f"{_UPDATE}.learning_rate", ("OpenRLHF",)),
    Translated("critic_learning_rate", f"{_UPDATE}.value_learning_rate", ("OpenRLHF",)),
    Translated("grad_clip", f"{_UPDATE}.max_grad_norm", ("verl",)),
    Translated("max_norm", f"{_UPDATE}.max_grad_norm", ("OpenRLHF",)),
    Translated("critic_warmup", f"{_UPDATE}.value_warmup", ("verl",)),
    Translated("freezing_actor_steps", f"{_UPDATE}.value_warmup", ("OpenRLHF",), "-1 there is 0 here"),
    Translated("ppo_max_token_len_per_gpu", f"{_UPDATE}.tokens_per_micro_batch", ("verl",)),
    Translated("train_max_tokens_per_gpu", f"{_UPDATE}.tokens_per_micro_batch", ("OpenRLHF",)),
    Translated("response_length", f"{_SAMPLING}.max_new_tokens", ("TRL",)),
    Translated("generate_max_len", f"{_SAMPLING}.max_new_tokens", ("OpenRLHF",)),
    Translated("max_response_length", f"{_SAMPLING}.max_new_tokens", ("verl",)),
    Translated("max_generated_tokens", f"{_SAMPLING}.max_new_tokens", ("torchtune",)),
    Translated("n_samples_per_prompt", f"{_SAMPLING}.samples_per_prompt", ("OpenRLHF",)),
    Translated("num_total_batches", "ppo.steps", ("TRL",)),
    Translated("total_training_steps", "ppo.steps", ("verl",)),
    Translated("test_freq", "evaluation.every", ("verl",)),
    Translated("eval_steps", "evaluation.every", ("TRL", "OpenRLHF")),
    Translated("save_steps", "checkpoint.every", ("TRL", "OpenRLHF")),
    Translated("save_freq", "checkpoint.every", ("verl",)),
    Translated("max_ckpt_num", "checkpoint.keep", ("OpenRLHF",)),
    Translated("save_total_limit", "checkpoint.keep", ("TRL",)),
    Translated("num_processes", "runtime.processes", ("TRL",), "as in accelerate launch"),
    Translated("nproc_per_node", "runtime.processes", ("torchtune",)),
    Translated("sft_model_path", "model.source", ("TRL",)),
    Translated("model_name_or_path", "model.source", ("TRL",)),
    Translated("pretrain", "model.source", ("OpenRLHF",)),
    Translated("reward_model_path", "reward.source", ("TRL",)),
    Translated("reward_pretrain", "reward.source", ("OpenRLHF",)),
    Translated("remote_rm_url", "reward.source", ("OpenRLHF",)),
    Translated("dataset_name", "data.prompts", ("TRL",)),
    Translated("prompt_data", "data.prompts", ("OpenRLHF",)),
    Translated("train_files", "data.prompts", ("verl",)),
    Translated("eval_dataset", "data.heldout", ("OpenRLHF",)),
    Translated("val_files", "data.heldout", ("verl",)),
    Translated("prompt_split", "data.split", ("OpenRLHF",)),
    Translated("lora_r", "model.lora_rank", ("TRL",), "with model.mode: lora"),
    Translated("enable_gradient_checkpointing", "model.gradient_checkpointing", ("verl",)),
    Translated("enable_activation_checkpointing", "model.gradient_checkpointing", ("torchtune",)),
    Translated("log_with", "report_to", ("TRL",)),
)

_ONE_KL = "the KL enters once, in the reward, as k1: leave it out"
_COUNT = "it is a size there; here `ppo.update.minibatches` is a count: write batch_size divided by it"
_MEMORY = (
    "it sets memory there and may move results; here memory is `ppo.update.tokens_per_micro_batch`, in tokens, and "
    "results are equal at any value"
)
_PURE = "sampling is pure, or the ratio would be of another policy than the one that sampled: leave it out"
_EPISODES = "it counts responses there; here `ppo.steps` counts updates: write it divided by batch_size"
_PROMPTS = "it counts prompts there; here `ppo.batch_size` counts responses: write prompts × samples_per_prompt"

REFUSED = (
    Refused(
        "kl_estimator",
        ("TRL", "OpenRLHF"),
        f"k3 in the reward is no tether and k1 as a loss has no gradient; {_ONE_KL}",
    ),
    Refused("kl_penalty", ("TRL", "verl"), f"`abs`, `mse` and k3 are no tether; {_ONE_KL}"),
    Refused("kl_loss_type", ("verl",), _ONE_KL),
    Refused("use_kl_loss", ("OpenRLHF", "verl"), _ONE_KL),
    Refused("use_kl_in_reward", ("verl",), f"it always is; {_ONE_KL}"),
    Refused("kl_ctrl", ("verl",), "write `ppo.reward.beta` and `ppo.reward.controller: fixed | adaptive | budget`"),
    Refused("adap_kl_ctrl", ("TRL",), "write `ppo.reward.controller: adaptive` or `fixed`"),
    Refused(
        "kl_target",
        ("OpenRLHF",),
        "it is nats per token there; `ppo.reward.target_kl` is nats per response: multiply by the mean length",
    ),
    Refused("kl_horizon", ("OpenRLHF",), "it belongs to a target in nats per token; see `ppo.reward.horizon`"),
    Refused(
        "whiten_rewards",
        ("TRL", "torchtune"),
        "in TRL the variance has Bessel's correction and the mask one token more, here neither: if it is wanted, write "
        "`ppo.reward.whiten: true`",
    ),
    Refused("mini_batch_size", ("TRL",), _COUNT),
    Refused("ppo_mini_batch_size", ("verl",), _COUNT),
    Refused("ppo_batch_size", ("torchtune",), _COUNT),
    Refused("train_batch_size", ("OpenRLHF", "verl"), f"in OpenRLHF {_COUNT}; in verl {_PROMPTS}"),
    Refused("rollout_batch_size", ("OpenRLHF",), _PROMPTS),
    Refused("per_device_train_batch_size", ("TRL",), _MEMORY),
    Refused("gradient_accumulation_steps", ("TRL", "torchtune"), _MEMORY),
    Refused("micro_train_batch_size", ("OpenRLHF",), _MEMORY),
    Refused("ppo_micro_batch_size_per_gpu", ("verl",), _MEMORY),
    Refused("local_rollout_forward_batch_size", ("TRL",), _MEMORY),
    Refused("forward_batch_size", ("TRL", "torchtune"), _MEMORY),
    Refused("total_episodes", ("TRL",), _EPISODES),
    Refused("num_steps", ("torchtune",), _EPISODES),
    Refused("num_train_epochs", ("TRL",), "write `ppo.steps`: passes over the data × prompts × samples / batch_size"),
    Refused("num_episodes", ("OpenRLHF",), "it counts passes over the data there: write `ppo.steps` in updates"),
    Refused("total_epochs", ("verl",), "it counts passes over the data there: write `ppo.steps` in updates"),
    Refused(
        "missing_eos_penalty",
        ("TRL",),
        "it is subtracted there: write `ppo.reward.missing_eos: subtract` and `missing_eos_score` = its size",
    ),
    Refused("penalise_no_eos", ("torchtune",), "write `ppo.reward.missing_eos: replace` (true) or `keep` (false)"),
    Refused("early_stopping", ("TRL",), "write `ppo.update.early_stop_kl`, k3 per token; null = never"),
    Refused("entropy_coeff", ("verl",), "there is no entropy bonus: the string keeps entropy up; raise beta"),
    Refused("entropy_loss_coef", ("OpenRLHF",), "there is no entropy bonus: the string keeps entropy up; raise beta"),
    Refused("top_k", ("verl", "torchtune"), _PURE),
    Refused("top_p", ("OpenRLHF", "verl"), _PURE),
    Refused("min_response_length", ("torchtune",), _PURE),
    Refused("normalize_reward", ("OpenRLHF",), "scale the reward once, before the run: beta is a price in its unit"),
    Refused("use_score_scaling", ("TRL",), "scale the reward once, before the run: beta is a price in its unit"),
    Refused("reward_clip_range", ("OpenRLHF",), "clip inside the reward function, where it can be seen"),
    Refused("score_clip", ("TRL",), "clip inside the reward function, where it can be seen"),
    Refused("bf16", ("TRL", "OpenRLHF"), "write `model.dtype: bfloat16`"),
    Refused("torch_dtype", ("TRL",), "write `model.dtype: auto | float32 | bfloat16`"),
    Refused("apply_chat_template", ("OpenRLHF",), "the tokenizer's template is used where it has one"),
    Refused("adv_estimator", ("verl",), "GAE with a value head is the only one"),
    Refused("advantage_estimator", ("OpenRLHF",), "GAE with a value head is the only one"),
)

FRIENDS: dict[str, Translated] = {alias.name: alias for alias in TRANSLATED}
FALSE_FRIENDS: dict[str, Refused] = {alias.name: alias for alias in REFUSED}
