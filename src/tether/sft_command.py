"""`tether sft`: demonstrations → SFT checkpoint, the policy's start and its reference.

Reads data in TRL's formats (`data.py`), shows its progress, writes an ordinary Hugging Face folder whole or not at all,
and says what came of it, with `--json` for programs. Read next: `finetune.py`.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from tether.data import read_demonstrations
from tether.errors import InputError
from tether.finetune import Finetuned, finetune
from tether.loading import Precision
from tether.phases import phases
from tether.prompts import TooLong
from tether.runtime.interrupt import to_the_end
from tether.session import prepare_process
from tether.sft_checkpoint import MANIFEST_FILE, require_free
from tether.sft_fit import Finetuning
from tether.terminal import console_beside, print_warnings


@dataclass(frozen=True)
class Flags:
    """Flags of `tether sft`."""

    model: str
    """Folder or hub name of a causal LM."""
    data: str
    """Messages, or prompt and completion: .jsonl, .json, .csv, .parquet and others, or ORG/NAME on the hub."""
    out: Path
    """The folder of the checkpoint."""
    split: str | None = None
    """Split of a hub data set, as train."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    prompt_column: str = "prompt"
    """What the prompt's column is called; `instruction+input` joins two."""
    completion_column: str = "completion"
    """What the answer's column is called."""
    limit: int | None = None
    """Rows to read at most; none = all."""
    chat_template: Path | None = None
    """A Jinja file, for a tokenizer that has no chat template."""
    mode: Literal["full", "lora"] = "full"
    """All weights, or adapters that are folded in at the end."""
    lora_rank: int = 16
    """Of the adapters; usual 8 to 64."""
    epochs: int = 1
    """Passes over the demonstrations; usual 1 to 3."""
    learning_rate: float | None = None
    """Adam's at its peak; none = 5e-5 in full and 2e-4 in lora; usual 1e-5 to 1e-3, small models more."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after its rise; constant stays."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; usual 0 to 0.1."""
    batch_size: int = 16
    """Demonstrations in a step; usual 8 to 128."""
    max_tokens: int | None = None
    """Of one demonstration; none = the model's context."""
    too_long: TooLong = "error"
    """What happens to a longer one: an error, left out, or cut on the left."""
    packing: bool = True
    """Several demonstrations in a row; changes the speed alone."""
    heldout: float = 0.05
    """Share that is measured and not learned; usual 0.02 to 0.1."""
    dtype: Precision = "auto"
    """Precision of the weights; auto = bfloat16 where the machine gains by it."""
    seed: int = 0
    """Of the order, the held-out share and the adapters."""
    json: bool = False
    """Print the report as one JSON object."""

    @property
    def training(self) -> Finetuning:
        """How the checkpoint is made. Raises InputError where that is out of bounds."""
        return Finetuning(
            mode=self.mode, lora_rank=self.lora_rank, epochs=self.epochs, learning_rate=self.learning_rate,
            schedule=self.schedule, warmup=self.warmup, batch_size=self.batch_size, max_tokens=self.max_tokens,
            too_long=self.too_long, packing=self.packing, heldout=self.heldout, seed=self.seed,
        )  # fmt: skip


def main(flags: Flags) -> None:
    """Make an SFT checkpoint: the policy's start and its reference."""
    prepare_process()
    console = console_beside(flags.json)
    require_free(flags.out, MANIFEST_FILE, "SFT checkpoint of tether")
    made = _finetuned(flags, console)
    with to_the_end(flags.out):
        made.save_pretrained(flags.out)
    if flags.json:
        print(jsonlib.dumps({"out": str(flags.out), **made.report.as_dict()}))
    _tell(made, flags.out, console)


def _finetuned(flags: Flags, console: Console) -> Finetuned:
    training = flags.training
    template = None if flags.chat_template is None else _template(flags.chat_template)
    shown = read_demonstrations(
        flags.data, split=flags.split, subset=flags.subset, limit=flags.limit,
        prompt_column=flags.prompt_column, completion_column=flags.completion_column,
    )  # fmt: skip
    console.print(f"{len(shown)} demonstrations from {flags.data}", soft_wrap=True)
    with phases(console) as tell:
        return finetune(
            flags.model, shown, training, chat_template=template, dtype=flags.dtype,
            progress=lambda done, total, loss: tell("learning", done, total, f"loss {loss:.3f}"),
        )  # fmt: skip


def _template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"cannot read the chat template {path}: {fault}; wanted a Jinja file in UTF-8") from fault


def _tell(made: Finetuned, out: Path, console: Console) -> None:
    report = made.report
    lost = [(report.dropped, "left out"), (report.shortened, "cut on the left")]
    notes = "".join(f", {number} {words} as too long" for number, words in lost if number)
    layout = "packed" if report.packed else "padded"
    console.print(
        f"learned {report.demonstrations} demonstrations in {report.steps} steps, {layout}"
        f"{notes}: {report.learned_tokens} tokens an epoch, {report.seconds:.0f} s",
        soft_wrap=True,
    )
    if report.heldout_loss_before is not None and report.heldout_loss_after is not None:
        console.print(
            f"held-out loss {report.heldout_loss_before:.3f} → {report.heldout_loss_after:.3f} nats per token "
            f"({report.heldout} demonstrations)",
            soft_wrap=True,
        )
    if made.tokenizer.chat_template is None:
        console.print("the checkpoint has no chat template: it reads and answers plain text", soft_wrap=True)
    print_warnings(report.warnings, console)
    console.print(f"wrote {out}", soft_wrap=True)
