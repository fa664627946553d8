"""Faults in relu."""

from fuzzing.faults.fault import Fault

FAULTS = (
    Fault(
        "relu: the vector at the end is left out",
        "relu.cpp",
        "for (; i < end; i += n) {",
        "for (; i + n <= end; i += n) {",
        "relu",
        "relu",
    ),
    Fault(
        "relu: an output of zero passes its gradient",
        "relu.cpp",
        "return Vec<T>::blendv(grad_output, zero, output <= zero);",
        "return Vec<T>::blendv(grad_output, zero, output < zero);",
        "relu",
        "relu.backward",
    ),
    Fault(
        "relu: a negative NaN of 16 bits becomes zero",
        "relu.cpp",
        "(input > minus_zero) & (input <= minus_infinity)",
        "(input > minus_zero) & (input < zero)",
        "relu",
        "relu",
    ),
    Fault(
        "relu: NaN blocks its gradient",
        "simd/mask_bits.h",
        "_mm256_movemask_ps(_mm256_cmp_ps(output, _mm256_setzero_ps(), _CMP_NLE_UQ))",
        "_mm256_movemask_ps(_mm256_cmp_ps(output, _mm256_setzero_ps(), _CMP_GT_OQ))",
        "relu",
        "relu.with_mask",
        "avx2",
    ),
    Fault(
        "relu: the last lane of 16 takes the bit of the one before",
        "simd/mask_bits.h",
        "1 << 14, int16_t(-0x8000))",
        "1 << 14, 1 << 14)",
        "relu",
        "relu.mask_backward",
        "avx2",
    ),
)
