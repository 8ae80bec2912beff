"""SFT checkpoints: how one is marked, and how a base model is told from one.

The string is tied to the SFT checkpoint. Tied to a base model it holds the policy to text that does not answer, and K
is measured from the wrong post. `tether_sft.json` beside the weights marks what `tether sft` wrote; a chat template
marks what others instructed. Read next: `finetune.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tether.errors import ModelError
from tether.loading import Source

MANIFEST_FILE = "tether_sft.json"
NANO_MANIFEST = "tether.json"
"""Lies beside the two checkpoints of the nano world, `base` and `sft`."""


@dataclass(frozen=True)
class SFTManifest:
    """What is known of how an SFT checkpoint was made."""

    base: str
    """The model that it started from."""
    data: Mapping[str, object] = field(default_factory=dict)
    """Where the demonstrations come from, how many, and their digest."""
    settings: Mapping[str, object] = field(default_factory=dict)
    report: Mapping[str, object] = field(default_factory=dict)
    """Loss before and after, in nats per learned token, and what else was measured."""
    version: str = ""
    """Of tether."""

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> SFTManifest | None:
        """The folder's manifest, None where it has none. Raises ModelError where it cannot be read."""
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            return None
        try:
            return SFTManifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as fault:
            raise ModelError(
                f"{path} is no manifest of an SFT checkpoint ({fault}); train it again or remove it"
            ) from fault


def require_sft(source: Source, tokenizer: PreTrainedTokenizerBase | None = None, *, allow_base: bool = False) -> None:
    """Raise ModelError where the source looks like a base model and no base model is asked for.

    An SFT checkpoint is one that `tether sft` wrote, one whose tokenizer (or the one given) has a chat template, or
    the instructed checkpoint of the nano world, whose base is none though it has the template. `source` is a folder, a
    name on the hub, or a model, of which the folder that it was read from is looked at.
    """
    if allow_base or is_sft(source, tokenizer):
        return
    name = type(source).__name__ if isinstance(source, PreTrainedModel) else repr(str(source))
    raise ModelError(
        f"{name} looks like a base model: it has no chat template and no {MANIFEST_FILE}. The policy starts from, and "
        "is tied to, an SFT checkpoint: make one with `tether sft --model M --data FILE --out DIR`, or pass allow_base "
        "if this one is meant"
    )


def is_sft(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
    """Whether the source is marked as an SFT checkpoint, or looks like one."""
    place = source.name_or_path if isinstance(source, PreTrainedModel) else str(source)
    if place and Path(place).is_dir():
        if (Path(place).resolve().parent / NANO_MANIFEST).is_file():
            return Path(place).resolve().name == "sft"
        if (Path(place) / MANIFEST_FILE).is_file():
            return True
    elif not isinstance(source, PreTrainedModel) and _marked_on_hub(place):
        return True
    if tokenizer is None and not isinstance(source, PreTrainedModel):
        tokenizer = _tokenizer(place)
    return tokenizer is not None and tokenizer.chat_template is not None


def _marked_on_hub(name: str) -> bool:
    try:
        return cached_file(name, MANIFEST_FILE, _raise_exceptions_for_missing_entries=False) is not None
    except (OSError, ValueError):
        return False  # the tokenizer is asked next, and says what cannot be read


def _tokenizer(place: str) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer; None where it has none, which the loader of the policy complains about."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return tokenizer


def require_free(target: Path, mark: str, what: str) -> None:
    """Raise ModelError where the target holds something else than `what`, which the file `mark` is known by."""
    if target.is_file() or (target.exists() and not (target / mark).is_file() and any(target.iterdir())):
        raise ModelError(f"{target} is there already and holds no {what}; choose another folder")


@contextmanager
def whole_folder(target: Path, mark: str, what: str) -> Iterator[Path]:
    """A folder to write into, which takes the target's place in one rename, or leaves nothing.

    Raises ModelError as `require_free` does, and where the folder cannot be written.
    """
    require_free(target, mark, what)
    aside, old = (target.with_name(f".{target.name}.{part}") for part in ("part", "old"))
    try:
        _recover(target, old)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            target.rename(old)
        aside.rename(target)
    except OSError as fault:
        raise ModelError(f"{target} cannot be written: {fault}; free space, or choose another folder") from fault
    finally:
        _recover(target, old)
        shutil.rmtree(aside, ignore_errors=True)


def _recover(target: Path, old: Path) -> None:
    """What was moved out of the way comes back where nothing took its place, and goes where something did."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
