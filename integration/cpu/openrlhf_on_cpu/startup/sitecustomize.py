"""Imported by Python as it starts. The module of this name that it hides, further along the path, runs too."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import openrlhf_on_cpu  # noqa: F401

_here = [Path(entry).resolve() for entry in sys.path].index(Path(__file__).resolve().parent)
_hidden = PathFinder.find_spec("sitecustomize", sys.path[_here + 1 :])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
