"""TRL's classic trainer: `generate` responses, score them as you like, `step`.

    responses = trainer.generate(queries, return_prompt=False, **sampling)
    stats     = trainer.step(queries, responses, scores)

One `step`: scores, scaled where asked → passes of policy and reference without gradient → per-token rewards
−β·KL + score → advantages → `ppo_epochs` × minibatches → β's controller. Each part is a method, with TRL's arguments
and shapes, that a subclass may replace. Formulas: `losses.py`; numbers: `statistics.py`; checks: `watching.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.trl.core import PPODecorators, convert_to_scalar, logprobs_from_logits, set_seed, stats_to_np
from tether.trl.models import PreTrainedModelWrapper
from tether.trl.trainer import losses, setup, statistics
from tether.trl.trainer.base import BaseTrainer
from tether.trl.trainer.batches import Batch, checked
from tether.trl.trainer.generation import Asked, one_row, respond
from tether.trl.trainer.passes import PadRows, Passes, forward
from tether.trl.trainer.ppo_config import PPOConfig
from tether.trl.trainer.utils import AdaptiveKLController, FixedKLController, RunningMoments
from tether.trl.trainer.watching import Watch


class PPOTrainer(BaseTrainer):
    """PPO on queries, responses and scores that the caller brings."""

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: torch.utils.data.Dataset | Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """`ref_model=None`: a frozen copy of the model, or with PEFT the model with its adapters off.

        `dataset` fills `self.dataloader` with batches of `config.batch_size`; `data_collator` is the loader's,
        `training_data_collator` pads queries with responses. Raises ValueError where an argument is of another kind.
        """
        config, model, tokenizer = setup.checked(config, model, ref_model, tokenizer, dataset, lr_scheduler)
        set_seed(config.seed)
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self.is_peft_model, self.is_encoder_decoder = model.is_peft_model, False
        self.accelerator = setup.accelerator(config)
        self.is_distributed = self.accelerator.num_processes > 1
        self.ref_model = self._reference(ref_model, num_shared_layers)
        self.optional_peft_ctx = model.pretrained_model.disable_adapter if self.is_peft_model else nullcontext
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self.data_collator = training_data_collator or PadRows(tokenizer)
        self.optimizer = optimizer or torch.optim.Adam(setup.trained(model), lr=config.learning_rate)
        self.lr_scheduler = lr_scheduler
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self._prepare()
        self.current_device, self.current_step = self.accelerator.device, 0
        adaptive = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.kl_ctl = adaptive if config.adap_kl_ctrl else FixedKLController(config.init_kl_coef)
        self.running = RunningMoments(self.accelerator)
        self.highest_reward, self.compare_step = -float("inf"), 0
        self._weight, self._contributed, self._watch = 1.0, False, Watch(tokenizer)
        self._watch.start(model, self.ref_model, config.init_kl_coef)

    # ── responses ───────────────────────────────────────────────────────────────────────────────────────────────────
    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses: a list for a list of queries, [1, L] for a single query [L].

        A listed response is cut after its first EOS; the query comes first unless `return_prompt=False`, as `step`
        wants it. `length_sampler()` gives `max_new_tokens` of each chunk of `batch_size` queries. With
        `generate_ref_response` the result is (responses, the reference's responses). Raises ValueError for a batch in
        one tensor.
        """
        self._watch.options = dict(generation_kwargs)
        padding = {name: generation_kwargs.pop(name) for name in ("remove_padding", "pad_to_multiple_of")
                   if name in generation_kwargs}  # fmt: skip
        single = isinstance(query_tensor, Tensor)
        queries = [one_row(query_tensor, "the query")] if isinstance(query_tensor, Tensor) else query_tensor
        if single:
            padding["remove_padding"] = False
        asked = Asked(self.tokenizer, length_sampler, return_prompt, options=generation_kwargs, **padding)

        def answers(model: Any) -> Any:
            unwrapped = self.accelerator.unwrap_model(model).eval()
            given = respond(unwrapped, queries, asked, batch_size, self.current_device)
            return given[0][None] if single else given

        responses = answers(self.model)
        if not generate_ref_response:
            return responses
        with self.optional_peft_ctx():
            return responses, answers(self.model if self.is_peft_model else self.ref_model)

    # ── one update ──────────────────────────────────────────────────────────────────────────────────────────────────
    @PPODecorators.empty_device_cache()
    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO update; returns TRL's statistics.

        Lists of `batch_size` tensors: ids of queries and responses, one score a response, and where some tokens of a
        response were not the policy's own (a tool's output), masks with 0 on them. Raises ValueError where they do not
        fit, NonFiniteError where a score is no number.
        """
        self.config.check_batches()
        queries, responses, scores, response_masks = self._step_safety_checker(
            self.config.batch_size, queries, responses, scores, response_masks
        )
        times = setup.Clock()
        scaled = self._scaled(torch.stack(scores))
        self._push_if_best(scaled)
        batch = self._roll_out(queries, responses, scaled, response_masks, times)
        train_stats = self._train(batch)
        times.mark("optimize_step")
        stats = stats_to_np(self._record(batch, train_stats))
        times.mark("calc_stats")
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_ctl.update(float(stats["objective/kl"]), self.config.batch_size * self.accelerator.num_processes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        stats |= times.marks | {"time/ppo/total": times.total()}
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def _step_safety_checker(
        self,
        batch_size: int | None,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        masks: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """The arguments of `step` as rows and single numbers on the device. Raises ValueError where they do not fit."""
        return checked(batch_size, queries, responses, scores, masks, self.current_device)

    def _scaled(self, scores: Tensor) -> Tensor:
        if self.config.use_score_scaling:
            self.running.update(scores)
            scores = self.running.scale(scores, center=self.config.use_score_norm)
        clip = self.config.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    @torch.no_grad()
    def _roll_out(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: Tensor,
        response_masks: list[Tensor] | None,
        times: setup.Clock,
    ) -> Batch:
        """What policy and reference say of the responses, the rewards, the advantages."""
        full = self.config.kl_penalty == "full"
        inputs = dict(self.prepare_model_inputs(queries, responses))
        logprobs, logits, values, masks = self.batched_forward_pass(
            self.model, queries, responses, inputs, return_logits=full, response_masks=response_masks
        )
        with self.optional_peft_ctx():
            reference = self.model if self.is_peft_model else self.ref_model
            ref_logprobs, ref_logits, _, _ = self.batched_forward_pass(
                reference, queries, responses, inputs, return_logits=full
            )
        times.mark("forward_pass")
        kl = float(((logprobs - ref_logprobs) * masks).sum(dim=1).mean())
        self._watch.look(self.model, queries, responses, kl, ref_logprobs, masks)
        if logits is not None and ref_logits is not None:
            every, ref_every = (logprobs_from_logits(one, None, gather=False) for one in (logits, ref_logits))
            rewards, non_score, kls = self.compute_rewards(scores, every, ref_every, masks)
        else:
            rewards, non_score, kls = self.compute_rewards(scores, logprobs, ref_logprobs, masks)
        times.mark("compute_rewards")
        values, advantages, returns = self.compute_advantages(values, rewards, masks)
        times.mark("compute_advantages")
        return Batch(
            queries, responses, inputs, scores, logprobs.float(), ref_logprobs, values.float(), masks,
            non_score, kls, advantages, returns,
        )  # fmt: skip

    def _train(self, batch: Batch) -> dict[str, Tensor]:
        """The epochs: minibatches in a new order each, several to an optimiser step where gradients accumulate."""
        config, all_stats = self.config, list[Mapping[str, Tensor]]()
        setup.accumulate_over(self.accelerator, config.gradient_accumulation_steps)
        self._contributed = False
        for _ in range(config.ppo_epochs):
            order = np.random.permutation(config.batch_size)
            for rows, weight in self._minibatches(batch, order):
                with self.accelerator.accumulate(self.model):
                    self._weight = weight
                    all_stats.append(self._train_rows(batch.rows(rows)))
            self._weight = 1.0
            if self._early_stop(all_stats[-1]["policy/policykl"]):
                break
        return statistics.joined(all_stats)

    def _minibatches(self, batch: Batch, order: np.ndarray) -> Iterator[tuple[list[int], float]]:
        """Rows of each minibatch, and its share of the optimiser step's tokens times the number of its minibatches.

        Weighted so, accumulated gradients are those of one large minibatch, whatever the lengths of its responses.
        """
        tokens = batch.masks.sum(dim=1).cpu().numpy()
        for rows in order.reshape(-1, self.config.gradient_accumulation_steps, self.config.mini_batch_size):
            whole = tokens[rows].sum()
            for part in rows:
                yield part.tolist(), float(tokens[part].sum() * len(rows) / whole) if whole else 1.0

    def _train_rows(self, rows: Batch) -> dict[str, Tensor]:
        logprobs, logits, values, _ = self.batched_forward_pass(
            self.model, rows.queries, rows.responses, rows.model_inputs, return_logits=True
        )
        assert logits is not None
        return self.train_minibatch(
            rows.logprobs, rows.values, logprobs, logits, values, rows.masks, rows.advantages, rows.returns
        )

    @PPODecorators.empty_device_cache()
    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logprobs: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> dict[str, Tensor]:
        """Losses and gradients of a minibatch, and the optimiser's step where it is the last of its accumulation.

        A minibatch out of range adds no gradient; an optimiser step to which none was added is not taken.
        """
        loss_p, loss_v, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        if not self._out_of_range(logprobs, old_logprobs, mask):
            self.accelerator.backward((loss_p + loss_v) * self._weight)
            self._contributed = True
        if self.accelerator.sync_gradients:
            if self.config.max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            if self._contributed:
                self.optimizer.step()
            self._contributed = False
        self.optimizer.zero_grad()
        return stats

    def _out_of_range(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> bool:
        out = losses.is_out_of_range(logprobs, old_logprobs, mask, self.config.ratio_threshold)
        if self.is_distributed:
            out = bool(self.accelerator.gather(torch.tensor([out], device=self.current_device)).any())
        return out

    def _early_stop(self, policykl: Tensor) -> bool:
        """Whether the remaining epochs are left out: −E[log ratio] exceeds 1.5·target_kl."""
        if not self.config.early_stopping:
            return False
        if self.is_distributed:
            policykl = self.accelerator.reduce(policykl, "mean")
        return bool(policykl > 1.5 * self.config.target_kl)

    # ── the parts, callable by themselves ───────────────────────────────────────────────────────────────────────────
    def prepare_model_inputs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Any:
        """Query and response as one row each, padded: `input_ids` and `attention_mask`, [batch, T]."""
        rows = [torch.cat([query, response]) for query, response in zip(queries, responses, strict=True)]
        inputs = self.data_collator([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
        inputs.pop("labels", None)
        return inputs.to(self.current_device)

    @PPODecorators.empty_device_cache()
    def batched_forward_pass(
        self,
        model: Any,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> Passes:
        """(logprobs, logits or None, values, masks), [batch, T − 1], `mini_batch_size` rows at a time, dropout off."""
        chunk = self.config.mini_batch_size
        return forward(model, queries, responses, model_inputs, chunk, return_logits, response_masks)

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rewards, −β·kl, kl): −β·kl on every position, and the score on the last one of the mask."""
        kls = self._kl_penalty(logprobs, ref_logprobs)
        non_score_rewards = -self.kl_ctl.value * kls
        return non_score_rewards + losses.last_token_scores(scores, masks), non_score_rewards, kls

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        return losses.kl_penalty(self.config.kl_penalty, logprob, ref_logprob)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(values, advantages, returns): GAE over the padded length; advantages whitened, returns not."""
        return losses.advantages_of(values, rewards, mask, self.config)

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(policy loss, vf_coef · value loss, numbers). Both losses are 0 where the minibatch is out of range."""
        batch = losses.Minibatch(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        policy, value = losses.losses(batch, self.config)
        if self._out_of_range(logprobs, old_logprobs, mask):
            ratio, threshold = float(batch.mean(batch.ratio.detach())), self.config.ratio_threshold
            warnings.warn(f"the mean ratio of a minibatch is {ratio:.2f}, above {threshold:g}: it is left out",
                          stacklevel=3)  # fmt: skip
            policy, value = policy * 0.0, value * 0.0
        return policy, self.config.vf_coef * value, losses.measure(batch, policy, value, self.config)

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """The batch's numbers by TRL's names, from the tensors that `step` has: see `statistics.Seen`."""
        return statistics.record(statistics.Seen(**data), kl_coef)

    def _record(self, batch: Batch, train_stats: Mapping[str, Tensor]) -> dict[str, Any]:
        stats = self.record_step_stats(
            self.kl_ctl.value, scores=batch.scores, logprobs=batch.logprobs, ref_logprobs=batch.ref_logprobs,
            non_score_reward=batch.non_score_reward, train_stats=train_stats, masks=batch.masks,
            queries=batch.queries, responses=batch.responses, kls=batch.kls,
        )  # fmt: skip
        return self.gather_stats(stats) if self.is_distributed else stats
