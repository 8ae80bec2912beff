"""Which weights train and what the reference is: one class a mode, all of one form.

    FullMode   every weight trains; the reference is a frozen copy
    LoraMode   PEFT adapters train; the reference is the same weights with the adapters off
    TopMode    the top k layers and the final norm train; the reference is their frozen originals on the same trunk

Each gives the final hidden states of policy and reference for right-padded rows. Policy and reference run the same
steps in the same precision, so equal weights give equal bits. Knows no head arithmetic, loss or sampler.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tether.batch import Sequences
from tether.errors import ModelError
from tether.heads import OutputHead
from tether.loading import probe
from tether.trunk import SplitBackbone, decoder_layers, run_backbone

LORA_SEED = 0  # of the adapters' random halves, so that a run is a function of its own seed alone


@runtime_checkable
class Mode(Protocol):
    """What a mode is."""

    model: PreTrainedModel
    """The whole policy as it stands."""
    head: OutputHead
    reference_head: OutputHead
    trunk_end: nn.Module | None
    """The layer whose inputs are the frozen trunk's states; None where there is no such trunk."""

    def prepare(self, sequences: Sequences) -> Sequences:
        """Compute once what every later pass of this rollout shares."""

    def states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        """Final hidden states of the policy."""

    def reference_states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        """Final hidden states of the reference; no gradients."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train, each once."""

    def reference(self) -> list[Tensor]:
        """Every weight that the reference is computed from."""

    def layers(self) -> list[nn.Module]:
        """The policy's decoder layers, which processes may hold in shares."""

    def reference_layers(self) -> list[nn.Module]:
        """Those of the reference that are not the policy's."""

    def save(self, folder: Path, merged: bool) -> None:
        """Write the policy's weights; `merged` folds adapters into them."""


