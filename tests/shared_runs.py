"""A tiny run by the command line, for tests that share it among processes: its files, and how it is started.

The policy is the small Llama of `tiny_models.py`, the reward counts words; every update is a checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiny_models import build, build_tokenizer

TESTS = Path(__file__).parent
STEPS = 5


def write_recipe(folder: Path, steps: int = STEPS, mode: str = "top") -> Path:
    """Checkpoint, prompts and `recipe.yaml` in the folder; the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sft").is_dir():
        build("llama").save_pretrained(folder / "sft")
        build_tokenizer().save_pretrained(folder / "sft")
    train = [f"w{3 + n} w{5 + n} w{7 + 2 * n}" for n in range(11)]
    heldout = [f"w{40 + n} w{50 + n}" for n in range(4)]
    for name, texts in {"train": train, "heldout": heldout}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), "utf-8")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{source: {folder}/sft, mode: {mode}, top_layers: 2, dtype: float32}}\n"
        f"data: {{prompts: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl}}\n"
        f"reward: {{source: '{TESTS}/resumable.py:count_words'}}\n"
        f"ppo: {{batch_size: 8, steps: {steps}, sampling: {{max_new_tokens: 4}}, "
        "reward: {beta: 0.1, controller: adaptive, target_kl: 0.05, horizon: 50}, "
        "update: {epochs: 2, minibatches: 2, learning_rate: 1.0e-3, value_warmup: 1, early_stop_kl: null}}\n"
        "checkpoint: {every: 1}\nevaluation: {every: 2, prompts: 4}\nkeep_samples: 3\n",
        "utf-8",
    )
    return path


def environment(**more: str) -> Mapping[str, str]:
    """Of a process that runs the command line of this tree on one thread."""
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **more}


def tether(*arguments: str) -> list[str]:
    """The command line, as words."""
    return [sys.executable, "-m", "tether.cli", *arguments]


def finish(arguments: Sequence[str], limit: float = 200.0, **more: str) -> None:
    """Run `tether ARGUMENTS` to its end, in one process; it must end well."""
    done = subprocess.run(
        tether(*arguments), env=environment(**more), capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
