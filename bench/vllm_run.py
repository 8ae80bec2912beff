"""The same run with the policy's own sampler and with vLLM: reward and K, update by update, over several seeds.

    python bench/vllm_run.py --python .venv-vllm/bin/python --seeds 3 --steps 40

The policy is a small Llama of random weights with heads of 32 (the least that vLLM's CPU attention takes), the reward
counts a kind of word. Both runs have the same prompts, knobs and uniform numbers; vLLM makes others of them, so the
curves agree as two seeds do: the difference of the last quarter's means is told with its standard error over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tether

VOCAB, EOS, PROMPTS = 96, 2, 64
WATCHED = (
    "score/mean",
    "kl/mean",
    "sampler/logprob_gap",
    "sampler/weight_mean",
    "rollout/version",
    "rollout/staleness",
)


def count_words(prompts: Sequence[str], responses: Sequence[str], **columns: object) -> list[float]:  # noqa: ARG001
    """Words whose number is divisible by three."""
    return [0.2 * sum(int(word[1:]) % 3 == 0 for word in response.split()) for response in responses]


def make_policy(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=128, bos_token_id=1, eos_token_id=EOS, tie_word_embeddings=True,
        initializer_range=0.1, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocab = {"</s>" if i == EOS else f"w{i}": i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return folder


def run(folder: Path, seed: int, asked: argparse.Namespace, **runtime: object) -> dict[str, list[float]]:
    prompts = [f"w{5 + i % 40} w{7 + i % 60} w{11 + i}" for i in range(PROMPTS)]
    name = f"{runtime.get('runtime.writer', 'own')}-{runtime.get('runtime.staleness', 0)}-{seed}"
    done = tether.train(
        policy=folder / "sft", reward=count_words, prompts=prompts, name=name, root=folder / "runs", quiet=True,
        steps=asked.steps, seed=seed, beta=0.1, mode="full", dtype="float32", batch_size=asked.batch,
        max_new_tokens=12, learning_rate=1e-3, missing_eos="keep", allow_base=True,
        **{"evaluation.every": 1000, **runtime},
    )  # fmt: skip
    return {name: done.metrics(name).tolist() for name in (*WATCHED, "seconds/generate")}


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(1)
    engine = {"runtime.writer": "vllm", "runtime.vllm.python": asked.python, "runtime.vllm.cache_gib": 0.25,
              "runtime.vllm.start_seconds": 3600}  # fmt: skip
    kinds = {"own": {}, "vllm": engine, "vllm, staleness 1": engine | {"runtime.staleness": 1}}
    ends: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        make_policy(Path(scratch) / "sft")
        for seed in range(asked.seeds):
            for kind, runtime in kinds.items():
                curves = run(Path(scratch), seed, asked, **runtime)
                last = max(1, asked.steps // 4)
                ends[kind].append((_mean(curves["score/mean"][-last:]), _mean(curves["kl/mean"][-last:])))
                print(json.dumps({"seed": seed, "kind": kind, **{k: _short(v) for k, v in curves.items()}}), flush=True)
                print(json.dumps({"seed": seed, "kind": kind, "score, K": ends[kind][-1]}), flush=True)
    for kind in list(kinds)[1:]:
        for place, what in enumerate(("score", "K")):
            gaps = [theirs[place] - own[place] for theirs, own in zip(ends[kind], ends["own"], strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            print(json.dumps({"kind": kind, "what": what, "less own": _mean(gaps), "se": error}), flush=True)


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)


def _short(numbers: Sequence[float]) -> list[float]:
    """Every fourth number and the last."""
    return [float(f"{number:.3g}") for number in [*numbers[::4], *numbers[-1:]] if number == number]


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--python", required=True, help="interpreter that has vLLM")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--steps", type=int, default=40)
    asked.add_argument("--batch", type=int, default=32)
    return asked.parse_args()


if __name__ == "__main__":
    main()
    sys.exit(0)
