"""From a run's settings to vLLM as its writer, for the length of the run.

    with vllm_writing(settings, policy, first) as writer: …

One process talks to vLLM, the first, and the others are told what was written. Nothing of this is imported in a run
that does not ask for it. Read next: `vllm_writer.py`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tether.config import RunSettings
from tether.elsewhere import Elsewhere
from tether.errors import ConfigError
from tether.models import LanguagePolicy
from tether.runtime.ranks import here
from tether.runtime.vllm_engine import Engine
from tether.vllm_writer import VllmWriter
from tether.weights import tied_names

SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30


@contextmanager
def vllm_writing(settings: RunSettings, policy: LanguagePolicy, first: int = 0) -> Iterator[VllmWriter | Elsewhere]:
    """A writer on the vLLM that the settings ask for; closed at the end, with what was started for it.

    `first` is the version of the policy's weights. Raises ConfigError where the settings cannot be had together,
    MissingExtraError without vLLM, and WorkerError where it does not come up, or none is at the address.
    """
    runtime, ranks = settings.runtime, here()
    if max(runtime.processes, ranks.count) > 1 and runtime.sharding == "fsdp":
        raise ConfigError(
            "runtime.writer is vllm and runtime.sharding fsdp; the weights of one process must be whole to be sent: "
            "sharding: replicate"
        )

    def open_writer() -> VllmWriter | Elsewhere:
        if not ranks.is_first:
            return Elsewhere()
        return VllmWriter(
            policy, partial(open_engine, settings, policy), folder_for(runtime.vllm.folder, laid_bytes(policy)),
            lag=runtime.staleness, bound=runtime.staleness + int(runtime.overlap), first=first,
        )  # fmt: skip

    writer = ranks.together(open_writer)
    try:
        yield writer
    finally:
        writer.close()


def facts(writer: VllmWriter | Elsewhere, overlap: bool) -> dict[str, object]:
    """Who writes, for the run folder."""
    return {"runtime": "vllm", "overlap": overlap, "writer": writer.about()}


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
        temperature, untied = settings.ppo.sampling.temperature, bool(tied_names(policy))
        return VllmServer.at(knobs.address, knobs.answer_seconds, temperature, untied=untied)
    options = (*(("--enforce-eager",) if eager else ()), *knobs.options)
    launch = Launch(knobs.python or sys.executable, dtype, cache, knobs.start_seconds, options)
    return VllmServer.start(launch, model, knobs.answer_seconds)


def laid_bytes(policy: LanguagePolicy) -> int:
    """What the whole policy takes as files; a head that is tied is laid down beside the embeddings."""
    every = policy.mode.model.named_parameters(remove_duplicate=False)
    return sum(weight.numel() * weight.itemsize for _, weight in every)


def folder_for(named: str | None, size: int) -> Path:
    """Where so many bytes of weights are laid down: the folder that was named, or the fastest of this machine that has
    room for them; a container's shared memory is often a few megabytes. Raises ConfigError where there is none.
    """
    if named is not None and not Path(named).is_dir():
        raise ConfigError(f"runtime.vllm.folder is {named!r}; wanted a folder that is there")
    known = [SHARED_MEMORY, Path(tempfile.gettempdir())] if named is None else [Path(named)]
    for folder in known:
        if folder.is_dir() and shutil.disk_usage(folder).free > size:
            return folder
    tried = ", ".join(
        f"{folder} has {shutil.disk_usage(folder).free / GIB:.2f} free" for folder in known if folder.is_dir()
    )
    raise ConfigError(f"the weights for vLLM take {size / GIB:.2f} GiB and {tried}; name a folder with more: "
                      "runtime.vllm.folder")  # fmt: skip
