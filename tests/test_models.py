"""Policy, value function and reference on real architectures at toy size.

The oracle is the library's own forward pass on each row alone, without padding, followed by torch's log_softmax and
Categorical: no head chunks, no trunk states, no masks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tether import states
from tether.batch import Evaluation, Sequences
from tether.config import UpdateSettings
from tether.errors import ModelError
from tether.loading import choose_dtype
from tether.models import LanguagePolicy, load_policy, shares_storage
from tether.optimiser import Optimiser
from tiny_models import (
    ARCHITECTURES,
    LAYERS,
    MORE_ARCHITECTURES,
    VOCAB,
    build,
    build_tokenizer,
    ragged_sequences,
    row_logits,
)
from tolerances import ROUND_OFF, Tolerance, assert_close

MODES = ("full", "lora", "top")
TEMPERATURE = 0.7
BF16 = Tolerance(relative=0, absolute=5e-2)
ACCUMULATED = Tolerance(relative=1e-3, absolute=2e-4)
"""float32 gradients: sums over tokens in another order."""


def policy_of(model: PreTrainedModel | Path | str, mode: str = "top", **options: object) -> LanguagePolicy:
    settings = {"tokenizer": build_tokenizer(), "top_layers": 2, "lora_rank": 4, "dtype": "float32"} | options
    return load_policy(model, mode=mode, **settings)


def stir(policy: LanguagePolicy, spread: float = 0.05) -> None:
    """Move every trainable parameter, as training would, so that the policy leaves its reference."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in policy.trainable().values():
            for parameter in group:
                parameter += spread * torch.randn(parameter.shape, generator=draw).to(parameter)


def real(x: Tensor, sequences: Sequences, row: int) -> Tensor:
    return x[row, sequences.response_mask[row]]


# ── what the policy says ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_logprobs_entropy_and_kl_are_those_of_the_whole_model_row_by_row(architecture: str, mode: str) -> None:
    source = build(architecture)
    policy, sequences = policy_of(source, mode), ragged_sequences()
    stir(policy)
    sequences = policy.prepare(sequences)
    with torch.no_grad():
        said = policy.evaluate(sequences, TEMPERATURE)
        reference = policy.evaluate_reference(sequences, TEMPERATURE)
        for row in range(len(sequences)):
            tokens = real(sequences.responses, sequences, row)
            now, before = (
                Categorical(logits=row_logits(model, sequences, row) / TEMPERATURE)
                for model in (policy.mode.model, source)
            )
            assert_close(real(said.logprobs, sequences, row), now.log_prob(tokens), ROUND_OFF)
            assert_close(real(said.entropy, sequences, row), now.entropy(), ROUND_OFF)
            assert_close(real(reference.logprobs, sequences, row), before.log_prob(tokens), ROUND_OFF)
            assert_close(real(reference.full_kl, sequences, row), kl_divergence(now, before), ROUND_OFF)
    assert float(reference.full_kl.max()) > 1e-3, "the policy was moved, or this test shows nothing"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_before_the_first_update_policy_and_reference_agree_to_the_last_bit(
    architecture: str, mode: str, dtype: str
) -> None:
    policy = policy_of(build(architecture), mode, dtype=dtype)
    sequences = policy.prepare(ragged_sequences())
    with torch.no_grad():
        said = policy.evaluate(sequences, TEMPERATURE)
    reference = policy.evaluate_reference(sequences, TEMPERATURE)
    assert torch.equal(said.logprobs, reference.logprobs)
    assert not reference.full_kl.any()
    assert not said.values.any(), "the value head starts at 0"
    assert {parameter.dtype for parameter in policy.mode.model.parameters()} == {getattr(torch, dtype)}


def test_masked_places_are_zero_and_carry_no_gradient() -> None:
    policy = policy_of(build("llama"), "full")
    sequences = ragged_sequences()
    said = policy.evaluate(sequences, 1.0)
    for result in (said.logprobs, said.values, said.entropy):
        assert not result[~sequences.response_mask].any()
    said.logprobs[~sequences.response_mask].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in policy.trainable()["policy"])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", Tolerance(0, 1e-4)), ("bfloat16", BF16)])
