"""`python -m fp16_patch`, which is `fp16-patch`."""

from fp16_patch.cli import main

main(prog_name="fp16-patch")
