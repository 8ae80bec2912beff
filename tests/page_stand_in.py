"""In place of `tether.cli`, for the page's buttons: its runs are there at once and train nothing.

python page_stand_in.py train --name NAME --root ROOT … | fork FOLDER[@STEP] --name NAME … | resume FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from page_runs import make_run
from tether.store import RunStore

LIVES_SECONDS = 60.0


def main(kind: str, *words: str) -> None:
    """Be the run's process until somebody asks it to stop, or its time is over."""
    if "kl_sign" in words:
        sys.exit("no such fault can be planted today")
    print(kind, *words, flush=True)
    folder = Path(words[0].partition("@")[0])
    if kind == "train":
        folder = make_run(Path(_after(words, "--root")), _after(words, "--name"), updates=5, ended=False)
    elif kind == "fork":
        folder = make_run(folder.parent, _after(words, "--name"), updates=8, ended=False)
    with RunStore.open(folder, readonly=False) as store:
        beat = store.last_heartbeat()
        store.heartbeat(0 if beat is None else beat.step, "recorded", "running")
        time.sleep(LIVES_SECONDS)


def _after(words: tuple[str, ...], flag: str) -> str:
    return words[words.index(flag) + 1]


if __name__ == "__main__":
    main(*sys.argv[1:])
