"""What a YAML file or the command line can say of a reward. Knows no torch; `open_reward.py` makes a reward of it.

reward: org/reward-model                       a classifier: folder or hub name
reward: my_rewards.py:brevity                  a function, or any reward object, of a file or a module
reward: https://judge.example/score            a server
reward: {parts: {quality: org/reward-model, brevity: {source: my_rewards.py:brevity, weight: 0.3}}}
reward: {ensemble: [org/a, org/b, org/c], ensemble_by: min}
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RewardPart(BaseModel):
    """One part of a weighted sum."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str = Field(description="Classifier, function or address, as `source` of the whole reward")
    weight: float = Field(1.0, description="What its scores are multiplied by; below 0 makes a cost of it")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given


class RewardSpec(BaseModel):
    """Where the score comes from: exactly one of `source`, `parts` and `ensemble`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str | None = Field(
        None, description="Classifier (folder, hub name), function (file.py:name, module:name), http(s) URL or .jsonl"
    )
    parts: dict[str, RewardPart] = Field({}, description="Several rewards by name, each a source with its weight")
    ensemble: tuple[str, ...] = Field((), description="Several sources that judge the same thing")
    ensemble_by: Literal["mean", "min", "variance"] = Field("mean", description="How an ensemble becomes one score")
    ensemble_penalty: float = Field(0.1, ge=0, description="λ of `variance`: mean − λ·variance, in 1/score")
    per_token: bool = Field(False, description="The function gives a list a response: one number a token")
    timeout_seconds: float | None = Field(
        None, gt=0, description="Limit of a function's call or of one try at a URL; null = none, and 60 for a URL"
    )
    retries: int = Field(4, ge=0, description="Further tries at a URL that does not answer")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one(self) -> RewardSpec:
        said = [name for name in ("source", "parts", "ensemble") if getattr(self, name)]
        if len(said) != 1:
            got = " and ".join(said) or "neither"
            raise ValueError(f"a reward is given by {got}; wanted exactly one of source, parts, ensemble")
        if len(self.ensemble) == 1:
            raise ValueError("the ensemble has 1 member; wanted two or more, or source")
        if self.per_token and not self.source:
            raise ValueError("per_token is of a single function; wanted source, or TokenRewards in Python")
        return self
