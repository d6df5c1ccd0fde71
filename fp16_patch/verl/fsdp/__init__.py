"""verl's FSDP engine: building, updates, FP32 numerics, checkpoints, exported weights, the weight sync."""
