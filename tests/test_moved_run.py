"""A run whose model, prompts and reward lie elsewhere by now: found again by name, held against what they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tether import cli, resume
from tether.checkpoint import Checkpoint, Checkpoints
from tether.errors import RunError
from tether.recipe_files import load_recipe
from tether.resume import open_trained
from tether.store import RunStore
from tiny_models import build, build_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

REWARD = """
from pathlib import Path

def words(prompts, responses):
    batches = Path("batches")
    if len(responses) == 4:  # a batch of an update
        batches.write_text(batches.read_text() + "." if batches.exists() else ".")
        if batches.read_text() == "...":
            raise ValueError("stop here")
    return [float(len(set(response.split()))) for response in responses]
"""
RECIPE = """
model: {source: old/sft, mode: full}
data: old/prompts.txt
reward: old/rewards.py:words
ppo: {steps: 4, batch_size: 4, sampling: {max_new_tokens: 4}}
evaluation: {every: 100, prompts: 2, best_of: []}
checkpoint: {every: 1, keep: 9}
"""


def project(root: Path) -> None:
    """A user's folder; its reward fails once, at the third update that it is asked about."""
    build("llama").save_pretrained(root / "old/sft")
    build_tokenizer().save_pretrained(root / "old/sft")
    (root / "old/prompts.txt").write_text("\n".join(f"w{place} w{place + 1}" for place in range(3, 13)))
    (root / "old/rewards.py").write_text(REWARD)
    (root / "run.yaml").write_text(RECIPE)


def weights(run: Path) -> dict[str, torch.Tensor]:
    latest = Checkpoints(run / "checkpoints").latest()
    return load_file(run / f"checkpoints/step-{latest:06d}/weights.safetensors")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run that nobody stopped and one whose reward failed before the third update."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        project(root)
        assert cli.run(["train", "run.yaml", "--name", "stopped"]) == 1
        assert cli.run(["train", "run.yaml", "--name", "whole"]) == 0
    return root


