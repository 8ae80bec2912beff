"""`tether.train` as a new user calls it: a checkpoint, a Python function, a list of prompts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import tether
from tether import cli
from tether.api import TrainedRun
from tether.config import RunSettings
from tether.errors import ConfigError, InputError, ModelError, OutOfMemory, RewardError, RunError
from tether.models import LanguagePolicy
from tether.store import RunStore
from tether.task import open_policy
from tiny_models import build, build_tokenizer
from tolerances import ROUND_OFF, assert_close

PROMPTS = [f"w{i} w{i + 1}" for i in range(3, 23)]
SMALL = {"batch_size": 8, "max_new_tokens": 8, "mode": "full", "quiet": True, "minibatches": 2}


def different_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(set(response.split()))) for response in responses]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sft"
    build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run: TrainedRun) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.policy.mode.model.parameters()])


# ── the quick start ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_new_user_trains_saves_and_loads_with_transformers(here: Path, checkpoint: Path) -> None:
    run = tether.train(policy=checkpoint, reward=different_words, prompts=PROMPTS, beta=0.05, steps=3, **SMALL)
    assert run.folder.parent == Path("runs")
    assert len(run.metrics("kl/mean")) == 3
    assert run.metrics("kl/mean")[0] == 0.0
    np.testing.assert_array_equal(run.metrics("objective/kl"), run.metrics("kl/mean"))
    run.save_pretrained("out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer("w3 w4", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, held = model(ids).logits, run.policy.mode.model(ids).logits
        assert not torch.equal(trained, before(ids).logits)
    assert_close(trained, held, ROUND_OFF)
    with pytest.raises(RunError, match="out exists"):
        run.save_pretrained("out")


def test_a_run_keeps_as_many_replies_of_the_reference_as_an_evaluation_has_and_is_the_same_without(
    here: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bank that the page's ghost is made of: 4 replies to each of some held-out prompts, by draws of their own."""
    prompts = [f"w{i} w{j}" for i in range(3, 23) for j in range(3, 13)]
    asked: list[int] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        asked.append(len(responses))
        return different_words(prompts, responses)

    def train(name: str) -> TrainedRun:
        asked.clear()
        return tether.train(policy=checkpoint, reward=reward, prompts=prompts, steps=2, name=name, **SMALL)

    monkeypatch.setenv("TETHER_CACHE", str(here / "cache"))
    kept = train("kept")
    with_bank = sum(asked)
    scores = np.array(json.loads((kept.folder / "bank.json").read_text())["scores"])
    monkeypatch.setattr("tether.session.bank_size", lambda *_: (0, 4))
    none = train("none")
    assert scores.shape[1] == 4
    assert scores.size == with_bank - sum(asked)
    assert 16 <= scores.size <= (none.metrics("eval/score").size and sum(asked) - 2 * SMALL["batch_size"]) / 2
    assert not (none.folder / "bank.json").exists()
    assert torch.equal(weights(kept), weights(none))


def test_importing_tether_loads_no_torch() -> None:
    code = "import sys, tether; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"train", "TrainedRun"} <= set(dir(tether))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = tether.trian


