"""Workers in the learner's place, and responses written ahead, with stand-ins in this process: no Ray is started.

The oracles are the policy's own sampler and reference, and the run that nobody interrupted.
"""

from __future__ import annotations

import ast
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

import tether.ray_run
from resumable import count_words, left_behind, prefer_short, settings_of, task_of
from stand_in_workers import Local, keep, local_roles
from tether import judging, writers
from tether.ahead import Ahead, Request
from tether.batch import Generation, Origin, Prompts, Sequences
from tether.config import RunSettings, SamplingSettings, UpdateSettings
from tether.elsewhere import Elsewhere
from tether.errors import MissingExtraError, ModelError, WorkerError
from tether.models import LanguagePolicy, load_policy
from tether.optimiser import Optimiser
from tether.ranked import RankedPolicy
from tether.ray_run import ray_roles, require_same_versions, reward_models
from tether.remote import Published, RemoteReferee, RemoteWriter, check_age, remote_scores, shares_of
from tether.resuming import resume_run
from tether.reward_model import Encoded, RewardModel
from tether.reward_sources import Ensemble, WeightedSum
from tether.rollouts import sample
from tether.runtime import ray_cluster
from tether.runtime.ranks import Ranks
from tether.runtime_settings import RuntimeSettings
from tether.session import train_run
from tether.store import RunStore
from tether.streams import uniforms
from tether.task import Judges
from tether.workers import ScoringWorker, Weights, WritingWorker, versions
from tiny_models import VOCAB, build, build_tokenizer
from tolerances import ROUND_OFF, assert_close

T = TypeVar("T")
MODES = ("full", "lora", "top")
TOKENS = 6
ROWS = 5


def opening(mode: str) -> Callable[[], LanguagePolicy]:
    return lambda: load_policy(
        build("llama"), build_tokenizer(), mode=mode, top_layers=2, lora_rank=4, dtype="float32"
    )  # fmt: skip


def prompts_of(rows: int = ROWS, seed: int = 0) -> Prompts:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 4), generator=draw)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :2] = False
    return Prompts(ids, mask, ("w3",) * rows, tuple(range(rows)), {"n": tuple(range(rows))})


def draws_of(prompts: Prompts, update: int = 0) -> Tensor:
    return uniforms(7, "response", update, prompts.keys, TOKENS)


def train_a_step(policy: LanguagePolicy) -> None:
    """Move what trains by Adam, along gradients of 1 and −1."""
    optimiser = Optimiser(policy.trainable(), UpdateSettings(learning_rate=0.05))
    for group in policy.trainable().values():
        for parameter in group:
            parameter.grad = torch.where(torch.arange(parameter.numel()).view_as(parameter) % 3 == 0, 1.0, -1.0)
    optimiser.set_progress(0.0)
    optimiser.step(optimiser.gradient_norm())


@dataclass
class Side:
    """A learner with workers beside it."""

    mode: str
    workers: int = 2
    policy: LanguagePolicy = field(init=False)

    def __post_init__(self) -> None:
        open_policy = opening(self.mode)
        self.policy = open_policy()
        self.published = Published(self.policy, keep)
        self.writing = Local("rollout", [WritingWorker(open_policy) for _ in range(self.workers)])
        self.scoring = Local("scoring", [ScoringWorker(open_policy, ()) for _ in range(self.workers)])
        self.writer = RemoteWriter(self.writing, self.published)
        self.referee = RemoteReferee(self.scoring, self.published)


class Talking(Ranks):
    """One of two learners; the second hears `hears` from the first."""

    hears: object = None

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 2

    def ask_first(self, act: Callable[[], T]) -> T:
        return act() if self.is_first else self.hears  # type: ignore[return-value]

    def whole(self, mine: Tensor, rows: int) -> Tensor:
        """The second's rows are those of the first, for want of the second."""
        return torch.cat([mine] * rows)[:rows]


