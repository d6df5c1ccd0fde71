"""verl's FSDP workers of before 0.8.0: `fsdp_workers`, `dp_actor` and `dp_critic`.

`workers` holds what is done where models are built, updated and saved, `dp_actor` what is done to each micro-batch and
each optimizer step.
"""
