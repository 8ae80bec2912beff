"""What a run is about, from settings alone: prompts held out, judges of one's own, base models refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tether.errors import ConfigError, ModelError
from tether.knobs import read_settings
from tether.prompts import PromptSet
from tether.tasks import Brought, distinct, hold_out, open_task, require_complete
from tiny_models import build, build_tokenizer


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), st.floats(0.01, 0.5), st.integers(0, 3))
def test_every_prompt_is_on_exactly_one_side(texts: list[str], share: float, seed: int) -> None:
    if len(set(texts)) == 1:
        return
    everything = PromptSet(tuple(texts), {"place": tuple(range(len(texts)))})
    train, heldout = hold_out(everything, share, seed)
    assert not set(train.prompts) & set(heldout.prompts)
    assert sorted([*train.columns["place"], *heldout.columns["place"]]) == list(range(len(texts)))
    assert train.prompts
    assert heldout.prompts
    assert all(texts[place] == prompt for place, prompt in zip(train.columns["place"], train.prompts, strict=True))  # type: ignore[call-overload]
    assert len(set(heldout.prompts)) <= max(1, round(share * len(set(texts))))


def test_the_seed_chooses_what_is_held_out() -> None:
    everything = PromptSet(tuple(f"w{place}" for place in range(50)))
    chosen = {hold_out(everything, 0.1, seed)[1].prompts for seed in range(5)}
    assert len(chosen) == 5
    assert hold_out(everything, 0.1, 3) == hold_out(everything, 0.1, 3)


def test_conversations_are_told_apart_by_what_they_say() -> None:
    one = ({"role": "user", "content": "a"},)
    other = ({"role": "user", "content": "b"},)
    assert list(distinct(PromptSet((one, other, one))).values()) == [[0, 2], [1]]


def test_all_that_is_missing_is_named_at_once() -> None:
    settings, _ = read_settings({})
    with pytest.raises(
        ConfigError, match=r"no model\.source .*, no data\.prompts .*, no reward\.source .*--world nano"
    ):
        require_complete(settings)
    with pytest.raises(ConfigError, match=r"^the run has no reward\.source"):
        require_complete(settings, Brought(model=build("llama"), prompts=["w3"]))
    require_complete(read_settings({"world": "nano"})[0])


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("sft")
    build_tokenizer().save_pretrained("sft")
    Path("r.py").write_text("def f(prompts, responses): return [1.0] * len(responses)\n")
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{n}", "answer": n}) for n in range(10)))
    return tmp_path


def test_settings_alone_open_a_task_of_ones_own(user: Path) -> None:
    tree = {"model": "sft", "data": "p.jsonl", "reward": "r.py:f", "judge": "r.py:f", "holdout": "r.py:f"}
    task = open_task(read_settings(tree)[0], Console(quiet=True))
    assert task.model == "sft"
    assert (len(task.train), len(task.heldout)) == (9, 1)
    assert task.train.columns.keys() == {"answer"}
    assert task.judges.all.keys() == {"score", "holdout", "gold"}
    assert list(task.judges.reward(["a"], ["b"])) == [1.0]


def test_held_out_prompts_may_be_a_file_of_their_own(user: Path) -> None:
    Path("h.txt").write_text("w3 w4\nw5 w6\n")
    tree = {"model": "sft", "data": {"prompts": "p.jsonl", "heldout": "h.txt"}, "reward": "r.py:f"}
    task = open_task(read_settings(tree)[0], Console(quiet=True))
    assert task.heldout.prompts == ("w3 w4", "w5 w6")
    assert len(task.train) == 10


def test_a_model_known_to_be_a_base_is_refused_unless_asked_for_by_name(user: Path) -> None:
    Path("world").mkdir()
    Path("sft").rename("world/base")
    Path("world/tether.json").write_text("{}")  # as in the nano world: `base` beside `sft`
    tree = {"model": {"source": "world/base"}, "data": "p.jsonl", "reward": "r.py:f"}
    with pytest.raises(ModelError, match="base model"):
        open_task(read_settings(tree)[0], Console(quiet=True))
    asked, _ = read_settings(tree, [("allow_base", True)])
    assert open_task(asked, Console(quiet=True)).model == "world/base"


def test_a_model_that_may_be_a_base_is_named_as_such(user: Path) -> None:
    console = Console(record=True, width=300)
    open_task(read_settings({"model": "sft", "data": "p.jsonl", "reward": "r.py:f"})[0], console)
    assert "no chat template" in console.export_text()
