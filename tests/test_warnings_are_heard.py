"""What a library that a test imports does to everybody's log keeps no later test from hearing our warnings."""

from __future__ import annotations

import logging

import pytest

logger = logging.getLogger("fp16_patch.heard")


@pytest.mark.parametrize("silenced_before", [False, True])
def test_a_warning_is_heard_after_a_test_whose_import_silenced_the_log(
    silenced_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logger.warning("heard")
    assert caplog.messages == ["heard"]
    # As `model_hosting_container_standards`, which vLLM imports; the second case runs after it.
    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    for handler in root.handlers:
        handler.setLevel(logging.ERROR)
    logger.disabled = True
    logging.disable(logging.ERROR)
