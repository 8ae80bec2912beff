"""What a run leaves behind: numbers, samples and events in the run folder, a line or a live panel on the terminal.

It only looks: nothing here changes what is trained.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from tether.alarms import FAILURES, Alarm
from tether.batch import Reward, Rollout, plain_text
from tether.chain import link
from tether.checkpoint import Checkpoints, Identity
from tether.evaluation import Judged
from tether.helm import Helm
from tether.models import LanguagePolicy
from tether.ranked import require_one_course
from tether.records import Sample
from tether.runtime.ranks import here
from tether.scores import score
from tether.snapshot import states_of
from tether.store import RunStore
from tether.terminal import short, sparkline
from tether.trainer import Record, Run
from tether.watch import OnAlarm, Watch

VERDICT_STYLES = {"NOT ATTACHED": "bold red", "SNAPPED": "bold red", "SLACK": "bold yellow", "TAUT": "bold yellow"}
LINES_A_RUN = 20
"""Plain lines that a whole run prints where the output is no terminal."""
HISTORY = 400
PANEL = ("score/mean", "kl/mean", "beta", "loss/policy", "loss/value", "entropy/per_token", "tokens/per_second")


def lesson_line(step: int, metrics: Mapping[str, float]) -> str:
    """The lesson's line of one update; `reward` is the mean score, `kl` in nats per response.

    >>> lesson_line(20, {"score/mean": 0.58, "kl/mean": 0.082, "loss/policy": -0.048, "loss/value": 0.21})
    'step 020 reward=+0.58 kl=0.082 policy_loss=-0.048 value_loss=0.21'
    >>> lesson_line(1, {"score/mean": -0.001, "kl/mean": -0.0002, "loss/policy": -0.048, "loss/value": 0.21})
    'step 001 reward=+0.00 kl=0.000 policy_loss=-0.048 value_loss=0.21'
    """
    return (
        f"step {step:03d} reward={metrics['score/mean']:+z.2f} kl={metrics['kl/mean']:z.3f} "
        f"policy_loss={metrics['loss/policy']:+z.3f} value_loss={metrics['loss/value']:.2f}"
    )


Pieces = Callable[[Sequence[int]], tuple[str, ...]]
"""The text of each token of a response."""


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds, so that together they are the response's text.

    A token alone may read otherwise than in its place (SentencePiece drops a leading space); then each is what the
    text grows by. Half of a character reads as the replacement sign.
    """
    ids = [int(token) for token in tokens]
    alone: list[str] = tokenizer.batch_decode([[token] for token in ids])
    if "".join(alone) == tokenizer.decode(ids):
        return tuple(alone)
    texts = ["", *(str(tokenizer.decode(ids[: end + 1])) for end in range(len(ids)))]
    return tuple(now.removeprefix(before) for before, now in pairwise(texts))


def _no_pieces(tokens: Sequence[int]) -> tuple[str, ...]:
    """Leaves the texts out."""
    del tokens
    return ()


def samples_of(record: Record, count: int, pieces: Pieces = _no_pieces) -> list[Sample]:
    """The first `count` responses of an update, with what is known of each of their tokens."""
    return [_sample(record, row, pieces) for row in range(min(count, len(record.rollout)))]


def _sample(record: Record, row: int, pieces: Pieces) -> Sample:
    rollout, mask = record.rollout, record.rollout.response_mask[row]
    arrays = (
        rollout.sequences.responses, rollout.logprobs, rollout.ref_logprobs, rollout.values_at(record.rewards.beta),
        record.experience.advantages,
    )  # fmt: skip
    tokens, logprobs, ref_logprobs, values, advantages = (array[row][mask].cpu().numpy() for array in arrays)
    return Sample(
        step=record.step,
        row=row,
        prompt=plain_text(rollout.prompts.texts[row]),
        response=rollout.texts[row],
        score=float(record.scores.totals[row]),
        reward_total=float(record.rewards.rewards[row][mask].sum()),
        kl=float(rollout.kl[row]),
        tokens=tokens,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages,
        pieces=pieces(tokens.tolist()),
    )


