"""One test for each fault of TRL 0.11.4 that `tether.trl` mends; `docs/trl.md` lists them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tether.errors import RunError
from tether.trl.core import entropy_from_logits
from tolerances import ROUND_OFF, assert_close
from trl_parts import QUERIES, RESPONSES, SCORES, lora, made, moved, step, weights, wrapped


def sgd(model: Any, lr: float = 1.0) -> dict[str, Any]:
    return {"optimizer": torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=lr)}


def distance(before: dict[str, torch.Tensor], model: Any) -> float:
    """Length of the way that the weights went."""
    return float(sum(((weight.detach() - before[name]) ** 2).sum() for name, weight in model.named_parameters()) ** 0.5)


def test_max_grad_norm_holds_in_every_step() -> None:
    model = wrapped()
    trainer = made(model, extras=sgd(model), max_grad_norm=1e-3, ppo_epochs=1, mini_batch_size=2)
    for _ in range(3):
        before = weights(model)
        step(trainer)
        assert distance(before, model) <= 1.01e-3


@contextmanager
def layer_calls(model: Any) -> Iterator[list[bool]]:
    """How often the first layer was computed with a gradient in mind, and whether any dropout was on."""
    calls: list[bool] = []
    layer = model.pretrained_model.transformer.h[0]
    inner = layer.attn.register_forward_pre_hook(
        lambda module, *_: calls.append(module.training) if torch.is_grad_enabled() else None
    )
    yield calls
    inner.remove()


def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing() -> None:
    kept = {}
    for on in (False, True):
        model = wrapped()
        trainer = made(model, gradient_checkpointing=on, ppo_epochs=1)
        with layer_calls(model) as calls:
            stats = step(trainer)
        kept[on] = (calls, stats, weights(model))
    assert (len(kept[False][0]), len(kept[True][0])) == (2, 4)  # two minibatches
    assert not any(kept[True][0])  # never in training mode: no dropout
    assert np.allclose(kept[True][1]["ppo/policy/ratio"][0], 1.0, atol=1e-5)
    for name, weight in kept[True][2].items():
        assert_close(weight, kept[False][2][name], ROUND_OFF)


def test_scores_are_scaled_by_all_that_were_seen() -> None:
    trainer = made(use_score_scaling=True, use_score_norm=True, ppo_epochs=1)
    seen: list[float] = []
    for scores in ([1.0, 5.0], [-2.0, 7.0]):
        stats = step(trainer, scores=[torch.tensor(score) for score in scores])
        seen += scores
        wanted = (np.array(scores) - np.mean(seen)) / np.std(seen, ddof=1)
        assert stats["ppo/mean_scores"] == pytest.approx(wanted.mean(), rel=1e-5)
        assert stats["ppo/std_scores"] == pytest.approx(wanted.std(ddof=1), rel=1e-5)


def test_a_minibatch_over_the_ratio_threshold_moves_no_weight() -> None:
    trainer = made(ppo_epochs=1)
    step(trainer)  # fills Adam's momentum
    trainer.config.ratio_threshold = 0.5
    before = weights(trainer.model)
    with pytest.warns(UserWarning, match="left out"):
        stats = step(trainer)
    assert moved(before, trainer.model) == set()
    assert stats["ppo/loss/total"] == 0.0


def test_with_adapters_the_reference_s_responses_are_of_the_model_without_them() -> None:
    trainer = made(lora())
    options = {"do_sample": False, "max_new_tokens": 6, "return_prompt": False}
    _, reference = trainer.generate(QUERIES, generate_ref_response=True, **options)
    plain = made(wrapped("llama")).generate(QUERIES, **options)
    adapted = trainer.generate(QUERIES, **options)
    assert all(torch.equal(a, b) for a, b in zip(reference, plain, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(reference, adapted, strict=True))


def test_an_eos_in_the_query_cuts_nothing() -> None:
    trainer = made()
    query = torch.tensor([3, 0, 4])
    options = {"do_sample": False, "max_new_tokens": 5}
    (whole,) = trainer.generate([query], **options)
    (response,) = trainer.generate([query], return_prompt=False, **options)
    assert torch.equal(whole, torch.cat([query, response]))
    assert len(response) >= 1


def test_accumulation_goes_on_in_a_loader_s_last_batch() -> None:
    ends = []
    for inside in (False, True):
        model = wrapped()
        data = [{"place": 0}, {"place": 1}]
        extras = sgd(model, 0.1) | {"dataset": torch.utils.data.StackDataset(data), "data_collator": lambda rows: rows}
        trainer = made(model, extras=extras, gradient_accumulation_steps=2, ppo_epochs=1)
        for _ in trainer.dataloader if inside else [None]:
            step(trainer)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_accumulated_gradients_count_tokens_not_minibatches() -> None:
    lengths = [torch.tensor([5, 6, 7, 8, 9, 10, 11, 12]), torch.tensor([9])]
    ends = []
    for sizes in ({"mini_batch_size": 2}, {"mini_batch_size": 1, "gradient_accumulation_steps": 2}):
        model = wrapped()
        step(made(model, extras=sgd(model), ppo_epochs=1, **sizes), responses=lengths)
        ends.append(weights(model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-6, atol=1e-6)


def test_entropy_keeps_no_graph_and_is_exact() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = entropy_from_logits(logits)
    assert not got.requires_grad
    assert_close(got, torch.distributions.Categorical(logits=logits).entropy().detach(), ROUND_OFF)


def test_entropy_makes_no_second_tensor_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.log_softmax
    monkeypatch.setattr("tether.trl.core.CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(
        torch.nn.functional, "log_softmax", lambda x, **o: (seen.append(x.numel()), original(x, **o))[1]
    )
    entropy_from_logits(torch.zeros(4, 10, 16))
    gc.collect()
    assert max(seen) <= 64


def test_an_empty_response_trains_nothing_and_stops_nothing() -> None:
    trainer = made()
    stats = step(trainer, responses=[RESPONSES[0], torch.tensor([]).long()])
    assert all(np.all(np.isfinite(stats[name])) for name in stats if name not in ("ppo/val/var_explained",))
    assert list(stats["tokens/responses_dist"]) == [5.0, 0.0]
    before = weights(trainer.model)
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    step(made(), responses=[torch.tensor([]).long(), torch.tensor([]).long()])
    assert moved(before, trainer.model) == set()
    assert optimizer["state"]


def test_rows_padded_on_the_left_are_read_at_their_own_positions() -> None:
    ends = []
    for side in ("left", "right"):
        model = wrapped("gpt2")
        step(made(model, side=side, extras=sgd(model, 0.05), mini_batch_size=2))
        ends.append(weights(model))
    for name, weight in ends[0].items():
        assert_close(weight, ends[1][name], ROUND_OFF)


def test_a_trainer_goes_on_from_its_state_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    knobs = {"use_score_scaling": True, "target": 0.01, "horizon": 10}

    def fresh() -> Any:
        model = wrapped()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return made(model, extras={"optimizer": optimizer, "lr_scheduler": schedule}, **knobs)

    whole = fresh()
    step(whole, scores=[SCORES[1], SCORES[0]])
    whole.save_state(tmp_path)
    wanted = step(whole)
    again = fresh()
    again.load_state(tmp_path)
    got = step(again)
    assert [n for n in wanted if not n.startswith("time/") and np.any(got[n] != wanted[n])] == []
    assert moved(weights(whole.model), again.model) == set()
    assert again.kl_ctl.value == whole.kl_ctl.value
    with pytest.raises(RunError, match="save_state"):
        again.load_state(tmp_path / "nowhere")
