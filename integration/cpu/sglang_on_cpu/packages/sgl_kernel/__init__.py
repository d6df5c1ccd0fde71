"""SGLang's kernels, which models of text do not call on a CPU."""

from absent_kernels import stand_in

__version__ = "0.4.2"
__getattr__ = stand_in(__name__)
