"""A machine on which fp16_patch cannot be imported in vLLM's worker processes, and in them alone."""

import multiprocessing
import sys


class Broken:
    """A finder that fails as a half-installed package does."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "fp16_patch.runtime.activation" and multiprocessing.current_process().name.startswith("VllmWorker"):
            raise ImportError("this file is missing on this machine")


sys.meta_path.insert(0, Broken)
