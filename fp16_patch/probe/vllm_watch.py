"""What the probe asks of a vLLM worker: `worker_extension_cls` mixes this into its class."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fp16_patch.probe.watching import GENERATION, RangeWatch
from fp16_patch.runtime.gemm_sums import SumsInFP32


class RangeWatchExtension:
    """Methods for `LLM.collective_rpc`."""

    model_runner: Any

    def hold_sums(self) -> None:
        """Add up products in FP32, as a run under a plan does."""
        SumsInFP32().hold()

    def start_range_watch(self) -> None:
        self._range_watch = RangeWatch(self.model_runner.model)
        self._watching = ExitStack()
        self._watching.enter_context(self._range_watch.during(GENERATION))

    def stop_range_watch(self) -> list[dict[str, Any]]:
        """Return the ranges that were seen since, as JSON has them."""
        self._watching.close()
        return [{"site": list(site), "range": seen.as_dict()} for site, seen in self._range_watch.ranges().items()]
