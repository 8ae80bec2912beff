"""Rung 3: the lesson's listing with the library, `PPOTrainer.generate` and `.step`, as it stands but for its slips.

    tokenizer, policy (1)+(2), ref (3), rm (4)  →  PPOConfig  →  PPOTrainer  →  100 × generate, score, step, one line

`tether.trl` takes the place of `trl`, and that is the whole difference of the imports. Slips of the listing, each
marked where it is mended: (a) `target_kl` is TRL's threshold of early stopping; the KL that β steers to is `target`;
(b) `generate` gives the prompt back with the response unless told not to, and `step` would train on it as if the policy
had said it; sampling has to be asked for, and pure; (c) a one-element tensor takes no format. Queries with a batch
dimension, (1, L), are accepted as the listing makes them. Read next: `trl/trainer/ppo_trainer.py`, `trainer.py`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tether.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from tether.worlds.world import WorldName, open_world

LINE = "step {step:03d} reward={reward:+.2f} kl={kl:.3f} policy_loss={policy_loss:+.3f} value_loss={value_loss:.2f}"
SHOWN_EVERY = 10
MEASURED = 128  # reference samples that give the score its unit: mean 0, standard deviation 1

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, responses) → scores."""


@dataclass(frozen=True)
class Sizes:
    """What suits a world's model; the lesson's numbers where nothing speaks against them."""

    learning_rate: float
    batch_size: int
    mini_batch_size: int
    max_new_tokens: int
    shared_layers: int | None
    """Lower layers that stay frozen, in policy and reference alike."""


SIZES: dict[str, Sizes] = {
    "nano": Sizes(2e-4, 32, 8, 24, None),  # the lesson's 1e-6 suits models of billions of weights
    "smollm2": Sizes(2e-5, 16, 8, 32, 24),
}


def main(
    world: WorldName = "nano",
    steps: int = 100,
    beta: float = 0.05,
    target: float = 6.0,
    sft_checkpoint: str | None = None,
    reward_model: str | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """The lesson's third listing: PPO with the library, one printed line of reward, KL and losses.

    world: nano (about a minute) or smollm2 (an hour or two on a CPU). beta: the string. target: the KL that it steers
    to, nats per response. sft_checkpoint, reward_model: folders or hub names of your own in place of the world's; a
    reward model is a sequence classifier with one label. json: one object a step, no text.
    """
    home = open_world(world)
    checkpoint = str(home.model) if sft_checkpoint is None else sft_checkpoint
    score: Score = home.gold if reward_model is None else classifier(reward_model)  # type: ignore[assignment]
    progress = train(checkpoint, score, home.train_prompts, SIZES[world], steps, beta, target, seed)
    for measured, text in progress:
        if json:
            print(jsonlib.dumps(measured | {"text": text}), flush=True)
        elif measured["step"] % SHOWN_EVERY == 0 or measured["step"] == steps - 1:
            print(LINE.format(**measured), f"         {text}", sep="\n", flush=True)


def train(
    sft_checkpoint: str, score: Score, prompts: Sequence[str], sizes: Sizes, steps: int, beta: float, target: float,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Any], str]]:  # fmt: skip
    """The listing. Yields the printed numbers of each step, and a prompt with its response."""
    tokenizer = AutoTokenizer.from_pretrained(sft_checkpoint)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(sft_checkpoint)  # (1)+(2)
    ref = create_reference_model(policy, num_shared_layers=sizes.shared_layers)  # (3) frozen
    config = PPOConfig(
        seed=seed,
        learning_rate=sizes.learning_rate,
        batch_size=sizes.batch_size,
        mini_batch_size=sizes.mini_batch_size,
        ppo_epochs=4,
        init_kl_coef=beta,  # β — the KL coefficient from the math
        target=target,  # target KL; coef auto-adjusts if it drifts. Slip (a): the listing says target_kl
        cliprange=0.2,  # ε — the PPO clip
    )
    dataset = Dataset.from_dict({"query": list(prompts)})
    trainer = PPOTrainer(config, policy, ref, tokenizer, dataset=dataset)
    rm = in_sigmas(trainer, score, prompts, sizes)  # (4) frozen
    for step, batch in enumerate(islice(_forever(trainer.dataloader), steps)):
        query_tensors = [encode(prompt, tokenizer) for prompt in batch["query"]]
        response_tensors = respond(trainer, query_tensors, sizes)
        texts = [tokenizer.decode(response[0], skip_special_tokens=True) for response in response_tensors]
        rewards = [torch.tensor(number) for number in rm(batch["query"], texts)]
        stats = trainer.step(query_tensors, response_tensors, rewards)  # PPO update
        measured = {
            "step": step,
            "reward": float(sum(rewards) / len(rewards)),  # slip (c): a number, where the listing formats a tensor
            "kl": stats["objective/kl"],
            "policy_loss": stats["ppo/loss/policy"],
            "value_loss": stats["ppo/loss/value"],
            "beta": stats["objective/kl_coef"],
        }
        yield measured, f"{batch['query'][0]} → {texts[0]}"


def encode(prompt: str, tokenizer: Any) -> Tensor:
    """The prompt as a user's turn where the tokenizer has a chat template, [1, L], as the listing has it."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(prompt).input_ids])
    turn = [{"role": "user", "content": prompt}]
    return torch.tensor([tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)])


def respond(trainer: PPOTrainer, query_tensors: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Samples of the policy, without their prompts: slip (b)."""
    responses: list[Tensor] = trainer.generate(
        query_tensors, batch_size=len(query_tensors), return_prompt=False, max_new_tokens=sizes.max_new_tokens,
        do_sample=True, top_k=0, top_p=1.0,
    )  # fmt: skip
    return responses


def in_sigmas(trainer: PPOTrainer, score: Score, prompts: Sequence[str], sizes: Sizes) -> Score:
    """The score, less its mean and over its standard deviation on samples of the reference: β has no unit otherwise."""
    asked = [prompts[place % len(prompts)] for place in range(MEASURED)]
    queries = [encode(prompt, trainer.tokenizer) for prompt in asked]
    texts = [trainer.tokenizer.decode(r[0], skip_special_tokens=True) for r in respond(trainer, queries, sizes)]
    deviation, mean = torch.std_mean(torch.tensor(list(score(asked, texts))))
    return lambda prompts, responses: ((torch.tensor(list(score(prompts, responses))) - mean) / deviation).tolist()


@torch.no_grad()
def classifier(folder: str) -> Score:
    """A trained reward model, frozen, with its own tokenizer; it reads prompt and response as one text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [f"{prompt} {response}" for prompt, response in zip(prompts, responses, strict=True)]
        return [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]

    return score


def _forever(batches: Any) -> Iterator[dict[str, list[str]]]:
    while True:
        yield from batches
