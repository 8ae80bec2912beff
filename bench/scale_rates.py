"""What this machine reaches, measured; and small runs here, predicted from it and measured.

    measure()   products in training and forward, memory, a sum over two processes, dispatch, disk, Ray's objects
    check()     `tether train smollm2` in one process and in two: seconds by room against the model's

A CPU has no peak on a data sheet, so that what a layer of the run's own shape reaches stands for it. Read first:
`scale_model.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from scale_model import FLOAT, Device, Model, Work

RESULTS = Path(__file__).parent / "results"
RATES, CHECKED = RESULTS / "scale-rates.json", RESULTS / "scale-check.json"
SMOLLM2 = Model("SmolLM2-135M", 134.5e6, 30, 576, 384, 49152, tied=True)
ROWS, TOKENS = 4, 64
"""A micro-batch like those of the small runs."""
SUM_BYTES = 1 << 26
TRIES = 5
UPDATES = 3


def measure() -> None:
    """Write `bench/results/scale-rates.json`."""
    device = measured_device()
    facts = {"command": "OMP_NUM_THREADS=1 python bench/scale_model.py --measure", "cores": os.cpu_count(),
             "threads": os.environ.get("OMP_NUM_THREADS"), "system": platform.platform(),
             "load": os.getloadavg(), "device": asdict(device)}  # fmt: skip
    RATES.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(json.dumps(facts, indent=1))


def this_machine() -> Device:
    return Device(**json.loads(RATES.read_text("utf-8"))["device"])


def measured_device() -> Device:
    """One process of this machine."""
    forward, train = layer_rates()
    return Device(
        name="this CPU, one thread", train_flops=train, forward_flops=forward, memory_rate=read_rate(),
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), near=sum_rate(), far=0.0, per_node=2,
        latency=300e-6, dispatch=dispatch_seconds(), engine_dispatch=0.0, disk=write_rate(), objects=object_rate(),
        files=file_rate(),
    )  # fmt: skip


def _best(call: Callable[[], object], tries: int = TRIES, clock: Callable[[], float] = time.perf_counter) -> float:
    call()
    seconds = []
    for _ in range(tries):
        started = clock()
        call()
        seconds.append(clock() - started)
    return min(seconds)


def layer_rates() -> tuple[float, float]:
    """Operations a second of SmolLM2's decoder layers in bfloat16, forward alone and forward with backward."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    layers = 4
    config = LlamaConfig(
        vocab_size=64, hidden_size=SMOLLM2.width, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).to(torch.bfloat16)
    weights = sum(p.numel() for p in model.layers.parameters())
    ids = torch.randint(0, 64, (ROWS, TOKENS))
    operations = 2.0 * weights * ROWS * TOKENS

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def train() -> None:
        model(ids, use_cache=False).last_hidden_state.float().sum().backward()

    return operations / _best(forward), 3.0 * operations / _best(train)


def dispatch_seconds() -> float:
    """A decoded token's time a layer of a model so narrow that its arithmetic is nothing."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    layers = 30
    config = LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=16)  # fmt: skip
    model, token = LlamaModel(config).to(torch.bfloat16), torch.zeros((ROWS, 1), dtype=torch.long)
    cache = DynamicCache()

    def step() -> None:
        with torch.inference_mode():
            model(token, past_key_values=cache, use_cache=True)

    return _best(step) / layers


def read_rate() -> float:
    import torch

    long = torch.ones(1 << 26)
    return long.numel() * FLOAT / _best(long.sum)


def write_rate() -> float:
    """Bytes a second onto the disk, flushed."""
    block = os.urandom(SUM_BYTES)
    with tempfile.NamedTemporaryFile() as file:

        def write() -> None:
            file.seek(0)
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

        return len(block) / _best(write, 3)


def file_rate() -> float:
    """Bytes a second of safetensors laid down in shared memory, or read from there; the slower of the two.

    Of the processor's seconds: it is all copies, and others may be at work.
    """
    import torch
    from safetensors.torch import load_file, save_file

    block = {"weight": torch.ones(SUM_BYTES // FLOAT)}
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        path = Path(folder) / "weights.safetensors"
        laid = _best(lambda: save_file(block, path), clock=time.process_time)
        return SUM_BYTES / max(laid, _best(lambda: load_file(path)["weight"].clone(), clock=time.process_time))


def sum_rate() -> float:
    """Bytes a second that each of two processes passes on in gloo's all-reduce over the loopback: each sends half of
    the tensor twice, so that a tensor's bytes over the time are the link's.
    """
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    ranks = [context.Process(target=_sum, args=(rank, answer)) for rank in range(2)]
    for process in ranks:
        process.start()
    seconds = float(answer.get(timeout=300))
    for process in ranks:
        process.join()
    return SUM_BYTES / seconds


def _sum(rank: int, answer: multiprocessing.Queue) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29533", "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    tensor = torch.ones(SUM_BYTES // FLOAT)
    seconds = _best(lambda: dist.all_reduce(tensor))
    if rank == 0:
        answer.put(seconds)
    dist.destroy_process_group()


def object_rate() -> float:
    """Bytes a second through Ray's object store, put and got; 0 where there is no Ray."""
    try:
        import ray
    except ImportError:
        return 0.0
    import numpy as np

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 29)
    try:
        block = np.ones(SUM_BYTES, dtype=np.uint8)
        return SUM_BYTES / _best(lambda: ray.get(ray.put(block)).sum(), 3)
    finally:
        ray.shutdown()


