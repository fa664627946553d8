// The copies that bring the operands of a matrix product (gemm/gemm.h) from memory to shared memory.
//
// An operand computes the address of its element (row, k) from two halves, so that what depends on the row alone is
// computed once for many k: address(row(i), term(k)). The address is null for an element that is 0 and not in memory.
// An operand has these members:
//   T, Row, Term   the type of its elements, and the types that row() and term() return
//   along_k        whether k is the dimension that is contiguous in memory; otherwise the rows are
//   width          the number of bytes that may be read at once, beginning at any multiple of as many elements;
//                  copy_width() computes it
//   data           any address, for copies that read nothing
//
// A tile has the layout in shared memory that it has in memory, along k or along the rows. `pad` separates its lines,
// so that neither the rows of ldmatrix nor the lanes of a fragment that is read without it meet in a bank. A step along
// k is 64 bytes deep for every type. Copies are cp.async of 16 bytes where the operand allows it, else of 4 bytes (8
// for double). Single 16-bit elements, which cp.async cannot copy, wait in registers while the current step is
// multiplied.
#pragma once

#include "tensor_cores.h"

namespace pyops::cuda {

// The widest copy to which an address and all strides are aligned: 16 bytes, else 4 (8 for double), else one element.
template <class T, class... Strides>
int copy_width(const T* data, Strides... strides) {
  constexpr uint64_t single = sizeof(T), narrow = sizeof(T) == 8 ? 8 : 4;
  const uint64_t bits = (reinterpret_cast<uintptr_t>(data) | ... | (static_cast<uint64_t>(strides) * sizeof(T)));
  return static_cast<int>(bits % 16 == 0 ? 16 : bits % narrow == 0 ? narrow : single);
}

// A matrix in which one dimension is contiguous.
template <class Element, bool contiguous_k>
struct Matrix {
  using T = Element;
  using Row = int64_t;
  using Term = int64_t;
  static constexpr bool along_k = contiguous_k;
  const T* data;
  int64_t stride;  // of the other dimension
  int width;

  Matrix(const void* pointer, int64_t stride)
      : data(static_cast<const T*>(pointer)), stride(stride), width(copy_width(data, stride)) {}
  __device__ __forceinline__ Row row(int64_t row) const { return contiguous_k ? row * stride : row; }
  __device__ __forceinline__ Term term(int64_t k) const { return contiguous_k ? k : k * stride; }
  __device__ __forceinline__ const T* address(Row row, Term term) const { return data + row + term; }
};

template <class T, bool along_k, int rows>
struct TileLayout {
  static constexpr int depth = 64 / sizeof(T);
  static constexpr int pad = sizeof(T) == 2 ? 8 : sizeof(T) == 8 ? 4 : along_k ? 4 : 8;
  static constexpr int lines = along_k ? rows : depth, length = along_k ? depth : rows;
  static constexpr int pitch = length + pad, elements = lines * pitch;
  static __device__ __forceinline__ int at(int row, int k) { return along_k ? row * pitch + k : k * pitch + row; }
};

// The copies that one of `threads` threads makes to bring an operand's tiles of `rows` rows to shared memory.
template <class Operand, int rows, int threads>
class TileCopy {
  using T = typename Operand::T;
  using Row = typename Operand::Row;
  using Term = typename Operand::Term;
  static constexpr bool along_k = Operand::along_k;
  using Layout = TileLayout<T, along_k, rows>;

  // A line of the tile is read in runs of `bytes` bytes; each thread reads one run of every `step`-th line.
  template <int bytes>
  struct Runs {
    static constexpr int elements = bytes / sizeof(T), in_line = Layout::length / elements, step = threads / in_line;
    static constexpr int count = step > Layout::lines ? 1 : Layout::lines / step;
    static_assert(threads % in_line == 0 && (step > Layout::lines || Layout::lines % step == 0));
    static __device__ __forceinline__ int line(int i) { return i * step + threadIdx.x / in_line; }
    static __device__ __forceinline__ int at() { return threadIdx.x % in_line * elements; }
  };
  static constexpr int narrow = sizeof(T) == 8 ? 8 : 4;
  static constexpr bool single = sizeof(T) < 4;  // cp.async cannot copy single elements