@pytest.mark.parametrize("mode", MODES)
def test_padding_and_company_never_change_a_row(mode: str, dtype: str, tolerance: Tolerance) -> None:
    policy = policy_of(build("gpt2"), mode, dtype=dtype)
    stir(policy)
    sequences = ragged_sequences()
    padded = Sequences(
        torch.nn.functional.pad(sequences.ids, (0, 9), value=7), sequences.prompt_lengths, sequences.response_lengths
    )
    with torch.no_grad():
        together = policy.evaluate(policy.prepare(padded), 1.0)
        for row in range(len(sequences)):
            alone = policy.evaluate(policy.prepare(sequences.rows(torch.tensor([row]))), 1.0)
            width = alone.logprobs.shape[1]
            assert_close(together.logprobs[row, :width], alone.logprobs[0], tolerance)
            assert_close(together.values[row, :width], alone.values[0], tolerance)


def test_bfloat16_says_nearly_what_float32_says() -> None:
    sequences, said = ragged_sequences(), []
    for dtype in ("float32", "bfloat16"):
        policy = policy_of(LlamaForCausalLM(build("llama").config), "full", dtype=dtype)
        policy.mode.model.load_state_dict(build("llama").state_dict())
        with torch.no_grad():
            said.append(policy.evaluate(sequences, 1.0).logprobs)
    assert_close(said[1], said[0], Tolerance(0, 0.3))  # logits of spread 6, of which bf16 keeps 8 bits
    assert float((said[1] - said[0]).abs().mean()) < 0.05


def test_a_batch_too_large_for_one_pass_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(build("neox"))
    stir(policy)
    sequences = policy.prepare(ragged_sequences())
    with torch.no_grad():
        whole, whole_reference = policy.evaluate(sequences, 1.0), policy.evaluate_reference(sequences, 1.0)
        monkeypatch.setattr(states, "TOKENS_AT_ONCE", 2 * sequences.ids.shape[1])
        parts, parts_reference = policy.evaluate(sequences, 1.0), policy.evaluate_reference(sequences, 1.0)
    assert_close(parts.logprobs, whole.logprobs, ROUND_OFF)
    assert_close(parts.values, whole.values, ROUND_OFF)
    assert_close(parts_reference.full_kl, whole_reference.full_kl, ROUND_OFF)


# ── gradients ───────────────────────────────────────────────────────────────────────────────────────────────────────
def weights_of(sequences: Sequences) -> Tensor:
    return torch.randn(sequences.response_mask.shape, generator=torch.Generator().manual_seed(5))


def loss_of(said: Evaluation, sequences: Sequences) -> Tensor:
    weights = weights_of(sequences)
    return (weights * said.logprobs + weights.flip(1) * said.values * sequences.response_mask).sum()


def plain_loss(policy: LanguagePolicy, sequences: Sequences) -> Tensor:
    """The same loss by the library's forward pass on each row and a value head written out."""
    weights, total = weights_of(sequences), torch.zeros(())
    value = policy.value.head.linear
    for row in range(len(sequences)):
        tokens, mask = real(sequences.responses, sequences, row), sequences.response_mask[row]
        logprobs = torch.log_softmax(row_logits(policy.mode.model, sequences, row) / TEMPERATURE, dim=-1)
        start, length = int(sequences.prompt_lengths[row]), int(sequences.lengths[row])
        states = policy.mode.model.base_model(input_ids=sequences.ids[row : row + 1, :length]).last_hidden_state
        values = (states[0, start - 1 : length - 1] @ value.weight.T + value.bias).squeeze(-1)
        picked = logprobs[torch.arange(len(tokens)), tokens]
        total = total + (weights[row, mask] * picked + weights.flip(1)[row, mask] * values).sum()
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi"])
def test_gradients_are_those_of_plain_autograd(architecture: str, mode: str) -> None:
    policy = policy_of(build(architecture), mode)
    stir(policy)
    sequences = policy.prepare(ragged_sequences())
    trained = [parameter for group in policy.trainable().values() for parameter in group]
    got = torch.autograd.grad(loss_of(policy.evaluate(sequences, TEMPERATURE), sequences), trained)
    wanted = torch.autograd.grad(plain_loss(policy, sequences), trained)
    for ours, theirs in zip(got, wanted, strict=True):
        scale = float(theirs.abs().max()) + 1e-6
        assert_close(ours / scale, theirs / scale, ACCUMULATED)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_trainable_gets_a_gradient(mode: str) -> None:
    policy = policy_of(build("qwen2"), mode)
    stir(policy)
    sequences = policy.prepare(ragged_sequences())
    loss_of(policy.evaluate(sequences, 1.0), sequences).backward()
    trained = {id(parameter) for group in policy.trainable().values() for parameter in group}
    held = [p for p in (*policy.mode.model.parameters(), *policy.value.parameters()) if p.grad is not None]
    assert {id(parameter) for parameter in held} == trained
    assert all(reference.grad is None for reference in policy.mode.reference())


