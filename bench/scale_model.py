"""Seconds of one PPO update by room, on one GPU or a thousand: arithmetic on shapes, rates and links.

    python bench/scale_model.py                      tables for 1 B, 8 B and 70 B parameters on 1 … 1,024 GPUs
    python bench/scale_model.py --model 8B --gpus 64 --mode lora --json
    python bench/scale_model.py --measure            this machine's constants → bench/results/scale-rates.json
    python bench/scale_model.py --check              small runs here, predicted and measured
    python bench/scale_model.py --write              docs/runtimes/scale.md's tables and plot anew

A room takes its operations over the rate, or its bytes over the bandwidth, whichever is longer; rooms follow one
another, except where a layout overlaps them. Nothing is simulated and no queue is modelled: the numbers are right to a
factor, and the order of the layouts is what they are for. Read next: `scale_layouts.py`, `scale_rates.py`,
`scale_page.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Literal

Mode = Literal["full", "lora", "top"]

HALF, FLOAT = 2, 4
"""Bytes of a bfloat16 and of a float32 number."""
ADAM_BYTES = 12
"""Kept for a trained weight: float32 master and two moments."""
STEP_BYTES = 28
"""Moved for a trained weight and step: master and moments read and written, gradient read, bfloat16 written."""
STATE_BYTES = 14
"""Of a trained weight in a checkpoint."""
ROLLOUT_NUMBERS = 8
"""float32 numbers a response token that the processes tell each other: log-probabilities, values, entropy, …"""
KEPT_NUMBERS = 34
"""Numbers of the hidden width that a layer keeps for a token until its backward pass."""


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs to know of a decoder."""

    name: str
    parameters: float
    layers: int
    width: int
    cache_width: int
    """Key and value numbers a token and layer."""
    vocab: int
    tied: bool = False

    @property
    def head(self) -> float:
        return float(self.vocab * self.width)

    @property
    def body(self) -> float:
        """Weights of the layers; embeddings cost no arithmetic."""
        return self.parameters - self.head * (1 if self.tied else 2)


@dataclass(frozen=True)
class Work:
    """One update."""

    rows: int = 1024
    """Responses."""
    prompt: int = 512
    response: int = 512
    epochs: int = 4
    minibatches: int = 4
    mode: Mode = "full"
    top_share: float = 0.25
    """Of the layers, that mode `top` trains."""
    lora_share: float = 0.01
    """Adapter weights in units of the model's."""
    reward_share: float = 1.0
    """The reward model's size in units of the policy's; 0 = a function."""
    tokens_per_pass: int = 16384
    """Of a micro-batch on one GPU."""
    checkpoint_every: int = 50
    recompute: bool = True
    """Layers are computed again on the way back, so that a token keeps one hidden state a layer."""

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class Device:
    """One GPU, or one process's share of a CPU, with its links. Rates are those that are reached."""

    name: str
    train_flops: float
    forward_flops: float
    memory_rate: float
    memory: float
    near: float
    """Bytes a second to a neighbour in the same machine."""
    far: float
    """Bytes a second to another machine, of each device's own."""
    per_node: int
    latency: float
    """Seconds of one hop of a collective."""
    dispatch: float
    """Seconds a layer and decoded token that the own sampler needs beside the arithmetic."""
    engine_dispatch: float
    """The same of vLLM, with CUDA graphs."""
    disk: float
    """Bytes a second that a machine writes."""
    objects: float
    """Bytes a second through Ray's object store."""
    files: float
    """Bytes a second that weights are laid down at as safetensors, or read from there: in shared memory, or in a folder
    that several machines see."""


H100 = Device(
    name="H100 SXM",
    train_flops=0.40 * 989e12, forward_flops=0.50 * 989e12, memory_rate=0.60 * 3.35e12, memory=80e9,
    near=0.80 * 450e9, far=0.80 * 50e9, per_node=8, latency=20e-6, dispatch=200e-6, engine_dispatch=10e-6,
    disk=2e9, objects=2e9, files=2e9,
)  # fmt: skip
"""NVIDIA's data sheet times shares that are reached in practice: 40 % of the dense products in training, 50 % forward,
60 % of the memory bandwidth in decoding, 80 % of NVLink's 450 GB/s a direction and of InfiniBand's 400 Gb/s. Shares,
latency, dispatch, and the rates of disk, objects and files are assumptions."""

MODELS = {
    "1B": Model("1B", 1.24e9, 16, 2048, 1024, 128256, tied=True),
    "8B": Model("8B", 8.03e9, 32, 4096, 2048, 128256),
    "70B": Model("70B", 70.6e9, 80, 8192, 2048, 128256),
}
"""The shapes of Llama 3.2 1B, Llama 3.1 8B and 70B."""


# ── operations and bytes ────────────────────────────────────────────────────────────────────────────────────────────
def forward_operations(model: Model, rows: float, length: float, headed: float) -> float:
    """Of one pass: 2 a weight and token, and 4·width for each pair of tokens that attention joins, half of all pairs.

    The head runs on `headed` positions a row.
    """
    products = 2.0 * model.body * rows * length + 2.0 * model.head * rows * headed
    return products + 2.0 * model.layers * model.width * rows * length**2


def training_operations(model: Model, work: Work, rows: float) -> float:
    """Of one epoch over so many rows: forward once, backward twice; once where the body's weights stand still (`lora`);
    only the top layers in `top`, whose trunk is remembered. Recomputation is one forward more.
    """
    share = work.top_share if work.mode == "top" else 1.0
    body = share * forward_operations(model, rows, work.length, 0)
    head = 2.0 * model.head * rows * work.response
    again = 1.0 if work.recompute else 0.0
    return body * ((2.0 if work.mode == "lora" else 3.0) + again) + head * (3.0 if work.mode == "full" else 2.0)


