"""A reward asked about a rollout or about texts, in the fullest way that it can answer.

    judges a rollout   its parts' numbers and token rewards too      `batch.py:JudgesRollouts`
    scores a rollout   token ids and the trunk's states reused       `batch.py:ScoresRollouts`
    anything else      prompts, responses and columns as texts       `batch.py:Reward`

Room 3 asks the whole reward; a sum or an ensemble asks each of its parts in the same way, so that a part which can read
rollouts does so wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tether.batch import JudgesRollouts, Prompt, Reward, Rollout, Scores, ScoresRollouts
from tether.reward_functions import FunctionReward, name_of
from tether.reward_numbers import numbers_of


def judge(reward: Reward, rollout: Rollout) -> Scores:
    """The reward's scores of a rollout, float64 on the CPU, with whatever else it says. Raises what `ask` raises."""
    if isinstance(reward, JudgesRollouts):
        return reward.judge_rollout(rollout)
    if isinstance(reward, ScoresRollouts):
        numbers = numbers_of(reward.score_rollout(rollout), len(rollout), name_of(reward))
    else:
        numbers = ask(reward, rollout.prompts.texts, rollout.texts, rollout.prompts.columns)
    return Scores(torch.tensor(numbers, dtype=torch.float64))


def ask(
    reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, Sequence[object]]
) -> list[float]:
    """The reward's scores of texts, one finite number a response.

    Raises InputError or NonFiniteError for what is no such number, RewardError where the reward fails.
    """
    function = reward if isinstance(reward, FunctionReward) else FunctionReward(reward)
    return function.scored(prompts, responses, columns)
