"""How pytest-xdist hands out tests: a group to a process, and what is left of it to the next, should that one die."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class Groups(LoadScopeScheduling):
    """xdist's own, but for the groups and for a process that dies.

    There, xdist hands the test that killed it to the next process, too; and where a group is done already, it waits
    for reports that never come.

    Args:
        group_of: a test's group, by its id.
    """

    def __init__(self, group_of: Callable[[str], str], config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        self._group_of = group_of

    def _split_scope(self, nodeid: str) -> str:
        return self._group_of(nodeid)

    def _reschedule(self, node: Any) -> None:
        # One that stands in for a dead one has yet to collect its tests.
        if node in self.registered_collections:
            super()._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        left = {
            group: [nodeid for nodeid, is_done in tests.items() if not is_done]
            for group, tests in self.assigned_work.pop(node).items()
        }
        running = next((tests.pop(0) for tests in left.values() if tests), None)
        self.workqueue.update({group: dict.fromkeys(tests, False) for group, tests in left.items() if tests})
        if running is not None:
            for other in self.nodes:
                self._reschedule(other)
        return running
