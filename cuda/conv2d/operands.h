// The parts of conv2d's implicit GEMMs: operands that find their elements in the images (gemm/copy.h), the weight in
// the order that they need, and the epilogues.
#pragma once

#include <optional>

#include "../gemm/gemm.h"
#include "direct.h"

namespace pyops::cuda {

// The meaning of k: a channel and the position of a tap. The order is that of the images in memory, so that
// neighbouring threads read neighbouring elements: channels are outermost for N C H W and innermost for N H W C.
template <class Index, bool channels_last>
struct Depth {
  Divider<Index> channels, kernel_h, kernel_w;
  struct Term {
    Index channel, i, j;
  };
  Depth(int64_t channels, int64_t kernel_h, int64_t kernel_w)
      : channels(channels), kernel_h(kernel_h), kernel_w(kernel_w) {}
  __device__ __forceinline__ Term operator()(Index k) const {
    Term term;
    if constexpr (channels_last) term.channel = take_digit(k, channels);
    term.j = take_digit(k, kernel_w);
    if constexpr (channels_last) {
      term.i = k;
    } else {
      term.i = take_digit(k, kernel_h);
      term.channel = k;
    }
    return term;
  }
};

// In one dimension, tap t of the receptive field of pixel p lies at p * stride + offset + t * step of the image.
template <class Index>
struct Axis {
  Index stride, offset, step;
};

// Element (pixel, tap) is what the receptive field of the pixel has at the tap, or 0 outside the image, as im2col would
// write it. The pixels are those of a grid [N, height, width]. This matrix holds the receptive fields of the output in
// the input and, for each phase of the input gradient, those of its pixels in grad_output (conv2d/implicit_gemm.h).
// Contiguous in memory are the channels of N H W C, and the pixels of N C H W if the only tap of each is the pixel
// itself.
template <class Element, class Index, bool channels_last>
struct WindowMatrix {
  using T = Element;
  using Unsigned = std::make_unsigned_t<Index>;
  static constexpr bool along_k = channels_last;
  Images<Index> images;
  Divider<Index> grid_h, grid_w;
  Axis<Index> h, w;
  Depth<Index, channels_last> taps;
  const T* data;
  int width;

  WindowMatrix(const Images<Index>& images, int64_t grid_h, int64_t grid_w, const Axis<Index>& h, const Axis<Index>& w,
               const Depth<Index, channels_last>& taps, const T* data)
      : images(images), grid_h(grid_h), grid_w(grid_w), h(h), w(w), taps(taps), data(data), width(sizeof(T)) {
    const auto is_identity = [](const Axis<Index>& axis, Index taps, Index pixels, Index size) {
      return taps == 1 && axis.stride == 1 && axis.offset == 0 && pixels == size;
    };
    if (channels_last) {
      width = copy_width(data, images.C.value());
    } else if (is_identity(h, taps.kernel_h.value(), this->grid_h.value(), images.H.value()) &&
               is_identity(w, taps.kernel_w.value(), this->grid_w.value(), images.W.value())) {
      width = copy_width(data, images.c_stride);
    }
  }

  // The offset of an element is the sum of its row's and its term's. These wrap around where they lie far outside.
  struct Part {
    Unsigned offset;
    Index h, w;
  };
  using Row = Part;
  using Term = Part;
  __device__ __forceinline__ Row row(int64_t number) const {
    auto n = static_cast<Index>(number);
    const Index x = take_digit(n, grid_w), y = take_digit(n, grid_h);
    return part(n * images.n_stride, y * h.stride + h.offset, x * w.stride + w.offset);
  }
  __device__ __forceinline__ Term term(int64_t k) const {
    const auto tap = taps(static_cast<Index>(k));
    return part(tap.channel * images.c_stride, tap.i * h.step, tap.j * w.step);
  }
  __device__ __forceinline__ const T* address(const Row& row, const Term& term) const {
    const auto y = static_cast<Unsigned>(row.h + term.h), x = static_cast<Unsigned>(row.w + term.w);  // large if < 0
    if (y >= images.H.divisor || x >= images.W.divisor) return nullptr;
    return data + (row.offset + term.offset);
  }

