"""Memory of a run: an estimate by role before it starts, and what to turn down when it does not fit.

    plan(settings, shape) → Plan          bytes of policy, reference, value, reward model, optimiser, activations, cache
    memory_errors_explained(settings)     out-of-memory errors of any kind as one, which names the knob to halve

The estimate counts tensors by the model's shape alone (nothing is loaded). Read next: `doctor.py`, which prints it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from transformers import PreTrainedConfig

from tether.config import TOP_LAYERS, RunSettings
from tether.errors import OutOfMemory
from tether.loading import choose_dtype, weightless

FLOAT, HALF = 4, 2
"""Bytes of one number."""
ADAM_NUMBERS = 3
"""float32 numbers a trained weight: two moments and the gradient; half-precision weights have a float32 master too."""
LAYER_NUMBERS = 10
"""Numbers of the hidden width that a decoder layer keeps for a token beside those of the MLP: norms, q, k, v, sums."""
HEAD_PIECES = 3
"""Tensors of tokens × vocabulary that are alive at once in the head, for one of its chunks."""
HEAD_TOKENS = 512
"""Tokens of a chunk of the head."""
LOGITS_NUMBERS = 2


@dataclass(frozen=True)
class Shape:
    """What the estimate must know of a model."""

    parameters: int
    layer_parameters: int
    """Of one decoder layer."""
    layers: int
    width: int
    """Of a hidden state."""
    inner: int
    """Of the MLP."""
    heads: int
    cache_width: int
    """Key and value numbers a token and layer."""
    vocab: int

    @staticmethod
    def of(config: PreTrainedConfig) -> Shape:
        """The shape of a causal LM, from its configuration alone; one without attention has neither heads nor a cache.

        Raises ModelError where it is another kind of model.
        """
        text, model = config.get_text_config(), weightless(config)
        total = int(model.num_parameters())
        heads = int(getattr(text, "num_attention_heads", None) or 0)
        width = int(text.hidden_size)
        head_width = int(getattr(text, "head_dim", None) or width // heads) if heads else 0
        key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        embeddings = sum(p.numel() for p in {*model.get_input_embeddings().parameters()})
        output = model.get_output_embeddings().weight
        tied = output is model.get_input_embeddings().weight
        layers = int(text.num_hidden_layers)
        rest = total - embeddings - (0 if tied else output.numel())
        inner = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width)
        return Shape(
            total, rest // layers, layers, width, inner, heads, 2 * key_heads * head_width, int(output.shape[0])
        )


@dataclass(frozen=True)
class Plan:
    """Bytes by role."""

    roles: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.roles.values())


def plan(settings: RunSettings, shape: Shape, *, half: bool, prompt_tokens: int = 64, reward: int = 0) -> Plan:
    """Peak bytes of a run by role.

    `half`: matrices in bfloat16. `prompt_tokens`: of a typical prompt. `reward`: parameters of reward models in memory.
    """
    size = HALF if half else FLOAT
    mode, knobs = settings.model.mode, settings.ppo
    top = min(settings.model.trained_layers(shape.layers), shape.layers)
    trained = {
        "full": shape.parameters,
        "top": top * shape.layer_parameters,
        "lora": _lora_parameters(settings, shape),
    }[mode]
    copied = {"full": shape.parameters, "top": trained, "lora": 0}[mode]
    row = prompt_tokens + knobs.sampling.max_new_tokens
    roles = {
        "policy": shape.parameters * size + (trained * size if mode == "lora" else 0),
        "reference": copied * size,
        "value": shape.width * FLOAT * (1 + ADAM_NUMBERS),
        "reward models": reward * size,
        "optimiser": trained * FLOAT * (ADAM_NUMBERS + (1 if half else 0)),
        "activations": _activations(settings, shape, top if mode == "top" else shape.layers, row, size),
        "KV cache": knobs.batch_size * row * shape.layers * shape.cache_width * size,
    }
    return Plan({name: float(number) for name, number in roles.items()})


def halves(settings: RunSettings, parameters: int) -> bool:
    """Whether the run's matrices are bfloat16 on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose_dtype(settings.model.dtype, parameters, device) == torch.bfloat16


def _lora_parameters(settings: RunSettings, shape: Shape) -> int:
    """Both halves of an adapter on the seven or so linear maps of a layer."""
    ends = 4 * 2 * shape.width + 3 * (shape.width + shape.inner)
    return settings.model.lora_rank * ends * shape.layers


def _activations(settings: RunSettings, shape: Shape, layers: int, row: int, size: int) -> float:
    """What is kept for the way back of one micro-batch, and the head's pieces."""
    knobs = settings.ppo
    minibatch = -(-knobs.batch_size // knobs.update.minibatches) * row
    tokens = max(min(knobs.update.tokens_per_micro_batch, minibatch), row)
    scores = shape.heads * row * LOGITS_NUMBERS  # attention weights of each token, as plain products keep them
    layer = tokens * size * (LAYER_NUMBERS * shape.width + 3 * shape.inner + scores)
    kept = layer + tokens * size * shape.width * layers if settings.model.gradient_checkpointing else layer * layers
    states = knobs.batch_size * row * shape.width * size if settings.model.mode == "top" else 0
    return kept + states + HEAD_PIECES * min(tokens, HEAD_TOKENS) * shape.vocab * FLOAT


# ── when it does not fit ────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def memory_errors_explained(settings: RunSettings) -> Iterator[None]:
    """Turn whatever says that memory is out into one error that names the knob to halve."""
    try:
        yield
    except Exception as error:
        if not is_memory_error(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"{_first_line(error)} {remedy(settings, place_of(error))}") from error


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory is out: torch's own, Python's, the system's, or its allocator's on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


PLACES = {
    "update.py": "update",
    "decode.py": "generation",
    "rollouts.py": "rollout",
    "scores.py": "reward",
    "models.py": "loading",
    "loading.py": "loading",
    "optimiser.py": "optimiser",
}


def place_of(error: BaseException) -> str:
    """In which part of a run the error arose: the outermost room on the way to it."""
    frames: TracebackType | None = error.__traceback__
    found = "run"
    while frames is not None:
        name = frames.tb_frame.f_code.co_filename.rpartition("/")[2]
        if found == "run" and name in PLACES:
            found = PLACES[name]
        frames = frames.tb_next
    return found


def remedy(settings: RunSettings, place: str) -> str:
    """The one knob to turn, for the part of the run where memory was out."""
    knobs, model = settings.ppo, settings.model
    if place in ("loading", "optimiser"):
        smaller = {"full": "model.mode: top", "top": _half("model.top_layers", model.top_layers or TOP_LAYERS)}
        return f"Memory ran out while the models were loaded: set {smaller.get(model.mode, 'model.dtype: bfloat16')}"
    if place in ("generation", "rollout", "reward"):
        return f"Memory ran out in the {place}: halve the batch, {_half('ppo.batch_size', knobs.batch_size)}"
    if knobs.update.tokens_per_micro_batch > knobs.sampling.max_new_tokens:
        line = _half("ppo.update.tokens_per_micro_batch", knobs.update.tokens_per_micro_batch)
        return f"Memory ran out in the update: halve the micro-batch, {line}; the results stay the same"
    if not model.gradient_checkpointing:
        return "Memory ran out in the update: set model.gradient_checkpointing: true; the results stay the same"
    line = _half("ppo.sampling.max_new_tokens", knobs.sampling.max_new_tokens)
    return f"Memory ran out in the update: halve the responses, {line}"


def _half(path: str, value: int) -> str:
    return f"{path}: {max(1, value // 2)} (now {value})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{text[0].rstrip('.')}." if text else "out of memory."
