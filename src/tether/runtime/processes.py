"""Starting the processes that share a run on this machine, by torch's own launcher.

    tether train run.yaml --runtime.processes 2   →   the same command twice, each process one of two

Several machines are started by `torchrun` or `accelerate launch` on each of them; then nothing here is used, and
`ranks.py` joins what was started. Read next: `ranks.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tether.config import RunSettings
from tether.errors import ConfigError
from tether.runtime.interrupt import LAUNCHER
from tether.runtime.ranks import Ranks

THREADS = "OMP_NUM_THREADS"
SAVING, SAVING_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600"
"""How long torch's launcher waits, after Ctrl-C, for processes that finish their update and save; it would kill them
after 30 seconds, in the middle of a large model's update."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `tether ARGUMENTS` in so many processes; the exit code of the first that failed, 0 where none did.

    The machine's cores are dealt out among them, unless OMP_NUM_THREADS says otherwise. Each says itself what goes
    wrong, so that nothing is added here.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault(SAVING, SAVING_SECONDS)
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        with _without_its_words():
            elastic_launch(config, sys.executable)("-m", "tether.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"process {rank} of {processes} was ended by signal {-failure.exitcode}, and with it the others; "
                  "what was saved is whole: tether resume", file=sys.stderr)  # fmt: skip
        return max(1, failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def require_processes(settings: RunSettings, ranks: Ranks) -> None:
    """Raise ConfigError where other processes were launched than asked for, or more than can share a minibatch."""
    asked, ppo = settings.runtime.processes, settings.ppo
    if asked not in (1, ranks.count):
        launched = "this process stands alone" if ranks.count == 1 else f"{ranks.count} processes were launched"
        raise ConfigError(
            f"runtime.processes is {asked} and {launched}; `tether train` starts them itself, a program of yours is "
            f"started by torchrun --nproc-per-node {asked}"
        )
    rows = ppo.batch_size // ppo.update.minibatches
    if rows < ranks.count:
        raise ConfigError(
            f"a minibatch has {rows} responses and {ranks.count} processes share it; wanted one each at least: try "
            f"ppo.batch_size={ranks.count * ppo.update.minibatches}"
        )


@contextmanager
def _without_its_words() -> Iterator[None]:
    """torch's launcher logs a stack of its own for each process that ends badly, which says nothing new."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