# ── shares ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_shares_cover_each_row_once_in_order_and_none_is_empty(rows: int, workers: int) -> None:
    shares = [list(range(rows))[share] for share in shares_of(rows, workers)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert len(shares) == min(rows, workers)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


# ── responses ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_write_what_the_policy_itself_would_before_and_after_a_step(mode: str, workers: int) -> None:
    side, prompts = Side(mode, workers), prompts_of()
    for update in range(2):
        draws = draws_of(prompts, update)
        own, theirs = side.policy.generate(prompts, draws, 0.7), side.writer.write(prompts, draws, 0.7)
        assert torch.equal(own.responses, theirs.responses)
        assert torch.equal(own.response_mask, theirs.response_mask)
        assert torch.equal(own.finished, theirs.finished)
        assert_close(theirs.sampler_logprobs, own.sampler_logprobs.double(), ROUND_OFF)
        assert theirs.origin == Origin(version=update)
        train_a_step(side.policy)


def test_weights_are_deposited_once_a_version() -> None:
    deposits = []

    def deposit(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        deposits.append(len(tensors))
        return keep(tensors)

    policy = opening("full")()
    published = Published(policy, deposit, first=4)
    first = published.current()
    assert published.current() is first
    assert (first.version, len(deposits)) == (4, 1)
    train_a_step(policy)
    assert published.version == 5
    assert len(deposits) == 1
    published.current()
    assert len(deposits) == 2


def test_an_adapter_run_sends_its_adapters_alone() -> None:
    side = Side("lora")
    sent = sum(tensor.numel() for tensor in side.published.current().fetch())
    assert sent < 0.5 * sum(parameter.numel() for parameter in side.policy.mode.model.parameters())


def test_an_answer_by_other_weights_than_asked_for_is_refused() -> None:
    side, prompts = Side("full"), prompts_of()
    side.writer.write(prompts, draws_of(prompts), 1.0)
    train_a_step(side.policy)
    stuck = side.writing.things[1]
    assert isinstance(stuck, WritingWorker)
    stuck.follow = lambda weights: None  # type: ignore[method-assign]  # never takes new weights
    with pytest.raises(WorkerError, match=r"rollout worker 1 answered by version 0 .* stands at 1; at most 0"):
        side.writer.write(prompts, draws_of(prompts), 1.0)


@pytest.mark.parametrize(("version", "newest", "bound"), [(3, 3, 0), (2, 3, 1), (1, 3, 2)])
def test_an_answer_at_the_bound_is_taken_and_one_update_beyond_it_is_not(version: int, newest: int, bound: int) -> None:
    check_age("rollout worker 0", version, newest, bound)
    with pytest.raises(WorkerError, match=f"stands at {newest}; at most {bound - 1} "):
        check_age("rollout worker 0", version, newest, bound - 1)


@pytest.mark.parametrize(("version", "newest", "bound"), [(2, 3, 0), (4, 3, 1), (0, 3, 2)])
def test_an_answer_beyond_the_bound_or_of_the_future_is_refused(version: int, newest: int, bound: int) -> None:
    with pytest.raises(WorkerError, match=f"version {version}"):
        check_age("rollout worker 0", version, newest, bound)


def test_weights_of_another_model_are_refused_by_the_worker() -> None:
    worker = WritingWorker(opening("full"))
    with pytest.raises(ModelError, match="do not fit"):
        worker.follow(Weights(1, lambda: [torch.zeros(3)]))


def test_a_worker_that_was_lost_and_made_anew_writes_the_same() -> None:
    side, prompts = Side("full"), prompts_of()
    train_a_step(side.policy)
    first = side.writer.write(prompts, draws_of(prompts), 1.0)
    side.writing.things = [WritingWorker(opening("full")), *side.writing.things[1:]]
    again = side.writer.write(prompts, draws_of(prompts), 1.0)
    assert torch.equal(first.responses, again.responses)
    assert torch.equal(first.sampler_logprobs, again.sampler_logprobs)


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", MODES)
def test_workers_say_of_the_reference_what_the_policy_itself_would(mode: str) -> None:
    side, prompts = Side(mode), prompts_of()
    train_a_step(side.policy)
    generation = side.policy.generate(prompts, draws_of(prompts), 0.7).trimmed()
    sequences = side.policy.prepare(Sequences.join(prompts, generation, 0))
    own, theirs = side.policy.evaluate_reference(sequences, 0.7), side.referee.evaluate_reference(sequences, 0.7)
    assert float(own.full_kl.sum()) > 0.1  # the policy has moved
    assert_close(theirs.logprobs, own.logprobs.double(), ROUND_OFF)
    assert_close(theirs.full_kl, own.full_kl.double(), ROUND_OFF)


def test_what_was_expected_is_asked_once_and_anything_else_anew() -> None:
    side, prompts = Side("full"), prompts_of()
    side.policy.writer, side.policy.referee = side.writer, side.referee
    generation = side.policy.generate(prompts, draws_of(prompts), 1.0).trimmed()
    assert side.scoring.asked == [("refer", 2)]
    sequences = Sequences.join(prompts, generation, 0)
    side.policy.evaluate_reference(sequences, 1.0)
    assert len(side.scoring.asked) == 1
    side.referee.expect(sequences, 1.0)
    side.policy.evaluate_reference(sequences, 0.5)
    assert len(side.scoring.asked) == 3
    colder = Side("full").policy.evaluate_reference(sequences, 0.5)
    assert_close(side.policy.evaluate_reference(sequences, 0.5).logprobs, colder.logprobs.double(), ROUND_OFF)


# ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def classifier(seed: int = 0) -> RewardModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_labels=1, pad_token_id=0, max_position_embeddings=64,
        )  # fmt: skip
        return RewardModel(LlamaForSequenceClassification(config).eval(), build_tokenizer())


def test_workers_score_as_the_reward_model_itself_would() -> None:
    reward = classifier()
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12], [13, 14]]
    own = reward.score_encoded(Encoded(rows))
    crew = Local("scoring", [ScoringWorker(opening("full"), [classifier(1), classifier()]) for _ in range(2)])
    reward.scorer = lambda rows: remote_scores(crew, 1, rows)
    assert_close(reward.score_encoded(Encoded(rows)), own.double(), ROUND_OFF)
    assert crew.asked == [("score", 2)]
    assert reward.score_encoded(Encoded([])).shape == (0,)


