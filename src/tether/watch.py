"""Watches a run: asks every check at its time, and says which alarms are new.

    before the policy moves   invariants of the update, probes of the models, sampler honesty
                              what the text has become
    after                     the first minibatch's ratio, skipped steps, trends of the metrics, honesty of the climb

It only looks: no weight, no random stream and no number of the run is touched, so a run that is watched is the run that
is not. What an alarm does to the run is `on_alarm`. Read next: `verdict.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tether.alarms import FAILURES, Alarm
from tether.batch import Experience, Rewards, Rollout, Scores
from tether.checks import Moment, Tolerance, check, check_outcome, check_start
from tether.climb import Climb, Sign
from tether.config import CheckSettings
from tether.errors import AlarmError, RunError
from tether.following import Following, PromptScores
from tether.guards import Trends
from tether.hacks import Hacks, real_rows
from tether.honesty import Distributions, Honesty
from tether.pairing import Pairing
from tether.probes import PassProbe, ReferenceProbe, RewardProbe, check_storage, differing_weights, fingerprint
from tether.shown import Past
from tether.trainer import Record, Run
from tether.verdict import word_of

OnAlarm = Literal["log", "pause", "stop", "rollback"]
"""What an alarm does: an event only, or the end of the run: saved as it stands, not saved, or back at a checkpoint."""
FIRST = {"reference": (1, 2), "reward": (0, 1), "passes": (0, 2)}
"""Updates at the start in which a probe is asked; the reference says at update 0 what it is held to."""
EVERY = {"reference": 16, "reward": 20, "passes": 40}
"""Updates between two questions of a probe, later on: each costs a forward pass, and all together below 1 %."""
SAMPLER = frozenset(name for name, failure in FAILURES.items() if failure.kind == "statistic")
EXPLAINS = {
    "dropout_on": SAMPLER | {"first_ratio", "padding_leak", "too_many_epochs", "wrong_update"},
    "padding_leak": SAMPLER | {"first_ratio", "too_many_epochs", "wrong_update"},
    "wrong_reference": frozenset({"stale_sampler"}),
    "reference_moves": frozenset({"wrong_reference"}),
    "off_by_one": SAMPLER | {"too_many_epochs"},
    "prompt_in_mask": SAMPLER | {"too_many_epochs"},
    "no_eos_credit": SAMPLER,
    "nan": frozenset({"first_ratio"}),
}
"""What follows from a failure, and is not told beside it."""
NOISY = frozenset({"dropout_on", "padding_leak"})
"""Failures by which two passes over the same rows differ."""
PASSING = frozenset({"guard", "hack"})
"""Kinds whose alarms can be over."""
CLEAN_UPDATES = 10
"""After so many updates without it, a guard's alarm is cleared; what was wrong by an identity stays in the weights."""


