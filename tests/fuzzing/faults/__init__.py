"""Faults that tests/mutate.py plants in the CPU kernels, one at a time, and that tests/fuzz.py has to find.

The table follows the code: if a text is no longer found, an equivalent mistake has to be written for the new code.
"""

from fuzzing.faults import avx512, conv2d, conv2d_gradients, elementwise, max_pool2d, products
from fuzzing.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *elementwise.FAULTS,
    *products.FAULTS,
    *conv2d.FAULTS,
    *conv2d_gradients.FAULTS,
    *max_pool2d.FAULTS,
    *max_pool2d.FUSED_FAULTS,
    *avx512.FAULTS,
)
