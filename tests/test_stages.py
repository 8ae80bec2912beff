"""`tether sft` and `tether reward` on data of one's own: what they write, what they say, what they refuse."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tether import cli, phases, stages
from tether.data import read_preferences
from tether.errors import InputError
from tether.loading import parameter_count
from tether.preferences import Pairs
from tether.recipe_files import load_recipe
from tether.reward_fit import RewardTraining
from tether.reward_model import RewardManifest, RewardModel
from tether.reward_stage import fit_pairs, learn_preferences, own_replies, report_on_pairs, split_off
from tether.sft_checkpoint import SFTManifest, require_sft
from tether.worlds.world import World
from tiny_models import build, build_tokenizer
from tolerances import ROUND_OFF, assert_close

KNOBS = RewardTraining(top_layers=2, learning_rate=3e-3, batch_pairs=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def comparisons(count: int, *, longer_wins: bool = False, seed: int = 0) -> list[dict[str, str]]:
    """The chosen answer holds w40 where the other holds w41, at random lengths; or is the longer one."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        short = [f"w{draw.randrange(50, 90)}" for _ in range(3)]
        good, bad = ([*short, "w40"], [*short, "w41"]) if not longer_wins else ([*short, *short, *short], short)
        draw.shuffle(good)
        draw.shuffle(bad)
        rows.append({"prompt": f"w{number % 20 + 5}", "chosen": " " + " ".join(good), "rejected": " " + " ".join(bad)})
    return rows


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def demonstrated(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"w{n % 10 + 5}", "completion": f" w{n % 10 + 20}"} for n in range(count)]


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
    monkeypatch.setattr(stages, "finetune", None)
    monkeypatch.setattr(stages, "learn_preferences", None)
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

    monkeypatch.setattr(stages, "finetune", interrupt)
    monkeypatch.setattr(stages, "learn_preferences", interrupt)
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


def test_a_set_whose_longer_answers_win_is_said_to_be_one() -> None:
    pairs = read_preferences(comparisons(60, longer_wins=True))
    learned = learn_preferences(pairs, build("llama"), KNOBS, tokenizer=build_tokenizer(), heldout=0.5)
    assert learned.data.longer_wins == 1.0
    assert any("longer answers win in these comparisons" in warning for warning in learned.warnings)
    assert any("score and length correlate" in warning for warning in learned.warnings)
    fair = report_on_pairs(read_preferences(comparisons(60)))
    assert (fair.longer_wins, fair.unequal, fair.warnings) == (None, 0, ())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reference-samples", "1"], "reference_samples is 1; wanted 2 or more, or 0 for the responses of the pairs"),
        (["--reference-samples", "-4"], "reference_samples is -4; wanted 2 or more"),
        (["--heldout", "0"], "wanted at least 2 groups and 0 < heldout < 1"),
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

    monkeypatch.setattr(stages, "own_replies", drawn)
    arguments = ["--model", str(model), "--data", written(tmp_path / "p.jsonl", comparisons(40))]
    assert cli.run(["reward", "--out", str(tmp_path / "rm"), *arguments, *flags]) == 1
    assert told in capsys.readouterr().err


def test_reference_samples_that_are_all_the_same_are_refused_before_anything_is_learned() -> None:
    pairs = read_preferences(comparisons(20))
    with pytest.raises(InputError, match="got 3 reference samples, none different from the others"):
        learn_preferences(pairs, build("llama"), KNOBS, tokenizer=build_tokenizer(), reference=(["w5"] * 3, ["w6"] * 3))


def test_a_small_excess_of_longer_answers_is_no_warning() -> None:
    rows = [("p", "a b", "a")] * 7 + [("p", "a", "a b")] * 3
    pairs = Pairs(*zip(*rows, strict=True))
    assert report_on_pairs(pairs).longer_wins == 0.7
    assert report_on_pairs(pairs).warnings == ()
    many = Pairs(*zip(*rows * 10, strict=True))
    assert "70% of them" in report_on_pairs(many).warnings[0]


def test_comparisons_that_stand_twice_are_warned_of() -> None:
    row = comparisons(1)[0]
    report = report_on_pairs(read_preferences([row, row, *comparisons(5, seed=1)]))
    assert report.duplicates == 1
    assert "1 comparisons stand in the data more than once" in report.warnings[0]


def test_what_is_measured_was_not_learned() -> None:
    pairs = read_preferences(comparisons(50))
    learned, measured = split_off(pairs, 0.2, seed=3)
    assert (len(learned), len(measured)) == (40, 10)
    keys = [set(zip(half.prompts, half.chosen, half.rejected, strict=True)) for half in (learned, measured)]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == set(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True))
    assert [len(half) for half in split_off(pairs.take([0, 1]), 0.01, seed=0)] == [1, 1]
    with pytest.raises(InputError, match="wanted at least 2 groups and 0 < heldout < 1"):
        split_off(pairs, 1.0, seed=0)