def test_top_trains_the_last_layers_and_the_final_norm_alone() -> None:
    policy = policy_of(build("llama"), "top", top_layers=1)
    names = {name for name, parameter in policy.mode.model.named_parameters() if parameter.requires_grad}
    assert names == {
        name
        for name, _ in build("llama").named_parameters()
        if name.startswith((f"model.layers.{LAYERS - 1}.", "model.norm."))
    }


def test_top_may_train_every_layer() -> None:
    policy, sequences = policy_of(build("gpt2"), "top", top_layers=LAYERS), ragged_sequences()
    with torch.no_grad():
        said = policy.evaluate(policy.prepare(sequences), 1.0)
        wanted = torch.log_softmax(row_logits(build("gpt2"), sequences, 0), dim=-1)
    tokens = real(sequences.responses, sequences, 0)
    assert_close(real(said.logprobs, sequences, 0), wanted[torch.arange(len(tokens)), tokens], ROUND_OFF)


def test_the_trunk_is_run_once_a_rollout() -> None:
    policy = policy_of(build("llama"), "top", top_layers=1)
    calls: list[int] = []
    policy.mode.model.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    sequences = policy.prepare(ragged_sequences())
    with torch.no_grad():
        policy.evaluate(sequences, 1.0)
    policy.evaluate_reference(sequences, 1.0)
    policy.evaluate(sequences.rows(torch.tensor([2, 0])), 1.0)
    assert len(calls) == 1


def test_rows_of_prepared_sequences_say_what_unprepared_ones_say() -> None:
    policy = policy_of(build("gemma2"), "top", top_layers=2)
    stir(policy)
    index, plain = torch.tensor([3, 1]), ragged_sequences()
    with torch.no_grad():
        prepared = policy.evaluate(policy.prepare(plain).rows(index), 1.0)
        unprepared = policy.evaluate(plain.rows(index), 1.0)
    assert_close(prepared.logprobs, unprepared.logprobs, ROUND_OFF)


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────────────
def train_a_little(policy: LanguagePolicy, sequences: Sequences) -> None:
    optimiser = Optimiser(policy.trainable(), UpdateSettings(learning_rate=0.01, value_learning_rate=0.01))
    for _ in range(2):
        loss_of(policy.evaluate(sequences, 1.0), sequences).backward()
        optimiser.collect()
        optimiser.step(optimiser.gradient_norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_training_moves_the_policy_and_never_the_reference(mode: str, dtype: str) -> None:
    policy = policy_of(build("llama"), mode, dtype=dtype)
    sequences = policy.prepare(ragged_sequences())
    before = policy.evaluate_reference(sequences, 1.0)
    frozen = [weight.clone() for weight in policy.mode.reference()]
    train_a_little(policy, sequences)
    after = policy.evaluate_reference(sequences, 1.0)
    assert torch.equal(before.logprobs, after.logprobs)
    assert all(torch.equal(old, new) for old, new in zip(frozen, policy.mode.reference(), strict=True))
    assert float(after.full_kl.sum()) > 1e-3
    assert not shares_storage(policy)


def test_states_kept_for_the_reference_are_forgotten_when_a_weight_moves() -> None:
    policy = policy_of(build("llama"), "full")
    sequences = ragged_sequences()
    with torch.no_grad():
        policy.evaluate(sequences, 1.0)
    stir(policy)
    stale = policy.evaluate_reference(sequences, 1.0)
    fresh = policy.evaluate_reference(sequences, 1.0)
    assert torch.equal(stale.full_kl, fresh.full_kl)
    assert stale.full_kl.any()


def test_a_reference_that_shares_memory_with_the_policy_is_seen() -> None:
    policy = policy_of(build("llama"), "full")
    policy.mode._reference.base_model.norm.weight = policy.mode.model.base_model.norm.weight
    assert shares_storage(policy)


@pytest.mark.parametrize("mode", MODES)
def test_a_reference_of_its_own_is_the_one_measured_against(mode: str) -> None:
    other, sequences = build("llama", seed=1), ragged_sequences()
    policy = policy_of(build("llama"), mode, reference=other)
    reference = policy.evaluate_reference(policy.prepare(sequences), 1.0)
    tokens = real(sequences.responses, sequences, 0)
    with torch.no_grad():
        wanted = torch.log_softmax(row_logits(other, sequences, 0), dim=-1)[torch.arange(len(tokens)), tokens]
    assert_close(real(reference.logprobs, sequences, 0), wanted, ROUND_OFF)
    assert not shares_storage(policy)


def test_adapters_start_alike_whatever_the_global_random_state() -> None:
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        starts.append([p.clone() for p in policy_of(build("llama"), "lora").trainable()["policy"]])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


def test_adapters_of_ones_own_are_taken() -> None:
    mine = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    policy = policy_of(build("llama"), "lora", peft_config=mine)
    assert len(policy.trainable()["policy"]) == 2 * LAYERS
    stir(policy)
    with torch.no_grad():
        twice = [policy.evaluate(policy.prepare(ragged_sequences()), 1.0).logprobs for _ in range(2)]
    assert torch.equal(*twice)


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_value_model_starts_as_its_reward_model_and_trains_apart() -> None:
    config = LlamaConfig(**{**build("llama").config.to_dict(), "num_labels": 1})
    with torch.random.fork_rng():
        torch.manual_seed(9)
        reward_model = LlamaForSequenceClassification(config).eval()
    policy = policy_of(build("llama"), "top", value="model", value_source=reward_model)
    sequences = policy.prepare(ragged_sequences())
    said = policy.evaluate(sequences, 1.0)
    start, length = int(sequences.prompt_lengths[0]), int(sequences.lengths[0])
    with torch.no_grad():
        states = reward_model.model(input_ids=sequences.ids[:1, :length]).last_hidden_state
        wanted = reward_model.score(states)[0, start - 1 : length - 1, 0]
    assert_close(real(said.values, sequences, 0).detach(), wanted, ROUND_OFF)
    said.values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.trainable()["policy"])
    assert any(parameter.grad is not None for parameter in policy.value.backbone.parameters())


