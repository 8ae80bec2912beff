"""vLLM's offline engine, `LLM`, for a trainer whose own environment holds vLLM.

The same tokens, rule and weights as over the server's routes (`vllm_server.py` says why weights are reloaded from
safetensors), called as methods: nothing is started but vLLM's own workers, and no socket is opened. Imports vLLM only
when the engine is made. Read next: `vllm_engine.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tether.errors import MissingExtraError, WorkerError
from tether.runtime.vllm_engine import LOGPROBS, PROVED, Answer, Question, Rule

INSTALL = "pip install 'tether[vllm]'"


class VllmProcess:
    """An `Engine` made of vLLM's `LLM`."""

    def __init__(self, model: str, dtype: str, cache_bytes: int, *, eager: bool) -> None:
        """`eager` leaves out compilation and CUDA graphs. Raises MissingExtraError without vLLM, WorkerError where the
        model cannot be opened by it.
        """
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else threads are bound to the trainer's cores
        try:
            import vllm
        except ImportError as fault:
            raise MissingExtraError(f"runtime.vllm.place: process asks for vLLM here ({fault}); {INSTALL}") from fault
        self._sampling, self._version = vllm.SamplingParams, str(vllm.__version__)
        try:
            self._llm: Any = vllm.LLM(
                model=model, dtype=dtype, kv_cache_memory_bytes=cache_bytes, max_model_len=-1, logprobs_mode=LOGPROBS,
                generation_config="vllm", skip_tokenizer_init=True, enforce_eager=eager,
            )  # fmt: skip
        except (ValueError, TypeError, RuntimeError, OSError) as fault:
            raise WorkerError(
                f"vLLM {vllm.__version__} does not open {model}: {fault}; proved with {PROVED}"
            ) from fault

        if not hasattr(self._llm, "update_weight_version"):
            self.close()
            raise WorkerError(f"vLLM {self._version} has no weight versions; wanted {PROVED} or one like it")

    def answer(self, questions: Sequence[Question], rule: Rule) -> list[Answer]:
        """One answer a question, in the questions' order. Raises WorkerError where vLLM fails at them."""
        prompts = [{"prompt_token_ids": list(question.prompt)} for question in questions]
        sampling = [self._sampling(**rule.as_sampling(question.seed)) for question in questions]
        try:
            return [_read(told) for told in self._llm.generate(prompts, sampling, use_tqdm=False)]
        except WorkerError:
            raise
        except Exception as fault:  # an engine that died has a class of vLLM's own
            raise WorkerError(
                f"vLLM {self._version} did not write: {fault or type(fault).__name__}; proved with {PROVED}"
            ) from fault

    def about(self) -> str:
        return f"vLLM {self._version} in the run's first process"

    def load(self, folder: Path, version: str) -> None:
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        except (ValueError, KeyError, RuntimeError, OSError) as fault:
            raise WorkerError(f"vLLM did not take the weights at {folder}: {fault}") from fault
        self._llm.reset_prefix_cache()  # keys and values of the weights before
        self._llm.update_weight_version(version)

    def is_lost(self) -> bool:
        return False  # what has befallen this process is not mended from inside it

    def restart(self, model: Path) -> None:
        raise WorkerError(f"vLLM in this process cannot be started anew from {model}; resume the run")

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _read(told: Any) -> Answer:
    """vLLM's RequestOutput of one response."""
    output = told.outputs[0]
    if output.finish_reason not in ("stop", "length"):
        raise WorkerError(f"vLLM gave up a response: {output.finish_reason}")
    tokens = tuple(output.token_ids)
    logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True))
    versions = tuple(span.version for span in output.weight_versions or ())
    return Answer(tokens, logprobs, output.finish_reason == "stop", versions)
