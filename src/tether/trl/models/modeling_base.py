"""A causal LM and what is wrapped around it: loading, saving, adapters, the reward adapter of multi-adapter runs.

`from_pretrained` takes a folder, a name on the hub, a model or a PEFT model. Weights are read as float32 unless
`dtype=` or `torch_dtype=` says otherwise: at PPO's learning rates a bfloat16 weight does not move. Knows no trainer.
Read next: `modeling_value_head.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from tether.errors import InputError, ModelError
from tether.loading import require_there
from tether.trl.models.checkpoint_files import read_score_head, read_value_head

RENAMED = {"torch_dtype": "dtype", "use_auth_token": "token"}
"""Keywords of older transformers, and what they are called today."""
QUANTISED = ("load_in_8bit", "load_in_4bit")
KBIT = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")
"""Keywords that go to PEFT's `prepare_model_for_kbit_training`."""
HEAD_FILE = "pytorch_model.bin"
"""Where TRL keeps the value head beside PEFT adapters."""


class PreTrainedModelWrapper(nn.Module):
    """A Hugging Face model as `pretrained_model`, with modules of one's own beside it."""

    transformers_parent_class: ClassVar[Any] = AutoModelForCausalLM
    supported_args: ClassVar[tuple[str, ...]] = ()
    v_head: nn.Module

    def __init__(
        self,
        pretrained_model: Any,
        score_module: nn.Module | None = None,
        supports_rm_adapter: bool = False,
        rm_adapter_name: str | None = None,
        **kwargs: Any,  # noqa: ARG002 (read by subclasses)
    ) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        self.is_loaded_in_8bit = bool(getattr(pretrained_model, "is_loaded_in_8bit", False))
        self.is_loaded_in_4bit = bool(getattr(pretrained_model, "is_loaded_in_4bit", False))
        self.is_sequential_parallel = len(set((getattr(pretrained_model, "hf_device_map", None) or {}).values())) > 1
        self.supports_rm_adapter, self.rm_adapter_name = supports_rm_adapter, rm_adapter_name
        self.policy_adapter_name = "default"
        if score_module is not None:
            self.score = score_module

    # ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | nn.Module, *model_args: Any, **kwargs: Any
    ) -> PreTrainedModelWrapper:
        """The wrapped model; its value head is read from the checkpoint where there is one, else drawn at random.

        `peft_config` adds adapters to a plain model; a folder that holds adapters is loaded with its base model
        (`is_trainable=True` to go on training them). `reward_adapter`: folder or name of a reward model's adapters,
        called `reward_adapter_name`. `summary_dropout_prob`, `v_head_init_strategy` and `v_head_initializer_range` are
        the value head's. Everything else goes to transformers.

        Raises ValueError where an argument is of another kind, ModelError where nothing can be read.
        """
        peft_config = kwargs.pop("peft_config", None)
        adapter, name = kwargs.pop("reward_adapter", None), kwargs.pop("reward_adapter_name", "reward_adapter")
        own = {key: kwargs.pop(key) for key in cls.supported_args if key in kwargs}
        source = pretrained_model_name_or_path
        source = str(source) if isinstance(source, Path) else source
        cls._check(source, peft_config, adapter)
        model = cls._load(source, peft_config, model_args, kwargs) if isinstance(source, str) else source
        if peft_config is not None and not isinstance(model, PeftModel):
            model = _with_adapters(model, peft_config, kwargs)
        _check_adapters(model, adapter)
        extra = {} if adapter is None else {"supports_rm_adapter": True, "rm_adapter_name": name}
        if adapter is not None:
            own["score_module"] = _add_reward_adapter(model, adapter, name, kwargs.get("token"))
        wrapped = cls(model, **own, **extra)
        head = read_value_head(source, kwargs.get("token")) if isinstance(source, str) else None
        wrapped.post_init(head or {})
        return wrapped

    @classmethod
    def _load(cls, source: str, peft_config: object, model_args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        require_there(source)
        trainable = bool(options.pop("is_trainable", False))
        reading = _for_transformers({key: value for key, value in options.items() if key not in KBIT})
        adapters = find_adapter_config_file(source, token=reading.get("token"))
        if adapters is None:
            return cls.transformers_parent_class.from_pretrained(source, *model_args, **reading)
        if peft_config is not None:
            raise InputError(f"{source} holds PEFT adapters already; leave peft_config out, or merge them first")
        base = PeftConfig.from_pretrained(str(Path(adapters).parent)).base_model_name_or_path
        model = cls.transformers_parent_class.from_pretrained(base, *model_args, **reading)
        with quiet():
            return PeftModel.from_pretrained(model, source, is_trainable=trainable, token=reading.get("token"))

    @classmethod
    def _check(cls, source: object, peft_config: object, adapter: object) -> None:
        if not isinstance(source, str | PreTrainedModel | PeftModel):
            raise InputError(f"got a {type(source).__name__}; wanted a folder, a hub name, a model or a PEFT model")
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise InputError(f"peft_config is a {type(peft_config).__name__}; wanted a peft.PeftConfig, as LoraConfig")
        if adapter is not None and not isinstance(adapter, str | Path):
            raise InputError(f"reward_adapter is a {type(adapter).__name__}; wanted a folder or a name on the hub")

    def post_init(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the value head's weights, if there are any, with or without their prefix `v_head.`"""
        head = {name.removeprefix("v_head."): tensor for name, tensor in state_dict.items()}
        if head:
            self.v_head.load_state_dict(head, strict=False)
        device = getattr(self.pretrained_model, "device", None)
        if device is not None and torch.device(device).type != "meta":
            self.v_head.to(device)

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base model's weights under their own names and the value head's under `v_head.`; with PEFT the latter."""
        base = {} if self.is_peft_model else dict(self.pretrained_model.state_dict(*args, **kwargs))
        return base | {f"v_head.{name}": tensor for name, tensor in self.v_head.state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What `state_dict` gave; also what a plain module would have, its names begun by `pretrained_model.`"""
        base = {name.removeprefix("pretrained_model."): tensor for name, tensor in state_dict.items()}
        head = {name.removeprefix("v_head."): base.pop(name) for name in list(base) if name.startswith("v_head.")}
        score = {name.removeprefix("score."): base.pop(name) for name in list(base) if name.startswith("score.")}
        if score and self.supports_rm_adapter:
            self.score.load_state_dict(score, strict=strict)
        if base or not self.is_peft_model:
            self.pretrained_model.load_state_dict(base, strict=strict, assign=assign)
        return self.v_head.load_state_dict(head, strict=strict, assign=assign)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """A Hugging Face folder with the value head in it; with PEFT the adapters, and the head in a file beside."""
        kwargs.pop("safe_serialization", None)  # safetensors is the only format that transformers writes
        state = kwargs.pop("state_dict", None) or self.state_dict()
        if not self.is_peft_model:
            return self.pretrained_model.save_pretrained(save_directory, state_dict=state, **kwargs)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        heads = {name: tensor for name, tensor in state.items() if name.startswith("v_head.")}
        torch.save(heads, Path(save_directory) / HEAD_FILE)
        return self.pretrained_model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Put model and value head onto the hub."""
        from tether.trl.models.checkpoint_files import upload

        return upload(self.save_pretrained, repo_id, **kwargs)

    # ── what passes through ─────────────────────────────────────────────────────────────────────────────────────────
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the wrapped model."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:  # noqa: ARG002 (the trainer's is non-reentrant)
        """Let the trainer compute activations inside a layer again on the way back instead of keeping them."""
        model = self._base_model()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    def gradient_checkpointing_disable(self) -> None:
        model = self._base_model()
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()

    def enable_input_require_grads(self) -> None:
        self.pretrained_model.enable_input_require_grads()

    def _base_model(self) -> Any:
        return self.pretrained_model.get_base_model() if self.is_peft_model else self.pretrained_model

    # ── the reward adapter ──────────────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The reward adapter's scores at every token, [batch, tokens, labels]; the policy's adapter is back after it.

        Raises InputError where the model was loaded without `reward_adapter`.
        """
        if not self.supports_rm_adapter:
            raise InputError("the model has no reward adapter; pass reward_adapter= to from_pretrained")
        training = self.pretrained_model.training
        self.pretrained_model.set_adapter(self.rm_adapter_name, inference_mode=True)
        self.pretrained_model.eval()
        try:
            hidden = self.pretrained_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=True,
                return_dict=True,
                **kwargs,
            ).hidden_states[-1]
        finally:
            self.pretrained_model.set_adapter(self.policy_adapter_name)
            self.pretrained_model.train(training)
        scores: Tensor = self.score(hidden.to(self.score.weight.dtype))
        return scores


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT asks transformers by names that are deprecated there: no concern of the script's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _for_transformers(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords under today's names, weights in float32 unless another precision was asked for."""
    reading = {RENAMED.get(key, key): value for key, value in options.items() if value is not None}
    asked = {key: reading.pop(key) for key in QUANTISED if key in reading}
    if any(asked.values()):
        reading["quantization_config"] = BitsAndBytesConfig(**asked)
    reading.setdefault("dtype", torch.float32)
    return reading


def _with_adapters(model: Any, peft_config: PeftConfig, options: Mapping[str, Any]) -> Any:
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        preparing = {key: options[key] for key in KBIT if key in options}
        model = prepare_model_for_kbit_training(model, **preparing)
    with quiet():
        return get_peft_model(model, peft_config)


def _check_adapters(model: Any, reward_adapter: object) -> None:
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, PromptLearningConfig):
        raise InputError("prompt-learning adapters shift the positions that PPO reads; wanted LoRA or the like")
    if reward_adapter is not None and not isinstance(model, PeftModel):
        raise InputError("reward_adapter goes with a PEFT model; pass peft_config= as well")


def _add_reward_adapter(model: Any, source: str | Path, name: str, token: str | None) -> nn.Module:
    """Load the adapter, frozen, and its score head."""
    head = read_score_head(str(source), token)
    if head is None:
        raise ModelError(f"{source} holds no score head; wanted adapters of a sequence classifier that PEFT saved")
    with quiet():
        model.load_adapter(str(source), name, is_trainable=False)
    score = nn.Linear(head["weight"].shape[1], head["weight"].shape[0], bias="bias" in head, dtype=model.dtype)
    score.load_state_dict(head)
    return score.requires_grad_(False).to(model.device)
