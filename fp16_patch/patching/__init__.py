"""Patches: declared in `patches/`, compared with the installed code by fingerprint, applied to it and undone."""
