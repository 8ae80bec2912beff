"""A user's function as reward: given what it takes, awaited, timed, and its faults told whole."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tether
from tether import reward_functions
from tether.errors import InputError, ModelError, RewardError
from tether.reward_functions import FunctionReward, name_of

P, R = ["p0", "p1"], ["a", "bb"]
COLUMNS = {"answer": ["x", "yy"], "level": [1, 2]}


def lengths(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


# ── what it is given ────────────────────────────────────────────────────────────────────────────────────────────────
def by_place(p, r):
    return (p, r)


def only_answer(prompts, responses, answer):
    return (prompts, responses, answer)


def all_columns(prompts, responses, **columns):
    return (prompts, responses, dict(sorted(columns.items())))


def one_and_the_rest(prompts, responses, level, **columns):
    return (prompts, responses, level, columns)


def with_default(prompts, responses, answer="none", strict=True):
    return (prompts, responses, answer, strict)


def trl_style(completions, answer, **kwargs):
    return (completions, answer, kwargs["prompts"], kwargs["level"], sorted(kwargs))


def named_backwards(completions, prompts):
    return (prompts, completions)


def keywords_only(*, prompts, completions, level):
    return (prompts, completions, level)


def responses_only(responses):
    return (responses,)


def places_only(p, r, /, answer):
    return (p, r, answer)


def queries_and_responses(queries, responses):
    return (queries, responses)


def anything(*args, **kwargs):
    return (*args, dict(sorted(kwargs.items())))


def places(*args):
    return args


def starred(prompts, *rest, level):
    return (prompts, *rest, level)


class Scorer:
    def __call__(self, prompts, responses, answer):
        return (prompts, responses, answer)

    def method(self, prompts, responses, level):
        return (prompts, responses, level)


def with_scale(scale, prompts, responses, answer):
    return (scale, prompts, responses, answer)


@functools.wraps(only_answer)
def decorated(*args, **kwargs):
    return only_answer(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (by_place, (P, R)),
        (only_answer, (P, R, ["x", "yy"])),
        (all_columns, (P, R, COLUMNS)),
        (one_and_the_rest, (P, R, [1, 2], {"answer": ["x", "yy"]})),
        (with_default, (P, R, ["x", "yy"], True)),
        (trl_style, (R, ["x", "yy"], P, [1, 2], ["level", "prompts"])),
        (named_backwards, (P, R)),
        (keywords_only, (P, R, [1, 2])),
        (responses_only, (R,)),
        (places_only, (P, R, ["x", "yy"])),
        (queries_and_responses, (P, R)),
        (anything, (P, R, COLUMNS)),
        (places, (P, R)),
        (starred, (P, R, [1, 2])),
        (Scorer(), (P, R, ["x", "yy"])),
        (Scorer().method, (P, R, [1, 2])),
        (functools.partial(with_scale, 0.5), (0.5, P, R, ["x", "yy"])),
        (decorated, (P, R, ["x", "yy"])),
        (lambda p, r: (p, r), (P, R)),
        (min, ["a", "bb"]),  # a builtin without a signature: (prompts, responses)
    ],
    ids=lambda value: name_of(value).split()[-1] if callable(value) else "",
)
def test_a_function_gets_the_columns_that_it_takes_and_no_other(function: Callable, wanted: object) -> None:
    assert FunctionReward(function).ask(P, R, COLUMNS) == wanted


def test_a_column_that_is_missing_is_told_with_those_that_were_found() -> None:
    def reward(prompts, responses, anser):
        return [0.0] * len(responses)

    said = r"reward wants the column 'anser', .*; did you mean 'answer'\?; columns found: answer, level"
    with pytest.raises(InputError, match=said):
        FunctionReward(reward)(P, R, **COLUMNS)
    with pytest.raises(InputError, match=r"columns found: none"):
        FunctionReward(reward)(P, R)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_function_without_room_for_responses_is_refused() -> None:
    for function in (lambda: None, lambda texts: [], lambda *, prompts: []):
        with pytest.raises(InputError, match=r"wanted \(prompts, responses, \*\*columns\)"):
            FunctionReward(function)(P, R)
    with pytest.raises(InputError, match="got 5 as a reward"):
        FunctionReward(5)  # type: ignore[arg-type]


def test_columns_may_have_the_names_of_prompts_and_responses() -> None:
    columns = {"prompts": ["other"] * 2, "responses": ["old"] * 2, "completions": ["older"] * 2}
    assert FunctionReward(only_answer).ask(P, R, columns | COLUMNS) == (P, R, ["x", "yy"])
    assert FunctionReward(all_columns).ask(P, R, columns) == (P, R, {"completions": ["older"] * 2})
    assert FunctionReward(lambda prompts, responses: lengths(responses)).scored(P, R, columns) == [1.0, 2.0]


# ── async ───────────────────────────────────────────────────────────────────────────────────────────────────────────
async def slow_lengths(prompts, responses):
    await asyncio.sleep(0.001)
    return lengths(responses)


class AsyncScorer:
    async def __call__(self, prompts, responses):
        return lengths(responses)


@pytest.mark.parametrize("function", [slow_lengths, AsyncScorer(), lambda prompts, responses: slow_lengths(P, R)])
@pytest.mark.parametrize("limit", [None, 5.0])
def test_an_async_function_is_awaited(function: Callable, limit: float | None) -> None:
    assert FunctionReward(function, timeout_seconds=limit)(P, R) == [1.0, 2.0]


def test_an_async_function_is_awaited_from_inside_a_running_loop() -> None:
    async def cell() -> list[float]:
        return FunctionReward(slow_lengths)(P, R)

    assert asyncio.run(cell()) == [1.0, 2.0]


def test_what_an_async_function_keeps_open_serves_the_next_call() -> None:
    loops = []

    async def reward(prompts, responses):
        loops.append(asyncio.get_running_loop())
        return lengths(responses)

    for _ in range(3):
        FunctionReward(reward)(P, R)
    assert len(set(map(id, loops))) == 1


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_fault_names_function_row_and_cause() -> None:
    def parse(prompts, responses, level):
        return [float(response) for response in responses]

    with pytest.raises(RewardError) as caught:
        FunctionReward(parse)(P, ["1", "many words"], level=[1, 2])
    cause = caught.value.__cause__
    assert isinstance(cause, ValueError)
    assert str(caught.value) == (
        "the reward function parse failed on response 1: ValueError: could not convert string to float: 'many words'. "
        "Prompt: 'p1' Response: 'many words'"
    )
    assert cause.__traceback__.tb_next is not None  # the way into the user's own line


def test_a_fault_of_the_whole_batch_names_no_row() -> None:
    def late(prompts, responses):
        if len(responses) == 2:
            raise KeyError("both")
        return lengths(responses)

    def other(prompts, responses):
        raise ValueError(f"{len(responses)} responses")

    with pytest.raises(RewardError, match=r"late failed on a batch of 2 responses: KeyError: 'both'$"):
        FunctionReward(late)(P, R)
    with pytest.raises(RewardError, match=r"other failed on a batch of 2 responses: ValueError: 2 responses$"):
        FunctionReward(other)(P, R)


def test_the_search_for_the_row_does_not_ask_a_slow_function_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(prompts, responses):
        calls.append(len(responses))
        raise ValueError

    monkeypatch.setattr(reward_functions, "SEARCH_SECONDS", 0.0)
    with pytest.raises(RewardError, match=r"slow failed on a batch of 2 responses: ValueError$"):
        FunctionReward(slow)(P, R)
    assert calls == [2]


def test_an_async_fault_is_told_alike() -> None:
    async def reward(prompts, responses):
        await asyncio.sleep(0)
        raise OSError("no such judge")

    with pytest.raises(RewardError, match="reward failed on response 0: OSError: no such judge"):
        FunctionReward(reward)(P, R)


async def leaves_politely(prompts, responses):
    sys.exit(0)


def leaves(prompts, responses):
    sys.exit(0)


@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("function", [leaves, leaves_politely])
def test_a_function_that_would_end_the_program_has_failed(function: Callable, limit: float | None) -> None:
    """Else a run would end as if it had done its work; and the loop of async functions would be gone."""
    with pytest.raises(RewardError, match=r"on response 0: it called sys\.exit\(0\)"):
        FunctionReward(function, timeout_seconds=limit)(P, R)
    assert FunctionReward(slow_lengths, timeout_seconds=limit)(P, R) == [1.0, 2.0]


def test_an_interrupt_from_within_a_coroutine_arrives() -> None:
    async def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionReward(interrupted, timeout_seconds=5.0)(P, R)


def test_errors_of_tether_and_interrupts_pass_as_they_are() -> None:
    def raising(fault: BaseException) -> Callable:
        def reward(prompts, responses):
            raise fault

        return reward

    for fault in (ModelError("as it was"), KeyboardInterrupt()):
        for limit in (None, 5.0):
            with pytest.raises(type(fault)) as caught:
                FunctionReward(raising(fault), timeout_seconds=limit)(P, R)
            assert caught.value is fault


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lengths, "the reward function lengths"),
        (Scorer.method, "the reward function Scorer.method"),
        (Scorer(), "the reward Scorer"),
        (functools.partial(with_scale, 2), "the reward function with_scale"),
        (FunctionReward(lengths), "the reward function lengths"),
        (FunctionReward(lengths, name="the judge"), "the judge"),
    ],
)
def test_a_reward_has_a_name_in_errors(function: Callable, wanted: str) -> None:
    assert name_of(function) == wanted


def test_a_lambda_is_named_by_its_place() -> None:
    assert name_of(lambda p, r: []).startswith("the reward function <lambda> (line ")
    assert __file__ in name_of(lambda p, r: [])


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def hangs(prompts, responses):
    time.sleep(30)


async def hangs_politely(prompts, responses):
    await asyncio.sleep(30)


async def hangs_its_loop(prompts, responses):
    time.sleep(30)


@pytest.mark.parametrize("function", [hangs, hangs_politely, hangs_its_loop])
def test_a_function_that_hangs_is_given_up_with_one_clear_error(function: Callable) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"gave nothing for 2 responses in 0\.2 s; .* raise timeout_seconds"):
        FunctionReward(function, timeout_seconds=0.2)(P, R)
    assert time.monotonic() - started < 2.5
    assert FunctionReward(slow_lengths, timeout_seconds=2.0)(P, R) == [1.0, 2.0]  # the next one is not held up


def test_without_a_limit_a_plain_function_runs_in_the_thread_that_asks() -> None:
    threads = []

    def reward(prompts, responses):
        threads.append(threading.current_thread())
        return lengths(responses)

    FunctionReward(reward)(P, R)
    FunctionReward(reward, timeout_seconds=5.0)(P, R)
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_is_above_0(limit: float) -> None:
    with pytest.raises(InputError, match="timeout_seconds is"):
        FunctionReward(lengths, timeout_seconds=limit)


def test_the_user_is_told_what_a_long_wait_is_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(prompts, responses):
        time.sleep(0.2)
        return lengths(responses)

    monkeypatch.setattr(reward_functions, "NOTICE_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, logger="tether"):
        FunctionReward(slow)(P, R)
        FunctionReward(by_place).ask(P, R, {})
    time.sleep(0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "the reward function slow has been at work for 0.05 s; the run waits (timeout_seconds sets a limit)"
    ]


@pytest.mark.parametrize(("kind", "limit"), [("def", "600"), ("async def", "None")])
def test_ctrl_c_reaches_a_run_that_waits_for_its_reward(kind: str, limit: str) -> None:
    wait = "await asyncio.sleep(600)" if kind == "async def" else "time.sleep(600)"
    code = (
        "import asyncio, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits it ignored
        "from tether.reward_functions import FunctionReward\n"
        f"{kind} reward(prompts, responses):\n    print('asked', flush=True)\n    {wait}\n"
        f"FunctionReward(reward, timeout_seconds={limit})(['p'], ['r'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tether.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "asked\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode != 0
    assert said.rstrip().endswith("KeyboardInterrupt")
