"""Ours in the benchmark: one process, one mode, one update each time the driver asks for it.

    python bench/tether_worker.py JOB.json        (started by ppo_speed.py, in tether's environment)

Policy, value head, reference and a reward model of the same size, joined by the trainer exactly as `tether train`
joins them; the same knobs as the peer's. Read next: `trl_peer.py`.
"""

from __future__ import annotations

import sys

import torch

from tether.config import PPOSettings, RewardSettings, SamplingSettings, UpdateSettings
from tether.models import LanguagePolicy, load_policy
from tether.prompts import PromptSource
from tether.reward_training import untrained
from tether.session import prepare_process
from tether.trainer import Run, advance
from workload import PHASES, Channel, Clock, Job, Measured, text_of, words

LEARNING_RATE = 3e-6  # the peer's default
STEPS = 1000  # more than are ever measured


def main() -> None:
    job, channel = Job.load(sys.argv[1]), Channel()
    torch.set_num_threads(job.threads)
    prepare_process()
    run, clock = build(job), Clock(job.device)
    channel.ready("tether")
    while channel.wait():
        channel.report(measure(run, clock))


def build(job: Job) -> Run:
    """The run that is measured."""
    policy = open_policy(job)
    # A reward model on the policy's own trunk reads the trunk's states, as the reward models of `tether reward` do.
    shared = job.top_layers if job.system == "top" else None
    reward = untrained(job.model, policy.tokenizer, top_layers=shared, seed=job.seed + 1, device=job.device)
    texts = tuple(map(text_of, job.prompts))
    prompts = PromptSource(texts, job.prompts, len(texts), seed=job.seed, pad=policy.pad)
    return Run(policy, reward, prompts, settings(job), keep=lambda _: None)


def open_policy(job: Job) -> LanguagePolicy:
    policy = load_policy(
        job.model, words(job.vocabulary), mode=job.system, top_layers=job.top_layers, lora_rank=job.lora_rank,
        device=job.device,
    )  # fmt: skip
    policy._sampler.stops = (-1,)  # no token has this id: every response has its full length, as the peer's
    return policy


def settings(job: Job) -> PPOSettings:
    return PPOSettings(
        sampling=SamplingSettings(max_new_tokens=job.response, temperature=1.0),
        reward=RewardSettings(beta=0.05, missing_eos="keep"),
        update=UpdateSettings(
            epochs=job.epochs, minibatches=job.minibatches, learning_rate=LEARNING_RATE, early_stop_kl=None
        ),
        batch_size=len(job.prompts),
        steps=STEPS,
        seed=job.seed,
    )


def measure(run: Run, clock: Clock) -> Measured:
    """One update. The phases are those of the rooms' own measurements."""
    clock.start()
    metrics = advance(run).metrics
    clock.split |= {name: metrics[f"seconds/{name}"] for name in PHASES}
    return clock.measured(int(metrics["tokens/generated"]))


if __name__ == "__main__":
    main()
