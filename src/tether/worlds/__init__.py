"""Worlds small enough to know the truth in: exact (the optimum is computed) and nano (the gold reward is known)."""