def test_comparisons_of_the_same_replies_are_learned_or_measured_together() -> None:
    pairs = replace(read_preferences(comparisons(30)), groups=tuple(number // 3 for number in range(30)))
    learned, measured = split_off(pairs, 0.2, seed=0)
    assert learned.groups is not None
    assert measured.groups is not None
    assert (len(learned), len(measured)) == (24, 6)
    assert not set(learned.groups) & set(measured.groups)


def test_knobs_that_are_not_said_are_the_usual_ones_of_the_world_or_of_own_data(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RewardTraining] = []

    def learn(pairs: Pairs, base: str, knobs: RewardTraining, **_: object) -> None:
        seen.append(knobs)
        raise KeyboardInterrupt

    recipe = load_recipe("nano")
    monkeypatch.setattr(stages, "learn_preferences", learn)
    monkeypatch.setattr(stages, "own_replies", lambda *_, **__: None)
    monkeypatch.setattr(stages, "world_pairs", lambda *_: read_preferences(comparisons(4)))
    monkeypatch.setattr(stages, "open_world", lambda _: World("nano", model, ("w5",), ("w6",), lambda *_, **__: []))
    data, out = written(tmp_path / "p.jsonl", comparisons(4)), str(tmp_path / "rm")
    cli.run(["reward", "--model", str(model), "--data", data, "--out", out])
    cli.run(["reward", "--model", str(model), "--data", data, "--out", out, "--epochs", "5", "--all-weights"])
    cli.run(["reward", "--world", "nano", "--out", out, "--batch-pairs", "3", "--seed", "7"])
    monkeypatch.setattr(stages, "parameter_count", lambda _: 10_000_000)
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
    monkeypatch.setattr(stages, "parameter_count", lambda _: weights)
    usual = stages.usual_for("body", pairs)
    assert (usual.epochs, usual.validation) == (epochs, validation)


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_the_help_has_a_line_for_each_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run([command, "--help"])
    shown = capsys.readouterr().out
    function = {"sft": stages.main_sft, "reward": stages.main_reward}[command]
    told = re.findall(r"(?m)^        (\w+): \w", function.__doc__ or "")
    assert told == list(signature(function).parameters)
    assert "usual 1 to" in " ".join(shown.replace("│", " ").split())


def test_the_size_of_a_body_is_that_of_its_weights(model: Path) -> None:
    assert parameter_count(model) == AutoModelForCausalLM.from_pretrained(model).num_parameters()


def test_pairs_that_are_too_long_go_by_the_rule() -> None:
    base, tokenizer = build("llama"), build_tokenizer()  # 64 positions
    story = " ".join(f"w{n % 80 + 5}" for n in range(62))
    rows = [comparisons(1)[0], {"prompt": story, "chosen": " w1 w2 w3", "rejected": " w4"}]
    pairs = read_preferences(rows)
    assert fit_pairs(pairs, base, tokenizer=tokenizer) is pairs
    with pytest.raises(InputError, match="tokens together; the reward model reads 1 to 64"):
        learn_preferences(pairs, base, KNOBS, tokenizer=tokenizer, heldout=0.5)
    dropped = fit_pairs(pairs, base, "drop", tokenizer=tokenizer)
    assert dropped.prompts == pairs.prompts[:1]
    assert (dropped.origin["dropped"], dropped.origin["shortened"]) == (1, 0)
    cut = fit_pairs(pairs, base, "truncate_left", tokenizer=tokenizer)
    assert cut.prompts[0] == pairs.prompts[0]
    assert story.endswith(f" {cut.prompts[1]}")
    assert 60 <= len(str(cut.prompts[1]).split()) <= 61  # 64 less three words, and a stop where one is read
    learn_preferences(cut, base, KNOBS, tokenizer=tokenizer, heldout=0.5)
    assert (cut.chosen, cut.origin["dropped"], cut.origin["shortened"]) == (pairs.chosen, 0, 1)
    with pytest.raises(InputError, match="all 1 pairs are too long"):
        fit_pairs(pairs.take([1]), base, "drop", tokenizer=tokenizer)
    talk = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    with pytest.raises(InputError, match="no chat template"):
        fit_pairs(Pairs((tuple(talk),), ("a",), ("b",)), base, "drop", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "wanted --model M --data FILE, or --world nano or smollm2, and not both"),
        (["--data", "p.jsonl"], "wanted --model M --data FILE"),
        (["--data", "p.jsonl", "--world", "nano"], "and not both"),
        (["--model", "m", "--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_reward_wants_one_source_of_comparisons(
    flags: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["reward", "--out", str(tmp_path / "rm"), *flags]) == 1
    assert complaint in capsys.readouterr().err


def test_own_replies_are_the_checkpoints_and_go_round_the_prompts(model: Path) -> None:
    told: list[tuple[int, int]] = []
    prompts, replies = own_replies(
        model, ["w5", "w6", "w5", " ".join(["w7"] * 70)], 5, max_new_tokens=3, progress=lambda *now: told.append(now)
    )
    assert len(prompts) == len(replies) == 5
    assert set(prompts) == {"w5", "w6"}  # the fourth leaves no room for a reply
    assert all(1 <= len(reply.split()) <= 3 or reply == "" for reply in replies)
    assert told[-1] == (5, 5)
    assert own_replies(model, ["w5", "w6"], 5, max_new_tokens=3)[1] == replies
