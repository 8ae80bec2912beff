"""tether: RLHF with PPO on the string of a KL penalty. Importing it loads nothing heavy."""

__version__ = "0.1.0"
