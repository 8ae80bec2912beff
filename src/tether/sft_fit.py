"""The steps that fit a causal LM to demonstrations.

    L(θ) = −Σ log π_θ(y_t|s_t) / (number of learned tokens)        over a step's batch, nats per token

Only what the assistant says is learned. A step is `batch_size` demonstrations however they are laid out: packed into
rows (`demonstrations.py`), where the model reads a packed row as its examples alone, else padded, the loss and its
gradient are the same, since they are divided by the learned tokens of the whole step. Weights in half precision have
float32 masters (`optimiser.py`). Dropout is off. Knows no file and no report. Read next: `finetune.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.config import UpdateSettings
from tether.demonstrations import Example, bins, lay_out, packs, read_packed
from tether.errors import InputError, NonFiniteError
from tether.heads import OutputHead, selected_logprobs
from tether.loading import AGREEMENT, probe
from tether.modes import LoraMode
from tether.optimiser import Optimiser
from tether.prompts import TooLong
from tether.reward_model import length_groups
from tether.streams import permutation

TOKENS_PER_PASS = 4096  # padded positions of one forward and backward pass
DEFAULT_RATES = {"full": 5e-5, "lora": 2e-4}
ADAM_EPSILON = 1e-8

Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the step's loss in nats per learned token."""


@dataclass(frozen=True)
class Finetuning:
    """How an SFT checkpoint is made."""

    mode: Literal["full", "lora"] = "full"
    """All weights, or adapters that are folded into them at the end."""
    lora_rank: int = 16
    epochs: int = 1
    learning_rate: float | None = None
    """Adam's at its peak; by default 5e-5 in `full` and 2e-4 in `lora`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to 0, or stays."""
    warmup: float = 0.05
    """Share of the steps over which it rises from 0, in a line."""
    batch_size: int = 16
    """Demonstrations in one step."""
    max_tokens: int | None = None
    """Of one demonstration; by default the model's context."""
    too_long: TooLong = "error"
    """What happens to a longer one."""
    packing: bool = True
    """Several demonstrations in a row; changes the speed, not what is learned."""
    heldout: float = 0.05
    """Share of the demonstrations that is measured and not learned."""
    seed: int = 0
    """Of their order and of what is held out."""

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "batch_size": self.batch_size, "lora_rank": self.lora_rank}
        wrong = [f"{name}={value}; wanted 1 or more" for name, value in counts.items() if value < 1]
        wrong += [f"{name}={getattr(self, name)}; wanted 0 ≤ {name} < 1" for name in ("warmup", "heldout")
                  if not 0.0 <= getattr(self, name) < 1.0]  # fmt: skip
        if self.learning_rate is not None and not 0.0 < self.learning_rate < math.inf:
            wrong.append(f"learning_rate={self.learning_rate}; wanted a finite number above 0")
        if self.schedule not in ("cosine", "linear", "constant"):
            wrong.append(f"schedule={self.schedule!r}; wanted 'cosine', 'linear' or 'constant'")
        if self.mode not in DEFAULT_RATES:
            wrong.append(f"mode={self.mode!r}; wanted 'full' or 'lora'")
        if wrong:
            raise InputError("; ".join(wrong))

    @property
    def peak(self) -> float:
        return DEFAULT_RATES[self.mode] if self.learning_rate is None else self.learning_rate

    def rate_share(self, done: float) -> float:
        """The learning rate as a share of its peak, after this share of the steps.

        s/w while s < w, w the warm-up; then with u = (s − w)/(1 − w): ½(1 + cos πu), 1 − u, or 1.
        """
        if done < self.warmup:
            return done / self.warmup
        rest = (done - self.warmup) / (1.0 - self.warmup)
        falling = {"cosine": 0.5 * (1.0 + math.cos(math.pi * rest)), "linear": 1.0 - rest, "constant": 1.0}
        return falling[self.schedule]


