"""A tiny run that a process of its own can train, be killed in, and go on with.

    python resumable.py        reads commands, each a line of JSON and a process that is forked from this one, so that
                               none imports the libraries anew: ["tiny", FOLDER] starts the run there, or goes on with
                               it; ["tether", …] is the command line

The policy is a small Llama of random weights that is read from FOLDER/../sft; the reward counts words. Every update is
a checkpoint, every second one an evaluation.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from tether import cli
from tether.batch import Prompt
from tether.config import RunSettings
from tether.prompts import PromptSet
from tether.resuming import resume_run
from tether.session import train_run
from tether.store import RunStore
from tether.task import Judges, Task
from tiny_models import build, build_tokenizer

STEPS = 4
TIMES = ("seconds/", "tokens/per_second", "memory/")
"""Metrics that are no function of the run."""


def count_words(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
    return [0.1 * sum(len(word) % 3 for word in response.split()) for response in responses]


def prefer_short(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
    return [-0.1 * len(response) for response in responses]


def settings_of(
    mode: str = "top", dtype: str = "float32", controller: str = "adaptive", steps: int = STEPS, **changes: object
) -> RunSettings:
    """Small, with everything that has a state: warm-up, an adaptive string, the linear schedule, two passes."""
    ppo = {
        "batch_size": 8, "steps": steps, "sampling": {"max_new_tokens": 4},
        "reward": {"beta": 0.1, "controller": controller, "target_kl": 0.05, "horizon": 50},
        "update": {"epochs": 2, "minibatches": 2, "learning_rate": 1e-3, "value_warmup": 1, "early_stop_kl": None},
    }  # fmt: skip
    given = {
        "ppo": ppo, "model": {"mode": mode, "top_layers": 2, "lora_rank": 4, "dtype": dtype}, "keep_samples": 3,
        "checkpoint": {"every": 1}, "evaluation": {"every": 2, "prompts": 4},
    }  # fmt: skip
    return RunSettings.model_validate(given | changes)


def task_of(sft: Path) -> Task:
    """The task of every run here; its checkpoint is written on first use."""
    if not sft.is_dir():
        build("llama").save_pretrained(sft)
        build_tokenizer().save_pretrained(sft)
    train = PromptSet(tuple(f"w{3 + n} w{5 + n} w{7 + 2 * n}" for n in range(11)))
    heldout = PromptSet(tuple(f"w{40 + n} w{50 + n}" for n in range(4)))
    return Task(sft, train, heldout, Judges(count_words, {"gold": prefer_short}))


def left_behind(run: Path) -> dict[str, object]:
    """All that a run leaves that is a function of its settings: metrics, samples bit by bit, final weights."""
    from tether.checkpoint import Checkpoints

    with RunStore.open(run) as store:
        names = [name for name in store.names() if not name.startswith(TIMES)]
        curves = {name: (curve.steps.tolist(), curve.values.tolist()) for name, curve in store.curves(names).items()}
        samples = [
            tuple(field.tobytes() if isinstance(field, np.ndarray) else repr(field) for field in vars(sample).values())
            for sample in store.samples()
        ]
        steps = store.steps()
    last = Checkpoints(run / "checkpoints").newest(print)
    assert last is not None
    state = last.snapshot()
    tensors = {**state.weights, **{f"adam.{name}": tensor for name, tensor in state.optimiser.items()}}
    bits = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return {"steps": steps, "curves": curves, "samples": samples, "bits": bits, "beta": dict(state.beta)}


def train(run: Path) -> None:
    task, console = task_of(run.parent / "sft"), Console(file=sys.stderr)
    if run.is_dir():
        resume_run(run, lambda _: task, console)
    else:
        train_run(task, settings_of(), run.parent, run.name, console)


def carry_out(program: str, *arguments: str) -> int:
    if program == "tether":
        return cli.run(list(arguments))
    train(Path(*arguments))
    return 0


def main() -> None:
    """For each line: the process's id, then, when it is over, its wait status."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what it prints is no answer of this program
            try:
                os._exit(carry_out(*json.loads(line)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
