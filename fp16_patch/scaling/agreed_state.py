"""The saved state that a resumed run goes on with: the same on every rank."""

from __future__ import annotations

from fp16_patch.scaling.ranks import gather
from fp16_patch.scaling.saved_state import SavedState


def agree(own: SavedState) -> tuple[SavedState, bool]:
    """Return the state that every rank goes on with, and whether ranks have found different ones.

    With different scales they would add up gradients of different size. Scaler and history are those of the lowest rank
    that found them; the problems are all ranks'. All ranks have to call it, whatever they have found.
    """
    of_ranks = gather(own)
    scalers = [state.scaler for state in of_ranks if state.scaler is not None]
    histories = [state.history for state in of_ranks if state.history is not None]
    problems = {what: why for state in of_ranks for what, why in state.problems.items()}
    differ = any(one != scalers[0] for one in scalers) or any(one != histories[0] for one in histories)
    return SavedState(scalers[0] if scalers else None, histories[0] if histories else None, problems), differ
