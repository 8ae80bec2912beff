"""From a run's settings to vLLM as its writer, for the length of the run.

    with vllm_writing(settings, policy, first) as writer: …

One process talks to vLLM, the first, and the others are told what was written. Nothing of this is imported in a run
that does not ask for it. Read next: `vllm_writer.py`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from tether.batch import Generation, Prompts
from tether.config import RunSettings
from tether.errors import ConfigError
from tether.models import LanguagePolicy
from tether.runtime.ranks import here
from tether.runtime.vllm_engine import Engine
from tether.vllm_writer import VllmWriter, Writing

SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30


@contextmanager
def vllm_writing(settings: RunSettings, policy: LanguagePolicy, first: int = 0) -> Iterator[VllmWriter | Elsewhere]:
    """A writer on the vLLM that the settings ask for; closed at the end, with what was started for it.

    `first` is the version of the policy's weights. Raises ConfigError where the settings cannot be had together,
    MissingExtraError without vLLM, and WorkerError where it does not come up, or none is at the address.
    """
    runtime = settings.runtime
    if runtime.processes > 1 and runtime.sharding == "fsdp":
        raise ConfigError(
            "runtime.writer is vllm and runtime.sharding fsdp; the weights of one process must be whole to be sent: "
            "sharding: replicate"
        )
    ranks = here()

    def open_writer() -> VllmWriter | Elsewhere:
        if not ranks.is_first:
            return Elsewhere()
        return VllmWriter(
            policy, partial(open_engine, settings, policy), _folder(runtime.vllm.folder),
            lag=runtime.staleness, bound=runtime.staleness + int(runtime.overlap), first=first,
        )  # fmt: skip

    writer = ranks.together(open_writer)
    try:
        yield writer
    finally:
        writer.close()


class Elsewhere:
    """The writer of a process that another one writes for."""

    def write(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:  # noqa: ARG002
        raise AssertionError("only the first process is asked")

    def begin(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Writing:  # noqa: ARG002
        raise AssertionError("only the first process is asked")

    def catch_up(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to end."""


def open_engine(settings: RunSettings, policy: LanguagePolicy, model: Path) -> Engine:
    """The engine that the settings name; one of the run's own starts from the checkpoint in `model`."""
    knobs = settings.runtime.vllm
    dtype, cache = str(policy.mode.model.dtype).removeprefix("torch."), int(knobs.cache_gib * GIB)
    eager = policy.device.type == "cpu" if knobs.eager is None else knobs.eager
    if knobs.place == "process":
        from tether.runtime.vllm_process import VllmProcess

        return VllmProcess(str(model), dtype, cache, eager=eager)
    from tether.runtime.vllm_server import Launch, VllmServer

    if knobs.address is not None:
        return VllmServer.at(knobs.address, knobs.answer_seconds, settings.ppo.sampling.temperature)
    options = (*(("--enforce-eager",) if eager else ()), *knobs.options)
    launch = Launch(knobs.python or sys.executable, dtype, cache, knobs.start_seconds, options)
    return VllmServer.start(launch, model, knobs.answer_seconds)


def _folder(named: str | None) -> Path:
    """Where weights are laid down: the folder that was named, or the fastest that this machine has."""
    if named is not None:
        if not Path(named).is_dir():
            raise ConfigError(f"runtime.vllm.folder is {named!r}; wanted a folder that is there")
        return Path(named)
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
