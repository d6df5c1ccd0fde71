"""A plan in this process and those it starts: activation, propagation, ledger, preflight check, driver, FP32 parts."""