def measuring_operations(model: Model, work: Work, rows: float) -> float:
    """Of the passes that evaluate policy and reference: two, but for the trunk that `top` shares between them."""
    shared = 1.0 - work.top_share if work.mode == "top" else 0.0
    body = forward_operations(model, rows, work.length, 0)
    return body * (2.0 - shared) + 2.0 * 2.0 * model.head * rows * work.response


def scoring_operations(model: Model, work: Work, rows: float) -> float:
    """Of the reward model, which has no head over the vocabulary."""
    return work.reward_share * forward_operations(model, rows, work.length, 0)


def changed(model: Model, work: Work) -> float:
    """Weights that another engine must be sent: adapters are folded into the layers that they adapt."""
    if work.mode == "lora":
        return model.body
    return trained(model, work)


def trained(model: Model, work: Work) -> float:
    """Weights that the optimiser moves."""
    if work.mode == "lora":
        return work.lora_share * model.parameters
    return model.parameters if work.mode == "full" else work.top_share * model.body


def cache_bytes(model: Model, tokens: float) -> float:
    """Keys and values of one row with so many tokens, in bfloat16."""
    return float(HALF * model.layers * model.cache_width * tokens)


def activation_bytes(model: Model, work: Work) -> float:
    """Of one micro-batch until its backward pass, and its logits in pieces of 2,048 positions."""
    layers = model.layers * (work.top_share if work.mode == "top" else 1.0)
    kept = HALF * model.width * (layers + KEPT_NUMBERS if work.recompute else layers * KEPT_NUMBERS)
    return work.tokens_per_pass * kept + 3.0 * FLOAT * 2048 * model.vocab


def rollout_bytes(work: Work) -> float:
    """Of all rollouts on their way between processes: token ids and the numbers of the response tokens."""
    return float(work.rows * (8 * work.length + FLOAT * ROLLOUT_NUMBERS * work.response))


# ── links ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def link(device: Device, devices: int) -> float:
    """Bytes a second that each device passes on in a ring; between machines all their links carry one."""
    return device.near if devices <= device.per_node else min(device.near, device.far * device.per_node)


def gather_seconds(device: Device, devices: int, size: float, calls: float = 1.0) -> float:
    """Pieces of `size` bytes put together on every device, or sums of it cut into pieces: (n − 1)/n of it each. It goes
    in so many calls, one a layer, and each waits for log₂ n hops.
    """
    if devices <= 1:
        return 0.0
    hops = calls * math.ceil(math.log2(devices))
    return (devices - 1) / devices * size / link(device, devices) + device.latency * hops


def sum_seconds(device: Device, devices: int, size: float) -> float:
    """An all-reduce: sums in pieces, then the pieces put together."""
    return 2.0 * gather_seconds(device, devices, size)


# ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Writer:
    """What writes responses: so many devices that share each copy of the weights, and how it is driven."""

    parallel: int = 1
    graphs: bool = False
    """vLLM's CUDA graphs, against a Python loop over layers."""


def decode_step_seconds(model: Model, device: Device, rows: float, context: float, writer: Writer) -> float:
    """One token for so many rows: weights and caches read, or products made, whichever takes longer; then dispatch, and
    two sums a layer where several devices share the weights.
    """
    weights = model.body + model.head
    reading = (HALF * weights + rows * cache_bytes(model, context)) / device.memory_rate
    products = 2.0 * weights * rows / device.forward_flops
    step = max(reading, products) / writer.parallel
    step += model.layers * (device.engine_dispatch if writer.graphs else device.dispatch)
    if writer.parallel > 1:
        step += 2.0 * model.layers * sum_seconds(device, writer.parallel, HALF * rows * model.width)
    return step


def generate_seconds(
    model: Model, work: Work, device: Device, rows: float, room: float, writer: Writer | None = None
) -> float:
    """Prompts at once, then token by token, in as many waves as the caches need in `room` bytes a device."""
    writer = writer or Writer()
    at_once = math.floor(room * writer.parallel / cache_bytes(model, work.length))
    if at_once < 1:
        return math.inf
    waves = math.ceil(rows / at_once)
    prefill = forward_operations(model, rows, work.prompt, 0) / device.forward_flops / writer.parallel
    context = work.prompt + work.response / 2
    return prefill + waves * work.response * decode_step_seconds(model, device, rows / waves, context, writer)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="by default all")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--mode", choices=["full", "lora", "top"], default="full")
    parser.add_argument("--rows", type=int, default=Work.rows, help="responses an update")
    parser.add_argument("--prompt", type=int, default=Work.prompt)
    parser.add_argument("--response", type=int, default=Work.response)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", action="store_true", help="this machine's constants")
    parser.add_argument("--check", action="store_true", help="small runs here, predicted and measured")
    parser.add_argument("--write", action="store_true", help="docs/runtimes/scale.md and its plot")
    return parser.parse_args(arguments)


def main() -> None:
    from scale_layouts import compare
    from scale_page import tables, write
    from scale_rates import check, measure

    options = parse()
    if options.measure or options.check:
        (measure if options.measure else check)()
        return
    if options.write:
        write()
        return
    work = Work(options.rows, options.prompt, options.response, mode=options.mode)
    chosen = [MODELS[options.model]] if options.model else list(MODELS.values())
    found = {model.name: {n: compare(model, work, H100, n) for n in options.gpus} for model in chosen}
    if options.json:
        json.dump({name: {n: {k: asdict(e) for k, e in by.items()} for n, by in rows.items()}
                   for name, rows in found.items()}, sys.stdout, indent=1)  # fmt: skip
        return
    print(tables(found))


if __name__ == "__main__":
    main()
