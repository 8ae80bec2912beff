"""TRL's PPO in the benchmark: one process, one update each time the driver asks for it.

    .venv-trl/bin/python bench/trl_peer.py JOB.json        (started by ppo_speed.py, in the peer's own environment)

`PPOTrainer.train()` runs unchanged. Its callbacks wait for the driver between updates; the functions that it calls for
generation, reference, values and scores are wrapped by a clock. Everything it offers that costs time and is not part
of the workload is off: checkpointing of gradients, sample tables, logging to trackers, saving.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from workload import Channel, Clock, Job, words

UPDATES = 1000  # more than are ever measured
PRECISION = {"trl": torch.float32, "trl-lora": torch.float32, "trl-bf16": torch.bfloat16}


class Finished(Exception):
    """The driver wants no more updates."""


class Stopwatch(TrainerCallback):
    """Waits for the driver, starts the clock, reports when the update is done."""

    def __init__(self, job: Job, channel: Channel, clock: Clock) -> None:
        self.job, self.channel, self.clock = job, channel, clock
        self.learning_since = 0.0
        self.learning = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._next()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.split["update"] = self.clock.now() - self.learning_since
        self.channel.report(self.clock.measured(len(self.job.prompts) * self.job.response))
        self._next()

    def check_lengths(self, query_responses: torch.Tensor) -> None:
        """Raise unless every response has its full length."""
        wanted = (len(self.job.prompts), len(self.job.prompts[0]) + self.job.response)
        if tuple(query_responses.shape) != wanted:
            raise SystemExit(f"TRL generated {tuple(query_responses.shape)} tokens; wanted {wanted}")

    def phase_of_forward(self, *_: Any, **__: Any) -> str | None:
        """A forward pass without gradients is the reference's; the first one with gradients begins the PPO epochs."""
        if not torch.is_grad_enabled():
            return "reference"
        if not self.learning:
            self.learning, self.learning_since = True, self.clock.now()
        return None

    def _next(self) -> None:
        if not self.channel.wait():
            raise Finished
        self.learning = False
        self.clock.start()


def main() -> None:
    job, channel = Job.load(sys.argv[1]), Channel()
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, folder)
        watch_phases(trainer, job, channel)
        channel.ready("trl")
        try:
            trainer.train()
        except Finished:
            return


def build(job: Job, folder: str) -> PPOTrainer:
    """TRL's trainer with a value model and a reward model of the policy's size, as it wants them."""
    tokenizer, dtype = words(job.vocabulary), PRECISION[job.system]
    torch.manual_seed(job.seed)
    policy = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    policy.config.pad_token_id = tokenizer.pad_token_id
    return PPOTrainer(
        args=config(job, folder),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # its own copy; with adapters, the same weights with the adapters off
        reward_model=classifier(job, dtype),
        value_model=classifier(job, dtype),
        train_dataset=Dataset.from_dict({"input_ids": [list(row) for row in job.prompts]}),
        peft_config=adapters(job) if job.system == "trl-lora" else None,
    )


def classifier(job: Job, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the policy's size with one label and a random head."""
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype)
    model.config.pad_token_id = job.vocabulary - 1
    return model


def adapters(job: Job) -> Any:
    """Those that tether has by default."""
    from peft import LoraConfig

    return LoraConfig(
        r=job.lora_rank, lora_alpha=2 * job.lora_rank, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def config(job: Job, folder: str) -> PPOConfig:
    """The workload in TRL's words. One pass holds a whole minibatch, so that each minibatch is one optimiser step."""
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=len(job.prompts),
        gradient_accumulation_steps=1,
        num_mini_batches=job.minibatches,
        num_ppo_epochs=job.epochs,
        total_episodes=UPDATES * len(job.prompts),
        response_length=job.response,
        stop_token=None,
        temperature=1.0,
        kl_coef=0.05,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=job.device == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job.seed,
    )


def watch_phases(trainer: PPOTrainer, job: Job, channel: Channel) -> None:
    """Put the clock round the functions that the trainer calls, where it looks them up."""
    clock = Clock(job.device)
    watch = Stopwatch(job, channel, clock)
    trainer.add_callback(watch)

    def phase_of_reward(model: PreTrainedModel, *_: Any) -> str:
        return "score" if model is trainer.reward_model else "reference"

    def generate(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with clock.phase("generate"):
            query_responses, logits = batch_generation(*args)
        watch.check_lengths(query_responses)
        return query_responses, logits

    batch_generation, ppo_trainer.batch_generation = ppo_trainer.batch_generation, generate
    ppo_trainer.forward = clock.timed(ppo_trainer.forward, watch.phase_of_forward)
    ppo_trainer.get_reward = clock.timed(ppo_trainer.get_reward, phase_of_reward)


if __name__ == "__main__":
    main()
