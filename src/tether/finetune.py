"""Demonstrations → SFT checkpoint: the policy's start, and the post that the string is tied to.

    L(θ) = −Σ log π_θ(y_t|s_t) / (number of learned tokens)        over a step's batch, nats per token

Only what the assistant says is learned. A step is `batch_size` demonstrations however they are laid out: packed into
rows (`demonstrations.py`), where the model reads a packed row as its examples alone, else padded, the loss and its
gradient are the same, since they are divided by the learned tokens of the whole step. Weights in half precision have
float32 masters (`optimiser.py`). Dropout is off. The result is an ordinary Hugging Face folder with `tether_sft.json`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether import __version__
from tether.config import UpdateSettings
from tether.data import Demonstrations
from tether.demonstrations import Encoded, Example, bins, encode_demonstrations, lay_out, packs, read_packed
from tether.errors import InputError, NonFiniteError
from tether.heads import OutputHead, selected_logprobs
from tether.loading import (
    AGREEMENT,
    Precision,
    Source,
    context_length,
    lacking,
    load_causal_lm,
    load_tokenizer,
    probe,
    require_embedded,
    stop_tokens,
)
from tether.modes import LoraMode
from tether.optimiser import Optimiser
from tether.prompts import TooLong
from tether.reward_model import length_groups
from tether.sft_checkpoint import MANIFEST_FILE, SFTManifest, whole_folder
from tether.streams import permutation

TOKENS_PER_PASS = 4096  # padded positions of one forward and backward pass
DEFAULT_RATES = {"full": 5e-5, "lora": 2e-4}
ADAM_EPSILON = 1e-8
HELD_OUT_MOST = 256  # demonstrations; more would cost time and tell no more

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
        if self.learning_rate is not None and not self.learning_rate > 0.0:
            wrong.append(f"learning_rate={self.learning_rate}; wanted more than 0")
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


@dataclass(frozen=True)
class FinetuneReport:
    """What the training did."""

    demonstrations: int
    """Learned from."""
    heldout: int
    """Measured, and not learned from."""
    learned_too: int
    """Of these, such as were learned from all the same, since the data holds them more than once."""
    dropped: int
    shortened: int
    """Demonstrations that were too long: left out, and cut on the left."""
    learned_tokens: int
    """In one epoch."""
    steps: int
    packed: bool
    """Whether several stood in a row; False too where the model does not read such rows as its examples alone."""
    first_loss: float
    last_loss: float
    """Of the first and the last step, nats per learned token."""
    heldout_loss_before: float | None
    heldout_loss_after: float | None
    """On what is held out, nats per learned token; None where nothing is."""
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before a policy is tied to this checkpoint."""
        before, after = self.heldout_loss_before, self.heldout_loss_after
        if before is None or after is None:
            return ("nothing was held out, so nobody knows what was learned and what was learned by heart",)
        found = []
        if after > before:
            found.append(
                f"the held-out loss rose from {before:.3f} to {after:.3f}: use fewer epochs, a lower learning rate, or "
                "more demonstrations"
            )
        if self.learned_too:
            found.append(
                f"{self.learned_too} of the {self.heldout} held-out demonstrations stand among the learned ones too: "
                "the held-out loss is lower than on new ones. Leave out what stands twice"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Finetuned:
    """An SFT checkpoint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: SFTManifest
    report: FinetuneReport

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder with the tokenizer and the manifest, whole or not at all.

        Raises ModelError where something that is no SFT checkpoint of tether stands there, or it cannot be written.
        """
        with whole_folder(Path(folder), MANIFEST_FILE, "SFT checkpoint of tether") as aside:
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            self.manifest.save(aside)


def finetune(
    base: Source,
    demonstrations: Demonstrations,
    settings: Finetuning | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """An SFT checkpoint that starts from the causal LM `base` and learns these demonstrations.

    `chat_template`: given to the tokenizer in place of its own, and saved with it.

    Raises InputError where a demonstration is too long or cannot be written, ModelError where `base` is no causal LM,
    NonFiniteError where a gradient is not finite.
    """
    knobs, started = settings or Finetuning(), time.perf_counter()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_causal_lm(base, dtype, place)
    words = load_tokenizer(base, tokenizer, model)
    if chat_template is not None:
        words = copy.deepcopy(words)
        words.chat_template = chat_template
    limits = [limit for limit in (knobs.max_tokens, context_length(model)) if limit is not None]
    encoded = encode_demonstrations(
        demonstrations, words, stop_tokens(model, words), max_tokens=min(limits, default=None), too_long=knobs.too_long
    )
    require_embedded((example.ids for example in encoded.examples), lacking(words, model), "demonstration")
    aside, learned = _held_out(encoded.examples, knobs)
    student = _Student(model, knobs)
    before = student.measure(aside)
    losses = student.learn(learned, progress)
    after = student.measure(aside)
    report = _report(encoded, aside, learned, losses, (before, after), student.packed, time.perf_counter() - started)
    manifest = SFTManifest(
        base=str(base) if isinstance(base, str | Path) else base.name_or_path or type(base).__name__,
        data={**demonstrations.origin, "digest": demonstrations.digest},
        settings={**asdict(knobs), "learning_rate": knobs.peak, "dtype": str(model.dtype).removeprefix("torch.")},
        report=report.as_dict(),
        version=__version__,
    )
    return Finetuned(student.finished(), words, manifest, report)


def _held_out(examples: Sequence[Example], knobs: Finetuning) -> tuple[list[Example], list[Example]]:
    """Those that are measured and those that are learned; none is measured where that would leave none to learn."""
    count = min(math.ceil(knobs.heldout * len(examples)), HELD_OUT_MOST)
    if count >= len(examples):
        count = 0
    order: list[int] = permutation(knobs.seed, "demonstrations held out", len(examples)).tolist()
    aside = set(order[:count])
    chosen = ([], [])  # type: tuple[list[Example], list[Example]]
    for place, example in enumerate(examples):
        chosen[place not in aside].append(example)
    return chosen


class _Student:
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


def _report(
    encoded: Encoded,
    aside: Sequence[Example],
    learned: Sequence[Example],
    losses: Sequence[float],
    heldout: tuple[float | None, float | None],
    packed: bool,
    seconds: float,
) -> FinetuneReport:
    known = {example.ids for example in learned}
    return FinetuneReport(
        demonstrations=len(learned),
        heldout=len(aside),
        learned_too=sum(example.ids in known for example in aside),
        dropped=encoded.dropped,
        shortened=encoded.shortened,
        learned_tokens=sum(example.learned_tokens for example in learned),
        steps=len(losses),
        packed=packed,
        first_loss=losses[0],
        last_loss=losses[-1],
        heldout_loss_before=heldout[0],
        heldout_loss_after=heldout[1],
        seconds=seconds,
    )
