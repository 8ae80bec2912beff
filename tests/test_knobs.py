"""Knobs by name, other libraries' names, and every fault of a configuration at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tether.aliases import FALSE_FRIENDS, FRIENDS, REFUSED, TRANSLATED
from tether.config import RunSettings
from tether.errors import ConfigError
from tether.knobs import Fault, Named, Words, find_knob, knobs, read_settings, told, wanted


def faults_of(text: str, *overrides: tuple[str, object]) -> list[str]:
    """The complaint about this YAML and these knobs beside it, line by line."""
    with pytest.raises(ConfigError) as caught:
        read_settings(yaml.safe_load(text), overrides, "run.yaml")
    return str(caught.value).splitlines()


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["beta", "ppo.beta", "reward.beta", "ppo.reward.beta", "kl_coef", "init-kl-coef"])
def test_beta_has_many_names(name: str) -> None:
    found = find_knob(name)
    assert isinstance(found, Named)
    assert found.path == "ppo.reward.beta"


@given(st.sampled_from(sorted(knobs())))
def test_every_path_leads_to_itself(path: str) -> None:
    assert find_knob(path) == Named(path)


def test_a_short_name_leads_to_the_algorithm_first() -> None:
    assert find_knob("learning_rate") == Named("ppo.update.learning_rate")
    assert find_knob("top_layers") == Named("model.top_layers")
    assert find_knob("timeout_seconds") == Named("reward.timeout_seconds")
    assert find_knob("preferences.learning_rate") == Named("preferences.learning_rate")


def test_a_name_that_two_knobs_bear_is_refused_with_both() -> None:
    found = find_knob("whiten")
    assert isinstance(found, Fault)
    assert "ppo.reward.whiten or ppo.advantage.whiten" in str(found)
    assert isinstance(find_knob("source"), Fault)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("betta", "ppo.reward.beta"), ("ppo.update.beta", "ppo.reward.beta"), ("model.steps", "ppo.steps"),
     ("ppo.reward.clip_range", "ppo.update.clip_range"), ("evaluaton", "evaluation"),
     ("ppo.reward.bta", "ppo.reward.beta?"), ("evaluation.evry", "evaluation.every?")],
)  # fmt: skip
def test_a_misspelt_or_misplaced_knob_is_answered_with_the_one_meant(name: str, meant: str) -> None:
    assert f"did you mean {meant}" in str(find_knob(name)), name


def test_a_file_may_leave_groups_out_as_the_command_line_does() -> None:
    settings, notes = read_settings({"ppo": {"learning_rate": 1e-3, "beta": 0.2}, "max_new_tokens": 7})
    assert (settings.ppo.update.learning_rate, settings.ppo.reward.beta) == (1e-3, 0.2)
    assert settings.ppo.sampling.max_new_tokens == 7
    assert notes == []
    with pytest.raises(ConfigError, match=r"ppo\.reward\.beta: given twice, as ppo\.reward\.beta and as ppo\.beta"):
        read_settings({"ppo": {"reward": {"beta": 0.1}, "beta": 0.2}})


# ── other libraries ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_alias_leads_to_a_knob_and_none_has_two_meanings() -> None:
    assert [alias.name for alias in TRANSLATED if alias.path not in knobs()] == []
    assert len(FRIENDS) == len(TRANSLATED)
    assert len(FALSE_FRIENDS) == len(REFUSED)
    assert not FRIENDS.keys() & FALSE_FRIENDS.keys()
    own = {path.rpartition(".")[2] for path in knobs()}
    assert not own & {*FRIENDS, *FALSE_FRIENDS}, "a knob of our own would hide the alias"


@pytest.mark.parametrize("alias", TRANSLATED, ids=lambda alias: alias.name)
def test_an_alias_is_taken_in_a_file_and_beside_it(alias: object) -> None:
    assert isinstance(alias, type(TRANSLATED[0]))
    default = knobs()[alias.path].default
    value = 8 if default is None or isinstance(default, int | float) else default
    value = "x" if "str" in str(knobs()[alias.path].annotation) else value
    if alias.path == "ppo.advantage.lam":
        value = 0.5
    if alias.path == "model.gradient_checkpointing":
        value = True
    for read in (read_settings({"ppo": {alias.name: value}}), read_settings({}, [(alias.name, value)])):
        settings, notes = read
        got: object = settings
        for part in alias.path.split("."):
            got = getattr(got, part)
        assert got == (("x",) if alias.path == "report_to" else value)
        assert notes[0].startswith(f"{alias.name} → {alias.path}")


@pytest.mark.parametrize("alias", REFUSED, ids=lambda alias: alias.name)
def test_a_name_with_another_meaning_is_refused_with_what_to_write(alias: object) -> None:
    assert isinstance(alias, type(REFUSED[0]))
    line = faults_of(f"ppo: {{{alias.name}: 4}}")[0]
    assert f"ppo.{alias.name}: a name of {alias.libraries[0]}" in line
    assert alias.instead in line


def test_verls_nested_names_are_found_where_verl_has_them() -> None:
    tree = {"actor_rollout_ref": {"actor": {"clip_ratio": 0.3, "grad_clip": 0.5}}, "algorithm": {"kl_coef": 0.01}}
    settings, _ = read_settings(tree)
    assert (settings.ppo.update.clip_range, settings.ppo.update.max_grad_norm) == (0.3, 0.5)
    assert settings.ppo.reward.beta == 0.01


def test_a_knob_given_under_two_names_is_refused() -> None:
    line = faults_of("ppo: {kl_coef: 0.1, reward: {beta: 0.2}}")[0]
    assert "ppo.reward.beta: given twice, as ppo.kl_coef and as ppo.reward.beta" in line
    assert "given twice, as beta and as kl_coef" in faults_of("{}", ("beta", 1), ("kl_coef", 2))[0]


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_all_faults_of_file_and_command_line_are_reported_together() -> None:
    text = "world: nanno\nppo: {steps: 0, batch_size: 30, betaa: 2, reward: {target_kl: -1}}\nevaluation: 7"
    lines = faults_of(text, ("clip-range", Words(["x"])), ("mini_batch_size", 4))
    assert lines[0] == "run.yaml has 8 faults:"
    for expected in (
        "world: got 'nanno'; wanted smollm2, nano, or null; did you mean nano?",
        "ppo.steps: got 0; wanted a whole number ≥ 1",
        "ppo: batch_size 30 is not divisible by 4 minibatches; try batch_size=32",
        "ppo.betaa: there is no such knob; did you mean ppo.reward.beta?",
        "ppo.reward.target_kl: got -1; wanted a number > 0",
        "evaluation: got 7; wanted knobs by name: every, ",
        "ppo.update.clip_range: got 'x'; wanted a number > 0",
        "mini_batch_size: a name of TRL",
    ):
        assert any(line.strip().startswith(expected) for line in lines), expected


def test_a_contradiction_is_not_reported_on_a_knob_that_is_wrong_already() -> None:
    assert faults_of("ppo: {batch_size: 0}") == ["run.yaml: ppo.batch_size: got 0; wanted a whole number ≥ 1"]


@pytest.mark.parametrize("value", ["true", ".nan", ".inf", "[1]", "{a: 1}", "text", "null"])
def test_what_is_no_number_is_no_beta(value: str) -> None:
    assert "ppo.reward.beta" in faults_of(f"ppo: {{reward: {{beta: {value}}}}}")[0]


@pytest.mark.parametrize("text", ["judge: {source: ''}", "reward: ' '", "model: ''", "data: ''"])
def test_an_empty_name_is_a_fault_and_not_left_out(text: str) -> None:
    """As the command line gives one where a shell's variable is not set: --judge "$JUDGE"."""
    assert "wanted text" in faults_of(text)[0]


