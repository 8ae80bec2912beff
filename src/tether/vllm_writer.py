"""Responses by vLLM: the policy's `Writer` on an engine of its own.

    weights moved? ─▶ a folder of safetensors ─▶ engine.load(version) ─▶ questions ─▶ answers ─▶ Generation

Before a batch is written the engine gets whatever training has changed since it was last served: at first the whole
policy, so that an engine which started from anything of the same architecture is the policy, later only the modules
with a trained weight (whole modules: an engine that keeps q, k and v as one matrix wants all three). Every such state
of the weights has a version, the engine says of each response which version made it, and a response by a version that
is unknown or older than the declared bound is refused. A response's random stream is seeded by the row's own uniform
number, so it belongs to its prompt, sample and update as with the policy's own sampler. An engine of the run's own that
has died is started anew, and what it was asked is asked again.

The log-probabilities that come along are the engine's own, of the distribution that it drew from; the trainer always
recomputes its own beside them. Read next: `runtime/vllm_engine.py`, `writers.py`.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tether.batch import Generation, Origin, Prompts
from tether.errors import NonFiniteError, WorkerError
from tether.models import LanguagePolicy
from tether.runtime.vllm_engine import Answer, Engine, Question, Rule
from tether.weights import all_weights, changed_weights, tied_names, weights_version

SEED_BITS = 53
"""Of a uniform number in float64; a seed of vLLM is a whole number below 2^63."""
LOWEST = -9000.0
"""vLLM writes −9999 where a log-probability is −∞ or NaN."""
RESTARTS = 2
"""Times that one batch may see its engine die, once where it has never answered: that is a model it cannot run."""


@dataclass(frozen=True)
class Writing:
    """Responses on their way."""

    writer: VllmWriter
    prompts: Prompts
    uniforms: Float[Tensor, "batch response"]
    rule: Rule
    answers: Future[list[Answer]]

    def take(self) -> Generation:
        """The responses; waits for them. Raises WorkerError where the engine fails or its weights are too old."""
        return self.writer.take(self)


class VllmWriter:
    """The policy's weights in another engine; a `Writer`, and one that can begin and be asked later."""

    def __init__(
        self,
        policy: LanguagePolicy,
        open_engine: Callable[[Path], Engine],
        folder: Path,
        *,
        lag: int = 0,
        bound: int = 0,
        first: int = 0,
    ) -> None:
        """`open_engine` is given a folder with the policy as it stands, as an ordinary checkpoint.

        `folder`: where weights are laid down for the engine, in a folder of this writer's own.
        `lag`: changes of the weights after which the engine need not have new ones yet; `bound`: those that may lie
        between the weights that wrote and the policy when the responses are used; `first`: the version at the start.
        """
        self._policy, self._lag, self._bound = policy, lag, bound
        self._folder = folder / f"tether-{secrets.token_hex(8)}"
        self._folder.mkdir(parents=True, mode=0o700)
        self._run = secrets.token_hex(4)
        self._moved, self._version = weights_version(policy), first
        self._sent: int | None = None
        self._laid: tuple[Path, int] | None = None
        """A folder that the engine has not read yet, and the version in it."""
        self._has_answered = False
        self._tied = tied_names(policy)
        self._trained = {_module(name) for name, _ in changed_weights(policy)}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")
        try:
            self._engine = open_engine(self._lay_down(whole=True))
        except BaseException:
            self._remove()
            raise

    def about(self) -> str:
        """Who writes, for people."""
        return self._engine.about()

    @property
    def version(self) -> int:
        """Of the policy as it stands: grows by one whenever it is found moved."""
        moved = weights_version(self._policy)
        if moved != self._moved:
            self._moved, self._version = moved, self._version + 1
        return self._version

    def write(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """One response a prompt. Raises WorkerError where the engine fails or its weights are too old."""
        return self.begin(prompts, uniforms, temperature).take()

    def begin(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Writing:
        """Have one response a prompt written by the weights as they stand, or lag, and do not wait."""
        if self._sent is None or self.version - self._sent > self._lag:
            self.catch_up()
        rule = Rule(uniforms.shape[1], temperature, tuple(sorted(self._policy.stops)))
        return Writing(self, prompts, uniforms, rule, self._ask(prompts, uniforms, rule))

    def take(self, writing: Writing) -> Generation:
        """What was begun. Where the engine died over it, it is started anew with the weights as they stand now."""
        answers, left = writing.answers, RESTARTS if self._has_answered else 1
        while True:
            try:
                generation = self._lay_out(answers.result(), writing)
                self._has_answered = True
                return generation
            except WorkerError:
                if not left or not self._engine.is_lost():
                    raise
                left -= 1
                self._start_anew()
                self.catch_up()
                answers = self._ask(writing.prompts, writing.uniforms, writing.rule)

    def catch_up(self) -> None:
        """Give the engine the policy's weights as they stand, where it has others; a dead one is started anew."""
        try:
            self._send()
        except WorkerError:
            if not self._engine.is_lost():
                raise
            self._start_anew()
            self._send()

    def _send(self) -> None:
        version = self.version
        if version == self._sent:
            return
        laid = self._laid if self._laid is not None and self._laid[1] == version else None
        folder = self._lay_down(whole=self._sent is None) if laid is None else laid[0]
        self._engine.load(folder, f"{self._run}-{version}")
        self._sent = version
        self._clear()  # a run that is killed shall not leave a model behind in shared memory

    def _start_anew(self) -> None:
        self._engine.restart(self._lay_down(whole=True))
        self._sent = None

    def close(self) -> None:
        """End the engine, where it is the run's own, and remove what was laid down."""
        self._engine.close()
        self._remove()

    def _ask(self, prompts: Prompts, uniforms: Tensor, rule: Rule) -> Future[list[Answer]]:
        return self._thread.submit(self._engine.answer, questions_of(prompts, uniforms), rule)

    def _lay_down(self, *, whole: bool) -> Path:
        """A new folder with the weights as they stand, in place of the one before."""
        weights = {
            name: tensor.contiguous().cpu()
            for name, tensor in all_weights(self._policy)
            if whole or _module(name) in self._trained
        }
        weights |= {other: weights[name].clone() for other, name in self._tied.items() if name in weights}
        self._clear()
        folder = self._folder / secrets.token_hex(4)
        self._policy.mode.model.save_pretrained(folder, state_dict=weights)
        if self._tied:
            _untie(folder / "config.json")
        self._laid = folder, self.version
        return folder

    def _clear(self) -> None:
        if self._laid is not None:
            shutil.rmtree(self._laid[0])
        self._laid = None

    def _remove(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lay_out(self, answers: Sequence[Answer], writing: Writing) -> Generation:
        self._require_finite(answers)
        version = min(self._version_of(answer) for answer in answers)
        origin = Origin("vllm", self.version - version, version)
        if origin.staleness > self._bound:
            raise WorkerError(
                f"responses were written by weights of version {version} and the policy's is {self.version}: "
                f"{origin.staleness} behind, where runtime.staleness allows {self._bound}"
            )
        return lay_out(answers, writing.uniforms.shape, origin, writing.prompts.ids.device)

    def _version_of(self, answer: Answer) -> int:
        """The oldest weights that had a part in it. Raises WorkerError where they are not this run's."""
        runs, places = zip(*[name.rpartition("-")[::2] for name in answer.versions] or [("", "")], strict=True)
        if set(runs) != {self._run}:
            raise WorkerError(
                f"a response was written by weights named {', '.join(answer.versions) or 'nothing'}; wanted those of "
                f"this run, {self._run}-{self._sent}: the engine was started anew, or another run sends it weights"
            )
        return min(map(int, places))

    def _require_finite(self, answers: Sequence[Answer]) -> None:
        """Raise where a token or a log-probability cannot be the policy's."""
        if not all(logprob > LOWEST for answer in answers for logprob in answer.logprobs):
            raise NonFiniteError("vLLM's log-probabilities are not finite; the policy has diverged: go back to an "
                                 "earlier checkpoint with a lower learning rate")  # fmt: skip
        highest = max(max(answer.tokens, default=0) for answer in answers)
        if highest >= self._policy.vocab:
            raise WorkerError(f"vLLM wrote token {highest} and the policy has {self._policy.vocab}: another model")


def questions_of(prompts: Prompts, uniforms: Float[Tensor, "batch response"]) -> list[Question]:
    """Each row's real tokens, and a seed that is a function of the row's uniforms alone: ⌊u₀·2⁵³⌋."""
    rows = [row[real].tolist() for row, real in zip(prompts.ids, prompts.mask, strict=True)]
    return [
        Question(tuple(row), int(math.ldexp(float(first), SEED_BITS)))
        for row, first in zip(rows, uniforms[:, 0].double(), strict=True)
    ]


def lay_out(answers: Sequence[Answer], shape: tuple[int, ...], origin: Origin, device: torch.device) -> Generation:
    """Answers as right-padded rows of this shape. Raises WorkerError where one is empty or too long."""
    tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    for row, answer in enumerate(answers):
        length = len(answer.tokens)
        if not 0 < length <= shape[1]:
            raise WorkerError(f"a response of vLLM has {length} tokens; wanted 1 to {shape[1]}")
        tokens[row, :length] = torch.tensor(answer.tokens)
        logprobs[row, :length] = torch.tensor(answer.logprobs)
        mask[row, :length] = True
    finished = torch.tensor([answer.finished for answer in answers])
    return Generation(tokens.to(device), mask.to(device), logprobs.to(device), finished.to(device), origin)


def _untie(file: Path) -> None:
    """Say that head and embeddings are two weights.

    vLLM's CPU build packs a tied head when it starts, and a reload of the embeddings leaves the packed copy as it was.
    """
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | {"tie_word_embeddings": False}), "utf-8")


def _module(name: str) -> str:
    """What a weight must be sent along with: in a numbered layer all of its block, `model.layers.3.self_attn`, whose
    matrices may be one in an engine; elsewhere its own layer, `model.embed_tokens`.
    """
    layer, _, _ = name.rpartition(".")
    block, _, _ = layer.rpartition(".")
    return block if any(part.isdigit() for part in block.split(".")) else layer
