"""The knobs of the runtimes: how many processes share an update, and who writes the responses.

Part of `config.py`'s `RunSettings`, under `runtime`; what carries them out is `runtime/`. Knows no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tether.settings import Settings, contradiction, knob


class RaySettings(Settings):
    """The workers of a Ray cluster: how many write, how many score, and how long they are waited for."""

    address: str | None = knob(
        None,
        "Of a cluster, as auto or HOST:6379; null = that of RAY_ADDRESS, else a Ray of the run's own",
        usual="auto",
    )
    rollout_workers: int = knob(
        1, "Workers that write responses", usual="one a GPU", used="OpenRLHF, verl 1 to 64", ge=1
    )
    scoring_workers: int = knob(
        1, "Workers with the reference and the reward models; 0 = the learner itself", usual="0 to as many as write",
        ge=0,
    )  # fmt: skip
    cpus_per_worker: float = knob(1.0, "Cores that each worker is given", usual="1 to 8", gt=0)
    gpus_per_worker: float = knob(0.0, "GPUs that each worker is given, or a share of one", usual="0 or 1", ge=0)
    answer_seconds: float = knob(
        300.0, "The longest wait for an answer of a worker, its restarts included", usual="60 to 1800", gt=0
    )
    object_store_mb: int | None = knob(
        None, "Shared memory of a Ray of the run's own, in MiB; null = Ray's choice", usual="3 times the weights", ge=80
    )


class VllmSettings(Settings):
    """The vLLM that writes the responses: where it runs, and with what."""

    place: Literal["server", "process"] = knob(
        "server", "vLLM's server, of the run's own or at `address`, or its offline engine inside the trainer's process",
        used="OpenRLHF, verl inside Ray actors",
    )  # fmt: skip
    address: str | None = knob(
        None, "Of a server that runs already, as http://host:8000; null = the run starts one of its own"
    )
    python: str | None = knob(
        None, "Interpreter of the environment that vLLM is installed in, for a server of the run's own; null = this one"
    )
    folder: str | None = knob(
        None, "Where weights are laid down for the engine, seen at the same path by both; null = shared memory"
    )
    cache_gib: float = knob(1.0, "GiB for keys and values, of a vLLM of the run's own", usual="1 to 40", gt=0)
    eager: bool | None = knob(
        None, "Leave out compilation and CUDA graphs: a quick start, slower tokens; null = on a CPU only"
    )
    options: tuple[str, ...] = knob(
        (), "Further options for a server of the run's own, as --tensor-parallel-size=2", usual="none"
    )
    start_seconds: float = knob(600.0, "The longest that a server may take to come up", usual="60 to 1200", gt=0)
    answer_seconds: float = knob(
        600.0, "The longest wait for one response or one exchange of weights", usual="60 to 1800", gt=0
    )

    @model_validator(mode="after")
    def _one_place(self) -> VllmSettings:
        own = [name for name, given in (("python", self.python), ("options", self.options)) if given]
        if self.address is not None and (own or self.place == "process"):
            raise contradiction(
                ["address", *(own or ["place"])],
                "address names a server that runs already, which the run neither starts nor holds; wanted address "
                "alone, or none",
            )
        if self.place == "process" and own:
            raise contradiction(
                ["place", *own], f"place is process, where {own[0]} has no meaning; wanted place: server"
            )
        return self


class RuntimeSettings(Settings):
    """Who does the rooms' work. But for `overlap` and another engine's round-off, the course of a run is the same."""

    processes: int = knob(1, "Processes that share every update, on this machine or several", usual="one a GPU", ge=1)
    sharding: Literal["replicate", "fsdp"] = knob(
        "replicate", "Every process holds the whole model, or a share of each layer's weights (FSDP2)",
        used="OpenRLHF ZeRO-3, verl FSDP",
    )  # fmt: skip
    writer: Literal["own", "vllm", "ray"] = knob(
        "own", "Who writes the responses: the policy's own sampler, vLLM, or workers of Ray with that sampler",
        used="OpenRLHF, verl vLLM",
    )  # fmt: skip
    overlap: bool = knob(
        False, "Write the next update's responses while this one trains, by weights one update old; not with `own`",
        usual="false", used="OpenRLHF --async_train, verl one-step off-policy",
    )  # fmt: skip
    staleness: int = knob(
        0, "Updates by which the weights of vLLM may lag before it gets new ones: fewer exchanges, older responses",
        usual="0 to 2", ge=0,
    )  # fmt: skip
    ray: RaySettings = RaySettings()
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _elsewhere(self) -> RuntimeSettings:
        if self.overlap and self.writer == "own":
            raise contradiction(
                ["overlap", "writer"],
                "overlap is on and the policy writes itself, one thing after the other; wanted writer: ray or vllm",
            )  # fmt: skip
        if self.staleness and self.overlap:
            raise contradiction(
                ["staleness", "overlap"],
                f"staleness is {self.staleness} with overlap, by which responses are one update old already; wanted "
                "one of the two",
            )
        if self.staleness and self.writer != "vllm":
            raise contradiction(
                ["staleness", "writer"],
                f"staleness is {self.staleness} and writer {self.writer}, which always writes by the newest weights "
                "that it can; wanted writer: vllm, or staleness: 0",
            )
        return self