def test_workers_of_several_learners_are_asked_about_all_rows_and_by_the_first_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two learners: what one would hear of half the rows, both hear of all."""
    side, prompts, reward = Side("full"), prompts_of(), classifier()
    ranked, alone = RankedPolicy(side.policy, Talking(0)), opening("full")()
    ranked.writer, ranked.referee = side.writer, side.referee
    rollout = sample(ranked, prompts, draws_of(prompts), SamplingSettings(max_new_tokens=TOKENS))
    assert (side.writing.asked, side.scoring.asked) == ([("write", 2)], [("refer", 2)])
    own = alone.evaluate_reference(rollout.sequences, 1.0)
    assert_close(rollout.ref_logprobs, own.logprobs.double(), ROUND_OFF)
    asked: list[int] = []
    expected = torch.tensor(reward.score_rollout(rollout), dtype=torch.float64)
    reward.scorer = lambda rows: asked.append(len(rows)) or torch.zeros(len(rows))  # type: ignore[func-returns-value]
    monkeypatch.setattr(judging, "here", lambda: Talking(0))
    scores = judging.judge(reward, rollout).totals
    assert (asked, scores.tolist()) == ([ROWS], [0.0] * ROWS)
    assert float(expected.abs().max()) > 0.0


def test_a_learner_beside_the_first_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is told is what it goes on with."""
    settings, prompts = settings_of("full", runtime={"writer": "ray"}), prompts_of()
    second, told = Talking(1), opening("full")().generate(prompts, draws_of(prompts), 1.0)
    monkeypatch.setattr(writers, "here", lambda: second)
    policy = RankedPolicy(opening("full")(), second)
    second.hears = told
    with writers.helped(settings, policy, opening("full"), [], lambda name, fact: None):
        assert isinstance(policy.writer, Elsewhere)
        assert policy.generate(prompts, draws_of(prompts), 1.0) is told
        with pytest.raises(AssertionError, match="only the first"):
            policy.writer.write(prompts, draws_of(prompts), 1.0)
    assert policy.writer is None


