"""From what people have to a reward: a string, a function, a classifier, a list, a mapping, a `RewardSpec`.

open_reward("org/reward-model" | "my.py:f" | "https://…" | "scores.jsonl" | {"parts": …})    what YAML can say
as_reward(function | classifier | (classifier, tokenizer) | list | mapping | any of the above)  what Python can hold
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.batch import JudgesRollouts, Reward, ScoresRollouts
from tether.errors import ConfigError, InputError, TetherError
from tether.metrics import did_you_mean
from tether.reward_endpoint import ONE_TRY_SECONDS, Endpoint
from tether.reward_functions import FunctionReward, name_of
from tether.reward_model import RewardModel
from tether.reward_sources import Ensemble, Joined, Listed, WeightedSum
from tether.reward_spec import RewardSpec
from tether.token_rewards import TokenRewards

LISTS = (".jsonl", ".json", ".csv", ".parquet")
OURS = (FunctionReward, RewardModel, Joined, Listed, Endpoint, TokenRewards)


def open_reward(spec: str | Path | Mapping[str, Any] | RewardSpec) -> Reward:
    """The reward that a configuration names.

    Raises ConfigError where the mapping is no `RewardSpec`, InputError where a file, module or function cannot be found
    or imported, ModelError where a classifier cannot be read or has another number of labels than one.
    """
    spec = _checked(spec)
    if spec.parts:
        return WeightedSum({name: (_open(part.source, spec), part.weight) for name, part in spec.parts.items()})
    if spec.ensemble:
        members = [_open(source, spec) for source in spec.ensemble]
        return Ensemble(members, spec.ensemble_by, spec.ensemble_penalty)
    assert spec.source is not None
    return _open(spec.source, spec)


def as_reward(given: object, *, timeout_seconds: float | None = None) -> Reward:
    """The reward that an object stands for.

    A reward as it is · a function · a classifier with its tokenizer, `(model, tokenizer)` · whatever `open_reward`
    reads · `{name: part}` or `{name: (part, weight)}`, summed · a list of rewards, summed · a list of rows with
    `prompt`, `response` and `score`. `timeout_seconds` is for functions.

    Raises InputError, ModelError or ConfigError where it is none of these.
    """
    if isinstance(given, str | Path | RewardSpec):
        return open_reward(given)
    if isinstance(given, PreTrainedModel):
        return RewardModel.load(given)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], PreTrainedModel):
        return _classifier(*given)
    if isinstance(given, (*OURS, ScoresRollouts, JudgesRollouts)):
        return given  # type: ignore[return-value]  # each of them is called as a reward is
    if isinstance(given, Mapping):
        return _of_mapping(given, timeout_seconds)
    if callable(given) and not inspect.isclass(given):
        return FunctionReward(given, timeout_seconds=timeout_seconds)
    if isinstance(given, Iterable) and not inspect.isclass(given) and not isinstance(given, tuple):
        return _of_list(list(given), timeout_seconds)
    raise InputError(
        f"got {given!r:.80} as a reward; wanted a function (prompts, responses, **columns), a classifier, a path, a "
        "URL, or several of them by name"
    )


# ── strings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _checked(spec: str | Path | Mapping[str, Any] | RewardSpec) -> RewardSpec:
    if isinstance(spec, RewardSpec):
        return spec
    try:
        return RewardSpec.model_validate(str(spec) if isinstance(spec, Path) else spec)
    except ValidationError as fault:
        faults = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'reward'}: {one['msg']}" for one in fault.errors())
        raise ConfigError(f"the reward cannot be read: {faults}") from fault


def _open(source: str, spec: RewardSpec) -> Reward:
    if source.startswith(("http://", "https://")):
        return Endpoint(source, timeout_seconds=spec.timeout_seconds or ONE_TRY_SECONDS, retries=spec.retries)
    path, colon, name = source.rpartition(":")
    if colon and not Path(source).exists():
        found = find(path, name)
        if spec.per_token:
            return TokenRewards(found, timeout_seconds=spec.timeout_seconds)
        return as_reward(found, timeout_seconds=spec.timeout_seconds)
    if source.endswith(".py"):
        raise InputError(f"{source!r} names no function in that file; wanted {source}:function")
    if source.startswith("~"):
        source = str(Path(source).expanduser())
    return Listed(source) if source.endswith(LISTS) else RewardModel.load(source)


def find(path: str, name: str) -> Any:
    """What is called `name` in a Python file (`rewards.py`) or a module (`package.rewards`).

    Raises InputError where there is no such file, module or name, or importing it fails.
    """
    module = _import(path)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [
                label for label, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
            ]
            raise InputError(
                f"{path} has no {name!r}{did_you_mean(name, own)}; it defines: {', '.join(own) or 'nothing'}"
            )
        found = getattr(found, part)
    if inspect.isclass(found):
        raise InputError(f"{path}:{name} is a class; wanted a function or an object: name an instance of it there")
    return found


def _import(path: str) -> ModuleType:
    try:
        if not path.endswith(".py"):
            with _importable(Path.cwd()):
                return importlib.import_module(path)
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            raise InputError(f"there is no file {path!r} in {Path.cwd()}; wanted file.py:function or module:function")
        with _importable(file.parent):
            return _run(file)
    except TetherError:
        raise
    except ModuleNotFoundError as fault:
        raise InputError(f"cannot import {path!r}: {fault}; looked in {Path.cwd()} and what is installed") from fault
    except SystemExit as leave:
        raise InputError(
            f"importing {path!r} ends the program (sys.exit, or a command line that is read at once); wanted a module "
            'of functions: put what runs as a program below: if __name__ == "__main__":'
        ) from leave
    except Exception as fault:
        raise InputError(f"importing {path!r} failed: {type(fault).__name__}: {fault}") from fault


def _run(file: Path) -> ModuleType:
    name = f"tether_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the user's own can be imported, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _classifier(model: PreTrainedModel, tokenizer: object) -> Reward:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"a classifier came with {type(tokenizer).__name__}; wanted (model, tokenizer)")
    return RewardModel.load(model, tokenizer)


def _of_mapping(given: Mapping[Any, Any], timeout_seconds: float | None) -> Reward:
    if given and all(isinstance(key, tuple) for key in given):
        return Listed(given)
    if given.keys() & RewardSpec.model_fields.keys():
        return open_reward(given)
    return WeightedSum({str(name): _weighted(part, timeout_seconds) for name, part in given.items()})


def _weighted(part: Any, timeout_seconds: float | None) -> tuple[Reward, float]:
    """`part`, `(part, weight)` or `{"source": …, "weight": …}`."""
    weight: Any = 1.0
    if isinstance(part, tuple) and len(part) == 2 and not isinstance(part[1], PreTrainedTokenizerBase):
        part, weight = part
    elif isinstance(part, Mapping) and "weight" in part:
        part, weight = {key: value for key, value in part.items() if key != "weight"}, part["weight"]
    return as_reward(part, timeout_seconds=timeout_seconds), weight


def _of_list(given: list[Any], timeout_seconds: float | None) -> Reward:
    if given and all(isinstance(row, Mapping) and "response" in row for row in given):
        return Listed(given)
    if given and all(isinstance(entry, int | float) for entry in given):
        raise InputError(
            "got a list of numbers as a reward; wanted their prompts and responses too: "
            "[{'prompt': …, 'response': …, 'score': …}, …]"
        )
    labels = [_label(entry[0] if isinstance(entry, tuple) else entry) for entry in given]
    names = [f"{label}_{place}" if labels.count(label) > 1 else label for place, label in enumerate(labels)]
    return WeightedSum({name: _weighted(part, timeout_seconds) for name, part in zip(names, given, strict=True)})


def _label(given: object) -> str:
    """What a part of a sum without names is called: the last word of what errors call it."""
    return (given if isinstance(given, str) else name_of(given).rpartition(" ")[2]).strip("()").replace("/", "_")
