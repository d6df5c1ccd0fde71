"""SGLang on a machine without an accelerator, beside `verl_on_cpu`: what the hardware would have supplied.

Named in ``VERL_USE_EXTERNAL_MODULES`` after `verl_on_cpu`, so verl imports it in each of its processes. SGLang's
schedulers know nothing of verl: there it is a plugin (`packages`), beside stand-ins for what is built for CUDA only.
"""

from sglang_on_cpu import weight_sync

weight_sync.install()
