"""What every knob is made of: its default, bounds, help, usual range and who uses what, and the base of all models.

Knows no torch. Read next: `config.py`, the knobs themselves.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def knob(default: Any, help: str, *, usual: str = "", used: str = "", **bounds: Any) -> Any:
    """A field with its line of help, the range in which it is usually set, and who sets it to what."""
    return Field(default, description=help, json_schema_extra={"usual": usual, "used": used}, **bounds)


class Settings(BaseModel):
    """Base of all knobs: frozen, an unknown name is an error, and so are NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def contradiction(knobs: list[str], message: str) -> PydanticCustomError:
    """The error of knobs that do not go together; it carries their names, relative to the model that raises it."""
    return PydanticCustomError("contradiction", "{message}", {"knobs": knobs, "message": message})
