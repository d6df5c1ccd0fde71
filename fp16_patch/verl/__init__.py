"""verl under the plan. Importing this package activates it: `actor_rollout_ref.model.external_lib=fp16_patch.verl`.

The hooks that patches/verl/*.toml name live in this folder, one concern a file: what the configuration says (`config`),
which engines are refused (`engines`), the FSDP engine's step (`engine`, in two passes `folded_step`), FP32 numerics
(`numerics`), scaler state (`checkpoint`), exported weights (`export`), weights on the way to the sampler (`wire`), the
sampler's processes (`rollout`), the driver (`driver`, by the hooks in `trainer` and `trainer_v0`), what the mismatch
monitor sees (`observation`); Megatron's dtypes, steps and ledger (`megatron*`); workers of before 0.8.0 (`legacy/`).
"""

from fp16_patch.activation import activate

activate()
