"""Records what the page's lesson shows: real runs, in the exact world and in the nano world, as one small file.

    tether sweep --world nano --beta 0 0.02 0.05 0.1 0.2 0.5 2 --out learn
    python bench/learn.py learn          writes src/tether/page/learn.json

The nano part is read from the sweep's run folders; the exact part is trained here, and its frontier is computed.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from tether.database import to_json
from tether.ladder.bandit import trace
from tether.ladder.exact import prompt_source, settings
from tether.store import RunStore
from tether.trainer import Record, Run, advance
from tether.worlds.exact import ExactWorld, TabularPolicy, frontier, standing

TARGET = Path(__file__).parent.parent / "src" / "tether" / "page" / "learn.json"
COMMAND = "tether sweep --world nano --beta 0 0.02 0.05 0.1 0.2 0.5 2 --out learn && python bench/learn.py learn"
EXACT_BETAS, EXACT_STEPS, EXACT_EVERY = (0.05, 0.1, 0.2, 0.5, 1.0), 160, 4
AT_REST = 20
PROMPTS = 6
DIGITS = 4


def exact(betas: tuple[float, ...] = EXACT_BETAS, steps: int = EXACT_STEPS) -> dict[str, object]:
    """PPO in the world whose optimum is known, and the frontier of all optima."""
    world = ExactWorld.create()
    curve = frontier(world, np.geomspace(0.03, 30.0, 60).tolist())
    points = [{"beta": one.beta, "score": one.score, "kl": one.kl} for one in curve]
    return {"betas": list(betas), "frontier": points, "runs": [_exact_run(world, beta, steps) for beta in betas]}


def _exact_run(world: ExactWorld, beta: float, steps: int) -> dict[str, object]:
    knobs = settings(world, beta, steps, 0)
    policy = TabularPolicy(world)
    run = Run(policy, world.score_text, prompt_source(world, knobs), knobs, _forget)
    told: list[dict[str, float]] = []
    for step in range(steps + 1):
        if step % EXACT_EVERY == 0:
            told.append({"steps": step} | asdict(standing(world, policy.logits.detach(), beta)))
        if step < steps:
            advance(run)
    return {"beta": beta} | {name: [one[name] for one in told] for name in ("steps", "score", "kl", "regret")}


def _forget(record: Record) -> None:
    del record


def nano(folder: Path) -> dict[str, object]:
    """The sweep's runs: where each came to rest, its curves, and the same prompts answered at each β."""
    runs = {float(path.name.removeprefix("beta-")): path for path in folder.glob("runs/beta-*")}
    stores = {beta: RunStore.open(runs[beta]) for beta in sorted(runs)}
    bank = runs[min(runs)] / "bank.json"
    import json

    return {
        "points": [_point(beta, store) for beta, store in stores.items()],
        "curves": [_curves(beta, store) for beta, store in stores.items()],
        "texts": _texts(stores),
        "bank": json.loads(bank.read_text("utf-8")) if bank.is_file() else None,
    }


def _point(beta: float, store: RunStore) -> dict[str, float]:
    names = {"score": "score/mean", "kl": "kl/mean", "gold": "score/gold", "holdout": "score/holdout",
             "distinct_2": "distinct_2", "length": "length/mean"}  # fmt: skip
    last = {key: store.curve(name).values[-AT_REST:] for key, name in names.items()}
    told = {key: float(np.nanmean(values)) for key, values in last.items() if len(values)}
    errors = {f"{key}_se": float(np.nanstd(values) / len(values) ** 0.5) for key, values in last.items() if len(values)}
    wins = store.curve("eval/win_rate").values
    return {"beta": beta} | told | errors | ({"win_rate": float(wins[-1])} if len(wins) else {})


def _curves(beta: float, store: RunStore) -> dict[str, object]:
    names = {"score": "score/mean", "kl": "kl/mean", "gold": "score/gold", "distinct_2": "distinct_2"}
    steps = store.curve("score/mean").steps.tolist()
    return {"beta": beta, "steps": steps} | {key: store.curve(name).values.tolist() for key, name in names.items()}


def _texts(stores: dict[float, RunStore]) -> list[dict[str, object]]:
    """Held-out prompts with the reference's reply and each string's."""
    told: dict[int, dict[str, object]] = {}
    for beta, store in stores.items():
        with_probes = sorted({sample.step for sample in store.samples(split="probe")})
        first = {sample.row: sample for sample in store.samples(with_probes[0], "probe")}
        for sample in store.samples(with_probes[-1], "probe")[:PROMPTS]:
            before = first[sample.row]
            entry = told.setdefault(sample.row, {
                "prompt": sample.prompt, "replies": [],
                "reference": {"response": before.response, "score": before.score, "gold": before.columns.get("gold")},
            })  # fmt: skip
            reply = {"beta": beta, "response": sample.response, "score": sample.score, "kl": sample.kl,
                     "gold": sample.columns.get("gold")}  # fmt: skip
            entry["replies"].append(reply)  # type: ignore[attr-defined]
    return list(told.values())


def rounded(value: object) -> object:
    """Four digits are what a picture shows."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def main() -> None:
    """Read the sweep, train the exact world, write the file."""
    torch.set_num_threads(1)
    steps = trace()
    told = {"exact": exact(), "nano": nano(Path(sys.argv[1])), "bandit": {"rows": [asdict(one) for one in steps]},
            "command": COMMAND}  # fmt: skip
    TARGET.write_text(to_json(rounded(told)), "utf-8")
    print(f"wrote {TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
