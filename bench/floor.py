"""The least time that one PPO update can take: products at the measured rate, bytes at the measured bandwidth.

    floor = 2·weights·tokens of every pass / product rate  +  decoding  +  optimiser state / bandwidth

Pure arithmetic on the model's size and the workload; the rates are measured in the same run. Attention, norms, softmax
and the value head are left out (about 5 % at 68 tokens), so the floor is a little too low, never too high.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BYTES_PER_WEIGHT = 2  # bfloat16
OPTIMISER_BYTES = 28  # a weight and step: float32 master and two moments read and written, gradient read, bf16 written
PRODUCT_SIZE = 1024  # of the square matrices that the product rate is taken from
READ_BYTES = 2**28
TRIES = 5


@dataclass(frozen=True)
class Shape:
    """What the floor needs to know of a model."""

    body: int
    """Weights of all layers; embeddings cost no arithmetic."""
    head: int
    """Weights of the language-model head."""
    layers: int
    lora_per_rank: int
    """Adapter weights at rank 1."""


@dataclass(frozen=True)
class Work:
    """The workload, in tokens."""

    rows: int
    prompt: int
    response: int
    epochs: int
    minibatches: int

    @property
    def positions(self) -> int:
        """Positions of one pass over all rows."""
        return self.rows * (self.prompt + self.response)


@dataclass(frozen=True)
class Rates:
    """What the machine does, measured."""

    bf16_flops: float
    fp32_flops: float
    read_bytes: float
    """A second, from main memory or the accelerator's."""


@dataclass(frozen=True)
class Floor:
    """Seconds that cannot be saved, by what binds them."""

    products: float
    decoding: float
    optimiser: float

    @property
    def total(self) -> float:
        return self.products + self.decoding + self.optimiser


def floor_of(mode: str, shape: Shape, work: Work, rates: Rates, top_layers: int, lora_rank: int) -> Floor:
    """The floor of one update in this mode, seconds.

    Forward passes of the body: policy, reference and reward model once each, and the epochs; a backward pass costs two
    (one in `lora`, where no weight gradient of the body is taken). In `top` all of them run the top layers alone, since
    decoding has already gone through the trunk. The head runs on response positions; it trains in `full` only.
    """
    share = top_layers / shape.layers if mode == "top" else 1.0
    body_passes = 3 + work.epochs * (2 if mode == "lora" else 3)
    head_passes = 2 + work.epochs * (3 if mode == "full" else 2)
    body = 2 * shape.body * share * work.positions * body_passes
    head = 2 * shape.head * work.rows * work.response * head_passes
    flops = max(rates.bf16_flops, rates.fp32_flops)
    steps = work.epochs * work.minibatches
    return Floor(
        products=(body + head) / flops,
        decoding=_decoding(shape, work, flops, rates.read_bytes),
        optimiser=steps * _trained(mode, shape, share, lora_rank) * OPTIMISER_BYTES / rates.read_bytes,
    )


def _decoding(shape: Shape, work: Work, flops: float, read_bytes: float) -> float:
    """The prompts once, then one step a token after the first: all weights read, or multiplied, whichever is slower."""
    prefill = 2 * shape.body * work.rows * work.prompt / flops
    weights = shape.body + shape.head
    step = max(weights * BYTES_PER_WEIGHT / read_bytes, 2 * weights * work.rows / flops)
    return prefill + (work.response - 1) * step


def _trained(mode: str, shape: Shape, share: float, lora_rank: int) -> float:
    if mode == "lora":
        return shape.lora_per_rank * lora_rank
    return shape.body * share + (shape.head if mode == "full" else 0)


def shape_of(folder: str) -> Shape:
    """Counted on a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    body = sum(weight.numel() for weight in model.base_model.parameters()) - embeddings.weight.numel()
    linears = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    adapters = sum(linear.in_features + linear.out_features for linear in linears)
    return Shape(body, head.weight.numel(), model.config.get_text_config().num_hidden_layers, adapters)


def measure_rates(device: str) -> Rates:
    """Products of square matrices and reads of a large array; the best of a few tries each."""
    square = 2 * PRODUCT_SIZE**3 if device == "cpu" else 2 * (8 * PRODUCT_SIZE) ** 3
    size = PRODUCT_SIZE if device == "cpu" else 8 * PRODUCT_SIZE
    flops = {}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(size, size, device=device).to(dtype)
        flops[dtype] = square / _best(lambda matrix=matrix: matrix @ matrix, device)
    long = torch.ones(READ_BYTES // 4 * (1 if device == "cpu" else 8), device=device)
    return Rates(flops[torch.bfloat16], flops[torch.float32], long.numel() * 4 / _best(long.sum, device))


def _best(call: Callable[[], object], device: str) -> float:
    call()
    seconds = []
    for _ in range(TRIES):
        _settle(device)
        started = time.perf_counter()
        call()
        _settle(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
