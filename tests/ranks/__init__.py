"""Ranks of a learner, forked from a process that has imported torch and all that is slow to import."""
