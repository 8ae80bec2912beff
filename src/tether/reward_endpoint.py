"""A reward behind an HTTP address: prompts and responses out as JSON, one score a response back.

    POST {"prompts": ["2 + 2?"], "responses": ["4"], "columns": {"answer": ["4"]}}
    200  {"scores": [1.0]}                                   or {"rewards": [1.0]}, or the list alone

What may pass (no connection, a time-out, 408, 425, 429, 5xx) is tried again after 0.5, 1, 2 … seconds, or when the
server's Retry-After says; what cannot (404, a body that is no JSON) is not. Either way it ends in one error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tether.batch import Prompt
from tether.errors import InputError, RewardError
from tether.reward_numbers import numbers_of

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that another try may change."""
ONE_TRY_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
READ_AT_ONCE = 65_536
"""Bytes."""
KEYS = ("scores", "rewards")


class _TryAgainError(Exception):
    """A try that failed in a way that may pass."""

    def __init__(self, reason: str, pause_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds
        """What the server asks for."""


class Endpoint:
    """Scores by a server; a reward itself, `(prompts, responses, **columns) -> list[float]`."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = ONE_TRY_SECONDS,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
        columns: Sequence[str] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_seconds` is for one try, of which there are `retries` + 1; `columns` names those that are sent, None
        sends all; `headers` may hold an Authorization.

        Raises InputError where the URL is none of http or https, or a number is out of its bounds.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is no address of a reward; wanted http://host:port/path or https://…")
        if not timeout_seconds > 0 or retries < 0:
            raise InputError(f"got timeout_seconds {timeout_seconds} and retries {retries}; wanted > 0 and ≥ 0")
        self.url, self.timeout_seconds, self.retries, self.columns = url, timeout_seconds, retries, columns
        self.name = f"the reward at {url}"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self._pause = pause

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        """One finite number a response.

        Raises RewardError where the server does not answer or refuses, InputError or NonFiniteError where its answer is
        no such list, or a column cannot be sent as JSON.
        """
        answer = self._ask(self._body(prompts, responses, columns))
        if isinstance(answer, Mapping):
            found = [answer[key] for key in KEYS if key in answer]
            if not found:
                got = ", ".join(map(repr, answer)) or "an empty object"
                raise RewardError(f'{self.name} answered with {got}; wanted {{"scores": [one number a response]}}')
            answer = found[0]
        return numbers_of(answer, len(responses), self.name)

    def _body(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> bytes:
        wanted = columns if self.columns is None else self.columns
        if missing := [name for name in wanted if name not in columns]:
            raise InputError(f"{self.name} is sent {missing}; columns found: {', '.join(columns) or 'none'}")
        sent = {name: list(columns[name]) for name in wanted}
        try:
            whole = {"prompts": list(prompts), "responses": list(responses), "columns": sent}
            return json.dumps(whole).encode()
        except (TypeError, ValueError) as fault:
            raise InputError(
                f"cannot send the columns {', '.join(sent)} to {self.url}: {fault}; name those that can be JSON, as in "
                'Endpoint(url, columns=["answer"])'
            ) from fault

    def _ask(self, body: bytes) -> Any:
        started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        for left in range(self.retries, -1, -1):
            try:
                return self._try(body)
            except _TryAgainError as fault:
                if not left:
                    tries = f"{self.retries + 1} tries in {time.monotonic() - started:.1f} s"
                    raise RewardError(f"{self.name} gave no scores in {tries}; the last: {fault}") from fault
                self._pause(min(fault.pause_seconds or pause, LONGEST_PAUSE_SECONDS))
                pause *= 2
        raise AssertionError("unreachable")

    def _try(self, body: bytes) -> Any:
        ends = time.monotonic() + self.timeout_seconds
        try:
            with urlopen(Request(self.url, body, self._headers), timeout=self.timeout_seconds) as reply:
                text = self._read(reply, ends)
        except HTTPError as fault:
            with fault:
                said = fault.read(200).decode(errors="replace").strip()
            reason = f"HTTP {fault.code} {fault.reason}" + (f": {said}" if said else "")
            if fault.code in PASSING:
                raise _TryAgainError(reason, _seconds(fault.headers.get("Retry-After"))) from fault
            raise RewardError(f"{self.name} refused: {reason}") from fault
        except TimeoutError as fault:
            raise _TryAgainError(f"no answer within {self.timeout_seconds:g} s") from fault
        except (URLError, OSError, HTTPException) as fault:
            cause = fault.reason if isinstance(fault, URLError) else fault
            if isinstance(cause, TimeoutError):
                raise _TryAgainError(f"no connection within {self.timeout_seconds:g} s") from fault
            raise _TryAgainError(str(cause) or type(cause).__name__) from fault
        try:
            return json.loads(text)
        except ValueError as fault:
            raise RewardError(
                f'{self.name} answered with no JSON, {text[:80].decode(errors="replace")!r}; wanted {{"scores": […]}}'
            ) from fault

    @staticmethod
    def _read(reply: Any, ends: float) -> bytes:
        """The whole body; a server that drips it is given up at `ends`."""
        parts: list[bytes] = []
        while part := reply.read1(READ_AT_ONCE):
            parts.append(part)
            if time.monotonic() > ends:
                raise TimeoutError
        return b"".join(parts)


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; None where it is absent or a date."""
    try:
        return max(0.0, float(header or "none"))
    except ValueError:
        return None