@pytest.mark.parametrize("ns", ["[0]", "[4, -2]"])
def test_best_of_none_is_refused_before_anything_is_drawn(ns: str) -> None:
    assert "wanted whole numbers ≥ 1, or [] for none" in faults_of(f"evaluation: {{best_of: {ns}}}")[0]


def test_a_negative_beta_must_be_asked_for_by_name() -> None:
    assert "allow_negative_beta: true" in faults_of("ppo: {reward: {beta: -0.1}}")[0]
    settings, _ = read_settings({"ppo": {"reward": {"beta": -0.1, "allow_negative_beta": True}}})
    assert settings.ppo.reward.beta == -0.1
    both = "ppo: {reward: {beta: -0.1, allow_negative_beta: true, controller: budget}}"
    assert "wanted fixed" in faults_of(both)[0]


@pytest.mark.parametrize("text", ["[1, 2]", "3", "words"])
def test_yaml_that_is_no_mapping_is_one_clear_fault(text: str) -> None:
    assert "wanted knobs by name" in faults_of(text)[0]


def test_a_source_may_be_given_as_one_value() -> None:
    settings, _ = read_settings({"model": "sft", "reward": "my.py:f", "data": ["a", "b"]}, [("judge", Words(["j"]))])
    assert (settings.model.source, settings.reward.source, settings.judge.source) == ("sft", "my.py:f", "j")
    assert settings.data.prompts == ("a", "b")


def test_words_of_the_command_line_become_what_the_knob_wants() -> None:
    def read(name: str, *words: str) -> RunSettings:
        return read_settings({}, [(name, Words(words))])[0]

    assert read("learning-rate", "1e-6").ppo.update.learning_rate == 1e-6
    assert read("best_of", "2", "8").evaluation.best_of == (2, 8)
    assert read("best_of", "2,8").evaluation.best_of == (2, 8)
    assert read("best_of", "5").evaluation.best_of == (5,)
    assert read("early_stop_kl", "null").ppo.update.early_stop_kl is None
    assert read("gradient_checkpointing").model.gradient_checkpointing is True
    assert read("model.source", "123").model.source == "123"
    assert read("prompts", "a, b.jsonl").data.prompts == "a, b.jsonl"
    assert read("report_to", "wandb").report_to == ("wandb",)


# ── explained ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_knob_is_explained_and_every_number_has_its_usual_range() -> None:
    assert [path for path, info in knobs().items() if not info.description] == []
    numbers = [path for path, info in knobs().items() if isinstance(info.default, float)]
    assert [path for path in numbers if not told(knobs()[path], "usual")] == []
    assert wanted(knobs()["ppo.update.early_stop_kl"]) == "a number > 0, or null"


def test_knobs_are_read_without_torch() -> None:
    code = "import sys, tether.knobs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
