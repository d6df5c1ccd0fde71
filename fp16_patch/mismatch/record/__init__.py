"""The files a run leaves: one JSON line a step, read back whole or as they grow."""
