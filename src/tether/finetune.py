"""Demonstrations → SFT checkpoint: the policy's start, and the post that the string is tied to.

    base, demonstrations ─▶ token ids ─▶ those held out, those learned ─ Student ─▶ Finetuned: model, manifest, report

The loss on what is held out is measured before and after. The result is an ordinary Hugging Face folder with
`tether_sft.json`. Read next: `sft_fit.py`, the steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether import __version__
from tether.data import Demonstrations
from tether.demonstrations import Encoded, Example, encode_demonstrations
from tether.loading import (
    Precision,
    Source,
    context_length,
    lacking,
    load_causal_lm,
    load_tokenizer,
    require_embedded,
    stop_tokens,
)
from tether.sft_checkpoint import MANIFEST_FILE, SFTManifest, whole_folder
from tether.sft_fit import Finetuning, Progress, Student
from tether.streams import permutation

HELD_OUT_MOST = 256  # demonstrations; more would cost time and tell no more


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
    encoded = _encoded(demonstrations, words, model, knobs)
    aside, learned = _held_out(encoded.examples, knobs)
    student = Student(model, knobs)
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


def _encoded(
    demonstrations: Demonstrations, words: PreTrainedTokenizerBase, model: PreTrainedModel, knobs: Finetuning
) -> Encoded:
    """The demonstrations in token ids that the model can read."""
    limits = [limit for limit in (knobs.max_tokens, context_length(model)) if limit is not None]
    encoded = encode_demonstrations(
        demonstrations, words, stop_tokens(model, words), max_tokens=min(limits, default=None), too_long=knobs.too_long
    )
    require_embedded((example.ids for example in encoded.examples), lacking(words, model), "demonstration")
    return encoded


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
