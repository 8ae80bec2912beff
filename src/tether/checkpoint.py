"""Checkpoints: all that makes a run go on as if it had never stopped, on disk whole or not at all.

    checkpoints/step-000025/weights.safetensors     what trains: policy and value
                            optimiser.safetensors   Adam's moments and counts, float32 masters
                            manifest.json           step, β's controller, settings, digests, sha256 of the two files
                latest                              the name of the one to go on from

Written aside → forced to the disk → renamed → `latest` → the older ones pruned, so that at every moment one whole
checkpoint is there. Knows no run and no room. Read next: `snapshot.py`, `trainer.py`, `session.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.config import CheckpointSettings
from tether.database import to_json
from tether.errors import RunError
from tether.snapshot import Snapshot

FORMAT = 1
"""Goes up with every change of what a checkpoint holds."""
WEIGHTS, OPTIMISER, MANIFEST, LATEST = "weights.safetensors", "optimiser.safetensors", "manifest.json", "latest"
FOLDER = re.compile(r"step-(\d{6,})")
ASIDE, OLD = ".part", ".old"
FULL = {errno.ENOSPC, errno.EDQUOT}
SYSTEM_ERROR = re.compile(r"os error (\d+)")
"""How safetensors names the system's error."""
HASHED_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True)
class Identity:
    """What a run is, beside its state: two snapshots of one run have the same."""

    settings: Mapping[str, object]
    digests: Mapping[str, str]
    """Of what the run reads and does not change: `reference`, `tokenizer`, `reward`, `prompts`."""
    made_by: Mapping[str, object] = field(default_factory=dict)
    """Program, libraries and threads: bits are promised to be equal where these are."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk, its files as they were written."""

    path: Path
    step: int
    beta: Mapping[str, object]
    states: Mapping[str, Mapping[str, object]]
    identity: Identity
    digest: str
    """sha256 of the manifest, and so of everything."""

    def weights(self) -> dict[str, Tensor]:
        """What trains, by name. Raises RunError where a run that goes on has removed it meanwhile."""
        return _load(self.path / WEIGHTS)

    def snapshot(self) -> Snapshot:
        """Everything, read from disk. Raises what `weights` does."""
        return Snapshot(self.step, self.weights(), _load(self.path / OPTIMISER), self.beta, self.states)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, settings: CheckpointSettings | None = None) -> None:
        self.folder = folder
        self.settings = settings or CheckpointSettings()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def save(self, snapshot: Snapshot, identity: Identity, worth: Mapping[int, float] | None = None) -> Path:
        """Write a checkpoint, make it the latest, and prune; returns its folder.

        `worth` is the metric of `settings.best` by step. Where this very checkpoint is the latest and whole, nothing is
        written. Raises RunError where the disk is full or cannot be written; then the former checkpoint is the latest.
        """
        target = self.folder / _name(snapshot.step)
        if self.latest() == snapshot.step and _intact(target):
            return target
        with self._complaints(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self.folder / f".{target.name}{ASIDE}"
            _remove(aside)
            try:
                _write(aside, snapshot, identity)
                self._put_in_place(aside, target)
                self.point_at(snapshot.step)
            finally:
                _remove(aside)
        self._prune(snapshot.step, worth or {})
        return target

    def point_at(self, step: int) -> None:
        """Make the checkpoint of this step the one to go on from."""
        aside = self.folder / (LATEST + ASIDE)
        with self._complaints(self.folder / LATEST):
            aside.write_text(_name(step) + "\n", "utf-8")
            _force(aside)
            aside.replace(self.folder / LATEST)
            _force(self.folder)

    def _put_in_place(self, aside: Path, target: Path) -> None:
        """One rename; what stood there is not the latest whole checkpoint, or it would not be written again."""
        old = self.folder / f".{target.name}{OLD}"
        _remove(old)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        _force(self.folder)
        _remove(old)

    def _prune(self, now: int, worth: Mapping[int, float]) -> None:
        """Remove all but the last ones, the milestones and the best, and what an interruption left behind.

        Checkpoints of later steps belong to a course that the run has left: `latest` was turned back.
        """
        past = [step for step in self.steps() if step <= now]
        kept = {*past[-self.settings.keep :], now}
        if self.settings.milestones:
            kept |= {step for step in past if step % self.settings.milestones == 0}
        known = [step for step in past if step in worth]
        if known:
            kept.add(max(known, key=lambda step: worth[step]))
        for step in set(self.steps()) - kept:
            _remove(self.folder / _name(step))
        for leftover in [*self.folder.glob(f".step-*{ASIDE}"), *self.folder.glob(f".step-*{OLD}")]:
            _remove(leftover)

    @contextmanager
    def _complaints(self, target: Path) -> Iterator[None]:
        """What the system says of writing, as one RunError that says what is left and what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = _system_error(error)
            latest = self.latest()
            left = "there was none before it" if latest is None else f"that of update {latest} is intact"
            reason = "the disk is full" if number in FULL else str(error)
            raise RunError(
                f"{target}: the checkpoint could not be written: {reason}; {left}. Free some space or make the folder "
                "writable, then resume the run"
            ) from error

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def steps(self) -> list[int]:
        """Steps with a checkpoint, whole or not, in order."""
        if not self.folder.is_dir():
            return []
        found = [FOLDER.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The step that `latest` names, whether its checkpoint is whole or not; None where there is none."""
        with suppress(OSError, UnicodeDecodeError):
            match = FOLDER.fullmatch((self.folder / LATEST).read_text("utf-8").strip())
            return int(match[1]) if match else None
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of this step. Raises RunError where there is none, or it is torn or was changed."""
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise RunError(f"{self.folder} holds no checkpoint of update {step}; there are: {known}")
        return _read(self.folder / _name(step))

    def newest(self, say: Callable[[str], None], rows: int | None = None) -> Checkpoint | None:
        """The checkpoint that `latest` names, or the first usable one before it; None where there is none.

        One is passed over where it is torn or was changed, or where `run.db` lacks rows of updates before it (`rows`:
        how many it has); each time `say` hears why. Where none is named, all are tried. Nothing is written.
        """
        named = self.latest()
        for step in reversed(self.steps()):
            if named is not None and step > named:
                continue
            if rows is not None and step > rows:
                say(f"passed over the checkpoint of update {step}: run.db holds {rows} updates only")
                continue
            try:
                return self.read(step)
            except RunError as error:
                say(f"passed over: {error}")
        return None


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _write(folder: Path, snapshot: Snapshot, identity: Identity) -> None:
    folder.mkdir()
    for name, tensors in ((WEIGHTS, snapshot.weights), (OPTIMISER, snapshot.optimiser)):
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / name)
        _force(folder / name)
    facts = {
        "format": FORMAT,
        "step": snapshot.step,
        "beta": dict(snapshot.beta),
        "states": dict(snapshot.states),
        "identity": asdict(identity),
        "files": {name: _sha256(folder / name) for name in (WEIGHTS, OPTIMISER)},
    }
    facts = json.loads(to_json(facts))
    text = json.dumps(facts | {"sha256": _sha256_of(facts)}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")
    _force(folder / MANIFEST)
    _force(folder)


def _read(folder: Path) -> Checkpoint:
    """The checkpoint of a folder, every byte of it checked."""
    try:
        facts = json.loads((folder / MANIFEST).read_text("utf-8"))
        digest = facts.pop("sha256")
        if facts["format"] != FORMAT:
            raise RunError(f"{folder} has format {facts['format']}; this version of tether reads format {FORMAT}")
        if digest != _sha256_of(facts):
            raise RunError(f"{folder} was changed: {MANIFEST} does not have its sha256")
        for name in (WEIGHTS, OPTIMISER):
            if _sha256(folder / name) != facts["files"][name]:
                raise RunError(f"{folder} is torn or was changed: {name} does not have its sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"{folder} is torn: {type(error).__name__}: {error}") from error
    return Checkpoint(
        folder, facts["step"], facts["beta"], facts["states"], Identity(**facts["identity"]), digest
    )  # fmt: skip


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be read any more: {error}. Where the run is being trained, it has removed this checkpoint: "
            "try again, take a later one, or raise checkpoint.keep"
        ) from error


def _intact(folder: Path) -> bool:
    with suppress(RunError):
        _read(folder)
        return True
    return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(HASHED_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _sha256_of(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _force(path: Path) -> None:
    """Wait until the file, or the entries of the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _system_error(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = SYSTEM_ERROR.search(str(error))
    return int(match[1]) if match else None
