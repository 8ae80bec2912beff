"""Room 3: responses → one score each, by whatever the user holds to be good.

A reward is any callable `(prompts, responses, **columns) -> one number a response`. It does not know the policy, the
reference or β: the string is put on in room 4. Read next: `judging.py`, how a reward is asked.
"""

from __future__ import annotations

import time
from dataclasses import replace

from tether.batch import Reward, Rollout, Scores
from tether.judging import judge


def score(reward: Reward, rollout: Rollout) -> Scores:
    """One score a response, [batch] float32, in the reward's own unit; token rewards beside it where it gives any.

    The metrics are of the totals, Σ_t token reward + score, which is the score itself where there are no token rewards.

    Raises InputError where the reward gives another number of scores than responses or something that is no number,
    NonFiniteError where one is NaN or infinite, each naming the row; RewardError where the reward itself fails.
    """
    started = time.perf_counter()
    given = judge(reward, rollout)
    spread = float(given.totals.std(correction=0))
    metrics = {
        **given.metrics,
        "score/mean": float(given.totals.mean()),
        "score/std": spread,
        "score/se": spread / max(len(rollout) - 1, 1) ** 0.5,
        "seconds/score": time.perf_counter() - started,
    }
    tokens, place = given.token_rewards, rollout.logprobs.device
    if tokens is not None:
        metrics["score/token_rewards"] = float(tokens.sum(dim=1).mean())
        tokens = tokens.float().to(place)
    return replace(given, scores=given.scores.float().to(place), metrics=metrics, token_rewards=tokens)
