"""What a run is beside its state: its settings, and digests of what it reads and does not change.

A resumed run with another reference, reward model or tokenizer would look like the same run and be none. `identify`
says what a run is, `require_same_settings` and `require_same_digests` refuse another one, with the reason. A digest is
the sha256 of a thing's content, so it depends on no path, machine or device. Read next: `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Protocol, runtime_checkable

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tether import __version__
from tether.checkpoint import Identity
from tether.config import RunSettings
from tether.errors import RunError
from tether.models import LanguagePolicy
from tether.reward_model import RewardModel
from tether.runtime.sharding import whole

FREE = ("checkpoint", "checks", "evaluation", "keep_samples", "report_to", "runtime")
"""Sections of the settings that a resumed run may have otherwise: they change what is looked at and kept alone."""
WHERE = ("model.source", "data.prompts", "data.heldout", "reward.source", "holdout.source", "judge.source")
"""Knobs that say where something lies, which may be moved; what lies there has a digest, or is only looked at."""
NAMES = {
    "reference": "the reference (the SFT checkpoint)",
    "tokenizer": "the tokenizer",
    "reward": "the reward",
    "prompts": "the set of training prompts",
    "columns": "the columns beside the training prompts",
}
PATIENCE = ("timeout_seconds", "retries")
"""How long a reward is waited for, which changes no score."""
PASSED_ON = ("checkpoint_state", "restore_state")
"""What a wrapper hands on of the thing in it, which is looked into as itself."""
DEPTH = 8
"""How far a reward that is made of others is looked into."""


@runtime_checkable
class Digested(Protocol):
    """A reward that says itself what it is."""

    def digest(self) -> str:
        """The same text exactly where the reward gives the same scores."""


def identify(
    settings: RunSettings,
    policy: LanguagePolicy,
    reward: object,
    prompts: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[object]],
) -> Identity:
    """What the run of these is; `prompts` are token ids, with their `columns`, which the reward reads. The policy's
    reference is read, not its trained weights.
    """
    digests = {
        "reference": of_tensors(policy.mode.reference()),
        "tokenizer": of_tokenizer(policy.tokenizer),
        "reward": of_reward(reward),
        "prompts": of_prompts(prompts),
    }
    if columns:
        digests["columns"] = of_columns(columns)
    return Identity(settings.dump(), digests, made_by())


def made_by() -> dict[str, object]:
    """What computes: equal bits are promised where this is equal."""
    return {
        "tether": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.machine(),
        "cuda": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }


def recorded_settings(recorded: object) -> RunSettings:
    """The settings that a folder holds. Raises RunError where this version of tether does not know them."""
    try:
        return RunSettings.model_validate(recorded)
    except ValidationError as error:
        raise RunError(
            f"the settings that this run was started with are not those of this version of tether ({error}); use the "
            "version that wrote them, or start a new run"
        ) from error


def require_same_settings(recorded: object, wanted: RunSettings, advice: str, free: Sequence[str] = ()) -> None:
    """Raise RunError, naming each knob, where settings differ in more than what is looked at and kept, and `free`."""
    before = recorded_settings(recorded).dump()
    old, new = _flat(before), _flat(wanted.dump())
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in free]
    changed = [name for name in differing if name.split(".")[0] not in FREE]
    if changed:
        told = "\n".join(f"  {name}: {old.get(name)} in the checkpoint, {new.get(name)} now" for name in changed)
        raise RunError(f"a resumed run keeps its settings; these differ:\n{told}\n{advice}")


def require_same_digests(recorded: Mapping[str, str], found: Mapping[str, str], advice: str) -> None:
    """Raise RunError, naming each, where something that the run reads is not what it was. Unknown ones are passed."""
    changed = [name for name in found if recorded.get(name, found[name]) != found[name]]
    if changed:
        told = "\n".join(
            f"  {NAMES[name]}: sha256 {recorded[name][:12]}… at the start, {found[name][:12]}… now" for name in changed
        )
        raise RunError(f"this is not what the run was started with:\n{told}\n{advice}")


def differences(recorded: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What else may move the last bits, in words: libraries, device, threads.

    >>> differences({"torch": "2.13.0", "threads": 2}, {"torch": "2.13.0", "threads": 1})
    ['threads was 2 and is 1']
    """
    return [
        f"{name} was {recorded[name]} and is {now[name]}" for name in now if recorded.get(name, now[name]) != now[name]
    ]


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as `ppo.reward.beta` → value."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Of types, shapes and bits, in order.

    >>> of_tensors([torch.zeros(2)]) == of_tensors([torch.zeros(2)]), of_tensors([torch.zeros(1, 2)])[:4]
    (True, '5d87')
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = whole(tensor.detach()).cpu().contiguous().reshape(-1)
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of vocabulary, rules, special tokens and chat template; padding and truncation, which calls set, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    kept = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _of_text(json.dumps([kept, special, tokenizer.chat_template], sort_keys=True, default=str))


