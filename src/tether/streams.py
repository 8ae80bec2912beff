"""Random streams named by what they are for, so that looking, pausing or resuming never changes a run.

A stream is a pure function of (seed, purpose, indices): counter-based Philox, keyed by a hash of the name. No global
random state is read or written, and no order of calls matters. Salmon et al. 2011, «Parallel random numbers».
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The generator of this name; the same name gives the same numbers on every machine.

    >>> bool(stream(0, "order", 3).random() == stream(0, "order", 3).random())
    True
    """
    name = "/".join([str(seed), purpose, *map(str, indices)])
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniforms(seed: int, purpose: str, update: int, keys: Sequence[int], length: int) -> Float[Tensor, "batch length"]:
    """One row of uniform numbers in [0, 1) for each key ≥ 0, independent of which other keys stand in the batch.

    The key is a word of Philox's counter, so that rows of different keys never meet.
    """
    source = stream(seed, purpose, update)
    fresh = source.bit_generator.state
    rows = np.empty((len(keys), length))
    for row, key in enumerate(keys):
        fresh["state"]["counter"] = np.array([0, 0, key, 0], dtype=np.uint64)
        source.bit_generator.state = fresh
        rows[row] = source.random(length)
    return torch.from_numpy(rows)


def permutation(seed: int, purpose: str, size: int, *indices: int) -> Int[Tensor, "size"]:
    """A random order of 0 … size − 1."""
    return torch.from_numpy(stream(seed, purpose, *indices).permutation(size))
