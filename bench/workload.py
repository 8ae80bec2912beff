"""What both sides of the benchmark share: the job, the tokenizer, the line protocol with the driver, the clock.

Runs in tether's environment and in the peer's, so it imports nothing of either. A worker is a process of its own that
makes one update each time the driver says so:

    driver → worker   "go"  (a line on stdin; the end of stdin ends the worker)
    worker → driver   one JSON object a line on the worker's first stdout: {"ready": …}, then one `Measured` an update
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PHASES = ("generate", "reference", "score", "update")
PACKAGES = ("torch", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Job:
    """One worker's task; equal for all but `system` and `mode`."""

    system: str
    """A name of the results' table: `full`, `lora`, `top`, `trl`, …"""
    model: str
    """Folder of the causal LM that policy, reference, value and reward model start from."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids, all of one length."""
    response: int
    """Tokens of each response; no token ends one early."""
    epochs: int
    minibatches: int
    vocabulary: int
    """Of the model."""
    top_layers: int
    lora_rank: int
    device: str
    threads: int
    seed: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @staticmethod
    def load(path: str) -> Job:
        fields = json.loads(Path(path).read_text("utf-8"))
        return Job(**fields | {"prompts": tuple(map(tuple, fields["prompts"]))})


@dataclass(frozen=True)
class Measured:
    """One update of one system."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the process; less than `seconds` times threads where it had to wait for a core."""
    split: dict[str, float]
    """Seconds by phase; what is left of `seconds` is between the phases."""
    tokens: int
    """Response tokens written."""
    peak_bytes: int
    """Peak resident memory of the process since it began."""
    device_peak_bytes: int
    """Peak memory of the accelerator's tensors; 0 on a CPU."""


class Channel:
    """The worker's end of the line to the driver. Whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, *packages: str) -> None:
        self._send({"ready": {name: version(name) for name in (*PACKAGES, *packages)}})

    def wait(self) -> bool:
        """Until the next update is asked for; False where there is none to come."""
        return sys.stdin.readline().strip() == "go"

    def report(self, measured: Measured) -> None:
        self._send(asdict(measured))

    def _send(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._out, flush=True)


class Clock:
    """Adds up the seconds of each phase; on an accelerator it waits for the work to be done."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self.split: dict[str, float] = {}
        self._started = self._cpu_started = 0.0

    def start(self) -> None:
        """An update begins."""
        self.split.clear()
        self._started, self._cpu_started = self.now(), time.process_time()

    def measured(self, tokens: int) -> Measured:
        """The update that ends now."""
        seconds, cpu_seconds = self.now() - self._started, time.process_time() - self._cpu_started
        return Measured(seconds, cpu_seconds, dict(self.split), tokens, *self._peaks())

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self.now()
        try:
            yield
        finally:
            self.split[name] = self.split.get(name, 0.0) + self.now() - started

    def timed(self, call: Callable[..., Any], phase_of: Callable[..., str | None]) -> Callable[..., Any]:
        """The same callable; its time goes to the phase that `phase_of` names for its arguments, if any."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            name = phase_of(*args, **kwargs)
            if name is None:
                return call(*args, **kwargs)
            with self.phase(name):
                return call(*args, **kwargs)

        return measured

    def _peaks(self) -> tuple[int, int]:
        """Peak resident bytes of this process, and of the accelerator's tensors."""
        unit = 1 if platform.system() == "Darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return resident, torch.cuda.max_memory_allocated() if self._cuda else 0


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose text is its ids (`w17 w4 …`), so that a text is read back as exactly the tokens it came from,
    also where two texts were joined without a space.

    The last id stands for EOS and padding: both sides want one, neither stops at it.
    """
    vocabulary = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"w\d+"), "removed", invert=True)
    last = f"w{size - 1}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=last, pad_token=last, padding_side="left")


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"w{index}" for index in ids)


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Uniform token ids, the tokenizer's last left out: it is padding to the peer."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, vocabulary - 1, (count, length), generator=draw)
    return tuple(map(tuple, rows.tolist()))


SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_theta=1e5,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


def write_random_model(config: LlamaConfig, folder: Path, seed: int) -> Path:
    """A causal LM of this shape with random weights, in the ordinary layout."""
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
