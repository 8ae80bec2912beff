"""The three rungs of the lesson: bandit (pure Python), plain and skeleton (the whole loop), library (TRL's surface)."""
