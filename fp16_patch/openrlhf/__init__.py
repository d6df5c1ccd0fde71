"""OpenRLHF under the plan. Importing this package activates it: before OpenRLHF's own main, or by `fp16-patch run`.

The hooks that `patches/openrlhf/*.toml` name live here, one concern a room: `config/` what the command line says;
`deepspeed/` the engines and their steps; `trainers/` PPO's driver, supervised training, and what the mismatch monitor
sees; `samplers/` the processes that generate.
"""

from fp16_patch.runtime.activation import activate

activate()
