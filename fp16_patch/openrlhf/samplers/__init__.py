"""OpenRLHF's vLLM engines."""
