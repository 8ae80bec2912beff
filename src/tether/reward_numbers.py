"""What a reward gave, as numbers: checked one by one, whatever container they came in.

Lists, tuples, generators, numpy arrays, tensors and data-frame columns are alike. A list of lists is refused unless
token rewards were asked for by name: a score that lands on every token inflates returns by the response's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from tether.batch import check_rows
from tether.errors import InputError, NonFiniteError

LARGEST = 3.4e38
"""Of float32, in which scores are kept."""


def numbers_of(given: object, wanted: int, name: str) -> list[float]:
    """One finite number a response, in order. `name` is what errors call the reward.

    Raises InputError for another number of entries or something that is no number, NonFiniteError for NaN or infinity;
    each names the row.

    >>> numbers_of((0.5, True, [2]), 3, "the reward")
    [0.5, 1.0, 2.0]
    """
    entries = _entries(given, f"a list of {wanted} numbers", name)
    check_rows(name, len(entries), wanted)
    return [_number(entry, f"response {row}", name) for row, entry in enumerate(entries)]


def token_rows_of(given: object, lengths: Sequence[int | None], unit: str, name: str) -> list[list[float]]:
    """For each response a list of finite numbers, one a `unit` (token or step); `lengths`: how many, where known.

    Raises InputError or NonFiniteError, naming row and place.
    """
    rows = _entries(given, f"a list of {len(lengths)} lists", name)
    check_rows(name, len(rows), len(lengths))
    return [_token_row(entry, row, lengths[row], unit, name) for row, entry in enumerate(rows)]


def _token_row(given: object, row: int, wanted: int | None, unit: str, name: str) -> list[float]:
    entries = _entries(given, f"a list of numbers for response {row}, one a {unit}", name)
    if wanted is not None and len(entries) != wanted:
        raise InputError(
            f"{name} gave {len(entries)} numbers for response {row}, which has {wanted} {unit}s; wanted one a {unit}"
        )
    return [_number(entry, f"{unit} {place} of response {row}", name) for place, entry in enumerate(entries)]


def _entries(given: object, wanted: str, name: str) -> list[object]:
    plain = given.tolist() if hasattr(given, "tolist") else given  # numpy, torch, pandas
    if not isinstance(plain, Iterable) or isinstance(plain, str | bytes | Mapping | Set):
        hint = ": does it end in `return`?" if plain is None else ""
        raise InputError(f"{name} gave {_shown(given)}; wanted {wanted}{hint}")
    return list(plain)


def _number(entry: object, where: str, name: str) -> float:
    if hasattr(entry, "tolist"):
        entry = entry.tolist()
    if isinstance(entry, Sequence) and not isinstance(entry, str | bytes):
        if len(entry) != 1:
            raise InputError(
                f"{name} gave {len(entry)} numbers for {where}; wanted one score a response. If they are meant for "
                "single tokens or steps, say so: TokenRewards(function) or StepRewards(function, tokenizer)"
            )
        entry = entry[0]
    try:
        number = float("a text" if isinstance(entry, str | bytes) else entry)  # type: ignore[arg-type]
    except (TypeError, ValueError) as fault:
        raise InputError(f"{name} gave {_shown(entry)} for {where}; wanted one number") from fault
    except OverflowError:
        number = float("inf")
    if not abs(number) <= LARGEST:
        raise NonFiniteError(f"{name} gave {_shown(entry)} for {where}; wanted a finite number")
    return number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
