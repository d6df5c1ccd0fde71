"""Stands in for flash-attn's package of the same name."""
