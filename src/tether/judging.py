"""A reward asked about a rollout or about texts, in the fullest way that it can answer.

    judges a rollout   its parts' numbers and token rewards too      `batch.py:JudgesRollouts`
    scores a rollout   token ids and the trunk's states reused       `batch.py:ScoresRollouts`
    anything else      prompts, responses and columns as texts       `batch.py:Reward`

Room 3 asks the whole reward; a sum or an ensemble asks each of its parts in the same way, so that a part which can read
rollouts does so wherever it stands. Of several processes each reads its share with a model; a function or an address is
asked once, by the first, with the whole batch, and so are workers that hold a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tether.batch import JudgesRollouts, Prompt, Reward, Rollout, Scores, ScoresRollouts
from tether.reward_functions import FunctionReward, name_of
from tether.reward_model import RewardModel
from tether.reward_numbers import numbers_of
from tether.runtime.ranks import ALONE, here


def judge(reward: Reward, rollout: Rollout) -> Scores:
    """The reward's scores of a rollout, float64 on the CPU, with whatever else it says. Raises what `ask` raises."""
    if isinstance(reward, JudgesRollouts):
        return reward.judge_rollout(rollout)
    if isinstance(reward, ScoresRollouts):
        return Scores(_shared_scores(reward, rollout))
    numbers = here().ask_first(lambda: ask(reward, rollout.prompts.texts, rollout.texts, rollout.prompts.columns))
    return Scores(torch.tensor(numbers, dtype=torch.float64))


def _shared_scores(reward: Reward, rollout: Rollout) -> Float[Tensor, "batch"]:
    """A model's scores: each process reads its share of the responses, or the first asks the workers that hold it."""
    assert isinstance(reward, ScoresRollouts)
    if isinstance(reward, RewardModel) and reward.scorer is not None:
        whole = here().ask_first(lambda: numbers_of(reward.score_rollout(rollout), len(rollout), name_of(reward)))
        return torch.tensor(whole, dtype=torch.float64)
    ranks = here() if len(rollout) >= here().count else ALONE
    part = rollout if ranks.count == 1 else rollout.rows(ranks.share(len(rollout)))
    numbers = ranks.together(lambda: numbers_of(reward.score_rollout(part), len(part), name_of(reward)))
    return ranks.whole(torch.tensor(numbers, dtype=torch.float64), len(rollout))


def ask(
    reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, Sequence[object]]
) -> list[float]:
    """The reward's scores of texts, one finite number a response.

    Raises InputError or NonFiniteError for what is no such number, RewardError where the reward fails.
    """
    function = reward if isinstance(reward, FunctionReward) else FunctionReward(reward)
    return function.scored(prompts, responses, columns)
