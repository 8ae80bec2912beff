"""The nano world: a small language with known facts, a model that speaks it, and the exact worth of every reply.

    load() ─▶ NanoWorld: an SFT checkpoint, the base it came from, prompts, the gold reward
    gold, proxy(flaw) ─▶ rewards        opinion_pairs() ─▶ probes of sycophancy

The model (a third of a million weights) is trained on first use, half a minute on two cores, and kept in tether's
cache under a digest of all that it depends on. It goes through the same code as any other causal LM: both checkpoints
are ordinary Hugging Face folders. Read next: `nano_grammar` (the language), `nano_gold` (the reward), `nano_build`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tether.errors import ModelError
from tether.places import cache_folder
from tether.worlds.nano_build import Progress, Recipe, build
from tether.worlds.nano_gold import Flaw, Judgement, Proxy, agrees, gold, judge, proxy
from tether.worlds.nano_prompts import OpinionPair, opinion_pairs, split

__all__ = [
    "Flaw",
    "Judgement",
    "NanoWorld",
    "OpinionPair",
    "Proxy",
    "Recipe",
    "agrees",
    "gold",
    "judge",
    "load",
    "opinion_pairs",
    "proxy",
]

MANIFEST = "tether.json"
"""Lies in a finished world: its recipe, and every file's length."""
PLAIN_LINES = 5
"""Lines of progress a stage where no terminal is."""


@dataclass(frozen=True)
class NanoWorld:
    """What a run on this world needs."""

    policy_path: Path
    """Folder of the instruction-tuned checkpoint: the policy's start and the reference."""
    base_path: Path
    """Folder of the checkpoint before instruction tuning: the wrong reference of the lesson's first gotcha."""
    tokenizer: PreTrainedTokenizerFast
    """Word-level, with a chat template; the same in both folders."""
    train_prompts: tuple[str, ...]
    """512 plain strings, to be put through the chat template."""
    heldout_prompts: tuple[str, ...]
    """128 others, which instruction tuning never saw."""
    gold: Callable[[Sequence[str], Sequence[str]], list[float]]
    """(prompts, responses) → the exact worth of each response."""


def load(
    cache: str | Path | None = None, seed: int = 0, progress: bool = True, recipe: Recipe | None = None
) -> NanoWorld:
    """The nano world from the cache, built on first use.

    `cache`: its folder, by default $TETHER_CACHE, else $XDG_CACHE_HOME/tether, else ~/.cache/tether. `seed`: of the
    weights and of what they are trained on; prompts and gold are the same for all seeds. `progress`: say on standard
    error how building goes. `recipe`: other settings of model and training; its seed gives way to `seed`.

    Building happens aside and ends in one rename: an interruption leaves nothing, and of two processes at once the
    slower takes what the faster has made. Raises ModelError where the folder cannot be written or is damaged.
    """
    chosen = replace(recipe or Recipe(), seed=seed)
    root = Path(cache).expanduser() if cache is not None else cache_folder()
    folder = root / f"nano-{chosen.digest}"
    if not folder.exists():
        _install(chosen, folder, progress)
    _require_intact(folder)
    train, heldout = split()
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    return NanoWorld(folder / "sft", folder / "base", tokenizer, train, heldout, gold)


def _install(recipe: Recipe, folder: Path, progress: bool) -> None:
    """Build aside, then rename into place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside,
            _reporter(progress) as report,
        ):
            made = Path(aside) / "world"
            build(recipe, made, report)
            _write_manifest(recipe, made)
            _rename(made, folder)
    except OSError as error:
        raise ModelError(
            f"the nano world could not be written to {folder}: {error}. It takes 4 MB; free them, or set TETHER_CACHE "
            "to a folder that can be written."
        ) from error


def _rename(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, and made the same
            raise


def _write_manifest(recipe: Recipe, folder: Path) -> None:
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.glob("*/*"))}
    (folder / MANIFEST).write_text(json.dumps({"recipe": asdict(recipe), "bytes": sizes}, indent=2) + "\n", "utf-8")


def _require_intact(folder: Path) -> None:
    """Compare the files' lengths with the manifest. Raises ModelError."""
    remedy = f"delete {folder} and run again: it is built anew in half a minute"
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text("utf-8"))["bytes"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the cached nano world has no readable {MANIFEST} ({error}); {remedy}") from error
    for name, wanted in sizes.items():
        got = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if got != wanted:
            raise ModelError(f"the cached nano world is damaged: {name} has {got} bytes, wanted {wanted}; {remedy}")


@contextlib.contextmanager
def _reporter(wanted: bool) -> Iterator[Progress]:
    """A bar on a terminal's standard error, a few plain lines elsewhere, nothing where none is wanted."""
    console = Console(stderr=True)
    if not wanted:
        yield lambda *_: None
    elif not console.is_terminal:
        yield _print_line
    else:
        with Bar(console=console, transient=True) as bar:
            tasks = {}

            def show(stage: str, step: int, steps: int, loss: float) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=steps)
                bar.update(tasks[stage], completed=step, description=f"nano world, {stage}: loss {loss:.2f}")

            yield show


def _print_line(stage: str, step: int, steps: int, loss: float) -> None:
    if step % max(steps // PLAIN_LINES, 1) == 0:
        print(f"nano world, {stage}: step {step} of {steps}, loss {loss:.2f}", file=sys.stderr, flush=True)
