// Convolutions and their gradients over CHWN blocks of images (conv2d/chwn.h), with the batch in lanes. Both conv2d and
// the fused conv2d_relu_max_pool2d use them.
//
// Every output pixel is a vector of its own and sums over just the taps that lie inside of the image, where other
// algorithms may multiply the zeros around it. That pays where vectors along the width or the channels would leave
// lanes idle. A block costs two transposes; in a fused op these are only the transposes of its input and of its pooled
// output.
#pragma once

#include <c10/util/FunctionRef.h>

#include "algorithms.h"
#include "chwn.h"

namespace pyops::cpu {

// One convolution, prepared for any number of blocks. The pixels for which the same taps lie inside form a class, and
// each class is one product of gemm/microkernel.h. A sum runs over (channel, tap) in the order and the chunks of the
// implicit GEMMs, without their zeros, so the result is bit-identical to that of the algorithms for which sums_in_order
// holds, unless they multiply pairs.
template <class T>
class BatchLanesConvolution {
 public:
  // x must be a single phase. The tables lie in this thread's scratch, until the thread constructs another one.
  explicit BatchLanesConvolution(const ConvProblem<T>& x);

  int64_t source_size() const { return x_.input.image_stride; }
  int64_t output_size() const { return x_.groups * x_.out_channels * x_.input.pixels(); }
  double flops_of_image() const {
    return 2.0 * static_cast<double>(x_.groups * x_.out_channels * x_.input.pixels() * x_.depth());
  }

  // Computes a share of the pixels of one block. The elements of both blocks are in the order of their tensors.
  void operator()(const Compute<T>* source, Compute<T>* output, Share share) const;

 private:
  ConvProblem<T> x_;
  const Compute<T>*filters_, *bias_;
  int64_t class_count_, chunks_;
  const int64_t* class_pixels_;                  // the number of pixels of each class
  const int64_t *filter_steps_, *source_steps_;  // the terms of all classes, in bytes
  const int64_t* chunk_begins_;                  // the first term of each chunk of each class
  const int64_t *from_, *to_;                    // the pixels of all classes, in an input and an output block
  const int64_t *filter_rows_, *target_rows_;
};

// The gradients of weight and bias, summed over blocks. No tap may leave the image. With row = (channel, tap):
//
//   sums[row, o, n] += sum over the pixels of source(row, pixel, n) * grad(o, pixel, n)
//   bias[o, n]      += sum over the pixels of grad(o, pixel, n)
//
// Each result is a vector with one sum for each image of a block. Register tiles of dot_rows x dot_columns vectors run
// over bands of pixels that are short enough for their gradients to stay in the L1 cache.
template <class T>
class BatchLanesWeightGradient {
 public:
  BatchLanesWeightGradient(const Conv2dShape& s, const ConvInput<T>& source);

  // Adds a share of the rows; the share that has row 0 also adds the bias.
  void operator()(const Compute<T>* source, const Compute<T>* grad, Compute<T>* sums, Compute<T>* bias,
                  Share share) const;

 private:
  int64_t depth() const { return source_.depth(); }
  int64_t out() const { return s_.O / s_.groups; }

  Conv2dShape s_;
  ConvInput<T> source_;
  const int64_t *rows_, *source_pixels_, *grad_pixels_;
};

// All gradients together with the batch in lanes: an algorithm of conv2d_backward. No tap may leave the image.
template <class T>
struct BatchLanesBackward {
  static bool supports(const Conv2dBackwardArgs& x);
  static bool profitable(const Conv2dBackwardArgs& x);
};

// Whether conv2d_backward chooses it.
template <class T>
bool uses_batch_lanes_backward(const Conv2dBackwardArgs& x);

// grad_block(first, count, block, team) writes grad_output of images [first, first + count) to a CHWN block.
template <class T>
using GradBlock = c10::function_ref<void(int64_t first, int64_t count, Compute<T>* block, const Team& team)>;

// Computes all requested gradients, where BatchLanesBackward supports that; x.grad_output is not read.
template <class T>
void batch_lanes_backward(const Conv2dBackwardArgs& x, GradBlock<T> grad_block);

}  // namespace pyops::cpu
