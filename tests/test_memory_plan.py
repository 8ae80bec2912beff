"""Memory: the estimate counts what can be counted, and an error names the one knob to halve."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import MambaConfig, T5Config

from tether.config import RunSettings
from tether.errors import ModelError, OutOfMemory
from tether.knobs import read_settings
from tether.memory_plan import Shape, is_memory_error, memory_errors_explained, plan, remedy
from tether.models import load_policy
from tether.optimiser import Optimiser
from tether.recomputation import recompute_layers
from tiny_models import ARCHITECTURES, build, build_tokenizer, ragged_sequences


def settings(**knobs: object) -> RunSettings:
    return read_settings({}, list(knobs.items()))[0]


# ── the estimate ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shape_counts_what_the_model_holds(architecture: str) -> None:
    model = build(architecture)
    shape = Shape.of(model.config)
    assert shape.parameters == model.num_parameters()
    assert (shape.layers, shape.width, shape.vocab) == (3, 32, 97)
    (layers,) = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    exact = sum(parameter.numel() for parameter in layers[0].parameters())
    assert shape.layer_parameters == pytest.approx(exact, rel=0.25), "what stands beside the layers is spread over them"


def test_a_model_without_attention_has_a_shape_too() -> None:
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    shape = Shape.of(config)
    assert (shape.heads, shape.cache_width, shape.layers) == (0, 0, 2)
    assert plan(settings(mode="full"), shape, half=False).total > 0


def test_another_kind_of_model_has_none() -> None:
    with pytest.raises(ModelError, match="T5Config is no causal LM; wanted a decoder-only model"):
        Shape.of(T5Config(vocab_size=97, d_model=16, num_layers=2))


@pytest.mark.parametrize("mode", ["full", "top", "lora"])
def test_weights_reference_and_optimiser_are_counted_as_they_are(mode: str) -> None:
    given = settings(mode=mode, top_layers=2, lora_rank=4)
    policy = load_policy(build("llama"), build_tokenizer(), mode=mode, top_layers=2, lora_rank=4)
    optimiser = Optimiser({"policy": policy.trainable()["policy"]}, given.ppo.update)
    roles = plan(given, Shape.of(build("llama").config), half=False).roles
    trained = sum(parameter.numel() for group in optimiser.groups.values() for parameter in group)
    assert roles["optimiser"] == pytest.approx(3 * 4 * trained, rel=0.15)
    held = {p.data_ptr(): p.numel() for p in policy.mode.model.parameters()}
    assert roles["policy"] == pytest.approx(4 * sum(held.values()), rel=0.05)
    own = sum(tensor.numel() for tensor in policy.mode.reference() if tensor.data_ptr() not in held)
    assert roles["reference"] == pytest.approx(4 * own, rel=0.15)


def test_what_should_cost_less_costs_less() -> None:
    shape = Shape.of(build("llama").config)
    base = plan(settings(mode="full"), shape, half=False)
    assert plan(settings(mode="full", gradient_checkpointing=True), shape, half=False).total < base.total
    assert plan(settings(mode="full", tokens_per_micro_batch=512), shape, half=False).total < base.total
    assert plan(settings(mode="full", batch_size=32), shape, half=False).roles["KV cache"] < base.roles["KV cache"]
    assert plan(settings(mode="full"), shape, half=True).roles["policy"] == base.roles["policy"] / 2
    assert plan(settings(mode="full"), replace(shape, layers=6), half=False).total > base.total
    assert plan(settings(mode="full"), shape, half=False, reward=1000).roles["reward models"] == 4000


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(errno.ENOMEM, "no memory"),
     RuntimeError(ALLOCATOR)],
    ids=["cuda", "python", "system", "cpu"],
)  # fmt: skip
def test_every_kind_of_exhaustion_becomes_one_error_that_names_a_knob(error: Exception) -> None:
    told = r"ppo\.update\.tokens_per_micro_batch: 2048 \(now 4096\)"
    with pytest.raises(OutOfMemory, match=told) as caught, memory_errors_explained(settings()):
        raise error
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.ENOENT, "no file"), ValueError("x")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    assert not is_memory_error(error)
    with pytest.raises(type(error)) as caught, memory_errors_explained(settings()):
        raise error
    assert caught.value is error


def test_a_real_allocation_that_cannot_be_had_is_recognised() -> None:
    with pytest.raises(OutOfMemory, match="halve"), memory_errors_explained(settings()):
        torch.empty(1 << 60, dtype=torch.float32)


@pytest.mark.parametrize(
    ("place", "knobs", "told"),
    [
        ("update", {}, "ppo.update.tokens_per_micro_batch: 2048"),
        ("update", {"tokens_per_micro_batch": 16}, "model.gradient_checkpointing: true"),
        ("update", {"tokens_per_micro_batch": 16, "gradient_checkpointing": True}, "ppo.sampling.max_new_tokens: 16"),
        ("generation", {}, "ppo.batch_size: 32"),
        ("reward", {}, "ppo.batch_size: 32"),
        ("loading", {"mode": "full"}, "model.mode: top"),
        ("loading", {"mode": "top", "top_layers": 4}, "model.top_layers: 2"),
        ("loading", {"mode": "lora"}, "model.dtype: bfloat16"),
    ],
)
def test_each_part_of_a_run_has_its_knob(place: str, knobs: dict[str, object], told: str) -> None:
    line = remedy(settings(**knobs), place)
    assert told in line
    assert sum(line.count(path) for path in (": 2048", ": 32 ", ": 16 ", ": 2 ", ": true", ": top", ": bfloat16")) <= 1


# ── gradient checkpointing ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_is_computed_again_on_the_way_back_and_only_then(architecture: str) -> None:
    policy = load_policy(build(architecture), build_tokenizer(), mode="full")
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    model = policy.mode.model
    (layers,) = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    for layer in layers:
        next(child for child in layer.children() if any(True for _ in child.parameters())).register_forward_hook(
            counted
        )
    recompute_layers(model)
    with torch.no_grad():
        policy.evaluate(ragged_sequences(), 1.0)
    assert count == 3
    policy.evaluate(ragged_sequences(), 1.0).logprobs.sum().backward()
    assert count == 3 + 2 * 3
