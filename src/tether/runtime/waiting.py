"""Other people's code, waited for: plain or async, with a time limit or without, from inside a running loop too.

Without a limit a plain function runs where it is called: in the main thread, under the user's signals. With one it runs
in a thread of its own, since Python can stop waiting for a function but cannot stop it. Coroutines run on one loop in
one thread for the whole process, so that a client which is bound to its loop can be used again, and a notebook, whose
own loop is busy running the cell, can wait for them.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import cache

SIGN_OF_LIFE_SECONDS = 1.0
"""A loop that does nothing for so long is blocked by what runs on it."""


class TimeUpError(Exception):
    """What was waited for did not come within the limit."""


class LeftError(Exception):
    """What was waited for wanted to end the whole program, by `sys.exit()`."""


class _Interrupted(Exception):
    """A coroutine raised KeyboardInterrupt, which would end the loop that it runs on."""


def wait_for(function: Callable[[], object], limit_seconds: float | None = None) -> object:
    """What the function gives, awaited where that is an awaitable.

    Raises TimeUpError where it takes longer than the limit, LeftError where it calls `sys.exit()`, and whatever else
    the function raises. A plain function that is given up goes on in its thread, which does not keep the process alive;
    a coroutine is cancelled.
    """
    started = time.monotonic()
    with _exits_told():
        given = function() if limit_seconds is None else _result(_in_thread(function), limit_seconds)
    if not inspect.isawaitable(given):
        return given
    left = None if limit_seconds is None else max(0.0, limit_seconds - (time.monotonic() - started))
    return _await(given, left)


@contextmanager
def _exits_told() -> Iterator[None]:
    try:
        yield
    except SystemExit as leave:
        raise LeftError(f"it called sys.exit({'' if leave.code is None else repr(leave.code)})") from leave


@contextmanager
def notice_after(seconds: float, text: str) -> Iterator[None]:
    """Warn through `logging` once the block has taken so long; Python shows that where nobody listens."""
    timer = threading.Timer(seconds, logging.getLogger("tether").warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_thread(function: Callable[[], object]) -> Future[object]:
    future: Future[object] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as fault:
            future.set_exception(fault)

    threading.Thread(target=run, name="tether-limited", daemon=True).start()
    return future


def _await(given: Awaitable[object], limit_seconds: float | None) -> object:
    async def waited() -> object:
        try:
            with _exits_told():
                return await given
        except KeyboardInterrupt as stop:
            raise _Interrupted from stop

    try:
        return _result(asyncio.run_coroutine_threadsafe(waited(), _loop()), limit_seconds)
    except _Interrupted:
        raise KeyboardInterrupt from None
    except TimeUpError:
        if not _turns(_loop()):
            _loop.cache_clear()  # its thread is lost to what blocks it; the next coroutine gets another
        raise


def _result(future: Future[object], limit_seconds: float | None) -> object:
    try:
        if not wait([future], limit_seconds).done:
            raise TimeUpError
    except BaseException:  # Ctrl-C while waiting, too
        future.cancel()
        raise
    return future.result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="tether-loop", daemon=True).start()
    return loop


def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop still runs what it is given."""
    return bool(wait([asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)], SIGN_OF_LIFE_SECONDS).done)