 private:
  __device__ __forceinline__ Part part(Index offset, Index y, Index x) const {
    return {Unsigned(offset) + Unsigned(y) * images.h_stride + Unsigned(x) * images.w_stride, y, x};
  }
};

// Element (channel, pixel) of images N C H W. For images N H W C, it is a Matrix.
template <class Element, class Index>
struct ChannelMatrix {
  using T = Element;
  using Row = Index;
  using Term = Index;
  static constexpr bool along_k = true;
  Images<Index> images;
  const T* data;
  int width = copy_width(data, images.c_stride);
  __device__ __forceinline__ Row row(int64_t channel) const { return static_cast<Index>(channel) * images.c_stride; }
  __device__ __forceinline__ Term term(int64_t k) const {
    const auto pixel = images.pixel(static_cast<Index>(k));
    return images.offset(pixel.n, 0, pixel.h, pixel.w);
  }
  __device__ __forceinline__ const T* address(Row row, Term term) const { return data + (row + term); }
};

template <class Matrix>
struct Transposed {
  using T = typename Matrix::T;
  using Row = typename Matrix::Term;
  using Term = typename Matrix::Row;
  static constexpr bool along_k = !Matrix::along_k;
  Matrix matrix;
  const T* data = matrix.data;
  int width = matrix.width;
  __device__ __forceinline__ Row row(int64_t row) const { return matrix.term(row); }
  __device__ __forceinline__ Term term(int64_t k) const { return matrix.row(k); }
  __device__ __forceinline__ const T* address(const Row& row, const Term& term) const {
    return matrix.address(term, row);
  }
};

// The taps of the weight that a product uses: in each dimension, as many as `taps` says, the first one and every
// `step`-th from there.
template <class Index, bool channels_last>
struct WeightOrder {
  Depth<Index, channels_last> taps;
  Index first_i, step_i, first_j, step_j;
  Index row_stride, channel_stride, kernel_w;  // of the weight

  __device__ __forceinline__ Index offset(Index row, Index k) const {
    const auto tap = taps(k);
    return row * row_stride + tap.channel * channel_stride + (first_i + tap.i * step_i) * kernel_w + first_j +
           tap.j * step_j;
  }
};

// Writes ordered[row][k], whose pitch makes each row begin a multiple of 16 bytes from the first.
template <class T, class Index, bool channels_last>
__global__ void __launch_bounds__(block_threads, 1)
    order_weight(const __grid_constant__ WeightOrder<Index, channels_last> order, Divider<Index> depth, Index pitch,
                 const T* weight, int64_t count, T* ordered) {
  const int64_t number = thread_number();
  if (number >= count) return;
  auto row = static_cast<Index>(number);
  const Index k = take_digit(row, depth);
  ordered[int64_t{row} * pitch + k] = weight[order.offset(row, k)];
}

// Copies the weight in that order, and sets `result` to the copy as the matrix [rows, depth] of a product.
template <class T, class Index, bool channels_last>
cudaError_t ordered_weight(const WeightOrder<Index, channels_last>& order, int64_t rows, int64_t depth, const T* weight,
                           std::optional<Matrix<T, true>>& result, Workspace& workspace, cudaStream_t stream) {
  const int64_t pitch = ceil_div(depth, Pack<T>::size) * Pack<T>::size;
  T* ordered = workspace.array<T>(std::max(rows * pitch, int64_t{1}));
  result.emplace(ordered, pitch);
  if (depth == 0) return cudaSuccess;
  return launch_for(order_weight<T, Index, channels_last>, rows * depth, stream, order, Divider<Index>(depth), pitch,
                    weight, rows * depth, ordered);
}

// The epilogues. In a product, taps outside the image are 0, and 0 times infinity is NaN, whereas a sum over the taps
// inside has no such term. So a sum that is NaN is taken again by the direct algorithm, which checks each tap.

template <class Element, class Index, bool channels_last>
struct StoreOutput {
  using T = Element;
  Conv<Index> conv;
  const T *input, *weight, *bias;
  T* output;
  bool relu, has_border;
  bool pairs = lie_in_pairs(output, channels_last ? conv.output.C.value() : conv.output.c_stride);
  __device__ __forceinline__ T* address(int64_t row, int64_t column) const {
    const auto at = position(row, column);
    return output + conv.output.offset(at.n, at.c, at.h, at.w);
  }
  __device__ __forceinline__ T result(int64_t row, int64_t column, Compute<T> sum) const {
    if (has_border && sum != sum) sum = convolve(conv, input, weight, position(row, column));
    const T value = finish_conv(sum, bias, channels_last ? column : row);
    return relu ? narrow<T>(rectified(widen(value))) : value;
  }

