"""What holds in every test run: shapes and types are checked, one thread a process, the same examples every time.

Helpers beside the tests, importable by name from any of them: `tolerances`, `ragged`, `brute_force`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping

sys.path.insert(0, str(Path(__file__).parent))
jaxtyping.install_import_hook("tether", "typecheck.checked")  # before tether is first imported

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

torch.set_num_threads(1)  # each worker process of the suite has one core

_common = {"deadline": None, "derandomize": True, "database": None}
settings.register_profile("suite", max_examples=30, **_common)
settings.register_profile("search", max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
# A planted error needs to be seen, not explained: no shrinking.
settings.register_profile("mutation", max_examples=15, phases=[Phase.explicit, Phase.generate], **_common)
settings.load_profile(os.environ.get("TETHER_HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the annotations' run-time check off, to see what a user sees: the functions' own complaints."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
