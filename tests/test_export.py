"""What leaves: a plain Hugging Face folder with its card, the hub, and the conversation in the terminal.

The oracle of an exported folder is the policy of the run itself, by the library's own forward pass on the folder.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from resumable import settings_of, task_of
from tether import cli
from tether.card import Subject, model_card
from tether.checkpoint import Checkpoints
from tether.config import RunSettings, SamplingSettings
from tether.errors import ModelError, RunError
from tether.export import export_run, push_to_hub
from tether.models import load_policy
from tether.resume import find_point, open_trained
from tether.session import train_run
from tether.store import RunStore
from tiny_models import build, build_tokenizer, ragged_sequences, row_logits
from tolerances import ROUND_OFF, assert_close

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
MODES = ("full", "lora", "top")
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"


def silent() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each mode, with every checkpoint kept, from a checkpoint that has a chat template."""
    root = tmp_path_factory.mktemp("runs")
    task = task_of(root / "sft")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "sft")
    for mode in MODES:
        settings = settings_of(mode, checkpoint={"every": 1, "keep": 9})
        train_run(task, settings, root, mode, silent())
    return root


def test_adapters_find_a_base_that_was_named_from_another_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    load_policy("sft", mode="lora").save_pretrained(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("adapters")
    assert model.num_parameters(only_trainable=False) > build("llama").num_parameters()


# ── a plain folder ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("mode", "merged"), [("full", False), ("lora", False), ("lora", True), ("top", False)])
def test_the_library_reads_an_exported_folder_as_the_policy(
    mode: str, merged: bool, runs: Path, tmp_path: Path
) -> None:
    out = export_run(runs / mode, tmp_path / "out", step=3, merged=merged)
    policy = open_trained(runs / mode, 3).policy
    sequences = ragged_sequences()
    said = policy.evaluate(sequences, 1.0)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    moved = False
    for row in range(len(sequences)):
        tokens = sequences.responses[row][sequences.response_mask[row]]
        with torch.no_grad():
            logprobs = row_logits(model, sequences, row).log_softmax(-1)
            start = row_logits(build("llama"), sequences, row).log_softmax(-1)
        picked = logprobs.gather(1, tokens[:, None])[:, 0]
        assert_close(said.logprobs[row][: len(tokens)], picked, ROUND_OFF)
        moved |= not torch.allclose(picked, start.gather(1, tokens[:, None])[:, 0], atol=1e-4)
    assert moved, "the folder holds what was trained, not where it started"
    assert not any("tether" in file.read_text("utf-8") for file in out.glob("*.json")), "it needs no tether to be read"
    assert (out / "adapter_model.safetensors").is_file() == (mode == "lora" and not merged)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def test_another_step_is_another_policy(runs: Path, tmp_path: Path) -> None:
    early, late = (export_run(runs / "full", tmp_path / str(step), step=step) for step in (2, 4))
    weights = [load_file(folder / "model.safetensors") for folder in (early, late)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_value_head_stands_beside_it_and_is_taken_up_again(runs: Path, tmp_path: Path) -> None:
    out = export_run(runs / "top", tmp_path / "out")
    trained = open_trained(runs / "top").policy
    again = load_policy(out, mode="top", top_layers=2, dtype="float32", value_source=out)
    sequences = ragged_sequences()
    values = trained.evaluate(sequences, 1.0).values
    assert values.abs().max() > 0
    assert_close(again.evaluate(sequences, 1.0).values, values, ROUND_OFF)


def test_the_card_says_what_it_is_on_which_string_and_what_came_of_it(runs: Path, tmp_path: Path) -> None:
    out = export_run(runs / "lora", tmp_path / "out", step=3)
    card = (out / "README.md").read_text("utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["rlhf", "ppo", "tether"]}
    with RunStore.open(runs / "lora") as store:
        evaluated = dict(zip(*store.curve("eval/gold"), strict=True))
        store_digests = Checkpoints(runs / "lora" / "checkpoints").read(3).identity.digests
        adapted = store.curve("beta").values[2]
    assert f"gold score (never optimised) | {evaluated[0]:.3g} ±" in card
    assert f"| {evaluated[2]:.3g} ±" in card, "update 3 was not evaluated; the last evaluation before it was at 2"
    assert "on held-out prompts | update 0 | update 2 |" in card
    assert f"β = 0.1, {adapted:.3g} at the end" in card
    for said in ("for 3 updates", "adapters of rank 4", "| seed | 0 |", "3 of 4, 8 responses", "curves.png", "peft"):
        assert said in card
    for digest in (store_digests["reference"], store_digests["reward"]):
        assert digest[:16] in card
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert yaml.safe_load((out / "tether_run.yaml").read_text())["model"]["mode"] == "lora"


def test_the_card_names_the_layers_the_prompts_and_the_reward_as_they_were_said(tmp_path: Path) -> None:
    told = {
        "model": {"mode": "top"}, "data": {"prompts": "asked.jsonl"},
        "reward": {"parts": {"kind": {"source": "org/kind", "weight": 0.7}, "short": "my.py:short"}},
    }  # fmt: skip
    rows = card_rows(told, tmp_path / "one", layers=3)
    assert rows["trained"] == "top: the top 3 of 3 layers"
    assert rows["prompts"] == "`asked.jsonl`"
    assert rows["reward"] == "0.7 · kind (`org/kind`) + 1 · short (`my.py:short`) (sha256 `00ff`)"
    told |= {"model": {"mode": "top", "top_layers": 2}, "data": {"prompts": ["a?", "b?"]}}
    told["reward"] = {"ensemble": ["org/a", "org/b"], "ensemble_by": "min"}
    rows = card_rows(told, tmp_path / "two", layers=30)
    assert rows["trained"] == "top: the top 2 of 30 layers"
    assert rows["prompts"] == "2 of the user's own"
    assert rows["reward"] == "min of `org/a`, `org/b` (sha256 `00ff`)"


def card_rows(told: dict[str, object], root: Path, layers: int) -> dict[str, str]:
    """The table of how it was made, of a run with these settings."""
    settings = RunSettings.model_validate(told)
    subject = Subject("run", 2, "org/model", "whole model", layers, settings, {"reference": "aa", "reward": "00ff"})
    with RunStore.create(root, "run", settings.dump()) as store:
        card = model_card(store, subject)
    assert "base_model: org/model" in card
    rows = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and " | " in line)
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_a_warning_of_the_run_stands_in_the_card(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "top", tmp_path / "run")
    with RunStore.open(tmp_path / "run", readonly=False) as store:
        store.event("over_optimised", {}, "alarm", step=2)
        store.event("later", {}, "alarm", step=4)
    card = (export_run(tmp_path / "run", tmp_path / "out", step=3) / "README.md").read_text("utf-8")
    assert "- alarm `over_optimised`: 1" in card
    assert "later" not in card


def test_a_folder_that_is_there_is_never_written_over_and_half_of_one_never_stays(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="mine exists; choose another folder"):
        export_run(runs / "top", tmp_path / "mine")

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tether.export.plot_curves", full)
    with pytest.raises(RunError, match="No space left on device"):
        export_run(runs / "top", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_weights_are_never_put_onto_another_model(runs: Path, tmp_path: Path) -> None:
    build("llama", seed=5).save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match=r"(?s)the reference .*the tokenizer: .*--model"):
        export_run(runs / "top", tmp_path / "out", model=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_has_moved_can_be_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "sft", tmp_path / "elsewhere")
    shutil.copytree(runs / "top", tmp_path / "run")
    with RunStore.open(tmp_path / "run", readonly=False) as store:
        store.put("source", str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="gone"):
        export_run(tmp_path / "run", tmp_path / "out")
    export_run(tmp_path / "run", tmp_path / "out", model=tmp_path / "elsewhere")


@pytest.mark.parametrize(("text", "step"), [("top", None), ("top@3", 3)])
def test_a_point_of_a_run_is_its_name_and_a_step(text: str, step: int | None, runs: Path) -> None:
    assert find_point(text, runs) == (runs / "top", step)
    assert find_point(f"{runs}/{text}", Path("nowhere")) == (runs / "top", step)
    with pytest.raises(RunError, match=r"got 'top@last'; wanted RUN@STEP with a whole number, as top@25"):
        find_point("top@last", runs)


# ── the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────
REFUSED = "You don't have the rights to create a model under the namespace me"
PLACE = "https://huggingface.co/me/policy"


class Hub(BaseHTTPRequestHandler):
    """The hub's side of an upload, as the library speaks to it; everything else of the upload is real."""

    asked: list[tuple[str, dict[str, object]]]
    committed: dict[str, str]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines() if line.startswith("{")]
        self.asked.append((self.path, lines[0]))
        if self.refuses:
            return self.answer({"error": REFUSED}, 403)
        if "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in lines[0]["files"]]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            self.committed |= {line["value"]["path"]: line["value"]["content"] for line in lines[1:]}
        return self.answer(
            {
                "url": "https://huggingface.co/me/policy",
                "commitUrl": f"{PLACE}/commit/1",
                "commitOid": "1",
            }
            | {"success": True, "errors": [], "warnings": []}
        )

    def do_GET(self) -> None:
        self.answer({"id": "me/policy", "sha": "0" * 40, "siblings": []})

    def answer(self, value: object, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 200:
            self.send_header("X-Error-Message", REFUSED)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.asked, Hub.committed, Hub.refuses = [], {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_exported_folder_goes_onto_the_hub_whole(hub: type[Hub], runs: Path, tmp_path: Path) -> None:
    out = export_run(runs / "lora", tmp_path / "out")
    assert push_to_hub(out, "me/policy", private=True) == f"{PLACE}/commit/1"
    created = hub.asked[0]
    assert created[0] == "/api/repos/create"
    assert created[1]["name"] == "policy"
    assert created[1].get("private") is True or created[1].get("visibility") == "private"
    assert set(hub.committed) == {path.name for path in out.iterdir()}


def test_a_hub_that_refuses_is_one_error_with_what_to_do(hub: type[Hub], runs: Path, tmp_path: Path) -> None:
    out = export_run(runs / "lora", tmp_path / "out")
    hub.refuses = True
    with pytest.raises(ModelError, match=rf"could not be uploaded to 'me/policy': .*{REFUSED}\. .*hf auth login"):
        push_to_hub(out, "me/policy")
    with pytest.raises(ModelError, match="OWNER/NAME"):
        push_to_hub(out, "not a name")


@pytest.mark.parametrize("offline", [True, False], ids=["told to stay offline", "nobody listens"])
def test_a_hub_that_cannot_be_reached_is_one_error_that_says_so(
    offline: bool, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError.__bases__[0]("All connection attempts failed")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    out = tmp_path / "out"
    command = ["export", "lora", "--root", str(runs), "--out", str(out), "--push", "me/policy"]
    assert cli.run(command) == 1
    said = capsys.readouterr().err
    assert "the hub cannot be reached (" in said
    assert f"hf upload me/policy {out}" in said
    assert "auth login" not in said
    assert (out / "README.md").is_file()


# ── the conversation ────────────────────────────────────────────────────────────────────────────────────────────────
def talk(run: str, runs: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[str]:
    """What the terminal shows of a conversation."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr("tether.chat.console_for_output", lambda: Console(file=out, width=200))
    assert cli.run(["chat", run, "--root", str(runs), *flags]) == 0
    return out.getvalue().splitlines()[1:]


def test_policy_and_reference_answer_side_by_side(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = talk("full@4", runs, "w3 w4\n\nw5\n", monkeypatch)
    assert [line.split("│")[0].strip() for line in said] == ["reference", "update 4"] * 2
    assert all("nats" in line for line in said[1::2])
    assert said == talk("full@4", runs, "w3 w4\nw5\n", monkeypatch), "the same seed gives the same conversation"
    assert said != talk("full@4", runs, "w3 w4\nw5\n", monkeypatch, "--seed", "1")
    assert said != talk("full@4", runs, "w3 w4\nw5\n", monkeypatch, "--temperature", "0.05")


def test_the_untrained_policy_answers_as_its_reference(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Update 1 of a run with one update of value warm-up: the policy has not moved."""
    said = talk("full@1", runs, "w3 w4\nw5 w9\n", monkeypatch)
    replies = [line.split("│")[1].split(" (K ")[0].strip() for line in said]
    assert replies[0::2] == replies[1::2]
    assert all("(K 0 nats)" in line for line in said[1::2])


def test_each_goes_on_from_its_own_conversation_until_reset(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = talk("top", runs, "w3\nw3\n/reset\nw3\n/quit\nw3\n", monkeypatch)
    assert said[0:2] != said[2:4], "the second answer knows of the first"
    assert said[4] == "the conversation is forgotten"
    assert said[5:7] == said[0:2]
    assert len(said) == 7, "nothing is said after /quit"


def test_commands_are_told_and_unknown_ones_are_no_message(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = talk("top", runs, "/help\n/foo\n", monkeypatch)
    assert [line.split()[0] for line in said[:3]] == ["/reset", "/quit", "/help"]
    assert said[3] == "there is no command /foo"


def test_the_oldest_turns_give_way_when_the_context_is_full(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = " ".join(["w7"] * 20)
    said = talk("top", runs, f"{long}\n{long}\n{long}\n", monkeypatch)
    assert any("the first 2 messages no longer fit and are forgotten" in line for line in said)
    too_long = talk("top", runs, " ".join(["w7"] * 90) + "\nw3\n", monkeypatch)
    assert "the model's context holds 64" in too_long[0]
    assert too_long[2:] == talk("top", runs, "/help\nw3\n", monkeypatch)[3:] or len(too_long) == 4


def test_a_model_without_a_chat_template_answers_each_line_alone(runs: Path) -> None:
    from tether.chat import Voice

    voice = Voice("reference", load_policy(build("llama"), build_tokenizer(), mode="full", dtype="float32"))
    sampling = SamplingSettings(max_new_tokens=4)
    first = voice.answer("w3", sampling, 0, 0)
    voice.answer("w4", sampling, 0, 1)
    assert voice.answer("w3", sampling, 0, 0) == first
    assert replace(first, text="") != first


# ── the commands ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_export_and_fork_by_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", "lora@2", "--root", str(runs), "--out", str(tmp_path / "out"), "--merged"]) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out.replace("\n", "")
    shutil.copytree(runs / "top", tmp_path / "runs" / "top")
    flags = ["--name", "looser", "--beta", "0.01", "--steps", "9", "--seed", "3", "--no-train"]
    assert cli.run(["fork", "top@3", "--root", str(tmp_path / "runs"), *flags]) == 0
    said = capsys.readouterr().out
    assert f"tether resume {tmp_path / 'runs' / 'looser'}" in said.replace("\n", "")
    with RunStore.open(tmp_path / "runs" / "looser") as store:
        config = store.meta()["config"]
    assert isinstance(config, dict)
    assert (config["ppo"]["reward"]["beta"], config["ppo"]["steps"], config["ppo"]["seed"]) == (0.01, 9, 3)
    assert cli.run(["export", "lora@7", "--root", str(runs), "--out", str(tmp_path / "none")]) == 1
    assert "no checkpoint of update 7; there are: 1, 2, 3, 4" in capsys.readouterr().err
