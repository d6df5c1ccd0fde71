"""OpenRLHF under the plan. Importing this package activates it: before OpenRLHF's own main, or by `fp16-patch run`.

The hooks that patches/openrlhf/*.toml name live in this folder, one concern a file: what the command line says
(`arguments`), DeepSpeed's engines and their steps (`strategy`), PPO's updates tried again (`retry`), scaler state
(`checkpoint`), the sampler (`rollout`), LoRA's weight sync (`lora`), the trainer that drives PPO (`trainer`) and the
rewards it computes from (`rewards`), what the mismatch monitor sees (`observation`), SFT, DPO and reward-model training
(`supervised`).
"""

from fp16_patch.activation import activate

activate()
