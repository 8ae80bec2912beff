"""How long one PPO update takes: tether against TRL 1.12.0, on the same workload, alternating in one run.

    make bench                                               SmolLM2-135M, three repeats, all modes
    python bench/ppo_speed.py --random-weights --device cuda  the same shape, no download, on a GPU
    python bench/ppo_speed.py --quick                        a tiny model, to see that everything runs

Each system is a process of its own that stays alive and makes one update whenever it is asked (`tether_worker.py`,
`trl_peer.py`). A round asks each once, one after the other; the first warms up and is not counted. What is
compared is the ratio within a round, so a machine that slows down slows both. Results: `bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from floor import Floor, Rates, Shape, Work, floor_of, measure_rates, shape_of
from summary import BASELINE, GIB, LABELS, Summary, median_rates, page, summarise, table, verdicts
from workload import SMALL, SMOLLM2_135M, Job, Measured, random_prompts, write_random_model

HERE = Path(__file__).parent
ROOT = HERE.parent
PEER_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
MODES = ("full", "lora", "top")
PEERS = ("trl", "trl-bf16", "trl-lora")


class Worker:
    """One system's process."""

    def __init__(self, job: Job, folder: Path, python: Path) -> None:
        peer = job.system.startswith("trl")
        script = HERE / ("trl_peer.py" if peer else "tether_worker.py")
        job.save(folder / f"{job.system}.json")
        self.log = folder / f"{job.system}.log"
        command = [str(python if peer else sys.executable), str(script), str(folder / f"{job.system}.json")]
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env=environment,
        )  # fmt: skip
        self.versions: dict[str, str] = self._read()["ready"]

    def update(self) -> Measured:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return Measured(**self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            end = self.log.read_text("utf-8")[-2000:]
            raise SystemExit(f"{self.log.stem} ended early; the end of its log:\n{end}")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def workers(jobs: Sequence[Job], folder: Path, python: Path) -> Iterator[dict[str, Worker]]:
    """All systems, started one after the other; they end with the block."""
    with ExitStack() as stack:
        started = {}
        for job in jobs:
            say(f"starting {LABELS[job.system]}")
            started[job.system] = Worker(job, folder, python)
            stack.callback(started[job.system].close)
        yield started


@dataclass(frozen=True)
class Round:
    """One update of every system, and the machine just before it."""

    measured: Mapping[str, Measured]
    rates: Rates
    load: float
    """Load average of the last minute."""


def run_rounds(systems: Mapping[str, Worker], repeats: int, device: str) -> Iterator[Round]:
    """`repeats` rounds, after one that warms up."""
    for number in range(repeats + 1):
        load, rates, measured = os.getloadavg()[0], measure_rates(device), {}
        for system, worker in systems.items():
            measured[system] = worker.update()
            title = f"round {number}/{repeats}" if number else "warm-up"
            say(f"{title}: {LABELS[system]}: {measured[system].seconds:.2f} s (load {os.getloadavg()[0]:.1f})")
        if number:
            yield Round(measured, rates, load)


def jobs_of(knobs: argparse.Namespace, model: str) -> list[Job]:
    """One job a system: the peer first."""
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    common = Job(
        system=BASELINE, model=model, prompts=random_prompts(knobs.rows, knobs.prompt, vocabulary, knobs.seed),
        response=knobs.response, epochs=knobs.epochs, minibatches=knobs.minibatches, vocabulary=vocabulary,
        top_layers=knobs.top_layers, lora_rank=knobs.lora_rank, device=knobs.device, threads=knobs.threads,
        seed=knobs.seed,
    )  # fmt: skip
    return [replace(common, system=system) for system in (*knobs.peers, *knobs.modes)]


def find_model(knobs: argparse.Namespace, folder: Path) -> str:
    """The folder of the model that everyone starts from."""
    if knobs.quick or knobs.random_weights:
        return str(write_random_model(SMALL if knobs.quick else SMOLLM2_135M, folder / "model", knobs.seed))
    from tether.worlds.real import smollm2_135m_instruct

    return str(smollm2_135m_instruct())


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    names = [line.split(":")[1].strip() for line in _proc("cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) * 1024 for line in _proc("meminfo") if line.startswith("MemTotal")]
    abilities = [name for name, here in torch.cpu.get_capabilities().items() if here is True]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / GIB, 1) if memory else None,
        "abilities": [name for name in abilities if name.startswith(("avx512", "amx", "avx2"))],
        "accelerator": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The source that was measured; `-dirty` where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _proc(name: str) -> list[str]:
    path = Path("/proc") / name
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES, help="of tether")
    parser.add_argument("--peers", nargs="*", default=[BASELINE], choices=PEERS, help="of TRL; `trl` is the baseline")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--random-weights", action="store_true", help="SmolLM2-135M's shape without its weights")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repeat: no measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--rows", type=int, default=16, help="responses in an update")
    parser.add_argument("--prompt", type=int, default=36, help="tokens of each prompt")
    parser.add_argument("--response", type=int, default=32, help="tokens of each response")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--top-layers", type=int, default=6, help="k of mode top")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="Python of the environment that has TRL")
    parser.add_argument("--out", type=Path, help="where results go, without ending; default bench/results/DEVICE")
    knobs = parser.parse_args(arguments)
    knobs.repeats = 1 if knobs.quick else knobs.repeats
    if knobs.peers and not knobs.peer_python.exists():
        parser.error(f"{knobs.peer_python} is missing; `make bench` makes it, or pass --peers with nothing after it")
    return knobs


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    knobs = parse(given)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = find_model(knobs, folder)
        shape, rounds = shape_of(model), []
        with workers(jobs_of(knobs, model), folder, knobs.peer_python) as systems:
            versions = {system: worker.versions for system, worker in systems.items()}
            for one in run_rounds(systems, knobs.repeats, knobs.device):
                rounds.append(one)  # kept at once: a run that is cut short has lost nothing
                keep(knobs, given, rounds, shape, versions)
    summaries = summaries_of(knobs, rounds, shape)
    print(table(summaries), *verdicts(summaries), sep="\n")


def keep(
    knobs: argparse.Namespace, given: Sequence[str], rounds: Sequence[Round], shape: Shape, versions: Mapping[str, Any]
) -> None:
    """Write the results so far, unless they are no measurement."""
    if knobs.quick:
        return
    facts = {
        "command": " ".join(["python", "bench/ppo_speed.py", *given]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(knobs.device),
        "load_averages": [one.load for one in rounds],
        "versions": versions,
        "workload": {name: knob for name, knob in vars(knobs).items() if isinstance(knob, (int, bool))},
        "shape": asdict(shape),
        "rates": asdict(median_rates([one.rates for one in rounds])),
        "rounds": [{name: asdict(update) for name, update in one.measured.items()} for one in rounds],
    }
    write(knobs.out or HERE / "results" / knobs.device, summaries_of(knobs, rounds, shape), facts)


def summaries_of(knobs: argparse.Namespace, rounds: Sequence[Round], shape: Shape) -> list[Summary]:
    floors = floors_of(knobs, shape, median_rates([one.rates for one in rounds]))
    return summarise([one.measured for one in rounds], floors)


def floors_of(knobs: argparse.Namespace, shape: Shape, rates: Rates) -> dict[str, Floor]:
    work = Work(knobs.rows, knobs.prompt, knobs.response, knobs.epochs, knobs.minibatches)
    return {mode: floor_of(mode, shape, work, rates, knobs.top_layers, knobs.lora_rank) for mode in knobs.modes}


def write(out: Path, summaries: Sequence[Summary], facts: Mapping[str, Any]) -> None:
    """The JSON with every number, and a page with the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {**facts, "summaries": [asdict(row) for row in summaries]}
    out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(page(summaries, facts), "utf-8")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
