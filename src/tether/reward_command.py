"""`tether reward`: preferences → reward model with its scale and its report, and its twin where one is wanted.

Reads data in TRL's formats (`data.py`), or samples comparisons in a world; shows its progress, writes an ordinary
Hugging Face folder whole or not at all, and says what came of it, with `--json` for programs. Read next:
`reward_stage.py`.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console

from tether.batch import Prompt
from tether.data import read_preferences
from tether.errors import ConfigError
from tether.loading import SMALL, Precision, layer_count, parameter_count
from tether.phases import Phases, phases
from tether.preferences import Pairs
from tether.prompts import TooLong
from tether.recipe_files import load_recipe
from tether.reward_fit import RewardTraining
from tether.reward_model import MANIFEST_FILE
from tether.reward_stage import LearnedReward, fit_pairs, learn_preferences, own_replies, report_on_pairs, split_off
from tether.runtime.interrupt import to_the_end
from tether.session import prepare_process
from tether.sft_checkpoint import require_free
from tether.terminal import console_beside, print_warnings
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

OF_DATA = (
    "split", "subset", "prompt_column", "chosen_column", "rejected_column", "limit", "too_long", "reference",
    "reference_samples", "max_new_tokens",
)  # fmt: skip
"""Flags that say something of comparisons of one's own alone."""


@dataclass(frozen=True)
class Flags:
    """Flags of `tether reward`."""

    out: Path
    """The folder of the reward model, with its report.json."""
    model: str | None = None
    """The checkpoint whose body it takes, best the SFT checkpoint: folder or hub name."""
    data: str | None = None
    """Prompt, chosen and rejected, or chosen and rejected that begin with the prompt: a file, or ORG/NAME."""
    world: WorldName | None = None
    """In place of data, pairs sampled there and labelled by its gold scorer."""
    holdout: bool = False
    """Train the twin too, which is never optimised; each learns one half and is measured on the other's."""
    split: str | None = None
    """Split of a hub data set, as train."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    prompt_column: str = "prompt"
    """What the prompt's column is called; `instruction+input` joins two."""
    chosen_column: str = "chosen"
    """What the better answer's column is called."""
    rejected_column: str = "rejected"
    """What the worse answer's column is called."""
    limit: int | None = None
    """Rows to read at most; none = all."""
    too_long: TooLong = "error"
    """What happens to pairs beyond the context: an error, left out, or cut on the left."""
    heldout: float = 0.2
    """Without the twin, the share that is measured and not learned; usual 0.05 to 0.2."""
    top_layers: int | None = None
    """Layers trained above a frozen trunk; none = 6, and all weights of a body below 10 million."""
    all_weights: bool = False
    """Train everything, whatever the body's size."""
    epochs: int | None = None
    """Passes over the pairs; none = 2, or as many as `validation` chooses; usual 1 to 4."""
    learning_rate: float | None = None
    """Adam's; none = 3e-4, and 1e-3 below 10 million weights; usual 1e-5 to 1e-3."""
    batch_pairs: int | None = None
    """Pairs in a step; none = 8; usual 8 to 64. Of a world these four are, by default, its recipe's."""
    validation: float | None = None
    """Share of the pairs that chooses the number of passes; none = 0.2 below 10 million weights or 500
    pairs where `epochs` is not said, else 0: the passes are made as said, and the learning rate falls to 0."""
    reference: str | None = None
    """The checkpoint on whose replies the score gets mean 0 and standard deviation 1; none = the model."""
    reference_samples: int = 128
    """How many of them; 0 takes the responses of the pairs; usual 64 to 512."""
    max_new_tokens: int = 64
    """Of such a reply, at most."""
    dtype: Precision = "auto"
    """Precision of the weights; auto = bfloat16 where the machine gains by it."""
    seed: int = 0
    """Of the head, the pairs' order and the held-out share."""
    json: bool = False
    """Print the report as one JSON object."""


def main(flags: Flags) -> None:
    """Train a reward model on comparisons, and say what it is worth."""
    prepare_process()
    console = console_beside(flags.json)
    _check(flags)
    require_free(flags.out, MANIFEST_FILE, "reward model of tether")
    given = _of_file(flags, console) if flags.world is None else _of_world(flags.world, flags, console)
    print_warnings(report_on_pairs(given.pairs).warnings, console)
    learned = _learn(flags, given, console)
    _save(learned, flags.out)
    if flags.json:
        print(jsonlib.dumps({"out": str(flags.out), **learned.as_dict()}))
    _tell(learned, flags.out, console)


def _check(flags: Flags) -> None:
    """Raise ConfigError where the flags leave open what is learned, or what the score is normalised on."""
    if (flags.data is None) == (flags.world is None) or (flags.data is not None and flags.model is None):
        raise ConfigError("wanted --model M --data FILE, or --world nano or smollm2, and not both")
    usual = {field.name: field.default for field in fields(flags)}
    idle = [name for name in OF_DATA if flags.world is not None and getattr(flags, name) != usual[name]]
    if idle:
        raise ConfigError(
            f"--world {flags.world} samples its own comparisons and is normalised on their responses; leave out "
            + ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        )
    if flags.all_weights and flags.top_layers is not None:
        raise ConfigError(f"got --all-weights and --top-layers {flags.top_layers}; wanted one of them")
    if flags.reference_samples == 1 or flags.reference_samples < 0:
        raise ConfigError(
            f"reference_samples is {flags.reference_samples}; wanted 2 or more, or 0 for the responses of the pairs"
        )


