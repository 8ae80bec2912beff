"""Trackers beside the store: they hear what it is told, by TRL's names too, and never stop a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker
from rich.console import Console

import tether
from tether.config import RunSettings
from tether.errors import ConfigError, InputError
from tether.knobs import knobs
from tether.metrics import CATALOGUE
from tether.trackers import TRL_NAMES, Trackers, flat, our_name, wanted, with_trl_names
from tiny_models import build, build_tokenizer


class Heard(GeneralTracker):
    """A tracker of accelerate's kind that keeps what it hears, and fails where it is told to."""

    name = "heard"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails = fails
        self.config: dict[str, object] = {}
        self.steps: dict[int, dict[str, float]] = {}
        self.ended = False

    @property
    def tracker(self) -> object:
        return self

    def start(self) -> None:
        self._fail("start")

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.config = values

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: object) -> None:
        assert step is not None
        self._fail(f"step {step}")
        self.steps.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self._fail("finish")
        self.ended = True

    def _fail(self, where: str) -> None:
        if where == self.fails:
            raise ConnectionError(f"no network at {where}")


def reward(prompts: object, responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def train(tmp_path: Path, trackers: list[object], steps: int = 4) -> tether.TrainedRun:
    return tether.train(
        policy=build("llama"), tokenizer=build_tokenizer(), reward=reward, prompts=["w3 w4", "w5", "w6", "w7"],
        steps=steps, batch_size=4, max_new_tokens=4, mode="full", root=tmp_path, name="run", report_to=trackers,
    )  # fmt: skip


def test_a_tracker_hears_every_update_and_evaluation_by_both_names(tmp_path: Path) -> None:
    heard = Heard()
    run = train(tmp_path, [heard], steps=2)
    assert sorted(heard.steps) == [0, 1, 2], "the last evaluation belongs to step 2"
    for step in (0, 1):
        numbers = heard.steps[step]
        assert numbers["objective/kl"] == numbers["kl/mean"] == run.metrics("kl/mean")[step]
        assert numbers["objective/scores"] == numbers["score/mean"]
    assert heard.steps[2]["eval/score"] == run.metrics("eval/score")[-1]
    assert heard.config["ppo.steps"] == 2
    assert heard.ended


@pytest.mark.parametrize(
    ("fails", "heard_until", "when"),
    [("start", 0, "at its start"), ("step 2", 2, "at update 2"), ("finish", 5, "at its end")],
)
def test_a_tracker_that_fails_is_left_out_with_one_line_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: str, heard_until: int, when: str
) -> None:
    failing, sound = Heard(fails), Heard()
    run = train(tmp_path, [failing, sound])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("warning: the tracker heard#0") == 1
    assert f"failed {when} and is left out (ConnectionError: no network at {fails})" in shown
    assert sorted(failing.steps) == list(range(heard_until))
    assert sorted(sound.steps) == [0, 1, 2, 3, 4]
    assert len(run.metrics("kl/mean")) == 4


def test_a_tracker_that_is_not_installed_is_a_line_with_what_to_install(tmp_path: Path) -> None:
    console = Console(record=True, width=300)
    Trackers.open(["mlflow"], tmp_path, RunSettings(), console).close()
    assert "pip install mlflow" in console.export_text()


def test_a_name_that_no_tracker_has_is_refused_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean wandb"):
        train(tmp_path, ["wandbb"])
    with pytest.raises(InputError, match="GeneralTracker"):
        train(tmp_path, [7])
    assert not (tmp_path / "run").exists()
    assert wanted(["none"]) == []


def test_trls_names_stand_for_numbers_of_the_catalogue_one_to_one() -> None:
    assert [name for name in TRL_NAMES if name not in CATALOGUE] == []
    assert len(set(TRL_NAMES.values())) == len(TRL_NAMES)
    assert our_name("objective/kl") == "kl/mean"
    assert our_name("kl/mean") == "kl/mean"
    assert with_trl_names({"kl/mean": 1.0, "beta": 2.0}) == {"kl/mean": 1.0, "objective/kl": 1.0, "beta": 2.0}


def test_the_knobs_are_told_flat() -> None:
    told = flat(RunSettings())
    assert told.keys() == knobs().keys()
    assert told["ppo.reward.beta"] == 0.05
    assert told["evaluation.best_of"] == "[4, 16, 64]"
    assert all(isinstance(value, str | int | float | None) for value in told.values())
