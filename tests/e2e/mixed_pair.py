"""`import fp16_patch.openrlhf` before OpenRLHF's own main, in a fork that starts its engines in bfloat16 all the same.

Stands before the usual command, as `fp16-patch run` does: `python mixed_pair.py python -u -m MODULE ARGUMENTS`.
"""

import runpy
import sys

import fp16_patch.openrlhf  # noqa: F401
from fp16_patch.openrlhf.samplers import vllm

planned = vllm.engine_arguments
vllm.engine_arguments = lambda arguments: {**planned(arguments), "dtype": "bfloat16"}

module, *arguments = sys.argv[sys.argv.index("-m") + 1 :]
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