def test_reward_models_are_found_wherever_they_stand_and_once() -> None:
    one, two = classifier(), classifier(1)
    joined = WeightedSum({"a": one, "b": Ensemble([two, one]), "c": count_words})
    assert [id(model) for model in reward_models([joined, two, prefer_short])] == [id(one), id(two)]


# ── written ahead ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Clerk:
    """Begins at once, and notes when by which weights."""

    weights: int = 0
    begun: list[int] = field(default_factory=list)

    def begin(self, prompts: Prompts, uniforms: Tensor, temperature: float) -> Due:
        self.begun.append(self.weights)
        return Due(self, self.weights, len(prompts))


@dataclass
class Due:
    clerk: Clerk
    version: int
    rows: int

    def take(self) -> Generation:
        shape = (self.rows, TOKENS)
        origin = Origin(staleness=self.clerk.weights - self.version, version=self.version)
        tokens = torch.full(shape, self.version)
        return Generation(tokens, torch.ones(shape).bool(), torch.zeros(shape), torch.ones(self.rows).bool(), origin)


@dataclass
class Course:
    """As much of a run as is asked for: what update n asks is a function of n and of the temperature."""

    temperature: float = 1.0
    steps: int = 4
    step: int = 0

    def request(self, step: int) -> Request:
        prompts = prompts_of(seed=step)
        return Request(prompts, draws_of(prompts, step), self.temperature)

    def following(self, asked: Request) -> Request | None:
        last = self.step + 1 >= self.steps or not asked.is_same(self.request(self.step))
        return None if last else self.request(self.step + 1)


def ask(writer: Ahead, request: Request) -> Generation:
    return writer.write(request.prompts, request.uniforms, request.temperature)


def test_each_update_but_the_first_is_written_by_weights_one_update_old() -> None:
    clerk, course = Clerk(), Course()
    writer = Ahead(clerk)
    writer.following = course.following
    ages = []
    for step in range(course.steps):
        course.step = clerk.weights = step
        ages.append(ask(writer, course.request(step)).origin.staleness)
    assert ages == [0, 1, 1, 1]
    assert len(clerk.begun) == course.steps  # nothing is begun after the last


def test_an_evaluation_between_updates_is_written_now_and_takes_nothing_away() -> None:
    clerk, course = Clerk(), Course()
    writer = Ahead(clerk)
    writer.following = course.following
    ask(writer, course.request(0))
    course.step = clerk.weights = 1
    assert ask(writer, course.request(99)).origin.staleness == 0
    assert ask(writer, course.request(1)).origin.staleness == 1


def test_a_knob_turned_meanwhile_drops_what_was_begun() -> None:
    clerk, course = Clerk(), Course()
    writer = Ahead(clerk)
    writer.following = course.following
    ask(writer, course.request(0))
    course.step = clerk.weights = 1
    course.temperature = 0.5
    assert ask(writer, course.request(1)).origin.staleness == 0


def test_what_was_begun_is_in_the_checkpoint_and_comes_out_of_it() -> None:
    clerk, course = Clerk(), Course()
    writer = Ahead(clerk)
    writer.following = course.following
    assert writer.checkpoint_state() == {}
    ask(writer, course.request(0))
    course.step = clerk.weights = 1
    state = writer.checkpoint_state()
    other = Ahead(Clerk(weights=9))
    other.restore_state(state)
    resumed, whole = ask(other, course.request(1)), ask(writer, course.request(1))
    assert torch.equal(resumed.responses, whole.responses)
    assert resumed.origin == whole.origin == Origin(staleness=1, version=0)


@pytest.mark.parametrize("part", ["ids", "uniforms", "temperature"])
def test_a_request_is_the_same_only_in_all_its_parts(part: str) -> None:
    prompts = prompts_of()
    request = Request(prompts, draws_of(prompts), 1.0)
    changed = {
        "ids": replace(request, prompts=replace(prompts, ids=prompts.ids + 1)),
        "uniforms": replace(request, uniforms=request.uniforms * 0.5),
        "temperature": replace(request, temperature=0.9),
    }[part]
    assert request.is_same(replace(request))
    assert not request.is_same(changed)


