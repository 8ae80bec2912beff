"""The heads in checkpoint files, and folders put onto the hub.

A value head lies in a checkpoint under `v_head.`, a reward adapter's score head under `score`. Only these tensors are
read; the rest of a checkpoint is transformers' and PEFT's affair.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def read_value_head(source: str, token: str | None = None) -> dict[str, Tensor] | None:
    """The value head's tensors of a folder or a hub name, prefix removed; None where the checkpoint has none."""
    found: dict[str, Tensor] = {}
    for name in WEIGHTS:
        for file in _files(source, name, "v_head.", token):
            found |= {key.removeprefix("v_head."): tensor for key, tensor in _tensors(file, "v_head.").items()}
    return found or None


def read_score_head(source: str, token: str | None = None) -> dict[str, Tensor] | None:
    """`weight` and `bias` of the score head that PEFT saved with a classifier's adapters; None where there is none."""
    for name in ADAPTERS:
        file = cached_file(source, name, token=token, **QUIET)
        tensors = {} if file is None else _tensors(Path(file), "score")
        if tensors:
            return {key.rsplit(".", 1)[-1]: tensor for key, tensor in tensors.items()}
    return None


def upload(save: Callable[[str], Any], repo_id: str, token: str | None = None, **kwargs: Any) -> str:
    """Save into a folder and put that onto the hub; returns the repository's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=bool(kwargs.get("private")), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        message = kwargs.get("commit_message", "Upload with tether")
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    return str(repository)


def _files(source: str, name: str, prefix: str, token: str | None) -> list[Path]:
    """The files of a checkpoint, whole or in shards, that may hold tensors with the prefix."""
    whole = cached_file(source, name, token=token, **QUIET)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, f"{name}.index.json", token=token, **QUIET)
    if index is None:
        return []
    places = json.loads(Path(index).read_text("utf-8"))["weight_map"]
    shards = sorted({shard for key, shard in places.items() if key.startswith(prefix)})
    return [Path(file) for shard in shards if (file := cached_file(source, shard, token=token, **QUIET)) is not None]


def _tensors(file: Path, part: str) -> dict[str, Tensor]:
    """The tensors whose name contains the part."""
    if file.suffix == ".safetensors":
        with safe_open(str(file), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if part in key}  # noqa: SIM118
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {key: tensor for key, tensor in state.items() if part in key}
