"""A tiny run of verl's SFT trainers: what it learns from, and the settings it is started with."""

from __future__ import annotations

from pathlib import Path

STEPS = 3
# Too high for the gradients of the tiny model, by a few halvings.
TOO_HIGH = 2.0**18


def write_conversations(folder: Path) -> Path:
    """Write a few conversations, as verl's SFT dataset reads them."""
    import pandas

    def conversation(number: int) -> list[dict[str, str]]:
        said = {"user": f"{number}+{number}=", "assistant": f"{2 * number}<|im_end|>"}
        return [{"role": role, "content": content} for role, content in said.items()]

    path = folder / "train.parquet"
    pandas.DataFrame({"messages": [conversation(number) for number in range(16)]}).to_parquet(path)
    return path


def settings(model: Path, conversations: Path, out: Path, strategy: str = "fsdp") -> list[str]:
    """Return hydra's overrides, among them what verl documents as the switch to float16."""
    return [
        f"data.train_files={conversations}",
        "data.val_files=null",
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=1",
        "data.use_dynamic_bsz=False",
        "++data.num_workers=0",
        "data.ignore_input_ids_mismatch=True",
        f"model.path={model}",
        # Padding can be removed only by flash-attn's kernels, which need CUDA.
        "model.use_remove_padding=False",
        "+model.override_config.attn_implementation=sdpa",
        "model.enable_gradient_checkpointing=False",
        f"engine.strategy={strategy}",
        "engine.use_torch_compile=False",
        "engine.dtype=float16",
        "optim.lr_warmup_steps=4",
        "trainer.device=cpu",
        "trainer.logger=[console,file]",
        "trainer.total_epochs=1",
        f"trainer.total_training_steps={STEPS}",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={out}/checkpoints",
        f"hydra.run.dir={out}/hydra",
    ]
