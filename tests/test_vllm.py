"""The real vLLM writes: `make vllm`. Its greedy replies against transformers' own, run by run and kill by kill.

The tests named `inside` run in vLLM's own environment, with its offline engine in the trainer's process; the others in
tether's, with vLLM's server in an environment of its own (TETHER_VLLM_PYTHON).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tether.batch import Prompts, Sequences
from tether.config import RunSettings
from tether.models import LanguagePolicy, load_policy
from tether.runtime.vllm_engine import Rule
from tether.streams import uniforms
from tether.vllm_run import vllm_writing
from tether.vllm_writer import VllmWriter, questions_of
from tiny_models import EOS, VOCAB, build_tokenizer, prompts_of

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
PYTHON = os.environ.get("TETHER_VLLM_PYTHON")
WIDTH, ROWS, TEMPERATURE = 16, 8, 0.7
outside = pytest.mark.skipif(PYTHON is None, reason="TETHER_VLLM_PYTHON names no interpreter with vLLM")
inside = pytest.mark.skipif(find_spec("vllm") is None, reason="this environment has no vLLM")
FLOAT32_GAP = 1e-3
"""Nats, rms; a hundred times what is measured, a tenth of what one small update does."""


def policy_of(mode: str) -> LanguagePolicy:
    """A Llama of random weights with heads of 32, the least that vLLM's CPU attention takes."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=512, bos_token_id=1, eos_token_id=EOS, tie_word_embeddings=True,
        initializer_range=0.2, **sizes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return load_policy(model, build_tokenizer(), mode=mode, dtype="float32", top_layers=1, lora_rank=4)


def settings_of(**vllm: object) -> RunSettings:
    return RunSettings.model_validate({"world": "nano", "runtime": {"writer": "vllm", "vllm": vllm}})


def prompts() -> Prompts:
    """Short ones, and one that fills blocks of vLLM's prefix cache."""
    return prompts_of(*[[5 + row, 7, 11 + 2 * row][: 1 + row % 3] for row in range(ROWS - 1)], list(range(3, 90)) * 4)


@torch.no_grad()
def greedy(policy: LanguagePolicy, row: list[int]) -> tuple[int, ...]:
    """The likeliest token each time, by the library's own forward pass on the whole text."""
    said: list[int] = []
    while len(said) < WIDTH and not (said and said[-1] in policy.stops):
        logits = policy.mode.model(input_ids=torch.tensor([[*row, *said]]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
    return tuple(said)


def stir(policy: LanguagePolicy, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable()["policy"]:
            weight += 0.1 * float(weight.std() or 0.05) * torch.randn(weight.shape, generator=draw)


def assert_it_writes_as_the_policy(policy: LanguagePolicy, writer: VllmWriter, update: int) -> None:
    asked = prompts()
    draws = uniforms(0, "vllm", update, asked.keys, WIDTH)
    writer.catch_up()
    answers = writer._engine.answer(questions_of(asked, draws), Rule(WIDTH, 0.0, tuple(sorted(policy.stops))))
    rows = [row[real].tolist() for row, real in zip(asked.ids, asked.mask, strict=True)]
    assert [answer.tokens for answer in answers] == [greedy(policy, row) for row in rows]
    written = writer.write(asked, draws, TEMPERATURE).trimmed()
    assert (written.origin.version, written.origin.staleness) == (update, 0)
    own = policy.evaluate(policy.prepare(Sequences.join(asked, written, policy.pad)), TEMPERATURE).logprobs.detach()
    gap = (written.sampler_logprobs - own)[written.response_mask]
    assert float(gap.double().pow(2).mean().sqrt()) < FLOAT32_GAP


@pytest.fixture(scope="module", params=["full", "lora"])
def policy_and_writer(request: pytest.FixtureRequest) -> Iterator[tuple[LanguagePolicy, VllmWriter]]:
    """In `full` the embeddings train, which are the head too."""
    policy = policy_of(request.param)
    with vllm_writing(settings_of(python=PYTHON, cache_gib=0.5, start_seconds=1800), policy) as writer:
        assert isinstance(writer, VllmWriter)
        yield policy, writer


@outside
def test_after_every_exchange_vllm_replies_as_the_policy(policy_and_writer: tuple[LanguagePolicy, VllmWriter]) -> None:
    policy, writer = policy_and_writer
    for _ in range(4):
        assert_it_writes_as_the_policy(policy, writer, writer.version)
        stir(policy, writer.version)


@outside
def test_equal_uniforms_give_equal_responses_and_others_give_others(
    policy_and_writer: tuple[LanguagePolicy, VllmWriter],
) -> None:
    _, writer = policy_and_writer
    asked = prompts()
    draws = uniforms(0, "vllm", 50, asked.keys, WIDTH)
    first = writer.write(asked, draws, 1.0)
    assert torch.equal(first.responses, writer.write(asked, draws, 1.0).responses)
    few = writer.write(asked.rows(slice(2, 5)), draws[2:5], 1.0)
    assert torch.equal(first.responses[2:5], few.responses)
    assert not torch.equal(first.responses, writer.write(asked, draws.flip(0), 1.0).responses)


@outside
@pytest.mark.parametrize("whole", [True, False], ids=["server", "engine"])
def test_a_vllm_that_was_killed_is_started_anew_with_the_policys_weights(
    policy_and_writer: tuple[LanguagePolicy, VllmWriter], whole: bool
) -> None:
    policy, writer = policy_and_writer
    stir(policy, 9)
    server = writer._engine._child._process.pid
    for victim in [server] if whole else children_of(server):
        os.kill(victim, signal.SIGKILL)
    asked = prompts()
    written = writer.write(asked, uniforms(0, "vllm", 60, asked.keys, WIDTH), 1.0)
    assert written.origin.staleness == 0
    assert_it_writes_as_the_policy(policy, writer, writer.version)


def children_of(pid: int) -> list[int]:
    """Processes whose parent this is; vLLM starts its engine from one thread or another."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@inside
@pytest.mark.parametrize("mode", ["full", "top"])
def test_inside_the_trainers_process_vllm_replies_as_the_policy(mode: str) -> None:
    policy = policy_of(mode)
    with vllm_writing(settings_of(place="process", cache_gib=0.5), policy) as writer:
        assert isinstance(writer, VllmWriter)
        for _ in range(3):
            assert_it_writes_as_the_policy(policy, writer, writer.version)
            stir(policy, writer.version)
