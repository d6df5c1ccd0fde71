"""verl on a machine without an accelerator: what the hardware would have supplied, and nothing else.

Named in ``VERL_USE_EXTERNAL_MODULES``, so verl imports it in every process: driver, Ray workers, vLLM server and vLLM
workers. Importing it installs the shims. Each one holds when it is installed twice. None touches verl's loss scaling:
what stock verl does there stays visible.
"""

from verl_on_cpu import checkpoint_engine, critic, device, engine, sampler

for concern in (device, engine, critic, sampler, checkpoint_engine):
    concern.install()