# ── the check ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check() -> None:
    """Small runs, predicted and measured; writes `bench/results/scale-check.json`."""
    rows = [row for mode in ("full", "top") for count in (1, 2) for row in compare_run(mode, count)]
    facts = {"command": "OMP_NUM_THREADS=1 python bench/scale_model.py --check", "load": os.getloadavg(), "rows": rows}
    CHECKED.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    for row in rows:
        print("{mode:5} {processes} {room:10} predicted {predicted:7.2f}  measured {measured:7.2f}".format(**row))


def compare_run(mode: str, processes: int) -> list[dict[str, object]]:
    measured = run_seconds(mode, processes)
    work = replace(small_work(), mode=mode)
    found = predicted(SMOLLM2, work, this_machine(), processes)
    return [
        {"mode": mode, "processes": processes, "room": room, "predicted": found[room], "measured": measured[room]}
        for room in found
    ]


def small_work() -> Work:
    """What `run_seconds` trains."""
    return Work(rows=16, prompt=36, response=32, epochs=4, minibatches=2, top_share=0.2, reward_share=0.0,
                tokens_per_pass=4096, checkpoint_every=25, recompute=False)  # fmt: skip


def predicted(model: Model, work: Work, device: Device, processes: int) -> dict[str, float]:
    """As the run's own metrics divide it: the sums belong to the update."""
    from scale_layouts import replicate

    rooms = replicate(model, work, device, processes).rooms
    update = rooms["update"] + rooms["optimiser"] + rooms["sums"]
    return {"generate": rooms["generate"], "reference": rooms["measure"], "update": update}


def run_seconds(mode: str, processes: int) -> dict[str, float]:
    """Medians by room over the updates after the first."""
    from tether.store import RunStore

    with tempfile.TemporaryDirectory() as folder:
        words = ["train", str(_recipe(Path(folder), mode)), "--root", folder, "--name", "run"]
        subprocess.run(
            [sys.executable, "-m", "tether.cli", *words, "--num-processes", str(processes)], check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        with RunStore.open(Path(folder) / "run") as store:
            names = [f"seconds/{room}" for room in ("generate", "reference", "update")]
            return {
                name.removeprefix("seconds/"): statistics.median(curve.values[1:])
                for name, curve in store.curves(names).items()
            }


def _recipe(folder: Path, mode: str) -> Path:
    """SmolLM2 against a function that costs nothing, with prompts of its own world's length."""
    from tether.worlds.world import open_world

    work, world = small_work(), open_world("smollm2")
    (folder / "reward.py").write_text(
        "def score(prompts, responses, **columns):\n    return [len(set(r)) / 30 for r in responses]\n"
    )
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in world.train_prompts[:200])
    )
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{source: {world.model}, mode: {mode}, top_layers: 6}}\n"
        f"data: {{prompts: {folder}/prompts.jsonl}}\nreward: {{source: '{folder}/reward.py:score'}}\n"
        f"ppo: {{batch_size: {work.rows}, steps: {UPDATES}, sampling: {{max_new_tokens: {work.response}}}, update: "
        f"{{epochs: {work.epochs}, minibatches: {work.minibatches}, early_stop_kl: null}}}}\n"
        "evaluation: {every: 100, prompts: 4}\ncheckpoint: {every: 100}\n"
    )  # fmt: skip
    return path
