"""Responses by the real vLLM against the policy's own: weights sent, greedy replies, log-probabilities, seconds.

    python bench/vllm_proof.py --python .venv-vllm/bin/python --mode top --dtype float32

After each of several changes of the weights: are vLLM's greedy replies those of the policy, token for token, and how
far are its log-probabilities from the trainer's at a temperature? One line of JSON a change. A reply that differs is
followed to the place where it parts, and what lay between the two tokens there is told, in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from tether.batch import Prompts, Sequences
from tether.config import RunSettings
from tether.models import LanguagePolicy, load_policy
from tether.prompts import PromptSet, PromptSource, fit
from tether.runtime.vllm_engine import Rule
from tether.session import prepare_process
from tether.streams import uniforms
from tether.vllm_run import vllm_writing
from tether.vllm_writer import VllmWriter, questions_of
from tether.worlds.world import open_world

TEMPERATURE = 0.7


def main() -> None:
    asked = _arguments()
    prepare_process()
    torch.set_num_threads(1)
    world = open_world(asked.world)
    policy = load_policy(world.model, mode=asked.mode, dtype=asked.dtype)
    prompts = _prompts(policy, PromptSet(world.heldout_prompts), asked.prompts)
    vllm = {"python": asked.python, "place": asked.place, "cache_gib": 1.0}
    settings = RunSettings.model_validate({"runtime": {"writer": "vllm", "vllm": vllm}, "world": asked.world})
    started = time.perf_counter()
    with vllm_writing(settings, policy) as writer:
        assert isinstance(writer, VllmWriter)
        _tell(started=time.perf_counter() - started, mode=asked.mode, dtype=asked.dtype, world=asked.world)
        for change in range(asked.changes + 1):
            _tell(change=change, **_measure(policy, writer, prompts, asked.tokens, change))
            _move(policy, asked.move, change)


def _measure(
    policy: LanguagePolicy, writer: VllmWriter, prompts: Prompts, width: int, change: int
) -> dict[str, object]:
    times = [time.perf_counter()]
    writer.catch_up()
    times.append(time.perf_counter())
    draws = uniforms(0, "proof", change, prompts.keys, width)
    rule = Rule(width, 0.0, tuple(sorted(policy.stops)))
    greedy = [answer.tokens for answer in writer._engine.answer(questions_of(prompts, draws), rule)]
    rows = [row[real].tolist() for row, real in zip(prompts.ids, prompts.mask, strict=True)]
    own = [_greedy(policy, row, width) for row in rows]
    parted = [_parting(policy, *three) for three in zip(rows, own, greedy, strict=True) if three[1] != three[2]]
    times.append(time.perf_counter())
    written = writer.write(prompts, draws, TEMPERATURE).trimmed()
    times.append(time.perf_counter())
    mask = written.response_mask
    again = policy.evaluate(policy.prepare(Sequences.join(prompts, written, policy.pad)), TEMPERATURE).logprobs.detach()
    gap = (written.sampler_logprobs - again)[mask].double()
    policy.writer = None
    times.append(time.perf_counter())
    tokens = int(policy.generate(prompts, draws, TEMPERATURE).response_mask.sum())
    times.append(time.perf_counter())
    return {
        "replies": len(own), "equal": len(own) - len(parted), "parted_at_nats": parted,
        "gap_rms": float(gap.pow(2).mean().sqrt()), "gap_largest": float(gap.abs().max()), "tokens": int(mask.sum()),
        "transfer_seconds": times[1] - times[0], "write_seconds": times[3] - times[2],
        "own_tokens": tokens, "own_write_seconds": times[5] - times[4], "version": written.origin.version,
    }  # fmt: skip


def _prompts(policy: LanguagePolicy, given: PromptSet, count: int) -> Prompts:
    fitted = fit(given.first(count), policy.tokenizer, max_tokens=policy.context // 2, too_long="error")
    return PromptSource(fitted.prompts.prompts, fitted.ids, count, 1, 0, policy.pad, {}, fitted.note).batch(0)


@torch.no_grad()
def _greedy(policy: LanguagePolicy, prompt: list[int], width: int) -> tuple[int, ...]:
    """The likeliest token each time, by the model's own forward pass on the whole text."""
    said: list[int] = []
    for _ in range(width):
        said.append(int(_logits(policy, [*prompt, *said]).argmax()))
        if said[-1] in policy.stops:
            break
    return tuple(said)


def _parting(policy: LanguagePolicy, prompt: list[int], left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """log π of the policy's token less that of vLLM's, at the first place where they differ."""
    place = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
    if place is None:
        return float("inf")
    logits = _logits(policy, [*prompt, *left[:place]])
    return float(logits[left[place]] - logits[right[place]])


@torch.no_grad()
def _logits(policy: LanguagePolicy, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = policy.mode.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.float()


@torch.no_grad()
def _move(policy: LanguagePolicy, share: float, change: int) -> None:
    """Every trained weight by this share of its own spread, as an update would."""
    draw = torch.Generator().manual_seed(change)
    for weight in policy.trainable()["policy"]:
        spread = weight.float().std().item() or 0.02
        weight += (share * spread * torch.randn(weight.shape, generator=draw)).to(weight)


def _tell(**facts: object) -> None:
    print(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in facts.items()}), flush=True)


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--python", default=None, help="interpreter that has vLLM; by default this one")
    asked.add_argument("--place", default="server")
    asked.add_argument("--world", default="smollm2")
    asked.add_argument("--mode", default="top")
    asked.add_argument("--dtype", default="float32")
    asked.add_argument("--prompts", type=int, default=8)
    asked.add_argument("--tokens", type=int, default=24)
    asked.add_argument("--changes", type=int, default=3)
    asked.add_argument("--move", type=float, default=0.05, help="share of a weight's spread that each change moves it")
    return asked.parse_args()


if __name__ == "__main__":
    main()
    sys.exit(0)
