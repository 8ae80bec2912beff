"""A bank of the reference's own samples with their scores: what the page's ghost is reweighted from.

    prompts × samples responses of the policy as it starts ──▶ scores and gold, [prompts, samples] ──▶ bank.json

Large where replies cost little, else as small as an evaluation. Drawn once for each reference, reward and set of
prompts, and kept in the cache. Its draws are a stream of their own, so a run with a bank is the run without. Knows no
page. Read next: `page/ghost.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tether.batch import Policy, Reward
from tether.config import RunSettings, SamplingSettings
from tether.database import to_json
from tether.errors import RunError
from tether.places import cache_folder
from tether.prompts import PromptSource
from tether.rollouts import sample
from tether.runtime.ranks import here
from tether.scores import score
from tether.streams import uniforms

BANK_FILE = "bank.json"
DECIMALS = 4
"""Of a score in the file: far below the noise of 64 samples."""
COPIES = 4
"""Replies to a prompt in a small bank: they tell what a policy can choose among from what its prompts differ in."""
SMALL = 64
"""Replies of a small bank."""
FEWEST = 16
"""Replies below which a bank tells nothing."""


def bank_size(settings: RunSettings, heldout: int) -> tuple[int, int]:
    """How many prompts a run's bank has, and replies to each; no prompt where it would tell nothing.

    Best-of-n's in the nano world, where they cost seconds. Elsewhere 4 replies to each prompt and no more in all than
    one evaluation has, whose deviations the page pools over prompts (`page/ghost.py:Bank.pooled`).
    """
    wanted = settings.evaluation
    if settings.world == "nano":
        return min(wanted.best_of_prompts, heldout), max(wanted.best_of, default=1)
    replies = min(wanted.prompts, heldout, SMALL)
    return (replies // COPIES if replies >= FEWEST else 0), COPIES


def draw_bank(
    policy: Policy, source: PromptSource, judges: Mapping[str, Reward], settings: SamplingSettings, seed: int
) -> dict[str, object]:
    """Scores, and gold where there is one, of every response of one pass over the source, a prompt a row."""
    copies = source.samples_per_prompt
    found: dict[str, list[Tensor]] = {name: [] for name in ("score", "gold") if name in judges}
    for part in range(math.ceil(len(source.texts) / source.prompts_per_batch)):
        prompts = source.batch(part)
        rollout = sample(policy, prompts, uniforms(seed, "bank", 0, prompts.keys, settings.max_new_tokens), settings)
        for name, rows in found.items():
            rows.append(score(judges[name], rollout).totals.reshape(-1, copies))
    scores = {name: torch.cat(rows) for name, rows in found.items()}
    return bank_of(scores["score"], scores.get("gold"))


def bank_of(
    scores: Float[Tensor, "prompts samples"], gold: Float[Tensor, "prompts samples"] | None
) -> dict[str, object]:
    """What the file holds of these scores."""

    def rounded(rows: Tensor) -> list[list[float]]:
        return [[round(x, DECIMALS) for x in row] for row in rows.double().tolist()]

    known = gold is not None and not bool(gold.isnan().any())
    return {"scores": rounded(scores), "gold": rounded(gold) if gold is not None and known else None}


def keep_bank(
    folder: Path,
    digests: Mapping[str, str],
    policy: Policy,
    source: PromptSource,
    judges: Mapping[str, Reward],
    settings: SamplingSettings,
    seed: int,
) -> Path:
    """Leave the bank in a run's folder: from the cache, or drawn now, while the policy is the reference."""
    told = {
        "digests": dict(digests), "sampling": settings.model_dump(), "seed": seed, "prompts": list(source.texts),
        "copies": source.samples_per_prompt,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]
    cached, target = cache_folder() / "banks" / f"{digest}.json", folder / BANK_FILE
    try:
        if not here().same(cached.is_file()):
            text = to_json(draw_bank(policy, source, judges, settings, seed))
            if not here().is_first:
                return target
            cached.parent.mkdir(parents=True, exist_ok=True)
            aside = cached.with_suffix(".new")
            aside.write_text(text, "utf-8")
            aside.replace(cached)
        if here().is_first:
            target.write_bytes(cached.read_bytes())
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}; free some space") from error
    return target