def of_prompts(ids: Sequence[Sequence[int]]) -> str:
    """Of the tokens of all prompts, in their order."""
    return _of_text(json.dumps([list(row) for row in ids]))


def of_columns(columns: Mapping[str, Sequence[object]]) -> str:
    """Of all entries, in their order; what is no plain value counts by its kind."""
    plain = {name: list(columns[name]) for name in sorted(columns)}
    return _of_text(json.dumps(plain, skipkeys=True, default=lambda entry: type(entry).__qualname__))


def of_reward(reward: object) -> str:
    """Of a reward: the weights of a model, the source of a function, and the public attributes of what is made of them.

    A reward with a method `digest()` speaks for itself. What cannot be looked into counts by its name.
    """
    return _of_text(_told(reward, DEPTH))


def _told(thing: object, depth: int) -> str:
    """What the thing is, as text."""
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    if depth == 0 or thing is None or isinstance(thing, bool | int | float | str | bytes):
        return repr(thing) if depth else name
    if isinstance(thing, type):
        return f"type {name}"
    if isinstance(thing, Digested):
        return f"{name} {thing.digest()}"
    if isinstance(thing, RewardModel):
        kept = thing.manifest
        numbers = f"{kept.gain!r} {kept.bias!r} {kept.closed} {kept.eos}"
        return f"{name} {numbers} {_of_module(thing.model)} {of_tokenizer(thing.tokenizer)}"
    return _told_by_kind(thing, name, depth - 1)


def _told_by_kind(thing: object, name: str, depth: int) -> str:
    if isinstance(thing, nn.Module):
        return f"{name} {_of_module(thing)}"
    if isinstance(thing, Tensor):
        return of_tensors([thing])
    if isinstance(thing, PreTrainedTokenizerBase):
        return of_tokenizer(thing)
    if isinstance(thing, partial):
        return _told([thing.func, thing.args, thing.keywords], depth)
    if isinstance(thing, MethodType):
        return f"{_told(thing.__self__, depth)}.{_source(thing.__func__)}"
    if isinstance(thing, FunctionType | BuiltinFunctionType):
        return f"{name} {_source(thing)}"
    if isinstance(thing, Mapping):
        return str({str(key): _told(value, depth) for key, value in thing.items()})
    if isinstance(thing, list | tuple):
        return str([_told(entry, depth) for entry in thing])
    if is_dataclass(thing):
        return f"{name} {_told({one.name: getattr(thing, one.name) for one in fields(thing)}, depth)}"
    everything = getattr(thing, "__dict__", {}).items()
    public = {key: value for key, value in everything if not key.startswith("_") and key not in PASSED_ON + PATIENCE}
    return f"{name} {_source(type(thing))} {_told(public, depth)}"


def _source(code: object) -> str:
    """The text of a function or class, or its name where no text is to be had."""
    try:
        return inspect.getsource(code)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return str(getattr(code, "__qualname__", code))


def _of_module(module: nn.Module) -> str:
    return of_tensors([*module.parameters(), *module.buffers()])


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
