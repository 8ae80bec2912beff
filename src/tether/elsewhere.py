"""What stands where workers or an engine would, in a process that another one speaks for.

Of several processes the first alone talks to vLLM or to Ray's workers, and tells the others what it heard (`ranked.py`,
`judging.py`). These see here that such help exists, and never ask it. Read next: `writers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from jaxtyping import Float
from torch import Tensor

from tether.batch import Prompts, Sequences

_TOLD = "only the first process is asked"


class Elsewhere:
    """A `Writer`, a `Referee` and a scorer that nobody asks."""

    def write(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> NoReturn:  # noqa: ARG002
        raise AssertionError(_TOLD)

    def begin(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> NoReturn:  # noqa: ARG002
        raise AssertionError(_TOLD)

    def expect(self, sequences: Sequences, temperature: float) -> NoReturn:  # noqa: ARG002
        raise AssertionError(_TOLD)

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> NoReturn:  # noqa: ARG002
        raise AssertionError(_TOLD)

    def score(self, rows: Sequence[Sequence[int]]) -> NoReturn:  # noqa: ARG002
        raise AssertionError(_TOLD)

    def about(self) -> str:
        return "another process asks"

    def catch_up(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to end."""