class FullMode:
    """All weights train. Also the form of any policy whose reference is a model of its own."""

    def __init__(self, model: PreTrainedModel, reference: PreTrainedModel | None = None) -> None:
        self.model = model
        self._reference = copy.deepcopy(model) if reference is None else reference
        self.head, self.reference_head = OutputHead.of(model), OutputHead.of(self._reference)
        self.trunk_end: nn.Module | None = None
        model.requires_grad_(True)

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        return run_backbone(self.model.base_model, sequences.ids.to(self.model.device))

    @torch.no_grad()
    def reference_states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        return run_backbone(self._reference.base_model, sequences.ids.to(self.model.device))

    def trained(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def reference(self) -> list[Tensor]:
        return list(self._reference.parameters())

    def layers(self) -> list[nn.Module]:
        return layers_of(self.model)

    def reference_layers(self) -> list[nn.Module]:
        return layers_of(self._reference)

    def save(self, folder: Path, merged: bool) -> None:  # noqa: ARG002
        self.model.save_pretrained(folder)


class LoraMode:
    """Adapters train; the model is changed in place to carry them."""

    def __init__(self, model: PreTrainedModel, rank: int, config: object | None = None) -> None:
        """`config` is a PEFT config of one's own; by default rank-`rank` LoRA on all linear layers but the head."""
        from peft import PeftModel, PromptLearningConfig, get_peft_model

        if isinstance(config, PromptLearningConfig):
            raise ModelError(
                f"peft_config is a {type(config).__name__}; wanted adapters inside the model, as LoraConfig"
            )
        self.backbone = model.base_model
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers by an old name
            if config is None:  # PEFT writes patterns for experts itself, and misses them where none is a linear layer
                warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
            torch.manual_seed(LORA_SEED)
            try:
                self.adapters: PeftModel = get_peft_model(
                    model, config or default_lora(model, rank), autocast_adapter_dtype=False
                )
            except ValueError as fault:
                raise ModelError(f"PEFT cannot adapt {type(model).__name__}: {fault}; pass peft_config=") from fault
        self.adapters.eval()
        self.model = model
        self.head = self.reference_head = OutputHead.of(model)
        self.trunk_end: nn.Module | None = None

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        return run_backbone(self.backbone, sequences.ids.to(self.model.device))

    @torch.no_grad()
    def reference_states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        with self.adapters.disable_adapter():
            return run_backbone(self.backbone, sequences.ids.to(self.model.device))

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def reference(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if not parameter.requires_grad]

    def layers(self) -> list[nn.Module]:
        return layers_of(self.model)

    def reference_layers(self) -> list[nn.Module]:
        return []

    def save(self, folder: Path, merged: bool) -> None:
        if merged:
            copy.deepcopy(self.adapters).merge_and_unload().save_pretrained(folder)
            return
        for config in self.adapters.peft_config.values():  # who loads them stands in another folder
            base = config.base_model_name_or_path
            config.base_model_name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base
        self.adapters.save_pretrained(folder)


class TopMode:
    """The top k layers train on a trunk whose states are computed once a rollout."""

    def __init__(self, model: PreTrainedModel, top_layers: int) -> None:
        count = model.config.get_text_config().num_hidden_layers
        if not 1 <= top_layers <= count:
            raise ModelError(f"top_layers is {top_layers} and the model has {count} layers; wanted 1 … {count}")
        self.model = model
        self.head = self.reference_head = OutputHead.of(model)
        layers = decoder_layers(model.base_model, count)
        self._split = SplitBackbone(model.base_model, layers, top_layers, probe(model))
        for module in self._split.trained:
            module.requires_grad_(True)
        self.trunk_end: nn.Module | None = self._split.first_trained

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences.with_states(self._split.states(sequences.ids.to(self.model.device)))

    def states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        ids, states = self._inputs(sequences)
        return self._split.top(ids, states)

    @torch.no_grad()
    def reference_states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        ids, states = self._inputs(sequences)
        return self._split.frozen_top(ids, states)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for module in self._split.trained for parameter in module.parameters()]

    def reference(self) -> list[Tensor]:
        originals = [parameter for module in self._split.originals for parameter in module.parameters()]
        return originals + [parameter for parameter in self.model.parameters() if not parameter.requires_grad]

    def layers(self) -> list[nn.Module]:
        return layers_of(self.model)

    def reference_layers(self) -> list[nn.Module]:
        return self._split.frozen_layers

    def save(self, folder: Path, merged: bool) -> None:  # noqa: ARG002
        self.model.save_pretrained(folder)

    def _inputs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        ids = sequences.ids.to(self.model.device)
        return ids, self._split.states(ids) if sequences.states is None else sequences.states


class OtherReference:
    """A mode whose reference is a model of its own instead: another checkpoint than the one training starts from."""

    def __init__(self, mode: LoraMode | TopMode, reference: PreTrainedModel) -> None:
        self._mode, self._reference = mode, reference
        self.model, self.head, self.reference_head = mode.model, mode.head, OutputHead.of(reference)
        self.prepare, self.states, self.trained, self.save = mode.prepare, mode.states, mode.trained, mode.save
        self.trunk_end: nn.Module | None = mode.trunk_end

    @torch.no_grad()
    def reference_states(self, sequences: Sequences) -> Float[Tensor, "batch total dim"]:
        return run_backbone(self._reference.base_model, sequences.ids.to(self.model.device))

    def reference(self) -> list[Tensor]:
        return list(self._reference.parameters())

    def layers(self) -> list[nn.Module]:
        return self._mode.layers()

    def reference_layers(self) -> list[nn.Module]:
        return layers_of(self._reference)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """A model's decoder layers, in order."""
    name = decoder_layers(model.base_model, model.config.get_text_config().num_hidden_layers)
    return list(model.base_model.get_submodule(name).children())


def default_lora(model: PreTrainedModel, rank: int) -> object:
    """LoRA of this rank on every linear layer but the head, α = 2·rank, no dropout."""
    from peft import LoraConfig

    if rank < 1:
        raise ModelError(f"lora_rank is {rank}; wanted 1 or more")
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 stores W as [in, out]
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )  # fmt: skip