@dataclass(frozen=True)
class _Given:
    """Comparisons to learn from, the body that learns them, and how that is usually done."""

    pairs: Pairs
    base: str
    usual: RewardTraining
    samples: int
    """Replies of the reference that the score is normalised on; 0 takes the responses of the pairs."""


def _of_world(world: WorldName, flags: Flags, console: Console) -> _Given:
    place, settings = open_world(world), load_recipe(world).with_seed(flags.seed)
    knobs = settings.preferences
    usual = RewardTraining(knobs.top_layers, knobs.epochs, knobs.learning_rate, knobs.batch_pairs)
    return _Given(world_pairs(place, settings, console), flags.model or str(place.model), usual, 0)


def _of_file(flags: Flags, console: Console) -> _Given:
    base = str(flags.model)
    read = read_preferences(
        str(flags.data), split=flags.split, subset=flags.subset, limit=flags.limit, prompt_column=flags.prompt_column,
        chosen_column=flags.chosen_column, rejected_column=flags.rejected_column,
    )  # fmt: skip
    pairs = fit_pairs(read, base, flags.too_long)
    given = _Given(pairs, base, usual_for(base, len(pairs)), flags.reference_samples)
    console.print(f"{len(pairs)} comparisons from {flags.data}", soft_wrap=True)
    return given


def usual_for(base: str, pairs: int) -> RewardTraining:
    """How so many preferences of one's own are learned on this body, where nothing is said."""
    small = parameter_count(base) < SMALL
    usual = OWN_SMALL if small else OWN
    if not small and pairs >= FEW_PAIRS:
        return usual
    epochs = min(max(round(MOST_SEEN / max(pairs, 1)), FEWEST_EPOCHS), OWN_SMALL.epochs)
    return replace(usual, epochs=epochs, validation=OWN_SMALL.validation)


def _training(flags: Flags, given: _Given) -> RewardTraining:
    """The knobs that were said, and the usual ones for the rest."""
    passes_said = flags.epochs is not None
    said = {
        "epochs": flags.epochs, "learning_rate": flags.learning_rate, "batch_pairs": flags.batch_pairs,
        "seed": flags.seed, "validation": 0.0 if flags.validation is None and passes_said else flags.validation,
    }  # fmt: skip
    known = {name: value for name, value in said.items() if value is not None}
    layers = None if flags.all_weights else _layers(flags.top_layers, given)
    return replace(given.usual, top_layers=layers, **known)  # type: ignore[arg-type]


def _layers(said: int | None, given: _Given) -> int | None:
    """As many as were said, else as are usual or the model has; None where all weights are usual.

    Raises ConfigError where the model has not as many as were said.
    """
    usual = given.usual.top_layers
    if said is None:
        return None if usual is None else min(usual, layer_count(given.base))
    count = layer_count(given.base)
    if not 1 <= said <= count:
        raise ConfigError(f"top_layers is {said} and the model has {count} layers; wanted 1 … {count}")
    return said


def _learn(flags: Flags, given: _Given, console: Console) -> LearnedReward:
    """The reward model and its twin. Where Ctrl-C stops the twin, the model that was finished is written."""
    knobs = _training(flags, given)
    if not flags.holdout:
        split_off(given.pairs, flags.heldout, knobs.seed)  # what is wrong is said before replies are drawn
    finished: list[LearnedReward] = []
    try:
        with phases(console) as tell:
            return learn_preferences(
                given.pairs, given.base, knobs, heldout=flags.heldout, holdout=flags.holdout,
                reference=_replies(flags, given, tell), dtype=flags.dtype, finished=finished.append,
                progress=lambda role, done, total, loss: tell(f"{role} model", done, total, f"loss {loss:.3f}"),
            )  # fmt: skip
    except KeyboardInterrupt:
        if not finished:
            raise
        _save(finished[0], flags.out)
        raise KeyboardInterrupt(f"the reward model was finished and is in {flags.out}; its twin was not") from None


def _replies(flags: Flags, given: _Given, tell: Phases) -> tuple[list[Prompt], list[str]] | None:
    """The reference's own replies; None where the score is normalised on the responses of the pairs."""
    if not given.samples:
        return None
    return own_replies(
        flags.reference or given.base, given.pairs.prompts, given.samples, max_new_tokens=flags.max_new_tokens,
        seed=flags.seed, dtype=flags.dtype, progress=lambda done, total: tell("reference replies", done, total),
    )  # fmt: skip


def _save(learned: LearnedReward, out: Path) -> None:
    with to_the_end(out):
        learned.reward.save_pretrained(out)
        if learned.holdout is not None:
            learned.holdout.save_pretrained(out / HOLDOUT_FOLDER)
        (out / REPORT_FILE).write_text(jsonlib.dumps(learned.as_dict(), indent=2) + "\n", "utf-8")


def _tell(learned: LearnedReward, out: Path, console: Console) -> None:
    console.print(learned.report.line("reward"), soft_wrap=True)
    if learned.holdout_report is not None:
        console.print(learned.holdout_report.line("holdout"), soft_wrap=True)
    print_warnings(learned.report.warnings, console)
    console.print(f"wrote {out}", soft_wrap=True)
