"""What a writer asks of vLLM, whichever way it runs: tokens in, tokens out, and weights from a folder.

    Engine.answer(questions, rule) → one Answer a question: token ids, their log-probabilities, versions of the weights
    Engine.load(folder, version)     weights from safetensors; from then on answers carry this version

The rule is pure sampling: softmax(z/T) itself, cut by nothing, ended by the policy's own stop tokens alone. Text never
passes, so nothing is tokenised twice. Knows no policy. Read next: `vllm_server.py`, `vllm_process.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

PROVED = "0.32.0"
"""The vLLM that `make vllm` proves all this with."""
LOGPROBS = "processed_logprobs"
"""vLLM's name for the log-probabilities after temperature: those that tokens are drawn with."""


@dataclass(frozen=True)
class Question:
    """One response wanted."""

    prompt: tuple[int, ...]
    seed: int
    """Of this response's own random stream."""


@dataclass(frozen=True)
class Rule:
    """How all responses of a batch are drawn."""

    max_tokens: int
    temperature: float
    """0 is greedy, which only proofs ask for."""
    stops: tuple[int, ...]
    """Tokens that end a response and belong to it."""

    def as_sampling(self, seed: int) -> dict[str, object]:
        """The arguments of vLLM's SamplingParams; whatever could bend the distribution is said to be off."""
        return {
            "n": 1, "seed": seed, "temperature": self.temperature, "max_tokens": self.max_tokens, "min_tokens": 0,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "repetition_penalty": 1.0, "stop_token_ids": list(self.stops), "ignore_eos": True, "logprobs": 0,
            "detokenize": False,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One response."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log q of each token, nats, under the distribution that it was drawn from."""
    finished: bool
    """True where a stop token ended it."""
    versions: tuple[str, ...]
    """The weights that made it, in order; several where they were exchanged on the way."""


@runtime_checkable
class Engine(Protocol):
    """A vLLM that holds the policy's architecture."""

    def answer(self, questions: Sequence[Question], rule: Rule) -> list[Answer]:
        """One answer a question, in the questions' order. Raises WorkerError."""

    def load(self, folder: Path, version: str) -> None:
        """Exchange weights for those of the folder's safetensors files; others stay. Raises WorkerError."""

    def about(self) -> str:
        """Its version and where it is, for people."""

    def is_lost(self) -> bool:
        """Whether it has died, and can be started anew."""

    def restart(self, model: Path) -> None:
        """Start it anew from the checkpoint in this folder. Raises WorkerError where it does not come up."""

    def close(self) -> None:
        """End what was started for this engine."""
