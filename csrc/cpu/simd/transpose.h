// target[c * target_stride + r] = source[r * source_stride + c], converted to T.
//
// Floats pass through registers in tiles of one vector of rows by 4 columns: each 128-bit lane of four vectors is
// loaded from a row of its own, and a 4 x 4 transpose inside the lanes does all the work, with 8 shuffles for 4
// vectors. Doubles use tiles of 2 columns. With AVX-512, squares of 16 x 16 floats or 16-bit numbers are transposed
// whole. All of this is written in intrinsics because at::vec's transpose keeps its vectors in memory.
#pragma once

#include <algorithm>

#include "vec.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512)
using FloatVector = __m512;
// Loads four columns of rows i, i + 4, i + 8 and i + 12; of doubles, two columns of rows i, i + 2, i + 4 and i + 6.
inline __m512 load_lanes(const float* p, int64_t stride) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * stride), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * stride), 3);
}
inline void transpose_lanes(__m512 (&v)[4]) {
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(a, c, 0x44), v[1] = _mm512_shuffle_ps(a, c, 0xEE);
  v[2] = _mm512_shuffle_ps(b, d, 0x44), v[3] = _mm512_shuffle_ps(b, d, 0xEE);
}
inline void transpose_lanes(__m512 (&v)[2]) {
  const __m512d a = _mm512_castps_pd(v[0]), b = _mm512_castps_pd(v[1]);
  v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
}
inline void store_vector(float* p, __m512 v) {
  _mm512_storeu_ps(p, v);
}
template <class T>
constexpr bool is_squared = std::is_same_v<T, float> || is_reduced<T>;
// square[c] = column c of up to 16 rows of `columns` columns. Missing rows repeat the last row, and missing columns are
// zero. Every cache line of the source is read once, because rows a power of two apart evict one another.
constexpr int64_t square_columns = 16;
template <class In>
inline void load_square(__m512 (&square)[16], const In* source, int64_t source_stride, int64_t rows,
                        int64_t columns = 16) {
  const auto mask = static_cast<__mmask16>((1u << columns) - 1);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const In* row = source + std::min<int64_t>(i, rows - 1) * source_stride;
    a[i] = columns == square_columns ? load_floats(row) : load_floats(row, mask);
    _mm_prefetch(reinterpret_cast<const char*>(row + 64), _MM_HINT_T0);  // 16 rows are more streams than a core follows
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    __m512 quad[4] = {a[i], a[i + 1], a[i + 2], a[i + 3]};
    transpose_lanes(quad);  // quad[j]: columns j, j + 4, j + 8, j + 12 of rows i .. i + 3, one to a lane
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[i + j] = quad[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x44),
                 high01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xEE);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xEE);
    square[j] = _mm512_shuffle_f32x4(low01, low23, 0x88), square[4 + j] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    square[8 + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    square[12 + j] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}
