"""Keeping freed memory: what the process asks of glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import torch
from tether.runtime.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc, and this is another C library")
def test_kept_memory_is_not_faulted_in_again() -> None:
    def faults(word: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, check=True).stdout)

    pages = 16_000_000 * 4 // 4096
    assert faults("give-back") - faults("keep") > 10 * pages  # 20 tensors: all but the first find their pages there
