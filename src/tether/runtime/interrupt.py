"""Ctrl-C and SIGTERM as a wish to stop at the next good moment; a second one leaves at once.

The program asks `wanted` between updates, where its state is whole.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Listens while its `with` block runs. Outside of the main thread Python hears no signals: then it never wants."""

    def __init__(self, notice: str) -> None:
        """`notice`: what the terminal says at the first signal."""
        self.wanted = False
        self._notice = notice
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        with suppress(OSError, ValueError):
            # Past Python's buffers, which may be in the middle of a write.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{self._notice}\n".encode())
