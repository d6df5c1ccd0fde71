"""A plan in this process and the ones it starts: activation, propagation, ledger, preflight check, FP32 weights."""
