"""`tether doctor`: what this machine has, and with `--run`, whether a run fits into its memory.

It looks only: nothing is downloaded, written or sent; the hub is asked for one header.
"""

from __future__ import annotations

import json as jsonlib
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tether import __version__
from tether.config import RunSettings
from tether.recipe_files import load_recipe

if TYPE_CHECKING:
    from tether.memory_plan import Plan

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pydantic")
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
HUB_SECONDS = 3.0
ESTIMATE_ERROR = "for a model of 25M weights on a CPU the estimate was 1 % to 24 % above the measured peak"
"""By `bench/memory_plan.py`: full +8 %, top +24 %, lora +1 %, full with gradient checkpointing +6 %."""
PROGRAM_BYTES = 0.7e9
"""Of Python, torch and transformers before any model is loaded, measured on Linux."""
NEEDED_DISK_BYTES = 2e9


def main(run: str | None = None, json: bool = False) -> int:
    """Say what this machine has: versions, processor, memory, disk, cache, and whether the hub can be reached.

    Args:
        run: A YAML file or a recipe: estimate the memory that it takes, by role, before it starts.
        json: Print one JSON object.
    """
    settings = None if run is None else load_recipe(run)
    found = {"tether": __version__, "python": platform.python_version(), **versions(), **machine(), **places()}
    found["hub"] = hub()
    estimate = None if settings is None else estimated(settings)
    if json:
        told = None if estimate is None else {"roles": dict(estimate.roles), "total": estimate.total}
        print(jsonlib.dumps({**found, "memory_plan": told}))
    else:
        print("\n".join(f"{name:<14} {value}" for name, value in _for_people(found).items()))
    if estimate is None or settings is None:
        return 0
    fits = estimate.total + PROGRAM_BYTES <= float(str(found["memory_bytes"]))
    if not json:
        print(_plan_text(estimate, settings, fits))
    return 0 if fits else 1


def versions() -> dict[str, object]:
    """Versions of what tether stands on; None where it is missing."""
    found: dict[str, object] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, object]:
    """Processor, its fast number formats, threads, memory and GPUs."""
    import torch

    able = torch.cpu.get_capabilities()
    gpus = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "bf16": bool(able.get("avx512_bf16")),
        "amx": bool(able.get("amx_bf16")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": max((gpu.total_memory for gpu in gpus), default=free_memory_bytes()),
        "gpus": [gpu.name for gpu in gpus],
    }


def free_memory_bytes() -> int:
    """Memory that a new program can have, in this container too where one sets a limit."""
    free = _available_bytes()
    limit, used = (_number(Path(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _available_bytes() -> int:
    """What the system says that a new program can have: Linux's own estimate, else what is unused."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text("utf-8").splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def places() -> dict[str, object]:
    """Where models and worlds are kept, and the room there."""
    from tether.places import cache_folder

    cache = cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "cache": str(cache),
        "cache_writable": os.access(there, os.W_OK),
        "disk_free_bytes": shutil.disk_usage(there).free,
    }


def hub() -> str:
    """Whether the Hugging Face hub answers."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "offline (HF_HUB_OFFLINE is set)"
    try:
        request = urllib.request.Request(HUB, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return f"{HUB} answers"
    except urllib.error.HTTPError:
        return f"{HUB} answers"
    except (OSError, ValueError) as fault:
        return f"{HUB} cannot be reached ({getattr(fault, 'reason', fault)}); models from folders work all the same"


def estimated(settings: RunSettings) -> Plan:
    """The memory of a run by role, from the configurations of its models."""
    from tether.loading import read_config
    from tether.memory_plan import Shape, halves, plan
    from tether.tasks import require_complete

    if settings.data.prompts is not None or settings.world is None:
        require_complete(settings)
    model = settings.model.source or str(_world_model(settings))
    shape = Shape.of(read_config(model))
    reward = _reward_parameters(settings, shape.parameters)
    return plan(settings, shape, half=halves(settings, shape.parameters), reward=reward)


def _world_model(settings: RunSettings) -> Path:
    from tether.worlds.world import open_world

    assert settings.world is not None
    return open_world(settings.world).model


def _reward_parameters(settings: RunSettings, parameters: int) -> int:
    """Parameters of the reward models in memory: a world has two like its policy, functions have none."""
    from tether.classifiers import classifier_parameters

    if not settings.reward.is_given:
        return 2 * parameters
    sources = [source for judge in (settings.reward, settings.holdout, settings.judge) for source in judge.classifiers]
    return sum(map(classifier_parameters, sources))


def _for_people(found: Mapping[str, object]) -> dict[str, object]:
    told = dict(found)
    told["memory"] = f"{float(str(told.pop('memory_bytes'))) / 1e9:.1f} GB free"
    disk = float(str(told.pop("disk_free_bytes")))
    told["disk"] = f"{disk / 1e9:.1f} GB free" + (
        "" if disk > NEEDED_DISK_BYTES else ": little; models and runs need 2"
    )
    told["cache"] = str(told["cache"]) + (
        "" if told.pop("cache_writable") else " (cannot be written: set TETHER_CACHE)"
    )
    told["gpus"] = ", ".join(map(str, told["gpus"])) or "none"  # type: ignore[call-overload]
    told["bf16"] = "yes" if told["bf16"] or told["amx"] else "no: matrices are float32 on this processor"
    return {name: "missing" if value is None else value for name, value in told.items()}


def _plan_text(plan: Plan, settings: RunSettings, fits: bool) -> str:
    lines = ["", f"estimate for mode {settings.model.mode}, batch {settings.ppo.batch_size}:"]
    lines += [f"  {role:<14} {size / 1e6:9,.0f} MB" for role, size in plan.roles.items()]
    lines += [
        f"  {'together':<14} {plan.total / 1e6:9,.0f} MB, and {PROGRAM_BYTES / 1e6:,.0f} MB for the program itself"
    ]
    lines.append(f"  ({ESTIMATE_ERROR})")
    if not fits:
        from tether.memory_plan import remedy

        largest = max(plan.roles, key=lambda role: plan.roles[role])
        place = {"activations": "update", "KV cache": "generation"}.get(largest, "loading")
        lines.append(f"it does not fit. {remedy(settings, place)}")
    return "\n".join(lines)
