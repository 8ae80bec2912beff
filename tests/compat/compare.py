"""`make compat`: TRL 0.11.4 and `tether.trl` on the same weights, queries, responses and scores, number by number.

    python tests/compat/compare.py THEIRS.pt OURS.pt            the table; exit code 1 where a number differs
    python tests/compat/compare.py THEIRS.pt OURS.pt --store    and write the goldens that `make test` reads

A number is the same where it differs by at most 1e-5 of its size, or by 1e-6: ten units in the last place of a
log-probability. The size of a tensor is its largest entry. The table gives the largest difference of each case as a
share of what is allowed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from compat.cases import CASES, FIVE_STEPS, MENDED, Case

RELATIVE, ABSOLUTE = 1e-5, 1e-6
SKETCH = 4
"""Sums that a golden keeps of a tensor."""
GOLDENS = Path(__file__).parents[1] / "trl_goldens"


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of what is allowed; NaN equals NaN."""
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.double(), wanted.double()
    both = torch.isnan(got) & torch.isnan(wanted)
    gap = torch.where(both, 0.0, got - wanted).abs()
    if bool(torch.isnan(gap).any()):
        return float("inf")
    size = float(torch.where(both, 0.0, wanted).abs().max()) if wanted.numel() else 0.0
    return float(gap.max()) / (RELATIVE * size + ABSOLUTE) if gap.numel() else 0.0


def differences(case: Case, ours: Any, theirs: Any) -> Iterator[tuple[str, float]]:
    """Every statistic and every weight after each step that both sides have."""
    for step, (mine, wanted) in enumerate(zip(ours["stats"], theirs["stats"], strict=False)):
        for name in wanted:
            yield f"step {step} {name}", distance(mine[name], wanted[name]) if name in mine else float("inf")
    for step, (mine, wanted) in enumerate(zip(ours["weights"], theirs["weights"], strict=False)):
        for name in wanted:
            if not name.endswith(case.noise or ("\0",)):
                yield f"weights after step {step} {name}", distance(mine[name], wanted[name])
    for step, (mine, wanted) in enumerate(zip(ours["beta"], theirs["beta"], strict=False)):
        yield f"step {step} beta", abs(mine / wanted - 1.0) / RELATIVE


def worst(case: Case, ours: Any, theirs: Any) -> tuple[str, float]:
    return max(differences(case, ours, theirs), key=lambda pair: pair[1])


def main(theirs_file: str, ours_file: str, store: bool) -> int:
    theirs, ours = (torch.load(file, weights_only=False) for file in (theirs_file, ours_file))
    failed = 0
    for case in CASES:
        name, gap = worst(case, ours[case.name], theirs[case.name])
        failed += gap > 1.0
        print(f"{case.name:24} {gap:7.2f}  {'ok' if gap <= 1.0 else 'DIFFERS'}   {name}")
        if store:
            sketched = json.dumps(sketch(theirs[case.name], golden_steps(case)))
            (GOLDENS / f"{case.name}.json").write_text(sketched + "\n", "utf-8")
    print("\nmended, so not compared:")
    for case in MENDED:
        there, here = theirs[case.name], ours[case.name]
        told = there if isinstance(there, str) else f"differs, {worst(case, here, there)[1]:.1e} times what is allowed"
        print(f"  {case.name:22} {case.mended}: {told}")
    print(f"\n{len(CASES) - failed} of {len(CASES)} cases agree to {RELATIVE:g}")
    return int(failed > 0)


# ── goldens: small enough to keep ───────────────────────────────────────────────────────────────────────────────────
def digest(tensor: Tensor) -> list[float]:
    """A tensor as its length, its largest entry, and a few sums of it against fixed waves; one number as itself."""
    flat = torch.nan_to_num(tensor.double().flatten(), nan=-12345.0)
    if flat.numel() <= SKETCH:
        return _rounded(flat)
    waves = torch.outer(torch.arange(1.0, SKETCH + 1.0).double(), torch.arange(flat.numel()).double()).mul(0.7).cos()
    sums = waves @ flat / flat.numel() ** 0.5
    return [float(flat.numel()), float(flat.abs().max()), *_rounded(sums)]


def _rounded(numbers: Tensor) -> list[float]:
    """To nine digits, a hundred times finer than what is compared."""
    return [float(f"{number:.9g}") for number in numbers.tolist()]


def sketch(kept: Any, steps: int) -> dict[str, Any]:
    """What the first steps gave, as digests; weights after the first, and where there are five after the last."""
    places = [0] if steps < 5 else [0, steps - 1]
    return {
        "stats": [{name: digest(number) for name, number in stats.items()} for stats in kept["stats"][:steps]],
        "weights": [{name: digest(weight) for name, weight in kept["weights"][place].items()} for place in places],
        "beta": kept["beta"][:steps],
    }


def golden_steps(case: Case) -> int:
    return min(case.steps, 5 if case.name in FIVE_STEPS else 2)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--store"]
    sys.exit(main(*arguments, store="--store" in sys.argv))
