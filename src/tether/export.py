"""`tether export`: a run's policy as an ordinary Hugging Face folder, with a model card; and onto the hub.

    weights or adapters · tokenizer · value_head.safetensors · README.md · curves.png · tether_run.yaml

`AutoModelForCausalLM.from_pretrained` reads the folder without tether. Read next: `card.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.card import CURVES, Subject, is_drawn, model_card
from tether.database import complaints
from tether.errors import ModelError, RunError
from tether.loading import Source, layer_count
from tether.plots import plot_curves
from tether.resume import Trained, find_point, open_trained
from tether.runs import ROOT
from tether.session import prepare_process
from tether.store import RunStore
from tether.terminal import console_for_output

SETTINGS_FILE = "tether_run.yaml"
CARD_FILE = "README.md"


def main(
    run: str,
    /,
    out: Path,
    merged: bool = False,
    model: str | None = None,
    push: str | None = None,
    private: bool = False,
    root: Path = ROOT,
) -> None:
    """Write a run's policy as an ordinary Hugging Face folder, with a model card.

    Args:
        run: RUN or RUN@STEP: name or path of the run, and the update; by default its last checkpoint.
        out: The folder to write; it must not exist yet.
        merged: Fold adapters into the weights (mode `lora`).
        model: The SFT checkpoint, where it no longer lies where the run found it.
        push: A repository on the hub, as `me/my-policy`, to upload the folder to.
        private: Make that repository private.
        root: The folder that holds the run folders.
    """
    prepare_process()
    console = console_for_output()
    folder, step = find_point(run, root)
    export_run(folder, out, step=step, merged=merged, model=model)
    console.print(f"wrote {out}", soft_wrap=True)
    if push is not None:
        console.print(f"uploaded: {push_to_hub(out, push, private=private)}", soft_wrap=True)


def export_run(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    merged: bool = False,
    model: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the policy of a run at a checkpoint, by default the last whole one; returns `out`.

    Mode `lora` gives adapters, or with `merged` a whole model; the other modes give whole models. `model` and
    `tokenizer` are those of `open_trained`. The folder is there whole or not at all.

    Raises RunError where `out` exists or cannot be written, and what `open_trained` raises.
    """
    if out.exists():
        raise RunError(f"{out} exists; choose another folder, or remove it")
    trained = open_trained(run, step, model, tokenizer)
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    with complaints(out):
        try:
            aside.mkdir(parents=True)
            _fill(aside, run, trained, merged)
            aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return out


def _fill(folder: Path, run: Path, trained: Trained, merged: bool) -> None:
    trained.policy.save_pretrained(folder, merged=merged)
    settings, checkpoint = trained.settings, trained.checkpoint
    text = yaml.safe_dump(settings.dump(), sort_keys=False, allow_unicode=True)
    (folder / SETTINGS_FILE).write_text(text, "utf-8")
    kind = "adapters" if settings.model.mode == "lora" and not merged else "whole model"
    with RunStore.open(run) as store:
        if is_drawn(store):
            plot_curves([(store.name, store)], folder / CURVES)
        source = "a model in memory" if isinstance(trained.source, PreTrainedModel) else str(trained.source)
        digests = checkpoint.identity.digests
        layers = layer_count(trained.source)
        subject = Subject(store.name, checkpoint.step, source, kind, layers, settings, digests)
        (folder / CARD_FILE).write_text(model_card(store, subject), "utf-8")


def push_to_hub(folder: Path, repository: str, *, private: bool = False, message: str = "Add the policy") -> str:
    """Upload an exported folder to the hub; returns the commit's address.

    Raises ModelError where the hub refuses it or cannot be reached, with what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    transport: type[Exception] = HfHubHTTPError.__mro__[1]  # of the library's HTTP client, whichever that is

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise ModelError(
            f"{folder} could not be uploaded to {repository!r}: {_first_line(error)}. Log in with `hf auth login` and "
            "an access token that may write, and see that the name is OWNER/NAME"
        ) from error
    except (transport, OSError) as error:  # OSError: the library was told to stay offline
        raise ModelError(
            f"{folder} is written, but the hub cannot be reached ({_first_line(error)}); it can go there later: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