@dataclass
class Watch:
    """The checks of one run; hand `before` to the run as its `watch`, and ask `after` once the update is done."""

    on_alarm: OnAlarm = "log"
    same_start: bool = True
    """Whether policy and reference are one model at the start; False where they differ on purpose."""
    words: Path | None = None
    """A folder with the user's own `hedges.txt` and `opinions.jsonl`."""
    active: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Alarms that last, with the update they were last seen in and their severity."""
    _found: list[Alarm] = field(default_factory=list)
    _seconds: float = 0.0
    _probes: _Probes | None = None
    _trends: Trends | None = None
    _climb: Climb = field(default_factory=Climb)
    _signs: list[Sign] = field(default_factory=list)
    _numbers: dict[str, float] = field(default_factory=dict)
    _restored: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(settings: CheckSettings) -> Watch:
        """As the settings have it."""
        return Watch(settings.on_alarm, settings.same_start, None if settings.words is None else Path(settings.words))

    def before(self, run: Run, rollout: Rollout, scores: Scores, rewards: Rewards, experience: Experience) -> None:
        """Look at the update while the policy is still the one that sampled."""
        started, jumped = time.perf_counter(), list[Alarm]()
        if self._probes is None:
            self._probes = _Probes.of(run, rollout, self.words)
            self._trends = Trends(run.settings)
            jumped = list(self._take_up(run))
        probes = self._probes
        if self._trends is not None:
            self._trends.settings = run.settings  # which may have been steered
        moment = Moment(
            run.step, run.settings, run.beta.value, rollout, scores, rewards, experience, probes.tolerance, probes.stops
        )
        with torch.no_grad():
            self._found = [*jumped, *check(moment), *probes.ask(moment)]
            self._numbers, self._signs = probes.hacks.look(rollout, scores, run.step)
        self._numbers |= flatness(rollout, scores, run.beta.value)
        if run.step == 0 and self.same_start:
            self._found = self._check_start(moment, run)
        self._seconds = time.perf_counter() - started

    def after(self, record: Record, judged: Mapping[str, float] | None = None) -> tuple[list[Alarm], list[str]]:
        """The update's alarms that are new, and the names of those that are over. `judged`: what judges that are not
        climbed say of it, `score/holdout` and `score/gold`.
        """
        started = time.perf_counter()
        found = list(self._found)
        found += self._climb.check({**record.metrics, **(judged or {})}, self._signs)
        self._numbers |= self._climb.numbers()
        if self._probes is not None and self._trends is not None:
            found += check_outcome(record.outcome, self._probes.tolerance)
            found += self._follow(record)
            found += self._trends.check(record.metrics, distinct=len(set(record.rollout.texts)))
        self._found, self._signs = [], []
        fresh = list(self._fresh(record.step, list(_once(found))))
        over = [
            name
            for name, (last, _) in self.active.items()
            if FAILURES[name].kind in PASSING and record.step - last >= CLEAN_UPDATES
        ]
        for name in over:
            del self.active[name]
        self._seconds += time.perf_counter() - started
        return fresh, over

    def _check_start(self, moment: Moment, run: Run) -> list[Alarm]:
        """What was found, and policy and reference at the start: where they differ by more than dropout or padding
        explains, these are not told of the reference besides.
        """
        noise = max((_noise(alarm) for alarm in self._found if alarm.reason in NOISY), default=0.0)
        started = list(check_start(moment, noise))
        if not started:
            return self._found
        where = differing_weights(run.policy)
        told = [replace(alarm, seen=f"{alarm.seen}; {where}") if where else alarm for alarm in started]
        return [found for found in self._found if found.evidence.get("who") != "π_ref"] + told

    @property
    def numbers(self) -> Mapping[str, float]:
        """What the checks measured in the last update, under names of the catalogue."""
        return self._numbers

    @property
    def word(self) -> str:
        """The verdict on the run as it stands."""
        return word_of((reason, severity) for reason, (_, severity) in self.active.items())

    @property
    def seconds(self) -> float:
        """What the last update's checks took."""
        return self._seconds

    def checkpoint_state(self) -> Mapping[str, object]:
        """What the checks have seen so far, and a fingerprint of the weights that the run must go on with."""
        if self._probes is None or self._trends is None:
            return self._restored
        return {
            "active": self.active,
            "trends": self._trends.state(),
            "honesty": self._probes.honesty.state(),
            "hacks": self._probes.hacks.state(),
            "climb": self._climb.state(),
            "following": self._probes.following.state(),
            "prompt_scores": self._probes.prompt_scores.state(),
            "pairing": self._probes.pairing.state(),
            "weights": fingerprint(self._probes.run.policy),
        }

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Go on from there; the weights are compared when the run does."""
        self._restored = dict(state)
        known: dict[str, tuple[int, str]] = state.get("active", {})  # type: ignore[assignment]
        self.active = {reason: (int(step), severity) for reason, (step, severity) in known.items()}

    def _follow(self, record: Record) -> list[Alarm]:
        """Whether the update that is over went where its advantages point."""
        probes = self._probes
        if probes is None or record.step < probes.run.settings.update.value_warmup:
            return []
        numbers, alarms = probes.following.check(
            probes.run.policy,
            record.rollout,
            record.experience,
            record.outcome,
            record.metrics.get("learning_rate", 0.0),
        )
        self._numbers |= numbers
        return alarms

    def act(self, alarms: Iterable[Alarm]) -> None:
        """What `on_alarm` asks for. Raises AlarmError where the run shall stop."""
        grave = [alarm for alarm in alarms if alarm.severity == "alarm"]
        if grave and self.on_alarm != "log":
            told = "; ".join(f"{alarm.failure.title} ({alarm.seen})" for alarm in grave)
            raise AlarmError(f"stopped by an alarm: {told}. {grave[0].remedy}")

    def _take_up(self, run: Run) -> Iterator[Alarm]:
        """Give the checks what they had seen before a resume, and see that the weights are those that were saved.

        A check that the checkpoint knows nothing of, which is older than it, begins anew. Raises RunError where it
        knows one in another form.
        """
        state = self._restored
        if not state or self._probes is None or self._trends is None:
            return
        probes = self._probes
        checks: dict[str, Any] = {
            "trends": self._trends,
            "honesty": probes.honesty,
            "hacks": probes.hacks,
            "climb": self._climb,
            "following": probes.following,
            "prompt_scores": probes.prompt_scores,
            "pairing": probes.pairing,
        }
        for name in checks.keys() & state.keys():
            try:
                checks[name].restore(state[name])
            except (LookupError, TypeError, ValueError, AttributeError) as fault:
                raise RunError(
                    f"the checkpoint keeps what {name} has seen in a form that this version of tether does not read "
                    f"({type(fault).__name__}: {fault}); go on with the version that wrote it"
                ) from fault
        now = fingerprint(run.policy)
        if state.get("weights", now) != now:
            yield Alarm("resume_jump", f"the policy's weights are not those saved before update {run.step}",
                        {"saved": state["weights"], "now": now})  # fmt: skip

    def _fresh(self, step: int, found: Sequence[Alarm]) -> Iterator[Alarm]:
        reasons = self.active.keys() | {alarm.reason for alarm in found}
        explained = {told for reason in reasons for told in EXPLAINS.get(reason, ()) if told != reason}
        for alarm in found:
            if alarm.reason in explained:
                continue
            known = self.active.get(alarm.reason)
            if known is None or (known[1] == "warning" and alarm.severity == "alarm"):
                yield alarm
            worst = "alarm" if "alarm" in (alarm.severity, known and known[1]) else alarm.severity
            self.active[alarm.reason] = (step, worst)


@dataclass
class _Probes:
    """What is fixed at the first update that is watched, and asked from then on."""

    run: Run
    first: int
    tolerance: Tolerance
    reference: ReferenceProbe
    reward: RewardProbe
    honesty: Honesty
    stops: frozenset[int]
    hacks: Hacks
    following: Following
    prompt_scores: PromptScores
    pairing: Pairing

    @staticmethod
    def of(run: Run, rollout: Rollout, words: Path | None) -> _Probes:
        temperature = run.settings.sampling.temperature
        tolerance = Tolerance.of(next(iter(run.policy.trainable()["policy"])).dtype)
        stops = run.policy.stops if isinstance(run.policy, Distributions) else frozenset()
        return _Probes(
            run, run.step, tolerance,
            ReferenceProbe(run.policy, rollout, temperature, tolerance),
            RewardProbe(run.reward, rollout),
            Honesty(run.settings.seed, temperature, tolerance),
            stops, Hacks(run, words, Past(run.step)), Following(run.settings, tolerance), PromptScores(),
            Pairing(run.settings.seed),
        )  # fmt: skip

    def ask(self, moment: Moment) -> Iterator[Alarm]:
        """Every probe whose turn it is."""
        run, rollout = self.run, moment.rollout
        optimised = [parameter for group in run.optimiser.groups.values() for parameter in group]
        yield from check_storage(run.policy, optimised)
        yield from self.reference.check(ask=self._due("reference", moment.step))
        if self._due("passes", moment.step):
            yield from PassProbe(run.policy, rollout, run.settings.sampling.temperature, self.tolerance).check()
        if self._due("reward", moment.step):
            yield from self.reward.check(rollout, moment.scores)
        if moment.step == self.first:
            yield from self.reward.check_replies()
        given = moment.scores.totals.tolist()
        yield from self.prompt_scores.check(rollout.prompts.texts, rollout.texts, given)
        if not self.pairing.is_over:
            asked = real_rows(rollout.prompts.ids, rollout.prompts.mask)
            said = real_rows(rollout.sequences.responses, rollout.response_mask)
            yield from self.pairing.check(asked, said, given, moment.step)
        yield from self.honesty.check(run.policy, rollout, moment.step)

    def _due(self, probe: str, step: int) -> bool:
        since = step - self.first
        return since in FIRST[probe] or (since > 0 and since % EVERY[probe] == 0)


def flatness(rollout: Rollout, scores: Scores, beta: float) -> dict[str, float]:
    """`string/flatness`: Var(r − β·Σℓ) over Var(r), within prompts where they have several responses, over all else.

    At the optimum π_ref·e^{r/β}/Z(x), r − β·Σℓ is β·log Z(x), the same for every response to a prompt.
    """
    paid, texts = scores.totals.double(), [str(prompt) for prompt in rollout.prompts.texts]
    groups = [[i for i, other in enumerate(texts) if other == text] for text in dict.fromkeys(texts)]
    several = [group for group in groups if len(group) > 1] or [list(range(len(texts)))]
    left = paid - beta * rollout.kl.double()
    spreads = [sum(float(x[group].var(correction=0)) * len(group) for group in several) for x in (left, paid)]
    return {"string/flatness": spreads[0] / spreads[1]} if spreads[1] > 1e-12 else {}


def _noise(alarm: Alarm) -> float:
    """Nats by which two passes differed, of an alarm that says so."""
    return max(float(value) for name, value in alarm.evidence.items() if name.startswith("rms"))  # type: ignore[arg-type]


def _once(alarms: Iterable[Alarm]) -> Iterator[Alarm]:
    """One alarm a reason, the gravest."""
    told: dict[str, Alarm] = {}
    for alarm in alarms:
        if alarm.reason not in told or alarm.severity == "alarm" != told[alarm.reason].severity:
            told[alarm.reason] = alarm
    yield from told.values()
