"""The layouts of a run on many GPUs: what each room takes, what a GPU must hold, and where a layout ends.

    replicate   every process holds the model: `tether train --num-processes N`
    fsdp        weights, gradients and moments in pieces: `--runtime.sharding fsdp`; own sampler on gathered weights
    ray         some GPUs write with the own sampler, the others learn as in replicate: `--runtime.writer ray`
    vllm        the same with vLLM on those that write: `--runtime.writer vllm`
    overlap     the same, the next responses written while this update trains: `--runtime.overlap true`
    peers       what OpenRLHF and verl do: all GPUs write with vLLM, then all learn with tensor and sequence parallelism

Read first: `scale_model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scale_model import (
    ADAM_BYTES,
    FLOAT,
    HALF,
    STATE_BYTES,
    STEP_BYTES,
    Device,
    Model,
    Work,
    Writer,
    activation_bytes,
    cache_bytes,
    changed,
    gather_seconds,
    generate_seconds,
    measuring_operations,
    rollout_bytes,
    scoring_operations,
    sum_seconds,
    trained,
    training_operations,
)

Layout = Literal["ray", "vllm", "overlap"]

USABLE = 0.92
"""Of a device's memory; the rest is the allocator's and the driver's."""
WRITER_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Of the GPUs that write, of which the best is taken."""
ROOMS = ("generate", "measure", "score", "update", "optimiser", "sums", "weights", "rollouts", "checkpoint")
LEAST_ROWS = 8
"""Whose caches an engine must hold to be worth starting."""


@dataclass(frozen=True)
class Estimate:
    """One update of a layout."""

    rooms: Mapping[str, float] = field(default_factory=dict)
    """Seconds; what runs beside something longer is left out."""
    memory: float = 0.0
    """Bytes on the fullest GPU."""
    refused: str = ""
    """Why the layout cannot run."""
    writers: int = 0
    """GPUs that only write."""

    @property
    def total(self) -> float:
        return math.inf if self.refused else sum(self.rooms.values())


def compare(model: Model, work: Work, device: Device, gpus: int) -> dict[str, Estimate]:
    """Every layout on so many GPUs."""
    return {
        "replicate": replicate(model, work, device, gpus),
        "fsdp": fsdp(model, work, device, gpus),
        "ray": apart(model, work, device, gpus, "ray"),
        "vllm": apart(model, work, device, gpus, "vllm"),
        "overlap": apart(model, work, device, gpus, "overlap"),
        "peers": peers(model, work, device, gpus),
    }


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def frozen_bytes(model: Model, work: Work) -> float:
    """Reference and reward model: a copy in `full`, of the top layers in `top`, none in `lora`."""
    copy = {"full": model.parameters, "lora": 0.0, "top": work.top_share * model.body}[work.mode]
    return HALF * (copy + work.reward_share * model.parameters)


def training_bytes(model: Model, work: Work) -> float:
    """The policy with float32 gradients, masters and moments of what is trained."""
    return HALF * model.parameters + (ADAM_BYTES + FLOAT) * trained(model, work)


def held_bytes(model: Model, work: Work) -> float:
    """What a GPU holds with all roles whole."""
    return training_bytes(model, work) + frozen_bytes(model, work) + trunk_bytes(model, work)


def kept_whole(model: Model, work: Work) -> float:
    """Trained weights that every process holds whole where the layers are in pieces: embeddings and head."""
    return model.parameters - model.body if work.mode == "full" else 0.0


def pieces_bytes(model: Model, work: Work, gpus: int) -> float:
    """What a GPU holds with the layers in pieces: embeddings, head and the reward model stay whole."""
    rest = 1.0 - model.body / model.parameters
    policy = training_bytes(model, work) + frozen_bytes(model, work) - reward_bytes(model, work)
    whole = rest * policy if work.mode == "full" else HALF * rest * model.parameters
    return whole + (policy - whole) / gpus + reward_bytes(model, work)


def opening_bytes(model: Model, work: Work) -> float:
    """What a process holds before the layers are cut: the policy and its reference, whole."""
    return HALF * model.parameters + frozen_bytes(model, work) - reward_bytes(model, work)


def gathered_bytes(model: Model, work: Work) -> float:
    """What stands whole beside the pieces while a pass without gradients runs: the layers of policy and reference."""
    return HALF * model.body * {"full": 2.0, "lora": 1.0, "top": 1.0 + work.top_share}[work.mode]


def reward_bytes(model: Model, work: Work) -> float:
    return HALF * work.reward_share * model.parameters


def trunk_bytes(model: Model, work: Work) -> float:
    """States of the trunk that `top` remembers; every process holds those of all rows."""
    return float(HALF * work.rows * work.length * model.width) if work.mode == "top" else 0.0


# ── layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def replicate(model: Model, work: Work, device: Device, gpus: int) -> Estimate:
    """All roles on each GPU."""
    if refused := too_many(work, gpus):
        return Estimate(refused=refused)
    held = held_bytes(model, work)
    memory = held + max(activation_bytes(model, work), LEAST_ROWS * cache_bytes(model, work.length))
    if memory > USABLE * device.memory:
        return Estimate(memory=memory, refused=full_of(memory))
    rows = math.ceil(work.rows / gpus)
    writing = generate_seconds(model, work, device, rows, USABLE * device.memory - held)
    return Estimate(learning_in_copies(model, work, device, gpus) | {"generate": writing}, memory)


def fsdp(model: Model, work: Work, device: Device, gpus: int) -> Estimate:
    """Pieces; whole in passes without gradients, gathered layer by layer in training, beside the arithmetic."""
    if refused := too_many(work, gpus):
        return Estimate(refused=refused)
    held = pieces_bytes(model, work, gpus) + trunk_bytes(model, work)
    writing = held + gathered_bytes(model, work)
    memory = max(
        opening_bytes(model, work),
        held + activation_bytes(model, work),
        writing + LEAST_ROWS * cache_bytes(model, work.length),
    )
    if memory > USABLE * device.memory:
        return Estimate(memory=memory, refused=full_of(memory))
    rows = math.ceil(work.rows / gpus)
    rooms = learning(model, work, device, gpus, rows, kept_whole(model, work)) | {
        "generate": generate_seconds(model, work, device, rows, USABLE * device.memory - writing)
        + gather_seconds(device, gpus, HALF * model.body, model.layers)
    }
    return Estimate(rooms, memory)


def apart(model: Model, work: Work, device: Device, gpus: int, layout: Layout) -> Estimate:
    """Some GPUs write, with vLLM or the own sampler, the rest learn, each with all roles; the best division."""
    parallel = engine_size(model, work, device)
    if layout == "ray":
        parallel = 1 if parallel == 1 else None  # the own sampler wants the whole model on a GPU
    if parallel is None or gpus < parallel + 1:
        return Estimate(refused=f"wants {parallel + 1} GPUs at least" if parallel else "no writer holds the model")
    counts = {max(parallel, int(share * gpus) // parallel * parallel) for share in WRITER_SHARES}
    tried = [_divided(model, work, device, gpus, count, parallel, layout) for count in counts if count < gpus]
    return min(tried, key=lambda one: (one.total, one.memory))


def _divided(
    model: Model, work: Work, device: Device, gpus: int, writers: int, parallel: int, layout: Layout
) -> Estimate:
    learners = gpus - writers
    if refused := too_many(work, learners):
        return Estimate(refused=refused)
    memory = held_bytes(model, work) + activation_bytes(model, work)
    if memory > USABLE * device.memory:
        return Estimate(memory=memory, refused=full_of(memory))
    room = USABLE * device.memory - HALF * model.parameters / parallel
    writer = Writer(parallel, graphs=layout != "ray")
    rows = math.ceil(work.rows / (writers // parallel))
    writing = {"generate": generate_seconds(model, work, device, rows, room, writer)}
    rest = learning_in_copies(model, work, device, learners)
    if layout == "overlap" and sum(writing.values()) < sum(rest.values()):
        writing = {}
    elif layout == "overlap":
        rest = {}
    sent = {"weights": sending_seconds(model, work, device, layout)}  # the learner waits for it
    return Estimate(rest | writing | sent, memory, writers=writers)


def sending_seconds(model: Model, work: Work, device: Device, layout: Layout) -> float:
    """The weights that moved, given away and taken: into the object store and out of it again, or as files."""
    if layout == "ray":
        return 2.0 * HALF * trained(model, work) / device.objects
    return 2.0 * HALF * changed(model, work) / device.files


def peers(model: Model, work: Work, device: Device, gpus: int) -> Estimate:
    """All GPUs write, then all learn; tensor and sequence parallelism, so that rows and layers divide without rest.

    A model of what OpenRLHF's and verl's hybrid engines do, not a measurement of them.
    """
    pieces = (training_bytes(model, work) + frozen_bytes(model, work)) / gpus
    parallel = engine_size(model, work, device)
    memory = pieces + activation_bytes(model, work) / min(gpus, device.per_node)
    if parallel is None or parallel > gpus or memory > USABLE * device.memory:
        return Estimate(memory=memory, refused=full_of(memory))
    caches = LEAST_ROWS * cache_bytes(model, work.length)
    memory = max(memory, pieces + (HALF * model.parameters + caches) / parallel)
    room = USABLE * device.memory - HALF * model.parameters / parallel - pieces
    rows = math.ceil(work.rows / (gpus // parallel))
    writing = generate_seconds(model, work, device, rows, room, Writer(parallel, graphs=True))
    if writing == math.inf:
        return Estimate(memory=memory, refused="no room for caches beside the training state")
    rooms = learning(model, work, device, gpus, work.rows / gpus)
    split = min(
        (tensor_parallel_seconds(model, work, device, gpus, stages) for stages in (1, 2, 4, 8)), default=math.inf
    )
    rooms |= {"generate": writing, "weights": gather_seconds(device, gpus, HALF * model.parameters, model.layers)}
    machines = math.ceil(gpus / device.per_node)
    return Estimate(rooms | {"sums": min(rooms["sums"], split), "checkpoint": rooms["checkpoint"] / machines}, memory)


def tensor_parallel_seconds(model: Model, work: Work, device: Device, gpus: int, stages: int) -> float:
    """Traffic of an update with each layer cut over a machine's GPUs and the layers over so many stages: six sums of
    the hidden states a layer, with recomputation; once a step gradients summed and weights gathered over the copies.
    """
    wide = device.per_node * stages
    if gpus % wide:
        return math.inf
    copies = gpus // wide
    states = HALF * work.rows * work.length / work.minibatches / copies * model.width
    sums = 6.0 * model.layers / stages * sum_seconds(device, device.per_node, states)
    piece = (FLOAT + HALF) * trained(model, work) / wide
    between = (copies - 1) / copies * piece / device.far
    return work.steps * (sums + between)


# ── rooms ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def passes(model: Model, work: Work, device: Device, rows: float) -> dict[str, float]:
    """The arithmetic of one GPU for its rows."""
    return {
        "measure": measuring_operations(model, work, rows) / device.forward_flops,
        "score": scoring_operations(model, work, rows) / device.forward_flops,
        "update": work.epochs * training_operations(model, work, rows) / device.train_flops,
    }


def learning_in_copies(model: Model, work: Work, device: Device, gpus: int) -> dict[str, float]:
    """All rooms but the writing, the whole model on each GPU; gradients are summed after the passes of a step."""
    moved = trained(model, work)
    return passes(model, work, device, math.ceil(work.rows / gpus)) | {
        "optimiser": work.steps * moved * STEP_BYTES / device.memory_rate,
        "sums": work.steps * sum_seconds(device, gpus, FLOAT * moved),
        "rollouts": exchange(model, work, device, gpus),
        "checkpoint": moved * STATE_BYTES / device.disk / work.checkpoint_every,
    }


def learning(model: Model, work: Work, device: Device, gpus: int, rows: float, whole: float = 0.0) -> dict[str, float]:
    """All rooms but the writing, with weights in pieces. Traffic runs beside the arithmetic; `sums` is what is longer.

    Each pass gathers the layers, a training pass twice, and cuts the summed gradients into pieces. So many trained
    weights as are `whole` are stepped by every GPU, and their gradients summed after each step's last backward pass.
    """
    found, cut = passes(model, work, device, rows), trained(model, work) - whole
    share = work.top_share if work.mode == "top" else 1.0
    per_step = math.ceil(math.ceil(rows / work.minibatches) * work.length / work.tokens_per_pass)
    gather = gather_seconds(device, gpus, HALF * share * model.body, share * model.layers)
    scatter = gather_seconds(device, gpus, FLOAT * cut, share * model.layers)
    traffic = work.steps * per_step * (2.0 * gather + scatter)
    after = work.steps * sum_seconds(device, gpus, FLOAT * whole) if whole else 0.0
    measuring = max(0.0, 2.0 * gather - found["measure"])
    return found | {
        "optimiser": work.steps * (whole + cut / gpus) * STEP_BYTES / device.memory_rate,
        "sums": max(0.0, traffic - found["update"]) + measuring + after,
        "rollouts": exchange(model, work, device, gpus),
        "checkpoint": trained(model, work) * STATE_BYTES / device.disk / work.checkpoint_every,
    }


def exchange(model: Model, work: Work, device: Device, gpus: int) -> float:
    """The numbers of all rows on every process; in `top` the trunk's states too."""
    return sum_seconds(device, gpus, rollout_bytes(work) + trunk_bytes(model, work))


def engine_size(model: Model, work: Work, device: Device) -> int | None:
    """GPUs that share one vLLM's weights, the fewest that leave room for caches; None beyond a machine."""
    for parallel in (1, 2, 4, 8, 16):
        held = HALF * model.parameters / parallel + LEAST_ROWS * cache_bytes(model, work.length) / parallel
        if parallel <= device.per_node and held < 0.75 * USABLE * device.memory:
            return parallel
    return None


def too_many(work: Work, gpus: int) -> str:
    """Each process needs a response of each minibatch."""
    most = work.rows // work.minibatches
    return f"{gpus} processes, {most} responses a minibatch" if gpus > most else ""


def full_of(memory: float) -> str:
    return f"wants {memory / 1e9:.0f} GB a GPU"
