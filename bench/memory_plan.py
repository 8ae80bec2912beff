"""How far the memory estimate of `tether doctor` is off: the peak of real runs beside it, each in a process of its own.

    python bench/memory_plan.py            a 25M Llama of random weights, prints one line a case

The peak is the largest resident memory of the process less what it held before any model was loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {
    "vocab_size": 16_384, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 1_024, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
"""A model of 25M weights: large beside the program, small enough for a run in a minute."""
CASES = (
    {"mode": "full", "batch_size": 16},
    {"mode": "top", "batch_size": 16},
    {"mode": "lora", "batch_size": 16},
    {"mode": "full", "batch_size": 16, "gradient_checkpointing": True},
)
KNOBS = {"steps": 1, "minibatches": 2, "epochs": 1, "max_new_tokens": 64, "quiet": True, "dtype": "float32"}
PROMPT_TOKENS = 64


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder) / "model")
        for case in CASES:
            done = subprocess.run(
                [sys.executable, __file__, folder, json.dumps(case)], capture_output=True, text=True, check=True
            )
            print(done.stdout.strip().splitlines()[-1], flush=True)


def _make(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)


def run(folder: Path, case: dict[str, object]) -> None:
    """One run in this process, and its line."""
    import torch

    import tether
    from tether import api  # noqa: F401 (what it imports is not the run's memory)
    from tether.knobs import read_settings
    from tether.loading import read_config
    from tether.memory_plan import Shape, plan
    from tether.recording import peak_memory_bytes

    torch.zeros(1) + 1
    before = peak_memory_bytes()
    prompts = [" ".join(f"w{3 + (row * 7 + n) % 900}" for n in range(PROMPT_TOKENS)) for row in range(32)]
    tether.train(
        policy=folder / "model", reward=lambda _, responses: [0.0] * len(responses), prompts=prompts,
        heldout=prompts[:2], root=folder / "runs", **case, **KNOBS,
    )  # fmt: skip
    measured = peak_memory_bytes() - before
    given = {key: value for key, value in {**case, **KNOBS}.items() if key != "quiet"}
    settings, _ = read_settings({}, list(given.items()))
    estimate = plan(settings, Shape.of(read_config(folder / "model")), half=False, prompt_tokens=PROMPT_TOKENS)
    error = estimate.total / measured - 1
    print(f"{case}: estimated {estimate.total / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB, {error:+.0%}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    else:
        main()
