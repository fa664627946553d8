// Convolutions over blocks of images (conv2d/chwn.h), forward and backward: what conv2d*.cpp and the fused op are made
// of.
//
// Every output pixel is a vector of its own, and each pixel sums over just the taps that lie inside of the image, where
// the other ways multiply the zeros around it. That pays where vectors along the pixels or the channels would leave
// lanes idle. A block costs two transposes, of which a fused op needs only those of its small ends.
#pragma once

#include <c10/util/FunctionRef.h>

#include "chwn.h"
#include "problem.h"

namespace pyops::cpu {

// One correlation, laid out for any number of blocks. The pixels whose taps inside are the same, a class, are one
// product of gemm/microkernel.h. A sum runs over (channel, tap) in order and in the chunks that conv2d/convolve.cpp
// has, less its zeros: the result is the same to the last bit as that of its ways for which sums_in_order holds.
template <class T>
class BatchLanesConvolution {
 public:
  // Lays out in the scratch of this thread, until it makes another one. A single phase only.
  explicit BatchLanesConvolution(const ConvProblem<T>& x);

  int64_t source_size() const { return x_.input.image_stride; }
  int64_t output_size() const { return x_.groups * x_.out_channels * x_.input.pixels(); }
  double flops_of_image() const {
    return 2.0 * static_cast<double>(x_.groups * x_.out_channels * x_.input.pixels() * x_.depth());
  }

  // A share of the pixels of one block, in the memory layout of the tensors: the source's, to the output's.
  void operator()(const Compute<T>* source, Compute<T>* output, Share share) const;

 private:
  ConvProblem<T> x_;
  const Compute<T>*filters_, *bias_;
  int64_t class_count_, chunks_;
  const int64_t* class_pixels_;                  // how many each class has
  const int64_t *filter_steps_, *source_steps_;  // of all terms, in bytes, and
  const int64_t* chunk_begins_;                  // where among them each chunk of each class begins
  const int64_t *from_, *to_;                    // the pixels of all classes in a block of the source and of the output
  const int64_t *filter_rows_, *target_rows_;
};

// The gradients of weight and bias, summed over blocks. No tap leaves the image.
//   sums[row, o, n] += sum over the pixels of source(row, pixel, n) * grad(o, pixel, n)     row = (channel, tap)
//   bias[o, n]      += sum over the pixels of grad(o, pixel, n)
// Each is a vector of one sum for each image of a block; tiles of dot_rows x dot_columns of them go through the pixels
// of a few rows at a time, which stay in the L1 cache.
template <class T>
class BatchLanesWeightGradient {
 public:
  BatchLanesWeightGradient(const Conv2dShape& s, const ConvInput<T>& source);

  // A share of the rows, and the bias of the first of them.
  void operator()(const Compute<T>* source, const Compute<T>* grad, Compute<T>* sums, Compute<T>* bias,
                  Share share) const;

 private:
  int64_t depth() const { return source_.depth(); }
  int64_t out() const { return s_.O / s_.groups; }

  Conv2dShape s_;
  ConvInput<T> source_;
  const int64_t *rows_, *source_pixels_, *grad_pixels_;
};

// Whether the gradients should be computed over blocks of images: few channels, and no tap that leaves the image.
template <class T>
bool should_use_batch_lanes_backward(const Conv2dBackwardArgs& x);

// grad_block(first, count, block, team) lays out the gradients of the output for images [first, first + count).
template <class T>
using GradBlock = c10::function_ref<void(int64_t first, int64_t count, Compute<T>* block, const Team& team)>;

// All gradients that are asked for, where they should; x.grad_output is not looked at.
template <class T>
void batch_lanes_backward(const Conv2dBackwardArgs& x, GradBlock<T> grad_block);

}  // namespace pyops::cpu
