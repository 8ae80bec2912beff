"""The sampler against a slow loop that knows no cache, batch or padding, and against the distribution it draws from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tether import decode, packing
from tether.attention import GROUPED, RoomyLayer, grouped_attention, roomy_cache
from tether.batch import Generation, Prompts, Sequences
from tether.decode import draw
from tether.errors import InputError, ModelError, NonFiniteError
from tether.models import LanguagePolicy, load_policy
from tether.packing import PackedLinears
from tether.streams import uniforms
from tiny_models import ARCHITECTURES, CONTEXT, EOS, MORE_ARCHITECTURES, VOCAB, build, build_tokenizer, prompts_of
from tolerances import ROUND_OFF, Tolerance, assert_close

TEMPERATURE = 0.8
PROMPTS = ([7, 8, 9], [11], [3, 4, 5, 6, 7, 8], [7, 8, 9], [50, 60])
LENGTH = 12


def policy_of(model: PreTrainedModel, mode: str = "full", **options: object) -> LanguagePolicy:
    return load_policy(model, build_tokenizer(), **({"mode": mode, "top_layers": 2, "dtype": "float32"} | options))


def numbers(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return uniforms(seed, "response", 0, range(rows), length)


def slow_response(model: PreTrainedModel, prompt: list[int], quantiles: Tensor) -> tuple[list[int], list[float]]:
    """One response, token by token, each by a whole forward pass and a search through numpy's running sum."""
    ids, logprobs = list(prompt), []
    for quantile in quantiles.tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] / TEMPERATURE
        probabilities = torch.softmax(logits.double(), dim=-1).numpy()
        token = int(np.searchsorted(np.cumsum(probabilities), quantile, side="right"))
        ids.append(token)
        logprobs.append(float(np.log(probabilities[token])))
        if token == EOS:
            break
    return ids[len(prompt) :], logprobs


def responses_of(generation: Generation) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(generation.responses, generation.response_mask, strict=True)]


