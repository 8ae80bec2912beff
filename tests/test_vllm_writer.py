"""Another engine writes the responses: its weights, its versions, its random streams, and what is refused.

The engine stands in for vLLM on transformers alone; `make vllm` holds the same against vLLM itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tether import vllm_run
from tether.ahead import Request
from tether.batch import Origin, Sequences, Writer
from tether.checks import Tolerance
from tether.config import RunSettings, SamplingSettings
from tether.errors import ConfigError, NonFiniteError, WorkerError
from tether.honesty import Honesty
from tether.models import LanguagePolicy, load_policy
from tether.rollouts import sample
from tether.runtime.vllm_engine import Answer, Rule
from tether.streams import uniforms
from tether.vllm_run import folder_for, laid_bytes, vllm_writing
from tether.vllm_writer import VllmWriter, questions_of
from tether.writers import helped
from tiny_models import EOS, build, build_tokenizer, prompts_of
from tolerances import ROUND_OFF, assert_close
from vllm_stand_in import Bend, StandIn, serving

PROMPTS = prompts_of([7, 8, 9], [11], [3, 4, 5, 6], [50, 60])
WIDTH, TEMPERATURE = 6, 0.7


def policy_of(mode: str = "full", architecture: str = "qwen2", **options: object) -> LanguagePolicy:
    settings = {"top_layers": 1, "lora_rank": 4, "dtype": "float32"} | options
    return load_policy(build(architecture), build_tokenizer(), mode=mode, **settings)


def stir(policy: LanguagePolicy, seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable()["policy"]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def writer_of(policy: LanguagePolicy, folder: Path, **bounds: int) -> tuple[VllmWriter, StandIn]:
    engines: list[StandIn] = []

    def open_engine(model: Path) -> StandIn:
        engines.append(StandIn(model))
        return engines[0]

    policy.writer = VllmWriter(policy, open_engine, folder, **bounds)
    return policy.writer, engines[0]


def draws(update: int = 0) -> torch.Tensor:
    return uniforms(0, "rollout", update, PROMPTS.keys, WIDTH)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["full", "lora", "top"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_after_every_update_the_engine_draws_from_the_policy_as_it_stands(
    tmp_path: Path, mode: str, architecture: str
) -> None:
    policy = policy_of(mode, architecture)
    writer, _ = writer_of(policy, tmp_path)
    assert isinstance(writer, Writer)
    for update in range(3):
        generation = policy.generate(PROMPTS, draws(update), TEMPERATURE).trimmed()
        own = policy.evaluate(policy.prepare(Sequences.join(PROMPTS, generation, 0)), TEMPERATURE)
        assert_close(generation.sampler_logprobs, own.logprobs.detach().double(), ROUND_OFF)
        assert generation.origin == Origin("vllm", 0, update)
        stir(policy, update)


def test_an_engine_that_held_other_weights_is_given_all_of_them(tmp_path: Path) -> None:
    policy, elsewhere = policy_of("top"), tmp_path / "stranger"
    build("qwen2", seed=5).save_pretrained(elsewhere)
    policy.writer = VllmWriter(policy, lambda model: StandIn(elsewhere), tmp_path)
    generation = policy.generate(PROMPTS, draws(), 1.0).trimmed()
    own = policy.evaluate(policy.prepare(Sequences.join(PROMPTS, generation, 0)), 1.0)
    assert_close(generation.sampler_logprobs, own.logprobs.detach().double(), ROUND_OFF)


def test_weights_are_sent_when_they_moved_and_only_what_can_move(tmp_path: Path) -> None:
    policy = policy_of("top")
    _, engine = writer_of(policy, tmp_path)
    policy.generate(PROMPTS, draws(), 1.0)
    policy.generate(PROMPTS, draws(1), 1.0)
    stir(policy)
    policy.generate(PROMPTS, draws(2), 1.0)
    assert [version.rpartition("-")[2] for version, _ in engine.loads] == ["0", "1"]
    whole, part = (set(names) for _, names in engine.loads)
    assert whole == {name for name, _ in build("qwen2").named_parameters()}
    assert all(name.startswith("model.layers.2.") or name == "model.norm.weight" for name in part)


def test_matrices_that_an_engine_may_keep_as_one_are_sent_together(tmp_path: Path) -> None:
    from peft import LoraConfig

    policy = policy_of("lora", peft_config=LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    _, engine = writer_of(policy, tmp_path)
    policy.generate(PROMPTS, draws(), 1.0)
    stir(policy)
    policy.generate(PROMPTS, draws(), 1.0)
    block = "model.layers.1.self_attn."
    wanted = {name for name, _ in build("qwen2").named_parameters() if name.startswith(block)}
    assert set(engine.loads[-1][1]) == wanted


def test_weights_that_the_engine_has_read_are_not_left_lying(tmp_path: Path) -> None:
    policy = policy_of()
    writer, engine = writer_of(policy, tmp_path)
    for update in range(3):
        policy.generate(PROMPTS, draws(), 1.0)
        stir(policy, update)
        assert list(tmp_path.rglob("*.safetensors")) == []
    assert (next(tmp_path.iterdir()).stat().st_mode & 0o777) == 0o700
    writer.close()
    assert engine.closed
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_does_not_open_leaves_nothing_behind(tmp_path: Path) -> None:
    def refuses(model: Path) -> StandIn:
        raise WorkerError("no")

    with pytest.raises(WorkerError):
        VllmWriter(policy_of(), refuses, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ── what is asked and what comes back ───────────────────────────────────────────────────────────────────────────────
def test_a_response_belongs_to_its_row_whatever_else_stands_in_the_batch(tmp_path: Path) -> None:
    policy = policy_of()
    writer_of(policy, tmp_path)
    whole = policy.generate(PROMPTS, draws(), TEMPERATURE)
    part = slice(1, 3)
    few = policy.generate(PROMPTS.rows(part), draws()[part], TEMPERATURE)
    assert torch.equal(whole.responses[part], few.responses)
    assert not torch.equal(whole.responses, policy.generate(PROMPTS, draws(1), TEMPERATURE).responses)


def test_the_engine_is_asked_in_tokens_without_padding_for_pure_sampling(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    policy.generate(PROMPTS, draws(), TEMPERATURE)
    assert [question.prompt for question in engine.asked] == [(7, 8, 9), (11,), (3, 4, 5, 6), (50, 60)]
    assert engine.rules == [Rule(WIDTH, TEMPERATURE, (EOS,))]
    sampling = engine.rules[0].as_sampling(5)
    pure = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": True}
    assert pure.items() <= sampling.items()
    assert (sampling["seed"], sampling["stop_token_ids"]) == (5, [EOS])


def test_seeds_are_of_the_uniforms_and_fit_into_what_vllm_takes() -> None:
    seeds = [question.seed for question in questions_of(PROMPTS, draws())]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_response_keeps_its_eos_and_says_whether_it_ended(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    version = f"{policy.writer._run}-0"
    said = [Answer((4, EOS), (-0.1, -0.2), True, (version,)), Answer((9,) * WIDTH, (-0.3,) * WIDTH, False, (version,))]
    engine.answer = lambda questions, rule: said
    generation = policy.generate(PROMPTS.rows(slice(0, 2)), draws()[:2], 1.0)
    assert generation.responses.tolist() == [[4, EOS, 0, 0, 0, 0], [9] * WIDTH]
    assert generation.response_mask.sum(dim=1).tolist() == [2, WIDTH]
    assert generation.finished.tolist() == [True, False]
    assert_close(generation.sampler_logprobs[0], [-0.1, -0.2, 0, 0, 0, 0], ROUND_OFF)


# ── versions ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_weights_may_lag_as_far_as_was_declared_and_no_further(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path, lag=2, bound=2)
    seen = []
    for update in range(5):
        seen.append(policy.generate(PROMPTS, draws(), 1.0).origin)
        stir(policy, update)
    assert [(origin.version, origin.staleness) for origin in seen] == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1)]
    assert len(engine.loads) == 2


def test_stale_responses_beyond_the_bound_are_refused(tmp_path: Path) -> None:
    policy = policy_of()
    writer, _ = writer_of(policy, tmp_path, lag=3, bound=1)
    policy.generate(PROMPTS, draws(), 1.0)
    for update in range(2):
        stir(policy, update)
        assert writer.version == update + 1
    with pytest.raises(
        WorkerError, match=r"version 0 and the policy's is 2: 2 behind, where runtime.staleness allows 1"
    ):
        policy.generate(PROMPTS, draws(), 1.0)


def test_a_response_that_two_versions_had_a_part_in_is_as_old_as_the_older(tmp_path: Path) -> None:
    policy = policy_of()
    writer, engine = writer_of(policy, tmp_path, bound=1)
    policy.generate(PROMPTS, draws(), 1.0)
    stir(policy)
    own = engine.answer
    old = f"{writer._run}-0"
    engine.answer = lambda questions, rule: [
        replace(answer, versions=(old, *answer.versions)) for answer in own(questions, rule)
    ]
    assert policy.generate(PROMPTS, draws(), 1.0).origin == Origin("vllm", 1, 0)


@pytest.mark.parametrize("versions", [("default",), ("0ther-0",), ()])
def test_weights_that_are_not_this_runs_are_refused(tmp_path: Path, versions: tuple[str, ...]) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    own = engine.answer
    engine.answer = lambda questions, rule: [replace(answer, versions=versions) for answer in own(questions, rule)]
    with pytest.raises(WorkerError, match="wanted those of this run"):
        policy.generate(PROMPTS, draws(), 1.0)


def test_an_engine_that_died_is_started_anew_and_asked_again(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    stir(policy)
    wanted = policy.generate(PROMPTS, draws(), 1.0)
    own, deaths = engine.answer, [1, 2]

    def dies(questions, rule):
        if deaths:
            deaths.pop()
            engine.lost = True
            with torch.no_grad():
                engine.model.lm_head.weight.zero_()
            raise WorkerError("gone")
        return own(questions, rule)

    engine.answer = dies
    again = policy.generate(PROMPTS, draws(), 1.0)
    assert torch.equal(again.responses, wanted.responses)
    assert again.origin == wanted.origin
    deaths += [1, 2, 3]
    with pytest.raises(WorkerError, match="gone"):
        policy.generate(PROMPTS, draws(), 1.0)


def test_an_engine_that_died_between_two_updates_is_started_anew_with_the_new_weights(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    policy.generate(PROMPTS, draws(), 1.0)
    stir(policy)
    own, deaths = engine.load, [1]

    def dies(folder: Path, version: str) -> None:
        if deaths:
            deaths.pop()
            engine.lost = True
            raise WorkerError("gone")
        own(folder, version)

    engine.load = dies
    generation = policy.generate(PROMPTS, draws(1), 1.0).trimmed()
    evaluated = policy.evaluate(policy.prepare(Sequences.join(PROMPTS, generation, 0)), 1.0)
    assert_close(generation.sampler_logprobs, evaluated.logprobs.detach().double(), ROUND_OFF)
    assert generation.origin == Origin("vllm", 0, 1)


def test_an_engine_that_lives_is_not_asked_twice(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    asked = []

    def refuses(questions, rule):
        asked.append(rule)
        raise WorkerError("cannot")

    engine.answer = refuses
    with pytest.raises(WorkerError, match="cannot"):
        policy.generate(PROMPTS, draws(), 1.0)
    assert len(asked) == 1


@pytest.mark.parametrize("logprob", [float("nan"), -9999.0])
def test_log_probabilities_that_are_not_finite_mean_a_diverged_policy(tmp_path: Path, logprob: float) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    engine.answer = lambda questions, rule: [Answer((4,), (logprob,), False, (engine.version,)) for _ in questions]
    with pytest.raises(NonFiniteError, match="diverged"):
        policy.generate(PROMPTS, draws(), 1.0)


def test_tokens_that_the_policy_does_not_have_are_another_models(tmp_path: Path) -> None:
    policy = policy_of()
    _, engine = writer_of(policy, tmp_path)
    engine.answer = lambda questions, rule: [Answer((500,), (-1.0,), False, (engine.version,)) for _ in questions]
    with pytest.raises(WorkerError, match="token 500 and the policy has 97"):
        policy.generate(PROMPTS, draws(), 1.0)


# ── from the settings of a run ──────────────────────────────────────────────────────────────────────────────────────
def settings_of(runtime: dict, **vllm: object) -> RunSettings:
    return RunSettings.model_validate({"world": "nano", "runtime": {"writer": "vllm", "vllm": vllm} | runtime})


def test_a_run_with_an_address_has_a_writer_there_as_long_as_it_lasts(tmp_path: Path) -> None:
    policy = policy_of("top")
    with serving() as routes:
        settings = settings_of({}, address=routes.url, folder=str(tmp_path))
        noted: dict[str, object] = {}
        with helped(settings, policy, lambda: policy, [], noted.__setitem__, first=5):
            first = policy.generate(PROMPTS, draws(), TEMPERATURE)
            stir(policy)
            second = policy.generate(PROMPTS, draws(), TEMPERATURE)
    assert first.responses[:, :2].tolist() == [[9, EOS], [11, EOS], [6, EOS], [60, EOS]]
    assert [first.origin.version, second.origin.version] == [5, 6]
    assert noted == {"workers": {"runtime": "vllm", "overlap": False, "writer": f"vLLM 0.32.0 at {routes.url}"}}
    assert policy.writer is None
    assert list(tmp_path.iterdir()) == []


def test_with_overlap_what_an_update_takes_was_begun_in_the_one_before(tmp_path: Path) -> None:
    policy = policy_of("top")
    with serving() as routes:
        settings = settings_of({"overlap": True}, address=routes.url, folder=str(tmp_path))
        with helped(settings, policy, lambda: policy, [], lambda name, fact: None):
            asked = [Request(PROMPTS, draws(update), TEMPERATURE) for update in range(3)]
            policy.writer.following = lambda request: asked[1] if request.is_same(asked[0]) else None
            first = policy.generate(PROMPTS, draws(0), TEMPERATURE)
            stir(policy)
            second = policy.generate(PROMPTS, draws(1), TEMPERATURE)
    assert (first.origin.staleness, second.origin.staleness) == (0, 1)


def test_sharded_weights_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    sharded = settings_of({"processes": 2, "sharding": "fsdp"})
    elsewhere = settings_of({}, folder=str(tmp_path / "no"))
    for settings, told in ((sharded, "sharding: replicate"), (elsewhere, "wanted a folder that is there")):
        with pytest.raises(ConfigError, match=told), vllm_writing(settings, policy_of("top")):
            pass


def test_weights_are_laid_down_where_there_is_room_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's shared memory is often smaller than a model."""
    shared, other = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    other.mkdir()
    free = {shared: 64 << 20, other: 1 << 30}
    monkeypatch.setattr(vllm_run, "SHARED_MEMORY", shared)
    monkeypatch.setattr(vllm_run.tempfile, "gettempdir", lambda: str(other))
    monkeypatch.setattr(vllm_run.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    assert folder_for(None, 1 << 20) == shared
    assert folder_for(None, 512 << 20) == other
    told = r"take 2.00 GiB and .*shm has 0.06 free, .*tmp has 1.00 free; .*runtime.vllm.folder"
    with pytest.raises(ConfigError, match=told):
        folder_for(None, 2 << 30)
    with pytest.raises(ConfigError, match=r"take 0.50 GiB and .*shm has 0.06 free"):
        folder_for(str(shared), 512 << 20)


def test_a_tied_head_is_counted_with_what_is_laid_down() -> None:
    policy = policy_of("full", "llama")
    embeddings = policy.mode.model.get_input_embeddings().weight
    unique = sum(weight.numel() for weight in policy.mode.model.parameters())
    assert policy.mode.head.linear.weight is embeddings
    assert laid_bytes(policy) == 4 * (unique + embeddings.numel())


# ── what a run makes of it ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_rollout_tells_whose_it_is_and_how_far_off(tmp_path: Path) -> None:
    policy = policy_of()
    writer_of(policy, tmp_path, lag=1, bound=1)
    settings = SamplingSettings(max_new_tokens=WIDTH, importance_cap=1.5)
    fresh = sample(policy, PROMPTS, draws(), settings)
    stir(policy)
    old = sample(policy, PROMPTS, draws(1), settings)
    assert (fresh.metrics["rollout/version"], fresh.metrics["rollout/staleness"]) == (0.0, 0.0)
    assert (old.metrics["rollout/version"], old.metrics["rollout/staleness"]) == (0.0, 1.0)
    assert fresh.metrics["sampler/logprob_gap"] < 1e-5
    assert fresh.metrics["sampler/weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert fresh.metrics["sampler/weight_capped"] == 0.0
    ratio = (old.logprobs - old.sampler_logprobs).exp()[old.response_mask]
    assert old.metrics["sampler/logprob_gap"] == pytest.approx(float(ratio.log().pow(2).mean().sqrt()), rel=1e-4)
    assert old.metrics["sampler/weight_mean"] == pytest.approx(float(ratio.clamp(max=1.5).mean()), rel=1e-4)
    assert old.metrics["sampler/weight_capped"] == pytest.approx(float((ratio >= 1.5).float().mean()))


def test_the_policys_own_sampler_logs_nothing_of_the_kind() -> None:
    metrics = sample(policy_of(), PROMPTS, draws(), SamplingSettings(max_new_tokens=WIDTH)).metrics
    assert [name for name in metrics if name.startswith(("rollout/", "sampler/"))] == []


def alarms_of(policy: LanguagePolicy, updates: int, *, move: bool = False) -> list[str]:
    """What the checks of the sampler say over some updates of sixteen prompts."""
    honesty = Honesty(0, TEMPERATURE, Tolerance.of(torch.float32))
    settings = SamplingSettings(max_new_tokens=WIDTH, temperature=TEMPERATURE)
    prompts = prompts_of(*[[5 + row, 6] for row in range(16)])
    said = []
    for update in range(updates):
        rollout = sample(policy, prompts, uniforms(0, "rollout", update, prompts.keys, WIDTH), settings)
        said += [alarm.reason for alarm in honesty.check(policy, rollout, update)]
        if move:
            stir(policy, update)
    return said


def test_an_honest_engine_raises_no_alarm(tmp_path: Path) -> None:
    policy = policy_of("top")
    writer_of(policy, tmp_path)
    assert alarms_of(policy, 8, move=True) == []


def test_declared_staleness_raises_no_alarm(tmp_path: Path) -> None:
    policy = policy_of("top")
    writer_of(policy, tmp_path, lag=1, bound=1)
    assert alarms_of(policy, 8, move=True) == []


@pytest.mark.parametrize(
    ("bend", "name"),
    [
        (lambda logits: logits / 0.8, "temperature_mismatch"),
        (lambda logits: logits.where(logits >= logits.topk(12).values[-1], -torch.inf), "top_k"),
    ],
)
@pytest.mark.parametrize("tells", [True, False], ids=["and-tells", "and-hides-it"])
def test_an_engine_that_bends_the_distribution_is_named(tmp_path: Path, bend: Bend, name: str, tells: bool) -> None:
    policy = policy_of("top")
    _, engine = writer_of(policy, tmp_path)
    engine.bend, engine.tells = bend, tells
    said = alarms_of(policy, 12)
    assert said[-1] == name


def test_an_engine_that_keeps_its_old_weights_and_says_it_has_the_new_is_seen(tmp_path: Path) -> None:
    policy = policy_of("top")
    _, engine = writer_of(policy, tmp_path)
    own = engine.load
    engine.load = lambda folder, version: setattr(engine, "version", version) if engine.loads else own(folder, version)
    assert "stale_sampler" in alarms_of(policy, 4, move=True)


def test_what_was_begun_ahead_is_one_update_old_when_it_is_used(tmp_path: Path) -> None:
    policy = policy_of()
    writer, _ = writer_of(policy, tmp_path, bound=1)
    begun = writer.begin(PROMPTS, draws(), 1.0)
    stir(policy)
    assert begun.take().origin == Origin("vllm", 1, 0)