class Student:
    """A model that learns, its head, and how rows are laid out for it."""

    def __init__(self, model: PreTrainedModel, knobs: Finetuning) -> None:
        self.knobs, self.model = knobs, model
        self.backbone, self.head = model.base_model, OutputHead.of(model)
        self.packed = knobs.packing and packs(self.backbone, probe(model), AGREEMENT[model.dtype])
        self._adapted = LoraMode(model, knobs.lora_rank) if knobs.mode == "lora" else None

    def parameters(self) -> list[torch.nn.Parameter]:
        if self._adapted is not None:
            return self._adapted.trained()
        return list(self.model.requires_grad_(True).parameters())

    def finished(self) -> PreTrainedModel:
        """The model as it stands, frozen, adapters folded in."""
        if self._adapted is None:
            return self.model.requires_grad_(False)
        merged: PreTrainedModel = self._adapted.adapters.merge_and_unload()
        return merged.requires_grad_(False)

    def learn(self, examples: Sequence[Example], progress: Progress | None) -> list[float]:
        """All epochs. Returns the loss of each step, nats per learned token."""
        settings = UpdateSettings(learning_rate=self.knobs.peak, adam_epsilon=ADAM_EPSILON, max_grad_norm=1.0)
        optimiser = Optimiser({"policy": self.parameters()}, settings)
        batches, losses = list(_batches(examples, self.knobs)), []
        for step, batch in enumerate(batches):
            # The optimiser's own schedule is a line to 0; the share that is missing to this one's rate is asked of it.
            optimiser.set_progress(1.0 - self.knobs.rate_share((step + 1) / (len(batches) + 1)))
            losses.append(self.accumulate(batch, optimiser.collect))
            norm = optimiser.gradient_norm()
            if not bool(torch.isfinite(norm)):
                raise NonFiniteError(f"the gradient of step {step} is {float(norm)}; lower the learning rate")
            optimiser.step(norm)
            if progress is not None:
                progress(step + 1, len(batches), losses[-1])
        return losses

    def accumulate(self, batch: Sequence[Example], collect: Callable[[], None] | None = None) -> float:
        """The batch's loss; its gradients too where they are collected. Divided by the learned tokens of the batch."""
        count = max(sum(example.learned_tokens for example in batch), 1)
        total = 0.0
        for rows in self._passes(batch):
            loss = self._negative_logprobs(rows) / count
            if collect is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                collect()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> float | None:
        """Mean loss over all learned tokens of these, nats per token; None where there is none."""
        return self.accumulate(examples) if examples else None

    def _passes(self, batch: Sequence[Example]) -> Iterator[list[list[Example]]]:
        """Rows of examples, as many at once as TOKENS_PER_PASS allows.

        A packed row is as long as the batch's longest example: no row is wider than it would be padded, so attention,
        which costs its square, costs no more, and fewer rows are read.
        """
        lengths = [len(example) for example in batch]
        capacity = max(lengths) if self.packed else 0
        rows = [[batch[place] for place in places] for places in bins(lengths, capacity)]
        widths = [sum(map(len, row)) for row in rows]
        for group in length_groups(widths, TOKENS_PER_PASS):
            yield [rows[place] for place in group]

    def _negative_logprobs(self, rows: Sequence[Sequence[Example]]) -> Tensor:
        """−Σ log π(y_t|s_t) over the learned tokens."""
        packed = lay_out(rows, self.model.device)
        hidden = read_packed(self.backbone, packed)[:, :-1]
        learned = packed.learned[:, 1:]
        logprobs, _ = selected_logprobs(self.head, hidden[learned], packed.ids[:, 1:][learned])
        return -logprobs.sum()


def _batches(examples: Sequence[Example], knobs: Finetuning) -> Iterator[list[Example]]:
    for epoch in range(knobs.epochs):
        order: list[int] = permutation(knobs.seed, "demonstrations", len(examples), epoch).tolist()
        for start in range(0, len(order), knobs.batch_size):
            yield [examples[place] for place in order[start : start + knobs.batch_size]]