# ── the draw ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("vocab", [2, 7, 255, 256, 257, 1000])
def test_tokens_stand_at_the_quantiles_of_the_softmax(vocab: int) -> None:
    logits = torch.randn(400, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    quantiles = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logprobs = draw(logits, quantiles, TEMPERATURE)
    exact = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
    edges = exact.exp().cumsum(dim=-1)
    below = torch.where(tokens > 0, edges.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    above = edges.gather(1, tokens[:, None])[:, 0]
    assert bool(((below - 1e-6 <= quantiles) & (quantiles <= above + 1e-6)).all())
    assert_close(logprobs, exact.gather(1, tokens[:, None])[:, 0], ROUND_OFF)


def test_frequencies_are_the_probabilities() -> None:
    """χ² of 100,000 draws over 300 tokens; 400 is exceeded by chance once in 15,000 seeds, and the seed is fixed."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    quantiles = torch.from_numpy(np.random.default_rng(0).random(100_000))
    tokens = torch.cat([draw(logits.expand(len(part), -1), part, 1.0)[0] for part in quantiles.split(25_000)])
    expected = torch.softmax(logits.double(), dim=0) * len(quantiles)
    chi_squared = float(((tokens.bincount(minlength=300) - expected) ** 2 / expected).sum())
    assert 200 < chi_squared < 400


@pytest.mark.parametrize("quantile", [0.0, 1e-300, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("vocab", [5, 600])
def test_a_token_of_probability_zero_is_never_drawn(vocab: int, quantile: float) -> None:
    possible = torch.tensor([1, vocab - 3])
    for alive in (possible, possible[:1], possible[1:]):
        logits = torch.full((1, vocab), -torch.inf)
        logits[0, alive] = 0.0
        token, logprob = draw(logits, torch.tensor([quantile], dtype=torch.float64), 1.0)
        assert int(token) in alive.tolist()
        assert_close(logprob, [-np.log(len(alive))], ROUND_OFF)


def test_low_and_high_quantiles_give_the_first_and_the_last_token() -> None:
    logits = torch.zeros(3, 1000)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.4995, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [0, 499, 999]


# ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_responses_are_those_of_a_slow_loop_without_cache_batch_or_padding(architecture: str) -> None:
    model = build(architecture)
    quantiles = numbers(len(PROMPTS))
    generation = policy_of(model).generate(prompts_of(*PROMPTS, padding=3), quantiles, TEMPERATURE)
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = slow_response(model, prompt, quantiles[row])
        mask = generation.response_mask[row]
        assert generation.responses[row, mask].tolist() == tokens
        assert_close(generation.sampler_logprobs[row, mask], logprobs, Tolerance(0, 1e-4))
        assert bool(generation.finished[row]) == (tokens[-1] == EOS)
    assert not generation.sampler_logprobs[~generation.response_mask].any()


@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_the_sampler_and_the_evaluation_agree(mode: str) -> None:
    policy = policy_of(build("llama"), mode)
    with torch.no_grad():
        for parameter in policy.trainable()["policy"]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    prompts = prompts_of(*PROMPTS)
    generation = policy.generate(prompts, numbers(5), TEMPERATURE)
    sequences = policy.prepare(Sequences.join(prompts, generation, pad=0))
    with torch.no_grad():
        said = policy.evaluate(sequences, TEMPERATURE)
    width = said.logprobs.shape[1]
    assert_close(generation.sampler_logprobs[:, :width], said.logprobs, Tolerance(0, 1e-4))


def test_a_response_does_not_depend_on_its_batch() -> None:
    policy, quantiles = policy_of(build("qwen2")), numbers(5)
    together = responses_of(policy.generate(prompts_of(*PROMPTS), quantiles, TEMPERATURE))
    alone = [
        responses_of(policy.generate(prompts_of(prompt), quantiles[row : row + 1], TEMPERATURE))[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    order = [3, 0, 4, 2, 1]
    shuffled = responses_of(
        policy.generate(prompts_of(*(PROMPTS[i] for i in order), padding=2), quantiles[order], TEMPERATURE)
    )
    assert together == alone
    assert shuffled == [together[i] for i in order]


def eager_to_stop(share: float) -> PreTrainedModel:
    """A model that ends a response with about this probability at each step, whatever came before."""
    model = build("phi")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
        model.lm_head.bias.zero_()
        model.lm_head.bias[EOS] = np.log(share / (1 - share) * (VOCAB - 1))
    return model


def test_rows_that_have_ended_leave_the_batch() -> None:
    policy = policy_of(eager_to_stop(0.3))
    widths: list[int] = []
    policy.mode.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generation = policy.generate(prompts_of(*[[i + 3] for i in range(40)]), numbers(40, 30), 1.0)
    assert bool(generation.finished.all())
    ends = generation.responses.gather(1, generation.response_mask.sum(dim=1, keepdim=True) - 1)
    assert ends.unique().tolist() == [EOS]
    assert not (
        generation.responses[generation.response_mask.cumsum(1) < generation.response_mask.sum(1, True)] == EOS
    ).any()
    lengths = generation.response_mask.sum(dim=1)
    assert len(widths) == int(lengths.max()), "no step after the last row has ended"
    for step, width in enumerate(widths[1:], start=1):
        still = int((lengths > step).sum())
        assert still <= width <= max(still / 0.74 + 1, 1)


def test_all_stop_tokens_of_the_generation_config_end_a_response() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [EOS, *range(10, VOCAB)]
    generation = policy_of(model).generate(prompts_of(*PROMPTS), numbers(5), 1.0)
    for row in responses_of(generation):
        assert all(token < 10 and token != EOS for token in row[:-1])


def test_a_prompt_sampled_several_times_is_run_once() -> None:
    policy = policy_of(build("gpt2"))
    widths: list[int] = []
    policy.mode.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    policy.generate(prompts_of([7, 8], [9], [7, 8], [7, 8], [9]), numbers(5, 2), 1.0)
    assert widths[0] == 2
    assert widths[1] <= 5


def test_extra_padding_of_all_prompts_changes_nothing() -> None:
    policy, quantiles = policy_of(build("bloom")), numbers(5)
    plain = policy.generate(prompts_of(*PROMPTS), quantiles, TEMPERATURE)
    padded = policy.generate(prompts_of(*PROMPTS, padding=7), quantiles, TEMPERATURE)
    assert responses_of(plain) == responses_of(padded)
    assert_close(padded.sampler_logprobs, plain.sampler_logprobs, Tolerance(0, 1e-4))


def test_a_response_of_one_token_is_drawn_without_a_step() -> None:
    generation = policy_of(build("llama")).generate(prompts_of([5], [6, 7]), numbers(2, 1), 1.0)
    assert generation.response_mask.tolist() == [[True], [True]]


def test_results_are_ordinary_tensors_that_autograd_may_save() -> None:
    generation = policy_of(build("llama")).generate(prompts_of([5]), numbers(1), 1.0)
    assert not generation.sampler_logprobs.is_inference()
    assert not generation.responses.is_inference()


def test_more_rows_than_fit_at_once_are_sampled_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, quantiles = policy_of(build("gemma2"), "top"), numbers(5)
    whole = policy.generate(prompts_of(*PROMPTS), quantiles, TEMPERATURE)
    monkeypatch.setattr(decode, "TOKENS_AT_ONCE", 2 * (6 + LENGTH))
    turns = policy.generate(prompts_of(*PROMPTS), quantiles, TEMPERATURE)
    assert responses_of(whole) == responses_of(turns)
    assert_close(turns.sampler_logprobs, whole.sampler_logprobs, Tolerance(0, 1e-4))


# ── the trunk's states ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_the_states_that_the_sampler_went_through_are_the_trunks(architecture: str) -> None:
    policy, prompts = policy_of(build(architecture), "top", top_layers=1), prompts_of(*PROMPTS, padding=2)
    generation = policy.generate(prompts, numbers(5), TEMPERATURE)
    sequences = Sequences.join(prompts, generation, pad=0)
    heard, run = policy.prepare(sequences).states, policy.prepare(sequences).states
    fed = torch.arange(heard.shape[1]) < (sequences.lengths - generation.finished.long())[:, None]
    assert_close(heard[fed], run[fed], Tolerance(1e-4, 1e-4))
    assert not torch.equal(heard, run), "the first came from the sampler, step by step"
    assert not heard.is_inference()


def test_states_of_rows_that_left_the_batch_early_are_in_their_places() -> None:
    policy, prompts = policy_of(eager_to_stop(0.3), "top"), prompts_of(*[[i + 3] * (i % 3 + 1) for i in range(20)])
    sequences = Sequences.join(prompts, policy.generate(prompts, numbers(20, 30), 1.0), pad=0)
    heard, run = policy.prepare(sequences).states, policy.prepare(sequences).states
    fed = torch.arange(heard.shape[1]) < sequences.lengths[:, None] - 1
    assert_close(heard[fed], run[fed], Tolerance(1e-4, 1e-4))


@pytest.mark.parametrize("change", ["token", "order", "cut"])
def test_other_tokens_get_states_of_their_own(change: str) -> None:
    policy, prompts = policy_of(build("llama"), "top"), prompts_of(*PROMPTS)
    sequences = Sequences.join(prompts, policy.generate(prompts, numbers(5), TEMPERATURE), pad=0)
    if change == "token":
        ids = sequences.ids.clone()
        ids[0, 0] = 90
        sequences = Sequences(ids, sequences.prompt_lengths, sequences.response_lengths)
    elif change == "order":
        sequences = sequences.rows(torch.tensor([1, 0, 2, 3, 4]))
    else:
        sequences = Sequences(sequences.ids, sequences.prompt_lengths, sequences.response_lengths - 1)
    first, second = policy.prepare(sequences).states, policy.prepare(sequences).states
    assert torch.equal(first, second)


# ── packed weights ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_packed_weights_draw_the_same_tokens(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, quantiles = policy_of(build("phi"), mode, dtype="bfloat16"), numbers(5)
    calls: list[int] = []
    apply = packing._apply
    monkeypatch.setattr(packing, "_apply", lambda *args: (calls.append(1), apply(*args))[1])
    packed = policy.generate(prompts_of(*PROMPTS), quantiles, TEMPERATURE)
    assert calls, "bfloat16 on a CPU is packed"
    monkeypatch.setattr(packing, "_can_pack", lambda _: False)
    plain = policy.generate(prompts_of(*PROMPTS), quantiles, TEMPERATURE)
    assert responses_of(packed) == responses_of(plain)
    assert_close(packed.sampler_logprobs, plain.sampler_logprobs, Tolerance(0, 1e-2))
    assert not any("forward" in module.__dict__ for module in policy.mode.model.modules())


def test_a_weight_that_has_moved_is_packed_again() -> None:
    linear = nn.Linear(16, 24, dtype=torch.bfloat16).requires_grad_(False)
    packed, x = PackedLinears(linear), torch.randn(4, 16, dtype=torch.bfloat16)
    for _ in range(2):
        with torch.inference_mode(), packed.in_use(rows=4, steps=30):
            assert_close(linear(x), F.linear(x, linear.weight, linear.bias).double(), Tolerance(1e-2, 1e-2))
        with torch.no_grad():
            linear.weight.mul_(-2.0)


def test_layers_are_whole_again_after_a_failure() -> None:
    linear = nn.Linear(16, 24, dtype=torch.bfloat16)
    with pytest.raises(KeyError), torch.inference_mode(), PackedLinears(linear).in_use(rows=4, steps=30):
        raise KeyError
    linear(torch.ones(2, 16, dtype=torch.bfloat16)).sum().backward()
    assert linear.weight.grad is not None


def test_float32_is_not_packed() -> None:
    linear = nn.Linear(16, 24)
    with PackedLinears(linear).in_use(rows=4, steps=30):
        assert "forward" not in linear.__dict__


# ── complaints ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    policy = policy_of(build("gpt2"))
    long = prompts_of([3], list(range(3, CONTEXT - 2)))
    with pytest.raises(InputError, match=r"prompt 1 has 59 tokens .* holds 64"):
        policy.generate(long, numbers(2, 6), 1.0)
    policy.generate(long, numbers(2, 5), 1.0)


def test_an_empty_prompt_is_refused() -> None:
    empty = Prompts(torch.tensor([[3], [4]]), torch.tensor([[True], [False]]), ("a", "b"), (0, 1))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        policy_of(build("llama")).generate(empty, numbers(2), 1.0)


def test_a_policy_that_has_diverged_is_one_clear_error() -> None:
    policy = policy_of(build("llama"))
    with torch.no_grad():
        policy.mode.model.base_model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="diverged"):
        policy.generate(prompts_of([3]), numbers(1), 1.0)


def test_a_model_without_an_end_token_is_refused() -> None:
    model, tokenizer = build("llama"), build_tokenizer()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="EOS"):
        load_policy(model, tokenizer, mode="full")


# ── attention and cache ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi", "opt"])
def test_grouped_attention_is_the_models_own(architecture: str) -> None:
    model = build(architecture)
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) >= torch.tensor([[0], [4], [2]])
    outputs = []
    for form in ("eager", GROUPED):
        model.set_attn_implementation(form)
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        outputs.append(hidden[mask])
    assert policy_of(model).mode.model.config._attn_implementation == GROUPED
    assert_close(outputs[1], outputs[0], ROUND_OFF)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_in_a_larger_cache_are_read_as_they_lie(dtype: torch.dtype, width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    query = torch.randn(3, 4, width, 8, generator=draw).to(dtype)
    keys, values = (torch.randn(3, 2, 20, 8, generator=draw).to(dtype)[:, :, :13] for _ in range(2))
    hidden = torch.arange(13) < torch.tensor([[0], [6], [2]])
    mask = torch.zeros(3, 1, width, 13, dtype=dtype).masked_fill_(hidden[:, None, None], torch.finfo(dtype).min)
    got, _ = grouped_attention(torch.nn.Identity(), query, keys, values, mask)
    own = [tensor.double().repeat_interleave(2, dim=1) for tensor in (keys, values)]
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), own[0]) / 8**0.5
    chances = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1)
    wanted = torch.einsum("bhqk,bhkd->bqhd", chances, own[1])
    assert_close(got.double(), wanted, Tolerance(0.0, 0.03) if dtype == torch.bfloat16 else ROUND_OFF)


def test_attention_with_terms_of_its_own_keeps_its_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.attention.FOREIGN", ("use_cache",))
    assert policy_of(build("llama")).mode.model.config._attn_implementation == "eager"


def test_a_cache_with_room_holds_what_the_librarys_cache_holds() -> None:
    config = build("llama").config
    ours, theirs = roomy_cache(config, 12), DynamicCache(config=config)
    assert all(type(layer) is RoomyLayer for layer in ours.layers)
    for step, length in enumerate((5, 1, 1)):
        draw = torch.Generator().manual_seed(step)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(4 if step < 2 else 3, 2, length, 8, generator=draw) for _ in range(2))
            for got, wanted in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(got, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        if step == 1:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([3, 0, 0]))