def probes(judged: Judged, step: int, beta: float, pieces: Pieces = _no_pieces) -> list[Sample]:
    """Held-out responses as samples of the split `probe`, with every judge's score in their columns."""
    samples: list[Sample] = []
    for rollout in judged.rollouts:
        for row in range(len(rollout)):
            place, mask = len(samples), rollout.response_mask[row]
            scores = {name: float(every[place]) for name, every in judged.scores.items()}
            kl, tokens = float(rollout.kl[row]), rollout.sequences.responses[row][mask].cpu().numpy()
            samples.append(
                Sample(
                    step=step, row=place, prompt=plain_text(rollout.prompts.texts[row]), response=rollout.texts[row],
                    score=scores["score"], reward_total=scores["score"] - beta * kl, kl=kl,
                    tokens=tokens,
                    logprobs=np.asarray(rollout.logprobs[row][mask].cpu()),
                    ref_logprobs=np.asarray(rollout.ref_logprobs[row][mask].cpu()),
                    split="probe", pieces=pieces(tokens.tolist()), columns=scores,
                )
            )  # fmt: skip
    return samples


def judge_scores(judges: Mapping[str, Reward], rollout: Rollout) -> dict[str, float]:
    """Mean score of the update's own responses by judges that are not optimised: `score/gold`, `score/holdout`."""
    return {f"score/{name}": score(judge, rollout).metrics["score/mean"] for name, judge in judges.items()}


def peak_memory_bytes() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@dataclass
class Keeper:
    """Keeps each update: into the store in one transaction, then onto the terminal."""

    store: RunStore
    screen: Screen
    judges: Mapping[str, Reward]
    """Judges of every update's responses beside the reward, by name."""
    keep_samples: int
    watch: Watch = field(default_factory=Watch)
    pieces: Pieces = _no_pieces
    helm: Helm | None = None
    """Who steers the run, and how many samples are kept of it."""
    digest: str = ""
    """The hash chain so far."""

    def __call__(self, record: Record) -> None:
        extra = judge_scores(self.judges, record.rollout) | {"memory/peak_bytes": peak_memory_bytes()}
        alarms, over = self.watch.after(record, extra)
        metrics = record.metrics | extra | dict(self.watch.numbers) | {"seconds/checks": self.watch.seconds}
        self.digest = link(self.digest, record)
        count = self.keep_samples if self.helm is None else self.helm.rudder.settings.keep_samples
        with self.store.update(record.step) as entry:
            entry.metrics(metrics)
            entry.link(self.digest)
            if self.helm is not None:
                self.helm.write(entry)
            for sample in samples_of(record, count, self.pieces):
                entry.sample(sample)
            for alarm in alarms:
                entry.event(alarm.reason, alarm.payload(), alarm.severity)
            for reason in over:
                entry.event("cleared", {"reason": reason})
        self.screen.warn(record.step, alarms)
        self.screen.show(record.step, metrics, self.watch.word, self.watch.active)
        self.watch.act(alarms)


@dataclass
class Saver:
    """Saves the run's state: every n updates, after the last, and when somebody asks."""

    run: Run
    checkpoints: Checkpoints
    identity: Identity
    store: RunStore
    watch: object = None
    """What looks at the run; its state is saved where it has one."""
    rudder: object = None
    """The knobs as steered, likewise."""

    def is_due(self) -> bool:
        """Whether a checkpoint belongs here."""
        step, steps = self.run.step, self.run.settings.steps
        return step > 0 and (step % self.checkpoints.settings.every == 0 or step == steps)

    def save(self) -> None:
        """Rows first, then the state that goes on behind them. Raises RunError where the disk is full."""
        self.store.flush(self.run.step)
        snapshot = self.run.snapshot()
        if isinstance(self.run.policy, LanguagePolicy):
            require_one_course(self.run.policy, here())
        writer = getattr(self.run.policy, "writer", None)
        states = {**snapshot.states, **states_of(watch=self.watch, rudder=self.rudder, writer=writer)}
        if not here().is_first:
            return
        self.checkpoints.save(replace(snapshot, states=states), self.identity, self._worth())

    def answer(self, on_alarm: OnAlarm) -> None:
        """What an alarm asks for: `pause` saves the run as it stands, `rollback` puts it back to a checkpoint."""
        if on_alarm == "pause":
            self.save()
        if on_alarm == "rollback":
            last = self.checkpoints.newest(_say_nothing)
            if last is not None:
                self.run.restore(last.snapshot())

    def _worth(self) -> dict[int, float]:
        """The metric by which the best checkpoint is kept, by step."""
        best = self.checkpoints.settings.best
        if best is None:
            return {}
        curve = self.store.curve(best)
        pairs = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
        return {step: value for step, value in pairs if math.isfinite(value)}


