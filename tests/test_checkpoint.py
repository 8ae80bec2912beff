"""Checkpoints on disk: whole or not at all, checked byte by byte, never without one that can be used."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tether import checkpoint
from tether.checkpoint import Checkpoints, Identity
from tether.config import CheckpointSettings, UpdateSettings
from tether.errors import ModelError, RunError
from tether.optimiser import Optimiser
from tether.rewards import AdaptiveBeta, FixedBeta
from tether.snapshot import Snapshot, Stateful, load_weights, plain, restore_states, states_of, unplain

IDENTITY = Identity({"ppo": {"seed": 0}}, {"reference": "ab" * 32}, {"threads": 1})


def snapshot_of(step: int, size: int = 40) -> Snapshot:
    """Every tensor holds the step, so that a mixture of two would show."""
    weights = {"policy.0000": torch.full((size,), float(step)), "value.0000": torch.full((2, 3), float(step))}
    moments = {"policy.0000.exp_avg": torch.full((size,), -float(step)), "steps_taken": torch.tensor(step)}
    return Snapshot(step, weights, moments, {"controller": "FixedBeta", "value": 0.1 * step})


def checkpoints(folder: Path, **knobs: object) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", CheckpointSettings.model_validate(knobs))


def saved(folder: Path, *steps: int, **knobs: object) -> Checkpoints:
    kept = checkpoints(folder, **knobs)
    for step in steps:
        kept.save(snapshot_of(step), IDENTITY)
    return kept


def is_whole(found: Snapshot) -> bool:
    numbers = {float(tensor.abs().max()) for tensor in [*found.weights.values(), *found.optimiser.values()]}
    return numbers == {float(found.step)}


def silent(text: str) -> None:
    del text


# ── what goes in comes out ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_snapshot_comes_back_bit_for_bit(tmp_path: Path) -> None:
    strange = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 0.1])
    weights = {"a": strange, "b": strange.bfloat16(), "c": torch.arange(6.0).view(2, 3).T, "d": torch.tensor(7)}
    beta = {"controller": "AdaptiveBeta", "value": 0.1 + 0.2, "target": 1e-300, "horizon": 3}
    snapshot = Snapshot(3, weights, {"m": strange.double()}, beta, {"reward": {"mean": 1 / 3, "seen": ["a", None]}})
    checkpoints(tmp_path).save(snapshot, IDENTITY)
    found = checkpoints(tmp_path).read(3)
    back = found.snapshot()
    for name, tensor in weights.items():
        assert back.weights[name].dtype == tensor.dtype
        assert back.weights[name].shape == tensor.shape
        assert bits(back.weights[name]) == bits(tensor)
    assert bits(back.optimiser["m"]) == bits(strange.double())
    assert (back.step, back.beta, back.states) == (3, beta, snapshot.states)
    assert found.identity == IDENTITY


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_it_is_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3).folder / "step-000003"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "optimiser.safetensors", "weights.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "manifest.json").read_text())["step"] == 3
    assert load_file(folder / "weights.safetensors").keys() == {"policy.0000", "value.0000"}
    assert (folder.parent / "latest").read_text() == "step-000003\n"


def test_the_optimiser_goes_on_as_if_it_had_never_stopped() -> None:
    """Half-precision weights with masters, one weight that was never stepped, two groups; the oracle never stops."""

    def start() -> tuple[dict[str, list[nn.Parameter]], Optimiser]:
        draw = torch.Generator().manual_seed(0)
        first = nn.Parameter(torch.randn(5, generator=draw).bfloat16())
        groups = {"policy": [first, nn.Parameter(torch.ones(2))], "value": [nn.Parameter(torch.ones(3))]}
        return groups, Optimiser(groups, UpdateSettings(learning_rate=0.1, adam_style="tensorflow"))

    def step(groups: Mapping[str, list[nn.Parameter]], optimiser: Optimiser, number: int) -> None:
        for parameter in (groups["policy"][0], groups["value"][0]):
            parameter.grad = torch.sin(torch.arange(len(parameter)) + number).to(parameter.dtype)
        optimiser.collect()
        optimiser.step(optimiser.gradient_norm())

    groups, whole = start()
    for number in range(4):
        step(groups, whole, number)
    halves, first = start()
    for number in range(2):
        step(halves, first, number)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    again, second = start()
    for name in again:
        for weight, trained in zip(again[name], halves[name], strict=True):
            weight.data.copy_(trained.data)
    second.load_state(state)
    for number in range(2, 4):
        step(again, second, number)
    assert {name: bits(tensor) for name, tensor in second.state().items()} == {
        name: bits(tensor) for name, tensor in whole.state().items()
    }
    assert [bits(p.data) for group in again.values() for p in group] == [
        bits(p.data) for group in groups.values() for p in group
    ]
    assert not any(name.startswith("policy.0001.") for name in whole.state()), "never stepped, so it has no moments"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("steps_taken"), "steps_taken"),
        (lambda state: state.pop("policy.0000.master"), "policy.0000.master"),
        (lambda state: state.update({"policy.0000.master": torch.ones(1)}), "policy.0000.master"),
        (lambda state: state.update({"policy.0007.exp_avg": torch.ones(1)}), "policy.0007.exp_avg"),
        (lambda state: state.update({"value.0000.exp_avg": torch.ones(9)}), "value.0000.exp_avg"),
        (lambda state: state.update({"value.0000.master": torch.ones(3)}), "value.0000.master"),
    ],
)
def test_an_optimiser_refuses_the_state_of_other_weights(change: Callable[[dict], object], named: str) -> None:
    groups = {"policy": [nn.Parameter(torch.ones(2).bfloat16())], "value": [nn.Parameter(torch.ones(3))]}
    optimiser = Optimiser(groups, UpdateSettings())
    state = {**optimiser.state(), "steps_taken": torch.tensor(5)}
    change(state)
    with pytest.raises(ModelError, match=named):
        optimiser.load_state(state)
    assert optimiser.steps_taken == 0


class Weights:
    """What a policy has that is saved."""

    def __init__(self, *groups: tuple[str, list[Tensor]]) -> None:
        self.groups = {name: [nn.Parameter(tensor) for tensor in tensors] for name, tensors in groups}

    def trainable(self) -> Mapping[str, list[nn.Parameter]]:
        return self.groups


@pytest.mark.parametrize(
    "other",
    [
        {"policy.0000": torch.ones(2), "value.0000": torch.ones(2)},
        {"policy.0000": torch.ones(3)},
        {"policy.0000": torch.ones(3), "value.0000": torch.ones(2), "value.0001": torch.ones(2)},
        {"policy.0000": torch.ones(3).bfloat16(), "value.0000": torch.ones(2)},
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_weights_of_another_model_change_nothing(other: dict[str, Tensor]) -> None:
    policy = Weights(("policy", [torch.zeros(3)]), ("value", [torch.zeros(2)]))
    with pytest.raises(ModelError, match="do not fit this policy"):
        load_weights(policy, other)  # type: ignore[arg-type]
    assert not any(parameter.any() for group in policy.groups.values() for parameter in group)


def test_the_strings_controller_comes_back_with_its_state() -> None:
    moved = AdaptiveBeta(0.05, 6.0, 100).after(kl=8.0, episodes=10)
    assert unplain(json.loads(json.dumps(plain(moved))), AdaptiveBeta(0.05, 6.0, 100)) == moved
    with pytest.raises(RunError, match="held by FixedBeta and the settings ask for AdaptiveBeta"):
        unplain(plain(FixedBeta(0.05)), moved)


def test_states_go_to_those_that_have_one() -> None:
    @dataclass
    class Mean:
        value: float = 0.0

        def checkpoint_state(self) -> Mapping[str, object]:
            return {"value": self.value}

        def restore_state(self, state: Mapping[str, object]) -> None:
            self.value = float(str(state["value"]))

    assert isinstance(Mean(), Stateful)
    states = states_of(reward=Mean(0.25), watch=object())
    assert states == {"reward": {"value": 0.25}}
    fresh = Mean()
    restore_states(states, reward=fresh, watch=object())
    assert fresh.value == 0.25


# ── torn, edited, lost ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("file", ["weights.safetensors", "optimiser.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip first", "flip middle", "flip last", "truncate", "append", "empty", "remove"])
def test_a_torn_or_edited_checkpoint_is_refused_and_the_one_before_is_used(
    file: str, harm: str, tmp_path: Path
) -> None:
    kept = saved(tmp_path, 2, 4)
    path = kept.folder / "step-000004" / file
    content = bytearray(path.read_bytes())
    spot = {"flip first": 0, "flip middle": len(content) // 2, "flip last": len(content) - 2}
    if harm in spot:
        content[spot[harm]] ^= 1
    changed = {"truncate": content[:-7], "append": content + b" x", "empty": b""}.get(harm, content)
    path.unlink() if harm == "remove" else path.write_bytes(bytes(changed))
    with pytest.raises(RunError, match=r"torn|changed"):
        kept.read(4)
    told: list[str] = []
    found = kept.newest(told.append)
    assert found is not None
    assert found.step == 2
    assert is_whole(found.snapshot())
    assert len(told) == 1
    assert "step-000004" in told[0]


def test_an_edited_number_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, 2).folder / "step-000002" / "manifest.json"
    path.write_text(path.read_text().replace('"value": 0.2', '"value": 0.3'))
    with pytest.raises(RunError, match=r"was changed: manifest\.json"):
        checkpoints(tmp_path).read(2)


def test_a_torn_one_is_written_anew_when_the_run_comes_there_again(tmp_path: Path) -> None:
    kept = saved(tmp_path, 2, 4)
    (kept.folder / "step-000004" / "weights.safetensors").write_bytes(b"torn")
    kept.point_at(2)
    kept.save(snapshot_of(4), IDENTITY)
    assert kept.latest() == 4
    assert is_whole(kept.read(4).snapshot())
    assert kept.steps() == [2, 4]


def test_a_whole_latest_one_is_not_written_twice(tmp_path: Path) -> None:
    kept = saved(tmp_path, 2)
    before = (kept.folder / "step-000002" / "manifest.json").stat().st_mtime_ns
    kept.save(snapshot_of(2), IDENTITY)
    assert (kept.folder / "step-000002" / "manifest.json").stat().st_mtime_ns == before


def test_none_is_none_and_a_missing_one_lists_those_there_are(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).newest(silent) is None
    with pytest.raises(RunError, match="no checkpoint of update 3; there are: 2, 4"):
        saved(tmp_path, 2, 4).read(3)


def test_one_of_another_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    kept = saved(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(RunError, match="has format 99; this version of tether reads format 1"):
        kept.read(2)


def test_one_whose_rows_are_not_in_the_run_is_passed_over(tmp_path: Path) -> None:
    told: list[str] = []
    found = saved(tmp_path, 2, 4).newest(told.append, rows=3)
    assert found is not None
    assert found.step == 2
    assert told == ["passed over the checkpoint of update 4: run.db holds 3 updates only"]


def test_turning_latest_back_goes_back(tmp_path: Path) -> None:
    kept = saved(tmp_path, 2, 4, 6, keep=9)
    (kept.folder / "latest").write_text("step-000002\n")
    found = kept.newest(silent)
    assert found is not None
    assert found.step == 2
    kept.save(snapshot_of(4), IDENTITY)
    assert kept.steps() == [2, 4], "what came after belongs to a course that the run has left"


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3, 4, 5, keep=3).steps() == [3, 4, 5]


def test_milestones_are_kept_for_good(tmp_path: Path) -> None:
    assert saved(tmp_path, *range(1, 12), keep=1, milestones=4).steps() == [4, 8, 11]


def test_the_best_one_is_kept_until_a_better_one_comes(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep=1, best="eval/gold")
    worth = {1: 0.5, 2: 2.0, 3: 1.0, 4: 3.0, 5: 0.0}
    there = []
    for step in worth:
        kept.save(snapshot_of(step), IDENTITY, {s: w for s, w in worth.items() if s < step})
        there.append(kept.steps())
    assert there == [[1], [1, 2], [2, 3], [2, 4], [4, 5]]


# ── a crash at any moment, a full disk ──────────────────────────────────────────────────────────────────────────────
@contextmanager
def every_state(folder: Path, states: Path) -> Iterator[list[Path]]:
    """Copies of the folder as it stands before each call that changes it: what a crash at that moment leaves."""
    seen: list[Path] = []

    def watched(function: Callable) -> Callable:
        def first(*arguments: object, **named: object) -> object:
            place = states / str(len(seen))
            shutil.copytree(folder, place)
            seen.append(place)
            return function(*arguments, **named)

        return first

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "write_text"), (Path, "mkdir")]:
            patch.setattr(owner, name, watched(getattr(owner, name)))
        patch.setattr(checkpoint, "_remove", watched(checkpoint._remove))
        patch.setattr(checkpoint, "save_file", watched(checkpoint.save_file))
        yield seen


@pytest.mark.parametrize("again", [False, True], ids=["new", "over a torn one"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(again: bool, tmp_path: Path) -> None:
    kept = saved(tmp_path, 2, 4, keep=1)
    if again:
        torn = kept.folder / "step-000006"
        torn.mkdir()
        (torn / "manifest.json").write_text("{}")
    with every_state(kept.folder, tmp_path / "states") as states:
        kept.save(snapshot_of(6), IDENTITY)
    assert len(states) > 10
    steps = []
    for state in states:
        found = Checkpoints(state).newest(silent)
        assert found is not None, state
        assert is_whole(found.snapshot())
        steps.append(found.step)
        Checkpoints(state, CheckpointSettings(keep=1)).save(snapshot_of(8), IDENTITY)
        assert sorted(path.name for path in state.iterdir()) == ["latest", "step-000008"], "leftovers are cleared"
    assert steps == sorted(steps), "once the new one is there, it stays"
    assert {4, 6} == set(steps)


def test_files_are_on_the_disk_before_their_name_is_and_the_name_before_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        move = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda self, to, move=move: (calls.append(f"→ {to.name}"), move(self, to))[1])
    saved(tmp_path, 2)
    aside = ".step-000002.part"
    assert calls == [
        "weights.safetensors", "optimiser.safetensors", "manifest.json", aside, "→ step-000002", "checkpoints",
        "latest.part", "→ latest", "checkpoints",
    ]  # fmt: skip


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4,000 bytes: the system itself refuses to write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_what_cannot_be_written_is_one_error_and_the_former_one_stays(tmp_path: Path) -> None:
    kept = saved(tmp_path, 2)
    before = sorted(path for path in kept.folder.rglob("*"))
    with pytest.raises(RunError, match=r"could not be written: .*File too large.*; that of update 2 is intact"):
        kept.save(snapshot_of(4, size=10_000), IDENTITY)
    assert sorted(path for path in kept.folder.rglob("*")) == before
    found = kept.newest(silent)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("where", ["save_file", "write_text", "fsync", "mkdir"])
def test_a_full_disk_is_named(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saved(tmp_path, 2)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"save_file": checkpoint, "fsync": os}.get(where, Path)
    monkeypatch.setattr(owner, where, full)
    with pytest.raises(RunError, match=r"the disk is full; that of update 2 is intact\. Free some space"):
        kept.save(snapshot_of(4), IDENTITY)
    monkeypatch.undo()
    assert kept.steps() == [2]
    assert kept.latest() == 2
    kept.save(snapshot_of(4), IDENTITY)
    assert kept.latest() == 4


def test_a_second_ctrl_c_while_saving_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saved(tmp_path, 2)

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with suppress(KeyboardInterrupt):
        kept.save(replace(snapshot_of(4)), IDENTITY)
    assert sorted(path.name for path in kept.folder.iterdir()) == ["latest", "step-000002"]
