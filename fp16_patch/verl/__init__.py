"""verl under the plan. Importing this package activates it: `actor_rollout_ref.model.external_lib=fp16_patch.verl`.

The hooks that `patches/verl/*.toml` name live here, one concern a room: `config/` what the configuration says and which
engines are refused; `fsdp/` the FSDP engine, and VeOmni's, which is one; `megatron/` Megatron's engine and workers;
`legacy/` the FSDP workers of before 0.8.0; `trainers/` the driver, and what the mismatch monitor sees; `samplers/` the
processes that generate.
"""

from fp16_patch.runtime.activation import activate

activate()
