"""verl's FSDP engine and VeOmni's: building, updates, FP32 numerics, checkpoints, exported weights, the weight sync."""
