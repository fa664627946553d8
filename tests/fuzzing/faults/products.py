"""Faults in matrix products and in the code that they share with convolutions."""

from fuzzing.faults.fault import Fault

FAULTS = (
    Fault(
        "gemm: of one row only the last chunk of K counts",
        "gemm/one_row.h",
        "(load(total + j, count) + load(sums + j, count)).store(total + j, count);",
        "load(sums + j, count).store(total + j, count);",
        "linear",
        "gemm:one_row",
    ),
    Fault(
        "gemm: every chunk of K begins at the first row of B",
        "gemm/matrix.h",
        "return {b.at(k, n), multiples(Scratch::b_offsets",
        "return {b.at(0, n), multiples(Scratch::b_offsets",
        "linear",
        "gemm:tiles_in_place",
    ),
    Fault(
        "gemm: the panels of every chunk are kept in one place",
        "gemm/gemm.h",
        "panels + (kept ? (k - x.k_begin) / k_per_step<F> * columns : 0)",
        "panels",
        "linear",
        "gemm:tiles_of_panels",
    ),
    Fault(
        "linear: the gradient of a weight for one sample lacks the end of its rows",
        "linear.cpp",
        "for (int64_t k = 0; k < x.K; k += V::size()) {",
        "for (int64_t k = 0; k + V::size() <= x.K; k += V::size()) {",
        "linear",
        "linear.weight_gradient:outer_product",
    ),
    Fault(
        "linear: parts of the batch after the first begin 16 samples late",
        "linear.cpp",
        "begin = std::min(i * part, x.M), end",
        "begin = std::min(i * part + 16 * (i > 0), x.M), end",
        "linear",
        "linear.weight_gradient:split_k",
    ),
    Fault(
        "linear: the weight gradient leaves out the last sample",
        "linear.cpp",
        "problem.out(), 0, x.M};",
        "problem.out(), 0, x.M - 1};",
        "linear",
        "linear.weight_gradient:single_product",
    ),
    Fault(
        "blocking: chunks of K overlap by 16 terms",
        "gemm/k_chunks.h",
        "i < chunks; ++i, k += size)",
        "i < chunks; ++i, k += size - 16)",
        "linear",
    ),
    Fault(
        "tile: the bias of the first panel is added to every panel",
        "gemm/microkernel.cpp",
        "if (target.column_bias) target.column_bias += width * OperandVec<T>::size();",
        "",
        "linear",
    ),
    Fault(
        "tile: the chunks of K before the last are lost where there is a bias",
        "gemm/microkernel.cpp",
        "if (x.accumulate)\n      for_each_sum("
        "[&](int i, int j, Accumulator<T>* to, V value) { sum[i][j] = V::loadu(to) + value; });",
        "",
        "linear",
    ),
    Fault(
        "tile: a part of a vector is not rectified",
        "gemm/epilogue.h",
        "    if (target.relu) sum = at::vec::clamp_min(sum, V(0));\n    if constexpr",
        "    if constexpr",
        "linear_relu",
    ),
    Fault(
        "sums: the last chunk of rows is missing in the gradient of a bias",
        "gemm/bias_sums.h",
        "for (int64_t i = 1; i < chunks; ++i) sum += partial",
        "for (int64_t i = 1; i + 1 < chunks; ++i) sum += partial",
        "linear",
    ),
    Fault(
        "transpose: rows left over of tiles lack the columns of whole tiles",
        "simd/transpose.h",
        "c = r < whole_rows ? whole_columns : in_squares;",
        "c = whole_columns;",
        "linear",
    ),
    Fault(
        "output: 16-bit results are truncated",
        "simd/vec.h",
        "store_lanes(at::vec::convert_from_float<Out>(value, value));",
        "const Vec<float> exact = value & Vec<float>(c10::bit_cast<float>(0xFFFF0000u));\n"
        "    store_lanes(at::vec::convert_from_float<Out>(exact, exact));",
        "linear",
    ),
)
