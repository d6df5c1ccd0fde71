"""Stands in for flash-attn, whose kernels need CUDA: the names OpenRLHF imports from it."""
