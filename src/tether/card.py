"""The model card of an exported policy: what it was trained on, on which string, and what came of it.

Reads the run folder only; every number in the card is one of `run.db`. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tether import __version__
from tether.config import JudgeSettings, RunSettings
from tether.store import RunStore
from tether.terminal import short

MEASURED = {
    "eval/score": "score (what PPO climbed)",
    "eval/holdout": "hold-out score",
    "eval/gold": "gold score (never optimised)",
    "eval/kl": "KL to the reference, nats per response",
    "eval/distinct_2": "distinct bigrams, share",
    "eval/length": "length, tokens",
}
CURVES = "curves.png"


@dataclass(frozen=True)
class Subject:
    """What the card is about."""

    name: str
    step: int
    """Updates done."""
    base: str
    """Where the SFT checkpoint came from."""
    kind: str
    """`adapters` or `whole model`."""
    layers: int
    """Decoder layers of the model."""
    settings: RunSettings
    digests: Mapping[str, str]


def model_card(store: RunStore, subject: Subject) -> str:
    """The README of the exported folder, in Markdown with the hub's front matter."""
    parts = [_front_matter(subject), _summary(store, subject), _measured(store, subject.step), _made(store, subject)]
    return "\n\n".join([*parts, _checks(store, subject.step), _use(subject)]) + "\n"


def _front_matter(subject: Subject) -> str:
    lines = ["---", "library_name: " + ("peft" if subject.kind == "adapters" else "transformers")]
    if not Path(subject.base).exists() and subject.base.count("/") == 1:  # a name on the hub, no folder
        lines.append(f"base_model: {subject.base}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags: [rlhf, ppo, tether]", "---"])


def _summary(store: RunStore, subject: Subject) -> str:
    start, last = subject.settings.ppo.reward.beta, subject.step - 1
    beta, kl = _value(store, "beta", last), _value(store, "kl/mean", last)
    string = f"β = {start:g}" + (f", {short(beta)} at the end" if beta not in (None, start) else "")
    strayed = "" if kl is None else f" In the last update it was {short(kl)} nats per response away from it."
    curves = f"\n\n![score and KL through the run]({CURVES})" if is_drawn(store) else ""
    return (
        f"# {subject.name}\n\nA policy trained by PPO for {subject.step} updates, on the string of a KL penalty "
        f"({string}) to the SFT checkpoint that it started from.{strayed}{curves}"
    )


def is_drawn(store: RunStore) -> bool:
    """Whether the run has made an update; a fork that was not trained has no curve of its own."""
    return len(store.curve("score/mean").steps) > 0


def _measured(store: RunStore, step: int) -> str:
    """Held-out prompts, before training and at the last evaluation up to this step."""
    evaluated = [int(at) for at in store.curve("eval/kl").steps if at <= step]
    if not evaluated:
        return "No evaluation on held-out prompts was made."
    first, last = evaluated[0], evaluated[-1]
    rows = [
        f"| {title} | {_at(store, name, first)} | {_at(store, name, last)} |"
        for name, title in MEASURED.items()
        if len(store.curve(name).steps)
    ]
    return "\n".join([f"| on held-out prompts | update {first} | update {last} |", "| --- | --- | --- |", *rows])


def _at(store: RunStore, name: str, step: int) -> str:
    """The metric in that step, with its standard error where one was measured."""
    number = _value(store, name, step)
    error = _value(store, f"{name}_se", step) if f"{name}_se" in store.names() else None
    return short(number) + ("" if error is None else f" ± {short(error)}")


def _value(store: RunStore, name: str, step: int) -> float | None:
    curve = store.curve(name)
    return dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)).get(step)


def _made(store: RunStore, subject: Subject) -> str:
    settings, ppo = subject.settings, subject.settings.ppo
    lineage = store.meta().get("lineage")
    rows = {
        "started from": f"`{subject.base}`, which is the reference too (sha256 `{subject.digests['reference'][:16]}`)",
        "trained": f"{settings.model.mode}: {_what_trains(subject)}",
        "prompts": _prompts(settings),
        "reward": _reward(settings, subject.digests),
        "updates": f"{subject.step} of {ppo.steps}, {ppo.batch_size} responses each, at most "
        f"{ppo.sampling.max_new_tokens} tokens at temperature {ppo.sampling.temperature:g}",
        "β": f"{ppo.reward.beta:g}, {ppo.reward.controller}",
        "learning rate": f"{ppo.update.learning_rate:g}, {ppo.update.schedule}; {ppo.update.epochs} epochs of "
        f"{ppo.update.minibatches} minibatches, clip {ppo.update.clip_range:g}",
        "seed": str(ppo.seed),
        "forked from": f"`{lineage['run']}` at update {lineage['step']}" if isinstance(lineage, dict) else "",
        "made by": f"tether {__version__}; the whole configuration is in `tether_run.yaml`",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["## How it was made", "", "| | |", "| --- | --- |", *lines])


def _what_trains(subject: Subject) -> str:
    model = subject.settings.model
    kinds = {
        "full": "all weights",
        "lora": f"adapters of rank {model.lora_rank}",
        "top": f"the top {model.trained_layers(subject.layers)} of {subject.layers} layers",
    }
    return kinds[model.mode]


def _prompts(settings: RunSettings) -> str:
    given = settings.data.prompts
    if isinstance(given, str):
        return f"`{given}`"
    if settings.world and given is None:
        return f"those of the world `{settings.world}`"
    return "the user's own" if given is None else f"{len(given)} of the user's own"


def _reward(settings: RunSettings, digests: Mapping[str, str]) -> str:
    if settings.reward.is_given:
        which = _said(settings.reward)
    else:
        which = f"the reward model of the world `{settings.world}`" if settings.world else "the user's own"
    digest = digests.get("reward")
    return which + (f" (sha256 `{digest[:16]}`)" if digest else "")


def _said(judge: JudgeSettings) -> str:
    """A reward as the settings give it, with the weight of each part."""
    if judge.parts:
        return " + ".join(f"{part.weight:g} · {name} (`{part.source}`)" for name, part in judge.parts.items())
    members = ", ".join(f"`{member}`" for member in judge.ensemble)
    return f"{judge.ensemble_by} of {members}" if members else f"`{judge.source}`"


def _checks(store: RunStore, step: int) -> str:
    """Warnings and alarms up to this step."""
    noted = [event for event in store.events() if event.severity != "info" and (event.step or 0) <= step]
    if not noted:
        return "## Checks\n\nNo warning and no alarm was raised in this run."
    counts: dict[tuple[str, str], int] = {}
    for event in noted:
        counts[event.severity, event.kind] = counts.get((event.severity, event.kind), 0) + 1
    lines = [f"- {severity} `{kind}`: {count}" for (severity, kind), count in counts.items()]
    return "\n".join(["## Checks", "", *lines])


def _use(subject: Subject) -> str:
    needs = (
        f"\n\nThese are adapters on `{subject.base}`, which is loaded with them: `peft` must be installed."
        if subject.kind == "adapters"
        else ""
    )
    return f"""## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```
{needs}

`value_head.safetensors` is the value head: a linear map of the model's final states, which no use of the policy needs
and which `tether.models.load_policy(…, value_source="THIS FOLDER")` takes up again."""