  const Operand& operand_;
  int64_t first_row_;
  int rows_;                                     // rows of the tile that exist
  Row row_[along_k ? Runs<16>::count : 1] = {};  // one for each run of 16 bytes, or one for all runs
  T held_[single ? Runs<sizeof(T)>::count : 1];

 public:
  // Copies the operand's rows from first_row on; it has `end_row` rows in all.
  __device__ __forceinline__ TileCopy(const Operand& operand, int64_t first_row, int64_t end_row)
      : operand_(operand), first_row_(first_row), rows_(static_cast<int>(min(end_row - first_row, int64_t{rows}))) {
    if constexpr (along_k) {
#pragma unroll
      for (int i = 0; i < Runs<16>::count; ++i) row_[i] = row(Runs<16>::line(i));
    } else {
      const int width = operand.width;
      row_[0] = row(width == 16 ? Runs<16>::at() : width == narrow ? Runs<narrow>::at() : Runs<sizeof(T)>::at());
    }
  }

  // Starts to copy the tile that begins at first_k to `tile`; its elements from end_k on are 0.
  __device__ __forceinline__ void start(T* tile, int64_t first_k, int64_t end_k) {
    if (operand_.width == 16) {
      copy<16>(tile, first_k, end_k);
    } else if (!single || operand_.width == narrow) {
      copy<narrow>(tile, first_k, end_k);
    } else if constexpr (single) {
      each<sizeof(T)>(first_k, end_k,
                      [&](int i, int, const T* source, int count) { held_[i] = count > 0 ? *source : narrow_zero(); });
    }
  }

  // Stores the elements that cp.async cannot copy.
  __device__ __forceinline__ void finish(T* tile) const {
    if constexpr (single) {
      if (operand_.width != sizeof(T)) return;
      using Single = Runs<sizeof(T)>;
#pragma unroll
      for (int i = 0; i < Single::count; ++i)
        if (Single::line(i) < Layout::lines) tile[Single::line(i) * Layout::pitch + Single::at()] = held_[i];
    }
  }

 private:
  static __device__ __forceinline__ T narrow_zero() { return pyops::cuda::narrow<T>(0.0f); }

  __device__ __forceinline__ Row row(int number) const {
    return number < rows_ ? operand_.row(first_row_ + number) : Row{};
  }

  // Calls move(i, offset in the tile, address, number of elements that exist) for each of the thread's runs.
  template <int bytes, class Move>
  __device__ __forceinline__ void each(int64_t first_k, int64_t end_k, Move&& move) const {
    using R = Runs<bytes>;
    const int at = R::at();
    Term term{};
    if (along_k && first_k + at < end_k) term = operand_.term(first_k + at);
#pragma unroll
    for (int i = 0; i < R::count; ++i) {
      const int line = R::line(i);
      if (R::step > Layout::lines && line >= Layout::lines) return;
      const int row_number = along_k ? line : at;
      const int64_t k = first_k + (along_k ? at : line);
      const T* source = nullptr;
      if (row_number < rows_ && k < end_k) {
        source = operand_.address(!along_k      ? row_[0]
                                  : bytes == 16 ? row_[i]
                                                : row(line),
                                  along_k ? term : operand_.term(k));
      }
      const int64_t room = along_k ? end_k - k : int64_t{rows_ - at};
      const int count = source == nullptr ? 0 : room < R::elements ? static_cast<int>(room) : R::elements;
      move(i, line * Layout::pitch + at, source, count);
    }
  }

  template <int bytes>
  __device__ __forceinline__ void copy(T* tile, int64_t first_k, int64_t end_k) const {
    each<bytes>(first_k, end_k, [&](int, int offset, const T* source, int count) {
      copy_async<bytes>(tile + offset, count > 0 ? source : operand_.data, count * static_cast<int>(sizeof(T)));
    });
  }
};

}  // namespace pyops::cuda
