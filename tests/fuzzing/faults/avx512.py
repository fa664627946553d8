"""Faults in the code for AVX-512 alone."""

from fuzzing.faults.fault import Fault

FAULTS = (
    Fault(
        "gemm: the second of two adjacent squares writes where the first does",
        "gemm/one_row.h",
        "finish_row<F>(x.out, n + c * lanes, total[c], counts[c]);",
        "finish_row<F>(x.out, n, total[c], counts[c]);",
        "linear",
        "gemm:one_row_transposed_2",
        "avx512",
    ),
    Fault(
        "gemm: of squares one after the other only the last chunk of K counts",
        "gemm/one_row.h",
        "total[c] = first ? sum[c] : total[c] + sum[c];",
        "total[c] = first || chains == 1 ? sum[c] : total[c] + sum[c];",
        "linear",
        "gemm:one_row_transposed",
        "avx512",
    ),
    Fault(
        "pooling 2x2: the upper row says which column wins",
        "max_pool2d/forward_2x2_avx512.h",
        "(lower.right_wins & lower_wins) | (upper.right_wins & ~lower_wins);",
        "upper.right_wins;",
        "max_pool2d",
        "max_pool2d.forward:2x2",
        "avx512",
    ),
    Fault(
        "pooling: a pattern reaches over 17 windows",
        "max_pool2d/backward_patterns_avx512.h",
        "if (earlier + *std::max_element(p.lanes, p.lanes + p.count) >= 16) return false;",
        "if (earlier + *std::max_element(p.lanes, p.lanes + p.count) > 16) return false;",
        "max_pool2d",
        "max_pool2d.backward:patterns",
        "avx512",
    ),
    Fault(
        "pooling 2x2: a row below the windows takes gradients of the next plane",
        "max_pool2d/backward_row_pairs_avx512.h",
        "any ? last_windows_ : 0, last_columns_);",
        "last_windows_, last_columns_);",
        "max_pool2d",
        "max_pool2d.backward:row_pairs_2x2",
        "avx512",
    ),
    Fault(
        "pooling 3x3: a row below the windows takes gradients of the next plane",
        "max_pool2d/backward_row_pairs_avx512.h",
        "below = y + 1 < s_.OH ? s_.OW - x : 0;",
        "below = s_.OW - x;",
        "max_pool2d",
        "max_pool2d.backward:row_pairs_3x3",
        "avx512",
    ),
)
