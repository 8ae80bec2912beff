"""Ctrl-C and SIGTERM as a wish to stop at the next good moment; a second one leaves at once.

The program asks `wanted` between updates, where its state is whole. A process of several has the same wish when its
launcher is gone: nobody waits for it any more, and its run folder would stay taken.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAUNCHER = "TETHER_LAUNCHER"
"""Environment variable: the process that started this one to share a run."""
LOOK_SECONDS = 0.5


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
        if os.environ.get("RANK", "0") != "0":
            return  # of several processes the first says it
        with suppress(OSError, ValueError):
            # Past Python's buffers, which may be in the middle of a write.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{self._notice}\n".encode())


@contextmanager
def to_the_end(out: Path) -> Iterator[None]:
    """What the block writes to `out` is written whole: Ctrl-C counts after it; a second one at once."""
    with Interrupt(f"writing {out} to the end; once more leaves at once") as stop:
        yield
    if stop.wanted:
        raise KeyboardInterrupt(f"{out} is written")


def stop_without_launcher() -> None:
    """Send this process SIGTERM once the one that launched it is gone, and look for that from now on."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def look() -> None:
        while os.getppid() == int(launcher):
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="launcher", daemon=True).start()
