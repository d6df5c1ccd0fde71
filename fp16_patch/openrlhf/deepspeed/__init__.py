"""OpenRLHF's DeepSpeed engines: configuration, steps, retries, checkpoints, LoRA."""
