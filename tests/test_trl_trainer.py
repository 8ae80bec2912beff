"""What the classic trainer promises: TRL's own tests restated on tiny models, and the lesson's slips."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from compat.side import tokenizer
from tether.errors import MissingExtraError
from tether.trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    TrainingWarning,
    create_reference_model,
)
from tether.trl.core import LengthSampler, masked_mean, masked_var, masked_whiten, respond_to_batch, whiten
from tether.trl.extras import BestOfNSampler
from tolerances import ROUND_OFF, assert_close
from trl_parts import QUERIES, RESPONSES, SCORES, lora, made, moved, step, weights, wrapped

GROUPS = {
    "objective": ("kl", "kl_dist", "logprobs", "ref_logprobs", "kl_coef", "entropy"),
    "ppo": ("mean_non_score_reward", "mean_scores", "std_scores", "learning_rate"),
    "ppo/loss": ("policy", "value", "total"),
    "ppo/policy": ("entropy", "approxkl", "policykl", "clipfrac", "advantages", "advantages_mean", "ratio"),
    "ppo/returns": ("mean", "var"),
    "ppo/val": ("vpred", "error", "clipfrac", "mean", "var", "var_explained"),
    "tokens": tuple(f"{what}_{of}" for what in ("queries", "responses") for of in ("len_mean", "len_std", "dist")),
    "time/ppo": ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats", "total"),
}
STATS = [f"{group}/{name}" for group, names in GROUPS.items() for name in names]
GREEDY = {"do_sample": False, "max_new_tokens": 4}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        return QUERIES[place][:4], RESPONSES[place][:4]


# ── step ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("masks", [None, [torch.ones_like(response) for response in RESPONSES]])
def test_a_step_gives_every_weight_a_gradient_and_every_number_a_value(masks: list | None) -> None:
    trainer = made()
    trainer.optimizer.zero_grad = partial(trainer.optimizer.zero_grad, set_to_none=False)
    stats = step(trainer, response_masks=masks)
    assert sorted(stats) == sorted(STATS)
    assert [name for name, weight in trainer.model.named_parameters() if weight.grad is None] == []


def test_the_reference_gets_no_gradient_and_stays() -> None:
    model = wrapped()
    before = weights(model)
    trainer = made(model)
    step(trainer)
    assert moved(before, model) == set(before)
    assert moved(before, trainer.ref_model) == set()
    assert all(weight.grad is None for weight in trainer.ref_model.parameters())


def test_an_optimizer_and_a_schedule_of_one_s_own_are_used() -> None:
    model = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    trainer = made(model, extras={"optimizer": optimizer, "lr_scheduler": schedule})
    assert trainer.optimizer.optimizer is optimizer
    assert trainer.lr_scheduler.scheduler is schedule
    assert step(trainer)["ppo/learning_rate"] == 0.01
    assert step(trainer)["ppo/learning_rate"] == pytest.approx(0.009)


def test_shared_layers_get_no_gradient_and_later_ones_do() -> None:
    trainer = made(extras={"num_shared_layers": 1})
    trainer.optimizer.zero_grad = partial(trainer.optimizer.zero_grad, set_to_none=False)
    step(trainer)
    trained = {name for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    assert {name for name in trained if ".h.0." in name or "wte" in name} == set()
    assert {"pretrained_model.transformer.h.1.attn.c_attn.weight", "v_head.summary.weight"} <= trained


def test_with_adapters_these_and_the_value_head_alone_train() -> None:
    model = lora()
    trainer = made(model)
    before = weights(model)
    assert trainer.ref_model is None
    step(trainer)
    model.train()
    model.gradient_checkpointing_enable()
    step(trainer)
    assert moved(before, model) == {name for name in before if "lora_" in name or "v_head" in name}


def test_accumulated_gradients_are_those_of_one_large_minibatch() -> None:
    models = [wrapped(), wrapped()]
    knobs = {"ppo_epochs": 1}
    for model, sizes in zip(models, ({"mini_batch_size": 2}, {"gradient_accumulation_steps": 2}), strict=True):
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        step(made(model, extras={"optimizer": sgd}, **knobs, **sizes))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_knobs_are_read_when_they_are_used() -> None:
    trainer = made()
    trainer.config.batch_size, trainer.config.ppo_epochs = 1, 7
    stats = step(trainer, queries=QUERIES[:1], responses=RESPONSES[:1], scores=SCORES[:1])
    assert stats["ppo/policy/ratio"].shape == (7 * 8,)


@pytest.mark.parametrize(
    "changed",
    [
        {"scores": [torch.tensor([[1.0]]), torch.tensor([[0.0]])]},
        {"scores": [1.0, 0.0]},
        {"scores": [torch.tensor(float("nan")), torch.tensor(0.0)]},
        {"queries": QUERIES[:1]},
        {"responses": tuple(RESPONSES)},
        {"queries": [torch.ones(2, 3).long(), QUERIES[1]]},
        {"queries": [torch.tensor([]).long(), QUERIES[1]]},
        {"response_masks": [torch.ones(3), torch.ones(6)]},
    ],
)
def test_what_does_not_fit_is_a_value_error(changed: dict, unchecked_shapes: None) -> None:
    with pytest.raises(ValueError, match=r"wanted|entries"):
        step(made(), **changed)


def test_a_batch_dimension_of_one_changes_nothing() -> None:
    plain = step(made())
    batched = step(
        made(),
        queries=[query[None] for query in QUERIES],
        responses=[response[None] for response in RESPONSES],
        scores=[score[None] for score in SCORES],
    )
    assert {name for name in STATS if "time" not in name and np.any(plain[name] != batched[name])} == set()


@pytest.mark.parametrize("sizes", [(3, 1, 2), (4, 3, 1), (2, 4, 1)])
def test_a_batch_is_a_whole_number_of_optimiser_steps(sizes: tuple[int, int, int]) -> None:
    batch, mini, accumulated = sizes
    with pytest.raises(ValueError, match="wanted a multiple"):
        PPOConfig(batch_size=batch, mini_batch_size=mini, gradient_accumulation_steps=accumulated)


# ── data and arguments ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_rest_that_fills_no_batch_is_dropped() -> None:
    config = PPOConfig(batch_size=3, mini_batch_size=1)
    assert len(PPOTrainer(config, wrapped(), None, tokenizer("right"), dataset=Rows()).dataloader) == 0


def test_no_dataset_and_a_needless_share_are_warned_of() -> None:
    config = PPOConfig(batch_size=2, mini_batch_size=1)
    with pytest.warns(UserWarning, match="no dataset"):
        PPOTrainer(config, wrapped(), wrapped(), tokenizer("right"))
    with pytest.warns(UserWarning, match="num_shared_layers is not used"):
        PPOTrainer(config, wrapped(), wrapped(), tokenizer("right"), dataset=Rows(), num_shared_layers=1)


# ── the parts ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_kl_penalties_are_their_literals() -> None:
    logprobs = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]])
    ref_logprobs = torch.tensor([[0.4, 0.3, 0.0], [0.7, 0.1, 0.3]])
    wanted = {
        "kl": [[0.1, -0.1, 0.1], [-0.1, 0.1, -0.2]],
        "abs": [[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]],
        "mse": [[0.005, 0.005, 0.005], [0.005, 0.005, 0.02]],
    }
    for kind, literal in wanted.items():
        assert_close(made(kl_penalty=kind)._kl_penalty(logprobs, ref_logprobs), literal, ROUND_OFF)
    one, other = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.01, 0.01, 0.98]]).log()
    assert_close(made(kl_penalty="full")._kl_penalty(one, other), [0.97 * np.log(98)], ROUND_OFF)


def test_the_loss_is_unchanged_when_masked_positions_are_removed() -> None:
    trainer = made()
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    with torch.no_grad():
        logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, QUERIES, RESPONSES, inputs)
    rewards, _, _ = trainer.compute_rewards(torch.tensor([1.0, 2.0]), logprobs, logprobs + 1, mask)
    values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    rows = (logprobs, values, logprobs.exp(), values + 0.1, logprobs + 0.3, mask, advantages, returns)
    whole = trainer.loss(*(row[:1] for row in rows))
    part = trainer.loss(*(row[:1][mask[:1].bool()][None] for row in rows))
    assert_close(part[0], whole[0], ROUND_OFF)
    assert_close(part[1], whole[1], ROUND_OFF)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pass_is_equal_across_padding_and_chunks(architecture: str, side: str) -> None:
    trainer, kept = made(wrapped(architecture), side=side), []
    for count, chunk in ((1, 1), (2, 1), (2, 2)):
        trainer.config.mini_batch_size = chunk
        inputs = trainer.prepare_model_inputs(QUERIES[:count], RESPONSES[:count])
        logprobs, _, values, mask = trainer.batched_forward_pass(
            trainer.model, QUERIES[:count], RESPONSES[:count], inputs
        )
        kept.append((logprobs[0][mask[0].bool()], values[0][mask[0].bool()]))
    for logprobs, values in kept[1:]:
        assert_close(logprobs, kept[0][0], ROUND_OFF)
        assert_close(values, kept[0][1], ROUND_OFF)


# ── generation ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_responses_of_a_batch_are_those_of_single_queries_and_the_reference_speaks_for_itself() -> None:
    other = wrapped(seed=5)
    trainer = made(wrapped(), other)
    together, theirs = trainer.generate(QUERIES, batch_size=2, generate_ref_response=True, **GREEDY)
    for place, query in enumerate(QUERIES):
        single, reference = trainer.generate(query, generate_ref_response=True, **GREEDY)
        assert single.shape[0] == 1
        assert torch.equal(single[0][: len(together[place])], together[place])
        assert torch.equal(reference[0][: len(theirs[place])], theirs[place])
    assert any(not torch.equal(a, b) for a, b in zip(together, theirs, strict=True))


def test_a_response_has_the_shape_of_its_query_and_the_length_of_the_sampler() -> None:
    trainer = made()
    sampler = LengthSampler(3, 4)
    options = {"do_sample": True, "top_k": 0, "eos_token_id": -1, "remove_padding": False}
    batched = trainer.generate([QUERIES[0][None]], sampler, return_prompt=False, **options)
    assert batched[0].shape == (1, 3)
    assert trainer.generate(QUERIES[0], sampler, **options).shape == (1, 7)
    with pytest.raises(ValueError, match="wanted one row"):
        trainer.generate(torch.ones(2, 3).long(), **GREEDY)


def test_best_of_n_keeps_the_best() -> None:
    sampler = BestOfNSampler(
        wrapped(), tokenizer("right"), lambda texts: [len(set(text.split())) for text in texts], LengthSampler(4, 5),
        sample_size=6, n_candidates=2, seed=0,
    )  # fmt: skip
    (best,) = sampler.generate(QUERIES[0], do_sample=True, top_k=0, pad_token_id=0)
    assert len(set(best[0].split())) >= len(set(best[1].split()))
    assert len(sampler.generate([[1, 2], [3, 4, 5]], do_sample=True, pad_token_id=0)) == 2


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_saved_model_comes_back_with_its_value_head(tmp_path: Path) -> None:
    for name, model in {"full": wrapped("llama"), "sharded": wrapped("gpt2")}.items():
        model.save_pretrained(tmp_path / name, **({"max_shard_size": "2KB"} if name == "sharded" else {}))
        back = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / name)
        assert sorted(back.state_dict()) == sorted(model.state_dict())
        assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_of_a_peft_model_adapters_and_value_head_are_saved(tmp_path: Path) -> None:
    model = lora()
    model.pretrained_model.get_base_model().save_pretrained(tmp_path / "base")
    model.pretrained_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapters")
    assert {key.split(".")[0] for key in model.state_dict()} == {"v_head"}
    back = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapters"), is_trainable=True)
    assert torch.equal(back.v_head.summary.weight, model.v_head.summary.weight)
    assert {name for name, weight in back.named_parameters() if weight.requires_grad} == {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }


def test_weights_are_float32_unless_another_precision_is_asked_for(tmp_path: Path) -> None:
    wrapped("llama").pretrained_model.to(torch.bfloat16).save_pretrained(tmp_path)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert next(load(tmp_path).pretrained_model.parameters()).dtype == torch.float32
    assert next(load(tmp_path, torch_dtype=torch.bfloat16).pretrained_model.parameters()).dtype == torch.bfloat16


def test_a_reference_is_frozen_and_a_shared_layer_is_one_memory() -> None:
    model = wrapped()
    reference = create_reference_model(model, num_shared_layers=1)
    shared, own = (f"pretrained_model.transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1))
    assert reference.get_parameter(shared).data_ptr() == model.get_parameter(shared).data_ptr()
    assert reference.get_parameter(own).data_ptr() != model.get_parameter(own).data_ptr()
    assert not any(weight.requires_grad for weight in reference.parameters())
    with pytest.raises(ValueError, match="below the number of layers"):
        create_reference_model(model, num_shared_layers=9)


def test_what_is_not_here_says_what_to_use() -> None:
    with pytest.raises(NotImplementedError, match="seq2seq"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained("t5-small")
    with pytest.raises(MissingExtraError, match="tether sft"):
        from tether.trl import SFTTrainer  # noqa: F401
    with pytest.raises(ValueError, match="causal LM"):
        AutoModelForCausalLMWithValueHead.from_pretrained(wrapped().pretrained_model.transformer)


# ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_means_and_variances_under_a_mask_are_torch_s_of_what_is_left() -> None:
    x, mask = torch.tensor([1.0, 2.0, 3.5, 4.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert_close(masked_mean(x, mask), x[1:3].mean(), ROUND_OFF)
    assert_close(masked_var(x, mask), x[1:3].var(), ROUND_OFF)
    assert_close(masked_whiten(x, mask)[1:3], whiten(x[1:3]), ROUND_OFF)


def test_respond_to_batch_gives_responses_alone() -> None:
    assert respond_to_batch(wrapped(), torch.tensor([[1, 2, 3]]), txt_len=5, top_k=3, top_p=0.9).shape == (1, 5)


# ── what is said beside a step ──────────────────────────────────────────────────────────────────────────────────────
def low_kl(trainer: PPOTrainer, responses: list[torch.Tensor]) -> str:
    """The warning of a step whose responses the reference likes far better than the policy."""
    with pytest.warns(TrainingWarning) as told:
        step(trainer, responses=responses)
    return " ".join(str(warning.message) for warning in told)


def strict() -> PPOTrainer:
    """A trainer whose policy gives little to tokens 5 to 13, where its reference gives as much as to any."""
    reference = wrapped("llama")
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.pretrained_model.model.norm.weight.mul_(8.0)
    return made(policy, reference, learning_rate=1e-9)


def test_a_negative_kl_names_its_cause() -> None:
    trainer = strict()
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    with torch.no_grad():
        logprobs, _, _, mask = trainer.batched_forward_pass(trainer.model, QUERIES, RESPONSES, inputs)
        ref_logprobs = trainer.batched_forward_pass(trainer.ref_model, QUERIES, RESPONSES, inputs)[0]
    assert float(((logprobs - ref_logprobs) * mask).sum(1).mean()) < -1.0
    assert "no cause was found" in low_kl(strict(), RESPONSES) or "drawn otherwise" in low_kl(strict(), RESPONSES)
    padded = [torch.cat([response, torch.zeros(2).long()]) for response in RESPONSES]
    assert "go on after an EOS" in low_kl(strict(), padded)
    trainer.generate(QUERIES, do_sample=True, top_k=5, temperature=0.7, max_new_tokens=2)
    assert "top_k=5" in low_kl(trainer, RESPONSES)
    assert "return_prompt=False" in low_kl(
        strict(), [torch.cat([query, response]) for query, response in zip(QUERIES, RESPONSES, strict=True)]
    )


def test_a_reference_that_is_the_policy_and_a_slingshot_are_warned_of() -> None:
    model = wrapped()
    with pytest.warns(TrainingWarning, match="the policy's own"):
        made(model, model)
    with pytest.warns(TrainingWarning, match="pays for drifting"):
        made(init_kl_coef=-0.1)


def test_target_kl_is_not_the_target_and_says_so() -> None:
    with pytest.warns(UserWarning, match="target=6"):
        config = PPOConfig(target_kl=6.0)
    assert (config.target, config.target_kl) == (6.0, 6.0)
