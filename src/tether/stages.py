"""The stages before PPO: `tether sft`, demonstrations → SFT checkpoint; `tether reward`, preferences → reward model.

Each reads data in TRL's formats (`data.py`), shows its progress, writes an ordinary Hugging Face folder whole or not at
all, and says what came of it, with `--json` for programs. Read next: `finetune.py`, `reward_stage.py`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from tether.config import PreferenceSettings
from tether.data import read_demonstrations, read_preferences
from tether.errors import ConfigError, InputError
from tether.finetune import Finetuned, Finetuning, finetune
from tether.loading import Precision, layer_count
from tether.phases import phases
from tether.prompts import TooLong
from tether.recipe_files import load_recipe
from tether.reward_model import MANIFEST_FILE as REWARD_MANIFEST
from tether.reward_stage import LearnedReward, fit_pairs, learn_preferences, own_replies, report_on_pairs
from tether.reward_training import RewardTraining
from tether.session import prepare_process
from tether.sft_checkpoint import MANIFEST_FILE as SFT_MANIFEST
from tether.sft_checkpoint import require_free
from tether.terminal import console_for_output
from tether.world_judges import world_pairs
from tether.worlds.world import WorldName, open_world

REPORT_FILE = "report.json"
HOLDOUT_FOLDER = "holdout"
"""Where the twin stands, within the reward model's folder."""
OWN_PREFERENCES = PreferenceSettings(epochs=2, learning_rate=3e-4, batch_pairs=8)
"""How preferences of one's own are learned where nothing is said; only what concerns learning is read."""


