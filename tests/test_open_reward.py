"""From what people have to a reward: strings as in YAML, objects as in Python, and what is said of neither."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from tether.batch import ScoresRollouts
from tether.errors import ConfigError, InputError, ModelError, RewardError
from tether.open_reward import as_reward, open_reward
from tether.reward_endpoint import Endpoint
from tether.reward_functions import FunctionReward
from tether.reward_model import RewardModel
from tether.reward_sources import Ensemble, Listed, WeightedSum
from tether.reward_spec import RewardSpec
from tether.token_rewards import TokenRewards
from tiny_models import build_tokenizer

P, R = ["w5", "w6"], ["w7", "w8 w9"]
SOURCE = """
from dataclasses import dataclass
from words import count

def brevity(prompts, responses):
    return [-float(count(response)) for response in responses]

async def awaited(prompts, responses):
    return brevity(prompts, responses)

def per_token(prompts, responses, response_ids):
    return [[1.0] * len(ids) for ids in response_ids]

@dataclass
class Scaled:
    scale: float
    def __call__(self, prompts, responses):
        return [self.scale * number for number in brevity(prompts, responses)]

twice = Scaled(2.0)
NUMBER = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file and a package of rewards; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "__init__.py").touch()
    for folder in (tmp_path, tmp_path / "mine"):
        (folder / "rewards.py").write_text(SOURCE, encoding="utf-8")
        (folder / "words.py").write_text("def count(text):\n    return len(text.split())\n", encoding="utf-8")
    (tmp_path / "mine" / "deep" / "judge.py").write_text("def one(p, r):\n    return [1.0] * len(r)\n", "utf-8")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "program.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n", "utf-8")
    (tmp_path / "lacks.py").write_text("import no_such_module_anywhere\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def classifier(labels: int = 1) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=97, num_labels=labels, max_position_embeddings=32, pad_token_id=None, **sizes)
    return LlamaForSequenceClassification(config)


@pytest.fixture
def folder(here: Path) -> str:
    classifier().save_pretrained(here / "model")
    build_tokenizer().save_pretrained(here / "model")
    return "model"


# ── strings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("rewards.py:brevity", [-1.0, -2.0]),
        ("./mine/rewards.py:brevity", [-1.0, -2.0]),
        ("rewards:brevity", [-1.0, -2.0]),
        ("mine.deep.judge:one", [1.0, 1.0]),
        ("rewards.py:awaited", [-1.0, -2.0]),
        ("rewards.py:twice", [-2.0, -4.0]),
        ("rewards.py:twice.__call__", [-2.0, -4.0]),
        ({"source": "rewards.py:brevity"}, [-1.0, -2.0]),
        ({"parts": {"a": "rewards.py:brevity", "b": {"source": "mine.deep.judge:one", "weight": 0.5}}}, [-0.5, -1.5]),
        ({"ensemble": ["rewards.py:brevity", "rewards.py:twice"], "ensemble_by": "min"}, [-2.0, -4.0]),
        (
            {"ensemble": ["rewards.py:brevity", "rewards.py:twice"], "ensemble_by": "variance", "ensemble_penalty": 2},
            [-1.5 - 2 * 0.25, -3.0 - 2 * 1.0],
        ),
    ],
)
def test_what_yaml_says_opens_a_reward(here: Path, spec: object, wanted: list[float]) -> None:
    said = yaml.safe_load(yaml.safe_dump(spec))
    assert open_reward(said)(P, R) == pytest.approx(wanted)
    assert as_reward(said)(P, R) == pytest.approx(wanted)
    assert open_reward(RewardSpec.model_validate(said))(P, R) == pytest.approx(wanted)
    assert str(here) not in sys.path


def test_a_classifier_is_opened_by_its_folder(folder: str) -> None:
    wanted = RewardModel.load(folder)(P, R)
    for spec in (folder, Path(folder), {"parts": {"only": folder}}, {"ensemble": [folder, folder]}):
        assert open_reward(spec)(P, R) == pytest.approx(wanted)
    assert isinstance(open_reward(folder), RewardModel)
    assert isinstance(open_reward({"parts": {"only": folder}}), ScoresRollouts)


