"""`tether.trl` gives the numbers of TRL 0.11.4, as stored in `trl_goldens/`.

The goldens are what TRL 0.11.4 gave with transformers 4.45.2 and torch 2.13, on weights, queries, responses, scores and
masks that `compat/cases.py` draws. `make compat` runs the original anew, and `compare.py --store` rewrites them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tether.trl
from compat.cases import CASES, Case
from compat.compare import differences, golden_steps, sketch
from compat.side import run

GOLDENS = Path(__file__).parent / "trl_goldens"


def tensors(golden: dict[str, Any]) -> dict[str, Any]:
    """Digests as tensors."""
    return {
        part: [{name: torch.tensor(digest) for name, digest in step.items()} for step in golden[part]]
        for part in ("stats", "weights")
    } | {"beta": golden["beta"]}


def disagreements(case: Case) -> Iterator[str]:
    golden = json.loads((GOLDENS / f"{case.name}.json").read_text("utf-8"))
    steps = golden_steps(case)
    ours = json.loads(json.dumps(sketch(run(tether.trl, case, steps), steps)))
    for name, share in differences(case, tensors(ours), tensors(golden)):
        if share > 1.0:
            yield f"{name}: {share:.1f} times what is allowed"


@pytest.mark.filterwarnings("ignore:no dataset was given")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::tether.trl.TrainingWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_number_of_a_run_is_trl_s(case: Case) -> None:
    assert list(disagreements(case)) == []
