"""`tether sft` and `tether reward` on data of one's own: what they write, what they say, what they refuse."""

from __future__ import annotations

import ast
import json
import os
import signal
from collections.abc import Iterator
from inspect import getsource
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stage_data import comparisons, demonstrated, saved_model, written
from tether import cli, evaluate_run, phases, reward_command, sft_command
from tether.data import read_preferences
from tether.preferences import Pairs
from tether.recipe_files import load_recipe
from tether.reward_fit import RewardTraining
from tether.reward_model import RewardManifest, RewardModel
from tether.reward_stage import own_replies
from tether.sft_checkpoint import SFTManifest, require_sft
from tether.worlds.world import World
from tolerances import ROUND_OFF, assert_close


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


# ── tether sft ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_sft_writes_a_checkpoint_and_says_what_it_learned(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = written(tmp_path / "d.jsonl", demonstrated(40)), tmp_path / "sft"
    arguments = ["sft", "--model", str(model), "--data", data, "--out", str(out)]
    assert cli.run([*arguments, "--epochs", "3", "--learning-rate", "1e-2", "--heldout", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "40 demonstrations from" in said
    assert "learned 30 demonstrations in 6 steps, packed: 60 tokens an epoch" in said
    manifest = SFTManifest.load(out)
    assert manifest is not None
    before, after = (manifest.report[f"heldout_loss_{when}"] for when in ("before", "after"))
    assert f"held-out loss {before:.3f} → {after:.3f} nats per token (10 demonstrations)" in said
    assert manifest.base == str(model)
    assert manifest.data["file"] == "d.jsonl"
    AutoModelForCausalLM.from_pretrained(out)
    require_sft(out)


def test_sft_prints_its_report_for_programs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = written(tmp_path / "d.jsonl", demonstrated(20)), tmp_path / "sft"
    assert cli.run(["sft", "--model", str(model), "--data", data, "--out", str(out), "--json"]) == 0
    streams = capsys.readouterr()
    report = json.loads(streams.out)
    assert report["out"] == str(out)
    assert report["demonstrations"] + report["heldout"] == 20
    assert f"wrote {out}" in streams.err


def test_sft_takes_a_chat_template_from_a_file(model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w20"}] * 2}] * 4
    data, out = written(tmp_path / "d.jsonl", rows), tmp_path / "sft"
    arguments = ["sft", "--model", str(model), "--data", data, "--out", str(out)]
    assert cli.run([*arguments, "--chat-template", str(tmp_path / "chat.jinja")]) == 0
    assert (out / "chat_template.jinja").read_text() == template
    assert cli.run([*arguments, "--chat-template", str(tmp_path / "none.jinja")]) == 1


@pytest.mark.parametrize(
    ("rows", "flags", "complaint"),
    [
        ([], [], "holds no demonstration"),
        ([{"question": "a", "answer": "b"}], [], "Did you mean prompt_column='question', completion_column='answer'?"),
        (demonstrated(2), ["--epochs", "0"], "epochs=0; wanted 1 or more"),
        (demonstrated(2), ["--learning-rate", "inf"], "learning_rate=inf; wanted a finite number above 0"),
        (demonstrated(2), ["--max-tokens", "2"], "demonstration 1 has 3 tokens; at most 2 fit"),
    ],
)
def test_sft_refuses_with_one_clear_line(
    rows: list, flags: list[str], complaint: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = written(tmp_path / "d.jsonl", rows), tmp_path / "sft"
    assert cli.run(["sft", "--model", str(model), "--data", data, "--out", str(out), *flags]) == 1
    complaints = capsys.readouterr().err
    assert complaint in complaints
    assert complaints.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_is_taken_is_refused_before_anything_is_learned(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    monkeypatch.setattr(sft_command, "finetune", None)
    monkeypatch.setattr(reward_command, "learn_preferences", None)
    for command in ("sft", "reward"):
        assert cli.run([command, "--model", str(model), "--data", "d.jsonl", "--out", str(tmp_path)]) == 1
        assert "is there already and holds no" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


@pytest.fixture
def from_a_terminal() -> Iterator[None]:
    """Ctrl-C reaches the process, also where the tests run in the background, which begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as the terminal sends it, when this phase of `tether reward` is first told of, or while it writes."""
    told, save = phases.Phases.__call__, RewardModel.save_pretrained

    def heard(self: phases.Phases, name: str, *rest: object) -> None:
        told(self, name, *rest)  # type: ignore[arg-type]
        if name == phase:
            os.kill(os.getpid(), signal.SIGINT)

    def saved(self: RewardModel, folder: Path) -> None:
        if phase == "writing" and folder.name != "holdout":
            os.kill(os.getpid(), signal.SIGINT)
        save(self, folder)

    monkeypatch.setattr(phases.Phases, "__call__", heard)
    monkeypatch.setattr(RewardModel, "save_pretrained", saved)


@pytest.mark.usefixtures("from_a_terminal")
@pytest.mark.parametrize(
    ("phase", "told", "left"),
    [
        ("reference replies", "", False),
        ("reward model", "", False),
        ("holdout model", "; the reward model was finished and is in {out}; its twin was not", True),
        ("writing", "; {out} is written", True),
    ],
)
def test_ctrl_c_in_each_phase_is_one_line_and_what_was_finished_is_kept(
    phase: str, told: str, left: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, out = written(tmp_path / "p.jsonl", comparisons(12)), tmp_path / "rm"
    interrupted_at(phase, tmp_path, monkeypatch)
    arguments = ["reward", "--model", str(model), "--data", data, "--out", str(out), "--holdout", "--epochs", "1"]
    assert cli.run([*arguments, "--reference-samples", "4", "--max-new-tokens", "3"]) == cli.EXIT_INTERRUPTED
    complaints = capfd.readouterr().err.strip().splitlines()
    assert complaints[-1] == f"tether reward: stopped by Ctrl-C{told.format(out=out)}"
    assert len(complaints) == 1 + (phase == "writing")  # which is noticed at once, too
    assert out.exists() == left
    if left:
        assert RewardManifest.load(out).details["role"] == "reward"
        assert json.loads((out / "report.json").read_text())["reward"]["pairs"] == 6
        assert (out / "holdout").exists() == (phase == "writing")


def test_an_interruption_is_one_line_and_leaves_no_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_command, "finetune", interrupt)
    monkeypatch.setattr(reward_command, "learn_preferences", interrupt)
    demos, pairs = (written(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((demonstrated(4), comparisons(4))))
    for command, data in (("sft", demos), ("reward", pairs)):
        out = tmp_path / command
        arguments = [command, "--model", str(model), "--data", data, "--out", str(out)]
        assert cli.run(arguments) == cli.EXIT_INTERRUPTED
        assert capsys.readouterr().err == f"tether {command}: stopped by Ctrl-C\n"
        assert not out.exists()


# ── tether reward ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_reward_writes_a_classifier_with_its_scale_and_its_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = written(tmp_path / "p.jsonl", comparisons(200)), tmp_path / "rm"
    arguments = ["reward", "--model", str(model), "--data", data, "--out", str(out), "--learning-rate", "3e-3"]
    assert cli.run([*arguments, "--epochs", "2", "--reference-samples", "24", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["reward"]["pairs"] == 40
    assert report["reward"]["accuracy"] > 0.8
    assert report["reward"]["floor_accuracy"] > 0.9
    assert f"accuracy {report['reward']['accuracy']:.3f} ± {report['reward']['accuracy_se']:.3f} on 40" in said
    assert report["holdout"] is None
    AutoModelForSequenceClassification.from_pretrained(out)
    reward = RewardModel.load(out)
    assert reward.manifest.details["reference"]["samples"] == 24  # type: ignore[index]
    prompts, replies = own_replies(model, [row["prompt"] for row in comparisons(200)], 24, max_new_tokens=4)
    scores = torch.tensor(reward(prompts, replies))
    assert_close(scores.mean(), 0.0, ROUND_OFF)
    assert_close(scores.std(correction=0), 1.0, ROUND_OFF)


def test_reward_with_its_twin_writes_both_and_prints_one_object(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = written(tmp_path / "p.jsonl", comparisons(40)), tmp_path / "rm"
    arguments = ["reward", "--model", str(model), "--data", data, "--out", str(out), "--json"]
    assert cli.run([*arguments, "--holdout", "--reference-samples", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(out)
    assert {**report, "out": None} == {**json.loads((out / "report.json").read_text()), "out": None}
    assert report["reward"]["pairs"] == report["holdout"]["pairs"] == 20
    assert RewardManifest.load(out).details["role"] == "reward"
    assert RewardManifest.load(out / "holdout").details["role"] == "holdout"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reference-samples", "1"], "reference_samples is 1; wanted 2 or more, or 0 for the responses of the pairs"),
        (["--reference-samples", "-4"], "reference_samples is -4; wanted 2 or more"),
        (["--heldout", "0"], "wanted at least 2 groups and 0 < heldout < 1"),
        (["--learning-rate", "0"], "got learning_rate=0.0; wanted a finite number above 0"),
        (["--learning-rate", "inf"], "got learning_rate=inf; wanted a finite number above 0"),
        (["--top-layers", "0"], "top_layers is 0 and the model has 3 layers; wanted 1 … 3"),
        (["--top-layers", "4"], "top_layers is 4 and the model has 3 layers; wanted 1 … 3"),
        (["--top-layers", "1", "--all-weights"], "got --all-weights and --top-layers 1; wanted one of them"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_drawn_or_learned(
    flags: list[str],
    told: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("nothing shall be drawn")

    monkeypatch.setattr(reward_command, "own_replies", drawn)
    arguments = ["--model", str(model), "--data", written(tmp_path / "p.jsonl", comparisons(40))]
    assert cli.run(["reward", "--out", str(tmp_path / "rm"), *arguments, *flags]) == 1
    assert told in capsys.readouterr().err


def test_knobs_that_are_not_said_are_the_usual_ones_of_the_world_or_of_own_data(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RewardTraining] = []

    def learn(pairs: Pairs, base: str, knobs: RewardTraining, **_: object) -> None:
        seen.append(knobs)
        raise KeyboardInterrupt

    recipe = load_recipe("nano")
    monkeypatch.setattr(reward_command, "learn_preferences", learn)
    monkeypatch.setattr(reward_command, "own_replies", lambda *_, **__: None)
    monkeypatch.setattr(reward_command, "world_pairs", lambda *_: read_preferences(comparisons(4)))
    world = World("nano", model, ("w5",), ("w6",), lambda *_, **__: [])
    monkeypatch.setattr(reward_command, "open_world", lambda _: world)
    data, out = written(tmp_path / "p.jsonl", comparisons(4)), str(tmp_path / "rm")
    cli.run(["reward", "--model", str(model), "--data", data, "--out", out])
    cli.run(["reward", "--model", str(model), "--data", data, "--out", out, "--epochs", "5", "--all-weights"])
    cli.run(["reward", "--world", "nano", "--out", out, "--batch-pairs", "3", "--seed", "7"])
    monkeypatch.setattr(reward_command, "parameter_count", lambda _: 10_000_000)
    cli.run(["reward", "--model", str(model), "--data", data, "--out", out])
    cli.run(["reward", "--model", str(model), "--data", data, "--out", out, "--epochs", "5", "--all-weights"])
    assert seen[0] == RewardTraining(None, epochs=40, learning_rate=1e-3, batch_pairs=8, seed=0, validation=0.2)
    assert seen[1] == RewardTraining(top_layers=None, epochs=5, learning_rate=1e-3, batch_pairs=8, seed=0)
    usual = recipe.preferences
    assert (seen[2].epochs, seen[2].learning_rate) == (usual.epochs, usual.learning_rate)
    assert (seen[2].batch_pairs, seen[2].seed, seen[2].validation) == (3, 7, 0.0)
    assert seen[3] == RewardTraining(top_layers=3, epochs=40, learning_rate=3e-4, batch_pairs=8, validation=0.2)
    assert seen[4] == RewardTraining(top_layers=None, epochs=5, learning_rate=3e-4, batch_pairs=8, seed=0)


@pytest.mark.parametrize(
    ("pairs", "weights", "epochs", "validation"),
    [(1, 9_999_999, 40, 0.2), (1000, 0, 16, 0.2), (64_000, 0, 2, 0.2), (499, 10_000_000, 32, 0.2), (500, 10**7, 2, 0)],
)
def test_a_small_body_and_few_pairs_have_their_passes_chosen(
    pairs: int, weights: int, epochs: int, validation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_command, "parameter_count", lambda _: weights)
    usual = reward_command.usual_for("body", pairs)
    assert (usual.epochs, usual.validation) == (epochs, validation)


@pytest.mark.parametrize(
    ("command", "module"), [("sft", sft_command), ("reward", reward_command), ("eval", evaluate_run)]
)
def test_the_help_has_the_line_of_each_flag(
    command: str, module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run([command, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f" {module.main.__doc__} " in shown
    (flags,) = (node for node in ast.parse(getsource(module)).body if getattr(node, "name", "") == "Flags")
    for field, line in zip(flags.body[1::2], flags.body[2::2], strict=False):  # after the class's own docstring
        if isinstance(field, ast.AnnAssign):
            told = ast.literal_eval(line.value)
            assert f"{' '.join(told.split())} (" in shown
            assert field.target.id == "run" or f"--{field.target.id.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "wanted --model M --data FILE, or --world nano or smollm2, and not both"),
        (["--data", "p.jsonl"], "wanted --model M --data FILE"),
        (["--data", "p.jsonl", "--world", "nano"], "and not both"),
        (["--model", "m", "--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--world", "nano", "--limit", "5", "--reference", "m"], "on their responses; leave out --limit, --reference"),
    ],
)
def test_reward_wants_one_source_of_comparisons(
    flags: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["reward", "--out", str(tmp_path / "rm"), *flags]) == 1
    assert complaint in capsys.readouterr().err
