"""verl's Megatron engine and workers without a GPU: what CUDA and TransformerEngine would have supplied, nothing else.

Named in ``VERL_USE_EXTERNAL_MODULES`` behind ``verl_on_cpu``, so verl imports it in every process. What stands in for
layers and optimizers goes in as Megatron imports its own. What stands in for CUDA goes in when the first of them is
built, and only in that process: others must go on to hear from torch that there is no GPU. No shim touches a dtype, a
loss scale or a metric.
"""

from megatron_on_cpu import engine, fused_adam, layer_specs, mixture_of_experts, workers

for concern in (layer_specs, mixture_of_experts, fused_adam, engine, workers):
    concern.install()
