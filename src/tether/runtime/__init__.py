"""Who does the rooms' work: one process."""