@pytest.fixture
def here(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, after everything but the runs was moved."""
    shutil.copytree(stopped, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    Path("old").rename("new")
    return tmp_path / "home"


MOVED = ["--model", "new/sft", "--prompts", "new/prompts.txt", "--reward", "new/rewards.py:words"]


def test_a_run_goes_on_with_what_was_moved_and_is_the_one_that_nobody_stopped(here: Path) -> None:
    assert cli.run(["resume", "stopped", *MOVED]) == 0
    ours, theirs = weights(here / "runs/stopped"), weights(here / "runs/whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_recipe("runs/stopped/config.yaml").model.source == "new/sft", "the next command finds it by itself"
    with RunStore.open("runs/stopped") as store:
        assert store.meta()["source"] == "new/sft"


def test_a_run_goes_on_with_knobs_that_do_not_change_its_course(here: Path) -> None:
    knobs = ["--checkpoint.keep", "4", "--evaluation.prompts=1", "--vllm.start_seconds", "5"]
    assert cli.run(["resume", "stopped", *MOVED, *knobs]) == 0
    ours, theirs = weights(here / "runs/stopped"), weights(here / "runs/whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    settings = load_recipe("runs/stopped/config.yaml")
    assert (settings.checkpoint.keep, settings.evaluation.prompts) == (4, 1)
    assert settings.runtime.vllm.start_seconds == 5


def test_a_knob_that_changes_the_course_is_refused_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("runs/stopped/config.yaml").read_text()
    assert cli.run(["resume", "stopped", *MOVED, "--beta", "0.3"]) == 1
    told = capsys.readouterr().err
    assert "a resumed run keeps its settings; these differ:\n  ppo.reward.beta: " in told
    assert "tether fork" in told
    assert cli.run(["resume", "stopped", "--betta", "0.3"]) == 1
    assert "did you mean" in capsys.readouterr().err
    assert Path("runs/stopped/config.yaml").read_text() == before


def test_the_help_of_resume_shows_the_knobs_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["resume", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"--{knob}\n" in told for knob in ("runtime.ray.address", "checkpoint.every", "report_to"))
    assert "--ppo." not in told


def test_several_processes_are_told_all_that_one_was(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(resume, "launch", lambda processes, words: told.extend([processes, *words]) or 0)
    knobs = ["--checkpoint.keep", "4", "--report_to", "a", "b"]
    assert cli.run(["resume", "stopped", *MOVED, "--num-processes", "2", *knobs]) == 0
    folder = str(Path("runs/stopped"))
    assert told == [2, "resume", folder, *MOVED, "--num-processes", "2", *knobs]


def test_places_may_be_written_into_config_yaml_too(here: Path) -> None:
    config = Path("runs/stopped/config.yaml")
    config.write_text(config.read_text().replace("old/", "new/"))
    assert cli.run(["resume", "stopped"]) == 0
    assert cli.run(["eval", "stopped", "--no-best-of"]) == 0


def test_a_run_without_its_model_says_how_to_name_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("resume stopped", "eval whole", "export whole --out out"):
        assert cli.run(command.split()) == 1
        told = capsys.readouterr().err
        assert "started from 'old/sft', which is not there: say where it lies by now with --model FOLDER" in told


def test_another_model_in_its_place_is_refused_and_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build("llama", seed=1)
    other.save_pretrained("other")
    build_tokenizer().save_pretrained("other")
    before = Path("runs/stopped/config.yaml").read_text()
    for command in (["resume", "stopped", *MOVED], ["eval", "whole", *MOVED]):
        assert cli.run([*command, "--model", "other"]) == 1
        assert "the reference (the SFT checkpoint): sha256" in capsys.readouterr().err
    assert Path("runs/stopped/config.yaml").read_text() == before


def test_other_prompts_in_their_place_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.txt").write_text("w1\nw2\nw3\n")
    assert cli.run(["resume", "stopped", *MOVED, "--prompts", "other.txt"]) == 1
    assert "the set of training prompts: sha256" in capsys.readouterr().err


def test_a_run_is_evaluated_by_a_model_that_was_moved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", "whole", *MOVED, "--no-best-of"]) == 0
    assert "KL" in capsys.readouterr().out


def test_a_fork_of_a_run_whose_places_were_edited_knows_its_model(here: Path) -> None:
    config = Path("runs/whole/config.yaml")
    config.write_text(config.read_text().replace("old/", "new/"))
    assert cli.run(["fork", "whole@2", "--name", "fork", "--no-train"]) == 0
    assert cli.run(["export", "fork", "--out", "out"]) == 0


def test_a_checkpoint_that_the_run_removes_while_it_is_read_is_passed_over(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer does between finding the last checkpoint and reading it."""
    Path("new").rename("old")
    read = Checkpoint.weights

    def gone(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        if checkpoint.step == 4:
            shutil.rmtree(checkpoint.path)
            (checkpoint.path.parent / "latest").write_text("step-000003\n")
        return read(checkpoint)

    monkeypatch.setattr(Checkpoint, "weights", gone)
    assert open_trained(here / "runs/whole").checkpoint.step == 3
    with pytest.raises(RunError, match="holds no checkpoint of update 4"):
        open_trained(here / "runs/whole", 4)


def test_weights_that_are_gone_are_one_error(here: Path) -> None:
    checkpoint = Checkpoints(here / "runs/whole/checkpoints").read(4)
    shutil.rmtree(checkpoint.path)
    with pytest.raises(RunError, match=r"weights\.safetensors cannot be read any more: .* take a later one"):
        checkpoint.weights()


def test_columns_that_changed_are_refused(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reward reads them: with other answers the run would climb another reward."""
    shutil.copytree(stopped, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    rows = [f'{{"prompt": "w{place}", "answer": "w{place + 1}"}}\n' for place in range(3, 13)]
    one = ["--data", "old/prompts.jsonl"]
    Path("batches").unlink()
    Path("old/prompts.jsonl").write_text("".join(rows))
    assert cli.run(["train", "run.yaml", *one, "--name", "cut"]) == 1
    Path("old/prompts.jsonl").write_text("".join(rows).replace('"answer": "w4"', '"answer": "w5"'))
    capsys.readouterr()
    assert cli.run(["resume", "cut"]) == 1
    assert "the columns beside the training prompts: sha256" in capsys.readouterr().err
