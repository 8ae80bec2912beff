"""`tether replay RUN`: what was steered, as a schedule; with `--verify` the same course once more, compared bit by bit.

    settings + seeds + ledger of applied commands ──▶ the same updates, in memory ──▶ the same hash chain

Equal bits are promised on one machine's CPU at a fixed number of threads, with the same libraries. Nothing is written
into the run's folder. Read next: `chain.py` (what is compared), `helm.py` (the ledger).
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console

from tether.chain import TIMES, link
from tether.checkpoint import Checkpoint, Checkpoints
from tether.config import RunSettings
from tether.errors import RunError
from tether.faults import planted
from tether.helm import Rudder
from tether.identity import differences, identify, made_by, recorded_settings, require_same_digests
from tether.records import Applied
from tether.runs import ROOT, find_run
from tether.steering import schedule_of
from tether.store import CHECKPOINTS, RunStore
from tether.task import Task, open_policy, source_of
from tether.tasks import open_task
from tether.terminal import console_beside
from tether.trainer import Record, Run, advance

SAME, OTHER = 0, 1
SHOWN = 6


@dataclass(frozen=True)
class Replay:
    """What came of doing a run once more."""

    run: str
    updates: int
    """Compared."""
    commands: int
    """Of the ledger, that turned knobs."""
    first_difference: int | None
    """The first update whose digest differs; None where all are equal."""
    differing: Mapping[str, tuple[float, float]]
    """Measurements of that update that differ: recorded, now."""
    changed: Sequence[str]
    """What else is not as it was: libraries, threads."""

    @property
    def is_same(self) -> bool:
        return self.first_difference is None


def main(
    run: str,
    /,
    root: Path = ROOT,
    verify: bool = False,
    updates: int | None = None,
    schedule: Path | None = None,
    json: bool = False,
) -> int:
    """Show what was steered in a run, and do the run once more.

    Args:
        run: The run's name below `root`, or the path of its folder.
        root: The folder that holds the run folders.
        verify: Train it again in memory, by its settings, seeds and commands, and compare every update bit by bit.
        updates: Compare so many updates only.
        schedule: Write the steered knobs as YAML into this file.
        json: Print one JSON object instead.
    """
    folder = find_run(run, root)
    with RunStore.open(folder) as store:
        told = schedule_of(store)
        ledger = store.applied()
    if schedule is not None:
        schedule.write_text(as_yaml(folder.name, told), "utf-8")
    if not verify:
        print(jsonlib.dumps({"run": str(folder), "schedule": told}) if json else _shown(folder, told, ledger))
        return SAME
    console = console_beside(json)
    found = verify_run(folder, console, updates=updates)
    print(jsonlib.dumps(asdict(found) | {"same": found.is_same}) if json else sentence(found))
    return SAME if found.is_same else OTHER


def verify_run(
    folder: Path,
    console: Console,
    open_task: Callable[[RunSettings, Console], Task] = open_task,
    updates: int | None = None,
) -> Replay:
    """Do a run once more and compare its hash chain, up to the first update that differs.

    A fork begins at the checkpoint that it was forked from. Raises RunError where the run has no hash chain, or its
    model, reward or prompts are not what they were.
    """
    with RunStore.open(folder) as store:
        meta, chain, ledger = store.meta(), store.chain(), store.applied()
        if not chain:
            raise RunError(f"{folder} has no hash chain: it has no update yet, or is of a version before chains")
        begin = _beginning(folder, meta)
        made = meta.get("made_by")
        changed = _take_threads(made if isinstance(made, Mapping) else {})
        settings = recorded_settings(meta.get("config"))
        fault = meta.get("planted")
        with planted(fault if isinstance(fault, str) else None):
            again = _again(settings, open_task(settings, console), meta, begin)
            wanted = {step: chain[step] for step in sorted(chain) if step >= again.step}
            wanted = dict(list(wanted.items())[:updates])
            asked = _asked(ledger)
            first, differing = _compare(again, settings, begin, asked, wanted, store, console)
    compared = sum(step <= (first if first is not None else max(wanted)) for step in wanted)
    return Replay(str(folder), compared, sum(map(len, asked.values())), first, differing, changed)


def _beginning(folder: Path, meta: Mapping[str, object]) -> Checkpoint | None:
    """The checkpoint that a fork began with; None for a run that began at its reference."""
    lineage = meta.get("lineage")
    if not isinstance(lineage, Mapping):
        return None
    try:
        return Checkpoints(folder / CHECKPOINTS).read(int(str(lineage["step"])))
    except RunError as error:
        raise RunError(
            f"{folder} was forked at update {lineage['step']}, and that checkpoint is no longer there; set "
            "checkpoint.milestones to keep it"
        ) from error


def _take_threads(made: Mapping[str, object]) -> list[str]:
    """Compute with as many threads as the run did; what else is not as it was."""
    threads = made.get("threads")
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    return differences(made, made_by())


def _again(settings: RunSettings, task: Task, meta: Mapping[str, object], begin: Checkpoint | None) -> Run:
    """The run at its beginning."""
    policy = open_policy(task.model, settings, task.tokenizer)
    knobs = settings.ppo
    copies = knobs.sampling.samples_per_prompt
    prompts = source_of(task.train, policy, settings, knobs.batch_size // copies, copies)
    found = identify(settings, policy, task.judges.reward, prompts.ids, prompts.columns).digests
    known = meta.get("digests")
    require_same_digests(known if isinstance(known, dict) else {}, found, "A replay needs them as they were")
    run = Run(policy, task.judges.reward, prompts, knobs, _keep_nothing)
    if begin is not None:
        rudder = Rudder(settings)
        rudder.restore_state(begin.states.get("rudder", {}))
        rudder.put_into(run)
        run.restore(begin.snapshot())
    return run


def _asked(ledger: Sequence[Applied]) -> dict[int, list[Mapping[str, object]]]:
    """What was asked of knobs, by the update before which it was taken up."""
    asked: dict[int, list[Mapping[str, object]]] = {}
    for one in ledger:
        knobs = one.payload.get("asked")
        if one.outcome == "applied" and isinstance(knobs, Mapping):
            asked.setdefault(one.step, []).append(knobs)
    return asked


def _compare(
    run: Run,
    settings: RunSettings,
    begin: Checkpoint | None,
    asked: Mapping[int, Sequence[Mapping[str, object]]],
    wanted: Mapping[int, str],
    store: RunStore,
    console: Console,
) -> tuple[int | None, dict[str, tuple[float, float]]]:
    """The first update whose digest is another one, with what differs in it."""
    rudder, digest = Rudder(settings), ""
    if begin is not None:
        rudder.restore_state(begin.states.get("rudder", {}))
    with console.status("replaying") as status:
        for step, recorded in wanted.items():
            for knobs in asked.get(run.step, []):
                rudder.ask(knobs)
            rudder.turn(run)
            record = advance(run)
            digest = link(digest, record)
            if digest != recorded:
                return step, _differing(record, store)
            status.update(f"update {step}: equal bit by bit")
    return None, {}


def _differing(record: Record, store: RunStore) -> dict[str, tuple[float, float]]:
    """Measurements that are not as recorded."""
    found: dict[str, tuple[float, float]] = {}
    for name, number in record.metrics.items():
        curve = store.curve(name)
        there = curve.values[curve.steps == record.step]
        if len(there) and float(there[0]) != number and not name.startswith(TIMES):
            found[name] = (float(there[0]), number)
    return found


def sentence(found: Replay) -> str:
    """The outcome in words."""
    with_ledger = f" with {found.commands} steered changes" if found.commands else ""
    if found.is_same:
        return f"same: {found.updates} updates{with_ledger} are equal bit by bit"
    told = [f"{name} was {a:.9g} and is {b:.9g}" for name, (a, b) in list(found.differing.items())[:SHOWN]]
    why = f"; {'; '.join(found.changed)}" if found.changed else ""
    return f"other: update {found.first_difference} differs{why}" + "".join(f"\n  {line}" for line in told)


def as_yaml(name: str, schedule: Sequence[Mapping[str, object]]) -> str:
    """The steered knobs as a file."""
    head = f"# What was steered in the run {name}: before update `step`, `knob` became `value`.\n"
    return head + yaml.safe_dump({"schedule": [dict(entry) for entry in schedule]}, sort_keys=False, allow_unicode=True)


def _shown(folder: Path, schedule: Sequence[Mapping[str, object]], ledger: Sequence[Applied]) -> str:
    if not ledger:
        return f"{folder.name}: nobody steered it; check it with: tether replay {folder} --verify"
    lines = [f"update {one['step']}: {one['knob']} = {one['value']}" for one in schedule]
    ruled = [f"command {one.command_id}: {one.outcome} at update {one.step}" for one in ledger]
    return "\n".join([f"{folder.name}: steered", *lines, "", *ruled])


def _keep_nothing(record: Record) -> None:
    del record