# ── tether sft ──────────────────────────────────────────────────────────────────────────────────────────────────────
def main_sft(
    model: str,
    data: str,
    out: Path,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    limit: int | None = None,
    chat_template: Path | None = None,
    mode: Literal["full", "lora"] = "full",
    lora_rank: int = 16,
    epochs: int = 1,
    learning_rate: float | None = None,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    warmup: float = 0.05,
    batch_size: int = 16,
    max_tokens: int | None = None,
    too_long: TooLong = "error",
    packing: bool = True,
    heldout: float = 0.05,
    dtype: Precision = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Make an SFT checkpoint: the policy's start and its reference.

    model: folder or hub name of a causal LM. data: messages, or prompt and completion: .jsonl, .json, .csv, .parquet,
    or ORG/NAME on the hub, with split, subset and limit (rows read). prompt_column, completion_column: what they are
    called; `instruction+input` joins two. out: folder of the checkpoint. chat_template: a Jinja file, for a tokenizer
    that has none. mode: all weights, or adapters of lora_rank that are folded in. learning_rate: at its peak; 5e-5
    usual in full, 2e-4 in lora. warmup: share of the steps that it rises. batch_size: demonstrations in a step.
    max_tokens: of one demonstration. too_long: what happens to a longer one. packing: several in a row; changes the
    speed alone. heldout: share that is measured and not learned. json: print the report as one JSON object.
    """
    prepare_process()
    console = Console(stderr=True) if json else console_for_output()
    require_free(out, SFT_MANIFEST, "SFT checkpoint of tether")
    knobs = Finetuning(
        mode=mode, lora_rank=lora_rank, epochs=epochs, learning_rate=learning_rate, schedule=schedule, warmup=warmup,
        batch_size=batch_size, max_tokens=max_tokens, too_long=too_long, packing=packing, heldout=heldout, seed=seed,
    )  # fmt: skip
    template = None if chat_template is None else _template(chat_template)
    shown = read_demonstrations(
        data, split=split, subset=subset, prompt_column=prompt_column, completion_column=completion_column, limit=limit
    )
    console.print(f"{len(shown)} demonstrations from {data}", soft_wrap=True)
    with phases(console) as tell:
        made = finetune(
            model, shown, knobs, chat_template=template, dtype=dtype,
            progress=lambda done, total, loss: tell("learning", done, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    made.save_pretrained(out)
    if json:
        print(jsonlib.dumps({"out": str(out), **made.report.as_dict()}))
    _tell_sft(made, out, console)


def _template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"cannot read the chat template {path}: {fault}; wanted a Jinja file in UTF-8") from fault


def _tell_sft(made: Finetuned, out: Path, console: Console) -> None:
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
    _tell_warnings(report.warnings, console)
    console.print(f"wrote {out}", soft_wrap=True)


# ── tether reward ───────────────────────────────────────────────────────────────────────────────────────────────────
def main_reward(
    out: Path,
    model: str | None = None,
    data: str | None = None,
    world: WorldName | None = None,
    holdout: bool = False,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    limit: int | None = None,
    too_long: TooLong = "error",
    heldout: float = 0.2,
    top_layers: int | None = None,
    all_weights: bool = False,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_pairs: int | None = None,
    reference: str | None = None,
    reference_samples: int = 128,
    max_new_tokens: int = 64,
    dtype: Precision = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train a reward model on comparisons, and say what it is worth.

    out: folder of the reward model, with its report.json. model: the checkpoint whose body it takes, best the SFT
    checkpoint. data: prompt, chosen and rejected, or chosen and rejected that begin with the prompt, with split,
    subset, limit and the columns' names. world: in place of data, pairs sampled there and labelled by its gold scorer.
    holdout: train the twin too, which is never optimised; each learns one half. heldout: without it, the share that is
    measured. top_layers: trained above a frozen trunk (6, or all of a smaller model); all_weights: everything. epochs
    (2), learning_rate at the start (3e-4) and batch_pairs (8): of a world, by default its recipe's.
    reference: the checkpoint on whose replies the score gets mean 0 and standard deviation 1; by default the model.
    reference_samples: how many, of max_new_tokens; 0 takes the responses of the pairs. json: print one JSON object.
    """
    prepare_process()
    console = Console(stderr=True) if json else console_for_output()
    if (data is None) == (world is None) or (data is not None and model is None):
        raise ConfigError("wanted --model M --data FILE, or --world nano or smollm2, and not both")
    require_free(out, REWARD_MANIFEST, "reward model of tether")
    base, usual = model or "", OWN_PREFERENCES
    if world is not None:
        place, settings = open_world(world), load_recipe(world).with_seed(seed)
        base, usual = model or str(place.model), settings.preferences
        pairs, samples = world_pairs(place, settings, console), 0
    else:
        pairs = read_preferences(
            str(data), split=split, subset=subset, prompt_column=prompt_column, chosen_column=chosen_column,
            rejected_column=rejected_column, limit=limit,
        )  # fmt: skip
        pairs, samples = fit_pairs(pairs, base, too_long), reference_samples
        console.print(f"{len(pairs)} comparisons from {data}", soft_wrap=True)
    _tell_warnings(report_on_pairs(pairs).warnings, console)
    said = {"epochs": epochs, "learning_rate": learning_rate, "batch_pairs": batch_pairs, "seed": seed}
    knobs = _training(said, usual, None if all_weights else top_layers or _layers(base, usual))
    with phases(console) as tell:
        replies = None
        if samples:
            replies = own_replies(
                reference or base, pairs.prompts, samples, max_new_tokens=max_new_tokens, seed=seed, dtype=dtype,
                progress=lambda done, total: tell("reference replies", done, total),
            )  # fmt: skip
        learned = learn_preferences(
            pairs, base, knobs, heldout=heldout, holdout=holdout, reference=replies, dtype=dtype,
            progress=lambda role, done, total, loss: tell(f"{role} model", done, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    _save_reward(learned, out)
    if json:
        print(jsonlib.dumps({"out": str(out), **learned.as_dict()}))
    _tell_reward(learned, out, console)


def _layers(base: str, usual: PreferenceSettings) -> int | None:
    """As many as are usual, or all above the trunk that the model has; None where all weights are usual."""
    return None if usual.top_layers is None else min(usual.top_layers, layer_count(base))


def _training(said: Mapping[str, int | float | None], usual: PreferenceSettings, layers: int | None) -> RewardTraining:
    """The knobs that were said, and the usual ones for the rest."""
    base = RewardTraining(layers, usual.epochs, usual.learning_rate, usual.batch_pairs)
    return replace(base, **{name: value for name, value in said.items() if value is not None})  # type: ignore[arg-type]


def _save_reward(learned: LearnedReward, out: Path) -> None:
    learned.reward.save_pretrained(out)
    if learned.holdout is not None:
        learned.holdout.save_pretrained(out / HOLDOUT_FOLDER)
    (out / REPORT_FILE).write_text(jsonlib.dumps(learned.as_dict(), indent=2) + "\n", "utf-8")


def _tell_reward(learned: LearnedReward, out: Path, console: Console) -> None:
    console.print(learned.report.line("reward"), soft_wrap=True)
    if learned.holdout_report is not None:
        console.print(learned.holdout_report.line("holdout"), soft_wrap=True)
    _tell_warnings(learned.report.warnings, console)
    console.print(f"wrote {out}", soft_wrap=True)


# ── both ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _tell_warnings(warnings: tuple[str, ...], console: Console) -> None:
    for warning in warnings:
        console.print(f"  warning: {warning}", soft_wrap=True)