def test_an_address_and_a_list_are_opened(here: Path) -> None:
    endpoint = open_reward({"source": "https://judge.example/score", "timeout_seconds": 3, "retries": 1})
    assert isinstance(endpoint, Endpoint)
    assert (endpoint.url, endpoint.timeout_seconds, endpoint.retries) == ("https://judge.example/score", 3.0, 1)
    assert open_reward("http://judge.example/").timeout_seconds == 60.0
    rows = [{"prompt": p, "response": r, "score": len(r)} for p, r in zip(P, R, strict=True)]
    (here / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert open_reward("scores.jsonl")(P, R) == [2.0, 5.0]


def test_limits_and_token_rewards_reach_the_function(here: Path) -> None:
    limited = open_reward({"source": "rewards.py:brevity", "timeout_seconds": 7})
    assert isinstance(limited, FunctionReward)
    assert limited.timeout_seconds == 7.0
    part = open_reward({"parts": {"a": "rewards.py:brevity"}, "timeout_seconds": 7}).parts["a"]
    assert part.timeout_seconds == 7.0
    assert isinstance(open_reward({"source": "rewards.py:per_token", "per_token": True}), TokenRewards)
    with pytest.raises(InputError, match="wants the column 'response_ids'"):
        open_reward("rewards.py:per_token")(P, R)


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("nowhere.py:f", InputError, r"there is no file 'nowhere\.py' in .*; wanted file\.py:function"),
        (
            "rewards.py:brevty",
            InputError,
            "no 'brevty'; did you mean 'brevity'.*: brevity, awaited, per_token, Scaled, twice$",
        ),
        ("rewards.py:", InputError, "no ''"),
        ("rewards.py", InputError, r"names no function in that file; wanted rewards\.py:function"),
        ("rewards.py:Scaled", InputError, "is a class; wanted a function or an object"),
        ("rewards.py:NUMBER", InputError, "got 3 as a reward"),
        ("no_such_package.judge:f", InputError, "cannot import 'no_such_package.judge': No module named 'no_such_pack"),
        ("mine.deep.jugde:one", InputError, "No module named 'mine.deep.jugde'; looked in"),
        ("broken.py:f", InputError, "importing 'broken.py' failed: ZeroDivisionError: division by zero"),
        ("program.py:f", InputError, "importing 'program.py' ends the program .* below: if __name__ == \"__main__\":"),
        ("lacks.py:f", InputError, "No module named 'no_such_module_anywhere'"),
        ("./no-such-folder", ModelError, r"cannot read a reward model from './no-such-folder'"),
        ("none.jsonl", InputError, "there is no file none.jsonl"),
        ("http://", InputError, "no address of a reward"),
        ({"parts": {"a": "rewards.py:brevity", "b": "broken.py:f"}}, InputError, "importing 'broken.py' failed"),
        ({"ensemble": ["rewards.py:brevity", "nowhere.py:f"]}, InputError, "no file 'nowhere.py'"),
        ({}, ConfigError, "neither; wanted exactly one of source, parts, ensemble"),
        ({"source": "a", "ensemble": ["a", "b"]}, ConfigError, "by source and ensemble; wanted exactly one"),
        ({"ensemble": ["a"]}, ConfigError, "1 member"),
        ({"parts": {"a": "x"}, "per_token": True}, ConfigError, "per_token is of a single function"),
        ({"source": "a", "colour": "red", "retries": -1}, ConfigError, r"colour: .*retries|retries: .*colour"),
        ({"parts": {"a": {"source": "x", "wieght": 1}}}, ConfigError, r"parts\.a\.wieght"),
        ({"source": "a", "timeout_seconds": 0}, ConfigError, "timeout_seconds"),
    ],
)
def test_what_cannot_be_found_is_one_clear_error(here: Path, spec: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        open_reward(spec)
    assert "tether_reward_broken" not in sys.modules
    assert str(here) not in sys.path


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def brevity(prompts, responses):
    return [-float(len(response)) for response in responses]


def praise(prompts, responses):
    return [2.0] * len(responses)


def test_objects_become_the_rewards_that_they_stand_for() -> None:
    model, words = classifier(), build_tokenizer()
    of_model = RewardModel.load(model, words)
    cases: list[tuple[object, Callable, list[float]]] = [
        (brevity, FunctionReward, [-2.0, -5.0]),
        (SimpleNamespace(score=brevity).score, FunctionReward, [-2.0, -5.0]),
        ((model, words), RewardModel, of_model(P, R)),
        ({"a": brevity, "b": (praise, 0.5)}, WeightedSum, [-1.0, -4.0]),
        ({"a": {"source": f"{__file__}:brevity", "weight": 2.0}, "b": praise}, WeightedSum, [-2.0, -8.0]),
        ([brevity, praise], WeightedSum, [0.0, -3.0]),
        ([(brevity, 2.0), praise], WeightedSum, [-2.0, -8.0]),
        ([{"prompt": p, "response": r, "score": 1} for p, r in zip(P, R, strict=True)], Listed, [1.0, 1.0]),
        ({("w5", "w7"): 1.0, ("w6", "w8 w9"): 2.0}, Listed, [1.0, 2.0]),
        ({"parts": {"a": f"{__file__}:brevity"}}, WeightedSum, [-2.0, -5.0]),
    ]
    for given, kind, wanted in cases:
        reward = as_reward(given)
        assert isinstance(reward, kind)
        assert reward(P, R) == pytest.approx(wanted)
    assert list(as_reward([brevity, praise]).parts) == ["brevity", "praise"]
    assert list(as_reward([brevity, praise, brevity]).parts) == ["brevity_0", "praise", "brevity_2"]
    assert list(as_reward([brevity, "http://judge.example/a/b"]).parts) == ["brevity", "http:__judge.example_a_b"]


def test_a_reward_stays_the_object_that_it_is() -> None:
    rewards = (
        FunctionReward(brevity), WeightedSum({"a": brevity}), Ensemble([brevity, praise]), Endpoint("http://host/"),
        Listed({("p", "r"): 1.0}), TokenRewards(brevity), RewardModel.load(classifier(), build_tokenizer()),
    )  # fmt: skip
    for reward in rewards:
        assert as_reward(reward) is reward


def test_a_limit_reaches_functions_wherever_they_stand() -> None:
    assert as_reward(brevity, timeout_seconds=3.0).timeout_seconds == 3.0
    assert as_reward({"a": (brevity, 1.0)}, timeout_seconds=3.0).parts["a"].timeout_seconds == 3.0
    assert as_reward([brevity], timeout_seconds=3.0).parts["brevity"].timeout_seconds == 3.0


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (None, InputError, "got None as a reward; wanted a function"),
        (5, InputError, "got 5 as a reward"),
        (FunctionReward, InputError, "as a reward; wanted a function"),
        ([], InputError, "got no reward"),
        ({}, InputError, "got no reward"),
        ([0.5, 1.0], InputError, "list of numbers as a reward; wanted their prompts and responses"),
        ({"a": (brevity, "much")}, InputError, "weight of 'a' is 'much'"),
        ([(brevity, "much")], InputError, "weight of 'brevity' is 'much'"),
        ((brevity, praise), InputError, "as a reward"),
        ({"a": None}, InputError, "got None as a reward"),
        ((classifier(), None), InputError, r"came with NoneType; wanted \(model, tokenizer\)"),
        (classifier(), ModelError, "without a tokenizer"),
        ((classifier(2), build_tokenizer()), ModelError, r"has 2 labels; wanted .*logits\[:, 1\] - logits\[:, 0\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_stands_for_no_reward_is_refused(given: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        as_reward(given)


def test_a_folder_with_two_labels_says_what_to_do(here: Path) -> None:
    classifier(2).save_pretrained(here / "two")
    build_tokenizer().save_pretrained(here / "two")
    with pytest.raises(ModelError, match=r"has 2 labels; wanted one with num_labels=1.*give a function"):
        open_reward("two")


def test_a_part_that_is_broken_says_so_when_it_is_asked() -> None:
    def broken(prompts, responses):
        raise ValueError("no")

    with pytest.raises(RewardError, match="broken failed"):
        as_reward([brevity, broken])(P, R)
