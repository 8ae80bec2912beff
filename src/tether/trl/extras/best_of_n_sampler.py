"""Best-of-n: n responses of the frozen model to each query, the best by their scores.

Its KL to the model is at most log n − (n − 1)/n nats, so every PPO run should be held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.errors import InputError
from tether.trl.core import set_seed
from tether.trl.models import SUPPORTED_ARCHITECTURES, PreTrainedModelWrapper


class BestOfNSampler:
    """Samples `sample_size` texts a query and keeps the `n_candidates` that score highest, best first."""

    def __init__(
        self,
        model: PreTrainedModelWrapper,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], Sequence[float]],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: Any = None,
    ) -> None:
        if seed is not None:
            set_seed(seed)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(f"tokenizer is a {type(tokenizer).__name__}; wanted one of transformers")
        if not isinstance(model, SUPPORTED_ARCHITECTURES):
            raise InputError(f"model is a {type(model).__name__}; wanted AutoModelForCausalLMWithValueHead")
        if n_candidates > sample_size:
            raise InputError(
                f"n_candidates is {n_candidates} and sample_size {sample_size}; wanted no more than sampled"
            )
        self.model, self.tokenizer = model, tokenizer
        self.queries_to_scores, self.length_sampler = queries_to_scores, length_sampler
        self.sample_size, self.n_candidates, self.gen_config = sample_size, n_candidates, generation_config

    def generate(
        self,
        tokenized_query: Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        device: str | torch.device | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """For each query its best texts, query and response together, as the scores were asked of them."""
        return [self._best(query, skip_special_tokens, device, generation_kwargs) for query in rows_of(tokenized_query)]

    def _best(
        self, query: Tensor, skip_special_tokens: bool, device: str | torch.device | None, options: dict[str, Any]
    ) -> list[str]:
        repeated = query.repeat(self.sample_size, 1).to(device or self.model.pretrained_model.device)
        options = {"attention_mask": torch.ones_like(repeated), **options}
        output = self.model.generate(
            repeated, max_new_tokens=self.length_sampler(), generation_config=self.gen_config, **options
        )
        texts: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=skip_special_tokens)
        scores = torch.as_tensor(self.queries_to_scores(texts), dtype=torch.float32).flatten()
        return [texts[place] for place in scores.topk(self.n_candidates).indices.tolist()]


def rows_of(queries: Tensor | Sequence[Any]) -> list[Tensor]:
    """One query or several, as tensors or lists of ids, each as one row of ids."""
    if isinstance(queries, Tensor):
        return [queries] if queries.ndim == 1 else list(queries)
    if not len(queries):
        raise InputError("got no query; wanted at least one")
    if isinstance(queries[0], int):
        return [torch.tensor(queries)]
    return [torch.as_tensor(query).flatten() for query in queries]
