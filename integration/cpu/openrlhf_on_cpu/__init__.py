"""OpenRLHF on a machine without an accelerator: what the hardware would have supplied, and nothing else.

OpenRLHF has no plugin mechanism, so ``startup/`` goes on ``PYTHONPATH`` and every Python process imports this as it
starts: driver, Ray workers, vLLM's engine and workers. Nothing is imported for it; each shim waits for its module. None
touches a dtype, a loss scale or a metric: what stock OpenRLHF does there stays visible.
"""

from openrlhf_on_cpu import accelerator, attention, cluster, device, kernels, sampler, weight_sync

for concern in (accelerator, attention, cluster, device, kernels, sampler, weight_sync):
    concern.install()
