"""Room 2: prompts → responses, with what the policy, its value head and its reference say of every token.

The sampler draws; then one pass of the policy and one of the reference recompute the log-probabilities that the
update and the string stand on. It knows nothing of scores.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.batch import Evaluation, Generation, Policy, Prompts, ReferenceEvaluation, Rollout, Sequences
from tether.config import SamplingSettings
from tether.numerics import kl_k3, masked_mean, truncated_weights
from tether.text_stats import distinct_pairs


@torch.no_grad()
def sample(
    policy: Policy, prompts: Prompts, uniforms: Float[Tensor, "batch response"], settings: SamplingSettings
) -> Rollout:
    """One response a prompt, drawn at the settings' temperature by the inverse CDF at `uniforms`.

    All per-token results are [batch, response] in nats, right-padded, 0 where masked, and free of gradients.
    """
    started = time.perf_counter()
    generation = policy.generate(prompts, uniforms, settings.temperature).trimmed()
    generated = time.perf_counter()
    sequences = policy.prepare(Sequences.join(prompts, generation, pad=0))
    evaluation = policy.evaluate(sequences, settings.temperature)
    reference = policy.evaluate_reference(sequences, settings.temperature)
    cap = settings.importance_cap
    weights = _weights(generation, evaluation, cap)
    seconds = {
        "seconds/generate": generated - started,
        "seconds/reference": time.perf_counter() - generated,
        "tokens/generated": float(generation.response_mask.sum()),
    }
    return Rollout(
        prompts=prompts,
        sequences=sequences,
        texts=tuple(policy.decode(generation.responses, generation.response_mask)),
        logprobs=evaluation.logprobs,
        sampler_logprobs=generation.sampler_logprobs,
        ref_logprobs=reference.logprobs,
        values=evaluation.values,
        entropy=evaluation.entropy,
        full_kl=reference.full_kl,
        finished=generation.finished,
        metrics=seconds
        | _measure(generation, evaluation, reference)
        | _measure_writer(generation, evaluation, weights, cap),
        kl_values=evaluation.kl_values,
        origin=generation.origin,
        weights=weights,
    )


def _weights(
    generation: Generation, evaluation: Evaluation, cap: float | None
) -> Float[Tensor, "batch response"] | None:
    """min(π/q, cap) where the responses are not quite the policy's own."""
    if generation.origin.is_exact or cap is None:
        return None
    return truncated_weights(evaluation.logprobs, generation.sampler_logprobs, generation.response_mask, cap)


def _measure_writer(
    generation: Generation,
    evaluation: Evaluation,
    weights: Float[Tensor, "batch response"] | None,
    cap: float | None,
) -> dict[str, float]:
    """Whose the responses are and how far q is from π, where it may not be π itself."""
    origin, mask = generation.origin, generation.response_mask
    if origin.is_exact:
        return {}
    gap = (generation.sampler_logprobs - evaluation.logprobs).double().pow(2)
    told = {
        "rollout/version": float(origin.version),
        "rollout/staleness": float(origin.staleness),
        "sampler/logprob_gap": float(masked_mean(gap, mask).sqrt()),
    }
    if weights is None or cap is None:
        return told
    return told | {
        "sampler/weight_mean": float(masked_mean(weights.double(), mask)),
        "sampler/weight_capped": float(masked_mean((weights >= cap).double(), mask)),
    }


def _measure(generation: Generation, evaluation: Evaluation, reference: ReferenceEvaluation) -> dict[str, float]:
    """The string's state before this update: K and its standard error, entropy, lengths, diversity."""
    mask = generation.response_mask
    kl = torch.where(mask, evaluation.logprobs - reference.logprobs, 0.0).sum(dim=1).double()
    k3 = torch.where(mask, kl_k3(evaluation.logprobs, reference.logprobs), 0.0).sum(dim=1)
    lengths = mask.sum(dim=1).double()
    spread = float(kl.std(correction=0))
    return {
        "kl/mean": float(kl.mean()),
        "kl/std": spread,
        "kl/se": spread / max(len(kl) - 1, 1) ** 0.5,
        "kl/per_token": float(kl.sum() / lengths.sum()),
        "kl/k3": float(k3.mean()),
        "kl/full": float(reference.full_kl.sum(dim=1).mean()),
        "entropy/per_token": float(masked_mean(evaluation.entropy, mask)),
        "length/mean": float(lengths.mean()),
        "length/std": float(lengths.std(correction=0)),
        "finished/share": float(generation.finished.double().mean()),
        "distinct_2": distinct_2(generation.responses, mask),
    }


def distinct_2(responses: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> float:
    """Distinct pairs of neighbouring tokens over all such pairs of the batch, in [0, 1]; 1 where there is no pair.

    It falls as the batch grows, so compare it at equal token counts only. Li et al. 2016.
    """
    return distinct_pairs([row[real].cpu().numpy() for row, real in zip(responses, mask, strict=True)])
