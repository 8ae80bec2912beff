"""TRL's extras that go with PPO: best-of-n, the baseline that needs no training."""

from tether.trl.extras.best_of_n_sampler import BestOfNSampler

__all__ = ["BestOfNSampler"]