# ── whole runs ──────────────────────────────────────────────────────────────────────────────────────────────────────
def elsewhere(overlap: bool = False, **changes: object) -> RunSettings:
    runtime = {"writer": "ray", "overlap": overlap, "ray": {"rollout_workers": 2}}
    return settings_of("full", runtime=runtime, **changes)


def carry_out(root: Path, name: str, settings: RunSettings, steps: int | None = None) -> dict[str, object]:
    task = replace(task_of(root / "sft"), judges=Judges(WeightedSum({"m": classifier(), "w": count_words})))
    train_run(task, settings, root, name, Console(file=io.StringIO()))
    return left_behind(root / name)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_run_with_workers_is_the_run_without_to_round_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tether.ray_run, "ray_roles", local_roles)
    alone, helped = carry_out(tmp_path, "alone", settings_of("full")), carry_out(tmp_path, "helped", elsewhere())
    assert alone["curves"].keys() == helped["curves"].keys()
    for name, (steps, values) in alone["curves"].items():
        assert helped["curves"][name][0] == steps
        assert helped["curves"][name][1] == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), name
    for name, bits in alone["bits"].items():
        got, wanted = (torch.frombuffer(bytearray(each), dtype=torch.float32) for each in (helped["bits"][name], bits))
        assert_close(got, wanted.double(), ROUND_OFF)


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_overlapped_run_resumed_at_any_update_is_the_run_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tether.ray_run, "ray_roles", local_roles)
    settings = elsewhere(True, checkpoint={"every": 1, "keep": 9})
    whole = carry_out(tmp_path, "run", settings)
    assert whole["curves"]["rollout/staleness"][1] == [1.0] * (settings.ppo.steps - 2)  # one of warm-up moves nothing
    task = replace(task_of(tmp_path / "sft"), judges=Judges(WeightedSum({"m": classifier(), "w": count_words})))
    for step in range(1, settings.ppo.steps):
        (tmp_path / "run" / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
        with RunStore.open(tmp_path / "run", readonly=False) as store:
            store.heartbeat(step, "training", "stopped")
        resume_run(tmp_path / "run", lambda _: task, Console(file=io.StringIO()))
        assert left_behind(tmp_path / "run") == whole, f"resumed at {step}"


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_without_ray_the_complaint_is_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    settings, policy = elsewhere(), opening("full")()
    with (
        pytest.raises(MissingExtraError, match=r"pip install 'tether\[ray\]'"),
        ray_roles(settings, policy, opening("full"), [], lambda name, fact: None),
    ):
        pass


def test_a_module_that_is_not_ray_s_own_imports_neither_ray_nor_its_roles_when_it_is_loaded() -> None:
    found = []
    for file in Path(tether.ray_run.__file__).parent.rglob("*.py"):
        loaded = [
            node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [name.name for node in loaded if isinstance(node, ast.Import) for name in node.names]
        names += [str(node.module) for node in loaded if isinstance(node, ast.ImportFrom)]
        found += [file.name for name in names if name.split(".")[0] == "ray" or name.startswith("tether.ray_run")]
    assert found == []


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", "http://head:8265"])
def test_an_address_of_another_form_is_told_which_is_wanted(address: str) -> None:
    with pytest.raises(WorkerError, match="wanted auto or HOST:PORT"):
        ray_cluster._look(address)


def test_an_address_where_nobody_answers_is_one_error_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"nobody answers at runtime.ray.address 127.0.0.1:9"):
        ray_cluster._look("127.0.0.1:9")
    assert time.monotonic() - started < 10.0


def test_a_worker_of_another_version_is_refused_by_name() -> None:
    require_same_versions("rollout", [versions(), versions()])
    with pytest.raises(WorkerError, match=r"rollout worker 1 has torch 1.0 \(here "):
        require_same_versions("rollout", [versions(), {**versions(), "torch": "1.0"}])


def test_overlap_without_another_writer_is_refused() -> None:
    with pytest.raises(ValidationError, match="wanted writer: ray or vllm"):
        RuntimeSettings(overlap=True)


def test_a_step_of_the_optimiser_is_a_new_version_in_every_mode() -> None:
    for mode in MODES:
        policy = opening(mode)()
        published = Published(policy, keep)
        train_a_step(policy)
        assert published.version == 1, mode
