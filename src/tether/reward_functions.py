"""A Python function as reward, plain or async: given only the columns that it takes, waited for, its faults told whole.

    def brevity(prompts, responses, **columns): ...     texts, and every further column of the data set
    def correct(prompts, responses, answer): ...        texts, and the column `answer`
    async def asked(prompts, completions): ...          names may be given too: `prompts`, `responses`, `completions`

Knows no rollout. Read next: `judging.py`, `reward_sources.py`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tether.batch import Prompt, plain_text
from tether.errors import InputError, RewardError, TetherError
from tether.metrics import did_you_mean
from tether.reward_numbers import numbers_of
from tether.runtime.waiting import LeftError, TimeUpError, notice_after, wait_for

NOTICE_SECONDS = 60.0
"""After so long without an answer the user is told what the run waits for."""
SEARCH_SECONDS = 2.0
"""The longest search for the row that a function fails on."""
RESPONSES = ("responses", "completions")
REMEMBERS = ("checkpoint_state", "restore_state")
"""Methods of a reward that has a memory."""


class FunctionReward:
    """Scores by a function; a reward itself, `(prompts, responses, **columns) -> list[float]`."""

    def __init__(
        self, function: Callable[..., object], *, name: str | None = None, timeout_seconds: float | None = None
    ) -> None:
        """`timeout_seconds` is for a whole batch; None waits for ever, in the thread that asks.

        Raises InputError where `function` cannot be called, or the limit is not above 0.
        """
        if not callable(function):
            raise InputError(f"got {function!r} as a reward; wanted a function (prompts, responses, **columns)")
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise InputError(f"timeout_seconds is {timeout_seconds}; wanted seconds above 0, or None")
        self.function, self.timeout_seconds = function, timeout_seconds
        self.name = name or name_of(function)
        for passed in REMEMBERS:  # an object that a run goes on with from where it was (`snapshot.py:Stateful`)
            if hasattr(function, passed):
                setattr(self, passed, getattr(function, passed))

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        """What `scored` gives and raises."""
        return self.scored(prompts, responses, columns)

    def scored(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> list[float]:
        """One finite number a response. Columns may have any name, `prompts` included, which then is not passed on.

        Raises RewardError where the function fails or is out of time, InputError where it wants a column that is not
        there or gives something else than one number a response, NonFiniteError where one is NaN or infinite.
        """
        return numbers_of(self.ask(prompts, responses, columns), len(responses), self.name)

    def ask(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> object:
        """What the function gives, unchecked. Errors that tether raises inside it pass as they are."""
        call = bound(self.function, prompts, responses, columns, self.name)
        started, waiting = time.monotonic(), f"{self.name} has been at work for {NOTICE_SECONDS:g} s; the run waits"
        try:
            with notice_after(NOTICE_SECONDS, f"{waiting} (timeout_seconds sets a limit)"):
                return wait_for(call, self.timeout_seconds)
        except TimeUpError:
            raise RewardError(
                f"{self.name} gave nothing for {_responses(len(responses))} in {self.timeout_seconds:g} s; look where "
                "it hangs, or raise timeout_seconds"
            ) from None
        except TetherError:
            raise
        except Exception as fault:
            quick = time.monotonic() - started < SEARCH_SECONDS
            row = self._culprit(fault, prompts, responses, columns) if quick else None
            raise RewardError(_told(self.name, fault, row, prompts, responses)) from fault

    def _culprit(
        self,
        fault: Exception,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[object]],
    ) -> int | None:
        """The first row that the function fails on in the same way when asked about it alone."""
        ends = time.monotonic() + SEARCH_SECONDS
        for row in range(len(responses)):
            alone = {name: column[row : row + 1] for name, column in columns.items()}
            call = bound(self.function, prompts[row : row + 1], responses[row : row + 1], alone, self.name)
            try:
                wait_for(call, max(0.01, ends - time.monotonic()))
            except TimeUpError:
                return None
            except Exception as again:
                if (type(again), str(again)) == (type(fault), str(fault)):
                    return row
        return None


def bound(
    function: Callable[..., object],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[object]],
    name: str,
) -> Callable[[], object]:
    """The function with the arguments that its signature asks for.

    Parameters called `prompts`, `responses` or `completions` get these, wherever they stand. Where none has the
    responses' name, the first two parameters get prompts and responses. Every other one gets the column of its name;
    `**columns` gets all that are left.

    Raises InputError where it takes no responses, or wants a column that is not there.
    """
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins do not tell
        return partial(function, prompts, responses)
    kinds = inspect.Parameter
    placed = [p.name for p in parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    known = {**columns, "prompts": prompts, "responses": responses, "completions": responses}
    if any(taken in RESPONSES for taken in parameters):
        if placed and placed[0] not in known:
            known[placed[0]] = prompts
        elif "prompts" not in parameters:
            columns = {**columns, "prompts": prompts}
    elif len(placed) >= 2:
        known |= {placed[0]: prompts, placed[1]: responses}
    elif any(parameter.kind is kinds.VAR_POSITIONAL for parameter in parameters.values()):
        function = partial(function, prompts, responses)
        parameters = {label: p for label, p in parameters.items() if label not in placed}
    else:
        raise InputError(f"{name} takes ({', '.join(parameters)}); wanted (prompts, responses, **columns)")
    return _filled(function, parameters, known, columns, name)


def _filled(
    function: Callable[..., object],
    parameters: Mapping[str, inspect.Parameter],
    known: Mapping[str, Sequence[object]],
    columns: Mapping[str, Sequence[object]],
    name: str,
) -> Callable[[], object]:
    by_place: list[object] = []
    by_name: dict[str, object] = {}
    for label, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            by_name |= {column: columns[column] for column in columns.keys() - parameters.keys()}
        elif label in known and parameter.kind is parameter.POSITIONAL_ONLY:
            by_place.append(known[label])
        elif label in known:
            by_name[label] = known[label]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            found = ", ".join(columns) or "none"
            raise InputError(
                f"{name} wants the column {label!r}, which the data set does not have{did_you_mean(label, columns)}; "
                f"columns found: {found}"
            )
    return partial(function, *by_place, **by_name)


def name_of(reward: object) -> str:
    """What errors call it: `the reward function brevity`, `the reward RewardModel`."""
    inner = reward.func if isinstance(reward, partial) else reward
    label = getattr(inner, "__qualname__", None)
    if label is None:
        return str(getattr(inner, "name", f"the reward {type(inner).__name__}"))
    code = getattr(inner, "__code__", None)
    where = f" (line {code.co_firstlineno} of {code.co_filename})" if "<lambda>" in label and code else ""
    return f"the reward function {label.rpartition('<locals>.')[2]}{where}"


def _told(name: str, fault: Exception, row: int | None, prompts: Sequence[Prompt], responses: Sequence[str]) -> str:
    kind = type(fault).__name__
    what = str(fault) if isinstance(fault, LeftError) else f"{kind}: {fault}" if str(fault) else kind
    if row is None:
        return f"{name} failed on a batch of {_responses(len(responses))}: {what}"
    prompt, response = _short(plain_text(prompts[row])), _short(responses[row])
    return f"{name} failed on response {row}: {what}. Prompt: {prompt} Response: {response}"


def _responses(count: int) -> str:
    return f"{count} response{'s' * (count != 1)}"


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}…"
