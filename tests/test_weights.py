"""The policy's weights as others read them. The oracle is a fresh Hugging Face model that they are copied into."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from tether.errors import ModelError
from tether.models import LanguagePolicy, load_policy
from tether.weights import all_weights, changed_weights, weights_version
from tiny_models import ARCHITECTURES, LAYERS, MORE_ARCHITECTURES, build, build_tokenizer, ragged_sequences, row_logits
from tolerances import ROUND_OFF, assert_close

MODES = ("full", "lora", "top")


def policy_of(model: PreTrainedModel, mode: str, **options: object) -> LanguagePolicy:
    settings = {"top_layers": 2, "lora_rank": 4, "dtype": "float32"} | options
    return load_policy(model, build_tokenizer(), mode=mode, **settings)


def stir(policy: LanguagePolicy) -> None:
    """Move every trained weight, as an update would."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable()["policy"]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def receive(base: PreTrainedModel, policy: LanguagePolicy) -> PreTrainedModel:
    """The checkpoint with the changed weights copied over it, each to the parameter of its name."""
    twin = copy.deepcopy(base)
    result = twin.load_state_dict(dict(changed_weights(policy)), strict=False)
    assert not result.unexpected_keys
    return twin


def assert_same_policy(model: PreTrainedModel, policy: LanguagePolicy) -> None:
    sequences = policy.prepare(ragged_sequences())
    with torch.no_grad():
        rows = [row_logits(model, sequences, row) for row in range(len(sequences))]
    assert_close(policy.logits_of(sequences), torch.cat(rows).double(), ROUND_OFF)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_the_checkpoint_with_the_changed_weights_is_the_policy(architecture: str, mode: str) -> None:
    base = build(architecture)
    policy = policy_of(base, mode)
    stir(policy)
    assert_same_policy(receive(base, policy), policy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_weights_make_the_policy_of_any_model_of_its_shape(architecture: str, mode: str) -> None:
    policy, stranger = policy_of(build(architecture), mode), build(architecture, seed=9)
    stir(policy)
    sent = dict(all_weights(policy))
    assert set(sent) == {name for name, _ in stranger.named_parameters()}
    stranger.load_state_dict(sent, strict=False)
    assert_same_policy(stranger, policy)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all", lora_alpha=3, use_rslora=True),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
        LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    ],
    ids=["dora", "all-biases", "a-norm-beside", "bias-in-the-adapter"],
)
def test_adapters_of_ones_own_are_folded_in_too(config: LoraConfig) -> None:
    base = build("qwen2")
    policy = policy_of(base, "lora", peft_config=config)
    stir(policy)
    assert_same_policy(receive(base, policy), policy)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_sent_that_cannot_change(mode: str) -> None:
    base = build("llama")
    policy = policy_of(base, mode)
    stir(policy)
    before, now = base.state_dict(), dict(changed_weights(policy))
    assert all(not torch.equal(before[name], tensor) for name, tensor in now.items())
    layer = 7  # the linear layers of one decoder layer of a Llama
    count = {"full": len(list(base.parameters())), "lora": LAYERS * layer, "top": 2 * (layer + 2) + 1}
    assert len(now) == count[mode]


def test_a_tied_weight_is_sent_once() -> None:
    names = [name for name, _ in changed_weights(policy_of(build("llama"), "full"))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_one_of_two_tied_weights_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"])
    with pytest.raises(ModelError, match="embed_tokens, whose weight is tied to lm_head"):
        list(changed_weights(policy_of(build("llama"), "lora", peft_config=config)))


@pytest.mark.parametrize("mode", MODES)
def test_reading_the_weights_leaves_the_policy_as_it_was(mode: str) -> None:
    policy = policy_of(build("gpt2"), mode)
    stir(policy)
    sequences = policy.prepare(ragged_sequences())
    before, version = policy.logits_of(sequences), weights_version(policy)
    kept = [parameter.clone() for parameter in policy.mode.model.parameters()]
    sent = dict(changed_weights(policy))
    assert not any(tensor.requires_grad for tensor in sent.values())
    assert weights_version(policy) == version
    assert torch.equal(policy.logits_of(sequences), before)
    assert all(torch.equal(a, b) for a, b in zip(kept, policy.mode.model.parameters(), strict=True))


def step(parameters: list[Tensor]) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()


@pytest.mark.parametrize("mode", MODES)
def test_the_version_moves_with_a_trained_weight_and_with_nothing_else(mode: str) -> None:
    policy = policy_of(build("llama"), mode)
    groups = policy.trainable()
    seen = [weights_version(policy)]
    policy.evaluate_reference(policy.prepare(ragged_sequences()), 1.0)
    step(list(groups["value"]))
    assert weights_version(policy) == seen[0]
    step(list(groups["policy"]))
    seen.append(weights_version(policy))
    with torch.no_grad():
        groups["policy"][-1].view(-1)[0] = 3.0  # one number of one weight
    seen.append(weights_version(policy))
    groups["policy"][0].detach().copy_(groups["policy"][0] * 2)  # as a checkpoint is restored
    seen.append(weights_version(policy))
    assert seen == sorted(set(seen))