def _say_nothing(text: str) -> None:
    """For what need not be told."""


@dataclass
class Screen:
    """A live panel in a terminal, plain lines in the lesson's form elsewhere. Use it in a `with` block."""

    console: Console
    steps: int
    title: str
    start: int = 0
    """Updates done before."""
    history: dict[str, deque[float]] = field(default_factory=dict)
    _live: Live | None = None
    _progress: Progress | None = None
    _shown: float = 0.0

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._progress.add_task(self.title, total=self.steps, completed=self.start)
            self._live = Live(self._progress, console=self.console, refresh_per_second=4)
            self._live.start()
        else:
            done = f", {self.start} of them done" if self.start else ""
            self.console.print(f"{self.title}: {self.steps} updates{done}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, step: int, metrics: Mapping[str, float], word: str = "", active: Collection[str] = ()) -> None:
        """Show one update, the verdict on the run as it stands, and what speaks against it."""
        for name in PANEL:
            self.history.setdefault(name, deque(maxlen=HISTORY)).append(metrics[name])
        if self._live is None or self._progress is None:
            if step % max(1, self.steps // LINES_A_RUN) == 0 or step == self.steps - 1:
                self.console.print(lesson_line(step, metrics))
            return
        self._progress.update(self._progress.task_ids[0], completed=step + 1)
        now = time.monotonic()
        if now - self._shown > 0.1 or step == self.steps - 1:
            self._shown = now
            self._live.update(Group(self._progress, self._table(metrics, word, active)))

    def warn(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Say what has gone wrong, above the panel."""
        for alarm in alarms:
            style = "bold red" if alarm.severity == "alarm" else "yellow"
            told = f"update {step} {alarm.severity}: {alarm.failure.title}. {alarm.seen}. {alarm.remedy}"
            self.console.print(told, style=style, markup=False, highlight=False)

    def _table(self, metrics: Mapping[str, float], word: str, active: Collection[str]) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        rows = {
            "reward (mean score)": ("score/mean", f"± {short(metrics['score/se'])} s.e., in σ"),
            "KL to the SFT model": ("kl/mean", f"± {short(metrics['kl/se'])} s.e., nats per response"),
            "β, the string": ("beta", f"β·KL = {short(metrics['beta'] * metrics['kl/mean'])} σ"),
            "policy loss": ("loss/policy", f"clipped {metrics['ppo/clip_fraction']:.0%}"),
            "value loss": ("loss/value", f"explained variance {short(metrics['value/explained_variance'])}"),
            "entropy": ("entropy/per_token", "nats per token"),
            "tokens a second": ("tokens/per_second", f"{metrics['seconds/total']:.2f} s an update"),
        }
        for label, (name, note) in rows.items():
            table.add_row(label, short(metrics[name]), sparkline(np.array(self.history[name])), f"[dim]{note}[/dim]")
        if word:
            told = ", ".join(FAILURES[name].title for name in active) or "no alarm"
            table.add_row("the string is", f"[{VERDICT_STYLES.get(word, 'green')}]{word}[/]", "", f"[dim]{told}[/dim]")
        return table
