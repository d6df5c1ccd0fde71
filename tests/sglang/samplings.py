"""What `engine.py` samples, and `test_engine.py` scores: as a request has it, all at one temperature, as in a run."""

from __future__ import annotations

PROMPT = [5, 17, 3, 42, 8]
SAMPLINGS: dict[str, dict[str, float]] = {
    "whole": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.5},
    "top_k": {"temperature": 0.7, "top_k": 4},
}