 private:
  __device__ __forceinline__ Position<Index> position(int64_t row, int64_t column) const {
    const auto pixel = conv.output.pixel(static_cast<Index>(channels_last ? row : column));
    return {pixel.n, static_cast<Index>(channels_last ? column : row), pixel.h, pixel.w};
  }
};

// Stores the pixels of a phase: every stride_h-th and stride_w-th one from (first_h, first_w) on.
template <class Element, class Index, bool channels_last>
struct StoreGradInput {
  using T = Element;
  Conv<Index> conv;
  Divider<Index> grid_h, grid_w;
  Index first_h, first_w;
  const T *grad_output, *weight;
  T* grad_input;
  bool pairs = channels_last ? lie_in_pairs(grad_input, conv.input.C.value())
                             : conv.stride_h.value() == 1 && conv.stride_w.value() == 1 &&
                                   lie_in_pairs(grad_input, conv.input.c_stride);
  __device__ __forceinline__ T* address(int64_t row, int64_t column) const {
    const auto at = position(row, column);
    return grad_input + conv.input.offset(at.n, at.c, at.h, at.w);
  }
  __device__ __forceinline__ T result(int64_t row, int64_t column, Compute<T> sum) const {
    return narrow<T>(sum != sum ? gradient_of_input(conv, grad_output, weight, position(row, column)) : sum);
  }

 private:
  __device__ __forceinline__ Position<Index> position(int64_t row, int64_t column) const {
    auto n = static_cast<Index>(channels_last ? row : column);
    const Index x = take_digit(n, grid_w), y = take_digit(n, grid_h);
    return {n, static_cast<Index>(channels_last ? column : row), first_h + y * conv.stride_h.value(),
            first_w + x * conv.stride_w.value()};
  }
};

template <class Element, class Index, bool channels_last>
struct StoreGradWeight {
  using T = Element;
  Conv<Index> conv;
  Depth<Index, channels_last> taps;
  const T *grad_output, *input;
  T* grad_weight;
  Index pixels;
  bool has_border;
  bool pairs = (!channels_last || conv.kernel_h.value() * conv.kernel_w.value() == 1) &&
               lie_in_pairs(grad_weight, conv.in_per_group.value() * conv.kernel_h.value() * conv.kernel_w.value());
  __device__ __forceinline__ T* address(int64_t row, int64_t column) const { return grad_weight + offset(row, column); }
  __device__ __forceinline__ T result(int64_t row, int64_t column, Compute<T> sum) const {
    if (has_border && sum != sum)
      sum = gradient_of_weight<T, Index>(conv, grad_output, input, offset(row, column), 0, 1, pixels);
    return narrow<T>(sum);
  }

 private:
  __device__ __forceinline__ Index offset(int64_t row, int64_t column) const {
    const auto tap = taps(static_cast<Index>(column));
    return conv.weight_offset(static_cast<Index>(row), tap.channel, tap.i, tap.j);
  }
};

}  // namespace pyops::cuda
