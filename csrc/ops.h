// Checks, shape inference and allocation shared with the ops that are made of others (csrc/linear_batched.cpp,
// linear_relu.cpp, conv2d_relu.cpp, conv2d_relu_max_pool2d.cpp). `op` is the name used in error messages.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"

namespace pyops {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of input, weight and bias, as far as asked for

at::Tensor relu_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& output);

at::Tensor linear(const char* op, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                  bool relu);
Gradients linear_backward(const char* op, const at::Tensor& grad_output, const OptionalTensor& input,
                          const OptionalTensor& weight, std::array<bool, 3> output_mask);

// check_saved: the tensors that the requested gradients need were saved. check_saved_input: linear's input fits
// grad_output.
void check_saved(const char* op, const OptionalTensor& input, const OptionalTensor& weight,
                 std::array<bool, 3> output_mask);
void check_saved_input(const char* op, const at::Tensor& grad_output, const at::Tensor& input);

// torch.backends.cuda.matmul.allow_tf32, or what fp32_precision says in its place, for products of this tensor.
bool linear_allows_tf32(const at::Tensor& tensor);

// The arguments of a convolution besides its tensors.
struct Conv2dOptions {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

at::Tensor conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                  const Conv2dOptions& options, bool relu);
Gradients conv2d_backward(const char* op, const at::Tensor& grad_output, const OptionalTensor& input,
                          const OptionalTensor& weight, at::IntArrayRef input_size, at::IntArrayRef weight_size,
                          const Conv2dOptions& options, std::array<bool, 3> output_mask);

// The backward of a convolution, after every check of its arguments except grad_output.
struct Conv2dGradients {
  Conv2dBackwardArgs args;  // without grad_output; its pointers are set by allocate()
  at::Tensor input, weight, grad_input, grad_weight, grad_bias;
  at::IntArrayRef weight_size;
  at::MemoryFormat grad_weight_format;
  std::array<bool, 3> output_mask;
  bool batched;

  void allocate(const at::TensorOptions& like);
  Gradients results() const;
};
// `grad` gives the dtype and device, and `images` the memory format if there is no input.
Conv2dGradients checked_conv2d_backward(const char* op, const at::Tensor& grad, const at::Tensor& images,
                                        const OptionalTensor& input, const OptionalTensor& weight,
                                        at::IntArrayRef input_size, at::IntArrayRef weight_size,
                                        const Conv2dOptions& options, std::array<bool, 3> output_mask);

// A convolution whose arguments have been checked. The tensors are what `args` points to, with images as a batch, in
// the layout of the shape.
struct CheckedConv2d {
  Conv2dArgs args;  // without output
  at::Tensor input, weight, bias;
  bool batched;
};
CheckedConv2d checked_conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                             const OptionalTensor& bias, const Conv2dOptions& options);

// The arguments of a pooling besides its tensors.
struct PoolOptions {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  bool ceil_mode;
};

// The shape of the pooling of an input of sizes `input`, after every check.
MaxPool2dShape checked_pool_shape(const char* op, at::IntArrayRef input, const PoolOptions& options);
at::ScalarType argmax_dtype(const MaxPool2dShape& shape);
// The shape of the pooling that produced argmax, after every check of the arguments of its backward.
MaxPool2dShape checked_pool_backward_shape(const char* op, const at::Tensor& grad_output, const at::Tensor& argmax,
                                           at::IntArrayRef input_size, const PoolOptions& options);
at::Tensor max_pool2d_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& argmax,
                               at::IntArrayRef input_size, const PoolOptions& options);

}  // namespace pyops
