"""verl's Megatron engine and workers: dtypes, steps, ledger."""