def test_a_model_object_stays_as_it_was(here: Path) -> None:
    model, tokenizer = build("gpt2"), build_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = tether.train(
        policy=model, tokenizer=tokenizer, reward=different_words, prompts=PROMPTS[:3], steps=1, name="object", **SMALL
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(weights(run), torch.cat([p.detach().flatten() for p in model.parameters()]))
    with pytest.raises(ModelError, match="pass tokenizer="):
        tether.train(policy=model, reward=different_words, prompts=PROMPTS, steps=1, **SMALL)


def test_columns_reach_the_reward_and_a_judge_is_gold(here: Path, checkpoint: Path) -> None:
    seen: list[object] = []

    def reward(prompts: Sequence[str], responses: Sequence[str], answer: Sequence[object]) -> list[float]:
        seen.extend(answer)
        return [1.0] * len(responses)

    rows = [{"prompt": prompt, "answer": place} for place, prompt in enumerate(PROMPTS)]
    run = tether.train(
        policy=checkpoint, reward=reward, prompts=rows, judge=different_words, steps=1, name="columns", **SMALL
    )
    assert set(seen) <= set(range(len(PROMPTS)))
    assert run.metrics("eval/gold").shape == (2,)
    assert 0 <= run.metrics("eval/win_rate")[-1] <= 1
    assert "eval/holdout" not in RunStore.open(run.folder).names()


def test_what_is_given_by_name_stays_in_the_run_so_that_commands_can_take_it_up(
    here: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text(
        "def words(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
    )
    (here / "prompts.txt").write_text("\n".join(PROMPTS))
    given = {"policy": checkpoint, "prompts": Path("prompts.txt"), "judge": "mine.py:words"}
    recipe = {"reward": {"parts": {"old": "mine.py:gone"}}}
    run = tether.train(**given, reward="mine.py:words", recipe=recipe, steps=1, name="named", **SMALL)
    object_run = tether.train(**given, reward=read_words(here), steps=1, name="object", **SMALL)
    np.testing.assert_array_equal(run.metrics("score/mean"), object_run.metrics("score/mean"))
    assert cli.run(["eval", "named", "--no-best-of"]) == 0
    assert "gold" in capsys.readouterr().out
    assert cli.run(["fork", "named", "--name", "longer", "--steps", "2"]) == 0


def test_the_score_of_a_reward_from_python_is_asked_for_by_name(
    here: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text(
        "def words(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
        "def other(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    tether.train(policy=checkpoint, reward=read_words(here), prompts=PROMPTS, steps=1, name="python", **SMALL)
    (here / "held.txt").write_text("\n".join(PROMPTS))
    capsys.readouterr()
    assert cli.run(["eval", "python", "--no-best-of"]) == 1
    told = capsys.readouterr().err
    assert "what its reward and prompts were, which came from Python" in told
    assert "--reward FILE.py:NAME --prompts FILE" in told
    arguments = ["eval", "python", "--no-best-of", "--json", "--prompts", "held.txt", "--timeout", "30", "--reward"]
    for reward, warnings in (("mine.py:words", 0), ("mine.py:other", 1)):
        assert cli.run([*arguments, reward]) == 0
        found = json.loads(capsys.readouterr().out)["warnings"]
        assert len(found) == warnings
        assert all("not that of the reward which" in warning for warning in found)


def read_words(folder: Path) -> object:
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.words


def test_one_prompt_is_enough_and_says_that_nothing_is_held_out(
    here: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = SMALL | {"quiet": False}
    run = tether.train(policy=checkpoint, reward=different_words, prompts=["w3 w4"], steps=1, name="one", **loud)
    assert "nothing is held out" in " ".join(capsys.readouterr().out.split())
    assert len(run.metrics("eval/score")) == 2


def test_conversations_work_where_the_tokenizer_has_a_template(here: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w5"
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    run = tether.train(
        policy=build("llama"), tokenizer=tokenizer, reward=different_words, prompts=prompts, steps=1, name="c", **SMALL
    )
    assert len(run.metrics("score/mean")) == 1


# ── knobs ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_keywords_are_knobs_and_win_over_the_recipe(here: Path, checkpoint: Path) -> None:
    recipe = {"ppo": {"steps": 9, "reward": {"beta": 0.5}}, "model": str(checkpoint)}
    run = tether.train(reward=different_words, prompts=PROMPTS, recipe=recipe, steps=1, cliprange=0.1, **SMALL)
    ppo = run.settings.ppo
    assert (ppo.steps, ppo.reward.beta, ppo.update.clip_range) == (1, 0.5, 0.1)
    assert run.settings.model.source == str(checkpoint)
    again = tether.train(reward=different_words, prompts=PROMPTS, recipe=run.settings, name="again", quiet=True)
    assert again.settings == run.settings
    np.testing.assert_array_equal(again.metrics("loss/policy"), run.metrics("loss/policy"))


def test_all_faults_of_the_keywords_come_together(here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tether.train(policy="x", reward=different_words, prompts=PROMPTS, beta=-1, steps=0, betta=2, mini_batch_size=4)
    for expected in ("4 faults", "allow_negative_beta", "ppo.steps: got 0", "did you mean ppo.reward.beta", "a count"):
        assert expected in str(caught.value)
    with pytest.raises(ConfigError, match=r"no model.source .* no data.prompts .* no reward.source"):
        tether.train()
    assert not Path("runs").exists()


def test_groups_of_knobs_are_given_as_in_a_recipe(here: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tether.train(policy="x", reward=different_words, prompts=PROMPTS, evaluation={"prompts": 0, "evry": 1}, ppo=3)
    for expected in (
        "3 faults",
        "evaluation.prompts: got 0",
        "did you mean evaluation.every",
        "ppo: got 3; wanted knobs",
    ):
        assert expected in str(caught.value)
    given = {"evaluation": {"prompts": 3}, "model": {"gradient_checkpointing": True}, "report_to": None} | SMALL
    run = tether.train(policy=checkpoint, reward=different_words, prompts=PROMPTS, steps=1, **given)
    assert (run.settings.evaluation.prompts, run.settings.model.source) == (3, str(checkpoint))
    assert run.settings.model.gradient_checkpointing


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"policy": torch.nn.Linear(1, 1)}, "policy is Linear; wanted a folder, .*=model.merge_and_unload"),
        (
            {"tokenizer": "org/model"},
            r"wanted the tokenizer itself: tokenizer=AutoTokenizer.from_pretrained\('org/model'",
        ),
    ],
)
def test_an_object_of_another_kind_is_named(here: Path, given: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tether.train(**({"policy": build("llama"), "reward": different_words, "prompts": PROMPTS} | given))


def test_runs_of_one_second_that_nobody_named_are_several(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(settings: RunSettings, root: Path, name: str, *_: object) -> TrainedRun:
        (root / name).mkdir(parents=True)
        made.append(name)
        return TrainedRun(root / name, settings)

    monkeypatch.setattr("tether.api.carry_out", make)
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    for _ in range(2):
        tether.train(policy="x", reward=different_words, prompts=PROMPTS)
    assert made == ["now", "now-2"]
    with pytest.raises(RunError, match="now-2 exists"):
        tether.train(policy="x", reward=different_words, prompts=PROMPTS, name="now-2")


@pytest.mark.parametrize("mode", ["full", "top"])
def test_the_size_of_a_micro_batch_changes_nothing(here: Path, checkpoint: Path, mode: str) -> None:
    given = SMALL | {"mode": mode, "steps": 1, "learning_rate": 1e-3, "early_stop_kl": None, "heldout": ["w3"]}
    runs = [
        tether.train(policy=checkpoint, reward=different_words, prompts=PROMPTS, name=f"tokens-{tokens}",
                     tokens_per_micro_batch=tokens, max_padding=1.0, **given)
        for tokens in (1, 4096)
    ]  # fmt: skip
    start = torch.cat([p.detach().flatten() for p in open_policy(checkpoint, runs[0].settings).mode.model.parameters()])
    moved = (weights(runs[-1]) - start).abs().max()
    assert moved > 1e-3, "training moved nothing, so equality would say nothing"
    for run in runs[:-1]:
        torch.testing.assert_close(weights(run), weights(runs[-1]), rtol=0, atol=float(moved) * 1e-2)
        np.testing.assert_allclose(run.metrics("loss/policy"), runs[-1].metrics("loss/policy"), atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_gradient_checkpointing_changes_no_bit(here: Path, checkpoint: Path, mode: str) -> None:
    given = SMALL | {"mode": mode, "steps": 1, "learning_rate": 1e-3, "heldout": ["w3"]}
    kept, recomputed = (
        tether.train(policy=checkpoint, reward=different_words, prompts=PROMPTS, name=f"recompute-{again}",
                     gradient_checkpointing=again, **given)
        for again in (False, True)
    )  # fmt: skip
    assert torch.equal(weights(kept), weights(recomputed))
    np.testing.assert_array_equal(kept.metrics("grad/norm"), recomputed.metrics("grad/norm"))


@pytest.mark.parametrize(
    ("method", "when", "knob"),
    [("evaluate", True, r"tokens_per_micro_batch: 2048"), ("generate", False, r"ppo\.batch_size: 4")],
)
def test_out_of_memory_names_the_knob_of_the_room_where_it_happened(
    here: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, method: str, when: bool, knob: str
) -> None:
    own = getattr(LanguagePolicy, method)

    def exhausted(self: LanguagePolicy, *given: object) -> object:
        if torch.is_grad_enabled() == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(self, *given)

    monkeypatch.setattr(LanguagePolicy, method, exhausted)
    with pytest.raises(OutOfMemory, match=knob):
        tether.train(policy=checkpoint, reward=different_words, prompts=PROMPTS, steps=1, name="full", **SMALL)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────
def raises(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise KeyError("missing")


@pytest.mark.parametrize(
    ("reward", "error", "told"),
    [
        (raises, RewardError, "KeyError: 'missing'"),
        (lambda prompts, responses: [float("nan")] * len(responses), InputError, "nan"),
        (lambda prompts, responses: [1.0], InputError, "wanted exactly one each"),
        (lambda prompts, responses: "good", InputError, "wanted"),
        (7, InputError, "wanted a function"),
    ],
)
def test_a_bad_reward_is_one_clear_error(
    here: Path, checkpoint: Path, reward: object, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        tether.train(policy=checkpoint, reward=reward, prompts=PROMPTS, steps=1, name="bad", **SMALL)


def test_a_reward_that_hangs_ends_by_its_limit(here: Path, checkpoint: Path) -> None:
    import threading

    release = threading.Event()
    with pytest.raises(RewardError, match=r"in 0\.2 s"):
        tether.train(
            policy=checkpoint, prompts=PROMPTS, steps=1,
            reward=lambda prompts, responses: release.wait(60) and [], timeout_seconds=0.2, **SMALL,
        )  # fmt: skip
    release.set()


@pytest.mark.parametrize("prompts", [[], [""], [{"question": "w3"}], 7])
def test_prompts_that_are_none_are_one_clear_error(here: Path, checkpoint: Path, prompts: object) -> None:
    with pytest.raises((InputError, ConfigError), match=r"wanted|remove|found"):
        tether.train(policy=checkpoint, reward=different_words, prompts=prompts, steps=1, name="none", **SMALL)


def test_a_source_that_is_no_causal_lm_is_one_clear_error(here: Path, checkpoint: Path) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained("bert")
    build_tokenizer().save_pretrained("bert")
    (here / "empty").mkdir()
    for source, told in (("bert", "no causal LM"), ("empty", "Wanted a folder"), ("./nowhere", "is no folder")):
        with pytest.raises(ModelError, match=told):
            tether.train(policy=source, reward=different_words, prompts=PROMPTS, steps=1, **SMALL)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_loaded(here: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(RunError, match="choose another folder"):
        tether.train(policy="nowhere", reward=different_words, prompts=PROMPTS, root="file/runs")
    with pytest.raises(InputError, match="try 'a-b'"):
        tether.train(policy="nowhere", reward=different_words, prompts=PROMPTS, name="a/b")
    Path("runs/taken").mkdir(parents=True)
    with pytest.raises(RunError, match="choose another name"):
        tether.train(policy="nowhere", reward=different_words, prompts=PROMPTS, name="taken")


def test_responses_longer_than_the_context_are_refused_with_a_number_that_fits(here: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens is 64 .* try 32"):
        tether.train(
            policy=checkpoint, reward=different_words, prompts=PROMPTS, steps=1, **(SMALL | {"max_new_tokens": 64})
        )
