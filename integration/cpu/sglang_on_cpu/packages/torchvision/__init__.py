"""For models of images only; its builds for CUDA break a CPU torch."""

from absent_kernels import stand_in

__version__ = "0.28.0"
__getattr__ = stand_in(__name__)
