"""verl's FSDP engine: steps, FP32 numerics, checkpoints, exported weights, the weight sync."""
