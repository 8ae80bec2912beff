"""How far each phase of a long job is: a bar a phase on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

PLAIN_LINES = 10
"""Lines of a phase where no terminal is."""


class Phases:
    """Tells how far each phase is; a phase begins when it is first told of."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """So much of the phase is done; the note stands beside it."""
        if self._console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(phase, total=total)
            self._progress.update(
                self._tasks[phase], completed=done, total=total, description=f"{phase} {note}".strip()
            )
        elif done == total or done % max(total // PLAIN_LINES, 1) == 0:
            self._console.print(f"{phase}: {done} of {total} {note}".rstrip(), soft_wrap=True)


@contextmanager
def phases(console: Console) -> Iterator[Phases]:
    """Show phases while the block runs; bars are gone after it."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Phases(console, progress)