template <class In>
inline void transpose_square(float* target, int64_t target_stride, const In* source, int64_t source_stride,
                             int64_t rows, int64_t columns = 16) {
  const auto mask = static_cast<__mmask16>((1u << rows) - 1);
  __m512 square[16];
  load_square(square, source, source_stride, rows, columns);
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c)
    if (c < columns) _mm512_mask_storeu_ps(target + c * target_stride, mask, square[c]);
}
#elif defined(CPU_CAPABILITY_AVX2)
using FloatVector = __m256;
// Loads four columns of rows i and i + 4; of doubles, two columns of rows i and i + 2.
inline __m256 load_lanes(const float* p, int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
}
inline void transpose_lanes(__m256 (&v)[4]) {
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(a, c, 0x44), v[1] = _mm256_shuffle_ps(a, c, 0xEE);
  v[2] = _mm256_shuffle_ps(b, d, 0x44), v[3] = _mm256_shuffle_ps(b, d, 0xEE);
}
inline void transpose_lanes(__m256 (&v)[2]) {
  const __m256d a = _mm256_castps_pd(v[0]), b = _mm256_castps_pd(v[1]);
  v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
}
inline void store_vector(float* p, __m256 v) {
  _mm256_storeu_ps(p, v);
}
#endif

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// For the rows that do not fill a vector.
inline void transpose_4x4(float* target, int64_t target_stride, const float* source, int64_t source_stride) {
  __m128 a = _mm_loadu_ps(source), b = _mm_loadu_ps(source + source_stride);
  __m128 c = _mm_loadu_ps(source + 2 * source_stride), d = _mm_loadu_ps(source + 3 * source_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(target, a), _mm_storeu_ps(target + target_stride, b);
  _mm_storeu_ps(target + 2 * target_stride, c), _mm_storeu_ps(target + 3 * target_stride, d);
}
#endif

template <class T, class In>
void transpose(T* target, int64_t target_stride, const In* source, int64_t source_stride, int64_t rows,
               int64_t columns) {
  int64_t whole_rows = 0, whole_columns = 0, in_squares = 0;  // what tiles cover, and the columns that squares cover
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float> && is_squared<In>) {
    in_squares = columns / square_columns * square_columns;
    for (int64_t r = 0; r < rows; r += 16)
      for (int64_t c = 0; c < in_squares; c += square_columns)
        transpose_square(target + c * target_stride + r, target_stride, source + r * source_stride + c, source_stride,
                         std::min(int64_t{16}, rows - r));
  }
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<In, T> && std::is_floating_point_v<T>) {
    constexpr int64_t tile_rows = sizeof(FloatVector) / sizeof(T), tile_columns = 16 / sizeof(T);
    whole_rows = rows / tile_rows * tile_rows, whole_columns = columns / tile_columns * tile_columns;
    for (int64_t r = 0; r < whole_rows; r += tile_rows) {
      for (int64_t c = in_squares; c < whole_columns; c += tile_columns) {
        FloatVector v[tile_columns];
        for (int i = 0; i < tile_columns; ++i)
          v[i] = load_lanes(reinterpret_cast<const float*>(source + (r + i) * source_stride + c), source_stride);
        transpose_lanes(v);
        for (int i = 0; i < tile_columns; ++i)
          store_vector(reinterpret_cast<float*>(target + (c + i) * target_stride + r), v[i]);
      }
    }
    if constexpr (std::is_same_v<T, float>) {
      for (; whole_rows + 4 <= rows; whole_rows += 4)
        for (int64_t c = in_squares; c < whole_columns; c += 4)
          transpose_4x4(target + c * target_stride + whole_rows, target_stride, source + whole_rows * source_stride + c,
                        source_stride);
    }
  }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : in_squares; c < columns; ++c)
      target[c * target_stride + r] = static_cast<T>(source[r * source_stride + c]);
}

#if defined(__SSE2__)
// Load or store up to 16 bytes; a load fills the rest with zeros, a store leaves the rest of the memory alone.
inline __m128i load_bytes(const uint8_t* p, int64_t count) {
  if (count >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (count == 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  uint8_t bytes[16] = {};
  std::copy_n(p, count, bytes);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}
inline void store_bytes(uint8_t* p, __m128i v, int64_t count) {
  if (count >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
  if (count == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v);
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), v);
  std::copy_n(bytes, count, p);
}
#endif

// Transposes bytes in squares of 16 x 16: interleaving row i with row i + 8, four times over, is a transpose.
inline void transpose_bytes(uint8_t* target, int64_t target_stride, const uint8_t* source, int64_t source_stride,
                            int64_t rows, int64_t columns) {
#if defined(__SSE2__)
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t height = std::min(int64_t{16}, rows - r);
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t width = std::min(int64_t{16}, columns - c);
      __m128i a[16], b[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        a[i] = i < height ? load_bytes(source + (r + i) * source_stride + c, width) : _mm_setzero_si128();
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
          b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        std::copy_n(b, 16, a);
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        if (i < width) store_bytes(target + (c + i) * target_stride + r, a[i], height);
    }
  }
#else
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) target[c * target_stride + r] = source[r * source_stride + c];
#endif
}

}  // namespace pyops::cpu
