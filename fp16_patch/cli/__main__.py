"""`python -m fp16_patch.cli`, where the console script is not at hand."""

from fp16_patch.cli import main

main(prog_name="fp16-patch")
