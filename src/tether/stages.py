"""The stages before PPO: `tether sft`, demonstrations → SFT checkpoint; `tether reward`, preferences → reward model.

Each reads data in TRL's formats (`data.py`), shows its progress, writes an ordinary Hugging Face folder whole or not at
all, and says what came of it, with `--json` for programs. Read next: `finetune.py`, `reward_stage.py`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from tether.data import read_demonstrations, read_preferences
from tether.errors import ConfigError, InputError
from tether.finetune import Finetuned, Finetuning, finetune
from tether.loading import SMALL, Precision, layer_count, parameter_count
from tether.phases import phases
from tether.preferences import Pairs
from tether.prompts import TooLong
from tether.recipe_files import load_recipe
from tether.reward_fit import RewardTraining
from tether.reward_model import MANIFEST_FILE as REWARD_MANIFEST
from tether.reward_stage import LearnedReward, fit_pairs, learn_preferences, own_replies, report_on_pairs, split_off
from tether.runtime.interrupt import Interrupt
from tether.session import prepare_process
from tether.sft_checkpoint import MANIFEST_FILE as SFT_MANIFEST
from tether.sft_checkpoint import require_free
from tether.terminal import console_for_output
from tether.world_judges import world_pairs
from tether.worlds.world import WorldName, open_world

REPORT_FILE = "report.json"
HOLDOUT_FOLDER = "holdout"
"""Where the twin stands, within the reward model's folder."""
OWN = RewardTraining(top_layers=6, epochs=2, learning_rate=3e-4, batch_pairs=8)
"""How preferences of one's own are learned where nothing is said."""
OWN_SMALL = RewardTraining(top_layers=None, epochs=40, learning_rate=1e-3, batch_pairs=8, validation=0.2)
"""The same on a body below `SMALL` weights: its lower layers know little that is worth freezing, it needs larger steps,
and how many depends on the pairs."""
MOST_SEEN, FEWEST_EPOCHS = 16_000, 2
"""Where the number of passes is chosen, so many comparisons are seen at most, or so many passes are made."""
FEW_PAIRS = 500
"""Below so many, the number of passes is chosen on any body: two of sixty pairs are fifteen steps."""


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

    Args:
        model: Folder or hub name of a causal LM.
        data: Messages, or prompt and completion: .jsonl, .json, .csv, .parquet and others, or ORG/NAME on the hub.
        out: The folder of the checkpoint.
        split: Split of a hub data set, as train.
        subset: Subset (configuration) of a hub data set.
        prompt_column: What the prompt's column is called; `instruction+input` joins two.
        completion_column: What the answer's column is called.
        limit: Rows to read at most; none = all.
        chat_template: A Jinja file, for a tokenizer that has no chat template.
        mode: All weights, or adapters that are folded in at the end.
        lora_rank: Of the adapters; usual 8 to 64.
        epochs: Passes over the demonstrations; usual 1 to 3.
        learning_rate: Adam's at its peak; none = 5e-5 in full and 2e-4 in lora; usual 1e-5 to 1e-3, small models more.
        schedule: How the learning rate falls to 0 after its rise; constant stays.
        warmup: Share of the steps in which the learning rate rises; usual 0 to 0.1.
        batch_size: Demonstrations in a step; usual 8 to 128.
        max_tokens: Of one demonstration; none = the model's context.
        too_long: What happens to a longer one: an error, left out, or cut on the left.
        packing: Several demonstrations in a row; changes the speed alone.
        heldout: Share that is measured and not learned; usual 0.02 to 0.1.
        dtype: Precision of the weights; auto = bfloat16 where the machine gains by it.
        seed: Of the order, the held-out share and the adapters.
        json: Print the report as one JSON object.
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
    with _to_the_end(out):
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
    validation: float | None = None,
    reference: str | None = None,
    reference_samples: int = 128,
    max_new_tokens: int = 64,
    dtype: Precision = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train a reward model on comparisons, and say what it is worth.

    Args:
        out: The folder of the reward model, with its report.json.
        model: The checkpoint whose body it takes, best the SFT checkpoint: folder or hub name.
        data: Prompt, chosen and rejected, or chosen and rejected that begin with the prompt: a file, or ORG/NAME.
        world: In place of data, pairs sampled there and labelled by its gold scorer.
        holdout: Train the twin too, which is never optimised; each learns one half and is measured on the other's.
        split: Split of a hub data set, as train.
        subset: Subset (configuration) of a hub data set.
        prompt_column: What the prompt's column is called; `instruction+input` joins two.
        chosen_column: What the better answer's column is called.
        rejected_column: What the worse answer's column is called.
        limit: Rows to read at most; none = all.
        too_long: What happens to pairs beyond the context: an error, left out, or cut on the left.
        heldout: Without the twin, the share that is measured and not learned; usual 0.05 to 0.2.
        top_layers: Layers trained above a frozen trunk; none = 6, and all weights of a body below 10 million.
        all_weights: Train everything, whatever the body's size.
        epochs: Passes over the pairs; none = 2, or as many as `validation` chooses; usual 1 to 4.
        learning_rate: Adam's; none = 3e-4, and 1e-3 below 10 million weights; usual 1e-5 to 1e-3.
        batch_pairs: Pairs in a step; none = 8; usual 8 to 64. Of a world these four are, by default, its recipe's.
        validation: Share of the pairs that chooses the number of passes; none = 0.2 below 10 million weights or 500
            pairs where `epochs` is not said, else 0: the passes are made as said, and the learning rate falls to 0.
        reference: The checkpoint on whose replies the score gets mean 0 and standard deviation 1; none = the model.
        reference_samples: How many of them; 0 takes the responses of the pairs; usual 64 to 512.
        max_new_tokens: Of such a reply, at most.
        dtype: Precision of the weights; auto = bfloat16 where the machine gains by it.
        seed: Of the head, the pairs' order and the held-out share.
        json: Print the report as one JSON object.
    """
    prepare_process()
    console = Console(stderr=True) if json else console_for_output()
    if (data is None) == (world is None) or (data is not None and model is None):
        raise ConfigError("wanted --model M --data FILE, or --world nano or smollm2, and not both")
    if reference_samples == 1 or reference_samples < 0:
        raise ConfigError(
            f"reference_samples is {reference_samples}; wanted 2 or more, or 0 for the responses of the pairs"
        )
    require_free(out, REWARD_MANIFEST, "reward model of tether")
    if world is not None:
        given = _of_world(world, model, seed, console)
    else:
        columns = {"prompt_column": prompt_column, "chosen_column": chosen_column, "rejected_column": rejected_column}
        read = read_preferences(str(data), split=split, subset=subset, limit=limit, **columns)
        given = _of_file(fit_pairs(read, str(model), too_long), str(model), reference_samples)
        console.print(f"{len(given.pairs)} comparisons from {data}", soft_wrap=True)
    _tell_warnings(report_on_pairs(given.pairs).warnings, console)
    said = {"epochs": epochs, "learning_rate": learning_rate, "batch_pairs": batch_pairs, "seed": seed}
    said |= {"validation": 0.0 if validation is None and epochs is not None else validation}
    knobs = _training(said, given.usual, None if all_weights else top_layers or _layers(given.base, given.usual))
    learned = _learn(
        given, knobs, out, console, reference or given.base, max_new_tokens, heldout=heldout, holdout=holdout,
        dtype=dtype,
    )  # fmt: skip
    _save_reward(learned, out)
    if json:
        print(jsonlib.dumps({"out": str(out), **learned.as_dict()}))
    _tell_reward(learned, out, console)


@dataclass(frozen=True)
class _Given:
    """Comparisons to learn from, the body that learns them, and how that is usually done."""

    pairs: Pairs
    base: str
    usual: RewardTraining
    samples: int
    """Replies of the reference that the score is normalised on; 0 takes the responses of the pairs."""


def _learn(
    given: _Given,
    knobs: RewardTraining,
    out: Path,
    console: Console,
    reference: str,
    max_new_tokens: int,
    *,
    heldout: float,
    holdout: bool,
    dtype: Precision,
) -> LearnedReward:
    """The reward model and its twin. Where Ctrl-C stops the twin, the model that was finished is written to `out`."""
    done: list[LearnedReward] = []
    if not holdout:
        split_off(given.pairs, heldout, knobs.seed)  # what is wrong with the share is said before replies are drawn
    try:
        with phases(console) as tell:
            replies = None
            if given.samples:
                replies = own_replies(
                    reference, given.pairs.prompts, given.samples, max_new_tokens=max_new_tokens, seed=knobs.seed,
                    dtype=dtype, progress=lambda done, total: tell("reference replies", done, total),
                )  # fmt: skip
            return learn_preferences(
                given.pairs, given.base, knobs, heldout=heldout, holdout=holdout, reference=replies, dtype=dtype,
                progress=lambda role, done, total, loss: tell(f"{role} model", done, total, f"loss {loss:.3f}"),
                finished=done.append,
            )  # fmt: skip
    except KeyboardInterrupt:
        if not done:
            raise
        _save_reward(done[0], out)
        raise KeyboardInterrupt(f"the reward model was finished and is in {out}; its twin was not") from None


def _of_world(world: WorldName, model: str | None, seed: int, console: Console) -> _Given:
    place, settings = open_world(world), load_recipe(world).with_seed(seed)
    knobs = settings.preferences
    usual = RewardTraining(knobs.top_layers, knobs.epochs, knobs.learning_rate, knobs.batch_pairs)
    return _Given(world_pairs(place, settings, console), model or str(place.model), usual, 0)


def _of_file(pairs: Pairs, base: str, samples: int) -> _Given:
    return _Given(pairs, base, usual_for(base, len(pairs)), samples)


def usual_for(base: str, pairs: int) -> RewardTraining:
    """How so many preferences of one's own are learned on this body, where nothing is said."""
    small = parameter_count(base) < SMALL
    usual = OWN_SMALL if small else OWN
    if not small and pairs >= FEW_PAIRS:
        return usual
    epochs = min(max(round(MOST_SEEN / max(pairs, 1)), FEWEST_EPOCHS), OWN_SMALL.epochs)
    return replace(usual, epochs=epochs, validation=OWN_SMALL.validation)


def _layers(base: str, usual: RewardTraining) -> int | None:
    """As many as are usual, or all above the trunk that the model has; None where all weights are usual."""
    return None if usual.top_layers is None else min(usual.top_layers, layer_count(base))


def _training(said: Mapping[str, int | float | None], usual: RewardTraining, layers: int | None) -> RewardTraining:
    """The knobs that were said, and the usual ones for the rest."""
    known = {name: value for name, value in said.items() if value is not None}
    return replace(usual, top_layers=layers, **known)  # type: ignore[arg-type]


def _save_reward(learned: LearnedReward, out: Path) -> None:
    with _to_the_end(out):
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
@contextmanager
def _to_the_end(out: Path) -> Iterator[None]:
    """What was learned is written whole: Ctrl-C counts after the block; a second one at once."""
    with Interrupt(f"writing {out} to the end; once more leaves at once") as stop:
        yield
    if stop.wanted:
        raise KeyboardInterrupt(f"{out} is written")


def _tell_warnings(warnings: tuple[str, ...], console: Console) -> None:
    for warning in warnings:
        console.print(f"  warning: {warning}", soft_wrap=True)
