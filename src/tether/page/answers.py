"""How the page answers, and how it says no: JSON in which nothing is infinite, and one sentence for each fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tether.database import to_json
from tether.errors import ConfigError, InputError, RunError, TetherError
from tether.page.library import Slow
from tether.page.reading import Reader
from tether.page.security import Refused

Answer = TypeVar("Answer")
Handler = Callable[[Request, Exception], Awaitable[Response]]


class Json(JSONResponse):
    """JSON; what is not finite is null."""

    def render(self, content: object) -> bytes:
        return to_json(content).encode("utf-8", "replace")


def number(text: str | None, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or not least <= int(text[:20]) <= most:
        raise Refused(400, f"got {text[:20]!r}; wanted a whole number from {least} to {most}")
    return int(text)


def conflict(ask: Callable[[Reader], Answer]) -> Callable[[Reader], Answer]:
    """What a run cannot do as it stands is a conflict, not a fault of the request."""

    def asking(reader: Reader) -> Answer:
        try:
            return ask(reader)
        except (InputError, ConfigError):
            raise
        except Slow:
            raise
        except RunError as error:
            raise Refused(409, str(error)) from error

    return asking


async def _complain(request: Request, error: Exception) -> Response:
    del request
    if isinstance(error, Slow):
        return Json({"error": str(error)}, 503)
    return Json({"error": str(error)}, 400 if isinstance(error, InputError | ConfigError) else 409)


async def _refuse(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refused)
    return Json(dict(error.body), error.status)


async def _refuse_http(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, HTTPException)
    return Json({"error": error.detail}, error.status_code)


async def _break_down(request: Request, error: Exception) -> Response:
    """A mistake of ours; the reader learns its kind, the terminal the rest."""
    del request
    return Json({"error": f"the server failed: {type(error).__name__}"}, 500)


HANDLERS: dict[type[Exception], Handler] = {
    TetherError: _complain, Refused: _refuse, HTTPException: _refuse_http, Exception: _break_down,
}  # fmt: skip