def test_a_value_model_starts_at_the_policys_source_where_none_is_named() -> None:
    policy = policy_of(build("gpt2"), "lora", value="model")
    start = policy.value.backbone.state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in build("gpt2").base_model.state_dict().items())
    assert not policy.evaluate(ragged_sequences(), 1.0).values.any()


def test_no_parameter_stands_in_two_groups() -> None:
    for mode in MODES:
        groups = policy_of(build("llama"), mode, value="model").trainable()
        every = [id(parameter) for group in groups.values() for parameter in group]
        assert set(groups) == {"policy", "value"}
        assert len(every) == len(set(every))


# ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", MODES)
def test_a_saved_policy_is_an_ordinary_checkpoint(mode: str, tmp_path: Path) -> None:
    policy, sequences = policy_of(build("gpt2"), mode), ragged_sequences()
    stir(policy)
    policy.save_pretrained(tmp_path, merged=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(row_logits(loaded, sequences, 2), row_logits(policy.mode.model, sequences, 2), ROUND_OFF)
        again = load_policy(tmp_path, dtype="float32", top_layers=1, value_source=tmp_path)
        now, then = again.evaluate(sequences, 1.0), policy.evaluate(sequences, 1.0)
    assert_close(now.values, then.values, ROUND_OFF)
    assert_close(now.logprobs, then.logprobs, ROUND_OFF)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's, on reading
def test_saved_adapters_are_read_by_peft(tmp_path: Path) -> None:
    policy, sequences = policy_of(build("llama"), "lora"), ragged_sequences()
    stir(policy)
    policy.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    with torch.no_grad():
        assert_close(row_logits(loaded, sequences, 2), row_logits(policy.mode.model, sequences, 2), ROUND_OFF)


def test_a_folder_is_read_in_the_precision_asked_for(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert load_policy(tmp_path, top_layers=1).mode.model.dtype == torch.float32, "a tiny model stays in float32"
    assert load_policy(str(tmp_path), top_layers=1, dtype="bfloat16").mode.model.dtype == torch.bfloat16


def test_automatic_precision_spares_small_models_and_old_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_dtype("auto", 100_000_000, cpu) == torch.bfloat16
    assert choose_dtype("auto", 1_000_000, cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose_dtype("auto", 100_000_000, cpu) == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_the_model_that_was_given_stays_as_it_was(mode: str) -> None:
    source, untouched = build("gpt2").train(), build("gpt2")
    source.requires_grad_(True)
    form, pad = source.config._attn_implementation, source.config.pad_token_id
    tokenizer = build_tokenizer()
    policy = policy_of(source, mode, tokenizer=tokenizer, dtype="bfloat16")
    train_a_little(policy, policy.prepare(ragged_sequences()))
    assert all(torch.equal(source.state_dict()[name], weight) for name, weight in untouched.state_dict().items())
    assert source.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in source.parameters())
    assert (source.config._attn_implementation, source.config.pad_token_id) == (form, pad)
    assert tokenizer.pad_token is None
    assert not hasattr(source, "peft_config")


def test_decode_leaves_special_tokens_and_padding_out() -> None:
    policy = policy_of(build("llama"))
    responses = torch.tensor([[5, 6, 2, 9], [7, 2, 3, 3]])
    assert policy.decode(responses, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()) == ["w5 w6", "w7"]
    assert policy.pad == 2


# ── complaints ──────────────────────────────────────────────────────────────────────────────────────────────────────
_SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _bert(**options: object) -> BertConfig:
    return BertConfig(**_SMALL, intermediate_size=16, **options)


class _Stranger(LlamaForCausalLM):
    """A causal LM that does something of its own to its logits."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1)
        return output


def test_what_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    classifier = LlamaForSequenceClassification(LlamaConfig(**build("llama").config.to_dict()))
    classifier.config.architectures = ["LlamaForSequenceClassification"]
    for wrong, words in ((t5, "no causal LM"), (BertForMaskedLM(_bert()), "no causal LM"), (classifier, "no causal")):
        wrong.save_pretrained(tmp_path / type(wrong).__name__)
        for source in (wrong, tmp_path / type(wrong).__name__):
            with pytest.raises(ModelError, match=words):
                policy_of(source)


def test_a_model_that_sees_the_future_is_refused() -> None:
    with pytest.raises(ModelError, match="later token changes"):
        policy_of(BertLMHeadModel(_bert(architectures=None)), "full")


def test_a_head_that_is_no_linear_map_is_refused() -> None:
    strange = _Stranger(build("llama").config)
    strange.config.architectures = None
    with pytest.raises(ModelError, match="transforms its logits"):
        policy_of(strange)
    model = build("llama")
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Sequential(nn.Linear(32, VOCAB))
    with pytest.raises(ModelError, match="plain linear"):
        policy_of(model)


def test_a_missing_folder_or_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere' is no folder; wanted a folder written by save_pretrained"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="pass tokenizer="):
        load_policy(build("llama"))
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot read"):
        load_policy(tmp_path)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="98 tokens and the model 97"):
        policy_of(build("llama"), tokenizer=build_tokenizer(98))


def test_layers_that_are_not_there_cannot_be_trained() -> None:
    for wrong in (0, LAYERS + 1):
        with pytest.raises(ModelError, match=f"1 … {LAYERS}"):
            policy_of(build("llama"), "top", top_layers=wrong)


def test_a_model_without_a_list_of_layers_is_sent_to_the_other_modes() -> None:
    model = build("llama")
    model.config.num_hidden_layers = LAYERS - 1  # the list is longer than the config says
    with pytest.raises(ModelError, match="mode='full' or mode='lora'"):
        policy_of(model, "top", top_layers=1)
    policy_of(model, "full")


@pytest.mark.usefixtures("unchecked_shapes")
def test_unknown_words_are_refused() -> None:
    for options in ({"mode": "half"}, {"dtype": "float16"}, {"value": "none"}, {"mode": "lora", "lora_rank": 0}):
        with pytest.raises(ModelError, match="wanted"):
            policy_of(build("llama"), **options)


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    small = LlamaForCausalLM(LlamaConfig(**{**build("llama").config.to_dict(), "vocab_size": 50}))
    with pytest.raises(ModelError, match="one vocabulary"):
        policy_of(build("llama"), reference=small)


def test_dropout_that_was_turned_on_is_seen() -> None:
    policy = policy_of(build("gpt2"), "full")
    policy.mode.model.train()
    with pytest.raises(ModelError, match="training mode"):
        policy.prepare(ragged_sequences())
