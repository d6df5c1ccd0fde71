"""Adding up states as they stand in JSON: as one after the other, and nothing where one of them is damaged."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp16_patch.mismatch.statistics.summary import MismatchStats


def state_of(seed: int, rows: int = 3, columns: int = 9) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sampler = -torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 8
    learner = sampler + torch.randn(sampler.shape, generator=generator, dtype=torch.float64) / 50
    learner[0, 0] = math.nan if seed % 2 else -1.0
    state: dict[str, Any] = json.loads(
        json.dumps(MismatchStats.from_log_probs(sampler, learner, torch.ones_like(sampler)).to_dict())
    )
    return state


def test_it_is_the_sum_of_all() -> None:
    states = [MismatchStats.empty().to_dict(), *map(state_of, range(6))]
    one_by_one = MismatchStats.merge_all(map(MismatchStats.from_dict, states))

    assert torch.allclose(MismatchStats.sum_of_dicts(states).vector, one_by_one.vector, rtol=1e-12, atol=1e-15)
    assert torch.equal(MismatchStats.sum_of_dicts(states[1:2]).vector, MismatchStats.from_dict(states[1]).vector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sum": math.nan}, "d_sum that no tokens can have"),
        ({"tokens": -4}, "tokens that no tokens can have"),
        ({"tokens": 26.5}, "counts that are not whole"),
        ({"tokens": 10**400}, "tokens that is not of numbers"),
        ({"d_abs_sum": "3"}, "d_abs_sum that is not of numbers"),
        ({"k3_sum": 1e300}, "k3_sum that no tokens can have"),
        ({"nonfinite_tokens": 28}, "more non-finite and weighed tokens than tokens"),
        ({"histogram": {"bins": [0], "counts": [99]}}, "a histogram of other than its"),
        ({"histogram": {"bins": [0], "counts": [-27]}}, "histogram that no tokens can have"),
        ({"histogram": []}, "histogram that is not of numbers"),
        ({"joint": {"cells": {}, "values": []}}, "joint that is not of numbers"),
        ({"joint": {"cells": [0.5], "values": [1]}}, "joint that is not of numbers"),
        ({"joint": {"cells": [2**70], "values": [1]}}, "joint outside 2116 cells"),
        ({"position_d": {"cells": [1], "values": [math.nan]}}, "position_d that no tokens can have"),
        ({"worst": [[0.0, 1.0, 2**63, 0, 0]]}, "worst that no tokens can have"),
        ({"worst": [[0.0, 1.0, 0.5, 0, 0]]}, "not whole"),
        ({"worst": {}}, "up to 16 rows of 5 numbers"),
        ({"worst": [[None, 1.0, 0, 0, 0]]}, "worst that is not of numbers"),
    ],
)
def test_a_state_that_no_tokens_can_have_is_refused(change: dict[str, Any], message: str) -> None:
    damaged = state_of(0) | change

    with pytest.raises(ValueError, match=message):
        MismatchStats.from_dict(damaged)
    with pytest.raises(ValueError, match="state"):
        MismatchStats.sum_of_dicts([state_of(1), damaged])


anything = st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=3) | st.just([])


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_both_ways_of_reading_refuse_the_same(data: st.DataObject) -> None:
    """One value of a state, at any depth, is replaced by anything."""
    state = copy.deepcopy(state_of(0, 1, 2))
    parent, key = state, data.draw(st.sampled_from(sorted(state)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        key = data.draw(st.sampled_from([*parent] if isinstance(parent, dict) else range(len(parent))))
    parent[key] = data.draw(anything)
    try:
        MismatchStats.from_dict(state)
    except ValueError:
        with pytest.raises(ValueError):
            MismatchStats.sum_of_dicts([state])
    else:
        assert MismatchStats.sum_of_dicts([state]).metrics()
